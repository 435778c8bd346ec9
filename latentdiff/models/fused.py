"""Operations that stand together in these networks. A GPU does each in one kernel (`kernels.py`), where nothing is to be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def fuses(x: Tensor) -> bool:
    """Whether it pays here: not where a gradient is wanted, nor where a compiler sees all of the network and does it by itself."""
    return x.is_cuda and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and has_triton()


@cache
def has_triton() -> bool:
    """Whether its kernels can be built here: not on every platform, and not for GPUs older than it supports."""
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return False
    return torch.cuda.get_device_capability() >= (8, 0) and torch.version.hip is None


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
    if fuses(x) and is_last(x):
        return kernels().group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu)
    if slow_on_cpu(norm, x):
        y = norm(x.contiguous())
        return (F.silu(y, inplace=True) if silu else y).contiguous(memory_format=torch.channels_last)
    return F.silu(norm(x)) if silu else norm(x)


def slow_on_cpu(norm: nn.GroupNorm, x: Float[Tensor, "b c h w"]) -> bool:
    """Whether torch's channels-last kernel in bfloat16 takes 2 to 3 times as long as going to the other layout and back.

    It does on small maps, where it goes through each group by itself, if a group has fewer channels than a vector.
    """
    small = x.device.type == "cpu" and x.shape[-2] * x.shape[-1] < 1024 and x.shape[1] < 16 * norm.num_groups
    infers = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return small and infers and x.dtype == torch.bfloat16 and is_last(x)


def conv_norm_silu(
    conv: nn.Module, norm: nn.GroupNorm, x: Float[Tensor, "b c h w"], shift: Float[Tensor, "b out"] | None = None
) -> Float[Tensor, "b out h w"]:
    """silu(norm(conv(x) + shift))."""
    if fuses(x) and is_last(x):
        y = conv(x, biased=False)
        if is_last(y):
            places: dict[str, Any] = {"silu": True, "added": conv.bias, "moved": shift}
            return kernels().group_norm(y, norm.num_groups, norm.weight, norm.bias, norm.eps, **places)
        y = y + conv.bias[:, None, None]  # type: ignore[index]
    else:
        y = conv(x)
    return norm_silu(norm, y if shift is None else y + shift[:, :, None, None])


def conv_add(conv: nn.Module, x: Float[Tensor, "b c h w"], other: Float[Tensor, "b out h w"]) -> Float[Tensor, "b out h w"]:
    """other + conv(x)."""
    if fuses(x) and is_last(x, other):
        y = conv(x, biased=False)
        return kernels().add_(y, conv.bias, other) if is_last(y) else other + y + conv.bias[:, None, None]  # type: ignore[index]
    return other + conv(x)


def layer_norm(norm: nn.LayerNorm, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
    """norm(x) (Ba et al. 2016, arXiv 1607.06450)."""
    if fuses(x) and x.is_contiguous():
        return kernels().layer_norm(x, norm.weight, norm.bias, norm.eps)[1]
    return norm(x)


def add_layer_norm(
    norm: nn.LayerNorm, x: Float[Tensor, "*b c"], other: Float[Tensor, "*b c"]
) -> tuple[Float[Tensor, "*b c"], Float[Tensor, "*b c"]]:
    """x + other, and the norm of it."""
    if fuses(x) and x.is_contiguous() and other.is_contiguous():
        return kernels().layer_norm(x, norm.weight, norm.bias, norm.eps, other)
    x = x + other
    return x, norm(x)


def geglu(x: Float[Tensor, "*b c2"]) -> Float[Tensor, "*b c"]:
    """Half of the channels gated by the GELU of the other half (Shazeer 2020, arXiv 2002.05202, eq. 6)."""
    if fuses(x) and x.is_contiguous():
        return kernels().geglu(x)
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def enlarge(x: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c h2 w2"]:
    """Each pixel repeated: the nearest one, `size` (height, width) in all."""
    if tuple(size) == (2 * x.shape[-2], 2 * x.shape[-1]) and fuses(x) and is_last(x):
        return kernels().double(x)
    return F.interpolate(x, size=tuple(size), mode="nearest")
