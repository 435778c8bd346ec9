"""Change a picture by words: `pipe.edit` and `pipe.attention`.

An edit is a way to find the run that rebuilds the picture (an inversion), and a control of what the same run with new words may
change. Source and target always run side by side, so each edit also says how well its picture is rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageChops
from torch import Tensor
from tqdm import tqdm

from latentdiff import images, inversion, memory, request
from latentdiff import prompt_to_prompt as p2p
from latentdiff.conditioning import Cond, TextEncoder, joined
from latentdiff.diffusion.denoiser import Denoise, Denoiser
from latentdiff.diffusion.rules import Rule
from latentdiff.diffusion.samplers import Randn
from latentdiff.diffusion.singlestep import ddim
from latentdiff.images import Images, Picture
from latentdiff.inversion import Inversion
from latentdiff.models.attention import Attend, sdpa
from latentdiff.models.unet import UNet
from latentdiff.origin import Canvas, Given, begun, canvas, listed, shortened
from latentdiff.request import Request, number, shown
from latentdiff.sound import finite, sound

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline

Method = Literal["img2img", "ddim", "null-text", "edit-friendly", "prompt-to-prompt"]
Finder = Literal["ddim", "null-text", "edit-friendly"]
STEPS = 50
STRENGTHS = {"img2img": 0.6, "ddim": 1.0, "null-text": 1.0, "edit-friendly": 0.7}  # share of the levels that each goes back
ROOM = 10**6  # tokens: any context that there is
KEPT = 0.2  # share of the steps before a region is kept to: maps say little earlier


# ------------------------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True, kw_only=True)
class Report:
    """How well an inversion rebuilds its picture: PSNR in dB at the model's size, and that of the VAE alone, which is the limit."""

    rebuilt: float
    limit: float


class Edits(Images):
    """Edited pictures. before: what each was made from; reports: how well that is rebuilt, None where nothing was inverted."""

    def __init__(self, after: Iterable[Image.Image], before: Iterable[Image.Image], reports: Iterable[Report | None]) -> None:
        super().__init__(after)
        self.before, self.reports = list(before), list(reports)

    def __getitem__(self, index: Any) -> Any:
        one = super().__getitem__(index)
        return Edits(one, self.before[index], self.reports[index]) if isinstance(index, slice) else one

    def sheet(self) -> Image.Image:
        """Before, after and difference of each edit, a row each."""
        return sheet(self.before, self)


def sheet(before: Sequence[Image.Image], after: Sequence[Image.Image]) -> Image.Image:
    """Rows of before, after and difference (black: nothing changed), with their names below."""
    rows = [(old, new, ImageChops.difference(old, new)) for old, new in zip(before, after, strict=True)]
    return images.tile([picture for row in rows for picture in row], 3, ["before", "after", "difference"] * len(rows))


# ----------------------------------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an edit is asked to do, checked."""

    source: str
    target: str
    method: Method
    inversion: Finder
    strength: float
    cross: float
    self_attention: float
    words: p2p.Way | None
    region: tuple[str, ...]
    threshold: float
    weights: Mapping[str, float]
    guidance: float

    def settings(self) -> dict[str, Any]:
        """The keywords of `pipe.edit` for the recipe."""
        controlled = self.method == "prompt-to-prompt"
        return {
            "source": self.source,
            "method": self.method,
            "strength": self.strength,
            "inversion": self.inversion if controlled else None,
            "cross": self.cross if controlled else None,
            "self_attention": self.self_attention if controlled else None,
            "words": self.words,
            "region": list(self.region) or None,
            "threshold": self.threshold if self.region else None,
            "weights": dict(self.weights) or None,
            "sampler": None,
            "eta": None,
            "syntax": None,
        }


