"""Operations that stand together in these networks. Where nothing is to be learnt, a GPU does each in one kernel (`kernels.py`), a
CPU some of them inside the product before them (`onednn.py`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentdiff.models import onednn
from latentdiff.models.int8 import Gated

enabled = True  # the benchmark's ladder stands on both rungs


def fuses(x: Tensor) -> bool:
    """Whether it pays here: not where a gradient is wanted, nor where a compiler sees all of the network and does it by itself, nor
    under autocast, which chooses a dtype for each operation."""
    taken = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda")
    return enabled and x.is_cuda and not taken and has_triton(x.device)


@cache
def has_triton(device: torch.device) -> bool:
    """Whether its kernels can be built there: not on every platform, without a C compiler, or for GPUs older than it supports."""
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # where Triton looks
    return compiler is not None and torch.cuda.get_device_capability(device) >= (8, 0) and torch.version.hip is None


def kernels() -> Any:
    """Imported where they run alone: to import Triton takes time, and not all have it."""
    from latentdiff.models import kernels

    return kernels


def is_last(*maps: Tensor) -> bool:
    return all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)


def norm_silu(norm: nn.GroupNorm, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """silu(norm(x)) (Wu & He 2018, arXiv 1803.08494, eq. 1 and 2)."""
    return group_norm(norm, x, silu=True)


def group_norm(norm: nn.GroupNorm, x: Float[Tensor, "b c h w"], *, silu: bool = False) -> Float[Tensor, "b c h w"]:
    """norm(x), or its SiLU."""
    if fuses(x) and is_last(x) and not onednn.listened_to(norm):
        return kernels().group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)
    alone = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or onednn.listened_to(norm))  # nobody else needs norm(x)
    if alone and slow_on_cpu(norm, x):
        y = F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
        return (F.silu(y, inplace=True) if silu else y).to(x.dtype)
    return F.silu(norm(x), inplace=alone) if silu else norm(x)


def slow_on_cpu(norm: nn.GroupNorm, x: Float[Tensor, "b c h w"]) -> bool:
    """Whether torch's channels-last kernel in bfloat16 takes twice as long as going to float32 and back.

    It does on small maps, where it goes through each group by itself, if a group has fewer channels than a vector.
    """
    small = x.device.type == "cpu" and x.shape[-2] * x.shape[-1] < 1024 and x.shape[1] < 16 * norm.num_groups
    return small and x.dtype == torch.bfloat16 and is_last(x)


def conv_norm_silu(
    conv: nn.Module, norm: nn.GroupNorm, x: Float[Tensor, "b c h w"], shift: Float[Tensor, "b out"] | None = None
) -> Float[Tensor, "b out h w"]:
    """silu(norm(conv(x) + shift)). x is written over: a map that nobody else holds is given up before the norm makes another."""
    if splits(conv, x) and not onednn.listened_to(norm):
        x = conv(x, biased=False)
        if is_last(x):
            places: dict[str, Any] = {"silu": True, "added": conv.bias, "moved": shift}
            return kernels().group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, **places)
        x = x + conv.bias[:, None, None]  # type: ignore[index]
    elif is_one_row(shift) and adds_inside(conv, x):
        x, shift = conv.on_cpu(x, None if shift is None else shift[0]), None  # type: ignore[operator]
    else:
        x = conv(x)
    return norm_silu(norm, x if shift is None else x + shift[:, :, None, None])


def conv_add(conv: nn.Module, x: Float[Tensor, "b c h w"], other: Float[Tensor, "b out h w"]) -> Float[Tensor, "b out h w"]:
    """other + conv(x)."""
    if is_last(other) and splits(conv, x):
        y = conv(x, biased=False)
        return kernels().add_(y, conv.bias, other) if is_last(y) else other + y + conv.bias[:, None, None]  # type: ignore[index]
    return conv.on_cpu(x, other=other) if is_last(other) and adds_inside(conv, x) else other + conv(x)  # type: ignore[operator]


def splits(conv: nn.Module, x: Tensor) -> bool:
    """Whether a GPU makes this convolution without its bias, to add that elsewhere; against it stands what `adds_inside` tells."""
    plain = hasattr(conv, "on_gpu") and conv.padding_mode == "zeros" and not onednn.listened_to(conv)
    return plain and fuses(x) and is_last(x)


def adds_inside(conv: nn.Module, x: Tensor) -> bool:
    """Whether a CPU adds within this convolution. There may be another module in its place, or somebody who listens to it alone."""
    return hasattr(conv, "takes") and conv.takes(x) and not onednn.listened_to(conv)  # type: ignore[operator]


def is_one_row(shift: Float[Tensor, "b out"] | None) -> bool:
    """As the times of all pictures of a step are; never by looking at numbers."""
    return shift is None or len(shift) == 1 or shift.stride(0) == 0


def linear_add(layer: nn.Module, x: Float[Tensor, "*b c"], other: Float[Tensor, "*b out"]) -> Float[Tensor, "*b out"]:
    """other + layer(x)."""
    if onednn.takes(x, layer):
        return onednn.linear(x, layer.weight, layer.bias, add=other)  # type: ignore[arg-type]
    return other + layer(x)


def layer_norm(norm: nn.LayerNorm, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """norm(x) (Ba et al. 2016, arXiv 1607.06450)."""
    if fuses(x) and x.is_contiguous() and not onednn.listened_to(norm):
        return kernels().layer_norm(x, norm.weight, norm.bias, norm.eps)[1]
    return norm(x)


def linear_add_norm(
    layer: nn.Module, norm: nn.LayerNorm, x: Float[Tensor, "*b c"], other: Float[Tensor, "*b c"]
) -> tuple[Float[Tensor, "*b c"], Float[Tensor, "*b c"]]:
    """other + layer(x), and the norm of it."""
    if fuses(x) and other.is_contiguous() and not onednn.listened_to(norm):
        return kernels().layer_norm(layer(x), norm.weight, norm.bias, norm.eps, other)
    y = linear_add(layer, x, other)
    return y, norm(y)


def feed_forward(
    inner: nn.Module, outer: nn.Module, x: Float[Tensor, "b n c"], other: Float[Tensor, "b n c"]
) -> Float[Tensor, "b n c"]:
    """other + outer(geglu(inner(x)))."""
    if onednn.takes(x, inner, outer):
        return onednn.feed_forward(inner, outer, x, other)  # type: ignore[arg-type]
    if isinstance(inner, Gated) and inner.takes(x, outer):
        return onednn.by_rows(lambda x, other: outer(inner.gated(x)).add_(other), x, other, len(inner.values.zero))
    if onednn.plain(x, inner, outer):
        return onednn.by_rows(lambda x, other: other + outer(geglu(inner(x))), x, other, 8 * x.shape[-1])
    return other + outer(geglu(inner(x)))


def geglu(x: Float[Tensor, "*b c2"]) -> Float[Tensor, "*b c"]:
    """Half of the channels gated by the GELU of the other half (Shazeer 2020, arXiv 2002.05202, eq. 6)."""
    if fuses(x) and x.is_contiguous():
        return kernels().geglu(x)
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def conv_enlarged(conv: nn.Module, x: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b out h2 w2"]:
    """conv of x with its pixels repeated, to `size` (height, width) in all."""
    twice = tuple(size) == (2 * x.shape[-2], 2 * x.shape[-1])
    if twice and not fuses(x) and adds_inside(conv, x) and conv.doubles():  # type: ignore[operator]
        return conv.doubled(x)  # type: ignore[operator]
    return conv(enlarge(x, size))


def enlarge(x: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c h2 w2"]:
    """Each pixel repeated: the nearest one, `size` (height, width) in all."""
    if tuple(size) == (2 * x.shape[-2], 2 * x.shape[-1]) and fuses(x) and is_last(x):
        return kernels().double(x)
    return F.interpolate(x, size=tuple(size), mode="nearest")
