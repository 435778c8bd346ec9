"""The ladder: one optimisation a rung, its speed, and how far its output is from float32's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.bench.contestants import latents
from latentdiff.bench.timing import Times, in_turns
from latentdiff.checkpoints.families import ModelSpec
from latentdiff.models import fused, onednn
from latentdiff.models.attention import Site, sdpa
from latentdiff.models.graphs import Graphed
from latentdiff.models.recorded import Recorded, is_small
from latentdiff.models.unet import UNet


@dataclass(frozen=True, kw_only=True)
class Rung:
    """`difference` is the root mean square of (output − float32's), as a share of float32's own."""

    name: str
    times: Times
    difference: float


def torchs_attention(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def own_attention(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """Ours, under another name than `sdpa`: the U-Net then shares nothing between the prompts of guidance."""
    return sdpa(q, k, v, site)


@dataclass(frozen=True)
class Step:
    """The U-Net's share of one guided step of one picture."""

    unet: UNet
    context: Tensor
    vector: Tensor | None
    once: bool = False  # keys and values made beforehand, and the time embedded
    own: bool = False  # with the kernels of `fused`, `kernels` and `onednn`
    attend: Callable[..., Tensor] = torchs_attention
    network: Callable[..., Tensor] | None = None

    def run(self) -> Callable[[], Tensor]:
        unet, (x, t) = self.unet, inputs(self.unet)
        context = unet.project_context(self.context) if self.once else self.context
        if self.once:
            t = unet.embed_grid([500.0], self.vector, 2, self.context).get(500.0, t)
        if self.network is not None:
            return torch.no_grad()(partial(self.network, x, t, context, self.vector))
        run = torch.no_grad()(partial(unet, x, t, context, self.vector, attend=self.attend))
        return run if self.own else partial(plainly, run)


def plainly(run: Callable[[], Tensor]) -> Tensor:
    onednn.enabled = fused.enabled = False
    try:
        return run()
    finally:
        onednn.enabled = fused.enabled = True


def inputs(unet: UNet) -> tuple[Tensor, Tensor]:
    weight, config = next(unet.parameters()), unet.config
    x = latents(config.in_channels, config.sample_size, 1).to(weight)
    return x, torch.full((1,), 500.0, device=weight.device)


def steps(spec: ModelSpec, unet: UNet, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> dict[str, Step]:
    """The rungs, each with all that is below it. `unet` is float32 and stays as it is."""
    torch.manual_seed(0)
    context = torch.randn(2, spec.towers[0].length, spec.unet.context_dim, device=device)
    vector = torch.randn(2, spec.unet.vector_dim, device=device) if spec.unet.vector_dim else None
    plain = unet.to(device)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rungs = {"float32": Step(plain, context, vector), "channels-last": Step(last, context, vector)}
    if dtype != torch.float32:
        last = copy.deepcopy(last).to(dtype)
        context, vector = context.to(dtype), None if vector is None else vector.to(dtype)
        rungs[str(dtype).removeprefix("torch.")] = Step(last, context, vector)
    rungs["keys, values and time once"] = Step(last, context, vector, once=True)
    rungs["best attention"] = Step(last, context, vector, once=True, attend=own_attention)
    rungs["shared halves"] = Step(last, context, vector, once=True, attend=sdpa)
    if device.type in ("cpu", "cuda"):
        kernels = "oneDNN's own operators" if device.type == "cpu" else "kernels of our own"
        rungs[kernels] = Step(last, context, vector, once=True, attend=sdpa, own=True)
    if device.type == "cuda":
        rungs["kernels recorded"] = Step(last, context, vector, once=True, network=Graphed(last))
    if is_small(last):
        rungs["operations written down"] = Step(last, context, vector, once=True, network=Recorded(last))
    if compiled:
        network = torch.compile(last, fullgraph=True)
        rungs["compiled"] = Step(last, context, vector, once=True, network=network)
    return rungs


@torch.no_grad()
def ladder(spec: ModelSpec, unet: UNet, device: torch.device, dtype: torch.dtype, *, seconds: float, compiled: bool) -> list[Rung]:
    outputs: dict[str, Tensor] = {}

    def kept(name: str, run: Callable[[], Tensor]) -> None:
        outputs[name] = run()

    runs = {name: partial(kept, name, step.run()) for name, step in steps(spec, unet, device, dtype, compiled=compiled).items()}
    times = in_turns(runs, device, seconds=seconds)
    reference = outputs["float32"].double()
    return [
        Rung(
            name=name,
            times=times[name],
            difference=((outputs[name] - reference).square().mean() / reference.square().mean()).sqrt().item(),
        )
        for name in times
    ]
