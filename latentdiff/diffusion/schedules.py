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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

NOISE_ALONE = 1000.0  # a sigma from which no picture shines through
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

    @cached_property
    @torch.inference_mode(False)
    def _log_sigmas(self) -> Float[Tensor, " T"]:
        return self.sigmas.log()  # made once: each step asks for it

    def sigma(self, t: Float[Tensor, "*n"] | float) -> Float[Tensor, "*n"]:
        """sigma at (possibly fractional) t, linear in log sigma between the table's entries; float64."""
        t = torch.as_tensor(t, dtype=torch.float64, device="cpu").clamp(0, len(self) - 1)
        low, log = t.floor().long().clamp(max=len(self) - 2), self._log_sigmas
        return torch.lerp(log[low], log[low + 1], t - low).exp()

    def t(self, sigma: Float[Tensor, "*n"] | float) -> Float[Tensor, "*n"]:
        """The t of a noise level: the inverse of `sigma(t)`, clamped to the table's ends; float64.

        Grids are float32, so t comes back within 1e-4 of what went in; values that close to an integer are snapped to it.
        """
        log, s = self._log_sigmas, torch.as_tensor(sigma, dtype=torch.float64, device="cpu").clamp(min=1e-12).log()
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


def leading(T: int, steps: int, offset: int = 0) -> Float[Tensor, " steps"]:
    """t = offset + k · (T // steps), k = steps-1 … 0: what DDIM's and Stable Diffusion's own code did.

    An offset that would leave the table is cut, so that no level occurs twice.
    """
    stride = T // steps
    return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * stride + min(offset, T - 1 - (steps - 1) * stride)


def trailing(T: int, steps: int) -> Float[Tensor, " steps"]:
    """t = round(T - k · T / steps) - 1: starts at the noisiest level (Lin et al., table 2). Elsewhere "sgm_uniform"."""
    return (T - torch.arange(steps, dtype=torch.float64) * (T / steps)).round() - 1


def linspace(T: int, steps: int) -> Float[Tensor, " steps"]:
    """t = T-1 … 0 in equal, possibly fractional, steps. Elsewhere "normal"."""
    return torch.linspace(T - 1, 0, max(steps, 2), dtype=torch.float64)[:steps]


def simple(T: int, steps: int) -> Float[Tensor, " steps"]:
    """t = T - 1 - floor(k · T / steps): ComfyUI's "simple", which differs from trailing by rounding alone."""
    return T - 1 - (torch.arange(steps, dtype=torch.float64) * (T / steps)).floor()


def lcm(T: int, steps: int, trained: int = 50) -> Float[Tensor, " steps"]:
    """Equally chosen among the `trained` trailing steps that latent consistency models were distilled on (diffusers' LCM, TCD)."""
    trained = max(min(trained, T), steps)
    chosen = (torch.arange(steps, dtype=torch.float64) * (trained / steps)).floor()
    return ((trained - chosen) * (T / trained)).round() - 1


def beta(T: int, steps: int, a: float = 0.6, b: float = 0.6) -> Float[Tensor, " steps"]:
    """t = (T - 1) · Q(1 - k / steps), Q the quantile function of Beta(a, b): dense at both ends (Lee et al., arXiv 2407.12173).

    ComfyUI rounds t and drops what then occurs twice; here t stays fractional and every step is kept.
    """
    p = 1 - torch.arange(steps, dtype=torch.float64) / steps
    return (T - 1) * beta_quantile(p, a, b)


def beta_quantile(p: Float[Tensor, " n"], a: float, b: float) -> Float[Tensor, " n"]:
    """The x at which the regularised incomplete beta function I_x(a, b) is p, by bisection; float64."""
    low, high = torch.zeros_like(p), torch.ones_like(p)
    for _ in range(60):
        x = (low + high) / 2
        below = _beta_cdf(x, a, b) < p
        low, high = torch.where(below, x, low), torch.where(below, high, x)
    return torch.where(p >= 1, 1.0, torch.where(p <= 0, 0.0, (low + high) / 2))


def _beta_cdf(x: Tensor, a: float, b: float) -> Tensor:
    """I_x(a, b) by its power series (DLMF 8.17.7) on the side of 1/2 where it converges fast."""
    mirrored = x > 0.5
    y = torch.where(mirrored, 1 - x, x)
    p = a + (b - a) * mirrored.double()
    q = a + b - p
    term, total = torch.ones_like(y), 1 / p
    for n in range(1, 60):
        term = term * (n - q) / n * y
        total = total + term / (p + n)
    tail = y**p * total * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))
    return torch.where(mirrored, 1 - tail, tail)


