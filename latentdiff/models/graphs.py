"""A U-Net, or a decoder, whose kernels are recorded once for each shape of its inputs and then launched as one (CUDA graphs).

A step of SDXL starts more than a thousand kernels, and to start one takes longer than many of them run.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from latentdiff.models.attention import KeysValues
from latentdiff.models.state import Watch

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""A function without arguments -> (what runs its kernels again, on the same memory; the memory of its result)"""

KEPT = 4  # recordings

capturing = threading.Lock()  # a process can record one at a time


class Capture:
    """Records on the current CUDA device. What lies between inputs and results shares its memory with all it records.

    So of its recordings one may run at a time, and a result is to be copied before the next runs.
    """

    def __init__(self) -> None:
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """After three runs that let libraries choose kernels. Other threads may use the GPU meanwhile.

        The workspace of cuBLAS is made while recording, and so lies in the pool: a stream's own, from before, torch gives up
        together with any graph that was recorded on that stream (pytorch#193402; 2.14 does), while others still use it.
        """
        clear_workspaces = torch._C._cuda_clearCublasWorkspaces
        with capturing:
            caller = torch.cuda.current_stream()
            self.stream.wait_stream(caller)
            try:
                with torch.cuda.stream(self.stream):
                    for _ in range(3):
                        run()
            finally:
                caller.wait_stream(self.stream)  # a run that failed may still read what the caller now gives up
            graph = torch.cuda.CUDAGraph()
            try:
                # Somebody's garbage may hold a graph or a kernel, and to destroy one is an error while another is recorded.
                with uncollected(), torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    clear_workspaces()
                    out = run()
            finally:
                torch.cuda.set_stream(caller)  # a recording that cannot be ended leaves its own
                clear_workspaces()  # or they would keep the pool when its graphs are gone
        return graph.replay, out


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of the CPU; its allocator, drivers and libraries raise a plain RuntimeError."""
    told = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in told)


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage meanwhile."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(eq=False)
class Recording:
    """Inputs at fixed places, what runs on them, and where its result appears."""

    places: list[Tensor]
    prompt: list[Tensor]  # the places of keys and values
    replay: Callable[[], object]
    out: Tensor
    occasion: object = None  # whose keys and values lie there

    def run(self, inputs: Sequence[Tensor], prompt: Sequence[Tensor], occasion: object) -> Tensor:
        pairs = zip(self.places, inputs, strict=True)
        if occasion is None or occasion is not self.occasion:  # once a prompt, not once a step
            pairs = chain(pairs, zip(self.prompt, prompt, strict=True))
            self.occasion = occasion
        for place, given in pairs:
            place.copy_(given)
        self.replay()
        return self.out.clone()


class Recordings:
    """The last few of one network, by the shapes of its inputs; None for a shape for which memory did not suffice.

    Threads, and streams, take turns. A network whose weights lie elsewhere, or that is another, is recorded anew. Under autocast
    it runs unrecorded: weights that were cast for it are gone when it ends.
    """

    def __init__(self, what: str, network: nn.Module, record: Record | None):
        self.what, self.watch, self.lock = what, Watch(network, numbers=False), threading.Lock()
        self.known: OrderedDict[Any, Recording | None] = OrderedDict()
        self.given, self.record = record, record
        self.over: torch.cuda.Event | None = None  # on the device
        with counted:
            everywhere.add(self)

    def run(
        self, call: Callable[..., Tensor], inputs: list[Tensor], prompt: Sequence[Tensor] = (), occasion: object = None
    ) -> Tensor:
        """call(*inputs, *prompt), which depends on nothing else but the network; by itself, if somebody listens to a part of that.

        occasion: while it is the same object, neither the network nor `prompt` changes.
        """
        x = inputs[0]
        key = tuple((one.shape, one.dtype, one.device) for one in (*inputs, *prompt[:1]))
        with self.lock:
            if self.watch.sees_another(occasion):  # and so may be its device
                self.forget()
            recorded = (x.is_cuda or self.given is not None) and not self.watch.is_heard()  # a network may have gone to a CPU
            if recorded and not torch.is_autocast_enabled(x.device.type):
                with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(x):
                    if key not in self.known:
                        self.known[key] = self.made(call, inputs, prompt)
                    self.known.move_to_end(key)
                    if len(self.known) > KEPT:
                        self.known.popitem(last=False)
                    found = self.known[key]
                    if found is not None:
                        return self.in_turn(x, lambda: found.run(inputs, prompt, occasion))
        return call(*inputs, *prompt)

    def made(self, call: Callable[..., Tensor], inputs: Sequence[Tensor], prompt: Sequence[Tensor]) -> Recording | None:
        try:
            self.record = self.record or Capture()
            places, kept = [x.clone() for x in inputs], [x.clone() for x in prompt]
            return Recording(places, kept, *self.record(lambda: call(*places, *kept)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            shape = list(inputs[0].shape)
            warnings.warn(f"too little memory to record the {self.what} for {shape}; it runs unrecorded, more slowly", stacklevel=5)
            return None

    def in_turn(self, x: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """Not before what a thread with a stream of its own has asked for is over."""
        if not x.is_cuda:
            return run()
        stream, over = torch.cuda.current_stream(), self.over or torch.cuda.Event()
        stream.wait_event(over)
        self.over = over
        try:
            return run()
        finally:
            over.record(stream)  # also where memory did not suffice for a copy of what now runs

    def forget(self) -> None:
        """Give up all, and with the last one the memory that they share: the next is recorded in another pool."""
        if self.over is not None:
            self.over.synchronize()  # what still runs
        self.known.clear()
        self.record, self.over = self.given, None


everywhere: WeakSet[Recordings] = WeakSet()
counted = threading.Lock()  # around `everywhere`


def give_up() -> bool:
    """Forget all recordings of this process; whether there were some. Their memory is then torch's, which `empty_cache` returns."""
    held = False
    with counted:
        known = list(everywhere)
    for recordings in known:
        with recordings.lock:
            if any(recordings.known.values()):
                recordings.forget()
                held = True
    return held


