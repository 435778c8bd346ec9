"""Prompts to what the U-Net listens to. One tower or two, pooled vectors, sizes: SDXL is data here, not a subclass.

A prompt becomes tokens with weights, the tokens become chunks as long as a tower reads, each chunk is encoded by itself, and the
chunks are joined along the tokens. So a prompt may have any length, and nothing of it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from latentdiff.checkpoints.families import ModelSpec
from latentdiff.models.text import TextTower, TowerSpec
from latentdiff.models.unet import UNet, sinusoids
from latentdiff.prompts import SYNTAXES, Weigh, plain, plan

Tokenizer = Callable[[str], list[int]]  # text -> ids, without begin, end and padding
Parse = Callable[[str], list[list[tuple[str, float]]]]  # prompt -> sections (each starts a new chunk) of (text, weight)

AESTHETIC_SCORES = (6.0, 2.5)  # what SDXL's refiner is told of the prompt and of the negative prompt


@dataclass(frozen=True, eq=False)
class Cond:
    """The conditions of a batch, one entry a picture: the prompt as the U-Net takes it, and SDXL's vector.

    `context` is the embedding [b, n, d], or what `UNet.project_context` made of it: keys and values [b, h, n, e] of each attention.
    `shifts` is what `UNet.embed_grid` made of the times of a run, for these pictures: level -> [b, s]. `of`: what it was made of.
    """

    context: Float[Tensor, "b n d"] | list[tuple[Tensor, Tensor]]
    vector: Float[Tensor, "b v"] | None = None
    shifts: Mapping[float, Tensor] = field(default_factory=dict)
    of: tuple[Cond, ...] = ()

    def __len__(self) -> int:
        return len(self._first)

    @property
    def tokens(self) -> int:
        """Length of the context; only conditions of one length fit in a batch."""
        return self._first.shape[-2]

    @property
    def _first(self) -> Tensor:
        return self.context if isinstance(self.context, Tensor) else self.context[0][0]

    def join(self, other: Cond) -> Cond:
        """Both batches as one."""
        if (self.vector is None) != (other.vector is None) or self.tokens != other.tokens:
            raise ValueError(f"other: its conditions have {other.tokens} tokens and vector {other.vector}, ours {self.tokens}")
        pairs = zip(self._tensors(), other._tensors(), strict=True)
        return self._like([torch.cat(pair) for pair in pairs])

    def rows(self, which: Sequence[int]) -> Cond:
        """Those of these pictures, which may come several times."""
        return self._like([tensor[list(which)] for tensor in self._tensors()])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Cond:
        return self._like([tensor.to(device=device, dtype=dtype) for tensor in self._tensors()])

    def project(self, unet: UNet, times: Mapping[float, float] | None = None) -> Cond:
        """With keys and values in the place of the embedding, which are the same at every step, and the times of all levels of a
        run (level -> time) embedded."""
        if not isinstance(self.context, Tensor):
            return self
        times = times or {}
        grid = unet.embed_grid([*dict.fromkeys(times.values())], self.vector, len(self), self.context)
        shifts = {level: grid[time] for level, time in times.items() if grid}
        return Cond(unet.project_context(self.context), self.vector, shifts)

    def finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        context = [self.context] if isinstance(self.context, Tensor) else [t for pair in self.context for t in pair]
        return context if self.vector is None else [*context, self.vector]

    def _like(self, tensors: list[Tensor]) -> Cond:
        """Put the tensors that `_tensors` gave, changed, back in their places."""
        vector = None if self.vector is None else tensors.pop()
        return Cond(tensors[0] if isinstance(self.context, Tensor) else list(zip(tensors[::2], tensors[1::2], strict=True)), vector)


@dataclass(frozen=True, eq=False)
class Stage:
    """What conditions a picture until (and including) step `until`: prompts that are guided together, and the negative."""

    until: int
    parts: list[tuple[Cond, float]]
    negative: Cond

    def finite(self) -> bool:
        return all(cond.finite() for cond in (self.negative, *(cond for cond, _ in self.parts)))


def joined(conds: Sequence[Cond]) -> Cond:
    first, *rest = conds
    for cond in rest:
        first = first.join(cond)
    return first


def shared(make: Callable[..., Cond]) -> Callable[..., Cond]:
    """make(*conditions), once for the same conditions as long as what it made is in use."""
    known: WeakValueDictionary[tuple[int, ...], Cond] = WeakValueDictionary()

    def call(*conds: Cond) -> Cond:
        key = tuple(map(id, conds))
        made = known.get(key)
        if made is None:
            made = known[key] = replace(make(*conds), of=conds)  # held, since an id is good for as long as its owner lives
        return made

    return call


def grouped(items: Sequence[list[Stage]], most: int) -> list[list[list[Stage]]]:
    """Neighbours of one length in groups of at most `most`: contexts of different lengths do not fit in one tensor."""
    groups: list[list[list[Stage]]] = []
    for item in items:
        if groups and len(groups[-1]) < most and groups[-1][-1][0].negative.tokens == item[0].negative.tokens:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def together(stages: Sequence[Stage], join: Callable[..., Cond]) -> Cond | list[tuple[Cond, Tensor]]:
    """The prompts of several pictures as one batch; where a picture has several, as parts with a weight for each picture.

    A picture with fewer parts than another repeats its first at weight 0. join: (conditions) -> one of all.
    """
    n = max(len(stage.parts) for stage in stages)
    slots = [[(stage.parts[k] if k < len(stage.parts) else (stage.parts[0][0], 0.0)) for stage in stages] for k in range(n)]
    if n == 1 and all(weight == 1 for _, weight in slots[0]):
        return join(*(cond for cond, _ in slots[0]))
    return [
        (join(*(cond for cond, _ in slot)), torch.tensor([weight for _, weight in slot], dtype=torch.float32, device="cpu"))
        for slot in slots
    ]


@dataclass(frozen=True)
class Chunk:
    """What a tower reads at once: begin, tokens, end, padding; and the weight of each, 1 for those that the prompt did not name."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


