"""Files of tensors: read by memory map, checked before anything is built, written atomically.

`safetensors` tells a truncated file from one with trailing bytes in the same words, and accepts duplicate names, NaN and gaps. The
header is small, so it is checked here, and each fault says what was expected, what was found and what to do.
"""

import errno
import json
import mmap
import os
import re
import shutil
import struct
import threading
import time
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DAY = 24 * 60 * 60  # seconds
LINE = 64  # bytes that a processor reads at once
MAX_HEADER = 100 << 20  # bytes; SDXL's header has 300 kB
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_written: set[Path] = set()  # by threads of this process, now
_lock = threading.Lock()
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NOT_WEIGHTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the weights; fetch them with `git lfs pull`"),
    (b"<", "an HTML or XML page, not weights (a download that saved a login or error page); download the file itself"),
    (b"GGUF", "a GGUF file; latentdiff reads safetensors, so take the unquantised file"),
)
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # zip of torch.save, bare pickles


LEFTOVERS = (  # what the first Stable Diffusion files hold of their trainer's state, beside the tensors
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)


class CheckpointError(ValueError):
    """A file that cannot be used, with its path, what was expected, what was found and what to do."""


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = field(default=0, compare=False)  # byte in the file

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """Named tensors of one file or of a row of shards. `get` reads one, by memory map where the format allows."""

    path: Path
    entries: Mapping[str, Entry]
    get: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())


