"""What is done where a stage gives NaN or infinity: it works again in float32, or says that there is no picture."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Part(Protocol):
    """What holds weights: a network, or the text encoder with its towers."""

    def parameters(self) -> Iterator[Tensor]: ...
    def float(self) -> Any: ...


M = TypeVar("M", bound=Part)


class NonFiniteError(FloatingPointError):
    """A stage gave NaN or infinity in float32, so that there is no picture. The message names the stage."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"the {stage} gave NaN or infinity, in float32: its weights or its input are damaged; no picture was made")


def finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())


def sound(stage: str, part: M, compute: Callable[[M], T], is_sound: Callable[[T], bool]) -> T:
    """compute(part), and once more in float32 if the result is not finite. Errors: NonFiniteError that names the stage."""
    result = compute(part)
    if not is_sound(result):
        result = compute(in_float32(stage, part))
    if not is_sound(result):
        raise NonFiniteError(stage)
    return result


def in_float32(stage: str, part: M) -> M:
    """A float32 copy of a part of the model that overflowed its own dtype. Errors: NonFiniteError if float32 it was."""
    dtype = next(iter(part.parameters())).dtype
    if dtype == torch.float32:
        raise NonFiniteError(stage)
    warnings.warn(f"the {stage} gave NaN or infinity in {dtype}; computing again in float32", stacklevel=2)
    return copy.deepcopy(part).float()
