"""What is measured: the embedded model as it is, and others with random weights of their true sizes, which run as true ones do."""

from __future__ import annotations

import torch

from latentdiff.checkpoints.families import SD15, SD21, SDXL, ModelSpec
from latentdiff.checkpoints.fill import M, on_meta
from latentdiff.checkpoints.io import Parts, load_parts
from latentdiff.loading import embedded
from latentdiff.models.text import TextTower
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE, VAEConfig

SPECS = {"sd15": SD15, "sd21": SD21, "sdxl": SDXL}
NAMES = ("embedded", *SPECS)
BLOCK = 1 << 20  # random numbers drawn; longer weights repeat them


def subject(name: str, device: torch.device | str = "cpu") -> Parts:
    """A model in float32; random weights are made on the device, the embedded model's come from a file.

    Errors: ValueError for an unknown name; FileNotFoundError without the embedded model.
    """
    if name == "embedded":
        return load_parts(embedded(), dtype=torch.float32)
    if name not in SPECS:
        raise ValueError(f"models must be among {', '.join(NAMES)}, got {name!r}")
    return random_parts(SPECS[name], device)


def random_parts(spec: ModelSpec, device: torch.device | str = "cpu") -> Parts:
    """A model with random weights and a tokenizer that gives the same seven words for any text."""
    assert isinstance(spec.vae, VAEConfig)
    torch.manual_seed(0)
    block = torch.randn(BLOCK).to(device)  # the same numbers on every device
    words = Words()
    return Parts(
        spec=spec,
        unet=randomised(on_meta(UNet, spec.unet), block),
        vae=randomised(on_meta(VAE, spec.vae), block),
        text_encoders=tuple(randomised(on_meta(TextTower, tower), block) for tower in spec.towers),
        tokenizers=tuple(words for _ in spec.towers),  # type: ignore[misc]
        title=spec.name,
    )


class Words:
    """Stands where a tokenizer does."""

    def __call__(self, text: str) -> list[int]:
        return list(range(320, 327))

    def id(self, token: str) -> None:
        return None


@torch.no_grad()
def randomised(module: M, block: torch.Tensor) -> M:
    """Weights that keep the variance of what goes through, biases of 0.1, norms that change nothing."""
    module.to_empty(device=block.device)
    for name, weight in module.named_parameters():
        scale = 0.02 if "embedding" in name and weight.ndim == 2 else weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        flat = weight.data.view(-1)
        for start in range(0, len(flat), BLOCK):
            part = flat[start : start + BLOCK]
            torch.mul(block[: len(part)], scale, out=part)
        if "norm" in name and name.endswith("weight"):
            weight.fill_(1)
    return module.eval().requires_grad_(False)
