"""A tiny autoencoder in the place of the big one: fast previews and fast decoding at some loss of detail.

The architecture of TAESD (github.com/madebyollin/taesd): plain convolutions, distilled from the big autoencoder. It
works on the same scaled latents as `VAE`, so either can stand where the other does. Modules carry the names of the
diffusers folder layout, where it is called AutoencoderTiny.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from latentdiff.models.convolution import Conv2d
from latentdiff.models.vae import check_channels


@dataclass(frozen=True, kw_only=True)
class TinyVAEConfig:
    """The size of a tiny autoencoder; the default is TAESD. Blocks are counted a level, in the order of running."""

    in_channels: int = 3
    latent_channels: int = 4
    width: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scale: float = 1.0  # as VAEConfig's; 1 for TAESD, which was distilled on scaled latents
    sample_size: int = 512  # native height and width, in pixels

    def __post_init__(self):
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ValueError(
                f"decoder_blocks={self.decoder_blocks}: needs {len(self.encoder_blocks)} entries, as encoder_blocks has"
            )


class Block(nn.Module):
    """Three convolutions and a residual."""

    def __init__(self, channels: int):
        super().__init__()
        convs = [Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return torch.relu(self.conv(x) + x)


class Layers(nn.Module):
    """A row of layers; in a module of its own because the weights' names say so."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b out h2 w2"]:
        return self.layers(x)


def encoder(config: TinyVAEConfig) -> Layers:
    width = config.width
    layers: list[nn.Module] = [Conv2d(config.in_channels, width, 3, padding=1)]
    for i, blocks in enumerate(config.encoder_blocks):
        if i > 0:
            layers.append(Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers += [Block(width) for _ in range(blocks)]
    return Layers([*layers, Conv2d(width, config.latent_channels, 3, padding=1)])


def decoder(config: TinyVAEConfig) -> Layers:
    width = config.width
    layers: list[nn.Module] = [Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
    for i, blocks in enumerate(config.decoder_blocks):
        if i > 0:
            layers += [nn.Upsample(scale_factor=2), Conv2d(width, width, 3, padding=1, bias=False)]
        layers += [Block(width) for _ in range(blocks)]
    return Layers([*layers, Conv2d(width, config.in_channels, 3, padding=1)])


class TinyVAE(nn.Module):
    """Pictures in [-1, 1] to scaled latents and back, with the face of `VAE`; its latents have no variance."""

    def __init__(self, config: TinyVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.decoder = decoder(config)

    @property
    def factor(self) -> int:
        """Pixels along the side of one latent."""
        return 2 ** (len(self.config.encoder_blocks) - 1)

    def encode(
        self, images: Float[Tensor, "b 3 height width"], *, sample: Float[Tensor, "b z h w"] | None = None
    ) -> Float[Tensor, "b z h w"]:
        """Scaled latents of pictures in [-1, 1]. `sample` is there for `VAE`'s sake: these latents are certain."""
        check_channels("images", images, self.config.in_channels)
        return self.encoder(images / 2 + 0.5) * self.config.scale

    def decode(self, z: Float[Tensor, "b z h w"]) -> Float[Tensor, "b 3 height width"]:
        """Pictures, in about [-1, 1], of scaled latents."""
        check_channels("z", z, self.config.latent_channels)
        z = 3 * torch.tanh(z / self.config.scale / 3)  # squashes outliers, as in training
        return self.decoder(z) * 2 - 1
