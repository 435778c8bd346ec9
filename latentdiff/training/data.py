"""Captioned pictures to train on: drawings composed on the fly, a folder, or a WebDataset tar.

What the k-th picture of a training run is depends on (seed, k) alone, so a run can be resumed anywhere, with any number of workers.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentdiff.images import OPENS, open_picture
from latentdiff.training.drawings import ComposeConfig, Drawings, DrawingSource

__all__ = ["ComposeConfig", "DrawingSource", "Drawings", "FileSource", "PictureSource", "batches", "open_source"]


class PictureSource(Protocol):
    """Numbered pictures with captions. `seed` drives what may vary (composition, the choice among captions)."""

    def __len__(self) -> int: ...

    def get(self, index: int, seed: int) -> tuple[UInt8[Tensor, "3 size size"], str]: ...


# ------------------------------------------------------------------------------------------------ files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Read = Callable[[Any], bytes]


class FileSource:
    """Pictures with captions beside them: `cat.jpg` and `cat.txt` or `cat.json` ("caption" or "text": a string or a list).

    A picture or caption that cannot be used is replaced by the next one in order; more than `max_bad` of them are an error.
    """

    def __init__(self, pairs: list[tuple[str, Any, str, Any]], read: Read, size: int, *, where: str, max_bad: float = 0.05) -> None:
        """`pairs` are (picture name, its place, caption name, its place); `read` gets the bytes of a place."""
        if not pairs:
            raise ValueError(f"{where} holds no picture ({', '.join(SUFFIXES)}) with a .txt or .json caption of the same name")
        self.pairs, self.read, self.size, self.where, self.max_bad = pairs, read, size, where, max_bad
        self.bad: dict[int, str] = {}  # index -> why

    @classmethod
    def folder(cls, path: str | Path, size: int, *, max_bad: float = 0.05) -> "FileSource":
        """Pictures in a folder and in the folders in it."""
        root = Path(path)
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder")
        files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
        return cls(_pairs(files), Path.read_bytes, size, where=str(root), max_bad=max_bad)

    @classmethod
    def tar(cls, path: str | Path, size: int, *, max_bad: float = 0.05) -> "FileSource":
        """A WebDataset: an uncompressed tar. Its table of contents is read once, its files where they lie."""
        try:
            with tarfile.open(path, "r:") as tar:
                files = {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no uncompressed tar: {error}") from error
        return cls(_pairs(files), partial(_read_part, path), size, where=str(path), max_bad=max_bad)

    def __len__(self) -> int:
        return len(self.pairs)

    def get(self, index: int, seed: int) -> tuple[UInt8[Tensor, "3 size size"], str]:
        for i in range(index, index + len(self)):
            name, picture, caption_name, caption = self.pairs[i % len(self)]
            if i % len(self) in self.bad:
                continue
            try:
                captions = read_captions(caption_name, self.read(caption))
                image = square_picture(self.read(picture), self.size)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                self._count_bad(i % len(self), f"{name}: {error}")
                continue
            choice = np.random.default_rng((seed, index)).integers(len(captions))
            return torch.from_numpy(image).permute(2, 0, 1).contiguous(), captions[choice]
        raise ValueError(f"{self.where} holds no usable picture")

    def _count_bad(self, index: int, why: str) -> None:
        self.bad[index] = why
        if len(self.bad) > self.max_bad * len(self):
            reasons = "; ".join(list(self.bad.values())[:3])
            raise ValueError(
                f"{len(self.bad)} of {len(self)} pictures in {self.where} are bad, max_bad is {self.max_bad}: {reasons}"
            )


def _read_part(path: str | Path, place: tuple[int, int]) -> bytes:
    with open(path, "rb") as file:
        file.seek(place[0])
        return file.read(place[1])


def _pairs(files: dict[str, Any]) -> list[tuple[str, Any, str, Any]]:
    """Every picture that has a caption; `.txt` is preferred to `.json`."""
    pairs = []
    for name, place in files.items():
        stem, suffix = os.path.splitext(name)
        caption = next((stem + s for s in (".txt", ".json") if stem + s in files), None)
        if suffix.lower() in SUFFIXES and caption:
            pairs.append((name, place, caption, files[caption]))
    return pairs


def read_captions(name: str, content: bytes) -> list[str]:
    """The captions in a `.txt` (one, the whole text) or `.json` file, none of them empty."""
    found: Any = content.decode("utf-8")
    if name.endswith(".json"):
        fields = json.loads(found)
        found = (fields.get("caption") or fields.get("text")) if isinstance(fields, dict) else fields
    captions = [" ".join(c.split()) for c in (found if isinstance(found, list) else [found]) if isinstance(c, str) and c.strip()]
    if not captions:
        raise ValueError(f"{name} holds no caption")
    return captions


def square_picture(content: bytes, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a picture file: upright, on white, the central square."""
    with Image.open(io.BytesIO(content), formats=OPENS) as image:
        image.draft("RGB", (size, size))  # lets JPEG decode at a fraction of its size
        return np.array(ImageOps.fit(open_picture(image), (size, size), Image.Resampling.LANCZOS))


def open_source(
    path: str | Path, size: int, *, compose: ComposeConfig | None = None, max_bad: float = 0.05
) -> DrawingSource | FileSource:
    """What lies at `path`: built drawings (`compose` says how), a WebDataset tar, or a folder of captioned pictures."""
    path = Path(path)
    if (path / "index.json").is_file() and (path / "drawings.npy").is_file():
        return DrawingSource(Drawings(path), compose or ComposeConfig(), size)
    if path.suffix == ".tar":
        return FileSource.tar(path, size, max_bad=max_bad)
    return FileSource.folder(path, size, max_bad=max_bad)


# ------------------------------------------------------------------------------------------------ order


class _Positions(Dataset[tuple[Tensor, str]]):
    """Picture p of a run, for p = 0, 1, 2, …: epoch after epoch, each in its own order."""

    def __init__(self, source: PictureSource, seed: int) -> None:
        self.source, self.seed = source, seed
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> tuple[Tensor, str]:
        epoch, i = divmod(position, len(self.source))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
        fresh = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
        return self.source.get(int(self.order[i]), fresh)


def _collate(items: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    return torch.stack([image for image, _ in items]), [caption for _, caption in items]


def batches(
    source: PictureSource, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[tuple[UInt8[Tensor, "b 3 size size"], list[str]]]:
    """Endless batches (uint8 pictures, captions) of process `rank` among `world`, from step `start` on.

    `batch_size` is one process's. `workers` processes prepare batches ahead, and change nothing else.
    """
    limits = {"batch_size": (batch_size, 1), "start": (start, 0), "world": (world, 1), "workers": (workers, 0)}
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, must be from 0 to world - 1 = {world - 1}")
    return iter(
        DataLoader(
            _Positions(source, seed),
            batch_sampler=(list(range(p, p + batch_size)) for p in count((start * world + rank) * batch_size, world * batch_size)),
            num_workers=workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # the loader draws a seed for its workers: not from the run's own generator
            prefetch_factor=4 if workers else None,
        )
    )
