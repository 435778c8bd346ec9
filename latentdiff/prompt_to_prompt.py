"""Prompt-to-prompt (Hertz et al., arXiv 2208.01626): edit words by control of attention, and look at attention itself.

Two pictures run side by side from the same noise, the source with the old prompt and the target with the new. In the first steps
the target attends as the source does. Every control of the paper (replace, refine, reweight, self-attention) is linear in the
attention maps, so it is done to the values that the maps are applied to: (softmax(q k^T) M) v is plain attention with values M v.
No map is ever formed, nothing is a second U-Net, and identical prompts give identical pictures to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from functools import cached_property, partial
from itertools import islice
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentdiff.conditioning import TextEncoder, parts
from latentdiff.diffusion.denoiser import Denoise
from latentdiff.models.attention import Attend, Site, sdpa
from latentdiff.request import shown

Way = Literal["replace", "refine"]
Span = tuple[int, ...]  # positions of a word's tokens in the context


# ------------------------------------------------------------------------------------------------------------------- words


@dataclass(frozen=True)
class Words:
    """The words of a prompt, with the positions of their tokens among the `length` of the context."""

    prompt: str
    words: tuple[str, ...]
    spans: tuple[Span, ...]
    length: int

    def find(self, phrase: str) -> Span:
        """The tokens of a word, or of several in a row, wherever they stand; empty if nowhere."""
        wanted = [bare(w) for w in phrase.split()]
        own, n = [bare(w) for w in self.words], len(wanted)
        starts = [i for i in range(len(own)) if n and own[i : i + n] == wanted]
        return tuple(p for i in starts for span in self.spans[i : i + n] for p in span)

    def span(self, phrase: str, argument: str) -> Span:
        """As `find`; ValueError that names the argument where the prompt has no such word."""
        found = self.find(phrase) if isinstance(phrase, str) else ()
        if not found:
            raise ValueError(f"{argument} must be a word of the prompt {shown(self.prompt)}, got {shown(phrase)}")
        return found

    def others(self) -> list[int]:
        """Positions of begin, end and padding."""
        taken = {p for span in self.spans for p in span}
        return [p for p in range(self.length) if p not in taken]


def bare(word: str) -> str:
    """A word without case, and without the signs around it."""
    return word.lower().strip(".,;:!?\"'()[]{}<>*") or word.lower()


def words(text: TextEncoder, prompt: str, length: int) -> Words:
    """Where the words of a prompt lie in a context of `length` tokens, as `conditioning.chunks` lays them out."""
    tokenize, spec = text.tokenizers[0], text.towers[0].spec
    ids = [(word, tokenize(word)) for word in prompt.split()]
    flat, comma = [(id, 1.0) for _, own in ids for id in own], next(iter(tokenize(",")), None)
    sizes = [len(part) for part in parts(flat, spec.length - 2, comma)]
    places = iter([chunk * spec.length + 1 + k for chunk, size in enumerate(sizes) for k in range(size)])
    found = [(word, tuple(islice(places, len(own)))) for word, own in ids if own]
    return Words(prompt, tuple(word for word, _ in found), tuple(span for _, span in found), length)


# ----------------------------------------------------------------------------------------------------------------- control


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """What the targets of a batch take from their sources.

    source: which of the source's maps make up the map of each of the target's tokens. own: 1 for tokens that keep their own.
    scale: factor of each token's map. cross_above, self_above: levels down to which the control of cross- and self-attention lasts.
    """

    source: Float[Tensor, "b m n"]
    own: Float[Tensor, "b n"]
    scale: Float[Tensor, "b n"]
    cross_above: float
    self_above: float

    @cached_property
    def aligned(self) -> bool:
        """Each of the targets' tokens answers to the source's in the same place."""
        m, n = self.source.shape[1:]
        return m == n and bool((self.source == torch.eye(n, dtype=self.source.dtype, device=self.source.device)).all())

    @cached_property
    def alone(self) -> bool:
        """Some of the targets' tokens keep their own maps."""
        return bool((self.own > 0).any())

    @cached_property
    def weighted(self) -> bool:
        return bool((self.scale != 1).any())

    def join(self, other: Control) -> Control:
        """Both batches as one; the control lasts as long in either."""
        pairs = ((self.source, other.source), (self.own, other.own), (self.scale, other.scale))
        source, own, scale = (torch.cat(pair) for pair in pairs)
        return replace(self, source=source, own=own, scale=scale)