def plan(
    *,
    source: str | Sequence[str],
    target: str | Sequence[str],
    method: Method,
    inversion: Finder | None,
    strength: float | None,
    cross: float | None,
    self_attention: float | None,
    words: p2p.Way | None,
    region: str | Sequence[str] | None,
    threshold: float,
    weights: Mapping[str, float] | None,
    guidance: float,
) -> list[Plan]:
    """Check and complete what says which edits they are. Errors: ValueError that names the argument."""
    check_choice("method", method, get_args(Method))
    if method != "prompt-to-prompt":
        for name, value in {"inversion": inversion, "cross": cross, "self_attention": self_attention, "words": words}.items():
            if value is not None:
                raise ValueError(f"{name} must be None: only the method prompt-to-prompt has it, got {shown(value)}")
    if method == "img2img" and (region or weights):
        raise ValueError(f"{'region' if region else 'weights'} must be None for the method img2img, which controls no words")
    for name, value, allowed in (("inversion", inversion, Finder), ("words", words, p2p.Way)):
        if value is not None:
            check_choice(name, value, get_args(allowed))
    if not isinstance(weights, Mapping | None):
        raise ValueError(f"weights must be a dictionary of words and factors, got {shown(weights)}")
    finder = inversion or ("edit-friendly" if method == "prompt-to-prompt" else method)
    common: dict[str, Any] = dict(
        method=method,
        inversion=finder,
        strength=number("strength", STRENGTHS[finder] if strength is None else strength, 0, 1),
        cross=number("cross", request.first(cross, 0.8), 0, 1) if method == "prompt-to-prompt" else 0.0,
        self_attention=number("self_attention", request.first(self_attention, 0.4), 0, 1) if method == "prompt-to-prompt" else 0.0,
        words=words,
        region=tuple(request.texts("region", region)) if region else (),
        threshold=number("threshold", threshold, 0, 1),
        weights={word: number("weights", weight) for word, weight in (weights or {}).items()},
        guidance=checked_scale(guidance),
    )
    pairs = matched(source=request.texts("source", source), target=request.texts("target", target))
    return [Plan(source=old, target=new, **common) for old, new in pairs]


