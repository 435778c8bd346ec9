"""The benchmark of a GPU: all models and stages, compiled and not, against diffusers and the device's limits.

    python scripts/benchmark_gpu.py --out bench-h100

It is `latentdiff bench` with settings for a GPU in the place of those that are not given, and both run on a CPU too. To compile
takes most of an hour; in parts, this library as it is against diffusers compiled (some four minutes for SD 1.5, more for SDXL):

    python scripts/benchmark_gpu.py --models sd15 --stages step decode picture --batches 1 --seconds 4 --no-compile-own --no-climb \
        --no-mlperf --sustained 0
"""

import sys
from collections.abc import Sequence

from latentdiff.cli import main

SETTINGS = {"models": ("sd15", "sd21", "sdxl"), "steps": ("20",), "mlperf": (), "sustained": ("60",)}


def arguments(given: Sequence[str]) -> list[str]:
    """What is given, and the settings that it says nothing of."""
    named = {token.partition("=")[0].removeprefix("--").removeprefix("no-") for token in given if token.startswith("--")}
    return [*given, *(part for name, values in SETTINGS.items() if name not in named for part in (f"--{name}", *values))]


if __name__ == "__main__":
    sys.argv[1:] = ["bench", *arguments(sys.argv[1:])]  # which the report shows as its command
    main()
