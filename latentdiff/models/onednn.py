"""Products of a CPU that do what follows them before they store: oneDNN's, by the operators that torch's compiler calls."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

enabled = True  # the benchmark's ladder stands on both rungs

PART = 6 << 20  # numbers between the two products of a feed-forward net
TWICE = [1, 1], [0, 0], [2, 2], [1, 1], 1  # padding, output padding, stride, dilation and groups of a convolution to twice the size
REUSED = 32 << 20  # bytes: larger memory glibc takes from the system anew each time, page by page


def takes(x: Tensor, *layers: nn.Module) -> bool:
    """Whether `linear` may stand for these layers' own products of x, or of something like it.

    In bfloat16, where torch's are oneDNN's too (float32's are often faster by another library), where layers are `plain`.
    """
    return x.dtype == torch.bfloat16 and plain(x, *layers)


def plain(x: Tensor, *layers: nn.Module) -> bool:
    """Whether nothing is to be learnt, and these are linear layers of x's dtype to which nobody listens by themselves."""
    return works_on(x) and all(
        type(layer) is nn.Linear and layer.weight.dtype == x.dtype and not listened_to(layer) for layer in layers
    )


def works_on(x: Tensor) -> bool:
    """Not where a gradient is wanted, nor where a compiler sees all of the network and does it by itself."""
    return (
        enabled
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and has_operators(x.dtype)
        and bool(torch.backends.mkldnn.enabled)
    )


def listened_to(layer: nn.Module) -> bool:
    """Whether a hook, of its own or of all modules, waits for its call, or a `forward` was set on it, as some tools do."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or torch.nn.modules.module._has_any_global_hook()
    return bool(hooks or "forward" in layer.__dict__)


@cache
def has_operators(dtype: torch.dtype) -> bool:
    """Whether kernels here take weights in an order of their own: oneDNN's on x86, if this torch has its (private) operators."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    orders = hasattr(getattr(torch._C, "_nn", None), "mkldnn_reorder_conv2d_weight")
    if not (orders and all(hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_linear_pointwise"))):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def multiplies_bfloat16() -> bool:
    """Whether the CPU has AVX512-BF16 or AMX."""
    return has("avx512_bf16", "_is_avx512_bf16_supported") or has("amx_bf16", "_is_amx_tile_supported")


@cache
def multiplies_int8(dtype: torch.dtype) -> bool:
    """Whether the CPU adds products of 8-bit numbers in 32 bits (VNNI, AMX), and this torch has the (private) operators, with
    results of this dtype. Older CPUs add pairs in 16 bits, which overflow."""
    has_own = has("avx512_vnni", "_is_vnni_supported") or has("avx_vnni", "_is_vnni_supported")
    products = (getattr(torch.ops.onednn, name, None) for name in ("qlinear_pointwise", "qconv2d_pointwise"))
    there = has_own and has_operators(dtype) and all(p is not None and "tensor" in p.overloads() for p in products)
    return there and adds_in_32_bits(dtype)


def adds_in_32_bits(dtype: torch.dtype) -> bool:
    """Whether the largest numbers add up: not where oneDNN is told to work as on an older CPU (`ONEDNN_MAX_CPU_ISA`)."""
    with torch.device("cpu"):
        x, weight = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((1, 64), 127, dtype=torch.int8)
        one, zero = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.int32)
    y = product_int8((x, one, zero), (packed_int8(weight, one, None), one, zero), None, None, dtype)
    return abs(y.item() / (64 * 255 * 127) - 1) < 0.01


def has(ability: str, older: str) -> bool:
    """Torch tells; an older one only by names that are not public."""
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get(ability))
    return bool(getattr(torch.cpu, older, bool)())


# Whether the CPU multiplies in tiles, as Intel's of 2023 and later do: 5 to 10 times as fast as in vectors. A constant, since a
# compiler looks at who asks.
AMX = has("amx_bf16", "_is_amx_tile_supported")


def linear(
    x: Float[Tensor, "*b c"],
    weight: Float[Tensor, "out c"],
    bias: Float[Tensor, " out"] | None,
    *,
    gelu: bool = False,
    add: Float[Tensor, "*b out"] | None = None,
    times: Float[Tensor, "*b out"] | None = None,
) -> Float[Tensor, "*b out"]:
    """x weight^T + bias, or GELU of it, or added to or multiplied with something."""
    run = torch.ops.mkldnn._linear_pointwise
    if add is not None:
        return run.binary(x, add, weight, bias, "add")
    if times is not None:
        return run.binary(x, times, weight, bias, "mul")
    return run.default(x, weight, bias, *(("gelu", [], "none") if gelu else ("none", [], "")))


def feed_forward(
    inner: nn.Linear, outer: nn.Linear, x: Float[Tensor, "b n c"], other: Float[Tensor, "b n c"]
) -> Float[Tensor, "b n c"]:
    """other + outer(half of inner(x), gated by the GELU of the other half)."""
    hidden = outer.in_features
    values, gates = inner.weight.split(hidden)
    of_values, of_gates = (None, None) if inner.bias is None else inner.bias.split(hidden)

    def made(x: Tensor, other: Tensor) -> Tensor:
        y = linear(x, values, of_values, times=linear(x, gates, of_gates, gelu=True))
        return linear(y, outer.weight, outer.bias, add=other)

    return by_rows(made, x, other, hidden)


def by_rows(
    made: Callable[[Tensor, Tensor], Tensor], x: Float[Tensor, "b n c"], other: Float[Tensor, "b n c"], hidden: int
) -> Float[Tensor, "b n c"]:
    """made(x, other), so few rows at once that what lies between, `hidden` numbers a row, takes 12 MiB: memory that is used again,
    where asking for more would take as long as the products.
    """
    parts = -(-x[..., 0].numel() * hidden // PART)
    if parts <= 1:
        return made(x, other)
    rows, others, out = x.flatten(0, 1), other.flatten(0, 1), other.new_empty(other.shape)
    for some, beside, into in zip(rows.chunk(parts), others.chunk(parts), out.flatten(0, 1).chunk(parts), strict=True):
        into.copy_(made(some, beside))
    return out


def convolution(
    x: Float[Tensor, "b c h w"],
    weight: Tensor,
    bias: Float[Tensor, " out"] | None,
    *where: object,
    add: Float[Tensor, "b out h2 w2"] | None = None,
) -> Float[Tensor, "b out h2 w2"]:
    """The convolution of a channels-last map, added to something; `where`: padding, stride, dilation, groups.

    So few outputs at once that the weights, which the kernel copies into its order at every call, take memory that is used again:
    2560 to 1280 channels in bfloat16 on 8×8 take 26 ms and not 46, on 16×16 75 and not 91 (two cores of Zen 4).
    """
    run = torch.ops.mkldnn._convolution_pointwise
    parts = -(-weight.numel() * weight.element_size() // REUSED)
    if parts > 1 and not weight.is_mkldnn:  # in its order already
        biases = [None] * parts if bias is None else bias.chunk(parts)
        y = torch.cat([run.default(x, *some, *where, "none", [], "") for some in zip(weight.chunk(parts), biases, strict=False)], 1)
        return y if add is None else y.add_(add)
    if add is not None:
        return run.binary(x, add, weight, bias, *where, "add", 1.0, None, [], None)
    return run.default(x, weight, bias, *where, "none", [], "")


def ordered(weight: Tensor, shape: torch.Size, *where: object) -> Tensor:
    """A copy of a convolution's weights in the order in which its kernel reads them, for inputs of this shape."""
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *where, shape)  # pyright: ignore


def ordered_linear(weight: Float[Tensor, "out c"], rows: int) -> Tensor:
    """A copy of a linear layer's weights in the order of `linear`'s kernel, for inputs of so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def doubles(dtype: torch.dtype) -> bool:
    """Whether there is `transposed_convolution`, with its order."""
    names = ("_convolution_transpose_pointwise", "_reorder_convolution_transpose_weight")
    return has_operators(dtype) and all(hasattr(torch.ops.mkldnn, name) for name in names)


def transposed_convolution(x: Float[Tensor, "b c h w"], weight: Tensor, bias: Float[Tensor, " out"] | None) -> Tensor:
    """`F.conv_transpose2d` of a channels-last map by 4×4 weights, to twice its height and width."""
    return torch.ops.mkldnn._convolution_transpose_pointwise(x, weight, bias, *TWICE, "none", [], "")


def ordered_transposed(weight: Float[Tensor, "c out 4 4"], shape: torch.Size) -> Tensor:
    """A copy in the order of `transposed_convolution`'s kernel, for inputs of this shape."""
    return torch.ops.mkldnn._reorder_convolution_transpose_weight(weight, *TWICE, shape)


def packed_int8(weight: Tensor, scale: Float[Tensor, " out"], where: tuple[object, ...] | None) -> Tensor:
    """8-bit weights in their kernel's order, a linear layer's turned; where: as for `convolution`, or None."""
    if where is None:
        return torch.ops.onednn.qlinear_prepack(weight, None)
    padding, *others = where
    # An input's scale and zero are told at each call; here counts that there is a zero.
    return torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 128, others[0], padding, *others[1:], None)


def product_int8(
    x: tuple[Tensor, Tensor, Tensor],
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Float[Tensor, " out"] | None,
    where: tuple[object, ...] | None,
    dtype: torch.dtype,
    *,
    gelu: bool = False,
) -> Tensor:
    """(q - zero) scale of both multiplied, or GELU of it. x: q in uint8 with channels last, one scale and zero; weight: q as
    `packed_int8` gives it, a scale for each output and zeros."""
    after: Any = 1.0, 0, dtype, *(("gelu", [], "none") if gelu else ("none", [], ""))
    if where is None:
        return torch.ops.onednn.qlinear_pointwise.tensor(*x, *weight, bias, *after)
    padding, stride, *others = where
    return torch.ops.onednn.qconv2d_pointwise.tensor(*x, *weight, bias, stride, padding, *others, *after)
