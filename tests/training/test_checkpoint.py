"""Checkpoints: whole at any moment, and exact."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from latentdiff.training import checkpoint
from latentdiff.training.checkpoint import Checkpoint, digest, latest, load, load_optimizer, optimizer_tensors, save


def made(step: int, numbers: int = 10) -> Checkpoint:
    """A checkpoint all of whose content says its step."""
    tensors = {group: {"a": torch.full((numbers,), float(step)), "b.c": torch.tensor(step)} for group in ("model", "ema")}
    return Checkpoint(step, tensors, {"note": f"step {step}"})


def steps_in(run: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in run.glob("step-*"))


def test_what_is_saved_is_read_back_to_the_bit(tmp_path: Path) -> None:
    tensors = {
        "model": {
            "w": torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last),
            "half": torch.randn(5).half(),
            "bf16": torch.randn(5).bfloat16(),
            "count": torch.tensor(7),
            "empty": torch.empty(0, 3),
            "slice": torch.arange(12.0).reshape(3, 4)[:, 1:3],
        },
        "optimizer": {},
    }
    folder = save(tmp_path, Checkpoint(3, tensors, {"meta": {"k": [1, None, "ä"]}}))
    found = load(folder)
    assert found.step == 3
    assert found.state["meta"] == {"k": [1, None, "ä"]}
    assert {group: set(found.tensors[group]) for group in found.tensors} == {group: set(tensors[group]) for group in tensors}
    for name, t in tensors["model"].items():
        assert found.tensors["model"][name].dtype == t.dtype
        assert torch.equal(found.tensors["model"][name], t), name


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, made(step), keep=3)
    assert steps_in(tmp_path) == [10, 15, 20]
    assert latest(tmp_path) == tmp_path / "step-00000020"
    save(tmp_path, made(25), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000025"]


def test_no_run_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    save(tmp_path, made(5))
    with pytest.raises(FileExistsError, match="step-00000005: this step is saved already"):
        save(tmp_path, made(5))
    assert load(tmp_path / "step-00000005").state["note"] == "step 5"


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    for name in (".step-00000005.partial", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"cut o")
    assert latest(tmp_path) is None
    save(tmp_path, made(5))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("broken", ["write_safetensors", "write_json"])
def test_a_save_that_fails_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, made(5), keep=1)
    monkeypatch.setattr(checkpoint, broken, no_space)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, made(6), keep=1)
    found = latest(tmp_path)
    assert found == tmp_path / "step-00000005"
    assert load(found).step == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_the_newest_whole_checkpoint_loads(tmp_path: Path) -> None:
    """kill −9 of a process that does nothing but save: in a save, soon after one, and whenever it happens to be."""
    run, done, chance = tmp_path / "run", tmp_path / "done", random.Random(0)
    fork = multiprocessing.get_context("fork")
    run.mkdir()
    done.touch()
    first, seen_unfinished = 1, 0
    for kill in range(30):
        saved = len(done.read_bytes())
        process = fork.Process(target=save_for_ever, args=(run, first, done))
        process.start()
        if kill % 3 == 0:
            wait(lambda: any(run.glob(".step-*")))
        elif kill % 3 == 1:
            wait(lambda before=saved: len(done.read_bytes()) > before)
        time.sleep(chance.uniform(0, 0.02))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        seen_unfinished += any(run.glob(".step-*"))
        finished = max((int(line) for line in done.read_text().splitlines()), default=0)
        if (newest := latest(run)) is None:
            assert finished == 0
            continue
        found = load(newest)
        assert found.step >= max(finished, first - 1)  # a save that returned is never lost
        assert found.state["note"] == f"step {found.step}"
        assert set(found.tensors) == {"model", "ema"}
        for tensors in found.tensors.values():
            assert torch.equal(tensors["a"], torch.full((200_000,), float(found.step)))
        for older in steps_in(run):
            assert load(run / f"step-{older:08d}").step == older
        first = found.step + 1
    assert first > 10
    assert seen_unfinished > 3, "no kill ever hit a save: nothing was tested"


def save_for_ever(run: Path, first: int, done: Path) -> None:
    torch.set_num_threads(1)  # a forked process has none of the threads that its parent's pool counts on
    for step in range(first, 10**6):
        save(run, made(step, numbers=200_000), keep=2)
        with done.open("a") as f:
            f.write(f"{step}\n")


def wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_an_optimiser_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """Also with channels-last weights, whose moments must get the same strides back: fused kernels walk both as flat memory."""

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 1)).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for k in steps:
            x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(k))
            optimizer.zero_grad()
            model(x.to(memory_format=torch.channels_last)).square().mean().backward()
            optimizer.step()

    model, optimizer = start()
    go(model, optimizer, range(3))
    names = {id(p): n for n, p in model.named_parameters()}
    saved = save(tmp_path, Checkpoint(3, {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer, names)}, {}))
    go(model, optimizer, range(3, 6))

    other, resumed = start()
    found = load(saved)
    other.load_state_dict(found.tensors["model"])
    load_optimizer(resumed, found.tensors["optimizer"], dict(other.named_parameters()))
    for p, entry in resumed.state.items():
        assert entry["exp_avg"].stride() == p.stride()
    go(other, resumed, range(3, 6))
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_digest_names_the_weights_and_not_how_they_lie() -> None:
    weights = {"a": torch.randn(4, 3, 2, 2), "b": torch.randn(3).half()}
    name = digest(weights)
    assert name == digest({"b": weights["b"], "a": weights["a"].to(memory_format=torch.channels_last)})
    changed = weights["a"].clone()
    changed[3, 2, 1, 1] += 1e-6
    assert name != digest({**weights, "a": changed})
    assert name != digest({"c": weights["a"], "b": weights["b"]})
