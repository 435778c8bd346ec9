"""The denoising U-Net of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, sec. 3.3) in all of its sizes.

SD 1.x, 2.x, SDXL and its refiner, the inpainting and instruct variants and our own small model differ only in their
`UNetConfig`. Modules carry the names of the diffusers folder layout, so such folders load without renaming.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentdiff.models import onednn
from latentdiff.models.attention import Attend, Attention, KeysValues, Site, Transformer, TransformerBlock, repeated, sdpa
from latentdiff.models.convolution import Conv2d
from latentdiff.models.fused import conv_add, conv_enlarged, conv_norm_silu, norm_silu
from latentdiff.models.vae import check_channels

Merge = Callable[[Tensor, Tensor, int], Tensor]
"""(features [b, c, h, w], skip connection [b, d, h, w], number of the up block) -> [b, c + d, h, w]"""


def concatenate(x: Float[Tensor, "b c h w"], skip: Float[Tensor, "b d h w"], block: int) -> Float[Tensor, "b c+d h w"]:
    return torch.cat([x, skip], dim=1)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The size of a U-Net; the default is SD 1.x. Tuples have one entry a level, from the full resolution down."""

    in_channels: int = 4  # 9 for inpainting, 8 for instruct-pix2pix
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2  # res blocks a level on the way down; one more on the way up
    attention: tuple[bool, ...] = (True, True, True, False)  # levels with transformers; the middle always has one
    transformer_layers: tuple[int, ...] = (1, 1, 1, 1)  # blocks in a transformer; the middle takes the last entry
    heads: tuple[int, ...] = (8, 8, 8, 8)  # number of heads, not their width; the middle takes the last entry
    context_dim: int = 768
    linear_projection: bool = False
    vector_dim: int | None = None  # pooled text and size embeddings of SDXL, already concatenated: 2816, refiner 2560
    time_cond_dim: int | None = None  # guidance embedding of LCM
    norm_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64  # native height and width, in latents

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name in ("attention", "transformer_layers", "heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name}={getattr(self, name)}: needs {levels} entries, as block_out_channels has")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if min(self.norm_groups, heads) < 1 or channels % self.norm_groups or channels % heads:
                raise ValueError(
                    f"block_out_channels={self.block_out_channels}: each must be a multiple of "
                    f"norm_groups={self.norm_groups} and of its entry in heads={self.heads}"
                )


GRID = 4096  # rows of times that are embedded at once: some 100 MB of SDXL's


def sinusoids(t: Float[Tensor, " b"], dim: int) -> Float[Tensor, "b dim"]:
    """cos and then sin of t at dim/2 frequencies from 1 down to almost 1/10000, in float32 (Ho et al. 2020, app. B)."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies  # [b, dim/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rows_of(context: Tensor | list[KeysValues]) -> int:
    """How many prompts there are, as embeddings or as keys and values."""
    if isinstance(context, Tensor):
        return len(context)
    return len(context[0][0]) if context else 0


def side_by_side(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor] | None:
    """Weights and biases as of one linear layer with the outputs of all. None if one is no plain layer with a bias, or somebody
    listens to it, or a gradient is wanted."""
    plain = [layer for layer in layers if type(layer) is nn.Linear and layer.bias is not None and not onednn.listened_to(layer)]
    if len(plain) < len(layers) or torch.is_grad_enabled():
        return None
    return torch.cat([layer.weight for layer in plain]), torch.cat([layer.bias for layer in plain])


class Embedding(nn.Module):
    """A two-layer net that brings sinusoids (or SDXL's vector) to the width that the res blocks listen to."""

    def __init__(self, dim: int, out_dim: int, cond_dim: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)
        if cond_dim is not None:
            self.cond_proj = nn.Linear(cond_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "b d"], cond: Float[Tensor, "b e"] | None = None) -> Float[Tensor, "b out"]:
        if cond is not None:
            x = x + self.cond_proj(cond)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """Two convolutions with a shift for the time added between them, and a residual around."""

    place: slice  # of this block's shifts among those of all blocks; set by the network

    def __init__(self, channels: int, out_channels: int, time_dim: int, norm_groups: int, eps: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, channels, eps)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"], shifts: Float[Tensor, "b s"]) -> Float[Tensor, "b out h w"]:
        y = conv_norm_silu(self.conv1, self.norm2, norm_silu(self.norm1, x), shifts[: len(x), self.place])
        return conv_add(self.conv2, y, self.conv_shortcut(x))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], size: Sequence[int]) -> Float[Tensor, "b c h2 w2"]:
        """`size` is that of the next skip connection: 2h x 2w, or one less where the way down rounded up."""
        return conv_enlarged(self.conv, x, size)


