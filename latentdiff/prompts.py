"""What people write into prompts: weights, BREAK, AND, and parts that change during the run.

Two programs gave the signs their meaning, and one prompt makes different pictures in them: `a1111`, the syntax of most shared
prompts, and `comfyui`. `SYNTAXES` names both, and `plain`, where every character is text. A prompt is read in this order:

    conjunction   "a cat AND a dog :0.5"   prompts that are guided together, each with a weight
    schedule      "a [cat:dog:0.5]"        what a prompt says until which step
    parse         "a (cat:1.3) BREAK sky"  sections, each starting a new chunk, of (text, weight)
    weigh         states of the text tower, and a weight for each token -> states

No text makes these functions raise, and none recurses: ten thousand nested brackets are read like ten thousand letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

Sections = list[list[tuple[str, float]]]
Weigh = Callable[[Float[Tensor, "c n d"], Float[Tensor, "c n"], Float[Tensor, "1 n d"]], Float[Tensor, "c n d"]]
"""(states of each chunk, weight of each token, states of the empty prompt) -> states"""

NUMBER = r"[+-]?+(?:\d++\.?+\d*+|\.\d++)"  # possessive: a long row of digits that ends badly is read once
_A1111 = re.compile(rf"\\[()\[\]\\]|\\|[()\[\]]|:\s*+(?P<weight>{NUMBER})\s*+\)|[^\\()\[\]:]++|:")
_COMFYUI = re.compile(rf"\\[()]|[()]|:\s*+(?P<weight>{NUMBER})\s*+\)|[^\\():]++|[\\:]")
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(rf":\s*+({NUMBER})\s*+\Z")
_SIGNS = re.compile(r"\\.|[()\[\]:|]", re.DOTALL)


# -- weights of words --


def plain(prompt: str) -> Sections:
    """The prompt as it stands: one section, weight 1."""
    return [[(prompt, 1.0)]]


def a1111(prompt: str) -> Sections:
    """`(x)` ×1.1, `[x]` ÷1.1, `(x:1.5)` ×1.5, nested ones multiply; `\\(` is a bracket as text; BREAK starts a section.

    An unclosed bracket runs to the end, one that closes nothing is text.
    """
    tokens = [(m.group(), m["weight"]) for m in _A1111.finditer(prompt)]
    pairs = _pairs(tokens, {")": "(", "]": "["})
    closing, sections = set(pairs.values()), _Sections()
    stacks = {"(": [1.0], "[": [1.0]}  # the product of all brackets of a kind that are open: the kinds need not nest
    for i, (token, _) in enumerate(tokens):
        if token in stacks:
            weight = tokens[pairs[i]][1] if i in pairs else None
            stacks[token].append(stacks[token][-1] * (float(weight) if weight else 1.1 if token == "(" else 1 / 1.1))
        elif i in closing:
            stacks["[" if token == "]" else "("].pop()
        elif token.startswith("\\"):
            sections.add(token[1:], stacks["("][-1] * stacks["["][-1])
        else:
            sections.add_with_breaks(token, stacks["("][-1] * stacks["["][-1])
    return sections.list


def comfyui(prompt: str) -> Sections:
    """`(x)` ×1.1, `(x:1.5)` is 1.5 whatever stands around it; `\\(` is a bracket as text; nothing else is special.

    An unclosed bracket makes all that follows text, one that closes nothing is text.
    """
    tokens = [(m.group(), m["weight"]) for m in _COMFYUI.finditer(prompt)]
    pairs = _pairs(tokens, {")": "("})
    closing, sections, weights = set(pairs.values()), _Sections(), [1.0]
    text_from = next((i for i, (token, _) in enumerate(tokens) if token == "(" and i not in pairs), len(tokens))
    for i, (token, _) in enumerate(tokens):
        if i < text_from and token == "(":
            weight = tokens[pairs[i]][1]
            weights.append(float(weight) if weight else weights[-1] * 1.1)
        elif i < text_from and i in closing:
            weights.pop()
        else:
            sections.add(token[1:] if token in ("\\(", "\\)") else token, weights[-1])
    return sections.list


def _pairs(tokens: list[tuple[str, str | None]], closers: dict[str, str]) -> dict[int, int]:
    """Where the bracket that opens at i closes; the kinds of brackets need not nest. `:1.3)` closes like `)`."""
    pairs: dict[int, int] = {}
    stacks: dict[str, list[int]] = {opening: [] for opening in closers.values()}
    for i, (token, weight) in enumerate(tokens):
        opening = closers.get(")" if weight else token)
        if token in stacks:
            stacks[token].append(i)
        elif opening and stacks[opening]:
            pairs[stacks[opening].pop()] = i
    return pairs


class _Sections:
    """Sections as they are read: texts of one weight in a row become one."""

    def __init__(self) -> None:
        self.list: Sections = [[]]

    def add(self, text: str, weight: float) -> None:
        section = self.list[-1]
        if section and section[-1][1] == weight:
            section[-1] = (section[-1][0] + text, weight)
        elif text:
            section.append((text, weight))

    def add_with_breaks(self, text: str, weight: float) -> None:
        """White space around BREAK belongs to it."""
        parts = _BREAK.split(text)
        for k, part in enumerate(parts):
            part = part.lstrip() if k > 0 else part
            part = part.rstrip() if k < len(parts) - 1 else part
            if k > 0:
                self.list.append([])
            self.add(part, weight)


# -- applying weights to a tower's states --


def scale(states: Float[Tensor, "c n d"], weights: Float[Tensor, "c n"], empty: Tensor) -> Float[Tensor, "c n d"]:
    """z · w: A1111's rule with its "no norm"."""
    return states * weights[..., None].to(states.dtype)


