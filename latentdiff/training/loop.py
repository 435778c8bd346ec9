"""The training loop that all three networks share, on `accelerate`: one CPU, one GPU or many.

Resume equals an uninterrupted run, bit for bit on a CPU, without saving any random state: the data of step n and its noise are pure
functions of (seed, n), so that a resumed run draws what the uninterrupted one would have drawn.

Several processes are started by `accelerate launch` or `torchrun`: `torchrun --nproc-per-node 2 -m -- latentdiff.cli train vae …`
(without the `--`, torchrun takes our `--start` for one of its own options).
"""

# No postponed annotations here: the command line reads LoopConfig's types in the modules of its subclasses.

import json
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from latentdiff.checkpoints.files import read_json, write_text
from latentdiff.loading import best_dtype
from latentdiff.training import checkpoint
from latentdiff.training.ema import EMA

try:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import broadcast
except ImportError:
    raise ImportError('training needs accelerate: pip install "latentdiff[train]"') from None

M = TypeVar("M", bound=nn.Module)
Loss = Callable[[nn.Module, Any, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]
"""(network, batch, noise source on the network's device) -> (scalar to minimise, 0-dim tensors for the log)"""

LOG_EVERY = 10  # steps between lines of metrics.jsonl, and between looks at the clock
HOPELESS = 50  # losses in a row that are not finite
OVER = 1  # the time is; greater numbers are signals'


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how fast and where to. Shared by `latentdiff train vae | clip | unet`."""

    out: Path
    """Run folder: checkpoints, metrics.jsonl, sample grids. An existing run in it is resumed."""
    steps: int = 10_000
    """Optimiser steps in all."""
    batch: int = 64
    """Pictures a step, over all processes."""
    lr: float = 4e-4
    """Peak learning rate: linear warm-up, then cosine down to `lr_end` times it."""
    lr_end: float = 0.05
    """Fraction of `lr` that is left at the end."""
    warmup: int = 200
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices and convolutions only."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's betas."""
    clip_grad: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones that are kept."""
    seed: int = 0
    """Seed of initialisation, data order, augmentation and noise."""
    precision: Literal["auto", "no", "bf16"] = "auto"
    """Autocast type; auto takes bf16 where the machine has it natively."""
    compile: bool = False
    """torch.compile the network."""
    workers: int = 0
    """Processes that prepare pictures ahead, for each training process; they change nothing but the speed."""
    save_every: int = 500
    """Steps between checkpoints."""
    sample_every: int = 500
    """Steps between sample grids."""
    keep: int = 2
    """Checkpoints to keep."""
    max_minutes: float | None = None
    """Stop, after saving, when this start's steps, not what comes before them, took so long; the run can be resumed."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the `tensorboard` extra)."""

    def __post_init__(self) -> None:
        for name, kinds in self.kinds().items():
            value = getattr(self, name)
            if Path in kinds and isinstance(value, str):
                object.__setattr__(self, name, Path(value))
            if tuple in kinds and isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif tuple in kinds and not isinstance(value, tuple) and value is not None:
                raise ValueError(f"{name} must be several values, got {value!r}")
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"out must be a folder, got {self.out}, which is a file")
        self.at_least(1, "steps", "batch", "save_every", "sample_every", "keep")
        self.at_least(0, "warmup", "workers", "weight_decay")
        self.positive("lr", "clip_grad", *(["max_minutes"] if self.max_minutes is not None else []))
        if not 0 <= self.lr_end <= 1:
            raise ValueError(f"lr_end must lie in [0, 1], got {self.lr_end!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema!r}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed!r}")
        if self.precision not in ("auto", "no", "bf16"):
            raise ValueError(f"precision must be auto, no or bf16, got {self.precision!r}")

    @classmethod
    def kinds(cls) -> dict[str, set[Any]]:
        """The types that each option may have: int and NoneType of `int | None`, tuple of `tuple[int, ...]`."""
        hints = get_type_hints(cls)
        parts = {name: get_args(hint) if isinstance(hint, UnionType) else (hint,) for name, hint in hints.items()}
        return {name: {get_origin(part) or part for part in own} for name, own in parts.items()}

    def at_least(self, low: int, *names: str) -> None:
        kinds = self.kinds()
        for name in names:
            value, kind = getattr(self, name), Integral if int in kinds[name] else Real
            if not isinstance(value, kind) or not low <= float(value) < math.inf:
                counted = ", in whole numbers" if kind is Integral and not isinstance(value, kind) else ""
                raise ValueError(f"{name} must be at least {low}{counted}, got {value!r}")

    def positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < float(value) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")

    def tell_of_others(self, own: Mapping[str, Any]) -> None:
        """A warning of what is told otherwise than it is in the model that the training begins with, where it stays."""
        usual = {each.name: each.default for each in fields(self)}
        told = [name for name in own if getattr(self, name) not in (own[name], usual[name])]
        if told:
            stay = ", ".join(f"{name} {own[name]} and not {getattr(self, name)}" for name in told)
            warnings.warn(f"start: the sizes of the model there stay, {stay}", stacklevel=3)

    def must_hold(self, name: str, *parts: str) -> None:
        """Errors: FileNotFoundError if the model folder that `name` is lacks one of these parts."""
        folder = getattr(self, name)
        for part in parts:
            if not (folder / part).is_dir():
                hint = f": maybe {folder / 'model'} is meant" if (folder / "model" / part).is_dir() else ""
                raise FileNotFoundError(f"{name} must be a model folder with {part}/, got {folder}{hint}")


