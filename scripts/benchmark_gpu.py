"""The benchmark of a GPU: all models and stages, compiled and not, against diffusers and the device's limits.

    python scripts/benchmark_gpu.py --out bench-h100

It is `latentdiff bench` with settings for a GPU; every option of that can be given, and both run on a CPU too.
"""

import sys

from latentdiff.cli import main

GPU = ["--models", "sd15", "sd21", "sdxl", "--steps", "20", "--mlperf", "--sustained", "60"]

if __name__ == "__main__":
    sys.exit(main(["bench", *GPU, *sys.argv[1:]]))
