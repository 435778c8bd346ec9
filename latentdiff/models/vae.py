"""The KL-regularised autoencoder between pictures and latents (Rombach et al. 2022, arXiv 2112.10752, sec. 3.1).

Modules carry the names of the diffusers folder layout.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latentdiff.models.attention import dot_product_attention, feature_map, tokens
from latentdiff.models.convolution import Conv2d
from latentdiff.models.fused import conv_add, conv_enlarged, conv_norm_silu, group_norm, norm_silu


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The size of an autoencoder; the default is that of SD 1.x and 2.x, and SDXL's but for `scale`."""

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # from the full resolution down, halved between
    layers_per_block: int = 2  # res blocks a level of the encoder; one more in the decoder
    norm_groups: int = 32
    mid_attention: bool = True
    scale: float = 0.18215  # z = (latent - shift) * scale has variance about 1
    shift: float = 0.0
    quant_conv: bool = True
    post_quant_conv: bool = True
    force_upcast: bool = True  # whether the weights overflow in float16
    sample_size: int = 512  # native height and width, in pixels

    def __post_init__(self):
        if self.norm_groups < 1 or any(channels % self.norm_groups for channels in self.block_out_channels):
            raise ValueError(
                f"block_out_channels={self.block_out_channels}: each must be a multiple of norm_groups={self.norm_groups}"
            )


def new_norm(config: VAEConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, config: VAEConfig, channels: int, out_channels: int):
        super().__init__()
        self.norm1 = new_norm(config, channels)
        self.conv1 = Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = new_norm(config, out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h w"]:
        y = conv_norm_silu(self.conv1, self.norm2, norm_silu(self.norm1, x))
        return conv_add(self.conv2, y, self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention over all positions, with one head as wide as the map."""

    def __init__(self, config: VAEConfig, channels: int):
        super().__init__()
        self.group_norm = new_norm(config, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        y = tokens(group_norm(self.group_norm, x))[:, None]  #                        [b, 1, hw, c]
        y = dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + feature_map(self.to_out(y)[:, 0], *x.shape[-2:])  #                [b, c, h, w]


class MidBlock(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        channels = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(ResBlock(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(config, channels)] if config.mid_attention else [])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the weights were trained with padding at the right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return conv_enlarged(self.conv, x, (2 * x.shape[-2], 2 * x.shape[-1]))


class DownBlock(nn.Module):
    def __init__(self, resnets: list[ResBlock], downsamplers: list[Downsample]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList(downsamplers)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h2 w2"]:
        for module in [*self.resnets, *self.downsamplers]:
            x = module(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, resnets: list[ResBlock], upsamplers: list[Upsample]):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList(upsamplers)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h2 w2"]:
        for module in [*self.resnets, *self.upsamplers]:
            x = module(x)
        return x


class Encoder(nn.Module):
    """Pictures to twice the latent channels: the mean and the log variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, n = config.block_out_channels, config.layers_per_block
        channels = widths[0]
        self.conv_in = Conv2d(config.in_channels, channels, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            resnets = [ResBlock(config, c, width) for c in [channels] + [width] * (n - 1)]
            self.down_blocks.append(DownBlock(resnets, [Downsample(width)] if i < len(widths) - 1 else []))
            channels = width
        self.mid_block = MidBlock(config)
        self.conv_norm_out = new_norm(config, channels)
        self.conv_out = Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b z2 h w"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    """Latents to pictures."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, n = config.block_out_channels, config.layers_per_block
        channels = widths[-1]
        self.conv_in = Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            resnets = [ResBlock(config, c, width) for c in [channels] + [width] * n]
            self.up_blocks.append(UpBlock(resnets, [Upsample(width)] if i > 0 else []))
            channels = width
        self.conv_norm_out = new_norm(config, channels)
        self.conv_out = Conv2d(channels, config.in_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b 3 height width"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class VAE(nn.Module):
    """Pictures in [-1, 1] to scaled latents of variance about 1, and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        z = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * z, 2 * z, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = Conv2d(z, z, 1) if config.post_quant_conv else nn.Identity()

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def moments(self, images: Float[Tensor, "b 3 height width"]) -> tuple[Float[Tensor, "b z h w"], Float[Tensor, "b z h w"]]:
        """Mean and log variance, clamped to [-30, 20], of the unscaled latents of pictures in [-1, 1]."""
        check_channels("images", images, self.config.in_channels)
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(
        self, images: Float[Tensor, "b 3 height width"], *, sample: Float[Tensor, "b z h w"] | None = None
    ) -> Float[Tensor, "b z h w"]:
        """Scaled latents of pictures in [-1, 1]: the mode, or a sample if given standard normal noise for it."""
        latents, logvar = self.moments(images)
        if sample is not None:
            latents = latents + torch.exp(0.5 * logvar) * sample
        return (latents - self.config.shift) * self.config.scale

    def decode(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b 3 height width"]:
        """Pictures, in about [-1, 1], of scaled latents."""
        check_channels("z", z, self.config.latent_channels)
        return self.decoder(self.post_quant_conv(z / self.config.scale + self.config.shift))


def check_channels(name: str, x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} has shape {list(x.shape)}: needs [batch, {channels}, height, width]")
