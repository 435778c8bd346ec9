"""Guidance rules: what is done with the estimates of x0 that are made with the prompt, without it, or otherwise.

A rule adds directions to the prompt's own x0. Rules add up, and each says what it costs:

    cfg(7.5) + rescale(0.7)                       classifier-free guidance, its overexposure corrected
    interval(cfg(10), 0.3, 5) + pag(2) + freeu()  guided by the prompt in the middle of the run alone, by structure all along

They speak of x0. Because x0 is affine in the network's output with the same coefficients for every estimate, guidance on x0 equals
guidance on eps (or v).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser

Latents = Float[Tensor, "b c h w"]


@dataclass(frozen=True)
class View:
    """One estimate of x0 that a rule compares.

    negative: of the negative prompt. model: by another one. blind: with self-attention that sees only its own place, in the layers
    whose names begin so.
    """

    negative: bool = False
    model: Denoiser | None = None
    blind: tuple[str, ...] = ()


PROMPT, NEGATIVE = View(), View(negative=True)
Estimates = Mapping[View, Latents]


@dataclass(frozen=True)
class Term:
    """What a rule does at levels low < sigma <= high: one of three things.

    direction: what is added to the prompt's x0; needs: the views that it looks at, beside PROMPT. change: (x0, prompt) -> x0, where
    a direction was added. merge: a seam of the network (models.unet.Merge).
    """

    direction: Callable[[Estimates], Latents] | None = None
    needs: tuple[View, ...] = ()
    change: Callable[[Latents, Latents], Latents] | None = None
    merge: Callable[..., Tensor] | None = None
    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True)
class Rule:
    """x0 = prompt + sum of the directions that act at this level, and then the changes. text: the rule as `rule` reads it back."""

    text: str
    terms: tuple[Term, ...] = ()

    def __add__(self, other: Rule) -> Rule:
        text, terms = f"{self.text} + {other.text}", self.terms + other.terms
        if sum(term.merge is not None for term in terms) > 1:
            raise ValueError(f"guidance must change the skip connections once, got {text}")
        return Rule(text, terms)

    def at(self, sigma: float) -> tuple[Term, ...]:
        return tuple(term for term in self.terms if term.low < sigma <= term.high)

    def combine(self, x0: Estimates, terms: Sequence[Term]) -> Latents:
        out = x0[PROMPT]
        directions = [term.direction for term in terms if term.direction]
        for direction in directions:
            out = out + direction(x0)
        for change in [term.change for term in terms if term.change] if directions else ():
            out = change(out, x0[PROMPT])
        return out


# -- rules --


def cfg(scale: float) -> Rule:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598, eq. 6): negative + scale · (prompt - negative).

    Costs a second estimate at every level; at scale 1 it adds nothing and costs nothing.
    """
    _check("guidance", scale)
    term = Term(lambda x0: (scale - 1) * (x0[PROMPT] - x0[NEGATIVE]), (NEGATIVE,))
    return Rule(_text("cfg", scale), () if scale == 1 else (term,))


def apg(scale: float, parallel: float = 0.0, norm: float = math.inf) -> Rule:
    """CFG of which only `parallel` times the part along the prompt's x0 is kept, and at most this norm of the direction: adaptive
    projected guidance (Sadat et al., arXiv 2410.02416), without its momentum, which would be a memory from level to level.

    Costs what cfg costs. High scales saturate less: the parallel part is what does that.
    """
    _check("guidance", scale)
    _check("parallel", parallel)
    _check("norm", norm, least=0.0, finite=False)

    def direction(x0: Estimates) -> Latents:
        prompt, d = x0[PROMPT], x0[PROMPT] - x0[NEGATIVE]
        dims = tuple(range(1, d.ndim))
        length = torch.linalg.vector_norm(d, dim=dims, keepdim=True).clamp(min=1e-30)  # both prompts may be one
        d = d * (norm / length).clamp(max=1)
        along = (d * prompt).sum(dims, keepdim=True) / prompt.square().sum(dims, keepdim=True) * prompt
        return (scale - 1) * (d + (parallel - 1) * along)

    return Rule(_text("apg", scale, parallel, norm), (Term(direction, (NEGATIVE,)),))


def autoguidance(weak: Denoiser, scale: float) -> Rule:
    """Away from what a weaker model makes of the same prompt: weak + scale · (prompt - weak) (Karras et al., arXiv 2406.02507).

    Costs an estimate of the weak model, which is often a small one. Text cannot hold a model: a recipe with this rule says so when
    it is read back.
    """
    _check("scale", scale)
    view = View(model=weak)
    return Rule(_text("autoguidance", scale), (Term(lambda x0: (scale - 1) * (x0[PROMPT] - x0[view]), (view,)),))


def pag(scale: float, *layers: str) -> Rule:
    """Away from an estimate whose self-attention sees only its own place, in the given layers, by default the middle block's:
    prompt + scale · (prompt - blind), perturbed-attention guidance (Ahn et al., arXiv 2403.17377).

    Costs one more estimate, less a little attention. It sharpens structure, also without any prompt.
    """
    _check("scale", scale)
    for layer in layers:
        if not isinstance(layer, str):
            raise ValueError(f"layers must be names such as 'mid_block', got {layer!r}")
    view = View(blind=layers or ("mid_block",))
    return Rule(_text("pag", scale, *layers), (Term(lambda x0: scale * (x0[PROMPT] - x0[view]), (view,)),))


