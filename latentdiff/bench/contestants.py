"""Who is measured: this library, and diffusers where it is installed, on the same weights, latents and prompt."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.checkpoints import configs
from latentdiff.checkpoints.fill import on_meta
from latentdiff.checkpoints.io import Parts
from latentdiff.conditioning import chunk
from latentdiff.doctor import installed
from latentdiff.loading import ready
from latentdiff.pipeline import Pipeline

PROMPT, GUIDANCE = "a cat", 7.5
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to make pictures: its stages, each as a function that gives what is timed."""

    name: str
    dtype: str
    text: Callable[[], Run]  # prompt and negative
    step: Callable[[int], Run]  # pictures -> one guided step of the sampler, U-Net and all
    loop: Callable[[int, int], Run]  # steps, pictures -> latents
    decode: Callable[[int], Run]  # pictures -> pixels
    picture: Callable[..., Run]  # steps, pictures, sampler="ddim", guidance=7.5 -> PIL pictures


def contestants(
    parts: Parts,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compiled: bool,
    compile_own: bool = True,
    peer_dtypes: Sequence[torch.dtype] = (),
) -> list[Contestant]:
    """Ours first, in `dtype`; compiled too, if `compiled` and `compile_own`.

    diffusers runs as it comes (on a CPU, where that is float32), and tuned as its documents say: in our dtype, channels last, and
    compiled if asked for; and channels last in `peer_dtypes`.
    """
    with_peers = installed("diffusers") is not None
    peers: list[Contestant] = []

    def join(dtype: torch.dtype, name: str, **options: bool) -> None:
        try:
            peers.append(Peer(parts, device, dtype, name=name, **options).contestant())
        except Exception as error:  # whatever it raises that was made for other versions of what is installed here
            warnings.warn(f"{name} cannot be built and is left out: {type(error).__name__}: {error}", stacklevel=3)

    if with_peers and device.type == "cpu":
        join(torch.float32, "diffusers")
    pipe = ready(parts, device, dtype)
    found = [ours(pipe, "latentdiff")]
    if with_peers:
        join(dtype, "diffusers tuned", channels_last=True)
        for other in peer_dtypes:
            join(other, f"diffusers {str(other).removeprefix('torch.')}", channels_last=True)
    if compiled and compile_own:
        own = replace(parts, vae=copy.deepcopy(parts.vae))  # compiled in place
        found.append(ours(ready(own, device, dtype, compile=True), "latentdiff compiled"))
    if compiled and with_peers:
        join(dtype, "diffusers compiled", channels_last=True, compiled=True)
        if device.type == "cuda" and installed("stable-fast"):
            join(torch.float16, "stable-fast", channels_last=True, stable_fast=True)
    return found + peers


def ours(pipe: Pipeline, name: str) -> Contestant:
    """This library, through its public face alone."""
    asked = {"guidance": GUIDANCE, "seed": 0, "sampler": "ddim"}

    def step(pictures: int) -> Run:
        def steps() -> Iterator[object]:
            while True:
                yield from pipe.stream(PROMPT, **asked, steps=500, n=pictures, batch=pictures)

        return partial(next, steps())

    def loop(steps: int, pictures: int) -> Run:
        return lambda: list(pipe.stream(PROMPT, **asked, steps=steps, n=pictures, batch=pictures))

    def decode(pictures: int) -> Run:
        z = latents(pipe.spec.unet.in_channels, pipe.unet.config.sample_size, pictures).to(pipe.device)
        return lambda: [to_pixels(pipe.decode(one)) for one in z.split(1)]

    def picture(steps: int, pictures: int, sampler: str = "ddim", guidance: float = GUIDANCE) -> Run:
        options = asked | {"sampler": sampler, "guidance": guidance, "n": pictures, "batch": pictures, "steps": steps}
        return lambda: pipe(PROMPT, **options, progress=False)

    def text() -> Run:
        size = (pipe.spec.size, pipe.spec.size)
        return torch.no_grad()(lambda: pipe.text.encode(PROMPT, "", size=size))

    dtype = str(pipe.dtype).removeprefix("torch.")
    return Contestant(name=name, dtype=dtype, text=text, step=step, loop=loop, decode=decode, picture=picture)


