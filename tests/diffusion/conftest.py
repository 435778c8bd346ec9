"""What the tests of the diffusion core share: a condition without a text tower, and a network that is a formula."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """A condition as `guided` needs it; `context` is [b, 1, 1]."""

    context: Tensor
    vector: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    def join(self, other: Cond) -> Cond:
        return Cond(torch.cat([self.context, other.context]))


@pytest.fixture
def cond():
    """cond(v, b=1): a condition whose embedding is the number v for each of b pictures."""
    return lambda v, b=1: Cond(torch.full((b, 1, 1), float(v), dtype=torch.float64))


@pytest.fixture
def network():
    """A bounded, nonlinear function of everything that a network sees, in x's dtype."""

    def F(x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None = None) -> Tensor:
        x, t = (each.repeat(len(context) // len(x), *[1] * (each.ndim - 1)) for each in (x, t))
        time = t.reshape(-1, 1, 1, 1).to(x.dtype) / 300
        return torch.sin(1.5 * x + time) + context.reshape(-1, 1, 1, 1).to(x.dtype) * torch.cos(x - time)

    return F


@pytest.fixture
def noise():
    """noise(shape, seed=0): standard normal float64."""
    return lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def randn():
    """randn(seed): the `randn` of a sampler, one stream for the whole batch, in float64."""

    def make(seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        return lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)

    return make
