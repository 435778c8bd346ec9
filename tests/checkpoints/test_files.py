"""Files that are not what they seem: each says what it is, what was expected and what to do (reliability 10, 11)."""

import errno
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.files import (
    CheckpointError,
    open_shards,
    open_tensors,
    replacing,
    replacing_folder,
    write_safetensors,
)

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.float16)}


@pytest.fixture
def good(tmp_path) -> Path:
    write_safetensors(tmp_path / "good.safetensors", TENSORS)
    return tmp_path / "good.safetensors"


def written(path: Path, header: dict | str, data: bytes = b"") -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_what_we_write_is_read_by_safetensors_and_by_us(good):
    assert {k: v.tolist() for k, v in load_file(good).items()} == {k: v.tolist() for k, v in TENSORS.items()}
    file = open_tensors(good)
    assert file.metadata == {"format": "pt"}
    assert file.bytes == 30
    assert all(torch.equal(file.get(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool]
)
def test_dtypes_and_odd_shapes_survive(tmp_path, dtype):
    tensors = {"scalar": torch.tensor(1).to(dtype), "m": torch.tensor([[0, 1], [1, 0]]).to(dtype).T}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"modelspec.title": "Ä\n猫"})
    file = open_tensors(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert file.get(name).dtype == dtype
        assert torch.equal(file.get(name).float(), tensor.float())
    assert file.metadata["modelspec.title"] == "Ä\n猫"


def test_what_safetensors_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"a": "b"})
    file = open_tensors(tmp_path / "x.safetensors")
    assert set(file.entries) == set(TENSORS)
    assert file.metadata == {"a": "b"}


def test_a_tensor_is_the_mapped_file_and_writing_to_it_leaves_the_file_alone(good):
    before = good.read_bytes()
    tensor = open_tensors(good).get("b")
    tensor.zero_()
    assert good.read_bytes() == before
    assert torch.equal(open_tensors(good).get("b"), TENSORS["b"])


def test_all_tensors_of_one_name_are_one(good):
    file = open_tensors(good)
    a, b = file.get("b"), file.get("b")
    a.fill_(7)
    del a
    assert torch.equal(b, torch.full((2, 3), 7.0))


