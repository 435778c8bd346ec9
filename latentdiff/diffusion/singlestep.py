"""Samplers that remember nothing from one step to the next, and the interface that all samplers share.

Half of them are one move: carry x down to a level `down` along the direction to x0, then add noise up to the next level of the
grid. `ddim`, `ddpm`, `euler_ancestral`, `lcm` and `tcd` differ in where `down` lies, from 0 to the next level itself.

Coefficients are Python floats (float64), so nothing of them waits for a device or rounds with the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoise
from latentdiff.diffusion.schedules import NOISE_ALONE

Randn = Callable[[Tensor], Tensor]  # x -> standard normal noise of x's shape, from each picture's own generator
Latents = Float[Tensor, "b c h w"]
Grid = Float[Tensor, " steps+1"]


@dataclass(frozen=True, eq=False)
class Step:
    """What a sampler yields after each step: its index, the level it arrived at, the state there and the last x0 estimate."""

    i: int
    sigma: Tensor
    x: Tensor
    x0: Tensor


class Sampler(Protocol):
    """A generator of steps. sigmas: on the CPU, strictly decreasing, ending in 0 or above; noise comes from `randn` alone."""

    def __call__(self, denoise: Denoise, x: Tensor, sigmas: Tensor, *, randn: Randn) -> Iterator[Step]: ...


def steps(sigmas: Grid) -> Iterator[tuple[int, float, float]]:
    """(i, level, next level) of each step."""
    for i, (s, s_next) in enumerate(pairwise(sigmas.tolist())):
        yield i, s, s_next


def carry(x: Latents, x0: Latents, ratio: float) -> Latents:
    """x at `ratio` times its level, were x0 the same on the way: the exact solution of the probability-flow ODE."""
    return x0 + ratio * (x - x0)


def add_noise(x: Latents, std: float, randn: Randn) -> Latents:
    return x + std * randn(x) if std > 0 else x


def ancestral_split(s: float, s_next: float, eta: float) -> tuple[float, float]:
    """(down, up): go down deterministically to `down`, then add noise of std `up`; together they make level s_next.

    up² = eta² · s_next² (s² - s_next²) / s² is DDPM's posterior variance (Ho et al. eq. 7; Song et al. eq. 16) written in
    sigmas; eta = 1 is DDPM, eta = 0 adds nothing.
    """
    up = min(s_next, eta * s_next * math.sqrt(1 - (s_next / s) ** 2))
    return math.sqrt(s_next**2 - up**2), up


def _down_and_up(denoise: Denoise, x: Latents, sigmas: Grid, randn: Randn, down: Callable[[float, float], float]) -> Iterator[Step]:
    """down: (level, next level) -> the level that is reached without noise."""
    for i, s, s_next in steps(sigmas):
        x0 = denoise(x, sigmas[i])
        low = down(s, s_next)
        x = add_noise(carry(x, x0, low / s), math.sqrt(s_next**2 - low**2), randn)
        yield Step(i, sigmas[i + 1], x, x0)


def ddim(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, eta: float = 0.0) -> Iterator[Step]:
    """Along the direction to x0, plus eta times DDPM's noise: DDIM (Song et al., arXiv 2010.02502, eq. 12 and 16).

    Order 1, one evaluation a step, stochastic for eta > 0.
    """
    return _down_and_up(denoise, x, sigmas, randn, lambda s, s_next: ancestral_split(s, s_next, eta)[0])


def ddpm(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn) -> Iterator[Step]:
    """Ancestral sampling with the posterior variance: DDPM (Ho et al., arXiv 2006.11239, algorithm 2), on any grid.

    Order 1, one evaluation a step, stochastic. DDIM's rule at eta = 1.
    """
    return ddim(denoise, x, sigmas, randn=randn, eta=1.0)


def euler(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn) -> Iterator[Step]:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al., arXiv 2206.00364, eq. 1 and 3): DDIM's rule at eta = 0.

    Order 1, one evaluation a step, deterministic.
    """
    return ddim(denoise, x, sigmas, randn=randn, eta=0.0)


def euler_ancestral(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, eta: float = 1.0) -> Iterator[Step]:
    """An Euler step below the next level and noise up to it: the "Euler a" of k-diffusion, which is DDPM's rule.

    Order 1, one evaluation a step, stochastic.
    """
    return ddim(denoise, x, sigmas, randn=randn, eta=eta)


def heun(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn) -> Iterator[Step]:
    """An Euler step, then again with the mean slope of both its ends (Karras et al., arXiv 2206.00364, algorithm 1).

    Order 2, two evaluations a step (one in a last step to 0), deterministic. The mean slope moves x by (s / s_next - 1) / 2 times
    the change of x0, which is a thousandfold in the first step from noise alone (cosine, zero terminal SNR): there the mean of x0
    is taken instead. diffusers has no such exception.
    """
    for i, s, s_next in steps(sigmas):
        first = denoise(x, sigmas[i])
        ahead = carry(x, first, s_next / s)
        if s_next == 0:
            x0, x = first, ahead
        else:
            x0 = denoise(ahead, sigmas[i + 1])
            slope = ((x - first) / s + (ahead - x0) / s_next) / 2
            x = x + (s_next - s) * slope if s < NOISE_ALONE else carry(x, (first + x0) / 2, s_next / s)
        yield Step(i, sigmas[i + 1], x, x0)