class GraphedDecoder:
    """Takes a VAE's `decode`'s place, for latents so small that to start the kernels takes longer than to run them.

    `vae` is whose place it takes. Larger ones, training and shapes for which memory did not suffice run as ever.
    """

    largest = 1 << 13  # positions of the latents: 512 × 1024 pixels

    def __init__(self, vae: Any, record: Record | None = None):
        self.vae, self.known = vae, Recordings("decoder", vae, record)

    def __reduce__(self) -> Any:
        return GraphedDecoder, (self.vae, self.known.given)  # copies record their own

    def __call__(self, z: Tensor) -> Tensor:
        """z [b, c, h, w] to pictures; as the VAE's `decode`."""
        if torch.is_grad_enabled() or len(z) * z.shape[-2:].numel() > self.largest:
            return self.vae.decode(z)
        return self.known.run(self.vae.decode, [z])


class Graphed:
    """Takes a U-Net's place in the loop. Threads may share it; they take turns.

    What a recording cannot hold runs as ever: other attention or merging, a prompt that is not yet keys and values, training,
    and shapes for which memory did not suffice. Changes of the network, but for its weights' numbers, are seen between one prompt
    and the next.
    """

    def __init__(self, unet: Any, record: Record | None = None):
        self.unet, self.known = unet, Recordings("U-Net", unet, record)

    def __reduce__(self) -> Any:
        return Graphed, (self.unet, self.known.given)

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor | list[KeysValues], vector: Tensor | None = None, **seams: Any
    ) -> Tensor:
        if seams or isinstance(context, Tensor) or torch.is_grad_enabled():
            return self.unet(x, t, context, vector, **seams)
        inputs = [x, t, *([] if vector is None else [vector])]

        def call(x: Tensor, t: Tensor, *rest: Tensor) -> Tensor:
            several = rest[len(inputs) - 2 :]
            return self.unet(x, t, list(zip(several[::2], several[1::2], strict=True)), None if vector is None else rest[0])

        return self.known.run(call, inputs, [part for pair in context for part in pair], context)
