"""Convolutions of small maps with many channels, which a CPU computes faster as one matrix product."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d`, to be made as a 3×3 convolution with a margin of one: the same weights and function.

    torch's kernel for a CPU orders its weights anew at every call. On a map of 8×8 with 1280 channels that takes as long as the
    convolution itself: 48 GFLOP/s on a core of Zen 3, and 78 as a product; of 16×16, 75 and 85.
    """

    most: ClassVar[int] = 512  # positions, over all pictures of the batch
    least: ClassVar[int] = 1 << 22  # weights

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h w"]:
        if self.is_faster_as_product(input):
            return product(input, self.weight, self.bias)
        return super().forward(input)

    def is_faster_as_product(self, x: Tensor) -> bool:
        """Measured in float32 with AVX2; with AVX-512, and in bfloat16, torch's products are the slower ones."""
        return (
            x.device.type == "cpu"
            and x.dtype == torch.float32
            and len(x) * x.shape[-2] * x.shape[-1] <= self.most
            and self.weight.numel() >= self.least
            and (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))  # peft makes others of its kind
            and torch.backends.cpu.get_cpu_capability() == "AVX2"
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        )


def product(x: Float[Tensor, "b c h w"], weight: Float[Tensor, "out c 3 3"], bias: Tensor | None) -> Float[Tensor, "b out h w"]:
    """Each position's nine neighbours side by side, times the weights: one copy of x, none of channels-last weights."""
    b, c, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  #                         [b, h + 2, w + 2, c]
    picture, row, place, _ = padded.stride()
    rows = padded.as_strided((b, h, w, 3, 3 * c), (picture, row, place, row, 1))  #      three neighbours of a row lie side by side
    y = F.linear(rows.reshape(b * h * w, 9 * c), weight.permute(0, 2, 3, 1).flatten(1), bias)
    return y.view(b, h, w, -1).permute(0, 3, 1, 2)  #                                    channels-last
