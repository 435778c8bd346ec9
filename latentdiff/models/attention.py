"""Attention: one function, `sdpa`, which every attention of the U-Net reaches through the `attend` argument.

Whoever wants to look at or change attention (prompt-to-prompt, a faster kernel) passes another `attend` to
`UNet.forward`; it is handed down explicitly, so two threads may use one network in different ways.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentdiff.models import onednn
from latentdiff.models.convolution import Conv2d
from latentdiff.models.fused import conv_add, feed_forward, group_norm, layer_norm, linear_add, linear_add_norm


@dataclass(frozen=True)
class Site:
    """Where an attention sits: its module path in the U-Net, and whether its keys come from the prompt."""

    name: str
    cross: bool


Attend = Callable[[Tensor, Tensor, Tensor, Site], Tensor]
"""(q [b, h, n, d], k [b, h, m, d], v [b, h, m, d], site) -> [b, h, n, d]"""

KeysValues = tuple[Tensor, Tensor]
"""The keys and the values of one attention, each [b, h, m, d]."""


def sdpa(
    q: Float[Tensor, "b h n d"], k: Float[Tensor, "b h m d"], v: Float[Tensor, "b h m d"], site: Site
) -> Float[Tensor, "b h n d"]:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, arXiv 1706.03762, eq. 1); the same at every site."""
    return dot_product_attention(q, k, v)


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own, but where that is slow.

    It is so in bfloat16 over many keys on a CPU without AMX (1.4 to 1.7 times the time of `blocked`; with it, half); with AMX, over
    keys that do not fill tiles, as a prompt's 77 (twice that of 80); and on a GPU with a head as wide as the VAE's, which its fast
    kernels do not take: 150 of an H200's 800 TFLOP/s.
    """
    if torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v)
    in_tiles = q.device.type == "cpu" and q.dtype == torch.bfloat16 and onednn.AMX
    if in_tiles and q.shape[-2] >= 256 and k.shape[-2] < 512 and k.shape[-2] % 16:
        return filled_up(q, k, v)
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16 and not in_tiles
    on_gpu = q.is_cuda and q.dtype.itemsize == 2 and q.shape[-1] > 256
    if (on_cpu or on_gpu) and k.shape[-2] >= 512:
        return blocked(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def filled_up(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa`'s, with keys to which nobody listens, up to a multiple of 16; q [b, h, n, d], k and v [b, h, m, d]."""
    m = k.shape[-2]
    k, v = (F.pad(x, (0, 0, 0, -m % 16)) for x in (k, v))
    mask = q.new_zeros(k.shape[-2]).index_fill_(0, torch.arange(m, k.shape[-2]), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(q.shape[-2], -1))


