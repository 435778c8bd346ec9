"""Every sampler by name: the table, and the names that people bring from other programs.

A sampler is a plain generator over an explicit, decreasing grid of noise levels. It holds no state and knows neither betas,
timesteps nor prompts. Multistep memory is a local variable; progress, previews and cancelling are a `for` loop in the caller.
Any function of `Sampler`'s signature can be passed to `pipe(..., sampler=...)`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from latentdiff.diffusion.denoiser import consistency
from latentdiff.diffusion.multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, dpmpp_3m_sde, ipndm, lms, plms, pndm, unipc
from latentdiff.diffusion.schedules import NoiseSchedule, spacing_named
from latentdiff.diffusion.singlestep import (
    Randn,
    Sampler,
    Step,
    ddim,
    ddpm,
    dpm2,
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
    tcd,
)

__all__ = ["FACTS", "SAME", "SAMPLERS", "Facts", "Randn", "Sampler", "Step", "bind", "resolve", "rows"]

SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {
    sampler.__name__: sampler
    for sampler in (
        ddpm, ddim, plms, pndm, ipndm, euler, euler_ancestral, heun, lms, dpm2, dpm2_ancestral, dpmpp_2s_ancestral, dpmpp_2m,
        dpmpp_3m, dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, unipc, deis, lcm, tcd,
    )
}  # fmt: skip

DISTILLED = {"lcm": "lcm", "tcd": "lcm"}  # the spacing of samplers that are good for distilled models alone
SAME = {"euler": "ddim", "euler_ancestral": "ddpm"}  # one rule under two names: on one grid what is measured of one holds for both


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a sampler: its order as a solver (None: it is none), network evaluations a step, and other names for it."""

    order: int | None
    evaluations: int
    stochastic: bool
    also: tuple[str, ...]  # of A1111, k-diffusion and ComfyUI, diffusers


def _facts(order: int | None, evaluations: int, kind: str, *also: str) -> Facts:
    return Facts(order=order, evaluations=evaluations, stochastic=kind == "stochastic", also=also)


FACTS: dict[str, Facts] = {
    "ddpm": _facts(1, 1, "stochastic", "DDPMScheduler"),
    "ddim": _facts(1, 1, "deterministic", "DDIMScheduler"),
    "plms": _facts(2, 1, "deterministic", "PNDMScheduler"),
    "pndm": _facts(2, 1, "deterministic"),
    "ipndm": _facts(2, 1, "deterministic", "IPNDMScheduler"),
    "euler": _facts(1, 1, "deterministic", "EulerDiscreteScheduler"),
    "euler_ancestral": _facts(1, 1, "stochastic", "Euler a", "EulerAncestralDiscreteScheduler"),
    "heun": _facts(2, 2, "deterministic", "HeunDiscreteScheduler"),
    "lms": _facts(4, 1, "deterministic", "LMSDiscreteScheduler"),
    "dpm2": _facts(2, 2, "deterministic", "dpm_2", "KDPM2DiscreteScheduler"),
    "dpm2_ancestral": _facts(1, 2, "stochastic", "DPM2 a", "dpm_2_ancestral", "KDPM2AncestralDiscreteScheduler"),
    "dpmpp_2s_ancestral": _facts(1, 2, "stochastic", "DPM++ 2S a"),
    "dpmpp_2m": _facts(2, 1, "deterministic", "DPM++ 2M", "DPMSolverMultistepScheduler"),
    "dpmpp_3m": _facts(2, 1, "deterministic", "DPM++ 3M"),
    "dpmpp_sde": _facts(1, 2, "stochastic", "DPM++ SDE", "dpmpp_sde_gpu", "DPMSolverSDEScheduler"),
    "dpmpp_2m_sde": _facts(1, 1, "stochastic", "DPM++ 2M SDE", "dpmpp_2m_sde_gpu"),
    "dpmpp_3m_sde": _facts(1, 1, "stochastic", "DPM++ 3M SDE", "dpmpp_3m_sde_gpu"),
    "unipc": _facts(2, 1, "deterministic", "UniPC", "uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"),
    "deis": _facts(3, 1, "deterministic", "DEISMultistepScheduler"),
    "lcm": _facts(None, 1, "stochastic", "LCMScheduler"),
    "tcd": _facts(None, 1, "stochastic", "TCDScheduler"),
}


def rows() -> list[tuple[str, str, int, str, str]]:
    """The table that `latentdiff samplers` prints: name, order, evaluations a step, kind, and what it is with its paper."""
    return [
        (
            name,
            "-" if facts.order is None else str(facts.order),
            facts.evaluations,
            "stochastic" if facts.stochastic else "deterministic",
            (SAMPLERS[name].__doc__ or "").partition("\n")[0],
        )
        for name, facts in FACTS.items()
    ]


def _key(name: str) -> str:
    """What is left of a name without case, signs and the prefixes that some programs put before it."""
    return re.sub("[^a-z0-9]", "", re.sub(r"^(sample|k)_", "", name.lower()).replace("+", "p"))


def resolve(name: str) -> tuple[str, str | None]:
    """The sampler that a name means, and the spacing if the name says one: "DPM++ 2M Karras" is ("dpmpp_2m", "karras").

    Names of A1111, k-diffusion, ComfyUI and diffusers' classes are understood; "Automatic" behind one asks for no spacing. LCM and
    TCD alone say the one that their models were distilled on. Raises ValueError for any other.
    """
    names = {_key(also): key for key, facts in FACTS.items() for also in (key, *facts.also)}
    key = _key(name).removesuffix("automatic") if isinstance(name, str) else ""
    for cut in range(len(key), 0, -1):
        sampler, spacing = names.get(key[:cut]), spacing_named(key[cut:])
        if sampler and (spacing or cut == len(key)):
            return sampler, spacing or DISTILLED.get(sampler)
    near = dict.fromkeys(names[found] for found in difflib.get_close_matches(key, names, n=3, cutoff=0.7))
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}{hint}")


def bind(name: str, schedule: NoiseSchedule) -> Callable[..., Iterator[Step]]:
    """The sampler of that name in the table. Three papers speak of times, which a grid does not know: those get the schedule's."""

    def sigma(t: float) -> float:
        return schedule.sigma(t).item()

    def t(sigma: float) -> float:
        return schedule.t(sigma).item()

    if name == "lcm":
        return lambda denoise, x, sigmas, *, randn: lcm(consistency(denoise, schedule), x, sigmas, randn=randn)
    if name == "tcd":
        return partial(tcd, lower=lambda s_next, eta: min(sigma(math.floor((1 - eta) * t(s_next))), s_next))
    if name == "pndm":
        return partial(pndm, middle=lambda s, s_next: sigma(t(s) - (t(s) - t(s_next)) // 2))
    return SAMPLERS[name]