def chunks(sections: Sequence[Sequence[tuple[int, float]]], spec: TowerSpec, comma: int | None = None) -> list[Chunk]:
    """Weighted tokens, section by section, as chunks of `spec.length`; a section without tokens is an empty chunk."""
    return [chunk(part, spec) for section in sections for part in parts(section, spec.length - 2, comma)]


def parts(tokens: Sequence[tuple[int, float]], room: int, comma: int | None = None) -> list[Sequence[tuple[int, float]]]:
    """At most `room` tokens each. One that would be full ends after the last comma, if that is among its last 20 of 75.

    The rule, and the share, are those of the program that most shared prompts come from.
    """
    found, start = [], 0
    while len(tokens) - start > room:
        end = start + room
        last = range(end - 1, end - 1 - room * 20 // 75, -1) if tokens[end][0] != comma else ()
        end = next((k + 1 for k in last if tokens[k][0] == comma), end)
        found.append(tokens[start:end])
        start = end
    return [*found, tokens[start:]]


def chunk(tokens: Sequence[tuple[int, float]], spec: TowerSpec) -> Chunk:
    """At most `spec.length` − 2 tokens between begin and end, padded."""
    padding = spec.length - 2 - len(tokens)
    ids = (spec.begin, *(id for id, _ in tokens), spec.end, *[spec.pad] * padding)
    return Chunk(ids, (1.0, *(weight for _, weight in tokens), 1.0, *[1.0] * padding))


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """The text towers of a model, with their tokenizers, and how what they give is put together.

    `parse` reads a prompt's weighting syntax, `weigh` applies the weights to a tower's states; by default a prompt has none.
    """

    towers: tuple[TextTower, ...]
    tokenizers: tuple[Tokenizer, ...]
    spec: ModelSpec
    parse: Parse = plain
    weigh: Weigh | None = None

    def encode(self, prompt: str, negative: str | None, *, size: tuple[int, int]) -> tuple[Cond, Cond]:
        """Conditions of a prompt and of its negative, for one picture of `size` (width, height) pixels: see `encode_all`."""
        (cond,), (uncond,) = self.encode_all([prompt], [negative or ""], size=size)
        return cond, uncond

    def encode_all(
        self, prompts: Sequence[str], negatives: Sequence[str], *, size: tuple[int, int]
    ) -> tuple[list[Cond], list[Cond]]:
        """Conditions of all texts of a picture of `size` (width, height) pixels, as long as the longest needs.

        An empty negative is the empty text, or zeros where the model's spec says so. Values may be non-finite where a tower
        overflows its dtype: the caller checks.
        """
        found = [self.chunks(text) for text in (*prompts, *negatives)]
        most = max(len(own) for of_towers in found for own in of_towers)
        told, untold = AESTHETIC_SCORES
        conds = [self._encode(self._fill(c, most), size, told) for c in found[: len(prompts)]]
        unconds = [self._encode(self._fill(c, most), size, untold) for c in found[len(prompts) :]]
        if self.spec.zero_empty_negative:
            unconds = [uncond if text else self._zeros(uncond) for text, uncond in zip(negatives, unconds, strict=True)]
        return conds, unconds

    def stages(self, prompt: str, negative: str, *, syntax: str, steps: int, size: tuple[int, int]) -> list[Stage]:
        """What conditions a picture of `size` (width, height) pixels in a run of so many steps; each text is encoded once.

        syntax: a name in `prompts.SYNTAXES`. steps: at least 1.
        """
        rules = SYNTAXES[syntax]
        said = plan(prompt, negative, steps, rules)
        prompts = list(dict.fromkeys(text for s in said for text, _ in s.parts))
        negatives = list(dict.fromkeys(s.negative for s in said))
        conds, unconds = replace(self, parse=rules.parse, weigh=rules.weigh).encode_all(prompts, negatives, size=size)
        of_prompt, of_negative = (dict(zip(*pair, strict=True)) for pair in ((prompts, conds), (negatives, unconds)))
        return [Stage(s.until, [(of_prompt[text], w) for text, w in s.parts], of_negative[s.negative]) for s in said]

    def parameters(self) -> Iterator[Tensor]:
        return (p for tower in self.towers for p in tower.parameters())

    def float(self) -> TextEncoder:
        """The towers made float32, in place."""
        for tower in self.towers:
            tower.float()
        return self

    def chunks(self, prompt: str) -> list[list[Chunk]]:
        """The prompt's chunks, for each tower."""
        sections = self.parse(prompt)
        made = []
        for tokenize, tower in zip(self.tokenizers, self.towers, strict=True):
            tokens = [[(id, weight) for text, weight in section for id in tokenize(text)] for section in sections]
            made.append(chunks(tokens, tower.spec, next(iter(tokenize(",")), None)))
        return made

    def _fill(self, of_towers: list[list[Chunk]], n: int) -> list[list[Chunk]]:
        """Empty chunks behind, up to n for every tower."""
        pairs = zip(of_towers, self.towers, strict=True)
        return [[*own, *[chunk([], tower.spec)] * (n - len(own))] for own, tower in pairs]

    def _encode(self, of_towers: list[list[Chunk]], size: tuple[int, int], score: float) -> Cond:
        """Towers side by side along the width, chunks one after the other along the tokens; pooled is the first chunk's."""
        weigh, contexts, pooled = self.weigh, [], None
        for tower, own in zip(self.towers, of_towers, strict=True):
            device = next(tower.parameters()).device
            hidden, pools = tower(torch.tensor([c.ids for c in own], device=device))  # [chunks, length, d]
            if weigh and any(weight != 1 for c in own for weight in c.weights):
                empty, _ = tower(torch.tensor([chunk([], tower.spec).ids], device=device))
                weights = torch.tensor([c.weights for c in own], dtype=torch.float32, device=device)
                hidden = weigh(hidden, weights, empty)
            contexts.append(hidden.flatten(0, 1)[None])  #                              [1, chunks · length, d]
            pooled = pooled if pools is None else pools[:1]
        return Cond(torch.cat(contexts, dim=-1), self._vector(pooled, size, score))

    def _vector(self, pooled: Tensor | None, size: tuple[int, int], score: float) -> Float[Tensor, "1 v"] | None:
        """Pooled text, then 256 sinusoids a number: original height and width, crop top and left, and target size or score."""
        if self.spec.vector == "none" or pooled is None:
            return None
        width, height = size
        last = [height, width] if self.spec.vector == "size" else [score]
        numbers = torch.tensor([height, width, 0, 0, *last], dtype=torch.float32, device=pooled.device)
        return torch.cat([pooled, sinusoids(numbers, 256).flatten()[None].to(pooled.dtype)], dim=-1)

    def _zeros(self, cond: Cond) -> Cond:
        """Zeros for text and pooled text; the sizes in the vector stay."""
        assert isinstance(cond.context, Tensor)
        vector, pooled = cond.vector, self.towers[-1].spec.projection
        if vector is not None:
            vector = torch.cat([torch.zeros_like(vector[:, :pooled]), vector[:, pooled:]], dim=-1)
        return Cond(torch.zeros_like(cond.context), vector)
