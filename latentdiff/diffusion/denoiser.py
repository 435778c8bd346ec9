"""The network wrapped to (x, sigma, cond) -> x0. The prediction table replaces a class for each prediction type."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from latentdiff.diffusion.schedules import NoiseSchedule

Prediction = Literal["eps", "v", "x0"]
Denoise = Callable[[Tensor, Tensor], Tensor]  # (x, sigma) -> x0; conditioning and guidance are already inside


class Network(Protocol):
    """F(c_in · x, t, context, vector): a U-Net, or a formula in a test. `attend` and `merge` are passed only if a run sets them.

    context (and vector) have as many rows as x or several times as many, and so has the result: all pictures with their first
    prompts, then all with their second. x [b, c, h, w], t [b].
    """

    def __call__(self, x: Tensor, t: Tensor, context, vector: Tensor | None = None, /) -> Tensor: ...


def scalings(prediction: Prediction, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) with x0 = c_skip · x + c_out · F(c_in · x, t) and c_in = 1 / sqrt(sigma² + 1).

    eps is Ho et al. eq. 11 turned to x0; v is Salimans & Ho (arXiv 2202.00512), appendix D; both written for x = x0 + sigma · eps.
    """
    if prediction == "eps":
        return torch.ones_like(sigma), -sigma
    if prediction == "v":
        return 1 / (sigma**2 + 1), -sigma / (sigma**2 + 1).sqrt()
    if prediction == "x0":
        return torch.zeros_like(sigma), torch.ones_like(sigma)
    raise ValueError(f"prediction must be eps, v or x0, got {prediction!r}")


@dataclass(frozen=True, eq=False)
class Denoiser:
    """x0 = D(x, sigma; cond), for a network that predicts eps, v or x0.

    dtype is the network's; x and the result keep x's own (float32 in the pipeline): this is the only cast in the loop.
    """

    network: Network
    schedule: NoiseSchedule
    prediction: Prediction = "eps"
    dtype: torch.dtype | None = None
    prepare: Callable[..., Any] | None = None  # (conditions of one batch) -> all of them, their keys and values made once a run
    attend: Callable[..., Tensor] | None = None  # in the place of the network's attention (models.attention.Attend)
    merge: Callable[..., Tensor] | None = None  # in the place of its concatenation of skip connections (models.unet.Merge)

    def __call__(self, x: Float[Tensor, "b c h w"], sigma: Tensor, cond) -> Float[Tensor, "r c h w"]:
        """sigma: 0-dim, or [b]. cond: an object with `context` and `vector`, as the network takes them, for r = b, or n · b rows.

        If it also has `shifts`, those of the level are given to the network in the place of its time.
        """
        sigma = sigma.to(torch.float64)
        c_skip, c_out = (_like(c, x) for c in scalings(self.prediction, sigma))
        c_in = _like((sigma**2 + 1).rsqrt(), x)
        t = getattr(cond, "shifts", {}).get(sigma.item()) if sigma.ndim == 0 else None
        if t is None:
            t = self.schedule.t(sigma).to(torch.float32).expand(x.shape[0]).to(x.device, non_blocking=True)
        seams = {name: seam for name, seam in (("attend", self.attend), ("merge", self.merge)) if seam is not None}
        F = self.network((c_in * x).to(self.dtype or x.dtype), t, cond.context, cond.vector, **seams)
        return (c_skip * x + c_out * F.to(x.dtype).unflatten(0, (-1, len(x)))).flatten(0, 1)

    def loss(self, x0: Float[Tensor, "b c h w"], cond, eps: Tensor, t: Tensor, weight: Tensor | None = None) -> Tensor:
        """The textbook eps-, v- or x0-loss at integer steps t [b]: mean (F - (x0 - c_skip·x) / c_out)², times weight [b].

        At sigma = 0 the target would be 0/0; no schedule has that level.
        """
        levels = self.schedule.sigmas
        root = (levels**2 + 1).sqrt()
        sigma, c_in, c_sigma = (_like(_at(c, t), x0) for c in (levels, 1 / root, levels / root))
        # (x0 - c_skip·x) / c_out, simplified by hand: at sigma = 1e5 the quotient would lose every digit of x0.
        target = {"eps": eps, "x0": x0, "v": c_in * eps - c_sigma * x0}[self.prediction]
        F = self.network((c_in * (x0 + sigma * eps)).to(self.dtype or x0.dtype), t.float(), cond.context, cond.vector)
        error = (F.float() - target).square().mean((1, 2, 3))
        return error.mean() if weight is None else (weight * error).mean()


def consistency(denoise: Denoise, schedule: NoiseSchedule, scaling: float = 10.0, sigma_data: float = 0.5) -> Denoise:
    """x0 as a latent consistency model means it: c_skip · z + c_out · x0, so that at t = 0 it is z itself.

    Luo et al. (arXiv 2310.04378), section 4.1, with its code's scaling of t; z = x / sqrt(1 + sigma²).
    """

    def denoise_consistently(x: Tensor, sigma: Tensor) -> Tensor:
        t = scaling * schedule.t(sigma).item()
        norm = t**2 + sigma_data**2
        z = x * (1 + sigma.item() ** 2) ** -0.5
        return sigma_data**2 / norm * z + t / norm**0.5 * denoise(x, sigma)

    return denoise_consistently


def min_snr(schedule: NoiseSchedule, prediction: Prediction, t: Tensor, gamma: float = 5.0) -> Tensor:
    """Min-SNR loss weights (Hang et al., arXiv 2303.09556, eq. 6 and section 3.4), float32 [b]."""
    snr = schedule.snr(torch.arange(len(schedule)))
    capped = snr.clamp(max=gamma)
    return _at({"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}[prediction], t)


def _at(table: Float[Tensor, " T"], t: Tensor) -> Float[Tensor, " b"]:
    """A float64 table's entries at t, in float32 on t's device: not every device has float64."""
    return table.float().to(t.device)[t]


def _like(c: Tensor, x: Tensor) -> Tensor:
    """A per-picture number as a factor of x: 0-dim stays on the CPU (no synchronisation), [b] becomes [b, 1, 1, 1]."""
    return c.to(x.dtype) if c.ndim == 0 else c.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))
