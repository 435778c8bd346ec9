"""What this machine and this installation are, and what does not fit: `latentdiff doctor`."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from latentdiff import __version__
from latentdiff.checkpoints.io import read_folder
from latentdiff.loading import best_device, best_dtype, embedded
from latentdiff.models.onednn import multiplies_int8

NEEDED = ("torch", "transformers", "open_clip_torch", "einops", "safetensors", "pillow", "tokenizers")
OPTIONAL = {"accelerate": "train", "resvg-py": "train", "tensorboard": "tensorboard", "matplotlib": "eval", "diffusers": "test"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `ok` is False where something has to be done, and `text` then says what."""

    name: str
    text: str
    ok: bool = True


def examine() -> Iterator[Finding]:
    """Versions, devices, the choices made from them, and whether the parts fit. Nothing is changed; no network is used."""
    yield Finding("latentdiff", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield from map(package, NEEDED)
    yield torchvision_fit(installed("torch"), installed("torchvision"), required_torch(), torchvision_error())
    absent = [f"{name} ({extra})" for name, extra in OPTIONAL.items() if installed(name) is None]
    yield Finding("extras", f"not installed: {', '.join(absent)}" if absent else "all installed")
    yield from devices()
    yield choice()
    yield threads()
    yield weights()


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package(name: str) -> Finding:
    version = installed(name)
    return Finding(name, version or f"missing: pip install {name}", version is not None)


def required_torch() -> str:
    """The versions of torch that the installed torchvision says it needs, such as ==2.10.0; empty where it says nothing."""
    try:
        wanted = [Requirement(line) for line in metadata.requires("torchvision") or []]
    except metadata.PackageNotFoundError:
        return ""
    return next((str(r.specifier) for r in wanted if r.name == "torch"), "")


def torchvision_error() -> str | None:
    """Why torchvision cannot be imported. A build for another torch fails here: its operators do not exist."""
    try:
        import torchvision  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except Exception as error:  # whatever a foreign binary raises
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return None


def torchvision_fit(torch: str | None, torchvision: str | None, wanted: str, error: str | None) -> Finding:
    if torchvision is None:
        return Finding("torchvision", "missing: open_clip needs it for training and scoring; pictures are made without it")
    what = f"{torchvision}, for torch {wanted or 'of any version'}; torch is {torch}"
    if error is None and SpecifierSet(wanted).contains(torch or "0", prereleases=True):
        return Finding("torchvision", f"{what}: they fit")
    why = f" ({error})" if error else ""
    advice = "pip install --upgrade --force-reinstall torchvision, from where torch came from"
    return Finding("torchvision", f"{what}: they do not fit{why}. {advice}", ok=False)


def devices() -> Iterator[Finding]:
    for i in range(torch.cuda.device_count()):
        info = torch.cuda.get_device_properties(i)
        yield Finding(f"cuda:{i}", f"{info.name}, {info.total_memory / 2**30:.1f} GiB, compute {info.major}.{info.minor}")
    if torch.backends.mps.is_available():
        yield Finding("mps", "Apple GPU")
    what = f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    yield Finding("cpu", f"{what}, products in 8 bits (--int8)" if multiplies_int8(torch.float32) else what)


def choice() -> Finding:
    device = best_device()
    dtype = str(best_dtype(device)).removeprefix("torch.")
    why = {
        "cpu float32": "no GPU that torch can use; this CPU has no instructions for bfloat16 (AVX512-BF16 or AMX)",
        "cpu bfloat16": "no GPU that torch can use; this CPU has instructions for bfloat16; float32 is slower and exact",
        "cuda bfloat16": "half the memory and several times the speed of float32, with its range",
        "cuda float16": "half the memory and more speed; what overflows is computed again in float32",
        "mps float16": "half the memory; what overflows is computed again in float32",
    }
    return Finding("choice", f"{device.type} in {dtype}: {why[f'{device.type} {dtype}']}")


def threads() -> Finding:
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    used = torch.get_num_threads()
    if used > mine:
        return Finding("threads", f"torch uses {used} on {mine} CPUs: set OMP_NUM_THREADS={mine}", ok=False)
    return Finding("threads", f"torch uses {used} of {mine} CPUs")


def weights() -> Finding:
    try:
        folder = embedded()
        spec, _ = read_folder(folder)
    except (OSError, ValueError) as error:
        return Finding("weights", str(error), ok=False)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return Finding("weights", f"embedded model in {folder}: {spec.size}×{spec.size} pixels, {size / 2**20:.1f} MiB")
