"""GroupNorm followed by SiLU, the pair that stands before every convolution of these networks."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def norm_silu(norm: nn.GroupNorm, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """silu(norm(x)) (Wu & He 2018, arXiv 1803.08494, eq. 1 and 2); one fused kernel on a GPU, where nothing is to be learnt.

    A compiler that sees the whole network does as well by itself.
    """
    infers = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    infers = infers and x.is_contiguous(memory_format=torch.channels_last)
    if infers and x.is_cuda and has_triton():
        from latentdiff.models.kernels import group_norm_silu

        return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if x.dtype == torch.bfloat16 and infers and slow_on_cpu(norm, x):
        return F.silu(norm(x.contiguous()), inplace=True).contiguous(memory_format=torch.channels_last)
    return F.silu(norm(x))


def slow_on_cpu(norm: nn.GroupNorm, x: Float[Tensor, "b c h w"]) -> bool:
    """Whether torch's channels-last kernel in bfloat16 takes 2 to 3 times as long as going to the other layout and back.

    It does on small maps, where it goes through each group by itself, if a group has fewer channels than a vector.
    """
    return x.device.type == "cpu" and x.shape[-2] * x.shape[-1] < 1024 and x.shape[1] < 16 * norm.num_groups


@cache
def has_triton() -> bool:
    """Whether its kernels can be built here: not on every platform, and not for GPUs older than it supports."""
    try:
        import triton  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        return False
    return torch.cuda.get_device_capability() >= (8, 0) and torch.version.hip is None