def scale_and_keep_mean(states: Float[Tensor, "c n d"], weights: Float[Tensor, "c n"], empty: Tensor) -> Float[Tensor, "c n d"]:
    """z · w, then a factor that restores the mean over each chunk: A1111's rule.

    It is one factor for all tokens, so a weight on one word moves the others too.
    """
    scaled = scale(states, weights, empty)
    return scaled * (states.mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True))


def from_empty(states: Float[Tensor, "c n d"], weights: Float[Tensor, "c n"], empty: Tensor) -> Float[Tensor, "c n d"]:
    """(z - z_empty) · w + z_empty: ComfyUI's rule, away from or towards what the empty prompt says at that place."""
    return empty + (states - empty) * weights[..., None].to(states.dtype)


@dataclass(frozen=True, kw_only=True)
class Syntax:
    """How a prompt is read. dynamic: whether AND and `[a:b:when]` are, too."""

    parse: Callable[[str], Sections]
    weigh: Weigh
    dynamic: bool = False


SYNTAXES: dict[str, Syntax] = {
    "a1111": Syntax(parse=a1111, weigh=scale_and_keep_mean, dynamic=True),
    "a1111-no-norm": Syntax(parse=a1111, weigh=scale, dynamic=True),
    "comfyui": Syntax(parse=comfyui, weigh=from_empty),
    "plain": Syntax(parse=plain, weigh=scale),
}


# -- prompts that are guided together --


def conjunction(prompt: str) -> list[tuple[str, float]]:
    """The prompts between capital ANDs and the weight of each: the number after its last colon, or 1.

    A prompt without AND has weight 1, also if it ends in a colon and a number; A1111 takes that for a weight, too.
    """
    parts = _AND.split(prompt)
    if len(parts) == 1:
        return [(prompt, 1.0)]
    found = [(part, _PART_WEIGHT.search(part)) for part in parts]
    return [(part[: m.start()].strip(), float(m[1])) if m else (part.strip(), 1.0) for part, m in found]


# -- prompts that change during the run --


@dataclass(frozen=True)
class _Group:
    """Square brackets with alternatives: of `[a:b:when]`, which changes after step `when`, or of `[a|b]`, which takes turns.

    cuts: where its signs stand in the text: the opening bracket, the separators, the closing bracket.
    """

    cuts: tuple[int, ...]
    when: float | None = None

    def said(self, step: int, steps: int) -> int:
        """Which of the parts between the cuts is said at `step`, from 1 to `steps`; -1 for none. `when` itself is never said."""
        if self.when is None:
            return (step - 1) % (len(self.cuts) - 1)
        first = len(self.cuts) - 4  # 0; in [b:when], where nothing stands before b, -1
        return first if step <= self.change(steps) else first + 1

    def change(self, steps: int) -> int:
        """The last step before the change: `when` below 1 is a fraction of the steps."""
        when = self.when or 0.0
        return int(min(max(when * steps if when < 1 else when, 0), steps))


