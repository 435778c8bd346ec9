"""Inversion: a picture as the run that rebuilds it, so that the same run with other words changes what they say and keeps the rest.

`ddim` finds the noise from which the deterministic sampler comes back to the picture; `null_text` lets that work under guidance;
`edit_friendly` finds the noise that the stochastic sampler adds on its way. All know a Denoise and a grid, none the pipeline; and
the pictures of a batch share network calls, nothing else: each is found, and left alone once found, as it would be by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoise
from latentdiff.diffusion.singlestep import Randn, ancestral_split, carry, steps

Latents = Float[Tensor, "b c h w"]
Grid = Float[Tensor, " steps+1"]
Context = Float[Tensor, "b n d"]
Each = Callable[[list[tuple[int, float, float]]], Iterable[tuple[int, float, float]]]
"""Hands on the steps of an inversion, (index, level, next level), and may show how far it is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inversion:
    """A run that rebuilds a picture: its grid, the states that it passes (the last is the picture's), and what makes it do so.

    eta: of the sampler `ddim`. noises: what it draws, a step each. rest: what the last step, which draws nothing, leaves out.
    nulls: the unconditional contexts of each step, of null-text inversion.
    """

    sigmas: Grid
    states: tuple[Latents, ...]
    eta: float = 0.0
    noises: tuple[Latents, ...] = ()
    rest: Latents | None = None
    nulls: tuple[Context, ...] = ()

    def rows(self, which: Sequence[int]) -> Inversion:
        """Those of these pictures, which may come several times."""
        states, noises, nulls = (tuple(x[list(which)] for x in kept) for kept in (self.states, self.noises, self.nulls))
        rest = None if self.rest is None else self.rest[list(which)]
        return replace(self, states=states, noises=noises, rest=rest, nulls=nulls)

    def randn(self) -> Randn:
        """The noises in their order, over again for each run beside the first."""
        left = iter(self.noises)
        return lambda x: torch.cat([next(left)] * (len(x) // len(self.states[0])))


def final_state(z: Latents, sigmas: Grid) -> Latents:
    """The state at the end of the grid that is decoded as z."""
    return z * (1 + sigmas[-1] ** 2).sqrt()


def ddim(denoise: Denoise, z: Latents, sigmas: Grid, iterations: int = 6, enough: float = 1e-7, *, each: Each = iter) -> Inversion:
    """The deterministic sampler backwards (Song et al., arXiv 2010.02502, section 4.3), each step solved and not only guessed.

    A step forwards is x' = x0 + r (x - x0) with x0 = denoise(x, s) and r = s' / s. Backwards, x stands on both sides. Newton's
    method with the slope of the optimal denoiser of Gaussian latents, 1 / (1 + s²), in the place of the network's own converges at
    every level; after one iteration it is the usual DDIM inversion. The best iterate is kept; one that is no better ends it, for
    what is left is rounding. enough: mean square error of unit-variance latents to stop at; fifty steps of it are about 50 dB.
    """
    states = [final_state(z, sigmas)]
    for i, s, s_next in each([*steps(sigmas)][::-1]):
        ratio, target = s_next / s, states[-1]
        slope = (1 - ratio) / (1 + s**2) + ratio
        x = target * math.sqrt((1 + s**2) / (1 + s_next**2))  # the same picture, noise and all, at the level above
        best = Best(x)
        for _ in range(iterations):
            off = carry(x, denoise(x, sigmas[i]), ratio) - target
            better = best.take(x, off.square())
            if not (going := better & (best.error >= enough * (1 + s_next**2))).any():
                break
            x = torch.where(like(going, x), x - off / slope, x)
        states.append(best.value)
    return Inversion(sigmas=sigmas, states=tuple(reversed(states)))


class Best:
    """The best value that each row of a batch has passed, by its mean square error."""

    def __init__(self, first: Tensor) -> None:
        self.value, self.error = first, torch.full((len(first),), math.inf, device=first.device)

    def take(self, value: Tensor, squares: Tensor, rows: Bool[Tensor, " b"] | bool = True) -> Bool[Tensor, " b"]:
        """Look at `rows` of a new one; which of them are better than what those rows had."""
        error = squares.detach().float().flatten(1).mean(1)
        better = (error < self.error) & rows
        self.error = torch.where(better, error, self.error)
        self.value = torch.where(like(better, value), value.detach(), self.value)
        return better


def like(rows: Tensor, x: Tensor) -> Tensor:
    """One number a row, in x's number of dimensions."""
    return rows.reshape(-1, *[1] * (x.ndim - 1))


def edit_friendly(denoise: Denoise, z: Latents, sigmas: Grid, randn: Randn, eta: float = 1.0, *, each: Each = iter) -> Inversion:
    """The noise that DDPM would have to draw to pass through independently noised versions of the picture.

    Huberman-Spiegelglas et al. (arXiv 2304.06140), algorithm 1; x at a level is z + sigma · noise, as everywhere here.
    """
    end = final_state(z, sigmas)
    states = [*(z + s * randn(z) for s in sigmas[:-1]), end]
    noises: list[Latents] = []
    x, rest = states[0], None
    for i, s, s_next in each([*steps(sigmas)]):
        down, up = ancestral_split(s, s_next, eta)
        mean = carry(x, denoise(x, sigmas[i]), down / s)
        if up > 0:
            noises.append((states[i + 1] - mean) / up)
            x = mean + up * noises[-1]  # what the sampler will pass through, rounding and all
        else:
            rest = end - mean
    return Inversion(sigmas=sigmas, states=tuple(states), eta=eta, noises=tuple(noises), rest=rest)


def null_text(
    found: Inversion,
    told: Denoise,
    untold: Callable[[Latents, Tensor, Context], Latents],
    null: Context,
    guidance: float,
    *,
    inner: int = 20,
    rate: float = 1e-2,
    enough: tuple[float, float] = (1e-5, 1e-3),
    each: Each = iter,
) -> Inversion:
    """Unconditional contexts with which the guided run follows the unguided one (Mokady et al., arXiv 2211.09794, algorithm 1).

    found: a DDIM inversion at guidance 1. told: the denoiser with the prompt. untold: with the context it is given. inner: steps of
    Adam a level, each level starting from the last one's context; enough: mean square error of unit-variance latents to stop at, at
    the first level and at the last.
    """
    x, nulls, states = found.states[0], [], [found.states[0]]
    for i, s, s_next in each([*steps(found.sigmas)]):
        target, scale = found.states[i + 1], 1 / math.sqrt(1 + s_next**2)
        x0_told, held = told(x, found.sigmas[i]).detach(), x

        def follow(context: Context, x: Latents = held, x0: Latents = x0_told, i: int = i, ratio: float = s_next / s) -> Latents:
            unguided = untold(x, found.sigmas[i], context)
            return carry(x, unguided + guidance * (x0 - unguided), ratio)

        done = i / len(found.sigmas)
        null = fit(follow, target, scale, null, inner, rate * (1 - done / 2), enough[0] + done * (enough[1] - enough[0]))
        nulls.append(null)
        with torch.no_grad():
            x = follow(null)
        states.append(x)
    return Inversion(sigmas=found.sigmas, states=tuple(states), nulls=tuple(nulls))


def fit(
    follow: Callable[[Context], Latents], target: Latents, scale: float, null: Context, inner: int, rate: float, enough: float
) -> Context:
    """The contexts, near `null`, with which a step arrives nearest to its targets; the best that Adam passed."""
    context = null.detach().float().clone().requires_grad_()
    adam = torch.optim.Adam([context], lr=rate)
    best = Best(null.detach())
    with torch.enable_grad():
        for _ in range(inner):
            off = (scale * (follow(context) - target)).square()
            best.take(context, off, best.error >= enough)
            if (best.error < enough).all():
                break
            (context.grad,) = torch.autograd.grad(off.sum(), [context])  # of the sum: a mean's would vanish in float16
            adam.step()
    return best.value


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]; infinite where they are equal."""
    error = (a.float() - b.float()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)