def control(
    source: Words,
    target: Words,
    sigmas: Float[Tensor, " steps+1"],
    *,
    way: Way | None,
    cross: float,
    self_attention: float,
    weights: Mapping[str, float],
) -> Control:
    """The control of one edit; `cross` and `self_attention` are shares of the steps. way: as `alignment`, None chooses.

    Errors: ValueError for a weighted word that the target does not have.
    """
    mixed = alignment(source, target, way or ("replace" if len(source.words) == len(target.words) else "refine"))
    scale = torch.ones(target.length, dtype=torch.float32, device="cpu")
    for word, weight in weights.items():
        scale[list(target.span(word, "weights"))] = weight
    levels = [*sigmas[:-1].tolist(), -1.0]

    def above(share: float) -> float:
        """The level of the first step that is free; the last controlled one lies above it."""
        return levels[round(share * (len(levels) - 1))]

    return Control(
        source=mixed[None],
        own=(mixed.sum(0) == 0).float()[None],
        scale=scale[None],
        cross_above=above(cross),
        self_above=above(self_attention),
    )


def alignment(source: Words, target: Words, way: Way) -> Float[Tensor, "m n"]:
    """Which of the source's tokens each of the target's answers to; a column of zeros is a token that answers to none.

    "replace": words that stand in others' place take those words' maps (section 4.1, "word swap"). "refine": new words keep their
    own, words that are in both prompts take the source's ("adding a new phrase").
    """
    mixed = torch.zeros(source.length, target.length, dtype=torch.float32, device="cpu")
    a, b = [bare(w) for w in source.words], [bare(w) for w in target.words]
    for kind, i, i_end, j, j_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and way == "replace"):
            pair(mixed, source.spans[i:i_end], target.spans[j:j_end])
    olds, news = source.others(), target.others()
    for k, new in enumerate(news):  # begin, end, padding
        mixed[olds[min(k, len(olds) - 1)], new] = 1
    return mixed


def pair(mixed: Float[Tensor, "m n"], olds: Sequence[Span], news: Sequence[Span]) -> None:
    """Word by word, and token by token, where there are as many; else each new token takes its share of all the old ones."""
    if len(olds) == len(news) > 1:
        for old, new in zip(olds, news, strict=True):
            pair(mixed, [old], [new])
        return
    flat_old, flat_new = [p for s in olds for p in s], [p for s in news for p in s]
    if len(flat_old) == len(flat_new):
        mixed[flat_old, flat_new] = 1
    else:
        mixed[[[row] for row in flat_old], flat_new] = 1 / len(flat_new)


# --------------------------------------------------------------------------------------------------------------- attention


class Guided(Protocol):
    """(x, sigma, attend) -> x0: a guided denoiser whose attention can be wrapped. The prompt's half of its batch comes first."""

    def __call__(self, x: Tensor, sigma: Tensor, attend: Attend, /) -> Tensor: ...


