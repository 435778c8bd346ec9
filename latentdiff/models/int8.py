"""Products of 8-bit numbers, for CPUs that have them (VNNI, AMX). Faster where maps are large, and nearly the same picture."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentdiff.models import onednn


class Int8(nn.Module):
    """A linear layer or a convolution. Weights have a scale for each output; an input has one and a zero, found at every call.

    Their products are added without error; what there is comes from rounding both (Jacob et al. 2018, arXiv 1712.05877, sec. 2).
    where: a convolution's padding, stride, dilation, groups.
    """

    def __init__(
        self, weight: Float[Tensor, "out ..."], bias: Float[Tensor, " out"] | None, where: tuple[object, ...] | None = None
    ):
        super().__init__()
        q, self.scale = to_int8(weight.detach())
        self.zero = torch.zeros(len(q), dtype=torch.int32)
        self.bias = None if bias is None else bias.detach().float().clone()
        self.where, self.packed = where, onednn.packed_int8(q, self.scale, where)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": self.unpacked()}  # the kernel's order can be neither copied nor stored

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.packed = onednn.packed_int8(self.packed, self.scale, self.where)

    def unpacked(self) -> Tensor:
        """The weights in 8 bits, each in its place."""
        q = self.packed.to_dense()
        return q.mT.contiguous() if self.where is None else q

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """So that a network tells all that it is made of; to be looked at, and not to be loaded."""
        told = {"weight": self.unpacked(), "scale": self.scale} | ({} if self.bias is None else {"bias": self.bias})
        destination.update({prefix + name: tensor for name, tensor in told.items()})

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return self.widened(x)
        if not (x.numel() and onednn.multiplies_int8(x.dtype)):  # no pictures, or another dtype since
            return self.widened(x)
        if self.where is None:
            return self.product(to_uint8(x), x.dtype)
        q, scale, zero = to_uint8(x.permute(0, 2, 3, 1))
        return self.product((q.permute(0, 3, 1, 2), scale, zero), x.dtype)

    def product(self, x: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, *, gelu: bool = False) -> Tensor:
        """Of what `to_uint8` gives; in this dtype."""
        return onednn.product_int8(x, (self.packed, self.scale, self.zero), self.bias, self.where, dtype, gelu=gelu)

    def widened(self, x: Tensor) -> Tensor:
        """With the same weights and x as it is; gradients reach x."""
        q, bias = self.unpacked(), None if self.bias is None else self.bias.to(x.dtype)
        weight = (q * along(self.scale, q)).to(x.dtype)
        if self.where is None:
            return F.linear(x, weight, bias)
        padding, stride, *others = self.where
        return F.conv2d(x, weight, bias, stride, padding, *others)  # type: ignore[arg-type]


class Gated(nn.Module):
    """The first layer of a feed-forward net, half of whose outputs are gates of the others, in the place of a linear layer."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        biases = (None, None) if layer.bias is None else layer.bias.chunk(2)
        self.values, self.gates = (Int8(*half) for half in zip(layer.weight.chunk(2), biases, strict=True))

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c2"]:
        return torch.cat([self.values(x), self.gates(x)], -1)

    def takes(self, x: Tensor, outer: nn.Module) -> bool:
        """Whether `gated` may stand for this and the gates, and `outer` follow in parts: nothing is learnt, nobody listens."""
        heard = any(map(onednn.listened_to, (self, self.values, self.gates, outer)))
        return not (heard or torch.is_grad_enabled()) and x.numel() > 0 and onednn.multiplies_int8(x.dtype)

    def gated(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b hidden"]:
        """values · gelu(gates) (Shazeer 2020, arXiv 2002.05202, eq. 6)."""
        of_x = to_uint8(x)
        return self.values.product(of_x, x.dtype).mul_(self.gates.product(of_x, x.dtype, gelu=True))


def to_int8(weight: Float[Tensor, "out ..."]) -> tuple[Tensor, Float[Tensor, " out"]]:
    """(q, scale) with weight about q scale."""
    scale = scales(weight)
    return (weight / along(scale, weight)).round_().to(torch.int8), scale


def scales(weight: Float[Tensor, "out ..."]) -> Float[Tensor, " out"]:
    """For each output what brings its largest weight to 127; half of that is the largest error."""
    return weight.flatten(1).abs().amax(1).float().clamp(min=1e-12) / 127


def along(scale: Float[Tensor, " out"], weight: Float[Tensor, "out ..."]) -> Tensor:
    return scale.view(-1, *[1] * (weight.ndim - 1))


def to_uint8(x: Float[Tensor, "*b c"]) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, zero) with x about (q - zero) scale, the same two for all of x.

    From the lowest number (or zero) to the highest there are 253 steps: both ends may be rounded outwards, and zero is never 0, for
    which the kernel would be another one.
    """
    low, high = (end.float() for end in torch.aminmax(x))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 253).clamp(min=1e-12)
    zero = (1 - low / scale).round()
    q = torch.mul(x.float(), 1 / scale).add_(zero).round_()
    return q.to(torch.int16).to(torch.uint8), scale, zero.int()  # by way of 16 bits in a fifth of the time
