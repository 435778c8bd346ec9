"""Train a KL autoencoder: pictures to latents and back (Rombach et al., arXiv 2112.10752, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from latentdiff.checkpoints import configs
from latentdiff.checkpoints.files import write_json, write_safetensors
from latentdiff.checkpoints.fill import Options, on_meta
from latentdiff.checkpoints.io import from_folder
from latentdiff.checkpoints.keymap import VAE_SYNONYMS
from latentdiff.images import save_grid
from latentdiff.models.initialise import init_for_training
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.training.checkpoint import digest
from latentdiff.training.data import PictureSource, batches, open_source
from latentdiff.training.drawings import ComposeConfig
from latentdiff.training.loop import LoopConfig, fit, store


@dataclass(frozen=True, kw_only=True)
class VAETraining(LoopConfig):
    """`latentdiff train vae`."""

    data: Path
    """A built drawing dataset, or a folder or WebDataset tar of captioned pictures, of which the central square is taken."""
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    """How drawings are composed; only for a drawing dataset."""
    size: int = 128
    """Side of the pictures, in pixels."""
    crop: int | None = None
    """Train on random crops of this side; cheaper a step, and the network is convolutional. None: whole pictures."""
    widths: tuple[int, ...] = (32, 64, 128, 128)
    """Channels of each level; every level but the last halves the side."""
    layers: int = 1
    """Residual blocks a level (the decoder has one more)."""
    latent_channels: int = 4
    """Channels of the latents."""
    groups: int = 16
    """Groups of the group norms."""
    kl: float = 2e-4
    """Weight of the KL divergence, a latent number, in nats."""
    start: Path | None = None
    """Begin with the VAE of this model folder, and its sizes, instead of new weights."""
    edges: float = 0.5
    """Weight of the L1 difference of picture gradients: keeps outlines sharp, which a plain L1 or L2 blurs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "layers", "latent_channels", "groups")
        self.at_least(0, "kl", "edges")
        if not self.widths or any(w < 1 or w % self.groups for w in self.widths):
            raise ValueError(f"widths must be multiples of groups ({self.groups}), got {self.widths!r}")
        factor = 2 ** (len(self.widths) - 1)
        for name, side in (("size", self.size), ("crop", self.crop)):
            if side is not None and (side < factor or side % factor):
                raise ValueError(f"{name} must be a multiple of {factor} (one halving less than there are widths), got {side!r}")
        if self.crop is not None and self.crop > self.size:
            raise ValueError(f"crop must be at most size ({self.size}), got {self.crop!r}")