@dataclass(eq=False)
class Pair:
    """The denoiser of one run of sources and targets side by side: x holds the sources' rows, then the targets'.

    It lives as long as the run: it sums up the maps that the region is made of.
    """

    source: Guided
    target: Guided
    control: Control
    region: Region | None = None
    seen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # site -> the sources' queries and keys in this step

    def __call__(self, x: Float[Tensor, "b c h w"], sigma: Tensor) -> Float[Tensor, "b c h w"]:
        old, new = x.chunk(2)
        level, region, control = sigma.item(), self.region, self.control
        self.seen.clear()
        looks = [region.look(k, x) if region else sdpa for k in range(2)]
        if level > min(control.cross_above, control.self_above) or control.weighted:  # else attention is left alone
            looks = [partial(step, look, level, len(old)) for step, look in zip((self._watch, self._control), looks, strict=True)]
        x0_old, x0_new = self.source(old, sigma, looks[0]), self.target(new, sigma, looks[1])
        if region:
            x0_new = region.keep(x0_old, x0_new, level)
        return torch.cat([x0_old, x0_new])

    def _above(self, site: Site) -> float:
        return self.control.cross_above if site.cross else self.control.self_above

    def _watch(self, attend: Attend, level: float, n: int, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        if level > self._above(site):
            self.seen[site.name] = (q[:n], k[:n])
        return attend(q, k, v, site)

    def _control(self, attend: Attend, level: float, n: int, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """The prompt's rows as the control has them; the rows of the negative prompt are left alone."""
        told = v[:n] * self.control.scale.to(v)[:, None, :, None] if site.cross and self.control.weighted else v[:n]
        out = attend(q, k, torch.cat([told, v[n:]]), site)
        return torch.cat([self._mixed(q[:n], k[:n], told, site), out[n:]]) if level > self._above(site) else out

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """softmax(q_s k_s^T) M v + softmax(q k^T) own v, where M spreads the source's tokens over the target's."""
        old_q, old_k = self.seen[site.name]
        if not site.cross:
            return sdpa(old_q, old_k, v, site)
        control = self.control
        out = sdpa(old_q, old_k, v if control.aligned else control.source.to(v)[:, None] @ v, site)
        return out + sdpa(q, k, control.own.to(v)[:, None, :, None] * v, site) if control.alone else out


# -------------------------------------------------------------------------------------------------------------- maps of words


@dataclass(eq=False)
class Maps:
    """Sums up, over sites and steps, how much each place attends to some tokens (DAAM: Tang et al., arXiv 2210.04885).

    spans: of each row of the prompt, the first of the batch; where one is empty, nothing attends.
    """

    spans: tuple[Span, ...]
    height: int
    width: int
    total: Float[Tensor, "b h w"] | None = None

    def watch(self, q: Tensor, k: Tensor, site: Site) -> None:
        if site.cross and any(self.spans):
            grid, rows = resolution(q.shape[2], self.height, self.width), len(self.spans)
            maps = (q[:rows].float() @ k[:rows].float().mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)  # [b, n, m]
            own = [m[:, list(span)].sum(-1) for m, span in zip(maps, self.spans, strict=True)]
            seen = torch.stack(own).unflatten(-1, grid)  # [b, h, w]
            full = F.interpolate(seen[:, None], (self.height, self.width), mode="bilinear", align_corners=False)[:, 0]
            self.total = full if self.total is None else self.total + full

    def look(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Plain attention, watched."""
        self.watch(q, k, site)
        return sdpa(q, k, v, site)

    def heat(self) -> Float[Tensor, "b h w"]:
        """From 0 to 1."""
        total = self.total
        if total is None:
            total = torch.zeros(len(self.spans), self.height, self.width, dtype=torch.float32, device="cpu")
        low, high = total.amin((1, 2), keepdim=True), total.amax((1, 2), keepdim=True)
        return (total - low) / (high - low).clamp(min=1e-12)


def resolution(n: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a map with n places in a U-Net over height x width latents, each level half as fine, rounded up."""
    while height * width > n:
        height, width = -(-height // 2), -(-width // 2)
    assert height * width == n
    return height, width


@dataclass(eq=False)
class Region:
    """Local blend: the target differs from the source only where the words of either attend (section 4.1, "Local Blend").

    words: tokens of the sources and of the targets. below: the level from which on it is kept; at 0 no words matter. threshold: of
    the summed maps, from 0 to 1. fixed: masks to keep to as well, at every level.
    """

    words: tuple[tuple[Span, ...], tuple[Span, ...]]
    below: float
    threshold: float
    fixed: Float[Tensor, "b 1 h w"] | None = None
    maps: list[Maps] = field(default_factory=list)

    def look(self, which: int, x: Float[Tensor, "b c h w"]) -> Attend:
        if not self.below:
            return sdpa
        if not self.maps:
            self.maps += [Maps(spans, x.shape[-2], x.shape[-1]) for spans in self.words]
        return self.maps[which].look

    def mask(self) -> Float[Tensor, "b 1 h w"]:
        """1 where either's words attend, and the neighbours of such places."""
        hot = torch.stack([m.heat() for m in self.maps if any(m.spans)]).amax(0) > self.threshold
        return F.max_pool2d(hot.float()[:, None], 3, stride=1, padding=1)

    def keep(self, old: Float[Tensor, "b c h w"], new: Float[Tensor, "b c h w"], level: float) -> Float[Tensor, "b c h w"]:
        for mask in (self.mask() if level < self.below else None, self.fixed):
            new = new if mask is None else torch.where(mask.to(new.device) > 0, new, old)
        return new


def watched(denoise: Guided, maps: Sequence[Maps]) -> Denoise:
    """The denoiser, with what the maps' words attend to summed up on the way."""

    def attend(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        for m in maps:
            m.watch(q, k, site)
        return sdpa(q, k, v, site)

    return lambda x, sigma: denoise(x, sigma, attend)
