"""A model with LoRAs and new words on: other parts, which share with the first whatever is not changed."""

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import TypeAlias, TypeVar

from latentdiff.checkpoints.io import Parts
from latentdiff.checkpoints.lora import Networks, read_lora, with_loras
from latentdiff.checkpoints.textual_inversion import read_inversion, with_inversions
from latentdiff.models.text import TextTower
from latentdiff.models.unet import UNet

T = TypeVar("T")
Path: TypeAlias = str | os.PathLike[str]
Files: TypeAlias = Path | Collection[Path] | Mapping[Path, T]  # one, several, or several with a value each


def adapted(
    parts: Parts,
    *,
    lora: Files[float] = (),
    embeddings: Files[str | None] = (),
    merge: bool = True,
    allow_pickle: bool = False,
) -> Parts:
    """As `latentdiff.adapt`, before a model is on its device."""
    towers, tokenizers = parts.text_encoders, parts.tokenizers
    scales, named = pairs("lora", lora, 1.0), pairs("embeddings", embeddings, None)
    if named:
        found = [read_inversion(path, towers, word=word, allow_pickle=allow_pickle) for path, word in named]
        towers, tokenizers = with_inversions(towers, tokenizers, found)
    networks: Networks = {"unet": parts.unet, **{f"text {i}": tower for i, tower in enumerate(towers)}}
    loras = [(read_lora(path, networks, allow_pickle=allow_pickle), scale) for path, scale in scales]
    made = with_loras(networks, loras, merge=merge)
    unet = made.pop("unet")
    assert isinstance(unet, UNet)
    towers = tuple(tower for tower in made.values() if isinstance(tower, TextTower))
    spec = replace(parts.spec, towers=tuple(tower.spec for tower in towers))
    title = " + ".join([parts.title, *(f"{PurePath(file).stem}:{value}" for file, value in [*scales, *named] if value is not None)])
    return replace(parts, spec=spec, unet=unet, text_encoders=towers, tokenizers=tokenizers, title=title)


def pairs(name: str, files: Files[T], default: T) -> list[tuple[Path, T]]:
    """The files of the argument `lora` or `embeddings`, with their values: scales or words.

    Errors: FileNotFoundError and IsADirectoryError for a file; ValueError for a value, and for what is no files.
    """
    several = [files] if isinstance(files, str | os.PathLike) else files
    if not isinstance(several, Collection) or not all(isinstance(file, str | os.PathLike) for file in several):
        raise ValueError(f"{name} takes a file, a list of files or a dict of files and their values, got {files!r}")
    found = list(several.items()) if isinstance(several, Mapping) else [(file, default) for file in several]
    for file, value in found:
        if os.path.isdir(file):
            raise IsADirectoryError(f"{name}: {file} is a folder; name the file in it")
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{name}: {file}: there is no such file")
        if name == "lora" and not is_finite(value):
            raise ValueError(f"lora: the scale of {file} must be a finite number, got {value!r}")
        if name == "embeddings" and not isinstance(value, str | None):
            raise ValueError(f"embeddings: the word of {file} must be text, got {value!r}")
    return found


def is_finite(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        return False


def scaled(text: str) -> tuple[str, float]:
    """`file:0.8`, as the command line takes it, is a file and its scale; without a number the scale is 1."""
    path, _, number = text.rpartition(":")
    try:
        return (path, float(number)) if path and not os.path.exists(text) else (text, 1.0)
    except ValueError:
        return text, 1.0


def worded(text: str) -> tuple[str, str | None]:
    """`file:word`, as the command line takes it, is a file and the word that stands for it; without one it is the file's own."""
    path, _, word = text.rpartition(":")
    return (path, word) if word and os.path.isfile(path) and not os.path.exists(text) else (text, None)