class AutoEncoder(nn.Module):
    """encode, sample, decode as one forward, which is what a distributed trainer needs."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Float[Tensor, "b 3 h w"], noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.vae.moments(images)
        z = mean + (0.5 * logvar).exp() * noise
        return self.vae.decode(z * self.vae.config.scale), mean, logvar


def reconstruction_loss(x: Tensor, y: Tensor, edges: float) -> Tensor:
    """L1 + L2, at three scales so that areas keep their colour, + `edges` times the L1 of gradients."""
    loss = F.l1_loss(y, x) + F.mse_loss(y, x)
    loss = loss + edges * (F.l1_loss(y.diff(dim=-1), x.diff(dim=-1)) + F.l1_loss(y.diff(dim=-2), x.diff(dim=-2)))
    for factor in (2, 4):
        loss = loss + 0.5 * F.l1_loss(F.avg_pool2d(y, factor), F.avg_pool2d(x, factor))
    return loss


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp logvar) || N(0, 1)) in nats, averaged over latent numbers (Kingma & Welling, appendix B)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def train_vae(config: VAETraining) -> VAE:
    """Train, resume or finish a VAE; when it stops, `out/model/vae` holds it in the folder layout.

    Returns it on the training device. Errors: as `fit`, and those of loading the data.
    """
    source = open_source(config.data, size=config.size, compose=config.compose)
    vae = begin(config)
    sizes = vae.config

    def loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        images = crops(batch[0].to(generator.device), config.crop, generator)
        b, _, h, w = images.shape
        factor = vae.factor
        noise = torch.randn(b, sizes.latent_channels, h // factor, w // factor, generator=generator, device=images.device)
        y, mean, logvar = model(images.contiguous(memory_format=torch.channels_last), noise)
        y, mean, logvar = y.float(), mean.float(), logvar.float()
        rec, kl = reconstruction_loss(images, y, config.edges), kl_loss(mean, logvar)
        psnr = -10 * torch.log10((y.clamp(-1, 1) - images).square().mean() / 4)
        return rec + config.kl * kl, {"rec": rec.detach(), "kl": kl.detach(), "psnr": psnr.detach()}

    def stream(start: int, rank: int, world: int) -> Iterator[Any]:
        return batches(source, config.batch // world, seed=config.seed, start=start, rank=rank, world=world, workers=config.workers)

    def sample(model: AutoEncoder, path: Path) -> None:
        images = to_float(torch.stack([source.get(i * len(source) // 16, 0)[0] for i in range(16)]))
        device = next(model.parameters()).device
        with torch.no_grad():
            y = model.vae.decode(model.vae.encode(images.to(device))).cpu()
        save_grid(rearrange([images, y], "which (row column) c h w -> (row which column) c h w", row=2), path, columns=8)

    meta = {"network": "vae", "sizes": repr(sizes), "data": source.fingerprint()}
    trained = fit(AutoEncoder(vae), loss, stream, config, meta=meta, sample=sample).vae
    store(lambda folder: save_vae(trained, sizes, source, folder / "vae"), config.out / "model")
    return trained


def begin(config: VAETraining) -> VAE:
    """New weights, or those of `config.start`; latents are not scaled before they are known."""
    plain: dict[str, Any] = {"scale": 1.0, "force_upcast": False, "sample_size": config.size}
    if config.start is not None:
        config.must_hold("start", "vae")
        vae = load_autoencoder(config.start)
        own, names = vae.config, {"widths": "block_out_channels", "layers": "layers_per_block", "groups": "norm_groups"}
        config.tell_of_others(
            {name: getattr(own, theirs) for name, theirs in names.items()} | {"latent_channels": own.latent_channels}
        )
        if config.size % vae.factor or (config.crop or 0) % vae.factor:
            raise ValueError(
                f"size and crop must be multiples of {vae.factor} with this start, got {config.size} and {config.crop}"
            )
        vae.config = replace(own, shift=0.0, **plain)
        return vae.train().requires_grad_()
    torch.manual_seed(config.seed)
    sizes = VAEConfig(
        block_out_channels=config.widths,
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_groups=config.groups,
        **plain,
    )
    vae = VAE(sizes)
    init_for_training(vae)
    return vae


def load_autoencoder(folder: Path) -> VAE:
    """The VAE (float32) of a model folder, of any number of latent channels: the U-Net is made to fit."""
    config = configs.read_vae(configs.Config(folder / "vae" / "config.json"))
    if not isinstance(config, VAEConfig):
        raise ValueError(f"{folder} holds a tiny autoencoder, whose encoder gives no distribution to train on")
    vae = on_meta(VAE, replace(config, force_upcast=False))
    return from_folder(vae, folder / "vae", Options(dtype=torch.float32), "VAE", VAE_SYNONYMS)


def save_vae(vae: VAE, sizes: VAEConfig, source: PictureSource, folder: Path) -> None:
    """One part of a model folder: `config.json`, with the scale of the latents of `source`, and the weights.

    One with these weights stays as it is: another machine finds a scale of other last digits, to which no U-Net made of it fits.
    """
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.is_file() or digest(load_file(weights)) != digest(vae.state_dict()):
        write_json(folder / "config.json", configs.vae_json(replace(sizes, scale=latent_scale(vae, source))))
        write_safetensors(weights, vae.state_dict())


def crops(batch: Tensor, side: int | None, generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """uint8 pictures to [-1, 1], cut to one random window a picture."""
    if side is None or side >= batch.shape[-1]:
        return to_float(batch)
    room = batch.shape[-1] - side + 1
    corners = torch.randint(room, (len(batch), 2), generator=generator, device=generator.device).tolist()
    return to_float(torch.stack([p[:, i : i + side, j : j + side] for p, (i, j) in zip(batch, corners, strict=True)]))


def to_float(batch: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return batch.float() / 127.5 - 1


@torch.no_grad()
def latent_scale(vae: VAE, source: PictureSource, pictures: int = 256) -> float:
    """1 / std of the latents as sampled, so that the U-Net sees unit variance (Rombach et al., appendix G)."""
    device = next(vae.parameters()).device
    n = min(pictures, len(source))
    images = torch.stack([source.get(i * len(source) // n, 1)[0] for i in range(n)])
    mean, logvar = (
        torch.cat(m).float() for m in zip(*(vae.moments(to_float(part).to(device)) for part in images.split(32)), strict=True)
    )
    return (mean.var() + logvar.exp().mean()).rsqrt().item()