def matched(**given: Sequence[Any]) -> list[tuple[Any, ...]]:
    """One of each for every edit; what is given once is every edit's. Errors: ValueError where numbers do not fit."""
    n = max(map(len, given.values()))
    for name, items in given.items():
        if len(items) not in (1, n):
            others = " and ".join(other for other in given if other != name)
            raise ValueError(f"{name} must be one, or as many as {others} ({n}), got {len(items)}")
    return list(zip(*(list(items) * (n // len(items)) for items in given.values()), strict=True))


def checked_scale(guidance: Any) -> float:
    """Rules have no place here: what a picture is inverted and edited with is one prompt against the negative."""
    if isinstance(guidance, str | Rule):
        text = guidance.text if isinstance(guidance, Rule) else guidance
        raise ValueError(f"guidance must be a number in an edit, which knows no rules, got {shown(text)}")
    return number("guidance", guidance)


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


# ------------------------------------------------------------------------------------------------------------------- the edit


@dataclass(frozen=True, kw_only=True, eq=False)
class Edited:
    """What `Pipeline.pictures` asks an origin: how an edited picture is put back, and what its recipe says."""

    canvas: Canvas | None
    settings: dict[str, Any]

    def latents(self, z: Tensor) -> Tensor:
        return z

    def finish(self, new: list[Image.Image]) -> list[Image.Image]:
        return new if self.canvas is None else [self.canvas.finish(image) for image in new]

    def recipe(self, k: int) -> dict[str, Any]:
        return self.settings

    def marks(self, k: int) -> dict[str, str]:
        return {images.PHOTO: "none"} if self.canvas is None else self.canvas.marks


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One edit: what is asked, of which picture, and the request of its two prompts. known: all edits' last inversion."""

    plan: Plan
    work: Canvas | None
    asked: Request
    known: dict[Any, Inversion]

    def told(self) -> Request:
        """The request of the target alone."""
        return replace(self.asked, prompts=self.asked.prompts[1:], negatives=self.asked.negatives[1:], seeds=self.asked.seeds[:1])


Done = tuple[Image.Image, Image.Image, Report | None]  # after, before, report


@torch.inference_mode(False)  # null-text inversion learns
def edit(
    pipe: Pipeline,
    photo: Picture | Sequence[Picture] | None,
    plans: Sequence[Plan],
    *,
    mask: Picture | Sequence[Picture] | None,
    blur: int,
    negative: str | Sequence[str] | None,
    steps: int | None,
    spacing: str | Sequence[float] | None,
    seed: int | None,
    size: int | tuple[int, int] | None,
    batch: int | None,
    progress: bool,
) -> Edits:
    """`Pipeline.edit`, its plans checked: every picture and word is looked at before anything is computed."""
    check_model(pipe)
    if photo is None:
        check_unpictured(plans[0], mask=mask is not None, blur=blur != 0)
    negatives = request.texts("negative", "" if negative is None else negative)
    options: dict[str, Any] = {"native": pipe.spec.size, "factor": pipe.vae.factor, "size": size, "blur": blur}
    pictures = matched(photo=listed("photo", photo) or [None], mask=listed("mask", mask) or [None])
    works = [None if picture is None else canvas(picture, where, **options) for picture, where in pictures]
    edits = matched(**{"photo and mask": works, "source and target": plans, "negative": negatives})
    first = request.seeds(seed, len(edits))
    known: dict[Any, Inversion] = {}
    jobs = [
        Job(
            plan=plan,
            work=work,
            known=known,
            asked=request.request(
                pipe.spec,
                pipe.schedule,
                pipe.vae.factor,
                prompt=[plan.source, plan.target],
                negative=told,
                guidance=plan.guidance,
                rescale=0.0,
                steps=STEPS if steps is None and (spacing is None or isinstance(spacing, str)) else steps,
                sampler="ddim",
                spacing=spacing,
                eta=None,
                seed=first[k],
                n=1,
                size=size if work is None else work.size,
                batch=batch,
                syntax="plain",
            ),
        )
        for k, (work, plan, told) in enumerate(edits)
    ]
    for plan in plans:
        check_words(pipe, plan)
    done = [found for group in grouped(pipe, jobs) for found in together(pipe, group, progress)]
    return Edits(*zip(*done, strict=True))


def grouped(pipe: Pipeline, jobs: Sequence[Job]) -> list[list[Job]]:
    """Neighbours whose latents and contexts have one shape, at most as many as go through the network together."""
    from latentdiff.pipeline import BATCH

    def shape(job: Job) -> tuple[Any, ...]:
        pairs = zip(job.asked.prompts, job.asked.negatives, strict=True)
        return job.asked.size, *(max(len(own) for text in pair for own in pipe.text.chunks(text)) for pair in pairs)

    most = jobs[0].asked.batch or (1 if pipe.device.type == "cpu" else BATCH)
    alike = [list(group) for _, group in groupby(jobs, shape)]
    return [group[k : k + most] for group in alike for k in range(0, len(group), most)]


def check_model(pipe: Pipeline) -> None:
    """Errors: ValueError for models whose estimates with and without the prompt are not those that an edit compares."""
    way = f"this one ({pipe.spec.name}) edits by pipe(…, image=photo)"
    if pipe.spec.task != "text":
        raise ValueError(f"words need a text-to-image model to work on; {way}")
    if pipe.spec.unet.time_cond_dim is not None:
        raise ValueError(f"words need a model whose guidance is not built in to work on; {way}")


def check_unpictured(plan: Plan, **pictured: bool) -> None:
    """Errors: ValueError for what needs a photo, where none is given; pictured: other such arguments, whether they are given."""
    needs = {plan.method: plan.method != "prompt-to-prompt", "inversion": plan.inversion != "edit-friendly"}
    needs |= {"strength": plan.strength != STRENGTHS[plan.inversion], **pictured}
    for name, given in needs.items():
        if given:
            raise ValueError(f"photo must be given for {name}; without, prompt-to-prompt alone works, from noise")


def check_words(pipe: Pipeline, plan: Plan) -> None:
    """Errors: ValueError for a word of `region` in neither prompt, or of `weights` not in the target."""
    old, new = (p2p.words(pipe.text, prompt, ROOM) for prompt in (plan.source, plan.target))
    for word in plan.region:
        if not old.find(word):
            new.span(word, "region")
    for word in plan.weights:
        new.span(word, "weights")


def together(pipe: Pipeline, jobs: Sequence[Job], progress: bool) -> list[Done]:
    """Edits whose shapes agree, through the network as one batch."""
    plan = jobs[0].plan
    if plan.method == "img2img" or (plan.strength == 0 and jobs[0].work is not None):
        return img2img(pipe, jobs)
    result = sound_run(pipe, jobs, progress)
    return [finished(pipe, job, result.row(k)) for k, job in enumerate(jobs)]


def finished(pipe: Pipeline, job: Job, result: Result) -> Done:
    """The picture of one edit, and how well its inversion rebuilt what it is made of."""
    work, settings = job.work, job.plan.settings()
    if work is None:
        settings |= {"strength": None, "inversion": None}
    elif work.blur:
        settings["blur"] = work.blur
    after = pipe.pictures(result.new, replace(job.told(), origin=Edited(canvas=work, settings=settings)))[0]
    rebuilt = images.to_pil(pipe.decode(result.old))[0]
    if work is None or result.z is None:
        return after, rebuilt, None
    picture, *made = images.to_tensor([work.picture(), rebuilt, *images.to_pil(pipe.decode(result.z))])
    return after, work.photo, Report(rebuilt=inversion.psnr(made[0], picture), limit=inversion.psnr(made[1], picture))


def img2img(pipe: Pipeline, jobs: Sequence[Job]) -> list[Done]:
    """SDEdit with the targets alone; and at strength 0, where there is nothing to invert, every method."""
    plan, works, told = jobs[0].plan, [job.work for job in jobs if job.work is not None], [job.told() for job in jobs]
    asked = replace(
        told[0],
        prompts=tuple(t.prompts[0] for t in told),
        negatives=tuple(t.negatives[0] for t in told),
        seeds=tuple(t.seeds[0] for t in told),
        batch=len(jobs),
    )
    asked = begun(pipe, asked, Given(strength=plan.strength, blur=works[0].blur), works)
    extra = {"method": plan.method} | dict.fromkeys(("sampler", "eta", "syntax"))
    own = tuple({"source": job.plan.source} for job in jobs)
    origin = replace(asked.origin, settings=asked.origin.settings | extra, own=own)
    *_, last = pipe.run(replace(asked, origin=origin))
    return [(after, work.photo, None) for after, work in zip(last.images(), works, strict=True)]


def conditions(pipe: Pipeline, asked: Request, alike: bool = False) -> list[tuple[Cond, Cond]]:
    """Conditions of each prompt, as it stands, and of its negative; alike: all as long as the longest needs."""

    def encode(text: TextEncoder) -> list[tuple[Cond, Cond]]:
        if alike:
            return list(zip(*text.encode_all(asked.prompts, asked.negatives, size=asked.size), strict=True))
        return [text.encode(*texts, size=asked.size) for texts in zip(asked.prompts, asked.negatives, strict=True)]

    return sound("text encoder", pipe.text, encode, lambda pairs: all(cond.finite() for pair in pairs for cond in pair))


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """Latents [b, c, h, w]: of the sources as they are rebuilt, of the targets, and of the pictures."""

    old: Tensor
    new: Tensor
    z: Tensor | None

    def row(self, k: int) -> Result:
        return Result(old=self.old[k : k + 1], new=self.new[k : k + 1], z=None if self.z is None else self.z[k : k + 1])


def sound_run(pipe: Pipeline, jobs: Sequence[Job], progress: bool) -> Result:
    """The inversion and the edit; once more in float32 where the U-Net overflows its dtype."""
    with torch.no_grad():
        alike = jobs[0].plan.inversion == "null-text"  # the contexts found for the source are the target's too
        told = [conditions(pipe, job.asked, alike) for job in jobs]  # [job][source, target] -> (prompt, negative)
        conds = [(joined([t[k][0] for t in told]), joined([t[k][1] for t in told])) for k in range(2)]
        pictures = [job.work.picture() for job in jobs if job.work is not None]
        z = pipe.encode(images.to_tensor(pictures)) if pictures else None

        def whole(unet: UNet) -> Result:
            return memory.without_recordings(lambda: run(pipe, unet, jobs, conds, z, progress))

        return sound("U-Net", pipe.unet, whole, lambda r: finite(r.old) and finite(r.new))


def run(
    pipe: Pipeline,
    unet: UNet,
    jobs: Sequence[Job],
    conds: Sequence[tuple[Cond, Cond]],
    z: Float[Tensor, "b c h w"] | None,
    progress: bool,
) -> Result:
    """Sources and targets side by side along the inversion of the pictures, or from noise where there are none."""
    plan, sigmas = jobs[0].plan, jobs[0].asked.sigmas
    sigmas = sigmas if z is None else shortened(pipe.schedule, sigmas, plan.strength, exact=True)
    make = Maker(pipe, unet, pipe.times(sigmas))
    found = invert(pipe, make, jobs, conds[0], z, sigmas, progress)
    old_guidance = plan.guidance if z is None or plan.inversion == "null-text" else 1.0
    old, new = make(*conds[0], old_guidance, found), make(*conds[1], plan.guidance, found)
    old_words, new_words = ([p2p.words(pipe.text, job.asked.prompts[k], conds[k][0].tokens) for job in jobs] for k in range(2))
    controls = [
        p2p.control(
            source,
            target,
            found.sigmas,
            way=job.plan.words,
            cross=job.plan.cross,
            self_attention=job.plan.self_attention,
            weights=job.plan.weights,
        )
        for job, source, target in zip(jobs, old_words, new_words, strict=True)
    ]
    inside = region(jobs, pipe.vae.factor, old_words, new_words, found.sigmas)
    pair = p2p.Pair(old, new, reduce(p2p.Control.join, controls), inside)
    x = found.states[0].repeat(2, 1, 1, 1)
    walk = ddim(pair, x, found.sigmas, randn=found.randn(), eta=found.eta)
    for step in tqdm(walk, total=len(found.sigmas) - 1, disable=not progress, unit="step", dynamic_ncols=True):
        x = step.x
    x = x if found.rest is None else x + found.rest.repeat(2, 1, 1, 1)
    old_z, new_z = (x / (1 + found.sigmas[-1] ** 2).sqrt()).chunk(2)
    return Result(old=old_z, new=new_z, z=z)


def region(
    jobs: Sequence[Job],
    factor: int,
    old: Sequence[p2p.Words],
    new: Sequence[p2p.Words],
    sigmas: Float[Tensor, " steps+1"],
) -> p2p.Region | None:
    """What the edits are kept inside of: the masks, and where some words attend; None: they may be anywhere."""
    plan, masks = jobs[0].plan, [job.work.repaint(factor) for job in jobs if job.work is not None and job.work.mask is not None]
    if not masks and not plan.region:
        return None
    spans = [tuple(tuple(p for word in plan.region for p in words.find(word)) for words in side) for side in (old, new)]
    below = sigmas[max(1, round(KEPT * (len(sigmas) - 1))) - 1].item() if plan.region else 0.0
    fixed = torch.cat(masks) if masks else None
    return p2p.Region(words=(spans[0], spans[1]), below=below, threshold=plan.threshold, fixed=fixed)


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes guided denoisers of a pipeline whose attention can be wrapped. times: of the run's levels, which are embedded once."""

    pipe: Pipeline
    unet: UNet
    times: Mapping[float, float]

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def denoiser(self, attend: Attend) -> Denoiser:
        def network(x: Tensor, t: Tensor, context, vector: Tensor | None = None, /) -> Tensor:
            return self.unet(x, t, context, vector, attend=attend)

        return Denoiser(network, self.pipe.schedule, self.pipe.spec.prediction, self.dtype)

    def __call__(self, cond: Cond, uncond: Cond, guidance: float, found: Inversion | None = None) -> p2p.Guided:
        """Classifier-free guidance, with the unconditional contexts of null-text inversion where there are some."""
        told, untold = (c.to(dtype=self.dtype) for c in (cond, uncond))
        both = (told if guidance == 1 else told.join(untold)).project(self.unet, self.times)
        nulls, levels = (found.nulls, found.sigmas.tolist()) if found else ((), [])

        def denoise(x: Tensor, sigma: Tensor, attend: Attend) -> Tensor:
            if guidance == 1:
                return self.denoiser(attend)(x, sigma, both)
            conds = both
            if nulls:
                null = nulls[levels.index(sigma.item())].to(self.dtype)
                conds = replace(told.join(Cond(null, untold.vector)).project(self.unet), shifts=both.shifts)
            prompt, negative = self.denoiser(attend)(x, sigma, conds).chunk(2)
            return prompt + (guidance - 1) * (prompt - negative)

        return denoise

    def plain(self, cond: Cond) -> Denoise:
        """Without guidance, attention as it is."""
        denoise = self(cond, cond, 1.0)
        return lambda x, sigma: denoise(x, sigma, sdpa)

    def untold(self, uncond: Cond) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """(x, sigma, context) -> x0, differentiable in the context."""
        denoiser = self.denoiser(sdpa)
        return lambda x, sigma, context: denoiser(x, sigma, Cond(context.to(self.dtype), uncond.vector))


def invert(
    pipe: Pipeline,
    make: Maker,
    jobs: Sequence[Job],
    conds: tuple[Cond, Cond],
    z: Float[Tensor, "b c h w"] | None,
    sigmas: Float[Tensor, " steps+1"],
    progress: bool,
) -> Inversion:
    """The runs that rebuild z; from noise where there are no pictures.

    One for all edits that differ only in their targets, but for edit-friendly inversion, which draws other noise for each.
    """
    plan, asked, seeds = jobs[0].plan, jobs[0].asked, [job.asked.seeds[0] for job in jobs]
    if z is None:
        start = pipe.noise(replace(asked, prompts=tuple(job.plan.source for job in jobs)), request.randn(seeds))
        return Inversion(sigmas=sigmas, states=(start,))
    seeded = plan.inversion == "edit-friendly"
    keys = [(id(job.work), job.plan.source, job.asked.negatives[0], seeded and job.asked.seeds[0]) for job in jobs]
    first = {key: keys.index(key) for key in keys}  # its first row
    of_all, known = (make.dtype, conds[0].tokens, *first), jobs[0].known
    if of_all not in known:
        known.clear()
        rows = [*first.values()]
        randn = request.randn([seeds[k] for k in rows])
        each = partial(tqdm, desc="inversion", disable=not progress, unit="step", dynamic_ncols=True)
        known[of_all] = invert_alone(make, plan, conds[0].rows(rows), conds[1].rows(rows), z[rows], sigmas, randn, each)
    return known[of_all].rows([[*first].index(key) for key in keys])


def invert_alone(
    make: Maker,
    plan: Plan,
    cond: Cond,
    uncond: Cond,
    z: Float[Tensor, "b c h w"],
    sigmas: Float[Tensor, " steps+1"],
    randn: Randn,
    each: inversion.Each,
) -> Inversion:
    """Of these pictures z under these conditions, as the plan says."""
    if plan.inversion == "edit-friendly":
        return inversion.edit_friendly(make.plain(cond), z, sigmas, randn, each=each)
    found = inversion.ddim(make.plain(cond), z, sigmas, each=each)
    if plan.inversion == "ddim" or plan.guidance == 1:
        return found
    assert isinstance(uncond.context, Tensor)
    return inversion.null_text(found, make.plain(cond), make.untold(uncond), uncond.context, plan.guidance, each=each)


# ------------------------------------------------------------------------------------------------------------ looking at words


@torch.no_grad()
def attention(pipe: Pipeline, asked: Request, words: Sequence[str], guidance: float, progress: bool) -> Images:
    """`Pipeline.attention` for a request of one picture: it, and a heat map over it for each word."""
    check_model(pipe)
    found = p2p.words(pipe.text, asked.prompts[0], ROOM)
    spans = [found.span(word, "word") for word in words]
    ((cond, uncond),) = conditions(pipe, asked)

    def look(unet: UNet) -> tuple[Tensor, list[p2p.Maps]]:
        x = pipe.noise(asked, randn := request.randn(asked.seeds))
        maps = [p2p.Maps((span,), x.shape[-2], x.shape[-1]) for span in spans]
        denoise = p2p.watched(Maker(pipe, unet, pipe.times(asked.sigmas))(cond, uncond, guidance), maps)
        sigma = asked.sigmas[-1]
        for step in tqdm(asked.sample(denoise, x, randn), total=asked.steps, disable=not progress, unit="step", dynamic_ncols=True):
            x, sigma = step.x, step.sigma
        return x / (1 + sigma**2).sqrt(), maps

    z, maps = sound("U-Net", pipe.unet, lambda unet: memory.without_recordings(lambda: look(unet)), lambda seen: finite(seen[0]))
    picture = pipe.pictures(z, asked)[0]
    return Images([picture, *(over(picture, m.heat()[0]) for m in maps)])


def over(picture: Image.Image, heat: Float[Tensor, "h w"]) -> Image.Image:
    """A picture in grey, red where it is hot."""
    full = F.interpolate(heat.float().cpu()[None, None], (picture.height, picture.width), mode="bicubic").clamp(0, 1)[0]
    grey = images.to_tensor([picture.convert("L").convert("RGB")])[0] * 0.5
    red = torch.tensor([1.0, -0.4, -1.0], dtype=grey.dtype, device=grey.device)[:, None, None]
    return images.to_pil(torch.lerp(grey, red.expand_as(grey), full * 0.8)[None])[0]
