"""Convolutions of small maps, where torch's kernel for a CPU spends much of its time on ordering weights anew at every call."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentdiff.models import fused


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, the same weights and function, faster where nothing is to be learnt: on a GPU without torch's pass for the bias
    (`on_gpu`), and in two ways where a CPU works on a small map.

    Light weights are ordered once for each shape of the input and kept so beside themselves: the same kernel (and the same bits,
    wherever we looked), in 0.4 to 0.9 of the time on maps of 4×4 to 16×16. Heavy ones, which one would not keep twice, are
    multiplied as they are, in one matrix product, if that is faster: with 1280 channels on 8×8, 48 GFLOP/s on a core of Zen 3
    become 78.
    """

    fast: ClassVar[bool] = True  # the benchmark's ladder stands on both rungs
    light: ClassVar[int] = 1 << 20  # weights, at most, that are ordered once
    packs: ClassVar[int] = 4096  # positions, over all pictures of the batch, up to which that is worth it
    heavy: ClassVar[int] = 1 << 22  # weights, at least, for a product
    products: ClassVar[int] = 512  # positions up to which that is faster

    _ordered: dict[torch.Size, tuple[Any, Tensor]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ordered = {}  # shape of the input -> (state of the weights, they in the kernel's order)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ordered": {}}  # such an order can be neither copied nor stored

    def forward(self, input: Float[Tensor, "b c h w"], *, biased: bool = True) -> Float[Tensor, "b out h2 w2"]:
        """biased: with its bias; False only where `fused.fuses` says so, which adds it elsewhere."""
        if fused.fuses(input) and fused.is_last(input):
            return self.on_gpu(input, self.bias if biased else None)
        if self.fast and not torch.compiler.is_compiling() and input.device.type == "cpu":
            if torch.is_grad_enabled():
                self._ordered = {}  # what trains is not kept: a fused optimiser changes weights without counting it
            elif self.is_faster_packed(input):
                return self.packed(input)
            elif self.is_faster_as_product(input):
                return product(input, self.weight, self.bias)
        return super().forward(input)

    def on_gpu(self, x: Float[Tensor, "b c h w"], bias: Tensor | None) -> Float[Tensor, "b out h2 w2"]:
        """torch adds a bias in a pass of its own, which is slow; with 1×1 weights, it is a part of the matrix product."""
        if (self.kernel_size, self.stride, self.padding, self.groups) == ((1, 1), (1, 1), (0, 0), 1):
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), bias).permute(0, 3, 1, 2)
        y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        if bias is None:
            return y
        return fused.kernels().add_(y, bias) if fused.is_last(y) else y + bias[:, None, None]

    def is_faster_packed(self, x: Tensor) -> bool:
        """Measured in float32 and bfloat16 with AVX-512."""
        return (
            self.weight.numel() <= self.light
            and len(x) * x.shape[-2] * x.shape[-1] <= self.packs
            and x.is_contiguous(memory_format=torch.channels_last)
            and x.dtype == self.weight.dtype
            and (self.groups, self.dilation, self.padding_mode) == (1, (1, 1), "zeros")
            and not (isinstance(self.padding, str) or self.weight.is_inference() or torch.is_autocast_enabled("cpu"))
            and can_pack(x.dtype)
            and bool(torch.backends.mkldnn.enabled)
        )

    def packed(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h2 w2"]:
        """The convolution on weights in oneDNN's own order, by the operators that torch's compiler calls.

        Weights that changed are ordered anew. torch counts changes in place, but for those through `.data`: a sample tells of them.
        """
        where: Any = (self.padding, self.stride, self.dilation, self.groups)
        weight, n = self.weight.detach(), self.weight.numel()
        sample = weight.as_strided((min(n, 16),), (max(1, n // 16),)).tolist()
        state, found = (weight.data_ptr(), self.weight._version, sample), self._ordered.get(x.shape)
        if found is None or found[0] != state:
            found = state, torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *where, x.shape)  # pyright: ignore
            self._ordered = dict([*self._ordered.items()][-3:]) | {x.shape: found}
        return torch.ops.mkldnn._convolution_pointwise(x, found[1], self.bias, *where, "none", [], "")

    def is_faster_as_product(self, x: Tensor) -> bool:
        """Measured in float32 with AVX2; with AVX-512, and in bfloat16, torch's products are the slower ones."""
        return (
            x.dtype == torch.float32
            and len(x) * x.shape[-2] * x.shape[-1] <= self.products
            and self.weight.numel() >= self.heavy
            and (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))
            and torch.backends.cpu.get_cpu_capability() == "AVX2"
        )


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether kernels here take weights in an order of their own: oneDNN's on x86, if this torch has its (private) operators."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    orders = hasattr(getattr(torch._C, "_nn", None), "mkldnn_reorder_conv2d_weight")
    if not (orders and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "out c 3 3"], bias: Tensor | None) -> Float[Tensor, "b out h w"]:
    """Each position's nine neighbours side by side, times the weights: one copy of x, none of channels-last weights."""
    b, c, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  #                         [b, h + 2, w + 2, c]
    picture, row, place, _ = padded.stride()
    rows = padded.as_strided((b, h, w, 3, 3 * c), (picture, row, place, row, 1))  #      three neighbours of a row lie side by side
    y = F.linear(rows.reshape(b * h * w, 9 * c), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return y.view(b, h, w, -1).permute(0, 3, 1, 2)  #                                    channels-last
