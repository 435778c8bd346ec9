"""Captioned pictures to train on: drawings composed on the fly, a folder, or a WebDataset tar.

What the k-th picture of a training run is depends on (seed, k) alone, so a run can be resumed anywhere, with any number of workers.
"""

import hashlib
import io
import json
import os
import re
import signal
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentdiff.images import OPENS, in_srgb, open_picture
from latentdiff.training.drawings import ComposeConfig, Drawings, DrawingSource

Pictures = tuple[UInt8[Tensor, "b 3 size size"], list[str]]
Place = tuple[str | Path, int, int]  # of a file's content: in which file, from which byte on, how many bytes


class PictureSource(Protocol):
    """Numbered pictures with captions. `seed` drives what may vary (composition, the choice among captions)."""

    def __len__(self) -> int: ...

    def get(self, index: int, seed: int) -> tuple[UInt8[Tensor, "3 size size"], str]: ...

    def fingerprint(self) -> str:
        """A short name for this very data."""
        ...


# ------------------------------------------------------------------------------------------------ files

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp")
OTHERS = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd")  # pictures that are not read
TOLD = 5  # bad ones that are told of


class FileSource:
    """Pictures with captions beside them: `cat.jpg` and `cat.txt` or `cat.json` ("caption" or "text": a string or a list).

    A picture or caption that cannot be used is replaced by the next one in order; more than `max_bad` of them are an error.
    """

    def __init__(self, pairs: list[tuple[str, Place, str, Place]], size: int, *, where: str, max_bad: float = 0.05) -> None:
        """`pairs` are (picture name, its place, caption name, its place)."""
        if not pairs:
            raise ValueError(f"{where} holds no picture ({', '.join(SUFFIXES)}) with a .txt or .json caption of the same name")
        self.pairs, self.size, self.where, self.max_bad = pairs, size, where, max_bad
        self.bad: dict[int, str] = {}  # index -> why

    @classmethod
    def folder(cls, path: str | Path, size: int, *, max_bad: float = 0.05) -> "FileSource":
        """Pictures in a folder and in the folders in it."""
        root = Path(path)
        if not root.is_dir():
            raise FileNotFoundError(f"data must be a folder or an uncompressed .tar, got {root}")
        files = {p.relative_to(root).as_posix(): (p, 0, p.stat().st_size) for p in sorted(_below(root)) if p.is_file()}
        return cls(_pairs(files, root), size, where=str(root), max_bad=max_bad)

    @classmethod
    def tar(cls, path: str | Path, size: int, *, max_bad: float = 0.05) -> "FileSource":
        """A WebDataset: an uncompressed tar. Its table of contents is read once, its files where they lie."""
        try:
            with tarfile.open(path, "r:") as tar:
                files = {m.name: (path, m.offset_data, m.size) for m in tar if m.isfile()}
                ends = os.path.getsize(path) >= tar.offset + tarfile.BLOCKSIZE  # in a block of zeros
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no uncompressed tar, or not all of one: {error}") from error
        if not ends:
            warnings.warn(f"{path} has no mark of its end: it may be cut short, after {len(files)} files", stacklevel=3)
        return cls(_pairs(files, path), size, where=str(path), max_bad=max_bad)

    def __len__(self) -> int:
        return len(self.pairs)

    def captions(self) -> int:
        """How many there are, rounded up to as many for each picture."""
        found = 0
        for _, _, name, place in self.pairs:
            with suppress(OSError, ValueError, RecursionError):  # a bad one
                found += len(read_captions(name, _read(place)))
        return len(self) * max(1, -(-found // len(self)))

    def get(self, index: int, seed: int) -> tuple[UInt8[Tensor, "3 size size"], str]:
        image, caption, bad = self.find(index, seed)
        self.note(bad)
        return image, caption

    def find(self, index: int, seed: int) -> tuple[UInt8[Tensor, "3 size size"], str, dict[int, str]]:
        """As `get`, and the bad ones that were passed over, which are still to `note`: by one process, for all that read."""
        bad: dict[int, str] = {}
        for i in (k % len(self) for k in range(index, index + len(self))):
            if i in self.bad:
                continue
            name, picture, caption_name, caption = self.pairs[i]
            try:
                captions = read_captions(caption_name, _read(caption))
                image = square_picture(_read(picture), self.size)
            except (OSError, ValueError, SyntaxError, RecursionError, Image.DecompressionBombError) as error:
                bad[i] = f"{name}: {error}"
                self.check(bad)  # here, and not after reading all of them
                continue
            choice = np.random.default_rng((seed, index)).integers(len(captions))
            return torch.from_numpy(image).permute(2, 0, 1).contiguous(), captions[choice], bad
        raise ValueError(f"{self.where} holds no usable picture: {next(iter({**self.bad, **bad}.values()))}")

    def note(self, bad: Mapping[int, str]) -> None:
        """Count bad ones; the first few are told. Errors: ValueError if there are too many."""
        for i in sorted(bad.keys() - self.bad.keys()):
            self.bad[i] = bad[i]
            if len(self.bad) <= TOLD:
                rest = f"at most {self.max_bad:.0%} may be bad" if len(self.bad) < TOLD else "further ones are not told of"
                warnings.warn(f"{self.where}: passing over {bad[i]}; {rest}", stacklevel=3)
        self.check(self.bad)

    def check(self, bad: Mapping[int, str]) -> None:
        """Errors: ValueError if these are too many."""
        if len(bad) > self.max_bad * len(self):
            reasons = "; ".join(list(bad.values())[:3])
            most = f"at most {self.max_bad:.0%} may be"
            raise ValueError(f"{len(bad)} of {len(self)} pictures in {self.where} are bad, {most}: {reasons}")

    def fingerprint(self) -> str:
        """Of all names and sizes, and of what the captions say; pictures are not read for it."""
        sha = hashlib.sha256()
        for name, picture, caption_name, caption in self.pairs:
            sha.update(f"{name} {picture[2]} {caption_name} {caption[2]}\n".encode("utf-8", "surrogateescape"))
            with suppress(OSError):  # a bad one
                sha.update(_read(caption))
        return sha.hexdigest()[:16]


def _below(folder: Path) -> Iterator[Path]:
    """All files in a folder and in the folders in it, also those that are linked; none whose name begins with a dot."""
    seen: set[str] = set()
    for at, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(at)) in seen:  # a link to where it came from
            folders.clear()
        else:
            own = sorted(name for name in folders if not name.startswith("."))
            folders[:] = sorted(own, key=lambda name: os.path.islink(os.path.join(at, name)))  # what is linked has its own name
            yield from (Path(at, name) for name in names if not name.startswith("."))
        seen.add(real)


def _read(place: Place) -> bytes:
    path, start, size = place
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def _pairs(files: Mapping[str, Place], where: object) -> list[tuple[str, Place, str, Place]]:
    """Every picture that has a caption, and a warning if others have none, or are of a kind that is not read; `.txt` is preferred
    to `.json`.

    Hidden files are none: macOS's `._cat.jpg` is not a picture but about one.
    """
    parts = {name: os.path.splitext(name) for name in files if not re.search(r"(^|/)\.[^./]", name)}
    texts = {(stem, suffix.lower()): name for name, (stem, suffix) in parts.items()}
    pictures = {name: stem for name, (stem, suffix) in parts.items() if suffix.lower() in SUFFIXES}
    captions = {name: texts.get((stem, ".txt")) or texts.get((stem, ".json")) for name, stem in pictures.items()}
    alone = [name for name, caption in captions.items() if caption is None]
    if 0 < len(alone) < len(pictures):
        which = f"{len(alone)} of {len(pictures)} pictures, which have no .txt or .json caption of their name, such as {alone[0]}"
        warnings.warn(f"{where}: leaving out {which}", stacklevel=4)
    if others := [name for name, (_, suffix) in parts.items() if suffix.lower() in OTHERS]:
        which = f"what is not in one of the formats {', '.join(OPENS)}: {len(others)}, such as {others[0]}"
        warnings.warn(f"{where}: leaving out {which}", stacklevel=4)
    return [(name, files[name], caption, files[caption]) for name, caption in captions.items() if caption]


def read_captions(name: str, content: bytes) -> list[str]:
    """The captions in a `.txt` (one, the whole text) or `.json` file, none of them empty."""
    found: Any = content.decode("utf-8-sig")  # Windows likes to begin with a byte order mark, which is no word
    if name.lower().endswith(".json"):
        fields = json.loads(found)
        found = (fields.get("caption") or fields.get("text")) if isinstance(fields, dict) else fields
    captions = [" ".join(c.split()) for c in (found if isinstance(found, list) else [found]) if isinstance(c, str) and c.strip()]
    if not captions:
        raise ValueError(f"{name} holds no caption")
    "".join(captions).encode()  # JSON can hold half a surrogate pair, which is no text: UnicodeEncodeError is a ValueError
    return captions


def square_picture(content: bytes, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a picture file: upright, on white, the central square, in sRGB."""
    try:
        image = Image.open(io.BytesIO(content), formats=OPENS)
    except UnidentifiedImageError:
        raise ValueError(f"is no picture in one of the formats {', '.join(OPENS)}") from None
    with image:
        image.draft("RGB", (size, size))  # lets JPEG decode at a fraction of its size
        whole = open_picture(image)
        square, profile = ImageOps.fit(whole, (size, size), Image.Resampling.LANCZOS), whole.info.get("icc_profile")
        return np.array((profile and in_srgb(square, profile)) or square)


def open_source(path: str | Path, size: int, *, compose: ComposeConfig | None = None) -> DrawingSource | FileSource:
    """What lies at `path`: built drawings (`compose` says how), a WebDataset tar, or a folder of captioned pictures.

    Errors: ValueError if pictures are to be composed and there are no drawings.
    """
    path = Path(path)
    if (path / "index.json").is_file() and (path / "drawings.npy").is_file():
        return DrawingSource(Drawings(path), compose or ComposeConfig(), size)
    if compose is not None and compose != type(compose)():
        raise ValueError(f"compose must be left alone for data that is no drawing dataset, such as {path}")
    if path.suffix == ".tar":
        return FileSource.tar(path, size)
    return FileSource.folder(path, size)


# ------------------------------------------------------------------------------------------------ order


def order(seed: int, n: int, start: int, count: int) -> Int[Tensor, " count"]:
    """Which of n pictures come at positions start … start+count-1 of a run: epochs, each in its own order."""
    epochs, places = np.divmod(np.arange(start, start + count), n)
    return torch.from_numpy(np.concatenate([_shuffled(seed, int(e), n)[places[epochs == e]] for e in np.unique(epochs)]))


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


class _Positions(Dataset[Any]):
    """The pictures at positions 0, 1, 2, … of a run."""

    def __init__(self, source: PictureSource, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitems__(self, positions: range) -> tuple[Pictures, dict[int, str]] | ValueError:
        """A batch and what was passed over for it; or an error, which a worker could only raise with a traceback in its text."""
        indices = order(self.seed, len(self.source), positions.start, len(positions)).tolist()
        source, images, captions, bad = self.source, [], [], {}
        try:
            for position, index in zip(positions, indices, strict=True):
                fresh = int(np.random.SeedSequence((self.seed, position)).generate_state(1)[0])
                found = source.find(index, fresh) if isinstance(source, FileSource) else (*source.get(index, fresh), {})
                images.append(found[0])
                captions.append(found[1])
                bad |= found[2]
        except ValueError as error:
            return error
        return (torch.stack(images), captions), bad


def _as_it_is(batch: Any) -> Any:
    return batch


def _leave_signals(worker: int) -> None:
    """Ctrl-C is the training's to answer, which still wants the batch; a worker ends as it always did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def batches(
    source: PictureSource, batch_size: int, *, seed: int, start: int = 0, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Pictures]:
    """Endless batches (uint8 pictures, captions) of process `rank` among `world`, from step `start` on.

    `batch_size` is one process's. `workers` processes prepare batches ahead, and change nothing else.
    """
    limits = {"batch_size": (batch_size, 1), "start": (start, 0), "world": (world, 1)}
    for name, (value, least) in limits.items():
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}, must be from 0 to world - 1 = {world - 1}")
    firsts = count((start * world + rank) * batch_size, world * batch_size)
    return pictures_at((range(p, p + batch_size) for p in firsts), source, seed=seed, workers=workers)


def pictures_at(positions: Iterable[range], source: PictureSource, *, seed: int, workers: int = 0) -> Iterator[Pictures]:
    """A batch of (uint8 pictures, captions) for each range of positions of a run.

    Errors: ValueError if too many pictures are bad, at the same batch whatever `workers` is.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}, must be at least 0")
    loader = DataLoader(
        _Positions(source, seed),
        batch_sampler=positions,  # type: ignore[arg-type]  # any iterable does
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # the loader draws a seed for its workers: not from the run's own generator
        prefetch_factor=4 if workers else None,
    )
    return _counted(loader, source)


def _counted(loader: Iterable[Any], source: PictureSource) -> Iterator[Pictures]:
    for found in loader:
        if isinstance(found, ValueError):
            raise found
        pictures, bad = found
        if isinstance(source, FileSource):
            source.note(bad)
        yield pictures
