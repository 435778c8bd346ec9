"""Small networks on a CPU: operations are written down once for each shape of the inputs and then called one after the other.

A step of the embedded model is some 480 operations. To find out which, module by module, takes Python a third of the step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentdiff.models import onednn
from latentdiff.models.attention import KeysValues
from latentdiff.models.convolution import Conv2d
from latentdiff.models.int8 import Int8
from latentdiff.models.state import Watch
from latentdiff.models.unet import UNet, rows_of

KEPT = 4  # recordings; each holds light linear layers' weights once more, in their kernel's order
SMALL = 200_000_000  # weights, at most
PLACES = 4096  # of all maps of a batch, at most: on larger ones the operations themselves take the time


def is_small(network: nn.Module) -> bool:
    """Whether, on a CPU, a step's operations take so little time that finding out which they are counts."""
    weights = [*network.parameters(), *network.buffers()]  # where they are kept in fewer bits, they are no parameters
    packed = (module.packed for module in network.modules() if isinstance(module, Int8))
    return weights[0].device.type == "cpu" and sum(w.numel() for w in (*weights, *packed)) <= SMALL


class Changed(Exception):
    """A number that decided which operations run is another one than when they were written down."""


def memory(x: Tensor) -> int:
    """Where it lies; that of an order of oneDNN's own is not told."""
    return id(x) if x.is_mkldnn else x.untyped_storage().data_ptr()


def is_seen_as(x: Tensor, other: Tensor) -> bool:
    """Whether x shows the same memory, and takes the numbers in it for the same."""
    return memory(x) == memory(other) and (x.dtype, x.is_conj(), x.is_neg()) == (other.dtype, other.is_conj(), other.is_neg())


class Calls(TorchDispatchMode):
    """Writes down each operation that runs, as a line of a function of `inputs`.

    What is made of weights alone (a view of them, their order for a kernel) is kept and not made again.
    """

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.arguments = [f"x{i}" for i in range(len(inputs))]
        self.names = dict(zip(map(id, inputs), self.arguments, strict=True))  # of what depends on the inputs
        self.given = {memory(x) for x in inputs}  # memory that lies elsewhere in the next call
        self.whole: dict[int, str] = {}  # of what lies in other memory: who owns that
        self.weights: set[int] = set()  # what is made of them alone
        self.seen: list[Any] = [*inputs]  # holds all tensors, since an id is good for as long as its owner lives
        self.lines: list[tuple[str, list[str], list[str]]] = []  # text, names made, names used
        self.constants: dict[str, Any] = {"Changed": Changed}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would import its compiler, which takes longer than a picture

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if onednn.has_operators(torch.bfloat16):
            operation, args = self.ordered(operation, args)
        out = operation(*args, **(kwargs or {}))
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        self.seen += made
        used = [self.names[id(x)] for x in given if id(x) in self.names]
        if given and not used and all(map(self.is_weight, given)):
            self.weights |= {id(x) for x in made}
            return out
        if operation.is_view and id(args[0]) in self.whole and all(is_seen_as(x, args[0]) for x in made):
            for x in made:
                self.look(x, self.whole[id(args[0])])
            return out
        parts = [self.text(x) for x in args] + [f"{name}={self.text(x)}" for name, x in (kwargs or {}).items()]
        call = f"{self.constant(getattr(operation, '_op', operation))}({', '.join(parts)})"
        if made:
            several = isinstance(out, tuple | list)
            results = [f"y{len(self.lines)}_{i}" for i in range(len(out) if several else 1)]
            named = {id(x): name for x, name in zip(out if several else [out], results, strict=True) if isinstance(x, Tensor)}
            self.names |= named
            self.weights -= named.keys()  # one that was written into
            self.whole |= {id(x): named[id(x)] for x in made if memory(x) not in self.given}
            self.lines.append((f"{', '.join(results)}{',' * several} = {call}", results, used))
        else:  # a number by which Python may decide what runs next
            self.lines.append((f"if {call} != {self.constant(out)}: raise Changed", [], used))
        return out

    def look(self, x: Tensor, whole: str) -> None:
        """x is a view: one operation, the fastest, from the memory that it lies in, whatever the way there."""
        self.names[id(x)], self.whole[id(x)] = (name := f"v{len(self.lines)}"), whole
        shape, stride = self.constant(tuple(x.shape)), self.constant(x.stride())
        self.lines.append((f"{name} = {whole}.as_strided({shape}, {stride}, {x.storage_offset()})", [name], [whole]))

    def is_weight(self, x: Tensor) -> bool:
        return isinstance(x, nn.Parameter) or id(x) in self.weights

    def ordered(self, operation: Any, args: Any) -> tuple[Any, Any]:
        """A product in bfloat16 takes its weights in its kernel's order: 0.6 to 0.95 of the time and, wherever we looked, the same
        bits."""
        linear, aten = torch.ops.mkldnn._linear_pointwise, torch.ops.aten
        place = {aten.mm.default: 1, aten.linear.default: 1, linear.default: 1, linear.binary: 2}.get(operation)
        if place is None or not self.is_weight(args[place]) or not onednn.takes(args[0]):
            return operation, args
        if args[place].is_mkldnn or args[place].numel() > Conv2d.light:  # in that order already, or not to be kept twice
            return operation, args
        if operation is aten.mm.default:
            operation, args = linear.default, (args[0], args[1].t(), None, "none", [], "")
        elif operation is aten.linear.default:  # in inference mode
            operation, args = linear.default, (*(*args, None)[:3], "none", [], "")
        weight = onednn.ordered_linear(args[place], args[0][..., 0].numel())
        self.seen.append(weight)
        self.weights.add(id(weight))
        return operation, (*args[:place], weight, *args[place + 1 :])

    def text(self, value: Any) -> str:
        if isinstance(value, tuple | list) and any(id(x) in self.names for x in value):
            return f"[{', '.join(self.text(x) for x in value)}]"
        return self.names.get(id(value)) or self.constant(value)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def function(self, out: Tensor) -> Callable[..., Tensor]:
        """The operations from the inputs to `out`; each result is given up after its last use."""
        body, needed = [f"return {self.names[id(out)]}"], {self.names[id(out)], *self.arguments}
        for line, made, used in reversed(self.lines):
            if made and made[0].startswith("v") and made[0] not in needed:
                continue  # a view on the way to another
            over = {*made, *used} - needed
            body += [f"del {', '.join(sorted(over))}"] * bool(over) + [line]
            needed |= over
        space = dict(self.constants)
        exec("\n    ".join([f"def run({', '.join(self.arguments)}):", *reversed(body)]), space)
        return space["run"]


