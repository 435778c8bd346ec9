"""Loading a true-size Stable Diffusion 1.5 from one file: time and peak memory, ours beside diffusers' single-file loading.

Random weights of the true shapes are written once; then the loaders take turns, each in a process of its own, so that neither
profits from the other's warm file cache. Time runs from the call to the moment when every weight has been read (a maximum over
each), since a memory map that nobody has looked at yet is no loaded model; imports are not counted. Memory is the process's peak
resident set over what it was before the call, file pages that are mapped included.

    python scripts/benchmark_load.py --rounds 5
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.bench.subjects import random_parts
from latentdiff.checkpoints import configs, tokenizer
from latentdiff.checkpoints.families import SD15
from latentdiff.checkpoints.files import read_header, write_json, write_safetensors
from latentdiff.checkpoints.save import metadata, single_tensors


def write_model(folder: Path, dtype: torch.dtype) -> None:
    """`model.safetensors` in the original naming, and `layout/`, the configurations that diffusers wants beside it."""
    parts = replace(random_parts(SD15), tokenizers=(tokenizer.standard(),), title="random")
    for network in (parts.unet, parts.vae, *parts.text_encoders):
        network.to(dtype)
    write_safetensors(folder / "model.safetensors", single_tensors(parts), metadata(parts))
    layout = folder / "layout"
    write_json(layout / "model_index.json", configs.index_json(SD15))
    write_json(layout / "unet" / "config.json", configs.unet_json(SD15.unet))
    write_json(layout / "vae" / "config.json", configs.vae_json(SD15.vae))
    write_json(layout / "text_encoder" / "config.json", configs.tower_json(SD15.towers[0]))
    write_json(layout / "scheduler" / "scheduler_config.json", configs.scheduler_json(SD15))
    tokenizer.write(layout / "tokenizer", tokenizer.standard(), SD15.towers[0].pad)


# ------------------------------------------------------------------------------------------------ in a process of its own


def ours(folder: Path) -> Callable[[], Iterable[nn.Module]]:
    from latentdiff.checkpoints.io import load_parts

    def load() -> Iterable[nn.Module]:
        parts = load_parts(folder / "model.safetensors")
        return parts.unet, parts.vae, *parts.text_encoders

    return load


def ready(folder: Path) -> Callable[[], Iterable[nn.Module]]:
    """The whole of `latentdiff.load`: also laid out for speed, in the file's dtype."""
    from latentdiff.loading import load as load_pipeline

    dtype = stored(folder)

    def load() -> Iterable[nn.Module]:
        pipe = load_pipeline(folder / "model.safetensors", device="cpu", dtype=dtype)
        return pipe.unet, pipe.vae, *pipe.text.towers

    return load


def theirs(folder: Path) -> Callable[[], Iterable[nn.Module]]:
    import transformers  # noqa: F401  (its import is not part of loading)
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    dtype = stored(folder)

    def load() -> Iterable[nn.Module]:
        pipe = StableDiffusionPipeline.from_single_file(
            folder / "model.safetensors", config=str(folder / "layout"), local_files_only=True, torch_dtype=dtype
        )
        return pipe.unet, pipe.vae, pipe.text_encoder

    return load


def stored(folder: Path) -> torch.dtype:
    return read_header(folder / "model.safetensors")[0]["model.diffusion_model.out.2.bias"].dtype


LOADERS = {"latentdiff": ours, "latentdiff.load": ready, "diffusers": theirs}


def resident(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def read_all(tensors: Iterable[Tensor]) -> float:
    return max(float(t.amax()) for t in tensors)


def measure(loader: str, folder: Path) -> dict[str, float]:
    load = LOADERS[loader](folder)
    before = resident("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    modules = load()
    loaded = time.perf_counter()
    read_all(p for module in modules for p in module.parameters())
    return {
        "load": loaded - start,
        "read": time.perf_counter() - start,
        "processor": time.process_time() - processor,
        "memory": resident("VmHWM") - before,
    }


# ------------------------------------------------------------------------------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--folder", type=Path, help="where to keep the random model; a temporary folder by default")
    parser.add_argument("--worker", choices=list(LOADERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if not (folder / "layout" / "tokenizer").exists():
            write_model(folder, getattr(torch, arguments.dtype))
        report(folder, interleaved(folder, arguments.rounds))


def interleaved(folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    for i in range(rounds + 1):
        for name in LOADERS if i % 2 else reversed(LOADERS):
            command = [sys.executable, __file__, "--worker", name, "--folder", str(folder)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            if i > 0:  # the first round warms the file cache
                results[name].append(json.loads(out.splitlines()[-1]))
    return results


def report(folder: Path, results: dict[str, list[dict[str, float]]]) -> None:
    size = (folder / "model.safetensors").stat().st_size
    print(f"SD 1.5, {size / 2**30:.2f} GiB in one file; medians of {len(results['diffusers'])} interleaved rounds")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"{'':<16} {'load':>8} {'and read':>9} {'of diffusers':>13} {'processor':>10} {'peak memory':>12} {'of the file':>12}")
    middle = {n: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for n, runs in results.items()}
    for name, m in middle.items():
        share, memory = m["read"] / middle["diffusers"]["read"], m["memory"] / size
        times = f"{m['load']:7.2f}s {m['read']:8.2f}s {share:12.2f}x {m['processor']:9.2f}s"
        print(f"{name:<16} {times} {m['memory'] / 2**30:8.2f} GiB {memory:11.2f}x")


if __name__ == "__main__":
    main()
