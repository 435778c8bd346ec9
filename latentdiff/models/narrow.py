"""Weights kept in 8 or 16 bits and widened where they are used, for a CPU with little memory. Nearly the same picture."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.models.attention import Transformer
from latentdiff.models.unet import Downsample, ResBlock, UNet, Upsample

Width = Literal["int8", "bfloat16"]


class Narrow(nn.Module):
    """A linear layer or a convolution. In int8 each output has a scale of its own, half of whose unit is the largest error.

    Scales are numbers that bfloat16 has: in weights' own dtype they multiply 20 times as fast as in another.
    """

    weight: Tensor
    scale: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, width: Width):
        super().__init__()
        weight, scale = layer.weight.detach(), None
        if width == "int8":
            scale = weight.flatten(1).abs().amax(1).float().clamp(min=1e-12).view(-1, *[1] * (weight.ndim - 1)) / 127
            scale = scale.bfloat16().float()
            weight = (weight / scale).round_()
        self.register_buffer("weight", weight.to(getattr(torch, width)))
        self.register_buffer("scale", scale)
        self.bias = layer.bias
        self.geometry = (layer.stride, layer.padding) if isinstance(layer, nn.Conv2d) else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.scale is not None:
            weight *= self.scale.to(x.dtype)
        if self.geometry is None:
            return F.linear(x, weight, self.bias)
        stride, padding = self.geometry
        return F.conv2d(x, weight, self.bias, stride, padding)


def narrow(unet: UNet, width: Width) -> None:
    """Do so, in place, to all that is between the first and the last convolution; these and the embedding of time stay as they are.

    Errors: ValueError for another width, or where the weights are on another device than a CPU.
    """
    device = next(unet.parameters()).device.type
    if width not in ("int8", "bfloat16") or device != "cpu":
        raise ValueError(f"weights must be int8 or bfloat16, on a CPU, got {width!r} on {device}")
    for block in [m for m in unet.modules() if isinstance(m, Transformer | ResBlock | Downsample | Upsample)]:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear | nn.Conv2d):
                    setattr(parent, name, Narrow(child, width))