class Book:
    """What was written down of one network, by the shapes of its inputs; threads may share it. A network that changes is written
    down anew."""

    def __init__(self, network: nn.Module):
        self.watch, self.lock = Watch(network, numbers=True), threading.Lock()
        self.known: OrderedDict[Any, Callable[..., Tensor]] = OrderedDict()

    def run(self, inputs: list[Tensor], call: Callable[[], Tensor], occasion: object = None) -> Tensor:
        """call(), which depends on nothing but the inputs and the network; by itself, if somebody listens to a part of that.

        occasion: while it is the same object, the network is taken not to change.
        """
        key = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
        with self.lock:
            if self.watch.sees_another(occasion):
                self.known.clear()
            heard, known = self.watch.is_heard(), self.known.get(key)
            if known is not None:
                self.known.move_to_end(key)
            elif not heard and len({*map(id, inputs)}) == len(inputs):
                return self.record(key, inputs, call)
        if known is not None and not heard:
            try:
                return known(*inputs)
            except Changed:
                pass
        return call()

    def record(self, key: Any, inputs: list[Tensor], call: Callable[[], Tensor]) -> Tensor:
        with Calls(inputs) as calls:
            out = call()
        self.known[key] = calls.function(out)
        if len(self.known) > KEPT:
            self.known.popitem(last=False)
        return out


class Recorded:
    """Takes a U-Net's place in the loop. The same operations on the same numbers: to the last bit the same result.

    What a recording cannot hold, or not with profit, runs as ever: other attention or merging, a prompt that is not yet keys and
    values, training, large maps, layers on which a `forward` was set. Changes of the network are seen between one prompt and the
    next, those through `.data` by a sample of each weight.
    """

    def __init__(self, unet: UNet):
        self.unet, self.book = unet, Book(unet)

    def __reduce__(self) -> Any:
        return Recorded, (self.unet,)  # copies write down their own

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor | list[KeysValues], vector: Tensor | None = None, **seams: Any
    ) -> Tensor:
        """As `UNet.forward`: noisy latents, times or their shifts, the prompt, and SDXL's vector to the prediction, like x."""
        if seams or isinstance(context, Tensor) or not pays(x, rows_of(context), PLACES):
            return self.unet(x, t, context, vector, **seams)
        inputs = [x, t, *([] if vector is None else [vector]), *[part for pair in context for part in pair]]
        call = partial(self.unet, x, t, context, vector)
        return self.book.run(inputs, call, context)


class RecordedDecoder:
    """Takes the place of a VAE's `decode` in the same way. `vae` is whose place it takes."""

    def __init__(self, vae: Any):
        self.vae, self.book = vae, Book(vae)

    def __reduce__(self) -> Any:
        return RecordedDecoder, (self.vae,)

    def __call__(self, z: Tensor) -> Tensor:
        """z [b, c, h, w] to pictures."""
        call = partial(self.vae.decode, z)
        return self.book.run([z], call) if pays(z, len(z), PLACES // 4) else call()


def pays(x: Tensor, rows: int, places: int) -> bool:
    """Whether to write down what is done with so many rows of x's height and width: nothing is to be learnt, nobody else watches,
    and they have no more than these places."""
    watched = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    return not watched and type(x) in (Tensor, nn.Parameter) and rows * x.shape[-2:].numel() <= places