def open_tensors(path: Path, *, allow_pickle: bool = False) -> TensorFile:
    """Open a file of tensors; a pickle only with `allow_pickle`, and then with torch's `weights_only=True`.

    Errors: FileNotFoundError; CheckpointError for everything that is no whole file of tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    with path.open("rb") as f:
        start = f.read(64)
    if not start:
        raise CheckpointError(f"{path}: the file is empty (0 bytes); download or copy it again")
    if start[8:9] == b"{":
        return open_safetensors(path)
    for magic, message in NOT_WEIGHTS:
        if start.lstrip().startswith(magic):
            raise CheckpointError(f"{path}: this is {message}")
    if start.startswith(PICKLES):
        return _open_pickle(path, allow_pickle)
    raise CheckpointError(
        f"{path}: neither safetensors (8 bytes of header length, then '{{') nor a torch pickle; it starts with "
        f"{start[:16]!r}. Was the download complete, and is it a model file?"
    )


def open_safetensors(path: Path) -> TensorFile:
    """A safetensors file; its tensors are the mapped file itself, and writing to one leaves the file alone.

    Where the last use of a tensor ends, as when a copy in another dtype takes its place, its pages leave the memory.
    """
    header, metadata = read_header(path)
    with path.open("rb") as f:
        data = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    in_use: weakref.WeakValueDictionary[str, memoryview] = weakref.WeakValueDictionary()  # one view of a tensor at a time

    def get(name: str) -> Tensor:
        entry = header[name]
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if (view := in_use.get(name)) is None:
            view = in_use[name] = memoryview(data)[entry.start : entry.start + entry.bytes]
            weakref.finalize(view, _forget, data, entry).atexit = False
        return torch.frombuffer(view, dtype=entry.dtype).view(entry.shape)

    return TensorFile(path, header, get, metadata)


def _forget(data: mmap.mmap, entry: Entry) -> None:
    """Give back the pages that hold nothing but this tensor; who wants it again reads it from the file again."""
    first = -(-entry.start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (entry.start + entry.bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED, first, length)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and metadata of a safetensors file, all of it checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8).ljust(8, b"\0"))
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: claims a header of {length} bytes (at most {MAX_HEADER}); it is no safetensors file")
        if 8 + length > size:
            raise CheckpointError(
                f"{path}: truncated inside its header, which takes {8 + length} bytes; the file has {size}. Download it again"
            )
        text = f.read(length)
    header = _parse_header(path, text)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map text to text")
    entries, end = _check_entries(path, header, 8 + length)
    promised = 8 + length + end
    if promised > size:
        raise CheckpointError(
            f"{path}: truncated: its header promises {promised} bytes, the file has {size} ({promised - size} are missing). "
            "Download it again"
        )
    if promised < size:
        raise CheckpointError(
            f"{path}: {size - promised} bytes follow the last tensor; expected {promised} bytes, found {size}. The file is "
            "damaged, or two were joined: download it again"
        )
    return entries, metadata


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            twice = [k for k, n in Counter(k for k, _ in pairs).items() if n > 1]
            raise CheckpointError(f"{path}: the header names {some_names(twice)} more than once; which is meant cannot be told")
        return names

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is no JSON ({error}); the file is damaged") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header must be a JSON object, found {type(header).__name__}")
    return header


def _check_entries(path: Path, header: dict[str, Any], data: int) -> tuple[dict[str, Entry], int]:
    """Entries, and where their data ends, counted from byte `data`; they must follow each other without gaps or overlaps."""
    spans = []
    for name, info in header.items():
        match info:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise CheckpointError(f"{path}: tensor {name!r} needs dtype, shape and data_offsets, found {str(info)[:200]}")
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise CheckpointError(f"{path}: tensor {name!r} has shape {shape}; needs numbers of at least 0")
        entry = Entry(DTYPES[dtype], tuple(shape), data + begin)
        if end - begin != entry.bytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} ({dtype}, {shape}) takes {entry.bytes} bytes, its data_offsets "
                f"{begin}–{end} give {end - begin}"
            )
        spans.append((begin, end, name, entry))
    position = 0
    for begin, end, name, _ in sorted(spans, key=lambda s: s[:2]):
        if begin != position:
            fault = "overlaps the tensor before it" if begin < position else f"leaves {begin - position} bytes unused before it"
            raise CheckpointError(f"{path}: tensor {name!r} at {begin} {fault} (expected {position}); the file is damaged")
        position = end
    return {name: entry for *_, name, entry in spans}, position


def _open_pickle(path: Path, allowed: bool) -> TensorFile:
    if not allowed:
        raise CheckpointError(
            f"{path}: this is a pickle (.ckpt, .pt, .bin), which can run code when read, whatever its file name says. Use a "
            ".safetensors file; or, if you trust it, allow_pickle=True (--allow-pickle), which still reads nothing but tensors"
        )
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: this is a pickle under the name of a safetensors file; if you trust it, rename it to .ckpt")
    try:
        with torch.serialization.safe_globals([(_Leftover, name) for name in LEFTOVERS]):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler raises many types
        raise CheckpointError(
            f"{path}: torch refuses to read this pickle with weights_only=True: {_refusal(error)}. Use a .safetensors file"
        ) from None
    name = loaded.get("name") if isinstance(loaded, Mapping) else None
    return in_memory(path, _unnest(path, loaded), {"name": name} if isinstance(name, str) else {})


class _Leftover:
    """In the place of LEFTOVERS: takes anything, does nothing."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _unnest(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The tensors of a training checkpoint, which nests them under `state_dict`, sometimes twice."""
    extra: dict[str, Tensor] = {}
    for _ in range(4):  # a pickle may hold itself
        if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
            if isinstance(step := loaded.get("global_step"), int):
                extra["global_step"] = torch.tensor(step)
            loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary of tensors, found {type(loaded).__name__}")
    if isinstance(inner := loaded.get("string_to_param"), Mapping):  # A1111's textual inversion
        extra |= {f"string_to_param.{k}": v for k, v in inner.items() if isinstance(v, Tensor)}
    found = {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)} | extra
    return {k: v.detach() for k, v in found.items()}  # some are parameters, which would ask for gradients


