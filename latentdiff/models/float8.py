"""Matrix products in 8 bits, for GPUs that have them (NVIDIA's Ada, Hopper and later). Faster, and nearly the same picture."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentdiff.models.attention import TransformerBlock

KIND = torch.float8_e4m3fn
LARGEST = torch.finfo(KIND).max


class Float8Linear(nn.Module):
    """A linear layer with a scale for each row of its weight and, at every call, for each row of its input."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = to_float8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b n out"]:
        rows, scale = to_float8(x.flatten(0, -2))
        return product(rows, scale, self.weight, self.scale, self.bias, x.dtype).unflatten(0, x.shape[:-1])


def product(
    x: Tensor,
    of_x: Float[Tensor, "n 1"],
    weight: Tensor,
    of_weight: Float[Tensor, "out 1"],
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Float[Tensor, "n out"]:
    """x [n, c] and weight [out, c] in 8 bits, each row times its scale, multiplied; and the bias."""
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return multiply(x, weight.T, scale_a=of_x, scale_b=of_weight.T, bias=bias, out_dtype=dtype)


def to_float8(x: Float[Tensor, "n c"]) -> tuple[Tensor, Float[Tensor, "n 1"]]:
    """Each row divided by what brings its largest entry to the largest of the format, and those divisors."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / LARGEST
    return (x.float() / scale).to(KIND), scale


def has_float8(device: torch.device) -> bool:
    """Whether the device multiplies in 8 bits; a CPU only pretends, slowly, which is enough for tests."""
    if device.type == "cpu":
        return pretends()
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def pretends() -> bool:
    """Whether torch knows scales of rows on a CPU: 2.10 does not."""
    ones = torch.ones(16, 16, dtype=torch.float32, device="cpu")
    try:
        product(*to_float8(ones), *to_float8(ones))
    except RuntimeError:
        return False
    return True


def quantise(unet: nn.Module) -> None:
    """Put the linear layers of all transformer blocks in 8 bits, in place; convolutions, time and all at the ends stay as they are.

    Errors: ValueError unless the weights are bfloat16 on a device that can.
    """
    weight = next(unet.parameters())
    if weight.dtype != torch.bfloat16 or not has_float8(weight.device):
        raise ValueError(f"float8 needs a bfloat16 model on an NVIDIA GPU of 2022 or later, got {weight.dtype} on {weight.device}")
    for block in [module for module in unet.modules() if isinstance(module, TransformerBlock)]:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Float8Linear(child))
