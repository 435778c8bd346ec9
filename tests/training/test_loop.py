"""The training loop: exact resume, steps that are skipped, stopping by the clock, logs."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.training import loop
from latentdiff.training.loop import LoopConfig, autocast, fit, generator, learning_rate, near

N = 7  # examples in an epoch, which is no multiple of the batch


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Dropout(0.2), nn.Conv2d(8, 3, 1))


def batches(start: int, rank: int, world: int) -> Iterator[Tensor]:
    """Indices of examples, epoch after epoch."""
    step = start
    while True:
        yield torch.tensor([(step * 3 + k) % N for k in range(3)])
        step += 1


def loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Noise in, examples out: the data, the noise and the dropout all matter."""
    target = torch.arange(N * 48.0).reshape(N, 3, 4, 4)[batch].sin()
    x = torch.randn(target.shape, generator=generator).to(memory_format=torch.channels_last)
    value = (model(x).float() - target).square().mean()
    return value, {"double": 2 * value.detach()}


def train(config: LoopConfig, **changes: Any) -> nn.Module:
    return fit(network(), changes.pop("loss", loss), changes.pop("batches", batches), config, **changes)


def config(out: Path, **changes: Any) -> LoopConfig:
    return replace(LoopConfig(out=out, steps=9, batch=3, lr=1e-2, warmup=2, precision="no"), **changes)


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kill_at", [1, 4, 8])
def test_resume_is_exact(runs: Any, tmp_path: Path, kill_at: int, precision: str) -> None:
    runs.assert_resumes_exactly(train, config(tmp_path, precision=precision), tmp_path, kill_at)


