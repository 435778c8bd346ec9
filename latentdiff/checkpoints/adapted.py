"""A model with LoRAs and new words on: other parts, which share with the first whatever is not changed."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias, TypeVar

from latentdiff.checkpoints.io import Parts
from latentdiff.checkpoints.lora import Networks, read_lora, with_loras
from latentdiff.checkpoints.textual_inversion import read_inversion, with_inversions
from latentdiff.models.text import TextTower
from latentdiff.models.unet import UNet

T = TypeVar("T")
Path: TypeAlias = str | os.PathLike
Files: TypeAlias = Path | Sequence[Path] | Mapping[Path, T]  # one, several, or several with a value each


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
    if named := pairs(embeddings, None):
        found = [read_inversion(path, towers, word=word, allow_pickle=allow_pickle) for path, word in named]
        towers, tokenizers = with_inversions(towers, tokenizers, found)
    networks: Networks = {"unet": parts.unet, **{f"text {i}": tower for i, tower in enumerate(towers)}}
    loras = [(read_lora(path, networks, allow_pickle=allow_pickle), scale) for path, scale in pairs(lora, 1.0)]
    made = with_loras(networks, loras, merge=merge)
    unet = made.pop("unet")
    assert isinstance(unet, UNet)
    towers = tuple(tower for tower in made.values() if isinstance(tower, TextTower))
    spec = replace(parts.spec, towers=tuple(tower.spec for tower in towers))
    return replace(parts, spec=spec, unet=unet, text_encoders=towers, tokenizers=tokenizers)


def pairs(files: Files[T], default: T) -> list[tuple[Path, T]]:
    """Files with their values."""
    if isinstance(files, Mapping):
        return list(files.items())
    return [(file, default) for file in ([files] if isinstance(files, str | os.PathLike) else files)]


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
