"""From a path to a pipeline on a device: `latentdiff.load`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.adapted import Files, adapted, pairs
from latentdiff.checkpoints.families import Prediction
from latentdiff.checkpoints.io import Parts, load_parts
from latentdiff.conditioning import TextEncoder
from latentdiff.diffusion.denoiser import Network
from latentdiff.models.attention import Attention
from latentdiff.models.caching import Cached
from latentdiff.models.float8 import quantise
from latentdiff.models.graphs import Graphed, GraphedDecoder
from latentdiff.models.narrow import Width, narrow, quantise_int8
from latentdiff.models.onednn import multiplies_bfloat16
from latentdiff.models.recorded import Recorded, RecordedDecoder, is_small
from latentdiff.models.unet import UNet
from latentdiff.pipeline import Pipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPES = 64  # that a network may be compiled for


@torch.inference_mode(False)  # weights made in it go other ways, to other pixels
def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    prediction: Prediction | None = None,
    allow_pickle: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    ema: bool = False,
    lora: Files[float] = (),
    embeddings: Files[str | None] = (),
    compile: bool = False,
    float8: bool = False,
    int8: bool = False,
    weights: Width | None = None,
    cache: int = 1,
) -> Pipeline:
    """A model ready to make pictures.

    path: a file, a folder or a hub id (`owner/name`); None is the embedded model. Only a hub id uses the network.
    device: None takes CUDA, then MPS, then the CPU. dtype: None is what the device does best (`best_dtype`).
    prediction, allow_pickle, variant, revision, vae, ema: as in `checkpoints.io.load_parts`.
    lora, embeddings: files, as in `adapt`. compile: U-Net and decoder with torch.compile: the same picture, slow to start and then
    faster.
    float8: the U-Net's linear layers in 8 bits, on NVIDIA GPUs of 2022 and later: nearly the same picture.
    int8: the U-Net's products in 8 bits, on CPUs with VNNI or AMX: faster where it is large, weights in half of bfloat16's
    memory, nearly the same picture. Pictures that share a call of the network (by `batch`) move each other as much.
    weights: "int8" or "bfloat16": the U-Net's kept so on a CPU and widened where used: less memory, nearly the same picture.
    cache: the deep features of a step serve so many steps (Ma et al., arXiv 2312.00858): 2 or 3 is faster, and another picture.
    Errors: FileNotFoundError; ValueError for an unknown device or dtype and for options that do not fit them; CheckpointError for a
    file that cannot be used.
    """
    place = best_device() if device is None else checked_device(device)
    kind = best_dtype(place) if dtype is None else checked_dtype(dtype)
    check(place, kind, compile=compile, float8=float8, int8=int8, weights=weights, cache=cache)
    pairs("lora", lora, 1.0)  # this and the next for their errors, before a model is read
    pairs("embeddings", embeddings, None)
    parts = load_parts(
        embedded() if path is None else path,
        prediction=prediction,
        allow_pickle=allow_pickle,
        variant=variant,
        revision=revision,
        vae=vae,
        ema=ema,
    )
    name = parts.title if path else "embedded"
    other = {"vae": vae and Path(vae).stem, "prediction": prediction}
    name = " + ".join([name, *(f"{key}:{value}" for key, value in other.items() if value)])
    parts = replace(parts, title=name)
    parts = adapted(parts, lora=lora, embeddings=embeddings, allow_pickle=allow_pickle)
    return ready(parts, place, kind, compile=compile, float8=float8, int8=int8, weights=weights, cache=cache)


def ready(
    parts: Parts,
    device: torch.device,
    dtype: torch.dtype,
    *,
    compile: bool = False,
    float8: bool = False,
    int8: bool = False,
    weights: Width | None = None,
    cache: int = 1,
) -> Pipeline:
    """The parts on a device, in a dtype, laid out as convolutions are fastest there: channels last."""
    check(device, dtype, compile=compile, float8=float8, int8=int8, weights=weights, cache=cache)
    upcast = dtype == torch.float16 and getattr(parts.spec.vae, "force_upcast", False)  # SDXL's overflows in float16 alone
    unet = parts.unet.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    vae = parts.vae.to(device, torch.float32 if upcast else dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if float8:
        quantise(unet)
    if weights is not None:
        narrow(unet, weights)
    if int8:
        quantise_int8(unet)
    small = is_small(unet)
    if not (float8 or int8 or weights):
        join_attentions(unet)
    if compile:
        vae.decoder.compile(**compile_options(device))
    return Pipeline(
        unet=unet,
        vae=vae,
        text=TextEncoder(tuple(t.to(device, dtype) for t in parts.text_encoders), parts.tokenizers, parts.spec),
        spec=parts.spec,
        title=parts.title,
        options=tuple(in_words(float8=float8, int8=int8, weights=weights, cache=cache)),
        network=Cached(unet, cache) if cache > 1 else network(unet, compile),
        decoder=GraphedDecoder(vae) if device.type == "cuda" else RecordedDecoder(vae) if small and not compile else None,
    )


def in_words(*, float8: bool, int8: bool, weights: Width | None, cache: int) -> Iterator[str]:
    """The options that move a picture, in words."""
    yield from ["float8"] * float8 + ["int8"] * int8 + [f"weights in {weights}"] * (weights is not None)
    yield from [f"cache {cache}"] * (cache > 1)


def check(
    device: torch.device, dtype: torch.dtype, *, compile: bool, float8: bool, int8: bool, weights: Width | None, cache: int
) -> None:
    """Errors: ValueError for options of `ready` that do not fit the place or each other, before a model is read."""
    if type(cache) is not int or cache < 1 or (compile and cache > 1):
        raise ValueError(f"cache must be at least 1, and 1 with compile=True, in whole numbers, got {cache!r}")
    small: Any = torch.nn.LayerNorm(1, device=device, dtype=dtype)  # in a U-Net's place, of which place and dtype are looked at
    if float8:
        quantise(small)
    if int8 and (compile or float8 or weights is not None):
        raise ValueError(f"int8 goes without compile, float8 and weights, got {compile=}, {float8=} and {weights=}")
    if int8:
        quantise_int8(small)
    if weights is not None:
        narrow(small, weights)


def join_attentions(unet: UNet) -> None:
    """One product for the queries, keys and values of a self-attention, where to start three counts: on CUDA, in small networks.

    Not under LoRAs that are not merged, where it would go unused: the weights stay those of the network that they are shared with.
    """
    if next(unet.parameters()).device.type == "cuda" or is_small(unet):
        for attention in (m for m in unet.modules() if isinstance(m, Attention) and not m.cross):
            if not any(layer._forward_hooks for layer in (attention.to_q, attention.to_k, attention.to_v)):
                attention.join()


def network(unet: UNet, compile: bool) -> Network | None:
    """What runs in the U-Net's place: compiled, or recorded, on CUDA both; None where nothing is to be gained."""
    device = next(unet.parameters()).device
    runs = torch.compile(unet, **compile_options(device)) if compile else unet
    if device.type == "cuda":
        return Graphed(runs)  # type: ignore[arg-type]
    if compile:
        return runs  # type: ignore[return-value]
    return Recorded(unet) if is_small(unet) else None


