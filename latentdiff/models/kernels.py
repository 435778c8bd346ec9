"""Triton kernels for GPUs. Imported only where a GPU runs them; each has a plain twin that tests hold it to.

GroupNorm with SiLU over a channels-last map. torch's own kernel starts one block a (picture, group), 32 to 64 blocks for the 132
processors of a big GPU, and SiLU is another pass over memory. Here the map is split along its positions: a pass takes the moments
of every channel in a slice of positions, a small one joins them to a scale and a shift for each channel, and a last one applies
both and SiLU. Two reads and one write of the map in all.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # positions a program takes at once
CHANNELS = 64


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
    scale,
    shift,
    positions,
    channels,
    slice_size,
    parts,
    eps,
    width,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of a group's channels and slices: its mean and variance, as a scale and a shift for each of its channels."""
    picture, group = tl.program_id(0), tl.program_id(1)
    part, col = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    inside = (part[:, None] < parts) & (col[None, :] < width)
    place = (picture * parts + part[:, None]) * channels + group * width + col[None, :]
    means = tl.load(mean + place, inside, 0.0)
    counts = tl.minimum(positions - part * slice_size, slice_size).to(tl.float32)[:, None]
    counts = tl.where(inside, counts, 0.0)
    total = tl.sum(counts)
    centre = tl.sum(means * counts) / total  # pyright: ignore[reportOperatorIssue]
    off = means - centre
    variance = (tl.sum(tl.load(m2 + place, inside, 0.0)) + tl.sum(off * off * counts)) / total  # pyright: ignore[reportOperatorIssue]
    own = group * width + col
    a = tl.load(weight + own, col < width, 0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    b = tl.load(bias + own, col < width, 0.0).to(tl.float32) - centre * a
    tl.store(scale + picture * channels + own, a, col < width)
    tl.store(shift + picture * channels + own, b, col < width)


@triton.jit
def apply(x, scale, shift, y, positions, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """silu(x · scale + shift), in float32 inside."""
    picture = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (rows[:, None] < positions) & (cols[None, :] < channels)
    place = (picture * positions + rows[:, None]) * channels + cols[None, :]
    a = tl.load(scale + picture * channels + cols, cols < channels, 0.0)
    b = tl.load(shift + picture * channels + cols, cols < channels, 0.0)
    value = tl.load(x + place, inside, 0.0).to(tl.float32) * a[None, :] + b[None, :]
    tl.store(y + place, value / (1.0 + tl.exp(-value)), inside)


def group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """silu(GroupNorm(x)) of a channels-last map [b, c, h, w]; statistics in float32, the result in x's dtype and layout."""
    batch, channels, height, width = x.shape
    positions = height * width
    columns = triton.cdiv(channels, CHANNELS)
    parts = max(1, min(triton.cdiv(positions, ROWS), 64, 1024 // (batch * columns)))
    slice_size = triton.cdiv(triton.cdiv(positions, parts), ROWS) * ROWS
    parts = triton.cdiv(positions, slice_size)
    mean, m2 = (torch.empty(batch, parts, channels, device=x.device, dtype=torch.float32) for _ in range(2))
    scale, shift = (torch.empty(batch, channels, device=x.device, dtype=torch.float32) for _ in range(2))
    y = torch.empty_like(x, memory_format=torch.channels_last)
    sizes: dict[str, Any] = {"ROWS": ROWS, "CHANNELS": CHANNELS}
    moments[(batch, parts, columns)](x, mean, m2, positions, channels, slice_size, **sizes)
    own = channels // groups
    powers: dict[str, Any] = {"PARTS": triton.next_power_of_2(parts), "WIDTH": triton.next_power_of_2(own)}
    join[(batch, groups)](mean, m2, weight, bias, scale, shift, positions, channels, slice_size, parts, eps, own, **powers)
    apply[(batch, triton.cdiv(positions, ROWS), columns)](x, scale, shift, y, positions, channels, **sizes)
    return y