def latents(channels: int, side: int, pictures: int) -> Tensor:
    """The same on every device."""
    return torch.randn(pictures, channels, side, side, generator=torch.Generator().manual_seed(0))


def to_pixels(images: Tensor) -> Tensor:
    """[-1, 1] to bytes on the CPU."""
    return (images / 2 + 0.5).clamp(0, 1).mul(255).round().byte().cpu()


class Peer:
    """diffusers on the weights of `parts`, without a copy where dtype and layout are the same."""

    def __init__(
        self,
        parts: Parts,
        device: torch.device,
        dtype: torch.dtype,
        *,
        name: str,
        channels_last: bool = False,
        compiled: bool = False,
        stable_fast: bool = False,
    ):
        self.spec, self.device, self.dtype, self.name = parts.spec, device, dtype, name
        layout = torch.channels_last if channels_last else torch.preserve_format
        place: Any = {"device": device, "dtype": dtype, "memory_format": layout}
        self.towers = [
            theirs_of_tower(t, spec).to(device, dtype) for t, spec in zip(parts.text_encoders, parts.spec.towers, strict=True)
        ]
        self.pipe = pipeline_of(parts, unet=theirs_of_unet(parts).to(**place), vae=theirs_of_vae(parts).to(**place))
        self.pipe.set_progress_bar_config(disable=True)
        if compiled:
            compile_best(self.pipe)
        if stable_fast:
            compile_with_stable_fast(self.pipe)
        self.ids = [row.to(device) for row in ids(parts)]
        with torch.no_grad():
            self.embeds, self.pooled = self.encode()

    def contestant(self) -> Contestant:
        stages = {name: getattr(self, name) for name in ("step", "loop", "decode", "picture")}
        text = lambda: torch.no_grad()(self.encode)  # noqa: E731
        return Contestant(name=self.name, dtype=str(self.dtype).removeprefix("torch."), text=text, **stages)

    def encode(self) -> tuple[Tensor, Tensor | None]:
        """The prompt's embedding, and SDXL's pooled one; twice, as for a prompt and a negative."""
        _, given = (
            [tower(ids, output_hidden_states=True) for tower, ids in zip(self.towers, self.ids, strict=True)] for _ in range(2)
        )
        if self.spec.vector == "none":
            return given[0].last_hidden_state, None
        return torch.cat([one.hidden_states[-2] for one in given], dim=-1), given[-1].text_embeds

    def keywords(self, pictures: int) -> dict[str, Any]:
        found = {"prompt_embeds": self.embeds, "negative_prompt_embeds": self.embeds}
        if self.pooled is not None:
            found |= {"pooled_prompt_embeds": self.pooled, "negative_pooled_prompt_embeds": self.pooled}
        return found | {"num_images_per_prompt": pictures, "guidance_scale": GUIDANCE}

    def step(self, pictures: int) -> Run:
        unet, scheduler = self.pipe.unet, self.pipe.scheduler
        scheduler.set_timesteps(500, device=self.device)
        times = itertools.cycle(scheduler.timesteps[:-1])
        embeds = self.embeds.repeat(2 * pictures, 1, 1)
        added = None
        if self.pooled is not None:
            side = self.spec.size
            numbers = torch.tensor([[side, side, 0, 0, side, side]], device=self.device, dtype=self.dtype)
            added = {"text_embeds": self.pooled.repeat(2 * pictures, 1), "time_ids": numbers.repeat(2 * pictures, 1)}
        z = latents(self.spec.unet.in_channels, self.spec.unet.sample_size, pictures).to(self.device, self.dtype)

        @torch.no_grad()
        def run() -> Tensor:
            t = next(times)
            x = scheduler.scale_model_input(torch.cat([z, z]), t)
            negative, prompt = unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added, return_dict=False)[0].chunk(2)
            return scheduler.step(negative + GUIDANCE * (prompt - negative), t, z, return_dict=False)[0]

        return run

    def loop(self, steps: int, pictures: int) -> Run:
        return lambda: self.pipe(**self.keywords(pictures), num_inference_steps=steps, output_type="latent")

    def decode(self, pictures: int) -> Run:
        z = latents(self.spec.unet.in_channels, self.spec.unet.sample_size, pictures).to(self.device, self.dtype)
        vae, scale = self.pipe.vae, self.spec.vae.scale
        return torch.no_grad()(lambda: [to_pixels(vae.decode(one / scale, return_dict=False)[0]) for one in z.split(1)])

    def picture(self, steps: int, pictures: int, sampler: str = "ddim", guidance: float = GUIDANCE) -> Run:
        pipe: Any = self.pipe
        if sampler == "euler":
            scheduler = diffusers().EulerDiscreteScheduler.from_config(pipe.scheduler.config)
            pipe = type(pipe)(**pipe.components | {"scheduler": scheduler}, **extras(self.spec))
            pipe.set_progress_bar_config(disable=True)

        def run() -> object:
            with torch.no_grad():
                self.encode()
            return pipe(**self.keywords(pictures) | {"guidance_scale": guidance}, num_inference_steps=steps).images

        return run


