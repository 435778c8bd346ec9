"""Reuse of deep features from one step to the next: DeepCache (Ma et al. 2023, arXiv 2312.00858). Faster, and another picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentdiff.models.attention import KeysValues, repeated, sdpa
from latentdiff.models.fused import norm_silu
from latentdiff.models.unet import UNet, concatenate, rows_of


class Cached:
    """Takes a U-Net's place for one run: all of it at every `every`-th step, and only its outermost blocks at those between.

    What is kept is what enters the last res block of the way up; of all else only the first convolution is computed anew (the
    paper's figure 2, at its first skip connection). Calls with another batch or attention, as outside of a guidance interval, start
    anew: what is kept would be another estimate's.
    """

    def __init__(self, unet: UNet, every: int):
        if every < 2:
            raise ValueError(f"every must be at least 2, got {every!r}")
        self.unet, self.every = unet, every
        self.deep: Tensor | None = None
        self.attend: Any = None  # with which it was made
        self.age = 0

    def fresh(self) -> Cached:
        """Another, for another run: what one run keeps is not for the next."""
        return Cached(self.unet, self.every)

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor | list[KeysValues], vector: Tensor | None = None, **seams: Any
    ) -> Tensor:
        if torch.is_grad_enabled():
            return self.unet(x, t, context, vector, **seams)
        fits = self.deep is not None and len(self.deep) == rows_of(context) and self.attend == seams.get("attend")
        self.age = self.age + 1 if fits and self.age + 1 < self.every else 0
        if self.age:
            return self._shallow(x, t, context, vector, **seams)
        return self._whole(x, t, context, vector, **seams)

    def _whole(self, x: Tensor, t: Tensor, context: Tensor | list[KeysValues], vector: Tensor | None, **seams: Any) -> Tensor:
        merge, self.attend = seams.pop("merge", concatenate), seams.get("attend")

        def keep(x: Tensor, skip: Tensor, number: int) -> Tensor:
            self.deep = x  # the last call's stays
            return merge(x, skip, number)

        return self.unet(x, t, context, vector, merge=keep, **seams)

    def _shallow(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor | list[KeysValues],
        vector: Tensor | None,
        *,
        attend: Any = sdpa,
        merge: Any = concatenate,
        guidance_embedding: Tensor | None = None,
    ) -> Tensor:
        unet, block = self.unet, self.unet.up_blocks[-1]
        prompt, rows = unet.project_context(context) if isinstance(context, Tensor) else context, rows_of(context)
        shifts = unet.embed_times(repeated(t, rows), vector, guidance_embedding, x.dtype)
        y = merge(self.deep, repeated(unet.conv_in(x), rows), len(unet.up_blocks) - 1)
        y = block.resnets[-1](y, shifts)  # type: ignore[index, operator]
        if block.attentions:  # type: ignore[truthy-function]
            y = block.attentions[-1](y, prompt, attend)  # type: ignore[index, operator]
        return unet.conv_out(norm_silu(unet.conv_norm_out, y))