def processes() -> PartialState:
    """Which process this is, of how many. accelerate joins processes without a GPU only if it is told `cpu`."""
    return PartialState(cpu=not torch.accelerator.is_available())


def once(work: Callable[[], object]) -> None:
    """Do it on the main process, while the others wait: for what all of them read afterwards."""
    if processes().is_main_process:
        work()
    processes().wait_for_everyone()


def store(save: Callable[[Path], object], folder: Path) -> None:
    """Save what was trained, on the main process, which says where."""
    once(lambda: save(folder))
    if processes().is_main_process:
        print(f"the model lies in {folder}", file=sys.stderr)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 where `precision` (LoopConfig's) wants it."""
    wanted = precision == "bf16" or (precision == "auto" and best_dtype(device) == torch.bfloat16)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def quick_attention(device: torch.device) -> AbstractContextManager[object]:
    """On a CPU, attention as plain products: for few tokens the fused kernel's backward pass takes several times as long."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up to lr, then half a cosine down to lr · lr_end at `steps`. step counts from 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def generator(config: LoopConfig, step: int, rank: int, device: torch.device) -> torch.Generator:
    """The noise source of one step on one process, on its device: a pure function of (seed, step, rank)."""
    return torch.Generator(device).manual_seed((config.seed * 1_000_003 + step) * 1024 + rank)


def near(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """On a GPU, if they take at most half of its free memory, so that no step waits for them; else where they are."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    fits = device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / 2
    return [tensor.to(device) if fits else tensor for tensor in tensors]


def check_run(config: LoopConfig, meta: Mapping[str, Any]) -> None:
    """What `fit` refuses before it trains, and the folder claimed; for trainers that have hours of work before it.

    Errors: ValueError for a batch that the processes cannot share, and where `config.out` holds a run of another meta, or another
    process trains; ImportError if TensorBoard is wanted and not there.
    """
    if config.batch % (n := processes().num_processes):
        raise ValueError(f"batch must be a multiple of the {n} processes, got {config.batch}")
    if config.tensorboard:
        _summary_writer()
    folder = checkpoint.latest(config.out)
    if folder and (other := differences(read_json(folder / "state.json")["meta"], plain(meta))):
        raise ValueError(f"out: {config.out} holds a run of another model or data ({other}); choose a new folder")
    if processes().is_main_process:
        claim(config.out)


claimed: dict[Path, int] = {}  # folders that this process trains in, and what it holds of each


def claim(folder: Path) -> None:
    """Until this process ends, no other trains in the folder: they would remove each other's files.

    Errors: ValueError if one does already. On platforms without `flock`, such as Windows, nobody is kept away.
    """
    try:
        import fcntl
    except ImportError:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() in claimed:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"out: another process trains in {folder}: wait for its end, or choose a new folder") from None
    except OSError:  # not on every file system
        pass
    claimed[folder.resolve()] = handle


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What two say differently, by name; what only one of them knows of is no difference, since older runs know less."""
    return "; ".join(f"{k} was {then[k]!r}, is {now[k]!r}" for k in then if k in now and then[k] != now[k])


def fit(
    model: M,
    loss: Loss,
    batches: Callable[[int, int, int], Iterator[Any]],
    config: LoopConfig,
    *,
    meta: Mapping[str, Any] | None = None,
    sample: Callable[[M, Path], None] | None = None,
) -> M:
    """Train `model`, or resume the run in `config.out`, and return the network with the averaged weights.

    batches(start, rank, world) -> the batches, of config.batch // world, of this process from step `start` on.
    sample(averaged network, png path) draws a grid, on the main process.
    meta goes into every checkpoint; a run with another meta is not resumed.
    Ctrl-C and SIGTERM end it after the step, saved, with KeyboardInterrupt or SystemExit.
    Errors: those of `check_run`; FloatingPointError after 50 non-finite losses in a row, 10 at the end (single ones are skipped,
    and reach neither weights nor moments nor the average).
    """
    check_run(config, meta or {})
    accelerator = Accelerator(mixed_precision="no")  # autocast is ours: one process may train in several precisions in turn
    model = model.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run = _Run(model, config, accelerator, plain(meta or {}))
    if run.step < config.steps:
        stream = batches(run.step, accelerator.process_index, accelerator.num_processes)
        with tqdm(
            total=config.steps, initial=run.step, disable=not accelerator.is_main_process, dynamic_ncols=True, mininterval=2
        ) as bar:
            _train(run, loss, stream, sample, bar)
    elif accelerator.is_main_process:
        print(f"the run in {config.out} has done its {run.step} steps; with more it goes on", file=sys.stderr)
    accelerator.wait_for_everyone()
    return run.ema.model  # type: ignore[return-value]  # a copy of `model`


def _train(run: "_Run", loss: Loss, stream: Iterator[Any], sample: Callable[[Any, Path], None] | None, bar: tqdm) -> None:
    config, main = run.config, run.accelerator.is_main_process
    began, skipped, last, why = time.monotonic(), 0, False, 0
    with told_to_stop() as told:
        while not last:
            value, metrics = run.advance(loss, next(stream))
            seconds = time.monotonic() - began
            skipped = 0 if math.isfinite(value) else skipped + 1
            why = 0 if run.step == config.steps else run.stops(told, seconds)
            last = run.step == config.steps or bool(why)
            if skipped >= (min(LOG_EVERY, run.step) if last else HOPELESS):
                streak = f"the loss was not finite {skipped} times in a row, up to step {run.step}"
                raise FloatingPointError(f"{streak}; {advice(config)}")
            bar.update()
            bar.set_postfix(loss=f"{value:.4f}", refresh=False)
            if main and (last or run.step % LOG_EVERY == 0):
                run.log({"loss": value, "lr": learning_rate(config, run.step - 1), "seconds": seconds, **metrics})
            if main and (last or (run.step % config.save_every == 0 and not skipped)):  # weights that give NaN push no others out
                run.save()
            if main and sample and (last or run.step % config.sample_every == 0) and why <= OVER:
                sample(run.ema.model, config.out / "samples" / f"step-{run.step:08d}.png")
    if main and why:
        print(f"stopped at step {run.step} of {config.steps}; the same command goes on from there", file=sys.stderr)
    if why > OVER:
        raise KeyboardInterrupt if why == signal.SIGINT else SystemExit(128 + why)


def advice(config: LoopConfig) -> str:
    """What to do after losses that were not finite."""
    if (saved := checkpoint.latest(config.out)) is None:
        return "nothing was saved yet: start again with a lower lr"
    return f"{saved.name} was saved before: resume with a lower lr; if that does not help, remove it, and an older one is taken"


@contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C or a SIGTERM: then it holds the signal's number, and the next one acts as ever."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where signals do not arrive
        yield told
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: known for number, known in before.items() if known not in (None, signal.SIG_IGN)}  # as in the background

    def note(number: int, frame: object) -> None:
        told.append(number)
        restore()
        with suppress(OSError):  # print may be at work already
            os.write(2, b"\nthis step is finished and saved; once more stops at once\n")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield told
    finally:
        restore()


class _Run:
    """The mutable state of one training: network, optimiser, EMA, step."""

    def __init__(self, model: nn.Module, config: LoopConfig, accelerator: Accelerator, meta: Mapping[str, Any]) -> None:
        self.config, self.accelerator, self.meta, self.step = config, accelerator, meta, 0
        self.raw = model
        self.ema = EMA(model, config.ema)
        matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
        self._resume()
        prepared = torch.compile(model) if config.compile else model
        self.model: nn.Module = accelerator.prepare_model(prepared)  # type: ignore[arg-type]
        self.metrics, self.board = config.out / "metrics.jsonl", None
        if accelerator.is_main_process:
            (config.out / "samples").mkdir(parents=True, exist_ok=True)
            self._trim_metrics()
            if config.tensorboard:
                again = self.step + 1  # what a killed run wrote after its checkpoint would stand twice
                self.board = _summary_writer()(str(config.out / "tensorboard"), purge_step=again)

    def advance(self, loss: Loss, batch: Any) -> tuple[float, Mapping[str, Tensor]]:
        """One optimiser step; a loss or gradient that is not finite, on any process, leaves weights, moments and EMA as they were.

        Returns the loss, averaged over processes (NaN where the step was skipped), and this process's metrics.
        """
        rank = self.accelerator.process_index
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # dropout and the like
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        with quick_attention(self.accelerator.device):
            with autocast(self.config.precision, self.accelerator.device):
                value, metrics = loss(self.model, batch, generator(self.config, self.step, rank, self.accelerator.device))
            self.accelerator.backward(value)
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), self.config.clip_grad)
        seen = self.accelerator.reduce(torch.stack([value.detach().float(), norm.float()]), "mean")
        mean, mean_norm = seen.tolist()  # type: ignore[union-attr]
        healthy = math.isfinite(mean) and math.isfinite(mean_norm)
        if healthy:
            self.optimizer.step()
            self.ema.update(self.raw)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return (mean if healthy else math.nan), metrics

    def stops(self, told: Sequence[int], seconds: float) -> int:
        """Why the main process says that this is the last step: the signal that it was told, OVER if `max_minutes` are, or 0.

        Several processes look every tenth step, so that all stop at the same one.
        """
        most = self.config.max_minutes
        why = told[0] if told else OVER if most is not None and seconds > most * 60 else 0
        if self.accelerator.num_processes == 1:
            return why
        if self.step % LOG_EVERY:
            return 0
        said = torch.tensor([why], dtype=torch.uint8, device=self.accelerator.device)
        return int(broadcast(said).item())  # type: ignore[union-attr]

    def log(self, values: Mapping[str, float | Tensor]) -> None:
        """A line of metrics.jsonl; what is not finite becomes null, since JSON has no NaN."""
        numbers = {k: float(f"{float(v):.6g}") for k, v in values.items()}
        line = {"step": self.step, **{k: v if math.isfinite(v) else None for k, v in numbers.items()}}
        with self.metrics.open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        if self.board:
            for k, v in numbers.items():
                self.board.add_scalar(k, v, self.step)

    def save(self) -> None:
        names = {id(p): n for n, p in self.raw.named_parameters()}
        tensors = {
            "model": self.raw.state_dict(),
            "ema": self.ema.model.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, names),
        }
        state = {"ema_updates": self.ema.updates, "config": plain(asdict(self.config)), "meta": self.meta}
        checkpoint.save(self.config.out, checkpoint.Checkpoint(self.step, tensors, state), keep=self.config.keep)

    def _resume(self) -> None:
        folder = checkpoint.latest(self.config.out)
        if folder is None:
            return
        found = checkpoint.load(folder, "model", "ema", "optimizer")
        self.raw.load_state_dict(found.tensors["model"])
        self.ema.model.load_state_dict(found.tensors["ema"])
        self.ema.updates, self.step = found.state["ema_updates"], found.step
        checkpoint.load_optimizer(self.optimizer, found.tensors["optimizer"], dict(self.raw.named_parameters()))
        if self.step < self.config.steps and self.accelerator.is_main_process:
            other = differences(found.state["config"], plain(asdict(self.config)))
            print(f"the run in {self.config.out} goes on from step {self.step}{f' ({other})' if other else ''}", file=sys.stderr)

    def _trim_metrics(self) -> None:
        """Lines after the checkpoint that a killed run left behind would stand twice; its last one may be cut off."""
        if self.metrics.exists():
            lines = [line for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
            try:
                kept = [line for line in lines if json.loads(line)["step"] <= self.step]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.metrics} holds a line that is not one of a run's ({error}); move the file away") from None
            write_text(self.metrics, "".join(kept))


def _summary_writer() -> Any:
    """TensorBoard's class of that name."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError('tensorboard is not installed: pip install "latentdiff[tensorboard]"') from None
    return SummaryWriter


def plain(value: Any) -> Any:
    """JSON's own types, so that what is saved equals what is read back."""
    return json.loads(json.dumps(value, default=str))
