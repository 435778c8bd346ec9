"""Samplers: plain generators over an explicit, decreasing grid of noise levels.

A sampler holds no state and knows neither betas, timesteps nor prompts. Multistep memory is a local variable; progress, previews
and cancelling are a `for` loop in the caller. Any function of this signature can be passed to `pipe(..., sampler=...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoise

Randn = Callable[[Tensor], Tensor]  # x -> standard normal noise of x's shape, from each picture's own generator


@dataclass(frozen=True, eq=False)
class Step:
    """What a sampler yields after each step: its index, the level it arrived at, the state there and the last x0 estimate."""

    i: int
    sigma: Tensor
    x: Tensor
    x0: Tensor


class Sampler(Protocol):
    def __call__(self, denoise: Denoise, x: Tensor, sigmas: Tensor, *, randn: Randn) -> Iterator[Step]: ...


def ancestral_split(sigma: Tensor, sigma_next: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(sigma_down, sigma_up): go down deterministically to sigma_down, then add noise of std sigma_up.

    sigma_up² = eta² · sigma_next² (sigma² − sigma_next²) / sigma² is DDPM's posterior variance (Ho et al. eq. 7; DDIM eq. 16)
    written in sigmas; eta = 1 is DDPM, eta = 0 adds nothing.
    """
    up = eta * (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2).clamp(min=0).sqrt()
    return (sigma_next**2 - up**2).clamp(min=0).sqrt(), up


def ddim(
    denoise: Denoise, x: Float[Tensor, "b c h w"], sigmas: Float[Tensor, " n+1"], *, randn: Randn, eta: float = 0.0
) -> Iterator[Step]:
    """Song et al. (arXiv 2010.02502) eq. 12: along the direction to x, plus eta times DDPM's noise. Order 1."""
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        x0 = denoise(x, sigma)
        down, up = ancestral_split(sigma, sigma_next, eta)
        x = x0 + down / sigma * (x - x0)
        if eta > 0 and sigma_next > 0:
            x = x + up * randn(x)
        yield Step(i, sigma_next, x, x0)


def ddpm(denoise: Denoise, x: Float[Tensor, "b c h w"], sigmas: Float[Tensor, " n+1"], *, randn: Randn) -> Iterator[Step]:
    """Ho et al. (arXiv 2006.11239) algorithm 2, on any grid: DDIM's rule at eta = 1."""
    return ddim(denoise, x, sigmas, randn=randn, eta=1.0)


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {"ddim": ddim, "ddpm": ddpm}
