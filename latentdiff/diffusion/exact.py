"""A distribution whose denoiser and whose probability-flow ODE have formulas: what solvers are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians on the line; every number of a picture is drawn from it independently."""

    means: Sequence[float] = (-1.5, 0.0, 0.8)
    stds: Sequence[float] = (0.4, 0.25, 0.5)
    weights: Sequence[float] = (0.3, 0.3, 0.4)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x0 + sigma · eps = x]: each Gaussian's posterior mean, weighted by its share of the density at x."""
        mean, var, weight = self._parts(x)
        noisy = var + sigma.to(x.dtype) ** 2
        share = (weight.log() - noisy.log() / 2 - (x[..., None] - mean) ** 2 / (2 * noisy)).softmax(-1)
        return (share * (mean + var / noisy * (x[..., None] - mean))).sum(-1)

    def cdf(self, x: Tensor, sigma: float) -> Tensor:
        """P(x0 + sigma · eps <= x)."""
        mean, var, weight = self._parts(x)
        return (weight * torch.special.ndtr((x[..., None] - mean) / (var + sigma**2).sqrt())).sum(-1)

    def flow(self, x: Tensor, sigma: float, sigma_end: float) -> Tensor:
        """Where the probability-flow ODE carries x: on the line it keeps quantiles, so to the same quantile at sigma_end."""
        p = self.cdf(x, sigma)
        low, high = torch.full_like(x, -100.0), torch.full_like(x, 100.0)
        for _ in range(70):
            middle = (low + high) / 2
            below = self.cdf(middle, sigma_end) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _parts(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, std, weight = (like.new_tensor(list(v)) for v in (self.means, self.stds, self.weights))
        return mean, std**2, weight
