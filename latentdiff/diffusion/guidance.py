"""Guidance: a Denoiser, its conditions and a rule become the Denoise that a sampler calls.

Rules combine estimates of x0. Because x0 is affine in the network's output with the same coefficients for both halves, guidance on
x0 equals guidance on eps (or v).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoise, Denoiser

Rule = Callable[[Tensor, Tensor], Tensor]  # (x0 with the prompt, x0 with the negative) -> x0


def cfg(scale: float) -> Rule:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6): negative + scale · (prompt − negative)."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance must be a finite number, got {scale!r}")
    return lambda cond, uncond: uncond + scale * (cond - uncond)


def cfg_rescale(scale: float, phi: float = 0.7) -> Rule:
    """CFG with the result's std pulled back to the conditional one's (Lin et al., arXiv 2305.08891, eq. 14–16), on x0."""
    plain = cfg(scale)

    def rule(cond: Tensor, uncond: Tensor) -> Tensor:
        x0 = plain(cond, uncond)
        dims = tuple(range(1, x0.ndim))
        return phi * x0 * (cond.std(dims, keepdim=True) / x0.std(dims, keepdim=True)) + (1 - phi) * x0

    return rule


def guided(denoiser: Denoiser, cond, uncond=None, rule: Rule | None = None) -> Denoise:
    """(x, sigma) -> x0 with conditions and guidance inside; both halves run as one batch.

    cond, uncond: objects with `context`, `vector` and `join` (conditioning.Cond), one entry a picture. Without `uncond` or `rule`
    (guidance 1) the network runs on the prompt alone, at half the cost.
    """
    if uncond is None or rule is None:
        return lambda x, sigma: denoiser(x, sigma, cond)
    both = uncond.join(cond)

    def denoise(x: Float[Tensor, "b c h w"], sigma: Tensor) -> Float[Tensor, "b c h w"]:
        x0_uncond, x0_cond = denoiser(x.repeat(2, 1, 1, 1), sigma, both).chunk(2)
        return rule(x0_cond, x0_uncond)

    return denoise
