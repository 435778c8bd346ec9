"""What `pipe(...)` is asked for: every argument checked, and completed by the model's own defaults, before anything is computed."""

from __future__ import annotations

import inspect
import math
import operator
import random
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentdiff.checkpoints.families import ModelSpec, SamplingSpec
from latentdiff.diffusion.rules import Rule, cfg, rescale, rule
from latentdiff.diffusion.samplers import SAMPLERS, Randn, Step, bind, resolve
from latentdiff.diffusion.schedules import NoiseSchedule, grid, spacing_named
from latentdiff.prompts import SYNTAXES, conjunction, plan

MAX_PROMPT = 100_000  # characters, about 25,000 tokens
MAX_WEIGHT = 1000.0  # of a word, or of a prompt beside others; far beyond what makes pictures, far below what overflows
MAX_SIDE = 16_384  # pixels
MAX_PICTURES = 10_000
SEEDS = 2**64
STEPS, SAMPLER, GUIDANCE, SYNTAX = 30, "ddim", 7.5, "a1111"  # where neither the caller nor the model says anything


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Pictures to make, all of one size and with one sampler. Prompts, negatives and seeds are one a picture."""

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: float | Rule
    rescale: float
    syntax: str
    steps: int
    sampler: str  # its name
    solver: Callable[..., Iterator[Step]]  # and itself
    spacing: str | list[float]
    eta: float | None
    size: tuple[int, int]  # width, height in pixels
    batch: int | None
    sigmas: Float[Tensor, " steps+1"]
    scale_is_input: bool = False  # of a distilled U-Net, which does the guiding itself: no rule is applied
    origin: Any = None  # origin.Origin, where the run starts from pictures

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def rule(self) -> Rule:
        """What is done with the estimates of x0: a number is that of classifier-free guidance."""
        if self.scale_is_input:
            return cfg(1)
        chosen = self.guidance if isinstance(self.guidance, Rule) else cfg(self.guidance)
        return chosen + rescale(self.rescale) if self.rescale else chosen

    @property
    def scale(self) -> float:
        """The guidance, where only a number will do."""
        if isinstance(self.guidance, Rule):
            raise ValueError(f"guidance must be a number here, got {self.guidance.text!r}")
        return self.guidance

    def sample(self, denoise, x: Tensor, randn) -> Iterator[Step]:
        """The sampler at work."""
        options = {} if self.eta is None else {"eta": self.eta}
        return self.solver(denoise, x, self.sigmas, randn=randn, **options)

    def recipe(self, k: int) -> dict[str, Any]:
        """The keywords of `pipe` that make picture k alone."""
        recipe = {
            "prompt": self.prompts[k],
            "negative": self.negatives[k] or None,
            "steps": self.steps,
            "sampler": self.sampler,
            "spacing": self.spacing,
            "eta": self.eta,
            "guidance": self.guidance.text if isinstance(self.guidance, Rule) else self.guidance,
            "rescale": self.rescale or None,
            "syntax": self.syntax if self.syntax != SYNTAX else None,
            "seed": self.seeds[k],
            "size": self.size,
            **({} if self.origin is None else self.origin.recipe(k)),
        }
        return {key: value for key, value in recipe.items() if value is not None}


def request(
    spec: ModelSpec,
    schedule: NoiseSchedule,
    factor: int,
    *,
    prompt: str | Sequence[str],
    negative: str | Sequence[str] | None,
    guidance: float | str | Rule | None,
    rescale: float,
    steps: int | None,
    sampler: str | Callable[..., Iterator[Step]] | None,
    spacing: str | Sequence[float] | None,
    eta: float | None,
    seed: int | None,
    n: int,
    size: int | tuple[int, int] | None,
    batch: int | None,
    syntax: str = SYNTAX,
    pictured: bool = False,
) -> Request:
    """Check and complete the arguments of `pipe(...)`; `factor` is the pixels along the side of a latent.

    Errors: ValueError that names the argument, what was given and what is allowed.
    """
    if spec.task != "text" and not pictured:
        raise ValueError(f"prompt alone is not enough: this model ({spec.name}) works on a picture, which must be given")
    prompts = texts("prompt", prompt)
    negatives = [""] * len(prompts) if negative is None else texts("negative", negative)
    if isinstance(negative, str):
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise ValueError(f"negative must be one text, or one a prompt ({len(prompts)}), got {len(negatives)}")
    n = integer("n", n, 1, MAX_PICTURES // len(prompts))
    own = spec.sampling
    name, solver, implied = checked_sampler(first(sampler, own.sampler, SAMPLER), schedule)
    if isinstance(spacing, str) and spacing.lower() == "automatic":  # in pictures of A1111: left to the program
        spacing = None
    spacing = first(spacing, implied, own.spacing)
    spacing = (spacing_named(spacing) or spacing) if isinstance(spacing, str) else numbers("spacing", spacing)
    counted = None if isinstance(spacing, str) else max(len(spacing) - 1, 1)
    steps = integer("steps", first(steps, counted, own.steps, STEPS), 1, len(schedule))
    syntax = checked_syntax(syntax)
    check_weights(prompts, negatives, syntax, steps)
    if syntax.startswith("a1111"):
        check_files_named("prompt", prompts)
        check_files_named("negative", negatives)
    scale_is_input, instruct = spec.unet.time_cond_dim is not None, spec.task == "instruct"
    if instruct and SYNTAXES[syntax].dynamic and any(len(conjunction(text)) > 1 for text in prompts):
        raise ValueError("prompt must be a single one for a model that follows instructions, got several joined by AND")
    rescale = number("rescale", rescale, 0, 1)
    if rescale and (instruct or scale_is_input):
        raise ValueError(f"rescale must be 0 for this model ({spec.name}), whose guidance is its own, got {rescale:g}")
    wide = checked_size(first(size, spec.size), factor)
    return Request(
        prompts=tuple(p for p in prompts for _ in range(n)),
        negatives=tuple(p for p in negatives for _ in range(n)),
        seeds=seeds(seed, n * len(prompts)),
        guidance=checked_guidance(first(guidance, own.guidance, GUIDANCE), rules=not (scale_is_input or instruct)),
        rescale=rescale,
        syntax=syntax,
        steps=steps,
        sampler=name,
        solver=solver,
        spacing=spacing,
        eta=checked_eta(eta, name, solver),
        size=wide if pictured else told_size(wide, spec.size),
        batch=None if batch is None else integer("batch", batch, 1, MAX_PICTURES),
        sigmas=grid(schedule, steps, spacing, offset=own.steps_offset, final=final(name, own)),
        scale_is_input=scale_is_input,
    )


def final(sampler: str, own: SamplingSpec) -> str:
    """Where a named spacing ends, as in diffusers: at zero, or at the lowest trained level ("sigma_min"), as TCD's always does.

    The model's file (`set_alpha_to_one`) speaks of the sampler that it is made for, and of DDIM and PLMS.
    """
    if sampler in ("ddim", "plms", "pndm", own.sampler):
        return own.final
    return "sigma_min" if sampler == "tcd" else "zero"


def first(*values: Any) -> Any:
    """The first that is not None."""
    return next(v for v in values if v is not None)


def texts(name: str, value: str | Sequence[str]) -> list[str]:
    """One text or several, none of them huge, all of them proper Unicode."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(t, str) for t in given):
        raise ValueError(f"{name} must be a text or a list of texts, got {shown(value)}")
    if not given:
        raise ValueError(f"{name} must be a text or a list of at least one text, got an empty list")
    if len(given) > MAX_PICTURES:
        raise ValueError(f"{name} must be at most {MAX_PICTURES:,} texts, got {len(given):,}")
    for text in given:
        if len(text) > MAX_PROMPT:
            raise ValueError(f"{name} must have at most {MAX_PROMPT:,} characters, got {len(text):,}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{name} must be proper Unicode, got half a surrogate pair in {shown(text)}")
    return list(given)