@torch.library.custom_op("latentdiff::blocked", mutates_args=())
def blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in three products a block of rows; on a CPU so small that its scores stay in the processor's cache.

    Scores are stored in 16 bits, so a rough maximum c of each row (over 128 keys) is taken off inside the product, where sums
    are still float32: q·k − c = [q, −c] · [k, 1]. What counts, near the maximum, is then small and keeps its digits.
    With heads as wide as the VAE's its error is 1.3 times torch's, with sharp attention 3 times; a whole decode to 384² pixels, by
    SD 1.5's VAE with random weights, is as far from float32 with either (1.2 %).
    """
    (b, h, n, d), m = q.shape, k.shape[-2]
    c = (q @ k[:, :, :: m // 128].mT).amax(-1, keepdim=True)
    q, k = torch.cat([q, -c], -1), torch.cat([k, torch.ones_like(k[..., :1])], -1)
    if q.is_cuda:  # its fast products want widths that eight divides
        q, k = (F.pad(x, (0, -x.shape[-1] % 8)) for x in (q, k))
    v = F.pad(v, (0, -d % 16))  # whole vector registers
    out = q.new_empty(b, n, h, d)
    rows = max(16, (2**27 if q.is_cuda else 2**19 * torch.get_num_threads()) // m)
    for i, j, r in ((i, j, r) for i in range(b) for j in range(h) for r in range(0, n, rows)):
        scores = torch.addmm(q.new_empty(()), q[i, j, r : r + rows], k[i, j].mT, beta=0, alpha=d**-0.5)
        out[i, r : r + rows, j] = (scores.softmax(-1) @ v[i, j])[:, :d]
    return out.transpose(1, 2)


@blocked.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    return q.new_empty(b, n, h, d).transpose(1, 2)


def repeated(x: Tensor, n: int) -> Tensor:
    """x, its rows over again until there are n, in x's layout: `Tensor.repeat` would give up channels-last."""
    return x if len(x) == n else torch.cat([x] * (n // len(x)))


class Attention(nn.Module):
    """Multi-head attention from tokens to themselves or, with `context_dim`, to the prompt."""

    site: Site  # set by the network, which knows the paths of its modules

    def __init__(self, channels: int, heads: int, context_dim: int | None = None):
        super().__init__()
        self.heads = heads
        self.cross = context_dim is not None
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_v = nn.Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        self._joined: tuple[Tensor, ...] | None = None

    def join(self) -> None:
        """Lay the weights of queries, keys and values side by side, so that one product makes all three of the same tokens.

        The layers' own become views of them: nothing is kept twice, and what is written into one is heard.
        """
        with torch.no_grad():
            if self.joined() is not None:
                return  # what was recorded on them must find them where they are
        layers = (self.to_q, self.to_k, self.to_v)
        joined = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]), requires_grad=False)
        for layer, weight in zip(layers, joined.chunk(3), strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        self._joined = joined, self.to_q.weight, self.to_k.weight, self.to_v.weight

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        super()._apply(*args, **kwargs)
        if self._joined is not None and not self.lie_in(self._joined[0]):  # to another dtype or device they go one by one
            self._joined = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_joined": None}  # and so do copies

    def joined(self) -> Tensor | None:
        """The weights side by side, if they are those of the layers, which are nothing but products to which nobody listens.

        Not where there is something to learn: a gradient would go to them, and not to the layers' own.
        """
        if self._joined is None or torch.is_grad_enabled():
            return None
        whole, *weights = self._joined
        layers = (self.to_q, self.to_k, self.to_v)
        for layer, weight in zip(layers, weights, strict=True):
            if type(layer) is not nn.Linear or layer.weight is not weight or layer.bias is not None or onednn.listened_to(layer):
                return None
        return whole if torch.compiler.is_compiling() or self.lie_in(whole) else None

    def lie_in(self, whole: Tensor) -> bool:
        """Whether the layers' weights still are its parts, and not others put in their place through `.data`."""
        start, part = whole.data_ptr(), whole.nbytes // 3  # in numbers, since operations might be recorded
        places = [layer.weight.data_ptr() for layer in (self.to_q, self.to_k, self.to_v)]
        return places == [start, start + part, start + 2 * part]

    def split(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b heads n d"]:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, x: Float[Tensor, "b m c"]) -> KeysValues:
        return self.split(self.to_k(x)), self.split(self.to_v(x))

    def to_itself(self, x: Float[Tensor, "b n c"], attend: Attend) -> Float[Tensor, "b n c"]:
        """Attention of the tokens to themselves, before the last layer."""
        whole = self.joined()
        if whole is not None:
            q, k, v = (self.split(part) for part in F.linear(x, whole).chunk(3, -1))
            return self.mixed(q, k, v, attend)
        return self(x, self.keys_values(x), attend)

    def forward(self, x: Float[Tensor, "b n c"], keys_values: KeysValues, attend: Attend) -> Float[Tensor, "b n c"]:
        """What the heads found, side by side; `to_out` is left to the block, which adds its result to something."""
        return self.mixed(self.split(self.to_q(x)), *keys_values, attend)

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Float[Tensor, "b n c"]:
        return attend(q, k, v, self.site).transpose(1, 2).flatten(2)


class GEGLU(nn.Module):
    """One linear layer for values and their gates (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        # The empty place is the dropout of the training code: the numbers are part of the weights' names.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Float[Tensor, "b n c"], other: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """other + what it makes of x."""
        return feed_forward(self.net[0].proj, self.net[2], x, other)  # type: ignore[arg-type]


class TransformerBlock(nn.Module):
    """Self-attention, attention to the prompt and a feed-forward net, each with a norm before and a residual around."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Float[Tensor, "b n c"], prompt: KeysValues, attend: Attend) -> Float[Tensor, "b n c"]:
        y = self.attn1.to_itself(layer_norm(self.norm1, x), attend)
        x, y = linear_add_norm(self.attn1.to_out[0], self.norm2, y, x)
        n = len(prompt[0])
        x, y = repeated(x, n), repeated(y, n)  # one picture may have several prompts: guidance's two
        x, y = linear_add_norm(self.attn2.to_out[0], self.norm3, self.attn2(y, prompt, attend), x)
        return self.ff(y, x)


class Transformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual around all of them.

    In channels-last memory the tokens are a view of the map. `linear` says whether the projections in and out are
    stored as linear layers (SD 2.x, SDXL) or as 1x1 convolutions (SD 1.x): the same function, other weight shapes.
    """

    first: int  # place of this module's first block among all of the network; set by the network

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int, *, linear: bool, norm_groups: int):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"], prompt: list[KeysValues], attend: Attend) -> Float[Tensor, "b c h w"]:
        """`prompt` holds the keys and values of every block of the network."""
        y = group_norm(self.norm, x)
        y = self.proj_in(tokens(y)) if self.linear else tokens(self.proj_in(y))  # [b, hw, c]
        for i, block in enumerate(self.transformer_blocks, self.first):
            y = block(y, prompt[i], attend)
        x, size = repeated(x, len(y)), x.shape[-2:]
        if self.linear:
            return feature_map(linear_add(self.proj_out, y, tokens(x)), *size)  #  [b, c, h, w]
        return conv_add(self.proj_out, feature_map(y, *size), x)


def tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def feature_map(x: Float[Tensor, "b n c"], h: int, w: int) -> Float[Tensor, "b c h w"]:
    return x.unflatten(1, (h, w)).permute(0, 3, 1, 2)
