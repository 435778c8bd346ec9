"""A U-Net, or a decoder, whose kernels are recorded once for each shape of its inputs and then launched as one (CUDA graphs).

A step of SDXL starts more than a thousand kernels, and to start one takes longer than many of them run.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.models.attention import KeysValues

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""A function without arguments -> (what runs its kernels again, on the same memory; the memory of its result)"""

KEPT = 4  # recordings; each holds the memory of all that is between its inputs and its output


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Record on CUDA, after three runs to the side that let libraries choose kernels and make their workspaces."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


@dataclass(eq=False)
class Recording:
    """Inputs at fixed places, what runs on them, and where its result appears; `prompt` is whose keys and values lie there."""

    x: Tensor
    t: Tensor
    vector: Tensor | None
    context: list[KeysValues]
    prompt: list[KeysValues] | None
    replay: Callable[[], object]
    out: Tensor

    def run(self, x: Tensor, t: Tensor, context: list[KeysValues], vector: Tensor | None) -> Tensor:
        self.x.copy_(x)
        self.t.copy_(t)
        if self.vector is not None and vector is not None:
            self.vector.copy_(vector)
        if context is not self.prompt:  # once a prompt, not once a step
            for pair, given in zip(self.context, context, strict=True):
                for place, value in zip(pair, given, strict=True):
                    place.copy_(value)
            self.prompt = context
        self.replay()
        return self.out.clone()


class Recordings(OrderedDict[Any, Any]):
    """The last few that were used; None for a shape for which memory did not suffice."""

    def find(self, what: str, x: Tensor, key: Any, make: Callable[[], Any]) -> Any:
        """The one for `key`; a new one is made on x's device."""
        if key not in self:
            try:
                with torch.cuda.device_of(x):
                    self[key] = make()
            except torch.OutOfMemoryError:
                warnings.warn(
                    f"too little memory to record the {what} for {list(x.shape)}; it runs unrecorded, more slowly", stacklevel=4
                )
                self[key] = None
            if len(self) > KEPT:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


class GraphedDecoder:
    """Takes a VAE's `decode`'s place, for latents so small that to start the kernels takes longer than to run them.

    `vae` is whose place it takes. Larger ones, training and shapes for which memory did not suffice run as ever.
    """

    largest = 1 << 13  # positions of the latents: 512 × 1024 pixels

    def __init__(self, vae: Any, record: Record = record):
        self.vae, self.record, self.lock = vae, record, threading.Lock()
        self.known = Recordings()

    def __call__(self, z: Tensor) -> Tensor:
        """z [b, c, h, w] to pictures; as the VAE's `decode`."""
        if torch.is_grad_enabled() or z.numel() // z.shape[1] > self.largest:
            return self.vae.decode(z)
        with self.lock:
            found = self.known.find("decoder", z, (z.shape, z.dtype, z.device), lambda: self._recorded(z.clone()))
            if found is not None:
                place, replay, out = found
                place.copy_(z)
                replay()
                return out.clone()
        return self.vae.decode(z)

    def _recorded(self, place: Tensor) -> tuple[Tensor, Callable[[], object], Tensor]:
        return place, *self.record(lambda: self.vae.decode(place))


class Graphed:
    """Takes a U-Net's place in the loop. Threads may share it; they take turns.

    What a recording cannot hold runs as ever: other attention or merging, a prompt that is not yet keys and values, training,
    and shapes for which memory did not suffice.
    """

    def __init__(self, unet: Callable[..., Tensor], record: Record = record):
        self.unet, self.record, self.lock = unet, record, threading.Lock()
        self.known = Recordings()

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor | list[KeysValues], vector: Tensor | None = None, **seams: Any
    ) -> Tensor:
        if seams or isinstance(context, Tensor) or torch.is_grad_enabled():
            return self.unet(x, t, context, vector, **seams)
        with self.lock:
            key = (x.shape, x.dtype, x.device, t.shape, context[0][0].shape)
            recording = self.known.find("U-Net", x, key, lambda: self._recorded(x, t, context, vector))
            if recording is not None:
                return recording.run(x, t, context, vector)
        return self.unet(x, t, context, vector)

    def _recorded(self, x: Tensor, t: Tensor, context: list[KeysValues], vector: Tensor | None) -> Recording:
        x, t, context = x.clone(), t.clone(), [(k.clone(), v.clone()) for k, v in context]
        vector = None if vector is None else vector.clone()
        replay, out = self.record(lambda: self.unet(x, t, context, vector))
        return Recording(x, t, vector, context, None, replay, out)
