"""Samplers side by side: pictures of one prompt at several step counts, and how each solver's error falls with its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.diffusion.exact import Mixture
from latentdiff.diffusion.samplers import FACTS, SAME, SAMPLERS, resolve
from latentdiff.diffusion.schedules import karras
from latentdiff.images import check_folder, tile
from latentdiff.request import integer, seeds

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline

STEPS = (4, 6, 10, 20, 30)
PLOTS = (".png", ".svg", ".pdf", ".jpg", ".webp")  # that matplotlib writes
COUNTS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
POINTS = 256  # numbers whose paths through the mixture are compared
TOP, END = 14.6, 0.03  # Stable Diffusion's noise levels


# ---------------------------------------------------------------------------------------------------- pictures


def sampler_grid(
    pipe: Pipeline, prompt: str, samplers: Sequence[str] = tuple(SAMPLERS), steps: Sequence[int] = STEPS, **options: Any
) -> Image.Image:
    """The picture of one prompt and seed by each sampler (rows) at each number of steps (columns), with their names below.

    samplers: names, also with a spacing ("DPM++ 2M Karras"). options: further keywords of `pipe`; the seed is 0 unless given.
    Errors: ValueError for unknown samplers and steps before any picture is made, as `pipe` for the rest.
    """
    if not samplers or not steps:
        raise ValueError(f"samplers and steps must each be at least one, got {list(samplers)} and {list(steps)}")
    for name in samplers:
        resolve(name)
    for n in steps:
        integer("steps", n, 1, len(pipe.schedule))
    chosen = {"seed": 0, "progress": False} | options
    chosen["seed"] = seeds(chosen["seed"], 1)[0]  # one for all, where it is drawn
    pictures = [pipe(prompt, sampler=name, steps=n, **chosen)[0] for name in samplers for n in steps]
    return tile(pictures, len(steps), [f"{name} {n}" for name in samplers for n in steps])


# ---------------------------------------------------------------------------------------------------- convergence


def convergence(samplers: Sequence[str] | None = None, counts: Sequence[int] = COUNTS) -> dict[str, list[tuple[int, float]]]:
    """(network evaluations, error) of each deterministic sampler on a mixture of Gaussians, whose exact answer is known.

    The error is the root mean square over 256 numbers, at the lowest trained level, after a Karras grid from the highest.
    """
    names = [name for name in SAMPLERS if not FACTS[name].stochastic] if samplers is None else [resolve(s)[0] for s in samplers]
    mixture = Mixture()
    x = TOP * torch.randn(POINTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = mixture.flow(x, TOP, END)
    return {name: [_error(name, mixture, x, exact, n) for n in counts] for name in names}


def _error(name: str, mixture: Mixture, x: Tensor, exact: Tensor, steps: int) -> tuple[int, float]:
    evaluations = 0

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return mixture.denoise(x, sigma)

    *_, last = SAMPLERS[name](denoise, x, karras(END, TOP, steps + 1), randn=torch.zeros_like)
    return evaluations, (last.x - exact).square().mean().sqrt().item()


def check_plot(path: Path) -> None:
    """Errors: ValueError for a file to which no plot can be written."""
    if path.suffix.lower() not in PLOTS:
        raise ValueError(f"plot must end in {', '.join(PLOTS)}, got {str(path)!r}")
    check_folder(path.parent)


def plot_convergence(path: str | Path, samplers: Sequence[str] | None = None, counts: Sequence[int] = COUNTS) -> None:
    """`convergence` as a picture, both axes logarithmic: a solver's order is its slope. Needs matplotlib."""
    check_plot(Path(path))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('the plot needs matplotlib: pip install "latentdiff[eval]"') from None
    found = {name: line for name, line in convergence(samplers, counts).items() if name not in SAME or samplers}
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for k, (name, line) in enumerate(sorted(found.items(), key=lambda item: -item[1][-1][1])):
        style = ("-", "--", "-.", ":")[k // 6 % 4]
        axes.plot(*zip(*line, strict=True), style, color=f"C{k % 6}", linewidth=1.6, label=f"{name}, order {FACTS[name].order}")
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="error (root mean square)")
    axes.set_title("Solvers on a mixture of Gaussians, against the exact answer", loc="left", fontsize=11)
    axes.set_xticks([4, 8, 16, 32, 64, 128, 256, 512], ["4", "8", "16", "32", "64", "128", "256", "512"])
    axes.tick_params(which="minor", bottom=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
