"""Noise schedules and the grids that samplers walk.

The dictionary, for a reader who comes from Ho et al. (DDPM, arXiv 2006.11239) or Song et al. (DDIM, arXiv 2010.02502):

    abar_t  = prod_{s <= t} (1 - beta_s)        the papers' alpha-bar (DDIM's paper writes it alpha_t)
    sigma_t = sqrt((1 - abar_t) / abar_t)       how noisy x is, in units of the clean latents
    x       = z_t / sqrt(abar_t)                where z_t is the papers' x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
    so      x = x0 + sigma_t * eps              and the whole library works on this x

Numbers that must hold: tables are float64, the grid that a sampler walks is float32 on the CPU, so that a loop never waits for
a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

ABAR_FLOOR = 1e-10  # zero terminal SNR has sigma = inf; this floor keeps it finite (sigma = 1e5) and changes no picture


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise levels a model was trained on. `abar` [T] float64, decreasing, in (0, 1)."""

    abar: Float[Tensor, " T"]

    def __post_init__(self) -> None:
        a = self.abar
        if a.ndim != 1 or len(a) < 2 or not bool(((a > 0) & (a < 1)).all()) or not bool((a.diff() < 0).all()):
            raise ValueError("abar must be a decreasing sequence of at least two numbers in (0, 1)")

    def __len__(self) -> int:
        return len(self.abar)

    @property
    def sigmas(self) -> Float[Tensor, " T"]:
        """sigma_t for t = 0 … T-1, increasing, float64."""
        return ((1 - self.abar) / self.abar).sqrt()

    def sigma(self, t: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """sigma at (possibly fractional) t, linear in log sigma between the table's entries; float64."""
        t = torch.as_tensor(t, dtype=torch.float64).clamp(0, len(self) - 1)
        low = t.floor().long().clamp(max=len(self) - 2)
        log = self.sigmas.log()
        return torch.lerp(log[low], log[low + 1], t - low).exp()

    def t(self, sigma: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The t of a noise level: the inverse of `sigma(t)`, clamped to the table's ends; float64.

        Grids are float32, so t comes back within 1e-4 of what went in; values that close to an integer are snapped to it.
        """
        log, s = self.sigmas.log(), torch.as_tensor(sigma).double().clamp(min=1e-12).log()
        low = (torch.searchsorted(log, s.contiguous()) - 1).clamp(0, len(self) - 2)
        t = (low + (s - log[low]) / (log[low + 1] - log[low])).clamp(0, len(self) - 1)
        return torch.where((t - t.round()).abs() < 1e-3, t.round(), t)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar / (1 - abar) at integer t."""
        return self.abar[t] / (1 - self.abar[t])


def from_betas(betas: Float[Tensor, " T"]) -> NoiseSchedule:
    """abar_t = prod (1 - beta_s), Ho et al. after eq. 4. A final beta of 1 (zero terminal SNR) is floored at 1e-10."""
    return NoiseSchedule((1 - betas.double()).cumprod(0).clamp(min=ABAR_FLOOR))


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """betas linear in t: Ho et al., section 4."""
    return from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """betas linear in sqrt(beta): Stable Diffusion's schedule, which its training code calls "linear"."""
    return from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2)


def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """Nichol & Dhariwal (arXiv 2102.09672), eq. 17: abar(t) = cos²((t/T + s) / (1 + s) · pi/2), betas capped at 0.999."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    f = ((t + s) / (1 + s) * math.pi / 2).cos() ** 2
    return from_betas((1 - f[1:] / f[:-1]).clamp(max=max_beta))


def zero_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Lin et al. (arXiv 2305.08891), algorithm 1: shift and scale sqrt(abar) so that the last is 0 and the first is kept."""
    root = schedule.abar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return NoiseSchedule((root**2).clamp(min=ABAR_FLOOR))


def leading(T: int, steps: int, offset: int = 0) -> Tensor:
    """t = offset + k · (T // steps), k = steps-1 … 0: what DDIM's and Stable Diffusion's own code did. float64 [steps]."""
    return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (T // steps) + offset


def trailing(T: int, steps: int, offset: int = 0) -> Tensor:
    """t = round(T - k · T / steps) - 1: starts at the noisiest level (Lin et al., table 2). float64 [steps]."""
    return (T - torch.arange(steps, dtype=torch.float64) * (T / steps)).round() - 1


def linspace(T: int, steps: int, offset: int = 0) -> Tensor:
    """t = T-1 … 0 in equal, possibly fractional, steps. float64 [steps]."""
    return torch.linspace(T - 1, 0, steps, dtype=torch.float64) if steps > 1 else torch.tensor([T - 1.0], dtype=torch.float64)


SPACINGS: dict[str, Callable[[int, int, int], Tensor]] = {"leading": leading, "trailing": trailing, "linspace": linspace}


def grid(
    schedule: NoiseSchedule, steps: int, spacing: str = "trailing", *, offset: int = 0, final: str = "zero"
) -> Float[Tensor, " steps+1"]:
    """The strictly decreasing noise levels of a run of `steps` steps, float32 on the CPU.

    final: where the run ends. "zero" is sigma = 0; "sigma_min" is the table's lowest level, which is what a scheduler file with
    `set_alpha_to_one: false` (Stable Diffusion 1.x, 2.x) means.
    Errors: ValueError for steps outside 1 … T or an unknown spacing or final.
    """
    T = len(schedule)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= T:
        raise ValueError(f"steps must be an integer from 1 to {T}, got {steps!r}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"final must be zero or sigma_min, got {final!r}")
    t = SPACINGS[spacing](T, steps, offset).clamp(max=T - 1)
    last = torch.zeros(1, dtype=torch.float64) if final == "zero" else schedule.sigmas[:1]
    sigmas = torch.cat([schedule.sigma(t), last]).float()
    if final == "sigma_min" and sigmas[-2] <= sigmas[-1]:  # the grid already ends on the lowest level: step from it to 0
        sigmas[-1] = 0.0
    return sigmas
