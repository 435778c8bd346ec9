"""Two models for one picture: the first makes it down to a noise level, the second goes on from there (SDXL and its refiner).

Podell et al. 2023, arXiv 2307.01952, section 2.5. At the hand-off both see the same state x = x0 + sigma · eps, so there is
nothing to convert.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from latentdiff import __version__, images, request
from latentdiff.diffusion.denoiser import Denoise
from latentdiff.diffusion.guidance import scheduled
from latentdiff.diffusion.rules import Rule
from latentdiff.diffusion.samplers import Step
from latentdiff.images import Images
from latentdiff.pipeline import Pipeline, Progress, Run, finished
from latentdiff.request import Request, number
from latentdiff.sound import NonFiniteError

HANDOFF = 0.8  # of the times of training, from the noisiest on, are the base's: what SDXL was released with


def refine(
    base: Pipeline,
    refiner: Pipeline,
    prompt: str | Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    handoff: float = HANDOFF,
    guidance: float | str | Rule | None = None,
    rescale: float = 0.0,
    syntax: str = request.SYNTAX,
    steps: int | None = None,
    sampler: str | Callable[..., Iterator[Step]] | None = None,
    spacing: str | Sequence[float] | None = None,
    eta: float | None = None,
    seed: int | None = None,
    n: int = 1,
    size: int | tuple[int, int] | None = None,
    batch: int | None = None,
    progress: bool = True,
) -> Images:
    """Pictures that `base` begins and `refiner` finishes.

    handoff: share, 0 to 1, of the schedule that is the base's; at 1 the refiner does nothing. The others are as in `base(...)`;
    steps counts both models' together. Errors: as `base(...)`; ValueError for models whose latents are not of one kind.
    """
    share = number("handoff", handoff, 0, 1)
    if refiner.spec.task != "text" or base.spec.vae.latent_channels != refiner.spec.vae.latent_channels:
        raise ValueError(
            f"refiner must be a text-to-image model on the base's latents, got {refiner.spec.name} ({refiner.spec.task})"
        )

    def asked(pipe: Pipeline, seed: int | None) -> Request:
        made = request.request(
            pipe.spec,
            pipe.schedule,
            pipe.vae.factor,
            prompt=prompt,
            negative=negative,
            guidance=guidance,
            rescale=rescale,
            syntax=syntax,
            steps=steps,
            sampler=sampler,
            spacing=spacing,
            eta=eta,
            seed=seed,
            n=n,
            size=base.spec.size if size is None else size,
            batch=batch,
        )
        pipe.check_layers(made.rule)
        return made

    first = asked(base, seed)
    second = replace(asked(refiner, first.seeds[0]), seeds=first.seeds, sigmas=first.sigmas)
    result = finished(Run(handed_over(base, refiner, first, second, share), len(first.sigmas) - 1), progress)
    for k, image in enumerate(result):
        extra = base.marks | {"Refiner": refiner.title, "Refiner switch at": f"{share:g}"}
        extra["Version"] = f"latentdiff {__version__}"
        image.info["parameters"] = images.write_parameters(first.recipe(k), extra)
    return result


@torch.no_grad()
def handed_over(
    base: Pipeline, refiner: Pipeline, first: Request, second: Request, share: float
) -> Generator[Progress, None, None]:
    """One run of one sampler, which asks the base in its upper part and the refiner in the rest: noise and schedules go on."""
    cut, makers = handoff_step(base, first.sigmas, share), [(base, base.maker(first)), (refiner, refiner.maker(second))]

    def make(float32: bool) -> Denoise:
        if float32 and base.dtype == refiner.dtype == torch.float32:
            raise NonFiniteError("U-Net")
        upper, lower = (maker(float32 and pipe.dtype != torch.float32) for pipe, maker in makers)

        def refined(x: Tensor, sigma: Tensor) -> Tensor:
            return lower(x.to(refiner.device), sigma).to(x.device)

        return scheduled(first.sigmas, [(cut, upper), (len(first.sigmas) - 1, refined)])

    for step in base.run(first, make):
        if step.i >= cut:  # its own to decode
            there = {"x": step.x.to(refiner.device), "x0": step.x0.to(refiner.device)}
            step = replace(step, **there, pipe=refiner, request=second)
        yield step


def handoff_step(base: Pipeline, sigmas: torch.Tensor, share: float) -> int:
    """The first step whose time is below (1 - share) · T: that one is the refiner's."""
    times = base.schedule.t(sigmas[:-1])
    return int((times >= round((1 - share) * len(base.schedule))).sum())
