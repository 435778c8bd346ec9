"""A U-Net in fewer bits on a CPU: weights kept so and widened where used, or products in 8 bits. Nearly the same picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.models import onednn
from latentdiff.models.attention import GEGLU, Attention, Transformer
from latentdiff.models.float8 import Float8Linear
from latentdiff.models.int8 import Gated, Int8, along, scales
from latentdiff.models.unet import Downsample, ResBlock, Upsample

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
            scale = along(scales(weight).bfloat16().float(), weight)
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


def narrow(unet: nn.Module, width: Width) -> None:
    """Do so, in place, to all that is between the first and the last convolution; these and the embedding of time stay as they are.

    Errors: ValueError for another width, or where the weights are on another device than a CPU.
    """
    device = next(unet.parameters()).device.type
    if width not in ("int8", "bfloat16") or device != "cpu":
        raise ValueError(f"weights must be int8 or bfloat16, on a CPU, got {width!r} on {device}")
    for parent, name, layer in layers(unet):
        setattr(parent, name, Narrow(layer, width))


def quantise_int8(unet: nn.Module) -> None:
    """Multiply in 8 bits, in place, in the same layers but for those that work once a run (time, the prompt's keys and values) and
    those that take the sum of all blocks before as it is (shortcuts), whose few large numbers would leave the others no digits.

    Errors: ValueError unless the weights are on a CPU that can.
    """
    weight = next(unet.parameters())
    if weight.device.type != "cpu" or not onednn.multiplies_int8(weight.dtype):
        raise ValueError(
            "int8 needs a CPU with VNNI or AMX, a model in float32 or (where the CPU has it) bfloat16, and a torch with oneDNN, "
            f"got {weight.dtype} on {weight.device}"
        )
    for parent, name, layer in layers(unet):
        once = name == "time_emb_proj" or (isinstance(parent, Attention) and parent.cross and name in ("to_k", "to_v"))
        if once or name == "conv_shortcut":
            continue
        if isinstance(parent, GEGLU):
            setattr(parent, name, Gated(layer))  # type: ignore[arg-type]
        else:
            where = (layer.padding, layer.stride, layer.dilation, layer.groups) if isinstance(layer, nn.Conv2d) else None
            setattr(parent, name, Int8(layer.weight, layer.bias, where))


def is_narrowed(network: nn.Module) -> bool:
    """Whether some of its weights are kept in fewer bits than they are used in: they are no longer those of its files."""
    return any(isinstance(module, Narrow | Int8 | Float8Linear) for module in network.modules())


def layers(unet: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | nn.Conv2d]]:
    """Linear layers and convolutions between the first and the last, with the modules that hold them."""
    for block in [m for m in unet.modules() if isinstance(m, Transformer | ResBlock | Downsample | Upsample)]:
        for parent in list(block.modules()):
            yield from ((parent, name, m) for name, m in list(parent.named_children()) if isinstance(m, nn.Linear | nn.Conv2d))
