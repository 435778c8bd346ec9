"""When memory runs out: fewer pictures at a time, attention in slices, pictures in tiles; each with a message, before giving up.

Before all of these, recordings are given up: torch does not return their memory by itself, as it does what it keeps in reserve.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoise
from latentdiff.models import graphs
from latentdiff.models.attention import Site, sdpa

T = TypeVar("T")
SLICE = 1024  # queries at once in sliced attention
TILE, OVERLAP = 64, 16  # latents along the side of a tile, and of those that it shares with the next


def attempt(run: Callable[[], T], again: Callable[[], T] | None = None) -> T | None:
    """What `run` gives, or None if memory ran out; what it held is free by then, and so is what recordings held.

    again: what to try in its place if they held some.
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not graphs.is_out_of_memory(error):
            raise
    held = graphs.give_up()
    if torch.cuda.is_available():
        with graphs.capturing:  # while one is recorded, nothing is returned
            torch.cuda.empty_cache()
    if not held or again is None:
        return None
    tell("recorded kernels are given up; they are recorded again where they are needed")
    return attempt(again)


def tell(text: str) -> None:
    warnings.warn(f"memory ran out: {text}", stacklevel=2)


def within_memory(make: Callable[[slice, bool], Denoise], rows: slice) -> Denoise:
    """make(rows, False), the denoiser of these pictures, which halves itself as often as memory asks for it.

    One picture alone is tried once more as make(rows, True), sparing memory at the cost of time. Errors: MemoryError.
    """
    parts: list[Denoise] = []
    whole: list[Denoise] = [make(rows, False)]
    n = rows.stop - rows.start

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        if not parts:
            done = attempt(lambda: whole[0](x, sigma), lambda: renewed()(x, sigma))
            if done is not None:
                return done
            whole.clear()
            parts.extend(smaller())
        return torch.cat([part(own, sigma) for part, own in zip(parts, x.tensor_split(len(parts)), strict=True)])

    def renewed() -> Denoise:
        whole[:] = [make(rows, False)]  # what it kept of a call that failed is not for the next
        return whole[0]

    def smaller() -> list[Denoise]:
        if n == 1:
            tell("attention goes on in slices")
            return [spared(make(rows, True))]
        middle = rows.start + (n + 1) // 2  # as tensor_split does
        tell(f"going on with {middle - rows.start} pictures at a time in the place of {n}")
        return [within_memory(make, half) for half in (slice(rows.start, middle), slice(middle, rows.stop))]

    return denoise


def spared(denoise: Denoise) -> Denoise:
    """The last try."""

    def run(x: Tensor, sigma: Tensor) -> Tensor:
        done = attempt(lambda: denoise(x, sigma))
        if done is None:
            raise MemoryError(f"too little memory for one picture of {x.shape[-1]} × {x.shape[-2]} latents: a smaller size may fit")
        return done

    return run


def without_recordings(run: Callable[[], T]) -> T:
    """run(), and if memory runs out once more, from its start, without what recordings held. Errors: MemoryError."""
    done = attempt(run, run)
    if done is None:
        raise MemoryError("too little memory for these pictures: fewer at a time (batch), or a smaller size, may fit")
    return done


def sliced(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """`sdpa` for some queries at a time: the same result."""
    return torch.cat([sdpa(part, k, v, site) for part in q.split(SLICE, dim=-2)], dim=-2)


def whole_or_tiled(run: Callable[[Tensor], Tensor], x: Float[Tensor, "b c h w"], *, pixels: int = 1) -> Float[Tensor, "b d h2 w2"]:
    """run(x), the decoder on latents, or with `pixels` of x along the side of a latent the encoder on pictures.

    Where memory runs out, in tiles, which halve until they fit. Norms and attention then see a tile, not the picture, so colours
    can differ a little from one tile to the next. Errors: MemoryError.
    """
    what = "decode" if pixels == 1 else "encode"
    done, tile = attempt(lambda: run(x), lambda: run(x)), TILE
    height, width = (side // pixels for side in x.shape[-2:])
    while done is None:
        tile = min(tile, (max(height, width) + 1) // 2)
        if tile <= OVERLAP:
            raise MemoryError(f"too little memory to {what} {width} × {height} latents: a smaller size may fit")
        tell(f"{what[:-1]}ing in tiles of {tile} × {tile} latents; where they meet, colours can differ a little")
        done = attempt(lambda tile=tile: in_tiles(run, x, tile, pixels))
        tile //= 2
    return done


def in_tiles(
    run: Callable[[Tensor], Tensor], x: Float[Tensor, "b c h w"], tile: int, pixels: int = 1
) -> Float[Tensor, "b d h2 w2"]:
    """Overlapping tiles of so many latents, blended linearly where they overlap; `pixels` of x are a latent."""
    total = weights = None
    height, width = (side // pixels for side in x.shape[-2:])
    for top in starts(height, tile):
        for left in starts(width, tile):
            rows, columns = (slice(first * pixels, (first + tile) * pixels) for first in (top, left))
            part = run(x[..., rows, columns])
            scale = part.shape[-1] // min(tile, width)
            if total is None or weights is None:
                total = part.new_zeros(*part.shape[:2], scale * height, scale * width)
                weights = total.new_zeros(total.shape[-2:])
            ramp = ramps(part.shape[-2], OVERLAP * scale, part)[:, None] * ramps(part.shape[-1], OVERLAP * scale, part)
            place = (..., slice(top * scale, top * scale + part.shape[-2]), slice(left * scale, left * scale + part.shape[-1]))
            total[place] += part * ramp
            weights[place] += ramp
    assert total is not None
    assert weights is not None
    return total / weights


def starts(side: int, tile: int) -> list[int]:
    """Where tiles begin, evenly, so that neighbours share at least OVERLAP and the last ends with the side."""
    if side <= tile:
        return [0]
    n = math.ceil((side - OVERLAP) / (tile - OVERLAP))
    return [round(i * (side - tile) / (n - 1)) for i in range(n)]


def ramps(length: int, overlap: int, like: Tensor) -> Float[Tensor, " length"]:
    """Rises from 0 to 1 at the beginning and falls to 0 at the end, each over `overlap` pixels; nowhere 0."""
    away = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    return (torch.minimum(away, length - away) / overlap).clamp(max=1)