def resident(path: Path) -> float:
    """How many MiB of a mapped file are in memory as they are in the file."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            here = line.endswith(str(path))
        elif here and line.startswith(("Shared_Clean:", "Private_Clean:")):
            found += int(line.split()[1])
    return found / 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_pages_leave_the_memory_with_the_last_use_of_their_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: torch.ones(4, 1 << 20) for name in "abc"})  # 16 MiB each
    file = open_tensors(path)
    tensors = [file.get(name) for name in "abc"]
    assert all(t.sum() > 0 for t in tensors)
    assert resident(path) == pytest.approx(48, abs=4)
    quarter, changed = tensors[0].chunk(4)[1], tensors[1][0]
    changed.fill_(2)
    tensors.clear()
    assert resident(path) == pytest.approx(28, abs=4)  # a, and of b what nobody has written to
    assert quarter.eq(1).all()
    assert changed.eq(2).all()
    del quarter
    assert resident(path) == pytest.approx(12, abs=4)
    assert changed.eq(2).all()
    assert file.get("a").eq(1).all()


FAULTY_BYTES = {
    "empty": (b"", "is empty .0 bytes.; download or copy it again"),
    "html": (b"\n<!DOCTYPE html><html><body>Not found", "HTML or XML page, not weights"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer.*git lfs pull"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 40, "GGUF file; latentdiff reads safetensors"),
    "noise": (b"\x01\x02\x03\x04 what is this", "neither safetensors .* nor a torch pickle; it starts with"),
    "short": (b"\x10\0\0", "neither safetensors"),
    "text": (b"hello world, this is text", "neither safetensors"),
}


@pytest.mark.parametrize("fault", FAULTY_BYTES)
def test_bytes_that_are_no_tensors(tmp_path, fault):
    content, message = FAULTY_BYTES[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


FAULTY_HEADERS = {
    "no JSON": ("{not json", b"", "header is no JSON"),
    "deep": ("{" + '"a":[' * 100_000, b"", "header is no JSON"),
    "duplicate": ('{"a":[],"a":[]}', b"", "names 'a' more than once"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map text to text"),
    "incomplete": ({"a": {"dtype": "F32", "shape": [1]}}, b"1234", "tensor 'a' needs dtype, shape and data_offsets"),
    "dtype": ({"a": entry([1], 0, 4, "Q4")}, b"1234", "tensor 'a' has dtype 'Q4'; known are"),
    "negative": ({"a": entry([-1], 0, 4)}, b"1234", "tensor 'a' has shape .-1."),
    "size": ({"a": entry([2], 0, 4)}, b"1234", "takes 8 bytes, its data_offsets 0–4 give 4"),
    "overlap": ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, b"123456", "tensor 'b' at 2 overlaps the tensor before it"),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"1" * 12, "tensor 'b' at 8 leaves 4 bytes unused"),
    "reuse": ({"a": entry([1], 0, 4), "b": entry([0], 2, 2)}, b"1234", "tensor 'b' at 2 overlaps"),
    "truncated": ({"a": entry([2], 0, 8)}, b"1234", "truncated: its header promises .* .4 are missing.. Download it again"),
    "trailing": ({"a": entry([1], 0, 4)}, b"1234567", "3 bytes follow the last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTY_HEADERS)
def test_headers_that_lie(tmp_path, fault):
    header, data, message = FAULTY_HEADERS[fault]
    path = written(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


def test_truncated_within_the_header(good):
    good.write_bytes(good.read_bytes()[:60])
    with pytest.raises(CheckpointError, match=r"truncated inside its header, which takes .* bytes; the file has 60"):
        open_tensors(good)


def test_every_truncation_is_noticed(good):
    whole = good.read_bytes()
    for n in range(len(whole)):
        good.write_bytes(whole[:n])
        with pytest.raises(CheckpointError):
            open_tensors(good)


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(CheckpointError, match="claims a header of 1099511627776 bytes"):
        open_tensors(tmp_path / "x")


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        open_tensors(tmp_path / "nothing.safetensors")


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(path: Path, canary: Path, kind: str) -> None:
    payload = {"state_dict": {"w": torch.ones(2)}, "extra": Canary(canary)}
    if kind == "zip":
        torch.save(payload, path)
    elif kind == "legacy":
        torch.save(payload, path, _use_new_zipfile_serialization=False)
    else:
        path.write_bytes(pickle.dumps(Canary(canary), protocol=int(kind)))


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("kind", ["zip", "legacy", "2", "3", "4", "5"])
@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
def test_a_pickle_never_runs(tmp_path, name, kind, allow):
    canary = tmp_path / "canary"
    pickled(tmp_path / name, canary, kind)
    message = "this is a pickle"
    if allow:
        refused = "torch refuses to read this pickle with weights_only=True: .*. Use a .safetensors file$"
        message = refused if name.endswith("ckpt") else "this is a pickle under the name of .*, rename it to .ckpt"
    with pytest.raises(CheckpointError, match=message) as error:
        open_tensors(tmp_path / name, allow_pickle=allow)
    assert "weights_only=False" not in str(error.value)
    if allow and name.endswith("ckpt") and kind in ("zip", "legacy", "2"):
        assert f"it asks for {os.mkdir.__module__}.mkdir, which" in str(error.value)
    assert not canary.exists()
    if kind in "2345":  # the canary would sing
        pickle.loads((tmp_path / name).read_bytes())
        assert canary.exists()


def test_protocols_0_and_1_are_no_tensors_at_all(tmp_path):
    for protocol in (0, 1):
        (tmp_path / "x.ckpt").write_bytes(pickle.dumps(Canary(tmp_path / "canary"), protocol=protocol))
        with pytest.raises(CheckpointError, match="neither safetensors"):
            open_tensors(tmp_path / "x.ckpt", allow_pickle=True)
    assert not (tmp_path / "canary").exists()


def test_a_zip_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as z:
        z.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="refuses to read"):
        open_tensors(tmp_path / "x.ckpt", allow_pickle=True)


@pytest.mark.parametrize("nested", [0, 1, 2])
def test_tensors_of_a_ckpt_nested_or_not(tmp_path, nested):
    loaded = {"w": torch.ones(2), "note": "text"}
    for _ in range(nested):
        loaded = {"state_dict": loaded, "global_step": 875000}
    torch.save(loaded, tmp_path / "x.ckpt")
    file = open_tensors(tmp_path / "x.ckpt", allow_pickle=True)
    assert set(file.entries) == ({"w", "global_step"} if nested else {"w"})
    assert torch.equal(file.get("w"), torch.ones(2))


def test_a_trainers_state_beside_the_tensors_is_passed_over(tmp_path, monkeypatch):
    """As in sd-v1-4.ckpt: a class of Lightning and a number of numpy's; neither is imported, neither is what it says."""
    ran = []
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for i in range(1, 4):
        parent = ".".join(name.split(".")[:i])
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    callback = type("ModelCheckpoint", (), {"__module__": name, "__setstate__": lambda self, state: ran.append(state)})
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", callback, raising=False)
    one = callback()
    vars(one)["best"] = np.float64(0.1)
    loaded = {"callbacks": {callback: {"best": np.float64(0.1)}, "one": one}, "state_dict": {"w": torch.ones(2)}}
    torch.save(loaded, tmp_path / "x.ckpt")
    file = open_tensors(tmp_path / "x.ckpt", allow_pickle=True)
    assert torch.equal(file.get("w"), torch.ones(2))
    assert not ran
    assert torch.load(tmp_path / "x.ckpt", weights_only=False)["callbacks"]["one"]
    assert ran  # the canary would sing
    with pytest.raises(pickle.UnpicklingError, match="Unsupported global"):
        torch.load(tmp_path / "x.ckpt", weights_only=True)  # what is passed over here is not let through elsewhere