def schedule(prompt: str, steps: int) -> list[tuple[int, str]]:
    """What a prompt says until (and including) which step, from 1 to `steps`, at least 1; the last entry ends at `steps`.

    `[a:b:when]` changes from a to b after step `when`, `[b:when]` adds, `[a::when]` removes, `[a|b]` takes turns; `when` below 1
    is a fraction of the steps. All other brackets stay as they are: they are weights.
    """
    groups = _groups(prompt)
    takes_turns = any(group.when is None for group in groups)
    ends = range(1, steps + 1) if takes_turns else sorted({steps, *(max(group.change(steps), 1) for group in groups)})
    marks = sorted((at, i, k, k == len(group.cuts) - 1) for i, group in enumerate(groups) for k, at in enumerate(group.cuts))
    entries: list[tuple[int, str]] = []
    for end in ends:
        text = _said(prompt, marks, [group.said(end, steps) for group in groups])
        if entries and entries[-1][1] == text:
            entries.pop()
        entries.append((end, text))
    return entries


@dataclass(frozen=True)
class Said:
    """What a picture is told until (and including) step `until`: prompts with weights, and a negative prompt."""

    until: int
    parts: tuple[tuple[str, float], ...]
    negative: str = ""


def plan(prompt: str, negative: str, steps: int, syntax: Syntax) -> list[Said]:
    """AND, the schedule of each of its parts and that of the negative prompt, put together; the last ends at `steps`.

    In a negative prompt AND is a word like others, as in A1111.
    """
    if not syntax.dynamic:
        return [Said(steps, ((prompt, 1.0),), negative)]
    parts = [(schedule(text, steps), weight) for text, weight in conjunction(prompt)]
    negatives = schedule(negative, steps)
    ends = sorted({end for entries in (negatives, *(entries for entries, _ in parts)) for end, _ in entries})
    return [Said(end, tuple((_at(entries, end), weight) for entries, weight in parts), _at(negatives, end)) for end in ends]


def _at(entries: list[tuple[int, str]], step: int) -> str:
    return next(text for end, text in entries if step <= end)


def _said(text: str, marks: list[tuple[int, int, int, bool]], alive: list[int]) -> str:
    """The text outside of all groups and in the part of each that is alive.

    marks: (place, group, which of its cuts, whether it is the last of them), by place.
    """
    out, silent, last = [], 0, 0
    for at, i, k, closes in marks:
        if not silent:
            out.append(text[last:at])
        last = at + 1
        silent += (not closes and alive[i] != k) - (k > 0 and alive[i] != k - 1)
    return "".join([*out, text[last:]])


def _groups(text: str) -> list[_Group]:
    """The square brackets with alternatives, by a stack of open brackets and the separators that stand in each."""
    groups: list[_Group] = []
    stack: list[tuple[str, int, list[int]]] = []  # (bracket, its place, separators in it)
    opened = {"(": 0, "[": 0}
    for m in _SIGNS.finditer(text):
        sign, at = m.group(), m.start()
        opening = {")": "(", "]": "["}.get(sign, "")
        if sign in opened:
            stack.append((sign, at, []))
            opened[sign] += 1
        elif sign in (":", "|") and stack:
            stack[-1][2].append(at)
        elif opened.get(opening):
            frames = [stack.pop()]  # from the last unclosed bracket inside to the one that closes here
            while frames[-1][0] != opening:
                frames.append(stack.pop())
            for kind, _, _ in frames:
                opened[kind] -= 1
            separators = [place for _, _, own in reversed(frames) for place in own]
            if sign == "]" and (group := _group(text, frames[-1][1], separators, at)):
                groups.append(group)
    return groups


def _group(text: str, start: int, separators: list[int], end: int) -> _Group | None:
    """The group that these brackets are, if any: a number after the last of one or two colons, else at least one bar."""
    colons = [at for at in separators if text[at] == ":"]
    bars = [at for at in separators if text[at] == "|"]
    number = re.fullmatch(NUMBER, text[colons[-1] + 1 : end].strip()) if len(colons) in (1, 2) else None
    if number:
        return _Group((start, *colons, end), float(number[0]))
    return _Group((start, *bars, end)) if bars else None
