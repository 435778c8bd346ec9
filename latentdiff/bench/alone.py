"""What only a process of its own can tell: the peak of memory, and the time from nothing to the first picture.

`python -m latentdiff.bench.alone memory sd15 "latentdiff" bfloat16 cpu` prints bytes. Nothing else of the benchmark is imported
before the work, so that what a process costs is the contestant's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THEIRS = """
import sys
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None, torch_dtype=torch.float32, local_files_only=True)
pipe("a cat", num_inference_steps=int(sys.argv[3]), guidance_scale=7.5).images[0].save(sys.argv[2])
"""


def memory(model: str, who: str, dtype: str, device: str) -> int | None:
    """Bytes that a process held at most during a step and a decode, its model among them; None where that cannot be read."""
    command = [sys.executable, "-m", "latentdiff.bench.alone", "memory", model, who, dtype, device]
    return json.loads(run(command).splitlines()[-1])


def cold_start(folder: Path, whose: str, steps: int = 20) -> float:
    """Seconds from starting a program to a picture on disk: `latentdiff generate`, or a script with diffusers."""
    with tempfile.TemporaryDirectory() as place:
        out = str(Path(place) / "cat.png")
        ours = ["-m", "latentdiff.cli", "generate", "a cat", "--steps", str(steps), "--guidance", "7.5", "--out", out, "--quiet"]
        start = time.perf_counter()
        run([sys.executable, *(ours if whose == "latentdiff" else ["-c", THEIRS, str(folder), out, str(steps)])])
        taken = time.perf_counter() - start
        assert Path(out).stat().st_size > 0
    return taken


def run(command: list[str]) -> str:
    """What a program prints. Errors: RuntimeError with what it said last."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _memory(model: str, who: str, dtype: str, where: str) -> None:
    import torch

    from latentdiff.bench.contestants import Peer, ours
    from latentdiff.bench.machine import peak_memory
    from latentdiff.bench.subjects import subject
    from latentdiff.loading import ready

    kind, device = getattr(torch, dtype), torch.device(where)
    parts = subject(model, device)
    if who == "latentdiff":
        contestant = ours(ready(parts, device, kind), who)
    else:
        contestant = Peer(parts, device, kind, name=who, channels_last=kind != torch.float32).contestant()
    del parts
    step, decode = contestant.step(1), contestant.decode(1)
    print(json.dumps(peak_memory(lambda: (step(), step(), decode()), device)))


if __name__ == "__main__":
    _memory(*sys.argv[2:])
