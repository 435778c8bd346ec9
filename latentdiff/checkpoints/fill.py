"""Weights into modules: built on `meta`, checked against the file's header, assigned without a second copy."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latentdiff.checkpoints import keymap
from latentdiff.checkpoints.files import CheckpointError, TensorFile, some_names
from latentdiff.checkpoints.keymap import Source

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How weights are read, for every part alike."""

    dtype: torch.dtype | None = None
    device: torch.device | str = "cpu"
    allow_pickle: bool = False
    variant: str | None = None
    ema: bool = False


class _Uninitialised(TorchFunctionMode):
    """Leaves out the drawing of initial weights; on `meta` a first `normal_` alone would import 900 modules, in a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def on_meta(build: Callable[[Any], M], config: Any) -> M:
    """A module with shapes and no memory."""
    with torch.device("meta"), _Uninitialised():
        return build(config)


def check_leftovers(file: TensorFile, used: Iterable[Source], what: str, *, spare: bool = False) -> None:
    """No tensor of the file is dropped in silence. `spare`: the file's own VAE may go unused."""
    taken = {source.name for source in used}
    left = [n for n in file.entries if n not in taken and not keymap.ignorable(n)]
    left = [n for n in left if not (spare and n.startswith(keymap.VAE_PREFIX))]
    if left:
        raise CheckpointError(
            f"{file.path}: {len(left)} tensors belong to no part of a {what}: {some_names(left)}. It is another kind of model, or "
            "carries something that latentdiff does not run; nothing was loaded"
        )


def fill(module: M, file: TensorFile, sources: Mapping[str, Source], options: Options, what: str) -> M:
    """Give a module on `meta` the file's tensors, checked, on the wanted device and in the wanted dtype."""
    _check_shapes(module, file, sources, what)
    dtype = options.dtype or _own_dtype(file, sources)
    tensors = {name: _read(file, source, dtype, torch.device(options.device), what) for name, source in sources.items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def _check_shapes(module: nn.Module, file: TensorFile, sources: Mapping[str, Source], what: str) -> None:
    names = dict.fromkeys(source.name for source in sources.values())
    missing = [name for name in names if name not in file.entries]
    if what.endswith("VAE") and len(missing) == len(names):
        raise CheckpointError(f"{file.path}: there is no VAE in this file; give one as `vae` (--vae): a file, a folder or a hub id")
    if missing:
        raise CheckpointError(
            f"{file.path}: {len(missing)} of {len(names)} tensors of the {what} are missing: {some_names(missing)}. "
            "The file is incomplete, or of another architecture"
        )
    wrong = []
    for name, tensor in module.state_dict().items():
        allowed, found = sources[name].shapes(tuple(tensor.shape)), file.entries[sources[name].name].shape
        if found not in allowed:
            wrong.append(f"{sources[name].name}: expected {list(allowed[0])}, found {list(found)}")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise CheckpointError(
            f"{file.path}: not the shapes of the {what}: {'; '.join(wrong[:4])}{more}. The file is of another architecture"
        )


def _own_dtype(file: TensorFile, sources: Mapping[str, Source]) -> torch.dtype:
    """The float type that most of a part's numbers have; float16 for types that only store."""
    count = Counter()
    for name in {s.name for s in sources.values()}:
        count[file.entries[name].dtype] += prod(file.entries[name].shape)
    dtype = count.most_common(1)[0][0]
    return dtype if dtype in FLOATS else torch.float16


def _read(file: TensorFile, source: Source, dtype: torch.dtype, device: torch.device, what: str) -> Tensor:
    stored = file.get(source.name)
    if not (stored.is_floating_point() and stored.numel()):
        raise CheckpointError(f"{file.path}: {source.name} of the {what} must hold floats, found {stored.dtype}")
    tensor = source.ours(stored).to(device, dtype)
    low, high = torch.aminmax(tensor)
    if not (isfinite(low) and isfinite(high)):
        raise CheckpointError(
            f"{file.path}: {source.name} of the {what} holds NaN or infinite numbers (as {dtype}); the file is damaged, "
            "its training diverged, or its numbers do not fit the dtype"
        )
    return tensor