def test_resume_after_a_real_kill(runs: Any, tmp_path: Path) -> None:
    """A process that gets SIGKILL in the middle of a step, with no chance to tidy up."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\nimport test_loop as t\n"
        "def loss(model, batch, generator):\n"
        "    loss.calls += 1\n"
        "    if loss.calls == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return t.loss(model, batch, generator)\n"
        "loss.calls = 0\n"
        "t.train(t.config(Path(sys.argv[2]), save_every=2), loss=loss)\n"
    )
    killed = subprocess.run([sys.executable, script, Path(__file__).parent, tmp_path / "killed"], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert sorted(p.name for p in (tmp_path / "killed").glob("step-*")) == ["step-00000004", "step-00000006"]
    for name in ("whole", "killed"):
        train(config(tmp_path / name, save_every=2))
    assert runs.differing(*(runs.checkpoint_files(tmp_path / name, 9) for name in ("whole", "killed"))) == []


def test_the_clock_stops_a_run_that_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(config(tmp_path / "whole", steps=25))
    now = iter(range(0, 10**6, 7))  # seconds: seven for each look at the clock
    with monkeypatch.context() as patch:
        patch.setattr(loop.time, "monotonic", lambda: float(next(now)))
        train(config(tmp_path / "cut", steps=25, max_minutes=1.2))  # 72 s: over at step 11
    assert [p.name for p in (tmp_path / "cut").glob("step-*")] == ["step-00000011"]
    assert [line["step"] for line in log(tmp_path / "cut")] == [10, 11]
    assert "stopped at step 11 of 25; the same command goes on from there\n" in capsys.readouterr().err
    resumed = train(config(tmp_path / "cut", steps=25))
    told = f"the run in {tmp_path / 'cut'} goes on from step 11 (max_minutes was 1.2, is None)\n"
    assert told in capsys.readouterr().err  # what is set otherwise than before
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_stops_a_run_saved_and_a_second_one_at_once(runs: Any, tmp_path: Path, sent: str, code: int) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\nimport test_loop as t\n"
        "def loss(model, batch, generator):\n"
        "    loss.calls += 1\n"
        f"    if loss.calls == 4: os.kill(os.getpid(), signal.{sent})\n"
        f"    if loss.calls == 4 and sys.argv[3] == 'twice': os.kill(os.getpid(), signal.{sent})\n"
        "    return t.loss(model, batch, generator)\n"
        "loss.calls = 0\n"
        "try: t.train(t.config(Path(sys.argv[2]), sample_every=1), loss=loss, sample=lambda *_: print('drawn'))\n"
        "except KeyboardInterrupt: sys.exit(130)\n"
    )
    for times, wanted in (("once", code), ("twice", 130 if sent == "SIGINT" else -15)):
        command = [sys.executable, script, Path(__file__).parent, tmp_path / times, times]
        told = subprocess.run(command, capture_output=True, text=True)
        assert told.returncode == wanted, told.stderr
        assert "this step is finished and saved; once more stops at once" in told.stderr
        assert told.stdout == "drawn\n" * 3
    assert not [*(tmp_path / "twice").glob("step-*")]
    assert [p.name for p in (tmp_path / "once").glob("step-*")] == ["step-00000004"]
    whole, resumed = train(config(tmp_path / "whole")), train(config(tmp_path / "once"))
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_signals_are_answered_as_before_in_the_end_and_where_they_are_ignored(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(config(tmp_path / "a"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def interrupted(*inputs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return loss(*inputs)

    try:
        train(config(tmp_path / "b"), loss=interrupted)
    finally:
        signal.signal(signal.SIGINT, before[0])
    with ThreadPoolExecutor(1) as pool:  # where no signals are heard of
        pool.submit(train, config(tmp_path / "c")).result()
    assert all((tmp_path / name / "step-00000009").is_dir() for name in "abc")


def test_no_second_process_trains_in_the_folder(tmp_path: Path) -> None:
    script = "import sys; from pathlib import Path; from latentdiff.training import loop; loop.claim(Path(sys.argv[1]))"
    script += "; print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ValueError, match=f"out: another process trains in {tmp_path}: wait for its end"):
            train(config(tmp_path))
        other.kill()
    assert not [*tmp_path.iterdir()]
    for steps in (3, 9):  # and this one may as often as it likes
        train(config(tmp_path, steps=steps))


def test_it_says_where_the_model_lies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop.store(Path.mkdir, tmp_path / "model")
    assert (tmp_path / "model").is_dir()
    assert capsys.readouterr().err == f"the model lies in {tmp_path / 'model'}\n"


def test_a_finished_run_is_read_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(config(tmp_path))
    assert "has done" not in capsys.readouterr().err

    def never(*_: Any) -> Any:
        raise AssertionError("trained")

    again = train(config(tmp_path), loss=never, batches=never)
    assert f"has done its {config(tmp_path).steps} steps" in capsys.readouterr().err
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_another_model_is_not_resumed(tmp_path: Path) -> None:
    train(config(tmp_path), meta={"network": "a", "sizes": (1, 2)})
    train(config(tmp_path), meta={"network": "a", "sizes": (1, 2)})
    train(config(tmp_path), meta={"network": "a", "new": 1})  # an older run knew of fewer names
    with pytest.raises(ValueError, match=r"another model or data \(network was 'a', is 'b'; sizes was \[1, 2\], is \[1\]\)"):
        train(config(tmp_path), meta={"network": "b", "sizes": (1,), "new": 1})


# ------------------------------------------------------------------------------------------------ steps that fail


def failing_at(*steps: int, how: str) -> Any:
    """The loss, spoilt at the given calls."""
    calls = iter(range(10**6))

    def spoilt(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        value, metrics = loss(model, batch, generator)
        if next(calls) not in steps:
            return value, metrics
        if how == "gradient":  # the root is 0, but its slope at 0 is infinite
            return value + (value - value.detach()).sqrt(), metrics
        return value * float(how), metrics

    return spoilt


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(runs: Any, tmp_path: Path, how: str) -> None:
    whole = tmp_path / "whole"
    train(config(whole, save_every=1, keep=100), loss=failing_at(4, how=how))
    assert sorted(int(p.name[5:]) for p in whole.glob("step-*")) == [1, 2, 3, 4, 6, 7, 8, 9]  # what fails pushes out nothing
    cut = runs.begun_anew_from(whole, 4, tmp_path / "cut")
    train(config(cut, steps=5), loss=failing_at(0, how=how))
    files = {step: runs.checkpoint_files(whole, step) for step in (3, 4, 6)}
    assert runs.differing(files[4], runs.checkpoint_files(cut, 5)) == []  # weights, moments and average
    assert runs.differing(files[3], files[4])
    assert runs.differing(files[4], files[6])
    assert all(t.isfinite().all() for t in runs.checkpoint_files(whole, 9).values())


def test_a_skipped_step_is_null_in_the_log(tmp_path: Path) -> None:
    train(config(tmp_path), loss=failing_at(8, how="nan"))
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert [(line["step"], line["loss"]) for line in log(tmp_path)] == [(9, None)]


def test_fifty_in_a_row_are_an_error_and_49_are_not(tmp_path: Path) -> None:
    train(config(tmp_path / "49", steps=60), loss=failing_at(*range(3, 52), how="nan"))
    said = r"not finite 50 times in a row, up to step 53; "
    with pytest.raises(FloatingPointError, match=said + "step-00000002 was saved before: resume with a lower lr; .*, remove it"):
        train(config(tmp_path / "50", steps=60, save_every=2), loss=failing_at(*range(3, 53), how="nan"))
    assert [p.name for p in (tmp_path / "50").glob("step-*")] == ["step-00000002"]
    with pytest.raises(FloatingPointError, match=said + "nothing was saved yet: start again with a lower lr"):
        train(config(tmp_path / "new", steps=60), loss=failing_at(*range(3, 53), how="nan"))


def test_a_run_that_ends_without_numbers_is_not_saved(tmp_path: Path) -> None:
    for name, steps, failing, last in (("all", 4, range(4), 0), ("end", 12, range(2, 12), 2), ("most", 12, range(3, 12), 12)):
        settings = config(tmp_path / name, steps=steps, save_every=2)
        if last < steps:
            with pytest.raises(FloatingPointError, match=f"not finite {len(failing)} times in a row, up to step {steps}"):
                train(settings, loss=failing_at(*failing, how="nan"))
        else:
            train(settings, loss=failing_at(*failing, how="nan"))
        assert sorted(p.name for p in (tmp_path / name).glob("step-*"))[-1:] == [f"step-{last:08d}"] * bool(last)


# ------------------------------------------------------------------------------------------------ logs, samples, checkpoints


def test_metrics_after_the_checkpoint_are_dropped_on_resume(runs: Any, tmp_path: Path) -> None:
    whole = config(tmp_path / "whole", steps=40, save_every=15, keep=100)
    train(whole)
    assert [line["step"] for line in log(whole.out)] == [10, 20, 30, 40]
    out = runs.begun_anew_from(whole.out, 15, tmp_path / "cut")
    with (out / "metrics.jsonl").open("a") as f:
        f.write('{"step": 50, "lo')  # killed while it wrote
    train(replace(whole, out=out))
    seen, wanted = ([{k: v for k, v in line.items() if k != "seconds"} for line in log(o)] for o in (out, whole.out))
    assert seen == wanted
    assert set(log(out)[0]) == {"step", "loss", "lr", "seconds", "double"}
    assert log(out)[1]["lr"] == pytest.approx(learning_rate(whole, 19), rel=1e-5)
    assert log(out)[0]["double"] == pytest.approx(2 * log(out)[0]["loss"], rel=1e-5)


def test_samples_show_the_average_at_intervals_and_at_the_end(runs: Any, tmp_path: Path) -> None:
    shown = {}

    def sample(model: nn.Module, path: Path) -> None:
        shown[path.name] = (model.training, {k: v.clone() for k, v in model.state_dict().items()})

    trained = train(config(tmp_path, sample_every=4, ema=0.5), sample=sample)
    assert list(shown) == ["step-00000004.png", "step-00000008.png", "step-00000009.png"]
    training, weights = shown["step-00000009.png"]
    assert not training
    assert runs.differing(weights, dict(trained.state_dict())) == []
    assert runs.differing(weights, shown["step-00000008.png"][1])


def test_checkpoints_hold_the_configuration_and_are_rotated(tmp_path: Path) -> None:
    train(config(tmp_path, save_every=2, keep=3), meta={"network": "toy"})
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000006", "step-00000008", "step-00000009"]
    state = json.loads((tmp_path / "step-00000009" / "state.json").read_text())
    assert (state["step"], state["ema_updates"], state["meta"]) == (9, 9, {"network": "toy"})
    assert state["config"]["lr"] == 1e-2


def test_tensorboard_gets_the_same_numbers(runs: Any, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    whole = config(tmp_path / "whole", steps=40, save_every=20, keep=100, tensorboard=True)
    train(whole)
    out = runs.begun_anew_from(whole.out, 20, tmp_path / "cut")  # whose events of step 30 and 40 are there already
    train(replace(whole, out=out))
    board = events.EventAccumulator(str(out / "tensorboard")).Reload()
    for event, line in zip(board.Scalars("loss"), log(out), strict=True):
        assert (event.step, event.value) == (line["step"], pytest.approx(line["loss"], rel=1e-5))
    for checkpoint in out.glob("step-*"):  # as if it had been killed before the first one
        shutil.rmtree(checkpoint)
    train(replace(whole, out=out, steps=20))
    board = events.EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [10, 20]


def test_tensorboard_that_is_missing_is_named_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "latentdiff\[tensorboard\]"'):
        train(config(tmp_path / "run", tensorboard=True))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ configuration


def test_learning_rate() -> None:
    c = LoopConfig(out=Path("x"), steps=110, warmup=10, lr=2.0, lr_end=0.1)
    assert [learning_rate(c, k) for k in range(10)] == pytest.approx([0.2 * (k + 1) for k in range(10)], abs=1e-15)
    for step in range(10, 111):
        expected = 0.2 + 1.8 * math.cos((step - 10) / 100 * math.pi / 2) ** 2  # the half cosine, in another form
        assert learning_rate(c, step) == pytest.approx(expected, abs=1e-14)
    assert learning_rate(c, 60) == pytest.approx((2 + 0.2) / 2, abs=1e-15)
    assert learning_rate(replace(c, warmup=0), 0) == 2.0


def test_the_learning_rate_is_what_the_optimiser_uses(runs: Any, tmp_path: Path) -> None:
    """With betas 0 and no decay AdamW's step is lr · sign(gradient), up to its epsilon."""
    weight = nn.Parameter(torch.tensor([1.0, -1.0]))
    model = nn.Module()
    model.register_parameter("weight", weight)
    c = config(tmp_path, betas=(0.0, 0.0), weight_decay=0.0, steps=6, save_every=1, keep=10, ema=0.0)
    fit(model, lambda m, *_: (m.weight[0] * 100 - m.weight[1] * 100, {}), batches, c)
    expected = 1.0
    for step in range(6):
        expected -= learning_rate(c, step)
        found = runs.checkpoint_files(tmp_path, step + 1)["model/weight"]
        torch.testing.assert_close(found, torch.tensor([expected, -expected]), rtol=0, atol=1e-6)