def _midpoint(denoise: Denoise, x: Latents, sigmas: Grid, randn: Randn, eta: float, *, hold_x0: bool) -> Iterator[Step]:
    """Half a step in log sigma, then a whole one with what is seen there held constant: x0, or the slope, save from noise alone."""
    for i, s, s_next in steps(sigmas):
        down, up = ancestral_split(s, s_next, eta)
        x0 = denoise(x, sigmas[i])
        if down > 0:
            mid = math.sqrt(s * down)
            halfway = carry(x, x0, mid / s)
            x0 = denoise(halfway, sigmas.new_tensor(mid))
            held = hold_x0 or s >= NOISE_ALONE
            x = carry(x, x0, down / s) if held else x + (down - s) / mid * (halfway - x0)
        else:
            x = x0
        x = add_noise(x, up, randn)
        yield Step(i, sigmas[i + 1], x, x0)


def dpm2(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn) -> Iterator[Step]:
    """The midpoint rule for the slope: DPM-Solver-2 (Lu et al., arXiv 2206.00927, algorithm 1).

    Order 2, two evaluations a step (one in a last step to 0), deterministic. From noise alone x0 is held
    instead of the slope: see `heun`.
    """
    return _midpoint(denoise, x, sigmas, randn, 0.0, hold_x0=False)


def dpm2_ancestral(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, eta: float = 1.0) -> Iterator[Step]:
    """DPM-Solver-2 to below the next level and noise up to it, as in k-diffusion.

    Order 1, two evaluations a step (one in a last step to 0), stochastic.
    """
    return _midpoint(denoise, x, sigmas, randn, eta, hold_x0=False)


def dpmpp_2s_ancestral(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, eta: float = 1.0) -> Iterator[Step]:
    """The midpoint rule for x0, DPM-Solver++(2S) (Lu et al., arXiv 2211.01095, algorithm 1), and noise up to the next level.

    Order 1 (2 at eta = 0), two evaluations a step (one in a last step to 0), stochastic. diffusers has the rule without noise
    (`DPMSolverSinglestepScheduler`), and counts its two evaluations as two steps.
    """
    return _midpoint(denoise, x, sigmas, randn, eta, hold_x0=True)


def dpmpp_sde(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, eta: float = 1.0) -> Iterator[Step]:
    """The midpoint rule for x0 on the reverse SDE (Lu et al., arXiv 2211.01095), the "DPM++ SDE" of k-diffusion.

    Order 1, two evaluations a step (one in a last step to 0), stochastic. Both halves of a step see one Brownian path in sigma: the
    noise of the whole is made of the two increments. k-diffusion and diffusers draw the same from a tree of intervals.
    """
    for i, s, s_next in steps(sigmas):
        x0 = denoise(x, sigmas[i])
        if s_next == 0:
            x = x0
        else:
            mid = math.sqrt(s * s_next)
            first, second = (randn(x), randn(x)) if eta > 0 else (torch.zeros_like(x), torch.zeros_like(x))
            down, up = ancestral_split(s, mid, eta)
            halfway = carry(x, x0, down / s) + up * first
            x0 = denoise(halfway, sigmas.new_tensor(mid))
            down, up = ancestral_split(s, s_next, eta)
            whole = (math.sqrt(s - mid) * first + math.sqrt(mid - s_next) * second) / math.sqrt(s - s_next)
            x = carry(x, x0, down / s) + up * whole
        yield Step(i, sigmas[i + 1], x, x0)


def lcm(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn) -> Iterator[Step]:
    """All the way to x0, then noise up to the next level: multistep consistency sampling (Song et al., arXiv 2303.01469, alg. 1).

    One evaluation a step, stochastic; for latent consistency models (Luo et al., arXiv 2310.04378), and no solver of
    the ODE, so it has no order. Those models' skip connection is `denoiser.consistency`
    (`samplers.bind` puts it in).
    """
    return _down_and_up(denoise, x, sigmas, randn, lambda s, s_next: 0.0)


def tcd(
    denoise: Denoise,
    x: Latents,
    sigmas: Grid,
    *,
    randn: Randn,
    eta: float = 0.3,
    lower: Callable[[float, float], float] | None = None,
) -> Iterator[Step]:
    """Down to a level between 0 and the next, then noise up to it (Zheng et al., arXiv 2402.19159; eta is gamma).

    One evaluation a step, stochastic for eta > 0; for trajectory-consistency models. The paper goes to the time (1 - eta) · t:
    `lower`, (next level, eta) -> level, knows times (`samplers.bind` makes it from a schedule); without it, to (1 - eta) · sigma.
    """
    lower = lower or (lambda s_next, eta: (1 - eta) * s_next)
    return _down_and_up(denoise, x, sigmas, randn, lambda s, s_next: lower(s_next, eta))
