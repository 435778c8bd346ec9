"""Guidance: a Denoiser, its conditions and a rule become the Denoise that a sampler calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoise, Denoiser
from latentdiff.diffusion.rules import NEGATIVE, PROMPT, Latents, Rule, View


def guided(denoiser: Denoiser, cond, uncond=None, rule: Rule | None = None) -> Denoise:
    """(x, sigma) -> x0 with conditions and guidance inside; the estimates of one model run as one batch, the prompt's first.

    cond: an object with `context`, `vector`, `join` and a length (conditioning.Cond), one entry a picture; or several with
    weights, [(cond, weight), …], guided together: negative + sum of weights · (prompt - negative) (Liu et al., arXiv 2206.01714),
    each at its cost. A weight is a number, or one for each picture [b]. uncond: the negative prompt's. Without a rule, or if none
    of its terms acts, the network runs on the prompt alone: bit for bit the conditional run, at half of cfg's cost.
    Errors: ValueError where a condition is missing, or has more or fewer entries than there are pictures.
    """
    parts = list(cond) if isinstance(cond, Sequence) else [(cond, 1.0)]
    lone = len(parts) == 1 and isinstance(parts[0][1], int | float) and parts[0][1] == 1
    rule = rule or Rule("cfg(1)")
    if uncond is None and (not lone or any(view.negative for term in rule.terms for view in term.needs)):
        raise ValueError(f"uncond must be given: {rule.text if lone else 'a sum of prompts'} compares with the negative prompt")
    always = (PROMPT,) if lone else (PROMPT, NEGATIVE)
    conds, weights = [c for c, _ in parts], [weight for _, weight in parts]
    evaluators: dict[Any, Callable[[Latents, Tensor], list[Latents]]] = {}

    def denoise(x: Latents, sigma: Tensor) -> Latents:
        terms = rule.at(float(sigma))
        views = tuple(dict.fromkeys([*always, *(view for term in terms for view in term.needs)]))
        slots: list[tuple[View, Any]] = [(view, c) for view in views for c in ([uncond] if view.negative else conds)]
        entries = {len(c) for _, c in slots}
        if entries != {len(x)}:  # of a multiple of them the network would take one picture's for another's
            raise ValueError(f"cond and uncond must have one entry for each of {len(x)} pictures, got {sorted(entries)}")
        merge = next((term.merge for term in terms if term.merge), None)
        if (views, merge) not in evaluators:
            evaluators[views, merge] = _evaluator(replace(denoiser, merge=merge) if merge else denoiser, slots)
        seen: dict[View, list[Latents]] = {view: [] for view in views}
        for (view, _), x0 in zip(slots, evaluators[views, merge](x, sigma), strict=True):
            seen[view].append(x0)
        negative = seen.get(NEGATIVE, [None])[0]
        x0 = {view: xs[0] if lone or view.negative else _together(xs, weights, negative) for view, xs in seen.items()}
        return rule.combine(x0, terms)

    return denoise


def _together(x0s: list[Latents], weights: list[float | Tensor], negative: Latents | None) -> Latents:
    assert negative is not None
    out = negative
    for x0, weight in zip(x0s, weights, strict=True):
        factor = weight.to(x0).reshape(-1, 1, 1, 1) if isinstance(weight, Tensor) else weight
        out = out + factor * (x0 - negative)
    return out


def _evaluator(denoiser: Denoiser, slots: list[tuple[View, Any]]) -> Callable[[Latents, Tensor], list[Latents]]:
    """(x, sigma) -> x0 of each slot. Slots of one model share a call; conditions are joined and prepared once."""
    models = dict.fromkeys(view.model or denoiser for view, _ in slots)
    calls = []
    for model in models:
        own = [k for k, (view, _) in enumerate(slots) if (view.model or denoiser) is model]
        conds = [slots[k][1] for k in own]
        blind = tuple(slots[k][0].blind for k in own)
        with_seams = replace(model, attend=_Blinded(model.attend or _sdpa, blind)) if any(blind) else model
        cond = model.prepare(*conds) if model.prepare else reduce(lambda all, c: all.join(c), conds)
        calls.append((with_seams, cond, own))

    def evaluate(x: Latents, sigma: Tensor) -> list[Latents]:
        out: list[Any] = [None] * len(slots)
        for model, cond, own in calls:
            for k, x0 in zip(own, model(x, sigma, cond).chunk(len(own)), strict=True):
                out[k] = x0
        return out

    return evaluate


@dataclass(frozen=True)
class _Blinded:
    """Attention in which those shares of the batch that are blind here get their own values back (Ahn et al., arXiv 2403.17377).

    blind: the layers in which each share is. Two that do the same are equal, which tells `models.caching` that they are.
    """

    attend: Callable[..., Tensor]
    blind: tuple[tuple[str, ...], ...]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, site) -> Tensor:
        here = [not site.cross and site.name.startswith(layers) for layers in self.blind]
        if not any(here):
            return self.attend(q, k, v, site)
        shares = zip(here, *(t.chunk(len(here)) for t in (q, k, v)), strict=True)
        return torch.cat([v_ if is_blind else self.attend(q_, k_, v_, site) for is_blind, q_, k_, v_ in shares])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, site) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def scheduled(sigmas: Float[Tensor, " steps+1"], parts: Sequence[tuple[int, Denoise]]) -> Denoise:
    """One Denoise for each part of a run: (the number of the step with which it ends, denoise), the last at the end of the grid.

    A level between those of the grid belongs to the step that passes it, and one of the grid to the step that begins there, also
    where a sampler (`heun`) looks ahead to it.
    """
    levels = sigmas.tolist()

    def denoise(x: Latents, sigma: Tensor) -> Latents:
        begun = sum(level >= float(sigma) for level in levels)
        return next(d for end, d in parts if begun <= end or end == parts[-1][0])(x, sigma)

    return denoise