class DownBlock(nn.Module):
    def __init__(self, resnets: list[ResBlock], attentions: list[Transformer], downsamplers: list[Downsample]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)

    def forward(self, x: Tensor, shifts: Tensor, prompt: list[KeysValues], attend: Attend) -> list[Tensor]:
        """All intermediate maps, for the skip connections; the last is the input of the next block."""
        maps = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, shifts)
            if self.attentions:
                x = self.attentions[i](x, prompt, attend)
            maps.append(x)
        return maps + [downsample(x) for downsample in self.downsamplers]


class MidBlock(nn.Module):
    def __init__(self, resnets: list[ResBlock], attention: Transformer):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([attention])

    def forward(self, x: Tensor, shifts: Tensor, prompt: list[KeysValues], attend: Attend) -> Tensor:
        x = self.resnets[0](x, shifts)
        x = self.attentions[0](x, prompt, attend)
        return self.resnets[1](x, shifts)


class UpBlock(nn.Module):
    def __init__(self, resnets: list[ResBlock], attentions: list[Transformer], upsamplers: list[Upsample]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList(upsamplers)

    def forward(
        self,
        x: Tensor,
        skips: list[Tensor],
        size: Sequence[int],
        shifts: Tensor,
        prompt: list[KeysValues],
        attend: Attend,
        merge: Merge,
        number: int,
    ) -> Tensor:
        """Take one of `skips` a res block, the last first; `size` is the height and width after the block."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            x = resnet(merge(x, repeated(skip, len(x)), number), shifts)
            if self.attentions:
                x = self.attentions[i](x, prompt, attend)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNet(nn.Module):
    """Predicts the noise (or v, or x0) in noisy latents x at time t for a prompt."""

    checkpointing = False  # recompute the blocks in the backward pass: less memory, about a third more time

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, n = config.block_out_channels, config.layers_per_block
        time_dim, last = 4 * widths[0], len(widths) - 1

        def res(channels: int, out_channels: int) -> ResBlock:
            return ResBlock(channels, out_channels, time_dim, config.norm_groups, config.norm_eps)

        def transformer(i: int) -> Transformer:
            return Transformer(
                widths[i],
                config.heads[i],
                config.transformer_layers[i],
                config.context_dim,
                linear=config.linear_projection,
                norm_groups=config.norm_groups,
            )

        def transformers(i: int, n: int) -> list[Transformer]:
            return [transformer(i) for _ in range(n)] if config.attention[i] else []

        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = Embedding(widths[0], time_dim, config.time_cond_dim)
        if config.vector_dim is not None:
            self.add_embedding = Embedding(config.vector_dim, time_dim)

        skips = [widths[0]]
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            resnets = [res(channels, width) for channels in [skips[-1]] + [width] * (n - 1)]
            downsamplers = [Downsample(width)] if i < last else []
            self.down_blocks.append(DownBlock(resnets, transformers(i, n), downsamplers))
            skips += [width] * (n + len(downsamplers))

        channels = widths[-1]
        self.mid_block = MidBlock([res(channels, channels), res(channels, channels)], transformer(last))

        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            inputs = [channels] + [width] * n
            resnets = [res(channels + skips.pop(), width) for channels in inputs]
            upsamplers = [Upsample(width)] if i > 0 else []
            self.up_blocks.append(UpBlock(resnets, transformers(i, n + 1), upsamplers))
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_groups, widths[0], config.norm_eps)
        self.conv_out = Conv2d(widths[0], config.out_channels, 3, padding=1)
        self._number_blocks()

    def _number_blocks(self) -> None:
        count = shifts = 0
        for name, module in self.named_modules():
            if isinstance(module, Attention):
                module.site = Site(name, module.cross)
            elif isinstance(module, Transformer):
                module.first = count
                count += len(module.transformer_blocks)
            elif isinstance(module, ResBlock):
                module.place = slice(shifts, shifts := shifts + module.conv1.out_channels)
        self.cross_attentions, self.shifts = count, shifts
        self.res_blocks = [module for module in self.modules() if isinstance(module, ResBlock)]

    def project_context(self, context: Float[Tensor, "b n d"]) -> list[KeysValues]:
        """Keys and values [b, heads, n, channels/heads] of every cross-attention, in module order.

        They are the same at all steps of a picture, and `forward` takes them in place of the context.
        """
        if context.ndim != 3 or context.shape[-1] != self.config.context_dim:
            raise ValueError(f"context has shape {list(context.shape)}: needs [batch, tokens, {self.config.context_dim}]")
        blocks = [module for module in self.modules() if isinstance(module, TransformerBlock)]
        return [block.attn2.keys_values(context) for block in blocks]

    def embed_grid(
        self, times: Sequence[float], vector: Float[Tensor, "b v"] | None, batch: int, like: Tensor
    ) -> dict[float, Float[Tensor, "b s"]]:
        """What the res blocks add at each of the times of a run, each by itself, so that no other time moves its last bit;
        `forward` takes it in place of t.

        Empty where that depends on a guidance embedding too, or would be more than `GRID` rows.
        """
        rows = 1 if vector is None else batch
        if self.config.time_cond_dim is not None or not 0 < rows * len(times) <= GRID:
            return {}
        whole = side_by_side([block.time_emb_proj for block in self.res_blocks])

        def at(time: float) -> Tensor:
            t = torch.full((rows,), time, dtype=torch.float32, device=like.device)
            return self.embed_times(t, vector, None, like.dtype, whole).expand(batch, -1)

        return {time: at(time) for time in times}

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"] | Float[Tensor, "r s"],
        context: Float[Tensor, "r n d"] | list[KeysValues],
        vector: Float[Tensor, "r v"] | None = None,
        *,
        guidance_embedding: Float[Tensor, "r e"] | None = None,
        attend: Attend = sdpa,
        merge: Merge = concatenate,
    ) -> Float[Tensor, "r out h w"]:
        """The prediction for noisy latents x (scaled to variance about 1) at times t of the training schedule.

        r is b or a multiple of it: all pictures with their first prompts, then all with their second, as guidance asks for them.
        t: times, or what `embed_grid` made of them (and of the vector).
        context: the prompts' embedding, or what `project_context` made of it. vector: SDXL's pooled text and sizes.
        guidance_embedding: LCM's embedding of the guidance scale. attend: called in place of `sdpa` at every site, with r rows.
        merge: called in place of `concatenate` where a skip connection joins the way up.
        Raises ValueError where a shape does not fit the configuration.
        """
        rows = rows_of(context)
        self._check(x, t, context, vector, guidance_embedding)
        prompt = self.project_context(context) if isinstance(context, Tensor) else context
        shifts = self.embed_times(repeated(t, rows), vector, guidance_embedding, x.dtype)
        if attend is not sdpa or vector is not None or guidance_embedding is not None:
            x = repeated(x, rows)  # else all prompts share what comes before they are heard, up to the first cross-attention

        x = self.conv_in(x)  #                                                         [b, widths[0], h, w]
        skips = [x]
        for block in self.down_blocks:
            skips += self._run(block, skips[-1], shifts, prompt, attend)
        x = self._run(self.mid_block, skips[-1], shifts, prompt, attend)  #               [b, widths[-1], h/8, w/8]
        n = self.config.layers_per_block + 1
        for number, block in enumerate(self.up_blocks):
            skips, own = skips[:-n], skips[-n:]
            size = (skips or own)[-1].shape[-2:]
            x = self._run(block, x, own, size, shifts, prompt, attend, merge, number)
        return self.conv_out(norm_silu(self.conv_norm_out, x))  #                      [b, out, h, w]

    def embed_times(
        self,
        t: Tensor,
        vector: Tensor | None,
        guidance_embedding: Tensor | None,
        dtype: torch.dtype,
        whole: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """What each res block adds at these times, side by side: [b, s]; t itself if that is what it already is.

        whole: the layers that tell it, `side_by_side`, if there are more times to come.
        """
        if t.ndim == 2:
            return t
        emb = self.time_embedding(sinusoids(t, self.config.block_out_channels[0]).to(dtype), guidance_embedding)
        if vector is not None:
            emb = emb + self.add_embedding(vector)
        emb = F.silu(emb)  #                                                           [b, 4 widths[0]]
        return F.linear(emb, *whole) if whole else torch.cat([block.time_emb_proj(emb) for block in self.res_blocks], dim=1)

    def _run(self, block: nn.Module, *args):
        return checkpoint(block, *args, use_reentrant=False) if self.checkpointing else block(*args)

    def _check(
        self, x: Tensor, t: Tensor, context: Tensor | list[KeysValues], vector: Tensor | None, guidance_embedding: Tensor | None
    ) -> None:
        config, rows = self.config, rows_of(context)
        check_channels("x", x, config.in_channels)
        if not isinstance(context, Tensor) and len(context) != self.cross_attentions:
            raise ValueError(f"context has {len(context)} entries: needs {self.cross_attentions}, as project_context makes")
        if rows < len(x) or (rows % len(x) if len(x) else rows):
            raise ValueError(f"context has batch {rows}: needs {len(x)}, as x has, or a multiple of it")
        if t.shape not in (x.shape[:1], (rows, self.shifts)):
            raise ValueError(f"t has shape {list(t.shape)}: needs [{len(x)}], one time for each of x, or [{rows}, {self.shifts}]")
        optional = {
            "vector": (vector, config.vector_dim),
            "guidance_embedding": (guidance_embedding, config.time_cond_dim),
        }
        for name, (value, dim) in optional.items():
            given = None if value is None else list(value.shape)
            if given != (None if dim is None else [rows, dim]):
                allowed = "None: this model takes none" if dim is None else f"shape [{rows}, {dim}]"
                raise ValueError(f"{name} has shape {given}: needs {allowed}")