def in_memory(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> TensorFile:
    entries = {k: Entry(v.dtype, tuple(v.shape)) for k, v in tensors.items()}
    return TensorFile(path, entries, tensors.__getitem__, metadata or {})


def open_shards(index: Path, *, allow_pickle: bool = False) -> TensorFile:
    """The shards that an `….index.json` names, as one file; they lie beside it."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: needs a weight_map from tensor names to shard files")
    for shard in set(names.values()):
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} must be the name of a file beside the index")
    shards = {s: open_tensors(index.parent / s, allow_pickle=allow_pickle) for s in sorted(set(names.values()))}
    for name, shard in names.items():
        if name not in shards[shard].entries:
            raise CheckpointError(f"{index}: tensor {name!r} should be in {shard}, which does not have it; shards do not match")
    if left := [name for shard in shards.values() for name in shard.entries if name not in names]:
        raise CheckpointError(f"{index}: its shards hold {some_names(left)}, which it does not list; shards do not match")
    entries = {name: shards[shard].entries[name] for name, shard in names.items()}
    return TensorFile(index, entries, lambda name: shards[names[name]].get(name))


def read_json(path: Path) -> dict[str, Any]:
    """A configuration file as plain data."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: this is no JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


@contextmanager
def replacing(path: Path):
    """A path beside `path` to write to; it takes the place of `path` once it is whole and on the disk, or disappears.

    Errors: FileExistsError where another thread is writing `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(path):
        part = _beside(path, "part")
        try:
            yield part
            with part.open("r+b") as f:  # Windows flushes only what may be written to
                os.fsync(f.fileno())
            part.replace(path)
        except OSError as error:
            if error.errno and not error.filename:  # a full disk does not say where
                error.filename = str(path)
            raise
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path):
    """The same for a folder. Two renames replace one, so the old one is taken back if the second does not come about."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _claimed(path):
        part, old = _beside(path, "part"), _beside(path, "old")
        part.mkdir()
        try:
            yield part
            _flush(part)
            if path.exists():
                path.rename(old)
            part.rename(path)
            _flush(path.parent)
        finally:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _claimed(path: Path):
    """One thread at a time writes a path."""
    path = path.absolute()
    with _lock:
        if path in _written:
            raise FileExistsError(f"{path}: another thread is writing it")
        _written.add(path)
    try:
        yield
    finally:
        _written.discard(path)


def _beside(path: Path, end: str) -> Path:
    """A name beside `path` for this process. What killed ones left there goes, but for the older folder where there is no other."""
    mine = path.with_name(f".{path.name}.{os.getpid()}.{end}")
    left = re.compile(rf"\.{re.escape(path.name)}\.\d+\.{end}")
    for found in [p for p in path.parent.iterdir() if left.fullmatch(p.name)] if end == "part" or path.exists() else []:
        with suppress(OSError):  # gone, or somebody else's
            if found != mine and time.time() - found.stat().st_mtime < DAY:
                continue  # of a process that may still be writing, here or on another machine
            if found.is_dir():
                shutil.rmtree(found)
            else:
                found.unlink()
    return mine


def _flush(folder: Path) -> None:
    """The names in a folder onto the disk; Windows neither can nor need, nor do all network drives."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors one after the other, so that none is in memory twice.

    Those of whole cache lines (64 bytes) come first and begin with one: mapped into memory, products of them round alike in
    whatever file they lie. Then wide types before others, which keeps all aligned.
    """
    size = {name: t.numel() * t.dtype.itemsize for name, t in tensors.items()}
    order = sorted(tensors, key=lambda k: (size[k] % LINE != 0, -tensors[k].dtype.itemsize, k))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in order:
        t = tensors[name]
        begin, end = end, end + size[name]
        header[name] = {"dtype": _DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % LINE)
    with replacing(path) as part, part.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            f.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def some_names(names: Iterable[str], most: int = 8) -> str:
    """The first names of a list, for a message, and how many there are."""
    names = list(names)
    listed = ", ".join(repr(n) for n in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


def _refusal(error: Exception) -> str:
    """The reason, without torch's advice to load the file in a way that runs code."""
    text = str(error).strip()
    if asks := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {asks[1]}, which is no part of a tensor and could run code"
    reason = re.search(r"WeightsUnpickler error: (.*)", text)
    return (reason[1] if reason else text.split("\n", 1)[0]).rstrip(". ") or type(error).__name__
