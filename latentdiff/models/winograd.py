"""3×3 convolutions of large maps with a quarter of the multiplications (Lavin & Gray 2015, arXiv 1509.09308, after Winograd).

Four neighbouring outputs are coefficients of a product of polynomials, which its values at six points tell: six products and not
twelve, in both directions 36 and not 144 for 4×4 outputs. The points are 0, ±2/3, ±3/2 and infinity: with them the error in float32
is the plain convolution's (8e-7 of 320 channels' results, oneDNN's 7e-7, root mean square), and 2.6e-6 with the usual 0, ±1, ±2. It
goes by the largest input of the 6×6 behind a piece, not of the 3×3 behind a number: beside a jump to a hundredth, what is small
loses two digits. In these networks a norm comes before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

A, B = 2 / 3, 3 / 2  # the points but for 0 and infinity, and their negatives; A B = 1 is taken for granted below
TILES, STRIP = 256, 7 << 20  # tiles of 4×4 outputs at once, at most, and numbers that their products are
WEIGHTS = 4 << 20  # numbers that are made of the weights at once, about
# What it takes to be faster, measured on two cores: with fewer tiles, the weights at their points cost more than they save, with
# fewer channels the maps at theirs; and all of it must take a while, as Python does.
ENOUGH_TILES, ENOUGH_CHANNELS, ENOUGH_WORK = 32, 128, 2_000_000  # the last: tiles by channels in by channels out, a thread


def pays(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "out c 3 3"]) -> bool:
    """Whether `convolution` is faster than the plain one. In float32 only: in 16 bits what it adds up would be rounded too soon."""
    tiles = len(x) * -(-x.shape[-2] // 4) * -(-x.shape[-1] // 4)
    channels = weight.shape[:2]
    return (
        x.dtype == torch.float32
        and tiles >= ENOUGH_TILES
        and min(channels) >= ENOUGH_CHANNELS
        and tiles * channels.numel() >= ENOUGH_WORK * torch.get_num_threads()
    )


def points(weight: Float[Tensor, "out c 3 3"]) -> Float[Tensor, "36 c out"]:
    """The weights, as a polynomial in both directions, at 6×6 points (G of the paper); scaled as `from_points` needs it."""
    rows = [[1.0, 0.0, 0.0]]
    for x, other, scale in ((A, B, A), (-A, B, A), (B, A, B * B), (-B, A, B * B)):
        over = scale / (2 * x * x * (x * x - other * other))
        rows.append([over, over * x, over * x * x])
    one = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device=weight.device)
    both = (one[None, :, :, None] * one[:, None, None, :]).reshape(36, 9).to(weight.dtype)  # [across by down, down by across]
    return (both @ weight.permute(0, 2, 3, 1).flatten(1, 2)).permute(1, 2, 0)


def to_points(d: Sequence[Tensor], out: Tensor) -> None:
    """Six inputs in a row, maps of one shape, to their values at six points, of the same shapes (B of the paper)."""
    a, b = A * A, B * B
    u, v = torch.sub(d[4], d[2], alpha=b), torch.sub(d[3], d[1], alpha=b)
    torch.add(u, v, alpha=A, out=out[1])
    torch.sub(u, v, alpha=A, out=out[2])
    torch.sub(d[4], d[2], alpha=a, out=u)
    torch.sub(d[3], d[1], alpha=a, out=v)
    torch.add(u, v, alpha=B, out=out[3])
    torch.sub(u, v, alpha=B, out=out[4])
    torch.sub(torch.add(d[0], d[4], out=u), d[2], alpha=a + b, out=out[0])
    torch.sub(torch.add(d[1], d[5], out=v), d[3], alpha=a + b, out=out[5])


def from_points(m: Tensor, out: Sequence[Tensor]) -> None:
    """Products at six points, maps of one shape, to four outputs in a row of that shape (A of the paper); m is written over."""
    u, v = m[1] + m[2], m[3] - m[4]
    m[1].sub_(m[2])  # even and odd parts: u and m[1] at ±A, m[3] and v at ±B
    m[3].add_(m[4])
    torch.add(m[0].add_(u, alpha=1 / A), m[3], alpha=1 / B**2, out=out[0])
    torch.add(m[1], v, alpha=1 / B, out=out[1])
    torch.add(m[3], u, alpha=A, out=out[2])
    torch.add(m[5].add_(m[1], alpha=A * A), v, alpha=B, out=out[3])


@torch.library.custom_op("latentdiff::winograd", mutates_args=())
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """The convolution of x [b, c, h, w], a channels-last map, by weight [out, c, 3, 3], with stride and padding 1, added to `add`.

    One operation to whoever writes them down (`recorded.py`), or all that lies between would be kept. A strip of tiles at a time,
    and so many of the input channels that the weights at their points, four times as many as the weights, take 16 MiB: both stay
    in the caches, and in memory that is used again.
    """
    b, c, h, w = x.shape
    o, rows, columns = len(weight), -(-h // 4), -(-w // 4)
    tiles = max(1, min(TILES, STRIP // (36 * o)))  # at once
    pictures, height = max(1, tiles // (rows * columns)), 4 * -(-rows // -(-rows * columns // tiles))
    channels = -(-c // -(-36 * o * c // WEIGHTS) // 16) * 16
    whole = points(weight) if channels >= c else None
    source, y = x.permute(0, 2, 3, 1), x.new_empty(b, h, w, o)
    add = None if add is None else add.expand(b, o, h, w).permute(0, 2, 3, 1)
    for first in range(0, b, pictures):
        for top in range(0, h, height):
            here, m = (slice(first, first + pictures), slice(top, top + height)), None
            inputs, outputs = source[here[0], max(0, top - 1) : top + height + 1], y[here]
            for some in range(0, c, channels):
                v = values(inputs[..., some : some + channels], top > 0, outputs.shape[1])
                u = points(weight[:, some : some + channels]) if whole is None else whole
                m = torch.bmm(v, u) if m is None else torch.baddbmm(m, v, u, out=m)
            maps(m, outputs)  # type: ignore[arg-type]
            if bias is not None:
                outputs.add_(bias)
            if add is not None:
                outputs.add_(add[here])
    return y.permute(0, 3, 1, 2)


@convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    b, _, h, w = x.shape
    return x.new_empty(b, h, w, len(weight)).permute(0, 3, 1, 2)


def values(x: Float[Tensor, "b h2 w c"], above: bool, h: int) -> Float[Tensor, "36 tiles c"]:
    """Every tile at 6×6 points. x: h rows, before them the one above if there is, after them the one below if there is."""
    b, h2, w, c = x.shape
    r, columns = -(-h // 4), -(-w // 4)
    padded = x.new_zeros(b, 4 * r + 2, 4 * columns + 2, c)
    padded[:, 1 - above : 1 - above + h2, 1 : w + 1] = x
    down = x.new_empty(6, b, r, 4 * columns + 2, c)
    to_points([padded[:, i : i + 4 * r - 3 : 4] for i in range(6)], down)
    both = x.new_empty(6, 6, b, r, columns, c)
    to_points([down[:, :, :, i : i + 4 * columns - 3 : 4] for i in range(6)], both)
    return both.view(36, -1, c)


def maps(m: Float[Tensor, "36 tiles o"], out: Float[Tensor, "b h w o"]) -> None:
    """The maps of products at 6×6 points; m is written over."""
    b, h, w, o = out.shape
    r, columns = -(-h // 4), -(-w // 4)
    across = m.new_empty(6, b, r, columns, 4, o)
    from_points(m.view(6, 6, b, r, columns, o), [across[:, :, :, :, i] for i in range(4)])
    whole = (h, w) == (4 * r, 4 * columns)
    y = out if whole else m.new_empty(b, 4 * r, 4 * columns, o)
    from_points(across.flatten(3, 4), [y.unflatten(1, (r, 4))[:, :, i] for i in range(4)])
    if not whole:
        out.copy_(y[:, :h, :w])