def check_weights(prompts: Sequence[str], negatives: Sequence[str], syntax: str, steps: int) -> None:
    """No weight in what is said at any step, of words or of prompts joined by AND, may be so large that numbers overflow."""
    reading = SYNTAXES[syntax]
    told = [part for text in dict.fromkeys(prompts) for said in plan(text, "", steps, reading) for part in said.parts]
    untold = [(said.negative, 1.0) for text in dict.fromkeys(negatives) for said in plan("", text, steps, reading)]
    for name, parts in (("prompt", told), ("negative", untold)):
        for part in dict.fromkeys(parts):
            for words, weight in [part, *(words for section in reading.parse(part[0]) for words in section)]:
                if not abs(weight) <= MAX_WEIGHT:
                    raise ValueError(
                        f"{name} must have weights from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}, got {weight:g} of {shown(words)}"
                    )


def check_files_named(name: str, given: Sequence[str]) -> None:
    """A1111 takes `<lora:flat:0.8>` out of a prompt and loads a file of a folder that we do not know: such words are no text."""
    for text in given:
        if found := re.search(r"<(lora|lyco|hypernet):[^<>]*>", text, re.IGNORECASE):
            way = 'lora={"flat.safetensors": 0.8} in load, or --lora flat.safetensors:0.8'
            raise ValueError(f"{name} must not name files, which go beside it ({way}), got {shown(found[0])}")


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return value