def test_a_ckpt_that_holds_itself(tmp_path):
    inside: dict = {"a": torch.ones(1)}
    inside["state_dict"] = inside
    torch.save(inside, tmp_path / "x.ckpt")
    assert list(open_tensors(tmp_path / "x.ckpt", allow_pickle=True).entries) == ["a"]


def test_a_ckpt_that_holds_no_dictionary(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="expected a dictionary of tensors, found list"):
        open_tensors(tmp_path / "x.ckpt", allow_pickle=True)


def test_shards_are_one_file(tmp_path):
    write_safetensors(tmp_path / "m-1.safetensors", {"a": torch.zeros(1)})
    write_safetensors(tmp_path / "m-2.safetensors", {"b": torch.ones(1)})
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    file = open_shards(index)
    assert [file.get(n).item() for n in ("a", "b")] == [0, 1]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../m-1.safetensors"}, "must be the name of a file beside the index"),
        ({"a": "/etc/passwd"}, "must be the name of a file beside the index"),
        ({"a": "m-9.safetensors"}, "there is no such file"),
        ({"a": "m-1.safetensors"}, "its shards hold 'b', which it does not list"),
        ({"c": "m-1.safetensors"}, "'c' should be in m-1.safetensors, which does not have it"),
        ({}, "needs a weight_map"),
        ([1], "needs a weight_map"),
    ],
)
def test_shards_that_do_not_fit(tmp_path, weight_map, message):
    write_safetensors(tmp_path / "m-1.safetensors", {"a": torch.zeros(1), "b": torch.zeros(1)})
    (tmp_path / "i.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises((CheckpointError, FileNotFoundError), match=message):
        open_shards(tmp_path / "i.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(good):
    before = good.read_bytes()

    def fail():
        with replacing(good) as part:
            part.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert good.read_bytes() == before
    assert [p.name for p in good.parent.iterdir()] == [good.name]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"

    def write(text: str, *, fail: bool = False):
        with replacing_folder(target) as part:
            (part / "model_index.json").write_text(text)
            if fail:
                raise OSError("disk full")

    write("one")
    write("two")
    with pytest.raises(OSError, match="disk full"):
        write("three", fail=True)
    assert (target / "model_index.json").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, error):
    target, rename = tmp_path / "model", Path.rename
    target.mkdir()
    (target / "a").touch()

    def stop(path, to):
        if path.suffix == ".part":
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(error), replacing_folder(target) as part:
        (part / "b").touch()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["model", "model/a"]


def test_two_threads_do_not_write_one_path(tmp_path):
    for write, path in ((replacing, tmp_path / "f"), (replacing_folder, tmp_path / "m")):
        with write(path) as part:
            part.touch() if write is replacing else (part / "a").touch()
            with pytest.raises(FileExistsError, match="another thread is writing it"), write(path):
                pass
        with write(path) as part:
            part.touch() if write is replacing else (part / "b").touch()
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["b"]


def test_a_file_is_flushed_by_a_handle_that_may_write(tmp_path, monkeypatch):
    """Windows refuses to flush through any other."""
    fcntl, flags = pytest.importorskip("fcntl"), []
    monkeypatch.setattr(os, "fsync", lambda fd: flags.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE))
    with replacing(tmp_path / "m") as part:
        part.touch()
    assert flags == [os.O_RDWR]


def test_a_folder_that_cannot_be_flushed_is_written(tmp_path, monkeypatch):
    def fsync(fd):
        raise OSError(errno.EINVAL, "some network drives")

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing_folder(tmp_path / "m") as part:
        (part / "a").touch()
    assert (tmp_path / "m" / "a").exists()


@pytest.mark.parametrize("pid", [os.getpid(), 2**22 + 1], ids=["own", "of none"])
def test_what_a_killed_process_left_is_cleared_away(tmp_path, pid):
    """Also by one with the same number, as in containers; an older folder only once there is another."""
    whole = [tmp_path / "m", tmp_path / "m.safetensors"]
    left = [tmp_path / f".m.{pid}.part", tmp_path / f".m.{pid}.old"]
    for folder in left:
        folder.mkdir()
        (folder / "x").touch()
    (tmp_path / f".m.safetensors.{pid}.part").write_bytes(b"cut o")
    other = tmp_path / ".m.safetensors.other.1.part"  # of a name that only begins so
    other.touch()
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    running = tmp_path / ".m.1.part"  # of a process that may still be writing
    running.touch()
    for _ in range(2):
        with replacing_folder(whole[0]) as part:
            (part / "a").touch()
            assert left[1].exists() != whole[0].exists()
    with replacing(whole[1]) as part:
        part.touch()
    assert sorted(tmp_path.iterdir()) == sorted([*whole, other, running])
    assert [p.name for p in whole[0].iterdir()] == ["a"]


def test_a_full_disk_says_where(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'a.safetensors'}'"):
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    assert not [*tmp_path.iterdir()]
