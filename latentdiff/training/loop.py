"""The training loop that all three networks share, on `accelerate`: one CPU, one GPU or many.

Resume equals an uninterrupted run, bit for bit on a CPU, without saving any random state: the data of step n and its noise are pure
functions of (seed, n), so that a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.training import checkpoint
from latentdiff.training.ema import EMA

Loss = Callable[[nn.Module, Any, torch.Generator], tuple[Tensor, Mapping[str, float]]]


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
    """Fraction of `lr` that is left at the last step."""
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
    save_every: int = 500
    """Steps between checkpoints."""
    sample_every: int = 500
    """Steps between sample grids."""
    keep: int = 2
    """Checkpoints to keep."""
    max_minutes: float | None = None
    """Stop, after saving, when this much time has gone; the run can be resumed."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the `tensorboard` extra)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every", "sample_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a positive number, got {self.lr!r}")


def native_bf16() -> bool:
    """Whether bf16 arithmetic is native here: recent CUDA devices, or a CPU with AVX512-BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up to lr, then half a cosine to lr · lr_end at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def generator(config: LoopConfig, step: int, rank: int) -> torch.Generator:
    """The noise source of one step on one process: a pure function of (seed, step, rank)."""
    return torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1024 + rank)


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[int, int, int], Iterator[Any]],
    config: LoopConfig,
    *,
    meta: Mapping[str, Any] | None = None,
    sample: Callable[[nn.Module, Path], None] | None = None,
) -> nn.Module:
    """Train `model` and return its averaged weights' network.

    loss(model, batch, generator) -> (scalar, metrics). batches(start, rank, world) -> batches of this process from step `start` on.
    sample(ema model, png path) draws a grid. meta goes into every checkpoint's state.json.
    Errors: FloatingPointError after 50 non-finite losses in a row; single ones are skipped and never reach the weights or the EMA.
    """
    precision = ("bf16" if native_bf16() else "no") if config.precision == "auto" else config.precision
    accelerator = Accelerator(mixed_precision=precision)
    run = _Run(model.to(accelerator.device, memory_format=torch.channels_last), config, accelerator, meta or {})
    if run.step >= config.steps:
        return run.ema.model
    stream = batches(run.step, accelerator.process_index, accelerator.num_processes)
    bar = tqdm(total=config.steps, initial=run.step, disable=not accelerator.is_main_process, dynamic_ncols=True, mininterval=2)
    began, skipped = time.monotonic(), 0
    while run.step < config.steps:
        value, metrics = run.advance(loss, next(stream))
        skipped = skipped + 1 if not math.isfinite(value) else 0
        if skipped >= 50:
            raise FloatingPointError(
                f"the loss was not finite 50 times in a row, up to step {run.step}; the last checkpoint is sound"
            )
        bar.update()
        bar.set_postfix(loss=f"{value:.4f}", refresh=False)
        run.log({"loss": value, "lr": learning_rate(config, run.step - 1), "seconds": time.monotonic() - began, **metrics})
        last = run.step == config.steps or (config.max_minutes is not None and time.monotonic() - began > config.max_minutes * 60)
        if accelerator.is_main_process and (last or run.step % config.save_every == 0):
            run.save()
        if accelerator.is_main_process and sample and (last or run.step % config.sample_every == 0):
            sample(run.ema.model, config.out / "samples" / f"step-{run.step:08d}.png")
        if last:
            break
    bar.close()
    return run.ema.model


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
        config.out.mkdir(parents=True, exist_ok=True)
        (config.out / "samples").mkdir(exist_ok=True)
        self.metrics = config.out / "metrics.jsonl"
        self._trim_metrics()
        self.board = _tensorboard(config)

    def advance(self, loss: Loss, batch: Any) -> tuple[float, Mapping[str, float]]:
        """One optimiser step; a non-finite loss or gradient leaves weights, moments and EMA as they were."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # dropout and the like
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        with self.accelerator.autocast():
            value, metrics = loss(self.model, batch, generator(self.config, self.step, self.accelerator.process_index))
        self.accelerator.backward(value)
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), self.config.clip_grad)
        healthy = bool(torch.isfinite(norm)) and bool(torch.isfinite(value))
        if healthy:
            self.optimizer.step()
            self.ema.update(self.raw)
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return (float(value.detach()) if healthy else math.nan), metrics

    def out_of_time(self, seconds: float) -> bool:
        """Whether `max_minutes` are over by the main process's clock; asked every tenth step, so that all stop at the same one."""
        if self.config.max_minutes is None or self.step % 10:
            return False
        over = torch.tensor([seconds > self.config.max_minutes * 60], device=self.accelerator.device)
        return bool(broadcast(over).item())  # type: ignore[union-attr]

    def log(self, values: Mapping[str, float]) -> None:
        if not self.accelerator.is_main_process or (self.step % 10 and self.step != self.config.steps):
            return
        with self.metrics.open("a") as f:
            f.write(json.dumps({"step": self.step, **{k: round(float(v), 6) for k, v in values.items()}}) + "\n")
        if self.board:
            for k, v in values.items():
                self.board.add_scalar(k, v, self.step)

    def save(self) -> None:
        names = {id(p): n for n, p in self.raw.named_parameters()}
        tensors = {
            "model": self.raw.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer, names),
        }
        state = {"ema_updates": self.ema.updates, "config": _plain(asdict(self.config)), "meta": _plain(dict(self.meta))}
        checkpoint.save(self.config.out, checkpoint.Checkpoint(self.step, tensors, state), keep=self.config.keep)

    def _resume(self) -> None:
        folder = checkpoint.latest(self.config.out)
        if folder is None:
            return
        found = checkpoint.load(folder)
        if found.state["meta"] != _plain(dict(self.meta)):
            raise ValueError(f"out: {self.config.out} holds a run of another model or data: {found.state['meta']}, now {self.meta}")
        self.raw.load_state_dict(found.tensors["model"])
        self.ema.model.load_state_dict(found.tensors["ema"])
        self.ema.updates, self.step = found.state["ema_updates"], found.step
        checkpoint.load_optimizer(self.optimizer, found.tensors["optimizer"], dict(self.raw.named_parameters()))

    def _trim_metrics(self) -> None:
        """Lines after the checkpoint that a killed run left behind would stand twice."""
        if self.accelerator.is_main_process and self.metrics.exists():
            lines = [line for line in self.metrics.read_text().splitlines() if json.loads(line)["step"] <= self.step]
            self.metrics.write_text("".join(line + "\n" for line in lines))


def _tensorboard(config: LoopConfig):
    if not config.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(config.out / "tensorboard"))


def _plain(value: Any) -> Any:
    """JSON's own types, so that what is saved equals what is read back."""
    return json.loads(json.dumps(value, default=str))