def compile_options(device: torch.device) -> dict[str, Any]:
    """Whole, for one shape at a time; on CUDA each kernel is chosen by trial, and recording is ours.

    Sizes, batches and guidance make many shapes: torch's limit of 8, at which it ends in an error, is raised.
    """
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": mode}
    if "recompile_limit" in signature(torch.compile).parameters:
        return options | {"recompile_limit": SHAPES}
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, SHAPES)  # older ones have this alone
    return options


def embedded() -> Path:
    """The folder of the embedded model: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    places = (package / "weights", package.parent / "weights")
    for place in places:
        if (place / "model_index.json").is_file():
            return place
    raise FileNotFoundError(
        f"the embedded model is neither in {places[0]} nor in {places[1]}: install the package again, or name a model: load(path)"
    )


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """What the device computes fastest and safely: bfloat16 where its processor multiplies in it, or in 16 bits a GPU's own.

    Without instructions of their own, CPUs take longer for 16 bits than for 32. bfloat16 has float32's range; float16 has not.
    """
    if device.type == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    recent = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if recent else torch.float16


def checked_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"device must be cpu, cuda, mps or another that this torch has, got {device!r} ({first})") from None
    return place


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    for name, found in DTYPES.items():
        if dtype in (name, found):
            return found
    raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
