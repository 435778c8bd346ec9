"""What a measurement was taken on, and the memory that it took."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from latentdiff.doctor import installed

PACKAGES = ("torch", "triton", "diffusers", "transformers", "stable-fast", "latentdiff")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, clocks, power, threads and versions, now."""
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_mhz": cpu_facts().get("cpu MHz"),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "device": str(device),
        "versions": {name: version for name in PACKAGES if (version := installed(name))},
        "commit": commit(),
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "gpu_state": gpu_state()}
    return facts


def cpu_name() -> str:
    """Its name, family and model: a virtual machine often says no more of the name than the maker's."""
    facts = cpu_facts()
    if not facts:
        return platform.processor() or platform.machine()
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def cpu_facts() -> dict[str, str]:
    """What Linux says of the first processor, its clock now included; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def gpu_state() -> str | None:
    """Driver, clocks, power and temperature as nvidia-smi tells them; only read."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """The commit of the checkout that this runs from, with a + if files were changed since."""
    here = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=20, check=True)
        changed = subprocess.run([*here, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def peak_memory(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes held at most during a run: on CUDA by torch, on a CPU by the whole process; None where that cannot be read.

    On CUDA what torch has reserved: what lies between the kernels of a recording is allocated only while it is made.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_reserved(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark anew
        run()
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