def ids(parts: Parts) -> list[Tensor]:
    """The prompt's tokens as each of our towers reads them, [1, length]."""
    chunks = [chunk([(id, 1.0) for id in words(PROMPT)], t) for t, words in zip(parts.spec.towers, parts.tokenizers, strict=True)]
    return [torch.tensor([one.ids]) for one in chunks]


def diffusers() -> Any:
    """The library, told to keep quiet."""
    import diffusers

    diffusers.logging.set_verbosity_error()  # type: ignore[attr-defined]
    return diffusers


def built(name: str, json: dict[str, Any]) -> Any:
    """A network of theirs, on `meta`."""
    return on_meta(getattr(diffusers(), name).from_config, json)


def theirs_of_unet(parts: Parts) -> Any:
    return assigned(built("UNet2DConditionModel", configs.unet_json(parts.spec.unet)), parts.unet)


def theirs_of_vae(parts: Parts) -> Any:
    return assigned(built("AutoencoderKL", configs.vae_json(parts.spec.vae)), parts.vae)


def theirs_of_tower(tower: nn.Module, spec: Any) -> Any:
    import transformers

    kind = transformers.CLIPTextModelWithProjection if spec.pooled else transformers.CLIPTextModel
    return assigned(on_meta(lambda json: kind(transformers.CLIPTextConfig(**json)), configs.tower_json(spec)), tower)


def assigned(theirs: Any, module: nn.Module) -> Any:
    """Their module with our tensors in it; what it computes at its start, the positions of tokens, is computed again."""
    mine = module.state_dict()  # transformers' text tower has left out the first part of its names since version 5
    weights = {name: mine[name if name in mine else f"text_model.{name}"] for name in theirs.state_dict()}
    theirs.load_state_dict(weights, strict=True, assign=True)
    for name, buffer in list(theirs.named_buffers()):
        if buffer.is_meta:
            owner = theirs.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], torch.arange(buffer.numel()).view(buffer.shape))
    return theirs.eval()


def extras(spec: Any) -> dict[str, Any]:
    return {"requires_safety_checker": False} if spec.vector == "none" else {"add_watermarker": False}


def pipeline_of(parts: Parts, *, unet: Any, vae: Any) -> Any:
    scheduler = diffusers().DDIMScheduler.from_config(configs.scheduler_json(parts.spec))
    absent: dict[str, Any] = {"text_encoder": None, "tokenizer": None, "feature_extractor": None}
    if parts.spec.vector == "none":
        kind: Any = diffusers().StableDiffusionPipeline
        absent |= {"safety_checker": None}
    else:
        kind = diffusers().StableDiffusionXLPipeline
        absent |= {"text_encoder_2": None, "tokenizer_2": None}
    return kind(unet=unet, vae=vae, scheduler=scheduler, **absent, **extras(parts.spec))


def compile_best(pipe: Any) -> None:
    """diffusers' documented best: fused projections, whole-graph compilation of the U-Net and of the decoder."""
    pipe.fuse_qkv_projections()
    pipe.unet = torch.compile(pipe.unet, mode="max-autotune", fullgraph=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode="max-autotune", fullgraph=True)


def compile_with_stable_fast(pipe: Any) -> None:
    from sfast.compilers.diffusion_pipeline_compiler import CompilationConfig, compile  # type: ignore[import-not-found]

    config = CompilationConfig.Default()
    config.enable_cuda_graph = config.enable_triton = True
    compile(pipe, config)
