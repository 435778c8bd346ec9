"""Train the embedded model: drawings -> VAE -> CLIP -> U-Net -> `weights/` in float16. What is done is not done again.

    python scripts/train_embedded.py RUN                             # on a CPU: a night on two cores
    python scripts/train_embedded.py RUN --preset gpu                # on one GPU
    python scripts/train_embedded.py RUN --processes 2               # two processes: one a core, or one a GPU
    python scripts/train_embedded.py RUN --weights weights           # and put the model there in the end
    python scripts/train_embedded.py RUN --start weights             # train that model's U-Net on; its other networks stay

RUN holds a folder for each stage; killed at any moment, the same command goes on. Seconds by stage are added up in RUN/times.json.
On a CPU each of several processes is pinned to a core and runs one thread: on two cores that other work kept busy, two such
processes were much faster than one with two threads. Stages by themselves: --stage data | vae | clip | judge | unet | weights;
a large GPU has room for vae beside clip, and then for judge beside unet, each started by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copytree
from typing import Any, Literal, get_args

import cyclopts

Stage = Literal["data", "vae", "clip", "judge", "unet", "weights"]
STAGES: tuple[Stage, ...] = get_args(Stage)
LARGEST = 48_000_000  # bytes that the shipped folder may have
CLOSE = 2.0  # of 255: mean difference allowed between pictures of the float16 and the float32 weights

# Ideas that people ask for (names of concepts), those that they ask for first in a paragraph of their own.
COMMON, OTHERS = (
    tuple(" ".join(name.split()) for name in part.split(";"))
    for part in Path(__file__).with_name("favourites.txt").read_text().split("\n\n")
)
FAVOURITES = COMMON + OTHERS


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the trainings are told; `compose` is what their pictures are told. All recipes have networks of the same sizes.

    judge: more of CLIP, beside a text tower that stays as the U-Net hears it.
    """

    vae: Mapping[str, Any]
    clip: Mapping[str, Any]
    judge: Mapping[str, Any]
    unet: Mapping[str, Any]
    compose: Mapping[str, Mapping[str, Any]]


VAE_SIZES = dict(size=128, widths=(16, 32, 64, 128), groups=8)
CLIP_SIZES = dict(size=128, width=256, text_layers=3, image_layers=4, heads=4, vocab=3072, length=32)
UNET_SIZES = dict(size=128, widths=(96, 160, 192), attention=(False, True, True), head_width=32, layers=1, groups=16)
FIRST = dict(  # one hand, in the middle, at one size, common ideas most often: what is drawn alike is learnt soonest
    everyday=0.95, favourites=COMMON * 3 + FAVOURITES, favour=0.85, hand="fluent-emoji-flat", handed=0.95, recolour=0.2, style=0.1,
    pair=0.1, several=0.03, triple=0.01, mirror=0.05, scale=(0.84, 0.9), offset=0.015, white=0.6,
)  # fmt: skip
WIDE = dict(  # all everyday ideas; what one hand did not draw is named, so that a prompt that names none gets that hand's
    everyday=0.9, favourites=COMMON * 2 + FAVOURITES, favour=0.3, hand="fluent-emoji-flat", handed=0.8, recolour=0.25, style=0.1,
    pair=0.2, several=0.05, triple=0.02, mirror=0.2, scale=(0.78, 0.92), offset=0.025, white=0.6,
)  # fmt: skip
BESIDE = dict(batch=128, lr=5e-4, warmup=50, weight_decay=0.1, save_every=100, freeze_text=True)

