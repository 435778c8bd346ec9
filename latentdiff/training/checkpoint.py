"""Atomic, pickle-free training checkpoints.

A checkpoint is a folder `step-00012000/` of safetensors and one JSON. It is written beside its final name, flushed to the disk and
renamed, and only then are older ones removed: a process killed at any moment leaves the newest complete checkpoint loadable.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything a run needs to go on: tensors by group ("model", "ema", "optimizer", …) and a small JSON state."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping


def save(run: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `run`/step-N atomically, then remove all but the newest `keep`. Returns the folder."""
    final = run / f"step-{checkpoint.step:08d}"
    beside = run / f".{final.name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for group, tensors in checkpoint.tensors.items():
        save_file({k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}, beside / f"{group}.safetensors")
    (beside / "state.json").write_text(json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1))
    for path in [*beside.iterdir(), beside]:
        _fsync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(beside, final)
    _fsync(run)
    for old in _steps(run)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint folder of a run, or None."""
    found = _steps(run)
    return found[-1] if found else None


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint folder back; all tensors on the CPU."""
    state = json.loads((folder / "state.json").read_text())
    tensors = {f.stem: load_file(f) for f in sorted(folder.glob("*.safetensors"))}
    return Checkpoint(step=state["step"], tensors=tensors, state=state)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as flat tensors: "<parameter>/<state name>". names: id(parameter) -> name."""
    return {f"{names[id(p)]}/{key}": torch.as_tensor(value) for p, entry in optimizer.state.items() for key, value in entry.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], params: Mapping[str, nn.Parameter]) -> None:
    """The inverse of `optimizer_tensors`; step counters stay on the CPU, moments go to their parameter's device."""
    for flat, value in tensors.items():
        name, key = flat.rsplit("/", 1)
        p = params[name]
        optimizer.state[p][key] = (
            value.clone() if value.ndim == 0 else value.to(p.device).clone(memory_format=torch.preserve_format)
        )


def _steps(run: Path) -> list[Path]:
    return sorted(p for p in run.iterdir() if _NAME.fullmatch(p.name)) if run.is_dir() else []


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
