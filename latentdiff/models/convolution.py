"""Convolutions as the processor at hand does them fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentdiff.models import fused, onednn, winograd


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, the same weights and function, faster where nothing is to be learnt: on a GPU without torch's pass for the bias
    (`on_gpu`), and on a CPU with additions inside, without repeating the pixels of a map that is enlarged first (`doubled`), with
    fewer multiplications in float32 (`winograd.py`), and in two other ways for small maps.

    Light weights are ordered once for each shape of the input and kept so beside themselves: the same kernel (and the same bits,
    wherever we looked), in 0.4 to 0.9 of the time on maps of 4×4 to 16×16; what `doubled` needs is kept too. Heavy ones, which one
    would not keep twice, are multiplied as they are, in one matrix product, if that is faster: with 1280 channels on 8×8, 48
    GFLOP/s on a core of Zen 3 become 78; on two cores with AMX, 2560 channels take 6 ms and not 29.
    """

    light: ClassVar[int] = 1 << 20  # weights, at most, that are ordered once
    packs: ClassVar[int] = 4096  # positions, over all pictures of the batch, up to which that is worth it
    heavy: ClassVar[int] = 1 << 22  # weights, at least, for a product
    products: ClassVar[int] = 512  # positions up to which that is faster

    _ordered: dict[Any, tuple[Any, Tensor]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ordered = {}  # shape of the input, and what for -> (state of the weights, they in the kernel's order)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ordered": {}}  # such an order can be neither copied nor stored

    def forward(self, input: Float[Tensor, "b c h w"], *, biased: bool = True) -> Float[Tensor, "b out h2 w2"]:
        """biased: with its bias; False only where `fused.splits` says so, which adds it elsewhere."""
        if fused.fuses(input) and fused.is_last(input) and self.padding_mode == "zeros":
            return self.on_gpu(input, self.bias if biased else None)
        if self.takes(input):
            return self.on_cpu(input)
        if torch.is_grad_enabled():
            self._ordered = {}  # what trains is not kept: a fused optimiser changes weights without counting it
        return super().forward(input)

    def on_gpu(self, x: Float[Tensor, "b c h w"], bias: Tensor | None) -> Float[Tensor, "b out h2 w2"]:
        """torch adds a bias in a pass of its own, which is slow; with 1×1 weights, it is a part of the matrix product."""
        if self.is_linear():
            return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), bias).permute(0, 3, 1, 2)
        y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        if bias is None:
            return y
        return fused.kernels().add_(y, bias) if fused.is_last(y) else y + bias[:, None, None]

    def takes(self, x: Tensor) -> bool:
        """Whether this is for `on_cpu`. Not maps of one pixel or one channel: torch 2.10 fails where an order of memory
        may be taken for another."""
        return (
            onednn.works_on(x)
            and (x.dtype, x.shape[1]) == (self.weight.dtype, self.weight.shape[1])  # or torch tells
            and fused.is_last(x)
            and not x.is_contiguous()
            and (self.groups, self.dilation, self.padding_mode) == (1, (1, 1), "zeros")
            and not isinstance(self.padding, str)
        )

    def on_cpu(
        self,
        x: Float[Tensor, "b c h w"],
        shift: Float[Tensor, " out"] | None = None,
        other: Float[Tensor, "b out h2 w2"] | None = None,
    ) -> Float[Tensor, "b out h2 w2"]:
        """The convolution with `shift` added to its bias, and `other` to its result."""
        bias = self.bias if shift is None else shift if self.bias is None else self.bias + shift
        positions = len(x) * x.shape[-2] * x.shape[-1]
        if self.is_faster_as_product(x, positions):
            return product(x, self.weight, bias, other)
        if self.is_plain() and winograd.pays(x, self.weight):
            return winograd.convolution(x, self.weight, bias, other)
        where = self.padding, self.stride, self.dilation, self.groups
        light = self.weight.numel() <= self.light and positions <= self.packs and not self.weight.is_inference()
        if self.is_linear() and x.dtype == torch.bfloat16:
            # Without the 5 us that a convolution begins with. The same bits of up to 512 channels; more are added up in another
            # order, by which (Zen 5) one number in 2,000 or fewer is rounded otherwise, no further from the true ones.
            weight = self.ordered_linear(positions) if light else self.weight.flatten(1)
            add = None if other is None else other.permute(0, 2, 3, 1)
            return onednn.linear(x.permute(0, 2, 3, 1), weight, bias, add=add).permute(0, 3, 1, 2)
        return onednn.convolution(x, self.ordered(x.shape, *where) if light else self.weight, bias, *where, add=other)

    def is_plain(self) -> bool:
        """Whether it is 3×3 and leaves the size as it is, where `takes` says that `on_cpu` does it."""
        return (self.kernel_size, self.stride, self.padding) == ((3, 3), (1, 1), (1, 1))

    def is_linear(self) -> bool:
        """Whether each position's outputs are of its own inputs alone."""
        return (self.kernel_size, self.stride, self.padding, self.groups) == ((1, 1), (1, 1), (0, 0), 1)

    def ordered(self, shape: torch.Size, *where: object) -> Tensor:
        """The weights in the kernel's order."""
        return self.kept(shape, lambda weight: onednn.ordered(weight, shape, *where))

    def ordered_linear(self, rows: int) -> Tensor:
        """The same for inputs of so many rows, of a convolution that `is_linear`."""
        return self.kept(rows, lambda weight: onednn.ordered_linear(weight.flatten(1), rows))

    def kept(self, key: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
        """What `make` makes of the weights, for the last four keys, or the last one of weights that are not light; anew if they
        changed.

        torch counts changes in place, but for those through `.data`: a sample tells of them.
        """
        weight = self.weight.detach()
        state, found = (weight.data_ptr(), self.weight._version, sample(weight).tolist()), self._ordered.get(key)
        if found is None or found[0] != state:
            found, last = (state, make(weight)), [*self._ordered.items()][-3:] if weight.numel() <= self.light else []
            self._ordered = dict(last) | {key: found}
        return found[1]

    def doubles(self) -> bool:
        """Whether `doubled` stands for this convolution, where `takes` says that `on_cpu` does. Not for heavy weights: what it
        keeps is nearly twice as large."""
        light = self.weight.numel() < self.heavy
        return self.is_plain() and light and onednn.doubles(self.weight.dtype) and not self.weight.is_inference()

    def doubled(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out 2h 2w"]:
        """The convolution of x with each pixel repeated in both directions, without making that: 4/9 of the arithmetic."""
        weight = self.kept((x.shape, "doubled"), lambda weight: onednn.ordered_transposed(for_doubled(weight), x.shape))
        return onednn.transposed_convolution(x, weight, self.bias)

    def is_faster_as_product(self, x: Tensor, positions: int) -> bool:
        """Measured in float32 with AVX2, in bfloat16 with AMX; with AVX-512 alone, torch's products are the slower ones."""
        if positions > self.products or self.weight.numel() < self.heavy or not self.is_plain():
            return False
        if x.dtype == torch.bfloat16:
            return onednn.AMX
        return torch.backends.cpu.get_cpu_capability() == "AVX2"


def for_doubled(weight: Float[Tensor, "out c 3 3"]) -> Float[Tensor, "c out 4 4"]:
    """Weights for a transposed convolution, stride 2 and padding 1, that does what a convolution by these does to the map with each
    pixel repeated.

    Of weights a, b, c in a row, the left of two new pixels is a times their pixel's left neighbour plus (b + c) times itself, the
    right one (a + b) times itself plus c times its right neighbour. So a pixel gives to four new ones, the first of them its left
    neighbour's: c, b + c, a + b, a. (Aitken et al. 2017, arXiv 1707.02937, compare such convolutions.)
    """
    y = weight.float()
    for dim in (2, 3):
        a, b, c = y.unbind(dim)
        y = torch.stack([c, b + c, a + b, a], dim)
    return y.to(weight.dtype).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def sample(weight: Tensor) -> Float[Tensor, " n"]:
    """Sixteen of the weights, or all if there are fewer: a view of them."""
    n = weight.numel()
    return weight.detach().as_strided((min(n, 16),), (max(1, n // 16),))


def product(
    x: Float[Tensor, "b c h w"], weight: Float[Tensor, "out c 3 3"], bias: Tensor | None, other: Tensor | None = None
) -> Float[Tensor, "b out h w"]:
    """Each position's nine neighbours side by side, times the weights: one copy of x, none of channels-last weights."""
    b, c, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  #                         [b, h + 2, w + 2, c]
    picture, row, place, _ = padded.stride()
    rows = padded.as_strided((b, h, w, 3, 3 * c), (picture, row, place, row, 1))  #      three neighbours of a row lie side by side
    y = F.linear(rows.reshape(b * h * w, 9 * c), weight.permute(0, 2, 3, 1).flatten(1), bias)
    y = y.view(b, h, w, -1).permute(0, 3, 1, 2)  #                                       channels-last
    return y if other is None else y.add_(other)
