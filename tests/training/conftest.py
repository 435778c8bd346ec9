"""What the tests of the trainers share: tiny captioned pictures, tiny networks trained on them, and what equal runs are."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from latentdiff.training.clip import CLIPTraining, train_clip
from latentdiff.training.loop import LoopConfig
from latentdiff.training.vae import VAETraining, train_vae

COLOURS = ("red", "green", "blue", "yellow", "black", "white")
SIZE = 16
VAE_SIZES: dict[str, Any] = {"size": SIZE, "widths": (8, 16), "groups": 4, "warmup": 0}
CLIP_SIZES: dict[str, Any] = {
    "size": SIZE, "patch": 8, "width": 16, "heads": 2, "text_layers": 1, "image_layers": 1, "vocab": 540, "length": 12, "warmup": 0,
}  # fmt: skip


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve captioned pictures: a square or a disc, in six colours."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        for shape in ("square", "disc"):
            image = Image.new("RGB", (SIZE, SIZE), "gray")
            draw = ImageDraw.Draw(image)
            (draw.rectangle if shape == "square" else draw.ellipse)((3, 3, 12, 12), fill=colour)
            image.save(folder / f"{colour}-{shape}.png")
            (folder / f"{colour}-{shape}.txt").write_text(f"a {colour} {shape}")
    return folder


@pytest.fixture(scope="session")
def vae_folder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a VAE that has seen a few pictures."""
    out = tmp_path_factory.mktemp("vae")
    train_vae(VAETraining(out=out, data=pictures, steps=3, batch=4, lr=1e-2, **VAE_SIZES))
    return out / "model"


@pytest.fixture(scope="session")
def clip_folder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with both towers of a CLIP and their vocabulary."""
    out = tmp_path_factory.mktemp("clip")
    train_clip(CLIPTraining(out=out, data=pictures, steps=3, batch=4, lr=1e-2, **CLIP_SIZES))
    return out / "model"


@pytest.fixture(scope="session")
def runs() -> ModuleType:
    """The functions below."""
    return sys.modules[__name__]


def checkpoint_files(out: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, average and optimiser."""
    folder = out / f"step-{step:08d}"
    return {f"{file.stem}/{name}": t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit, or that one side lacks."""
    return [name for name in {**a, **b} if name not in a or name not in b or not torch.equal(a[name], b[name])]


def begun_anew_from(run: Path, step: int, where: Path) -> Path:
    """A copy of a run as a kill after `step` would have left it."""
    shutil.copytree(run, where)
    for folder in where.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return where


def assert_resumes_exactly(train: Any, config: LoopConfig, tmp_path: Path, kill_at: int) -> None:
    """A run that is killed after step `kill_at`, and resumed, ends with the very bits of one that was not."""
    whole = replace(config, out=tmp_path / "whole", save_every=kill_at, keep=100)
    train(whole)
    resumed = replace(whole, out=begun_anew_from(whole.out, kill_at, tmp_path / "resumed"))
    assert max(p.name for p in resumed.out.glob("step-*")) == f"step-{kill_at:08d}"
    train(resumed)
    last, first = (checkpoint_files(whole.out, step) for step in (config.steps, kill_at))
    assert differing(first, last)  # there was something to learn in between
    assert differing(checkpoint_files(resumed.out, config.steps), last) == []