def test_weight_decay_spares_vectors(runs: Any, tmp_path: Path) -> None:
    """With a gradient of almost nothing only the decay moves weights, by 1 − lr · decay a step, and only matrices."""
    model = nn.Linear(2, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    c = config(tmp_path, betas=(0.0, 0.0), weight_decay=0.5, steps=1, warmup=0, ema=0.0)
    fit(model, lambda m, *_: (1e-30 * (m.weight.sum() + m.bias.sum()), {}), batches, c)
    after = runs.checkpoint_files(tmp_path, 1)
    torch.testing.assert_close(after["model/weight"], before["weight"] * (1 - 1e-2 * 0.5), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(after["model/bias"], before["bias"], rtol=0, atol=1e-9)


def test_what_fits_half_of_a_gpus_free_memory_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tensor:  # of 400 bytes
        device = "cpu"

        def numel(self) -> int:
            return 100

        def element_size(self) -> int:
            return 4

        def to(self, device: torch.device) -> Any:
            return device.type

    a, b = Tensor(), Tensor()
    for free, found in ((1600, ["cuda", "cuda"]), (1598, [a, b])):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 10_000))
        assert near(torch.device("cuda"), a, b) == found  # type: ignore[arg-type]  # together or not at all
    assert near(torch.device("cpu"), a, b) == [a, b]  # type: ignore[arg-type]


