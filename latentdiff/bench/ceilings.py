"""The machine's own limits: the datasheet, a big matrix product, and the best kernel for each product of a network by itself."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentdiff.bench.timing import clocked
from latentdiff.bench.work import Conv, Linear, Product
from latentdiff.models.attention import blocked, filled_up
from latentdiff.models.convolution import Conv2d
from latentdiff.models.convolution import product as as_product
from latentdiff.models.graphs import Capture

# Dense bfloat16 and float16 tensor TFLOP/s of NVIDIA's datasheets, by what the driver calls the device.
DATASHEET = {
    "H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "B200": 2250.0, "A100": 311.9, "L40S": 362.1, "L4": 121.0, "A10": 125.0,
    "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


def datasheet(device: torch.device) -> float | None:
    """FLOP/s in 16 bits as the maker states them; None where unknown, as for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * value for key, value in DATASHEET.items() if re.search(rf"\b{key}\b", name)), None)


@torch.no_grad()
def big_product(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """FLOP/s of the best square matrix product; sides grow while one takes less than a third of the time given."""
    best, n = 0.0, 1024
    while n <= 16384:
        a = torch.randn(n, n, device=device).to(dtype)
        taken = best_time(lambda a=a: a @ a.T, device, seconds / 3)
        best = max(best, 2 * n**3 / taken)
        if taken * 8 > seconds / 3:
            break
        n *= 2
    return best


def best_time(run: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    """The shortest of several runs; on CUDA of recorded ones, since to start a kernel can take longer than it runs."""
    times = 10 if device.type == "cuda" else 1
    with torch.cuda.device(device if device.type == "cuda" else -1):
        again: Callable[[], object] = Capture()(partial(repeat, run, times))[0] if device.type == "cuda" else run
        return shortest(again, device, seconds) / times


def shortest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the shortest of several runs in a row, after one that warms up."""
    clocked(run, device)
    start, best, done = time.perf_counter(), float("inf"), 0
    while done < 2 or (done < 20 and time.perf_counter() - start < seconds):
        best = min(best, clocked(run, device))
        done += 1
    return best


def repeat(run: Callable[[], Tensor], times: int) -> Tensor:
    for _ in range(times - 1):
        run()
    return run()


@torch.no_grad()
def best_kernels(work: Counter[Product], device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> dict[Product, float]:
    """For each product, the seconds of the fastest way to do it that this torch has, by itself and warm."""
    return {product: min(best_time(run, device, seconds) for run in ways(product, device, dtype)) for product in work}


def ways(product: Product, device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], Tensor]]:
    """Different kernels for the same product, on random numbers."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    if isinstance(product, Conv):
        x, w = random(*product.shape), random(product.out, product.shape[1], product.kernel, product.kernel)
        for layout in (torch.channels_last, torch.contiguous_format):
            pair = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
            yield lambda pair=pair: F.conv2d(*pair, stride=product.stride, padding=product.padding)
        if device.type == "cpu":
            conv = Conv2d(w.shape[1], w.shape[0], product.kernel, product.stride, product.padding, bias=False)
            conv = conv.requires_grad_(False).to(dtype, memory_format=torch.channels_last)  # pyright: ignore
            yield partial(conv, x.contiguous(memory_format=torch.channels_last))
            if product.doubled and conv.doubles():
                yield partial(conv.doubled, x[..., ::2, ::2].contiguous(memory_format=torch.channels_last))
        if device.type == "cpu" and (product.kernel, product.stride, product.padding) == (3, 1, 1):
            last = w.contiguous(memory_format=torch.channels_last)
            yield lambda: as_product(x, last, None)
    elif isinstance(product, Linear):
        x, w = random(product.rows, product.inputs), random(product.out, product.inputs)
        yield lambda: F.linear(x, w)
        pixels, kernel = x.T[None, :, None].contiguous(memory_format=torch.channels_last), w[:, :, None, None]
        yield lambda: F.conv2d(pixels, kernel)
    else:
        b, h, n, d = product.shape
        q, k, v = (random(b, rows, h, d).transpose(1, 2) for rows in (n, product.keys, product.keys))
        yield lambda: F.scaled_dot_product_attention(q, k, v)
        if device.type == "cuda":
            yield from (partial(attention, backend, q, k, v) for backend in backends(q, k, v))
        narrow, wide = device.type == "cpu" and dtype == torch.bfloat16, device.type == "cuda" and dtype.itemsize == 2 and d > 256
        if (narrow or wide) and product.keys >= 128:
            yield lambda: blocked(q, k, v)
        if narrow and product.keys % 16:
            yield lambda: filled_up(q, k, v)


def attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def backends(q: Tensor, k: Tensor, v: Tensor) -> Iterator[SDPBackend]:
    """Those of torch's that take this shape here; which one it takes by itself is its guess."""
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            attention(backend, q, k, v)
        except RuntimeError:
            continue
        yield backend


def ceiling(work: Counter[Product], kernels: dict[Product, float]) -> float:
    """Seconds of all products at their best, one after the other, with nothing between them."""
    return sum(kernels[product] * times for product, times in work.items())