SHORT = Recipe(
    vae=dict(**VAE_SIZES, steps=3600, batch=16, crop=64, lr=1e-3, ema=0.998, warmup=100, save_every=400, compile=True),
    clip=dict(**CLIP_SIZES, steps=1100, batch=128, lr=1e-3, ema=0.99, warmup=100, weight_decay=0.1, save_every=100),
    judge=dict(BESIDE, steps=1500, ema=0.998),
    unet=dict(
        **UNET_SIZES, steps=6000, batch=48, lr=8e-4, warmup=100, ema=0.998, levels=(0.8, 1.2), pictures=24_000, save_every=250
    ),
    compose=dict(
        vae=dict(everyday=0.6, white=0.4),
        clip=dict(everyday=0.6, favourites=FAVOURITES, favour=0.3, style=0.3, pair=0.08, several=0.04, triple=0.01, white=0.7),
        judge=dict(everyday=0.5, style=0.1, pair=0.05, several=0.03, triple=0.01, white=0.7),
        unet=FIRST,
    ),
)
CPU = Recipe(
    vae=dict(SHORT.vae, steps=8000, ema=0.999),
    clip=dict(SHORT.clip, steps=4000, ema=0.998, warmup=200),
    judge=dict(SHORT.judge, steps=3000, ema=0.998),
    unet=dict(SHORT.unet, steps=16_000, batch=64, ema=0.9993, pictures=60_000, save_every=500, sample_every=1000),
    compose=dict(SHORT.compose, unet=WIDE),  # there is time for the others
)
GPU = Recipe(
    vae=dict(SHORT.vae, steps=3000, batch=64, crop=None, ema=0.998, save_every=1000, sample_every=1000, compile=False, workers=6),
    clip=dict(SHORT.clip, steps=750, batch=512, warmup=50, save_every=250, workers=9),
    judge=dict(SHORT.judge, steps=1500, batch=512, ema=0.998, save_every=500, workers=14),
    unet=dict(
        **UNET_SIZES, steps=8000, batch=1024, lr=1e-3, warmup=150, ema=0.998, levels=(0.2, 1.5), pictures=130_000,
        compile=True, workers=15, save_every=5000, sample_every=5000,
    ),
    compose=CPU.compose,
)  # fmt: skip
PRESETS: Mapping[str, Recipe] = {"short": SHORT, "cpu": CPU, "gpu": GPU}


def main(
    run: Path,
    /,
    *,
    preset: Literal["short", "cpu", "gpu"] = "cpu",
    data: Path | None = None,
    packages: Path | None = None,
    weights: Path | None = None,
    processes: int = 1,
    stage: Stage | None = None,
    start: Path | None = None,
) -> None:
    """Train the embedded model, from the drawings' packages to a folder of float16 weights.

    Parameters
    ----------
    run
        Folder for all that is made; a run in it goes on.
    preset
        How long: "short" is two and a half hours on two cores, "cpu" a night, "gpu" is for one large GPU.
    data
        Built drawings (scripts/build_dataset.py); RUN/data if not given, which is then built.
    packages
        Folder with the drawings' npm packages, to build without a network.
    weights
        Also put the finished model into this folder; other files there stay.
    processes
        Processes that train together: as many as there are GPUs, or cores to use.
    stage
        Do this stage alone.
    start
        Model folder whose U-Net is trained on, on its own VAE and CLIP, in the place of new networks.
    """
    if processes < 1:
        raise SystemExit(f"--processes must be at least 1, got {processes}")
    data = data or run / "data"
    stages = STAGES if start is None else tuple(name for name in STAGES if name not in ("vae", "clip", "judge"))
    if stage is not None and stage not in stages:
        raise SystemExit(f"--stage must be one of {', '.join(stages)} with --start, got {stage}")
    for name in [stage] if stage else stages:
        if name == "data":
            timed(run, name, lambda: build(data, packages))
        elif name == "weights":
            timed(run, name, lambda: assemble(run, weights))
        elif "LOCAL_RANK" in os.environ:  # one of several
            pin()
            train(name, PRESETS[preset], run, data, start)
        elif processes == 1:
            timed(run, name, lambda name=name: train(name, PRESETS[preset], run, data, start))
        else:
            timed(run, name, lambda name=name: together(name, preset, run, data, processes, start))


def build(data: Path, packages: Path | None) -> None:
    script = Path(__file__).with_name("build_dataset.py")
    subprocess.run([sys.executable, script, data, *(["--packages", packages] if packages else [])], check=True)


def together(stage: str, preset: str, run: Path, data: Path, processes: int, start: Path | None) -> None:
    """One stage in several processes, each of them this script again."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--"]  # what follows is ours
    again = [Path(__file__), run, "--preset", preset, "--data", data, "--stage", stage, *(["--start", start] if start else [])]
    subprocess.run([sys.executable, *launch, *again], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def pin() -> None:
    """On a CPU, give this process one of the launcher's cores for itself, and one thread."""
    import torch

    if not torch.accelerator.is_available() and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
        torch.set_num_threads(1)


