"""Triton kernels for GPUs. Imported only where a GPU runs them; `fused.py` has the plain twin of each, to which tests hold it.

All compute in float32, and round once, where torch's kernels round after each operation.

GroupNorm over a channels-last map: torch's own kernel starts one block a (picture, group), 32 to 64 blocks for the 132 processors
of a big GPU, after ordering the map anew. Here the map is split along its positions: a pass takes the moments of every channel in a
slice of positions, a small one joins them to a scale and a shift for each channel, and a last one applies both, and SiLU. Two
reads and one write of the map in all. What a convolution's bias and the time add to a channel moves its mean and not its variance:
it is added where the moments are joined, and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # positions a program takes at once
CHANNELS = 64
BLOCK = 1024  # numbers a program takes where one follows the other
FLAT: dict[str, Any] = {"BLOCK": BLOCK}


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton starts kernels on the current device, whatever their tensors lie on."""

    @wraps(launch)
    def launched(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(x):
            return launch(x, *args, **kwargs)

    return launched


@triton.jit
def moments(x, mean, m2, positions, channels, slice_size, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and sum of squared deviations of each channel over a slice of positions; slices are joined by Chan et al. 1983."""
    picture, part, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    cols = block * CHANNELS + tl.arange(0, CHANNELS)
    first = part * slice_size
    last = tl.minimum(first + slice_size, positions)
    here = tl.zeros([CHANNELS], tl.float32)
    spread = tl.zeros([CHANNELS], tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < last) & (cols[None, :] < channels)
        value = tl.load(x + (picture * positions + rows[:, None]) * channels + cols[None, :], inside, 0.0).to(tl.float32)
        n = (tl.minimum(start + ROWS, last) - start).to(tl.float32)
        new = tl.sum(value, 0) / n
        off = tl.where(inside, value - new[None, :], 0.0)
        before = (start - first).to(tl.float32)
        delta = new - here
        spread += tl.sum(off * off, 0) + delta * delta * before * n / (before + n)
        here += delta * n / (before + n)
    place = (picture * tl.num_programs(1) + part) * channels + cols
    tl.store(mean + place, here, cols < channels)
    tl.store(m2 + place, spread, cols < channels)


@triton.jit
def join(
    mean,
    m2,
    weight,
    bias,
    added,
    moved,
    scale,
    shift,
    positions,
    channels,
    slice_size,
    parts,
    eps,
    width,
    moved_row,
    ADDED: tl.constexpr,
    MOVED: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of a group's channels and slices: its mean and variance, as a scale and a shift for each of its channels.

    To each channel is first added what `added` [channels] and `moved` [pictures, channels] say.
    """
    picture, group = tl.program_id(0), tl.program_id(1)
    part, col = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    inside = (part[:, None] < parts) & (col[None, :] < width)
    own = group * width + col
    extra = tl.zeros([WIDTH], tl.float32)
    if ADDED:
        extra += tl.load(added + own, col < width, 0.0).to(tl.float32)
    if MOVED:
        extra += tl.load(moved + picture * moved_row + own, col < width, 0.0).to(tl.float32)
    place = (picture * parts + part[:, None]) * channels + own[None, :]
    means = tl.load(mean + place, inside, 0.0) + extra[None, :]
    counts = tl.minimum(positions - part * slice_size, slice_size).to(tl.float32)[:, None]
    counts = tl.where(inside, counts, 0.0)
    total = tl.sum(counts)
    centre = tl.sum(means * counts) / total  # pyright: ignore[reportOperatorIssue]
    off = means - centre
    variance = (tl.sum(tl.load(m2 + place, inside, 0.0)) + tl.sum(off * off * counts)) / total  # pyright: ignore[reportOperatorIssue]
    a = tl.load(weight + own, col < width, 0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    b = tl.load(bias + own, col < width, 0.0).to(tl.float32) + (extra - centre) * a
    tl.store(scale + picture * channels + own, a, col < width)
    tl.store(shift + picture * channels + own, b, col < width)


@triton.jit
def apply(x, scale, shift, y, positions, channels, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """x · scale + shift, and its SiLU if asked for, in float32 inside. Positions come first: only there may be more than 65,535."""
    picture = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (rows[:, None] < positions) & (cols[None, :] < channels)
    place = (picture * positions + rows[:, None]) * channels + cols[None, :]
    a = tl.load(scale + picture * channels + cols, cols < channels, 0.0)
    b = tl.load(shift + picture * channels + cols, cols < channels, 0.0)
    value = tl.load(x + place, inside, 0.0).to(tl.float32) * a[None, :] + b[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y + place, value, inside)


@on_its_device
def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool,
    added: Tensor | None = None,
    moved: Tensor | None = None,
) -> Tensor:
    """GroupNorm of a channels-last map [b, c, h, w], and its SiLU, after adding `added` [c] and `moved` [b, c] at all positions."""
    batch, channels, height, width = x.shape
    positions = height * width
    columns = triton.cdiv(channels, CHANNELS)
    parts = max(1, min(triton.cdiv(positions, ROWS), 2048 // (batch * columns)))
    slice_size = triton.cdiv(triton.cdiv(positions, parts), ROWS) * ROWS
    parts = triton.cdiv(positions, slice_size)
    mean, m2 = (torch.empty(batch, parts, channels, device=x.device, dtype=torch.float32) for _ in range(2))
    scale, shift = (torch.empty(batch, channels, device=x.device, dtype=torch.float32) for _ in range(2))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    sizes: dict[str, Any] = {"ROWS": ROWS, "CHANNELS": CHANNELS}
    flag: dict[str, Any] = {"SILU": silu}
    moments[(batch, parts, columns)](x, mean, m2, positions, channels, slice_size, **sizes)
    own, row = channels // groups, 0 if moved is None else moved.stride(0)
    powers: dict[str, Any] = {"PARTS": triton.next_power_of_2(parts), "WIDTH": triton.next_power_of_2(own)}
    powers |= {"ADDED": added is not None, "MOVED": moved is not None}
    places = (weight, bias, bias if added is None else added, bias if moved is None else moved, scale, shift)
    join[(batch, groups)](mean, m2, *places, positions, channels, slice_size, parts, eps, own, row, **powers)
    apply[(triton.cdiv(positions, ROWS), columns, batch)](x, scale, shift, y, positions, channels, **flag, **sizes)
    return y


@triton.jit
def layer_norm_rows(
    x, other, sum_, weight, bias, y, rows, width, eps, ADDED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """LayerNorm of x, or of x + other, which is then stored too."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    inside = (row[:, None] < rows) & (col[None, :] < width)
    place = row[:, None] * width + col[None, :]
    value = tl.load(x + place, inside, 0.0).to(tl.float32)
    if ADDED:
        value += tl.load(other + place, inside, 0.0).to(tl.float32)
        tl.store(sum_ + place, value, inside)
    mean = tl.sum(value, 1) / width
    off = tl.where(inside, value - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(off * off, 1) / width + eps)
    a = tl.load(weight + col, col < width, 0.0).to(tl.float32)
    b = tl.load(bias + col, col < width, 0.0).to(tl.float32)
    tl.store(y + place, off * scale[:, None] * a[None, :] + b[None, :], inside)


@on_its_device
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x + other (x itself without), and its LayerNorm over the last dimension, [..., c] all; contiguous in and out."""
    width = x.shape[-1]
    rows, block = x.numel() // width, triton.next_power_of_2(width)
    y = torch.empty_like(x)
    total = x if other is None else torch.empty_like(x)
    tile: dict[str, Any] = {"ADDED": other is not None, "ROWS": max(1, 2048 // block), "WIDTH": block}
    given = x if other is None else other
    layer_norm_rows[(triton.cdiv(rows, tile["ROWS"]),)](x, given, total, weight, bias, y, rows, width, eps, **tile)
    return total, y


@triton.jit
def geglu_flat(x, y, total, width, BLOCK: tl.constexpr):
    """y [rows, width] of x [rows, 2 · width], by the number of y's numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = place // width, place % width
    value = tl.load(x + row * 2 * width + col, place < total, 0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + col, place < total, 0.0).to(tl.float32)
    tl.store(y + place, value * 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)), place < total)


@on_its_device
def geglu(x: Tensor) -> Tensor:
    """The first half of the last dimension times the GELU of the second: x [..., 2 c], contiguous, to [..., c]."""
    width = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], width, device=x.device, dtype=x.dtype)
    geglu_flat[(triton.cdiv(y.numel(), BLOCK),)](x, y, y.numel(), width, **FLAT)
    return y


@triton.jit
def add_flat(x, bias, other, total, channels, BIASED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr):
    """In place; the channel of x's k-th number is k % channels."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place, place < total, 0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + place % channels).to(tl.float32)
    if ADDED:
        value += tl.load(other + place, place < total, 0.0).to(tl.float32)
    tl.store(x + place, value, place < total)


@on_its_device
def add_(x: Tensor, bias: Tensor | None, other: Tensor | None = None) -> Tensor:
    """x += bias [c] + other, in place, for channels-last maps x and other [b, c, h, w]."""
    flags: dict[str, Any] = {"BIASED": bias is not None, "ADDED": other is not None, **FLAT}
    places = (x, x if bias is None else bias, x if other is None else other)
    add_flat[(triton.cdiv(x.numel(), BLOCK),)](*places, x.numel(), x.shape[1], **flags)
    return x


@triton.jit
def double_flat(x, y, total, width, channels, BLOCK: tl.constexpr):
    """Of each number of y: its row of pixels, pixel and channel, and the number of x that stands there; `width` is x's."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel, pixel = place % channels, place // channels
    row, col = pixel // (2 * width), pixel % (2 * width)
    source = ((row // 2) * width + col // 2) * channels + channel
    tl.store(y + place, tl.load(x + source, place < total, 0.0), place < total)


@on_its_device
def double(x: Tensor) -> Tensor:
    """Each pixel of a channels-last map four times: twice as high and wide."""
    b, c, h, w = x.shape
    y = torch.empty(b, c, 2 * h, 2 * w, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    double_flat[(triton.cdiv(y.numel(), BLOCK),)](x, y, y.numel(), w, c, **FLAT)
    return y
