"""What a network computes: its products, one by one, with their cost by formula.

TFLOP are 2 × multiply-adds, attention included; norms, activations and additions are not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Conv:
    """A convolution: x [batch, channels, height, width] to `out` channels, kernel × kernel.

    doubled: whether each pixel of x stands there twice in both directions, which a faster way may know; the cost is told as if not.
    """

    shape: tuple[int, ...]
    out: int
    kernel: int
    stride: int
    padding: int
    doubled: bool = False

    @property
    def flops(self) -> int:
        batch, channels, *sides = self.shape
        height, width = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in sides)
        return 2 * batch * height * width * self.out * channels * self.kernel**2

    @property
    def kind(self) -> str:
        return f"{self.kernel}×{self.kernel} convolution"


@dataclass(frozen=True)
class Linear:
    """A matrix product: [rows, inputs] to `out`."""

    rows: int
    inputs: int
    out: int

    kind = "linear"

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.out


@dataclass(frozen=True)
class Attend:
    """Attention: q [batch, heads, queries, width] over so many keys."""

    shape: tuple[int, ...]
    keys: int

    @property
    def flops(self) -> int:
        return 4 * math.prod(self.shape) * self.keys

    @property
    def kind(self) -> str:
        return "self-attention" if self.keys == self.shape[-2] else "cross-attention"


Product = Conv | Linear | Attend


class _Listening(TorchFunctionMode):
    """Notes the products among the functions called."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: Counter[Product] = Counter()
        self.doubled: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.conv2d:
            x, weight, _, stride, padding, *_ = args
            doubled = any(x is y for y in self.doubled)
            self.heard[Conv(tuple(x.shape), weight.shape[0], weight.shape[-1], _one(stride), _one(padding), doubled)] += 1
        elif func is F.linear:
            x, weight = args[:2]
            self.heard[Linear(x.numel() // x.shape[-1], x.shape[-1], weight.shape[0])] += 1
        elif func is F.scaled_dot_product_attention:
            q, k = args[:2]
            self.heard[Attend(tuple(q.shape), k.shape[-2])] += 1
        out = func(*args, **(kwargs or {}))
        if func is F.interpolate and [*out.shape[2:]] == [2 * side for side in args[0].shape[2:]]:
            self.doubled.append(out)
        return out


def _one(number: Any) -> int:
    """Of a stride or padding that is the same both ways."""
    return number if isinstance(number, int) else number[0]


@torch.no_grad()
def products(run: Callable[[], object]) -> Counter[Product]:
    """All products of a run, and how often each. On `meta` it costs nothing."""
    with _Listening() as listening:
        run()
    return listening.heard


def flops(work: Counter[Product]) -> int:
    return sum(product.flops * times for product, times in work.items())


def shares(work: Counter[Product]) -> dict[str, float]:
    """The share of each kind of product, the greatest first."""
    kinds: Counter[str] = Counter()
    for product, times in work.items():
        kinds[product.kind] += product.flops * times
    return {kind: count / flops(work) for kind, count in kinds.most_common()}