def test_noise_depends_on_seed_step_and_rank_alone(tmp_path: Path) -> None:
    def drawn(c: LoopConfig, step: int, rank: int) -> tuple[float, ...]:
        return tuple(torch.randn(4, generator=generator(c, step, rank, torch.device("cpu"))).tolist())

    c = config(tmp_path)
    assert drawn(c, 3, 1) == drawn(replace(c, lr=1.0, out=tmp_path / "y"), 3, 1)
    places = [(seed, step, rank) for seed in (0, 1) for step in (0, 1, 2) for rank in (0, 1, 2)]
    assert len({drawn(replace(c, seed=seed), step, rank) for seed, step, rank in places}) == len(places)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("steps", 0, "at least 1"),
        ("steps", 3.5, "at least 1, in whole numbers"),
        ("steps", "9", "at least 1, in whole numbers"),
        ("weight_decay", float("inf"), "at least 0"),
        ("lr", "1e-3", "positive"),
        ("max_minutes", float("inf"), "positive"),
        ("betas", "ab", "several values"),
        ("batch", -3, "at least 1"),
        ("save_every", 0, "at least 1"),
        ("sample_every", 0, "at least 1"),
        ("keep", 0, "at least 1"),
        ("warmup", -1, "at least 0"),
        ("workers", -1, "at least 0"),
        ("weight_decay", -0.1, "at least 0"),
        ("lr", 0.0, "positive"),
        ("lr", float("nan"), "positive"),
        ("lr", float("inf"), "positive"),
        ("lr_end", 1.5, r"in \[0, 1\]"),
        ("clip_grad", 0.0, "positive"),
        ("ema", 1.0, r"in \[0, 1\)"),
        ("betas", (0.9, 1.0), r"in \[0, 1\)"),
        ("betas", (-0.1, 0.9), r"in \[0, 1\)"),
        ("betas", (0.9, float("nan")), r"in \[0, 1\)"),
        ("seed", -1, r"in \[0, 2\*\*32\)"),
        ("seed", 2**32, r"in \[0, 2\*\*32\)"),
        ("precision", "fp16", "auto, no or bf16"),
        ("max_minutes", 0.0, "positive"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path: Path, name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must .*{allowed}.*got"):
        config(tmp_path, **{name: value})


def test_paths_and_lists_are_taken_as_they_are_written(tmp_path: Path) -> None:
    given = LoopConfig(out=str(tmp_path / "run"), betas=[0.9, 0.99])  # pyright: ignore[reportArgumentType]
    assert given == LoopConfig(out=tmp_path / "run", betas=(0.9, 0.99))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=r"out must be a folder, got .*file, which is a file"):
        LoopConfig(out=tmp_path / "file")