def karras(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Float[Tensor, " steps"]:
    """sigma^(1/rho) in equal steps from sigma_max to sigma_min (Karras et al., arXiv 2206.00364, eq. 5)."""
    ramp = torch.linspace(0, 1, max(steps, 2), dtype=torch.float64)[:steps]
    return torch.lerp(_end(sigma_max) ** (1 / rho), _end(sigma_min) ** (1 / rho), ramp) ** rho


def exponential(sigma_min: float, sigma_max: float, steps: int) -> Float[Tensor, " steps"]:
    """log sigma in equal steps: the natural grid of DPM-Solver (Lu et al., arXiv 2206.00927, section 3.4)."""
    ramp = torch.linspace(0, 1, max(steps, 2), dtype=torch.float64)[:steps]
    return torch.lerp(_end(sigma_max).log(), _end(sigma_min).log(), ramp).exp()


def _ramp(shape: Callable[[float, float, int], Tensor], schedule: NoiseSchedule, steps: int) -> Float[Tensor, " steps"]:
    """From the table's last level to its first. Where the last is noise alone, with a sigma of thousands (cosine, zero terminal
    SNR), the run begins there, but the ramp at 80, as in Karras et al.: else most of its steps would go where nothing is seen.
    """
    low, high = schedule.sigmas[0].item(), schedule.sigmas[-1].item()
    if high < NOISE_ALONE:
        return shape(low, high, steps)
    return torch.cat([_end(high).reshape(1), shape(low, 80.0, steps)[1:]])


def _end(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


AYS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}


def ays(levels: tuple[float, ...], steps: int) -> Float[Tensor, " steps"]:
    """Align Your Steps (Sabour et al., arXiv 2404.14507): levels optimised for 10 steps, log-linear between for other counts.

    The last of the published levels is where the run ends, so it is left to `final`.
    """
    log = torch.tensor(levels, dtype=torch.float64).log()
    at = torch.arange(steps, dtype=torch.float64) * ((len(levels) - 1) / steps)
    low = at.long()
    return torch.lerp(log[low], log[low + 1], at - low).exp()


Spacing = Callable[[NoiseSchedule, int, int], Tensor]  # (schedule, steps, offset) -> sigmas [steps], decreasing, float64

SPACINGS: dict[str, Spacing] = {
    "leading": lambda s, n, offset: s.sigma(leading(len(s), n, offset)),
    "trailing": lambda s, n, _: s.sigma(trailing(len(s), n)),
    "linspace": lambda s, n, _: s.sigma(linspace(len(s), n)),
    "simple": lambda s, n, _: s.sigma(simple(len(s), n)),
    "lcm": lambda s, n, _: s.sigma(lcm(len(s), n)),
    "beta": lambda s, n, _: s.sigma(beta(len(s), n)),
    "karras": lambda s, n, _: _ramp(karras, s, n),
    "exponential": lambda s, n, _: _ramp(exponential, s, n),
    "ays": lambda s, n, _: ays(AYS["sd15"], n),
    "ays_sdxl": lambda s, n, _: ays(AYS["sdxl"], n),
}


_ALSO = {
    "sgmuniform": "trailing", "normal": "linspace", "uniform": "linspace", "ddimuniform": "leading", "ddim": "leading",
    "alignyoursteps": "ays",
}  # fmt: skip


def spacing_named(name: str) -> str | None:
    """The spacing that a name means, in this or another program's spelling; None for an unknown one."""
    key = "".join(c for c in name.lower() if c.isalnum())
    return _ALSO.get(key) or {s.replace("_", ""): s for s in SPACINGS}.get(key)


def grid(
    schedule: NoiseSchedule, steps: int, spacing: str | Sequence[float] = "trailing", *, offset: int = 0, final: str = "zero"
) -> Float[Tensor, " steps+1"]:
    """The strictly decreasing noise levels of a run of `steps` steps, float32 on the CPU.

    spacing: one of SPACINGS, or the steps + 1 levels themselves. offset: of leading's t alone.
    final: where a named spacing ends. "zero" is sigma = 0; "sigma_min" is the table's lowest level, which is what a scheduler
    file with `set_alpha_to_one: false` (Stable Diffusion 1.x, 2.x) means.
    Errors: ValueError for steps outside 1 … T, an unknown spacing or final, or levels that are no grid or above the table.
    """
    T = len(schedule)
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= T:
        raise ValueError(f"steps must be an integer from 1 to {T}, got {steps!r}")
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"final must be zero or sigma_min, got {final!r}")
    with torch.device("cpu"):  # whatever the caller's default is
        sigmas = _named(schedule, steps, spacing, offset, final) if isinstance(spacing, str) else _explicit(spacing, steps)
    if sigmas[0] > 1.001 * schedule.sigmas[-1]:
        raise ValueError(
            f"spacing {spacing!r} starts at {sigmas[0]:.4g}: this model knows no level above {schedule.sigmas[-1]:.4g}"
        )
    return sigmas


def _named(schedule: NoiseSchedule, steps: int, spacing: str, offset: int, final: str) -> Float[Tensor, " steps+1"]:
    name = spacing_named(spacing)
    if name is None:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, or a list of noise levels, got {spacing!r}")
    last = torch.zeros(1, dtype=torch.float64) if final == "zero" else schedule.sigmas[:1]
    sigmas = torch.cat([SPACINGS[name](schedule, steps, offset), last]).float()
    if final == "sigma_min" and sigmas[-2] <= sigmas[-1]:  # the grid already ends on the lowest level: step from it to 0
        sigmas[-1] = 0.0
    return sigmas


def _explicit(levels: Sequence[float], steps: int) -> Float[Tensor, " steps+1"]:
    """A user's own grid, checked."""
    try:
        sigmas = torch.as_tensor(levels, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"spacing must be a name or a list of noise levels, got {levels!r}") from error
    if sigmas.shape != (steps + 1,):
        raise ValueError(f"spacing must have steps + 1 = {steps + 1} noise levels, got a shape of {list(sigmas.shape)}")
    if not bool(sigmas.isfinite().all() and (sigmas.diff() < 0).all() and sigmas[-1] >= 0):
        raise ValueError(f"spacing must be finite noise levels that decrease strictly to 0 or above, got {sigmas.tolist()}")
    return sigmas
