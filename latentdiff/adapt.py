"""LoRAs and new words on a loaded model: `adapt` makes another pipeline, and the one it started from stays as it was."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from latentdiff.checkpoints.lora import read_lora, with_loras
from latentdiff.checkpoints.textual_inversion import read_inversion, with_inversions
from latentdiff.conditioning import TextEncoder
from latentdiff.models.text import TextTower, Tokenizer
from latentdiff.models.unet import UNet

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline

T = TypeVar("T")
Path = str | os.PathLike


def adapt(
    pipe: Pipeline,
    *,
    lora: Path | Sequence[Path] | Mapping[Path, float] = (),
    words: Path | Sequence[Path] | Mapping[Path, str | None] = (),
    merge: bool = True,
    allow_pickle: bool = False,
) -> Pipeline:
    """The model with LoRAs and textual inversions on; what they leave alone is shared, not copied.

    lora: files, each with its scale (1 if none is given): `{"flat.safetensors": 0.8}`; several add up.
    words: files of textual inversion, each with the word that stands for it in prompts; None takes the file's own.
    merge: put LoRAs into the weights; False adds them to the layers' outputs at every step: slower, but nothing is rounded.
    allow_pickle: also read .pt and .bin, with torch's `weights_only=True`.
    Errors: FileNotFoundError; ValueError for a scale, and CheckpointError for a file that does not fit the model, listing the keys.
    """
    towers, tokenizers = pipe.text.towers, tuple(t for t in pipe.text.tokenizers if isinstance(t, Tokenizer))
    if named := _pairs(words, None):
        found = [read_inversion(path, towers, word=word, allow_pickle=allow_pickle) for path, word in named]
        towers, tokenizers = with_inversions(towers, tokenizers, found)
    networks: dict[str, UNet | TextTower] = {"unet": pipe.unet, **{f"text {i}": t for i, t in enumerate(towers)}}
    loras = [(read_lora(path, networks, allow_pickle=allow_pickle), scale) for path, scale in _pairs(lora, 1.0)]
    made = with_loras(networks, loras, merge=merge)
    spec = replace(pipe.spec, towers=tuple(t.spec for t in towers))
    text = TextEncoder(tuple(made[f"text {i}"] for i in range(len(towers))), tokenizers, spec)  # type: ignore[arg-type]
    return replace(pipe, unet=made["unet"], text=text, spec=spec, network=None)  # type: ignore[arg-type]


def _pairs(files: Path | Sequence[Path] | Mapping[Path, T], default: T) -> list[tuple[Path, T]]:
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