def test_damaged_files_of_a_run_are_named(tmp_path: Path) -> None:
    train(config(tmp_path, steps=4, save_every=2))
    newest = tmp_path / "step-00000004"
    (newest / "optimizer.safetensors").rename(tmp_path / "kept")
    with pytest.raises(
        ValueError, match=r"step-00000004 is damaged \(.*optimizer.*\); remove it, and the run goes on from an older"
    ):
        train(config(tmp_path))
    (newest / "optimizer.safetensors").write_bytes((tmp_path / "kept").read_bytes()[:-7])
    with pytest.raises(ValueError, match="step-00000004 is damaged"):
        train(config(tmp_path))
    (tmp_path / "kept").rename(newest / "optimizer.safetensors")
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write("what\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl holds a line that is not one of a run's"):
        train(config(tmp_path))


def test_autocast_is_asked_for_and_reaches_the_network(tmp_path: Path) -> None:
    cpu, x = torch.device("cpu"), torch.randn(2, 2)
    with autocast("bf16", cpu):
        assert (x @ x).dtype == torch.bfloat16
    with autocast("no", cpu):
        assert (x @ x).dtype == torch.float32
    seen = []

    def spy(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        seen.append(model(torch.randn(1, 3, 4, 4)).dtype)
        return loss(model, batch, generator)

    for precision in ("bf16", "no"):  # one process, one after the other
        train(config(tmp_path / precision, steps=1, precision=precision), loss=spy)
    assert seen == [torch.bfloat16, torch.float32]


# ------------------------------------------------------------------------------------------------ several processes


def two_processes(script: str, folder: Path) -> None:
    """Run a script in two processes that train together."""
    (folder / "run.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(folder / "run.py")]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hidden})
    assert done.returncode == 0, done.stderr[-3000:]


def shared_run(out: Path) -> None:
    """Each process gets its part of four examples a step; the third loss is NaN on the last process alone."""
    calls = iter(range(10**6))
    rank_world = [0, 1]

    def parts(start: int, rank: int, world: int) -> Iterator[Tensor]:
        rank_world[:] = rank, world
        for step in range(start, 10**6):
            yield torch.tensor([(step * 4 + k) % N for k in range(4)]).chunk(world)[rank]

    def no_noise(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        x = torch.arange(N * 48.0).reshape(N, 3, 4, 4)[batch].cos()
        spoilt = next(calls) == 2 and rank_world[0] == rank_world[1] - 1
        return (model(x) - x.sin()).square().mean() * (math.nan if spoilt else 1), {}

    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 1))
    fit(model, no_noise, parts, config(out, batch=4, steps=20, max_minutes=60, save_every=100))


@pytest.mark.slow
def test_two_processes_do_what_one_does(runs: Any, tmp_path: Path) -> None:
    """Halves of each batch on two processes give the gradient of the whole batch; one NaN stops the step on both."""
    two_processes(f"import pathlib, test_loop\ntest_loop.shared_run(pathlib.Path({str(tmp_path / 'two')!r}))", tmp_path)
    shared_run(tmp_path / "one")
    a, b = (runs.checkpoint_files(tmp_path / name, 20) for name in ("one", "two"))
    assert set(a) == set(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6, msg=name)
    assert a["optimizer/0.weight/step"] == 19  # of 20: one was skipped, by both
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [line["step"] for line in two] == [10, 20]
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
import pytest
import test_loop as t
with pytest.raises(ValueError, match="batch must be a multiple of the 2 processes, got 3"):
    t.train(t.config(Path({str(tmp_path)!r}) / "run", batch=3))
"""
    two_processes(script, tmp_path)