def interval(rule: Rule, low: float, high: float) -> Rule:
    """The rule at levels low < sigma <= high alone (Kynkäänniemi et al., arXiv 2404.07724): outside, its estimates are not made.

    Saves their cost there.
    """
    _check("low", low, least=0.0)
    _check("high", high, least=low, finite=False)
    terms = tuple(replace(term, low=max(term.low, low), high=min(term.high, high)) for term in rule.terms)
    return Rule(_text("interval", rule, low, high), terms)


def rescale(phi: float = 0.7) -> Rule:
    """Pull each guided picture's std back to that of the prompt's alone, by a share phi (Lin et al., arXiv 2305.08891, eq. 16).

    Costs nothing. It acts on x0; diffusers' `guidance_rescale` takes the standard deviations of the network's outputs.
    """
    _check("phi", phi)

    def change(x0: Latents, prompt: Latents) -> Latents:
        dims = tuple(range(1, x0.ndim))
        return phi * x0 * (prompt.std(dims, keepdim=True) / x0.std(dims, keepdim=True)) + (1 - phi) * x0

    return Rule(_text("rescale", phi), (Term(change=change),))


def threshold(share: float = 0.995) -> Rule:
    """Clip each guided picture at this quantile of its magnitudes, and scale it to the prompt's own quantile: dynamic thresholding
    (Saharia et al., arXiv 2205.11487, section 2.3). The paper scales pixels to [-1, 1]; latents have no such bound.

    Costs nothing.
    """
    _check("share", share, least=0.0, most=1.0)

    def change(x0: Latents, prompt: Latents) -> Latents:
        own, aim = (torch.quantile(z.abs().flatten(1).float(), share, dim=1).to(z.dtype) for z in (x0, prompt))
        own, aim = (q.reshape(-1, *[1] * (x0.ndim - 1)) for q in (torch.maximum(own, aim), aim))
        return x0.clamp(-own, own) * (aim / own)

    return Rule(_text("threshold", share), (Term(change=change),))


def freeu(b1: float = 1.5, b2: float = 1.6, s1: float = 0.9, s2: float = 0.2) -> Rule:
    """Multiply half of the backbone's channels by b, and the lowest frequencies of the skip connections by s, in the first two
    blocks of the U-Net's way up (Si et al., arXiv 2309.11497); the default is the authors' for SD 1.5.

    Costs a Fourier transform of a few small maps. b is one number for all places, as in the authors' first code and in diffusers.
    """
    for name, value in (("b1", b1), ("b2", b2), ("s1", s1), ("s2", s2)):
        _check(name, value)

    def merge(x: Tensor, skip: Tensor, block: int) -> Tensor:
        if block < 2:
            b, s = ((b1, s1), (b2, s2))[block]
            half = x.shape[1] // 2
            x, skip = torch.cat([b * x[:, :half], x[:, half:]], dim=1), _scale_low_frequencies(skip, s)
        return torch.cat([x, skip], dim=1)

    return Rule(_text("freeu", b1, b2, s1, s2), (Term(merge=merge),))


def _scale_low_frequencies(x: Tensor, s: float) -> Tensor:
    """The four frequencies -1 and 0 in each direction times s."""
    spectrum = torch.fft.fft2(x.float())
    mask = torch.ones(x.shape[-2:], dtype=torch.float32, device=x.device)
    mask[[0, 0, -1, -1], [0, -1, 0, -1]] = s
    return torch.fft.ifft2(spectrum * mask).real.to(x.dtype)


RULES: dict[str, Callable[..., Rule]] = {
    "cfg": cfg,
    "apg": apg,
    "pag": pag,
    "interval": interval,
    "rescale": rescale,
    "threshold": threshold,
    "freeu": freeu,
}


def rule(text: str) -> Rule:
    """A rule from what `Rule.text` writes: "interval(cfg(7.5), 0.3, 5) + pag(2)". A number alone is cfg's. Nothing is executed.

    Errors: ValueError that says what is not understood.
    """

    def read(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=int() | float() | str() as value) if not isinstance(value, bool):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if not isinstance(value, bool):
                return -value
            case ast.Name(id="inf"):
                return math.inf
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                first, second = read(left), read(right)
                if isinstance(first, Rule) and isinstance(second, Rule):
                    return first + second
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in RULES:
                return RULES[name](*(read(arg) for arg in args))
            case ast.Call(func=ast.Name(id="autoguidance")):
                raise ValueError("autoguidance needs its weaker model, which text cannot hold: give the rule as an object")
        raise ValueError

    try:
        found = read(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        hint = f" ({error})" if isinstance(error, ValueError) and str(error) else ""
        raise ValueError(
            f"guidance must be a number or a sum of {', '.join(RULES)}, such as cfg(7.5) + pag(2), got {text!r}{hint}"
        ) from None
    return found if isinstance(found, Rule) else cfg(found)


def _text(name: str, *values: float | str | Rule) -> str:
    return f"{name}({', '.join(_argument(value) for value in values)})"


def _argument(value: float | str | Rule) -> str:
    """Short, but read back as the same."""
    if isinstance(value, Rule):
        return value.text
    if isinstance(value, str):
        return repr(value)
    return f"{value:g}" if float(f"{value:g}") == value else repr(float(value))


def _check(name: str, value: float, *, least: float = -math.inf, most: float = math.inf, finite: bool = True) -> None:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer of hundreds of digits
        number = math.nan
    if math.isnan(number) or (finite and math.isinf(number)) or not least <= number <= most:
        allowed = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        allowed = "a finite number" if least == -math.inf else allowed
        raise ValueError(f"{name} must be {allowed}, got {value!r:.100}")