def train(stage: str, recipe: Recipe, run: Path, data: Path, start: Path | None) -> None:
    """One of the trainings, to its end. Each has its folder, in which it resumes."""
    from latentdiff.training.clip import CLIPTraining, train_clip
    from latentdiff.training.drawings import ComposeConfig
    from latentdiff.training.unet import UNetTraining, train_unet
    from latentdiff.training.vae import VAETraining, train_vae

    shared: dict[str, Any] = {"out": run / stage, "data": data, "compose": ComposeConfig(**recipe.compose[stage])}
    if stage == "vae":
        train_vae(VAETraining(**{**shared, **recipe.vae}))
    elif stage == "clip":
        train_clip(CLIPTraining(**{**shared, **recipe.clip}))
    elif stage == "judge":
        train_clip(CLIPTraining(**{**shared, **recipe.judge, "start": run / "clip" / "model"}))
    else:
        parts: dict[str, Path | None] = {"vae": run / "vae" / "model", "clip": run / "clip" / "model"}
        if start is not None:
            parts = dict.fromkeys(("vae", "clip", "start"), start)
        train_unet(UNetTraining(**{**shared, **parts, **recipe.unet}))


def assemble(run: Path, weights: Path | None) -> None:
    """RUN/unet/model in float16, checked: its size, and that its pictures are those of the float32 weights."""
    import torch

    from latentdiff.checkpoints.io import load_parts
    from latentdiff.checkpoints.save import save_folder

    whole, half, judge = run / "unet" / "model", run / "weights", run / "judge" / "model" / "clip"
    parts = load_parts(whole, dtype=torch.float16)
    halve(judge if judge.is_dir() else whole / "clip", run / "clip-half")
    save_folder(replace(parts, clip=run / "clip-half", title="embedded"), half)
    size = sum(file.stat().st_size for file in half.rglob("*") if file.is_file())
    if size > LARGEST:
        raise SystemExit(f"{half} has {size:,} bytes, at most {LARGEST:,} may be shipped")
    difference = mean_difference(whole, half)
    print(f"{half}: {size / 1e6:.1f} MB; its pictures differ from the float32 weights' by {difference:.3f} of 255 on average")
    if not difference < CLOSE:
        raise SystemExit(f"the float16 weights draw other pictures: {difference:.3f} of 255 apart, at most {CLOSE} are allowed")
    if weights is not None:
        copytree(half, weights, dirs_exist_ok=True)


def halve(source: Path, target: Path) -> None:
    """The rest of the CLIP with its weights in float16."""
    import torch
    from safetensors.torch import load_file

    from latentdiff.checkpoints.files import write_safetensors

    copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    write_safetensors(target / "model.safetensors", {k: v.to(torch.float16) for k, v in tensors.items()})


def mean_difference(a: Path, b: Path) -> float:
    """Of 255, between eight pictures of each model, drawn from the same seeds, computed in float32."""
    import numpy as np

    from latentdiff.loading import load
    from latentdiff.training.unet import PROMPTS

    drawn = [load(folder, dtype="float32")(list(PROMPTS), seed=0, progress=False) for folder in (a, b)]
    first, second = (np.stack([np.asarray(image, dtype=float) for image in images]) for images in drawn)
    return float(np.abs(first - second).mean())


def timed(run: Path, stage: str, work: Any) -> None:
    """Do it, and add its seconds to RUN/times.json, also when it is stopped."""
    from latentdiff.checkpoints.files import write_json

    file, began = run / "times.json", time.monotonic()
    run.mkdir(parents=True, exist_ok=True)
    print(f"— {stage}", flush=True)
    try:
        work()
    finally:
        seconds = json.loads(file.read_text()) if file.exists() else {}
        seconds[stage] = round(seconds.get(stage, 0) + time.monotonic() - began, 1)
        write_json(file, seconds)


if __name__ == "__main__":
    cyclopts.run(main)
