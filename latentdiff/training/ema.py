"""Exponential moving average of weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """shadow <- d · shadow + (1 − d) · weights, with the warm-up d = min(decay, (1 + n) / (10 + n)) after n updates.

    The warm-up (TensorFlow's ExponentialMovingAverage has it, and the latent diffusion code) soon forgets the first weights.
    `model` is a copy of the network that holds the averaged weights, in eval mode: sample from it, save it.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay must lie in [0, 1), got {decay!r}")
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights of `model`, which has the parameters and buffers of the averaged one; buffers are copied as they are."""
        d = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        own, new = list(self.model.parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(own, new, 1 - d)  # type: ignore[attr-defined]
        for a, b in zip(self.model.buffers(), model.buffers(), strict=True):
            a.copy_(b)
