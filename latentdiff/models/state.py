"""Whether a network is still what it was when something was recorded of it, and whether somebody listens to a part of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.models.convolution import sample


class State:
    """A network's modules and what is set on them, its weights, and the hooks.

    numbers: whether changes of the weights where they lie count too; else only which they are.
    """

    def __init__(self, network: nn.Module, *, numbers: bool):
        modules = list(network.modules())
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.tables = [table for m in modules for table in (m._modules, m._parameters, m._buffers)]
        self.places = [vars(m) for m in modules]
        self.getters = [itemgetter("_modules", "_buffers", *(k for k in at if k[0] != "_")) for at in self.places]
        self.modules, self.samples = modules, [sample(weight) for weight in network.parameters()] if numbers else []
        self.held = [*self.parts()]  # an id is good for as long as its owner lives
        # A `forward` set on a part may ask for what nobody sees change; torch.compile sets one on its own.
        self.set = any("forward" in vars(m) for m in modules if type(m).__name__ != "OptimizedModule")
        self.was, self.taken = self.now(), torch.cat(self.samples) if numbers else None

    def parts(self) -> Iterator[Any]:
        values = (getter(at) for getter, at in zip(self.getters, self.places, strict=True))
        return chain(*(table.values() for table in self.tables), *values, map(type, self.modules))

    def now(self) -> list[Any]:
        """Versions tell of changes in place, but for those through `.data`: of these the samples tell."""
        weights = [x for table in self.tables for x in table.values() if isinstance(x, Tensor)]
        versions = [0 if x.is_inference() else x._version for x in weights] if self.samples else []
        return [*map(len, self.places), *map(id, self.parts()), *[x.data_ptr() for x in weights], *versions]

    def holds(self) -> bool:
        try:
            return self.now() == self.was and (self.taken is None or torch.equal(torch.cat(self.samples), self.taken))
        except KeyError:  # a setting that is gone
            return False

    def is_heard(self) -> bool:
        return self.set or any(self.hooks) or bool(torch.nn.modules.module._has_any_global_hook())


class Watch:
    """Looks at a network from call to call."""

    def __init__(self, network: nn.Module, *, numbers: bool):
        self.network, self.numbers = network, numbers
        self.state: State | None = None
        self.occasion: object = None  # of the last call

    def sees_another(self, occasion: object) -> bool:
        """Whether the network is another than at the call before; while `occasion` is the same object, it is taken not to be."""
        if self.state is not None:
            if occasion is not None and occasion is self.occasion:
                return False
            self.occasion = occasion
            if self.state.holds():
                return False
        self.state, self.occasion = State(self.network, numbers=self.numbers), occasion
        return True

    def is_heard(self) -> bool:
        """Whether somebody listens to a part of it, as far as it was seen."""
        return self.state is not None and self.state.is_heard()
