"""Time in turns, and what may be said of it.

Contestants run A B C, B C A, C A B, …, so that a clock that drifts or a machine that is shared meets all of them alike; a claim
rests on the ratios within the rounds, and on Student's interval for their logarithm, which holds for as few rounds as five.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch

Verdict = Literal["faster", "slower", "no difference shown"]
LEAST = 5  # rounds on which a claim may rest


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of one contestant, a round each; `first` is the run before, which warms up (and compiles) and is not counted."""

    first: float
    seconds: tuple[float, ...]

    def percentile(self, share: float) -> float:
        """Seconds that this share of the rounds does not exceed (linear between neighbours)."""
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(share / 100).item()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it: GPU work is asynchronous."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clocked(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, with all that it started on the device."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def in_turns(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float, most: int = 200
) -> dict[str, Times]:
    """Run all in turns for about so many seconds, at least `LEAST` rounds.

    The first, ours, must run; others that fail the first time are left out, with a warning.
    """
    first: dict[str, float] = {}
    for name, run in runs.items():
        try:
            first[name] = clocked(run, device)
        except Exception as error:  # whatever a foreign program raises
            if not first:
                raise
            warnings.warn(f"{name} failed and is left out: {type(error).__name__}: {error}", stacklevel=2)
    names = list(first)
    taken: dict[str, list[float]] = {name: [] for name in names}
    start, done = time.perf_counter(), 0
    while done < LEAST or (done < most and time.perf_counter() - start < seconds):
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            taken[name].append(clocked(runs[name], device))
        done += 1
    return {name: Times(first=first[name], seconds=tuple(taken[name])) for name in names}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How many times as long another takes: the geometric mean of the ratios within the rounds, and its 95 % interval."""

    ratio: float
    low: float
    high: float
    rounds: int

    @property
    def verdict(self) -> Verdict:
        """A claim only where the interval leaves 1 out, over enough rounds."""
        if self.rounds < LEAST or self.low <= 1 <= self.high:
            return "no difference shown"
        return "faster" if self.low > 1 else "slower"


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """The paired ratio theirs / ours: above 1, ours is faster."""
    logs = torch.tensor([math.log(b / a) for a, b in zip(ours, theirs, strict=True)], dtype=torch.float64)
    n, mean = len(logs), logs.mean().item()
    half = student(n - 1) * logs.std().item() / math.sqrt(n) if n > 1 else math.inf
    return Comparison(ratio=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half), rounds=n)


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t: Abramowitz & Stegun 26.7.5, right to 1 % from four degrees of freedom on."""
    z = NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
