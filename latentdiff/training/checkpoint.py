"""Atomic, pickle-free training checkpoints.

A checkpoint is a folder `step-00012000/` of safetensors and one JSON. It is written beside its final name, flushed to the disk and
renamed, and only then are older ones removed, which first lose their names: whatever is called `step-…` is whole, at any moment.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from latentdiff.checkpoints.files import read_json, replacing_folder, write_json, write_safetensors

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything a run needs to go on: tensors by group ("model", "ema", "optimizer", …) and a small JSON state."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save(run: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `run`/step-N atomically, then remove all but the newest `keep`. Returns the folder.

    Errors: FileExistsError if the run has a checkpoint of that step.
    """
    final = run / f"step-{checkpoint.step:08d}"
    if final.exists():
        raise FileExistsError(f"{final}: this step is saved already")
    for unfinished in run.glob(".step-*"):  # of a process that was killed
        shutil.rmtree(unfinished)
    with replacing_folder(final) as beside:
        for group, tensors in checkpoint.tensors.items():
            write_safetensors(beside / f"{group}.safetensors", tensors)
        write_json(beside / "state.json", {"step": checkpoint.step, **checkpoint.state})
    for old in _steps(run)[:-keep]:
        shutil.rmtree(old.rename(run / f".{old.name}.old"))
    return final


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint folder of a run, or None."""
    found = _steps(run)
    return found[-1] if found else None


def load(folder: Path, *groups: str) -> Checkpoint:
    """Read a checkpoint folder back, or these groups of it; all tensors on the CPU. Errors: ValueError where it is damaged."""
    try:
        state = read_json(folder / "state.json")
        there = groups or [file.stem for file in sorted(folder.glob("*.safetensors"))]
        tensors = {group: load_file(folder / f"{group}.safetensors") for group in there}
        return Checkpoint(step=state["step"], tensors=tensors, state=state)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} is damaged ({error}); remove it, and the run goes on from an older checkpoint") from None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as flat tensors: "<parameter>/<state name>". names: id(parameter) -> name."""
    return {f"{names[id(p)]}/{key}": torch.as_tensor(value) for p, entry in optimizer.state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], params: Mapping[str, nn.Parameter]) -> None:
    """The inverse of `optimizer_tensors`, for fused optimisers: step counters lie on their parameter's device, too.

    Moments get their parameter's strides. Fused kernels walk both as flat memory: under other strides (files know none, parameters
    are channels-last) every number would meet a wrong neighbour.
    """
    for flat, value in tensors.items():
        name, key = flat.rsplit("/", 1)
        p = params[name]
        like_p = torch.empty_like(p, requires_grad=False).copy_(value) if value.ndim else value.to(p.device, copy=True)
        optimizer.state[p][key] = like_p


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A short name for these very weights."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def _steps(run: Path) -> list[Path]:
    return sorted(p for p in run.iterdir() if _NAME.fullmatch(p.name)) if run.is_dir() else []
