"""What is faster at the price of another picture: opt-in, each with its speed and with how far the picture changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from latentdiff.bench.contestants import GUIDANCE, PROMPT
from latentdiff.bench.timing import Times, in_turns
from latentdiff.checkpoints.io import Parts
from latentdiff.images import Images
from latentdiff.loading import ready
from latentdiff.models.float8 import has_float8
from latentdiff.models.onednn import multiplies_int8
from latentdiff.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class Option:
    """`change` is the mean absolute difference from the picture as it is, of 255."""

    name: str
    times: Times
    change: float


def options(parts: Parts, device: torch.device, dtype: torch.dtype, *, steps: int, seconds: float) -> list[Option]:
    """The picture as it is first. A tiny decoder is not among them: it needs weights of its own."""
    runs = {name: picture(pipe, guidance, steps) for name, (pipe, guidance) in ways(parts, device, dtype).items()}
    made = {name: np.asarray(run()[0], dtype=float) for name, run in runs.items()}
    exact = made["as it is"]
    times = in_turns(runs, device, seconds=seconds)
    return [Option(name=name, times=times[name], change=float(np.abs(made[name] - exact).mean())) for name in times]


def ways(parts: Parts, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Pipeline, float | str]]:
    """A pipeline and its guidance for each."""

    def changed(**how: Any) -> tuple[Pipeline, float]:
        own = replace(parts, unet=copy.deepcopy(parts.unet))  # which is changed in place
        return ready(own, device, dtype, **how), GUIDANCE

    pipe = ready(parts, device, dtype)
    found: dict[str, tuple[Pipeline, float | str]] = {
        "as it is": (pipe, GUIDANCE),
        "guidance between sigma 0.3 and 5 only": (pipe, f"interval(cfg({GUIDANCE}), 0.3, 5)"),
        "deep features of a step for 2": (ready(parts, device, dtype, cache=2), GUIDANCE),
        "deep features of a step for 3": (ready(parts, device, dtype, cache=3), GUIDANCE),
    }
    if device.type == "cpu":
        for width in ("int8", "bfloat16") if dtype == torch.float32 else ("int8",):
            found[f"weights kept in {width}"] = changed(weights=width)
    if device.type == "cpu" and multiplies_int8(dtype):
        found["products in int8"] = changed(int8=True)
    if device.type == "cuda" and has_float8(device) and dtype == torch.bfloat16:
        found["linear layers in float8"] = changed(float8=True)
    return found


def picture(pipe: Pipeline, guidance: float | str, steps: int) -> Callable[[], Images]:
    return lambda: pipe(PROMPT, guidance=guidance, steps=steps, seed=0, progress=False)
