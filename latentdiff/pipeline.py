"""Prompt -> conditions -> sampler -> pixels: the only place that knows all the parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentdiff import __version__, images, memory, request
from latentdiff.checkpoints.families import ModelSpec, noise_schedule
from latentdiff.conditioning import Cond, Stage, TextEncoder, grouped, joined, shared, together
from latentdiff.diffusion.denoiser import Denoise, Denoiser, Network
from latentdiff.diffusion.guidance import guided, scheduled
from latentdiff.diffusion.rules import Rule
from latentdiff.diffusion.samplers import Randn, Step
from latentdiff.diffusion.schedules import NoiseSchedule
from latentdiff.images import Images, Picture
from latentdiff.models.attention import Attention
from latentdiff.models.caching import Cached
from latentdiff.models.graphs import GraphedDecoder
from latentdiff.models.recorded import RecordedDecoder
from latentdiff.models.unet import UNet, rows_of
from latentdiff.models.vae import VAE
from latentdiff.models.vae_tiny import TinyVAE
from latentdiff.origin import Given, Sides, begun, canvases, prompts
from latentdiff.request import Request, shown
from latentdiff.sound import NonFiniteError, finite, in_float32, sound

if TYPE_CHECKING:
    from latentdiff.editing import Edits, Finder, Method
    from latentdiff.prompt_to_prompt import Way

BATCH = 8  # pictures in one network call where no other number is asked for; on a CPU 1


@dataclass(frozen=True, eq=False)
class Progress:
    """A step of a run: its index, the level it arrived at, the state there and the last x0 estimate; and what they look like."""

    i: int  # from 0; -1 where a run has no steps
    steps: int  # in all
    sigma: Tensor  # noise level: x is x0 + sigma · noise
    x: Float[Tensor, "b c h w"] = field(repr=False)
    x0: Float[Tensor, "b c h w"] = field(repr=False)
    pipe: Pipeline = field(repr=False)
    request: Request = field(repr=False)

    @property
    def z(self) -> Float[Tensor, "b c h w"]:
        """The state as the VAE takes it."""
        return self.x / (1 + self.sigma**2).sqrt()

    def preview(self) -> Images:
        """The estimate of the finished pictures, decoded; without recipes, which make the finished ones."""
        return self.pipe.pictures(self.x0, self.request, recipes=False)

    def images(self) -> Images:
        """The state as it is, decoded: after the last step the result, with its recipes."""
        return self.pipe.pictures(self.z, self.request, recipes=self.i + 1 == self.steps)


@dataclass(frozen=True)
class Run(Iterator[Progress]):
    """The steps of a run, made as they are asked for; `total` of them, or that many again after an overflow.

    Errors: NonFiniteError, where the U-Net gives no numbers in float32 either.
    """

    steps: Generator[Progress, None, None]
    total: int

    def __next__(self) -> Progress:
        return next(self.steps)

    def close(self) -> None:
        """Give up what the run holds before it is at its end."""
        self.steps.close()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Pipeline:
    """A loaded model. It keeps nothing of a call: threads may share one."""

    unet: UNet
    vae: VAE | TinyVAE
    text: TextEncoder
    spec: ModelSpec
    title: str
    options: tuple[str, ...] = ()  # of `load`, in words: those that move a picture
    network: Network | None = None  # what runs in the loop in the U-Net's place: the U-Net compiled, recorded
    decoder: GraphedDecoder | RecordedDecoder | None = None  # and in the place of its VAE's `decode`: the same, recorded

    def __repr__(self) -> str:
        return f"Pipeline({self.title}, {self.spec.size}×{self.spec.size}, {self.precision} on {self.device})"

    @cached_property
    def schedule(self) -> NoiseSchedule:
        with torch.device("cpu"):  # whatever the caller's default is
            return noise_schedule(self.spec.schedule)

    @property
    def marks(self) -> dict[str, str]:
        """What a picture's recipe tells of the model."""
        return {"Model": self.title, "Precision": self.precision}

    @property
    def precision(self) -> str:
        """What moves a picture from the one in float32, in words."""
        return ", ".join([str(self.dtype).removeprefix("torch."), *self.options])

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] | None = None,
        guidance: float | str | Rule | None = None,
        rescale: float = 0.0,
        syntax: str = request.SYNTAX,
        steps: int | None = None,
        sampler: str | Callable[..., Iterator[Step]] | None = None,
        spacing: str | Sequence[float] | None = None,
        eta: float | None = None,
        seed: int | None = None,
        n: int = 1,
        size: int | tuple[int, int] | None = None,
        batch: int | None = None,
        image: Picture | Sequence[Picture] | None = None,
        mask: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        exact: bool = True,
        blur: int = 0,
        padding: int | None = None,
        expand: int | Sides | None = None,
        image_guidance: float | None = None,
        progress: bool = True,
    ) -> Images:
        """Pictures from text. Picture k is the one that `seed + k` alone gives, to the last bit on a CPU with as many threads.

        prompt: a text, or several: `n` pictures of each. Any length; nothing is cut. negative: one text, or one a prompt.
        guidance: how strongly the prompt leads (Ho & Salimans, arXiv 2207.12598); 1 runs the prompt alone, at half the cost. Or a
        sum of rules of `diffusion.rules`, also as text: "interval(cfg(7.5), 0.3, 5) + pag(2)".
        rescale: share, 0 to 1, of Lin et al.'s correction of overexposure (arXiv 2305.08891, eq. 16).
        syntax: what signs in the texts mean, a name in `prompts.SYNTAXES`: (weights:1.3), [changes:along:0.5], AND, BREAK.
        steps: 1 to the schedule's 1000. sampler: a name in SAMPLERS, or a function like those. eta: 0 to 1, noise of samplers that
        take it. spacing: a name in SPACINGS, or the noise levels themselves, one more than steps.
        seed: 0 to 2^64 − 1; None and −1 draw one, which the recipe reports. size: a side, or (width, height), in pixels.
        batch: pictures in one network call; 1 on a CPU and 8 elsewhere, unless given. progress: a bar on stderr.
        None is the model's own value: 7.5, 30 steps, "ddim", native size for most.
        Errors: TypeError and ValueError before any computing; NonFiniteError.

        With a picture: image: one (a path, or a PIL picture), or one a prompt; the result has its size, `size` is that worked at.
        strength: share, 0 to 1, of the noise levels that it goes back; 0 gives the picture itself, 1 ignores what it shows.
        exact: run all the steps asked for; else the classic int(steps · strength). mask: white where to paint; the rest stays
        to the last bit. blur: pixels, inside the mask, over which the new fades in. padding: work on the masked part alone, with so
        many pixels around. expand: pixels to add, on each side or (left, top, right, bottom). image_guidance: of instruct models.
        """
        run = self.stream(
            prompt,
            negative=negative,
            guidance=guidance,
            rescale=rescale,
            syntax=syntax,
            steps=steps,
            sampler=sampler,
            spacing=spacing,
            eta=eta,
            seed=seed,
            n=n,
            size=size,
            batch=batch,
            image=image,
            mask=mask,
            strength=strength,
            exact=exact,
            blur=blur,
            padding=padding,
            expand=expand,
            image_guidance=image_guidance,
        )
        return finished(run, progress)

    def stream(
        self,
        prompt: str | Sequence[str],
        *,
        negative: str | Sequence[str] | None = None,
        guidance: float | str | Rule | None = None,
        rescale: float = 0.0,
        syntax: str = request.SYNTAX,
        steps: int | None = None,
        sampler: str | Callable[..., Iterator[Step]] | None = None,
        spacing: str | Sequence[float] | None = None,
        eta: float | None = None,
        seed: int | None = None,
        n: int = 1,
        size: int | tuple[int, int] | None = None,
        batch: int | None = None,
        image: Picture | Sequence[Picture] | None = None,
        mask: Picture | Sequence[Picture] | None = None,
        strength: float | None = None,
        exact: bool = True,
        blur: int = 0,
        padding: int | None = None,
        expand: int | Sides | None = None,
        image_guidance: float | None = None,
    ) -> Run:
        """The steps of `pipe(...)`, one by one: look in, preview, stop. Arguments are checked now, not at the first step.

        Where the U-Net overflows its dtype, the run starts again at step 0 in float32; its last step has the pictures that were
        sound as they were.
        """
        given = Given(
            image=image,
            mask=mask,
            strength=strength,
            exact=request.flag("exact", exact),
            blur=blur,
            padding=padding,
            expand=expand,
            image_guidance=image_guidance,
        )
        request.texts("prompt", prompt)
        found = canvases(self, given, size)
        asked = request.request(
            self.spec,
            self.schedule,
            self.vae.factor,
            prompt=prompts(found, prompt),
            negative=negative,
            guidance=guidance,
            rescale=rescale,
            syntax=syntax,
            steps=steps,
            sampler=sampler,
            spacing=spacing,
            eta=eta,
            seed=seed,
            n=n,
            size=found[0].size if found else size,
            batch=batch,
            pictured=bool(found),
        )
        self.check_layers(asked.rule)
        asked = begun(self, asked, given, found)
        return Run(self.run(asked), len(asked.sigmas) - 1)

    def edit(
        self,
        photo: Picture | Sequence[Picture] | None,
        *,
        source: str | Sequence[str],
        target: str | Sequence[str],
        method: Method = "prompt-to-prompt",
        inversion: Finder | None = None,
        strength: float | None = None,
        cross: float | None = None,
        self_attention: float | None = None,
        words: Way | None = None,
        region: str | Sequence[str] | None = None,
        threshold: float = 0.4,
        weights: Mapping[str, float] | None = None,
        mask: Picture | Sequence[Picture] | None = None,
        blur: int = 0,
        negative: str | Sequence[str] | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        spacing: str | Sequence[float] | None = None,
        seed: int | None = None,
        size: int | tuple[int, int] | None = None,
        batch: int | None = None,
        progress: bool = True,
    ) -> Edits:
        """Pictures changed by words: `source` says what a photo shows, `target` what it should show; the rest stays.

        photo: a path or a PIL picture; None edits the picture that `source` and `seed` make. Photo, mask, source, target and
        negative may each be several, one an edit; edit k has seed + k.
        method: "img2img" starts from the noised photo; "ddim", "null-text" and "edit-friendly" from its inversion;
        "prompt-to-prompt" also has the target attend as the source does, along `inversion` (edit-friendly).
        strength: share of the noise levels that it goes back. cross, self_attention: shares of the steps, 0.8 and 0.4, in which the
        attention to words, and of places to places, is the source's. words: "replace" lets new words attend where those did whose
        place they take, "refine" lets them find their own; None: "replace" where both prompts have as many words.
        region: words, outside of whose places nothing may change; threshold: how sure of a place, 0 to 1. weights: factors of the
        target's words. mask, blur, negative, guidance, spacing, seed, size, batch as in `pipe(...)`. steps: 50 unless given.
        Errors: ValueError before any computing; NonFiniteError.
        """
        from latentdiff import editing

        plans = editing.plan(
            source=source,
            target=target,
            method=method,
            inversion=inversion,
            strength=strength,
            cross=cross,
            self_attention=self_attention,
            words=words,
            region=region,
            threshold=threshold,
            weights=weights,
            guidance=request.first(guidance, self.spec.sampling.guidance, request.GUIDANCE),
        )
        return editing.edit(
            self,
            photo,
            plans,
            mask=mask,
            blur=blur,
            negative=negative,
            steps=steps,
            spacing=spacing,
            seed=seed,
            size=size,
            batch=batch,
            progress=progress,
        )

    def attention(
        self,
        prompt: str,
        word: str | Sequence[str],
        *,
        negative: str | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | Callable[..., Iterator[Step]] | None = None,
        seed: int | None = None,
        size: int | tuple[int, int] | None = None,
        progress: bool = True,
    ) -> Images:
        """The picture of a prompt, and for each word a map of where the picture looks at it, red over the picture in grey.

        The map is the attention to the word's tokens, summed over all layers, heads and steps. Arguments are those of `pipe(...)`.
        Errors: ValueError for a word that is not in the prompt; as `pipe(...)`.
        """
        from latentdiff import editing

        scale = request.number("guidance", request.first(guidance, self.spec.sampling.guidance, request.GUIDANCE))
        asked = request.request(
            self.spec,
            self.schedule,
            self.vae.factor,
            prompt=prompt,
            negative=negative,
            guidance=scale,
            rescale=0.0,
            steps=steps,
            sampler=sampler,
            spacing=None,
            eta=None,
            seed=seed,
            n=1,
            size=size,
            batch=None,
            syntax="plain",
        )
        return editing.attention(self, asked, request.texts("word", word), scale, progress)

    @torch.no_grad()
    def run(self, asked: Request, make: Callable[[bool], Denoise] | None = None) -> Generator[Progress, None, None]:
        """Walk the request's grid. make: (whether with a float32 U-Net) -> the denoiser; by default this model's own."""
        if len(asked.sigmas) == 1:  # img2img at strength 0: the picture as it is
            x = self.begin(asked, request.randn(asked.seeds))
            yield Progress(-1, 0, asked.sigmas[0], x, x, self, asked)
            return
        make = make or self.maker(asked)
        last = yield from self._walk(make(False), asked)
        if not finite(last.x):
            last = yield from self._walk(make(True), asked, last)
        if not finite(last.x):
            raise NonFiniteError("U-Net")

    def _walk(self, denoise: Denoise, asked: Request, before: Step | None = None) -> Generator[Progress, None, Step]:
        """All steps; returns the last. In it, pictures that were finite in the last step of the run before are as they were."""
        randn, step, steps = request.randn(asked.seeds), None, len(asked.sigmas) - 1
        for step in asked.sample(denoise, self.begin(asked, randn), randn):
            if before is not None and step.i == steps - 1:
                sound = before.x.isfinite().all(dim=(1, 2, 3), keepdim=True)
                step = replace(step, x=torch.where(sound, before.x, step.x), x0=torch.where(sound, before.x0, step.x0))
            yield Progress(step.i, steps, step.sigma, step.x, step.x0, self, asked)
        if step is None:
            raise ValueError(f"sampler must yield at least one Step, got none from {asked.sampler}")
        return step

    def begin(self, asked: Request, randn: Randn) -> Float[Tensor, "b c h w"]:
        """Pure noise, or the request's pictures noised, at the first level of the grid."""
        if asked.origin is None:
            return self.noise(asked, randn)
        return asked.origin.start(randn(asked.origin.z), asked.sigmas[0])

    def noise(self, asked: Request, randn: Randn) -> Float[Tensor, "b c h w"]:
        """Pure noise at the first level of the grid, with the variance that the network was trained on."""
        width, height = (side // self.vae.factor for side in asked.size)
        shape = len(asked), self.spec.vae.latent_channels, height, width
        x = torch.empty(shape, dtype=torch.float32, device=self.device)
        return randn(x) * (1 + asked.sigmas[0] ** 2).sqrt()

    def stages(self, asked: Request) -> list[list[Stage]]:
        """What conditions every picture, stage by stage; each pair of prompt and negative is encoded once, by itself."""
        known: dict[tuple[str, str], list[Stage]] = {}
        options = {"syntax": asked.syntax, "steps": len(asked.sigmas) - 1, "size": asked.size}
        for prompt, negative in dict.fromkeys(zip(asked.prompts, asked.negatives, strict=True)):
            known[prompt, negative] = sound(
                "text encoder",
                self.text,
                lambda text, prompt=prompt, negative=negative: text.stages(prompt, negative, **options),
                lambda stages: all(stage.finite() for stage in stages),
            )
        return [known[pair] for pair in zip(asked.prompts, asked.negatives, strict=True)]

    def denoiser(self, unet: UNet | None = None, times: Mapping[float, float] | None = None) -> Denoiser:
        """(x, sigma, condition) -> x0; `diffusion.rules.autoguidance` takes that of a weaker model.

        unet: another in its place. times: those of a run's levels, which are then embedded once.
        """
        unet = unet or self.unet
        dtype = next(unet.parameters()).dtype
        network = self.network
        others = unet is not self.unet or not stands_for(network, unet)
        if network is None or others or isinstance(network, Cached):  # a Cached is for one run
            network = unet
        prepare = shared(lambda *conds: joined(conds).to(dtype=dtype).project(unet, times))
        return Denoiser(network, self.schedule, self.spec.prediction, dtype, prepare=prepare)

    def check_layers(self, rule: Rule) -> None:
        """Errors: ValueError if a rule names a layer without self-attention in this U-Net: it would do nothing, at full cost."""
        for layer in (layer for term in rule.terms for view in term.needs for layer in view.blind):
            names = [module.site.name for module in self.unet.modules() if isinstance(module, Attention) and not module.cross]
            if not any(name.startswith(layer) for name in names):
                known = ", ".join(dict.fromkeys(name.partition(".attentions")[0] for name in names))
                raise ValueError(f"guidance must name layers with self-attention, in {known}, got {shown(layer)}")

    def times(self, sigmas: Float[Tensor, " steps+1"]) -> dict[float, float]:
        """The times at which the network is asked in a run over these levels: level -> time."""
        levels = sigmas[:-1].double()
        return dict(zip(levels.tolist(), self.schedule.t(levels).float().tolist(), strict=True))

    def maker(self, asked: Request) -> Callable[[bool], Denoise]:
        """What `run` walks with, the texts encoded: (whether with a float32 U-Net) -> the denoiser of the request."""
        told = self.stages(asked)
        return lambda float32: self.denoise(in_float32("U-Net", self.unet) if float32 else self.unet, told, asked)

    def denoise(self, unet: UNet, told: list[list[Stage]], asked: Request) -> Denoise:
        """(x, sigma) -> x0 for the whole batch, in groups that go through the network together.

        On a CPU each picture is a group: products of other shapes round otherwise, and a picture would depend on its neighbours.
        """
        denoiser = self.denoiser(unet, self.times(asked.sigmas))
        cached = self.network if isinstance(self.network, Cached) and self.network.unet is unet else None
        join = shared(lambda *conds: joined(conds))

        def make(rows: slice, spare: bool) -> Denoise:
            network = cached.fresh() if cached else denoiser.network
            if asked.scale_is_input:
                network = told_scale(network, asked.scale, self.spec.unet.time_cond_dim or 0)
            own = replace(denoiser, network=network, attend=memory.sliced if spare else None)
            return self._denoise_group(own, told[rows], asked, rows, join)

        groups = grouped(told, asked.batch or (1 if self.device.type == "cpu" else BATCH))
        denoises, done = [], 0
        for group in groups:
            denoises.append(memory.within_memory(make, slice(done, done := done + len(group))))
        sizes = [len(group) for group in groups]

        def denoise(x: Float[Tensor, "b c h w"], sigma: Tensor) -> Float[Tensor, "b c h w"]:
            return torch.cat([d(part, sigma) for d, part in zip(denoises, x.split(sizes), strict=True)])

        return asked.origin.around(denoise) if asked.origin else denoise

    def _denoise_group(
        self, denoiser: Denoiser, group: list[list[Stage]], asked: Request, rows: slice, join: Callable[..., Cond]
    ) -> Denoise:
        """The pictures `rows` of the request, with what each is told at the time."""
        made: list[tuple[int, Denoise]] = []
        for end in sorted({stage.until for stages in group for stage in stages}):
            now = [next(stage for stage in stages if end <= stage.until) for stages in group]
            cond, uncond = together(now, join), join(*(stage.negative for stage in now))
            if asked.origin:
                made.append((end, asked.origin.guided(denoiser, cond, uncond, asked, rows)))
            else:
                made.append((end, guided(denoiser, cond, uncond, asked.rule)))
        return made[0][1] if len(made) == 1 else scheduled(asked.sigmas, made)

    @torch.no_grad()
    def pictures(self, z: Float[Tensor, "b c h w"], asked: Request, *, recipes: bool = True) -> Images:
        """Latents decoded, each with its recipe unless told otherwise."""
        if asked.origin:
            z = asked.origin.latents(z)
        with ThreadPoolExecutor(1) as pool:  # pixels become a picture while a device decodes the next one
            each = map if self.device.type == "cpu" else pool.map  # a CPU's cores are taken by the decoding
            decoded = [image for made in each(images.to_pil, map(self.decode, z.split(1))) for image in made]
        if asked.origin:
            decoded = asked.origin.finish(decoded)
        for k, image in enumerate(decoded):
            if not recipes:
                image.info.pop("parameters", None)  # of the picture it started from
                continue
            extra = self.marks | {"Version": f"latentdiff {__version__}"}
            extra |= asked.origin.marks(k) if asked.origin else {}
            image.info["parameters"] = images.write_parameters(asked.recipe(k), extra)
        return Images(decoded)

    @torch.no_grad()
    def encode(self, pictures: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b c h w"]:
        """Scaled latents of pictures in [-1, 1], float32, on the model's device."""

        def run(vae: VAE | TinyVAE, picture: Tensor) -> Tensor:
            dtype = next(vae.parameters()).dtype
            return memory.whole_or_tiled(vae.encode, picture.to(self.device, dtype), pixels=vae.factor).float()

        return torch.cat([sound("VAE", self.vae, partial(run, picture=picture), finite) for picture in pictures.split(1)])

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Pictures in about [-1, 1] of scaled latents, float32."""

        def run(vae: VAE | TinyVAE) -> Tensor:
            decode = self.decoder if self.decoder is not None and self.decoder.vae is vae else vae.decode
            return memory.whole_or_tiled(lambda part: decode(part).float(), z.to(next(vae.parameters()).dtype))

        return sound("VAE", self.vae, run, finite)


def stands_for(network: Network | None, unet: UNet) -> bool:
    """Whether it runs in this U-Net's place, and not in that of another, which the pipeline had before; any function may."""
    inner = getattr(network, "unet", network)
    if inner is not network or hasattr(inner, "_orig_mod"):
        return getattr(inner, "_orig_mod", inner) is unet
    return True


def finished(run: Run, progress: bool) -> Images:
    """The pictures of a run's last step; a bar on stderr shows how far it is."""
    from tqdm import tqdm

    last = None
    with tqdm(total=run.total, disable=not progress, unit="step", dynamic_ncols=True) as bar:
        for last in run:
            bar.update(last.i + 1 - bar.n)
    assert last is not None
    return last.pipe.pictures(last.z, last.request)


def told_scale(network: Network, scale: float, dim: int) -> Network:
    """A distilled U-Net with the guidance scale as its input: sinusoids of 1000 · (scale - 1) (Luo et al., arXiv 2310.04378)."""
    places = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    angles = 1000 * (scale - 1) * torch.exp(-math.log(10000) / (dim // 2 - 1) * places)
    embedding = torch.cat([angles.sin(), angles.cos()])[None]  # [1, dim]

    def told(x: Tensor, t: Tensor, context, vector: Tensor | None = None, /, **seams: Any) -> Tensor:
        embedded = embedding.to(x).expand(rows_of(context), -1)
        return network(x, t, context, vector, guidance_embedding=embedded, **seams)  # type: ignore[call-arg]

    return told