def integer(name: str, value: Any, low: int, high: int) -> int:
    try:
        found = operator.index(value)
    except TypeError:
        found = None
    if found is None or isinstance(value, bool) or not low <= found <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {shown(value)}")
    return found


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    try:
        found = None if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None or not math.isfinite(found) or not low <= found <= high:
        allowed = "a finite number" if low == -math.inf else f"a number from {low} to {high}"
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return found


def numbers(name: str, value: Any) -> list[float]:
    try:
        return [number(name, v) for v in (value.tolist() if isinstance(value, Tensor) else value)]
    except TypeError:
        raise ValueError(f"{name} must be a name or a list of numbers, got {shown(value)}") from None


def checked_guidance(guidance: Any, *, rules: bool) -> float | Rule:
    """A number or, with `rules`, a sum of those of `diffusion.rules`, itself or as text."""
    if isinstance(guidance, Rule) and rules:
        return guidance
    if isinstance(guidance, str):
        try:
            guidance = float(guidance)
        except ValueError:
            if rules:
                return rule(guidance)
    return number("guidance", guidance)


def checked_syntax(syntax: Any) -> str:
    if not isinstance(syntax, str) or syntax not in SYNTAXES:
        raise ValueError(f"syntax must be one of {', '.join(SYNTAXES)}, got {shown(syntax)}")
    return syntax


def checked_sampler(sampler: Any, schedule: NoiseSchedule) -> tuple[str, Callable[..., Iterator[Step]], str | None]:
    """(name, the sampler, the spacing that its name asks for). Names of other programs are understood, such as DPM++ 2M Karras."""
    if not isinstance(sampler, str):
        if not callable(sampler):
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, or a function, got {shown(sampler)}")
        own = getattr(sampler, "__name__", type(sampler).__name__)
        known = SAMPLERS.get(own)  # a recipe must not take another for it
        return own if known in (None, sampler) else f"own {own}", sampler, None  # type: ignore[return-value]
    name, spacing = resolve(sampler)
    return name, bind(name, schedule), spacing


def checked_eta(eta: Any, name: str, solver: Callable[..., Iterator[Step]]) -> float | None:
    """None leaves the sampler's own; a sampler that has none refuses every other value."""
    if eta is None:
        return None
    found = number("eta", eta, 0, 1)
    if "eta" not in inspect.signature(solver).parameters:
        raise ValueError(f"eta must be None for the sampler {name}, which has no such option, got {shown(eta)}")
    return found


def checked_size(size: Any, factor: int) -> tuple[int, int]:
    """(width, height) in pixels; each a multiple of what one latent stands for."""
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    whole = [int(s) for s in pair if isinstance(s, Integral) and not isinstance(s, bool)]
    sides = [s for s in whole if factor <= s <= MAX_SIDE and s % factor == 0]
    if len(pair) != 2 or len(sides) != 2:
        allowed = f"in multiples of {factor} from {factor} to {MAX_SIDE} pixels"
        raise ValueError(f"size must be one side, or (width, height), {allowed}, got {shown(size)}")
    return sides[0], sides[1]


def told_size(size: tuple[int, int], own: int) -> tuple[int, int]:
    """With a warning where pictures have over twice, or under half, of the pixels that the model was made for."""
    times = size[0] * size[1] / own**2
    if not 1 / 2 <= times <= 2:
        warnings.warn(
            f"size {size[0]}×{size[1]} has {times:.2g} times the pixels of this model's own {own}×{own}, at which it draws best",
            stacklevel=4,
        )
    return size


def seeds(seed: Any, n: int) -> tuple[int, ...]:
    """A seed a picture: seed, seed + 1, … modulo 2^64. None and −1 draw the first, in 32 bits: torch's CPU uses no more."""
    if seed is None or (isinstance(seed, int) and not isinstance(seed, bool) and seed == -1):
        seed = random.SystemRandom().randrange(2**32)
    first = integer("seed", seed, 0, SEEDS - 1)
    return tuple((first + k) % SEEDS for k in range(n))


def randn(seeds: Sequence[int]) -> Randn:
    """Standard normal noise like x, drawn for each picture from its own generator, on the CPU and in float32: devices agree."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        draws = [torch.randn(x.shape[1:], generator=g, dtype=torch.float32, device="cpu") for g in generators]
        return torch.stack(draws).to(x.device, x.dtype)

    return draw


def shown(value: Any) -> str:
    """A value in an error message, shortened."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
