"""Model families as data: every Stable Diffusion that we run is a frozen value, made from another with `replace`.

Sizes are those of CompVis/stable-diffusion (1.x), Stability-AI/stablediffusion (2.x) and Stability-AI/generative-models
(SDXL, refiner). A model whose sizes stand in no family (a folder of somebody's own) is a `ModelSpec` too: nothing here is
looked up by name to decide what code runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from latentdiff.diffusion import schedules
from latentdiff.diffusion.denoiser import Prediction
from latentdiff.models.text import TowerSpec
from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig
from latentdiff.models.vae_tiny import TinyVAEConfig


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """The noise levels of training. `scaled_linear` is linear in sqrt(beta); the original code calls that "linear"."""

    kind: Literal["linear", "scaled_linear", "cosine"] = "scaled_linear"
    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_snr: bool = False


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """How the model's own files want it sampled. None leaves the choice to the pipeline."""

    spacing: str = "leading"  # one of diffusion.schedules.SPACINGS
    steps_offset: int = 1
    final: Literal["zero", "sigma_min"] = "sigma_min"  # where the last step goes; `set_alpha_to_one` in scheduler_config.json
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All that tells one latent text-to-image model from another.

    `size` is the native side of a picture in pixels; `vector` says what stands beside the pooled text in the U-Net's vector:
    "size" (original h, w, crop top, left, target h, w) or "aesthetic" (original h, w, crop top, left, score);
    `zero_empty_negative` makes the unconditional context zeros where no negative prompt is given.
    """

    name: str
    unet: UNetConfig
    vae: VAEConfig | TinyVAEConfig
    towers: tuple[TowerSpec, ...]
    schedule: ScheduleSpec = ScheduleSpec()
    sampling: SamplingSpec = SamplingSpec()
    prediction: Prediction = "eps"
    size: int = 512
    vector: Literal["none", "size", "aesthetic"] = "none"
    zero_empty_negative: bool = False

    @property
    def task(self) -> Literal["text", "inpaint", "instruct"]:
        """What stands beside the noisy latents in the U-Net's input: nothing, mask and masked picture, or a picture to edit."""
        latents = self.vae.latent_channels
        tasks = {latents: "text", 2 * latents + 1: "inpaint", 2 * latents: "instruct"}
        if self.unet.in_channels not in tasks:
            raise ValueError(
                f"the U-Net takes {self.unet.in_channels} channels; known with {latents} latent channels are "
                f"{', '.join(f'{n} ({task})' for n, task in tasks.items())}"
            )
        return tasks[self.unet.in_channels]  # type: ignore[return-value]


CLIP_L = TowerSpec()
# ViT-H has 24 blocks, of which Stable Diffusion 2 never uses the last: the folder layout does not store it, nor do we.
OPENCLIP_H = TowerSpec(width=1024, mlp=4096, layers=23, heads=16, activation="gelu", pad=0)
OPENCLIP_BIGG = TowerSpec(
    width=1280,
    mlp=5120,
    layers=32,
    heads=20,
    activation="gelu",
    projection=1280,
    layer=-2,
    final_norm=False,
    pooled=True,
    pad=0,
)

_UNET_15 = UNetConfig()
_UNET_2 = replace(_UNET_15, context_dim=1024, heads=(5, 10, 20, 20), linear_projection=True)
_UNET_XL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    attention=(False, True, True),
    transformer_layers=(1, 2, 10),
    heads=(5, 10, 20),
    context_dim=2048,
    linear_projection=True,
    vector_dim=2816,
    sample_size=128,
)
_UNET_REFINER = replace(
    _UNET_XL,
    block_out_channels=(384, 768, 1536, 1536),
    attention=(False, True, True, False),
    transformer_layers=(4, 4, 4, 4),
    heads=(6, 12, 24, 24),
    context_dim=1280,
    vector_dim=2560,
)
_VAE = VAEConfig(force_upcast=False)
_VAE_XL = VAEConfig(scale=0.13025, force_upcast=True, sample_size=1024)  # overflows in float16

SD15 = ModelSpec(name="sd15", unet=_UNET_15, vae=_VAE, towers=(CLIP_L,))
SD15_INPAINT = replace(SD15, name="sd15-inpaint", unet=replace(_UNET_15, in_channels=9))
INSTRUCT_PIX2PIX = replace(SD15, name="instruct-pix2pix", unet=replace(_UNET_15, in_channels=8))

SD21_BASE = ModelSpec(name="sd21-base", unet=_UNET_2, vae=_VAE, towers=(OPENCLIP_H,))
SD21 = replace(
    SD21_BASE, name="sd21", unet=replace(_UNET_2, sample_size=96), vae=replace(_VAE, sample_size=768), prediction="v", size=768
)
SD2_INPAINT = replace(SD21_BASE, name="sd2-inpaint", unet=replace(_UNET_2, in_channels=9))

SDXL = ModelSpec(
    name="sdxl",
    unet=_UNET_XL,
    vae=_VAE_XL,
    towers=(replace(CLIP_L, layer=-2, final_norm=False), OPENCLIP_BIGG),
    sampling=SamplingSpec(final="zero"),
    size=1024,
    vector="size",
    zero_empty_negative=True,
)
SDXL_INPAINT = replace(SDXL, name="sdxl-inpaint", unet=replace(_UNET_XL, in_channels=9))
SDXL_INSTRUCT = replace(SDXL, name="sdxl-instruct", unet=replace(_UNET_XL, in_channels=8))
SDXL_REFINER = replace(
    SDXL, name="sdxl-refiner", unet=_UNET_REFINER, towers=(OPENCLIP_BIGG,), vector="aesthetic", zero_empty_negative=False
)

# Our own model: 128 x 128 pictures, latents 4 x 16 x 16. Its folder is what is read; this value is what it was trained as. How it
# is sampled unless told otherwise is said here, and by its training written to weights/scheduler/scheduler_config.json: DDIM, the
# simplest of the best rows of docs/samplers.md, at 20 steps, which no row with twice its evaluations betters.
EMBEDDED = replace(
    SD15,
    name="embedded",
    unet=replace(_UNET_15, sample_size=16),
    schedule=ScheduleSpec(kind="cosine"),
    sampling=SamplingSpec(spacing="trailing", steps_offset=0, final="zero", sampler="ddim", steps=20),
    prediction="v",
    size=128,
)

FAMILIES: Mapping[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        SD15,
        SD15_INPAINT,
        INSTRUCT_PIX2PIX,
        SD21,
        SD21_BASE,
        SD2_INPAINT,
        SDXL,
        SDXL_INPAINT,
        SDXL_INSTRUCT,
        SDXL_REFINER,
    )
}


def noise_schedule(spec: ScheduleSpec) -> schedules.NoiseSchedule:
    """The noise levels that a model's spec describes."""
    if spec.kind == "cosine":
        found = schedules.cosine(spec.steps)
    else:
        make = schedules.linear if spec.kind == "linear" else schedules.scaled_linear
        found = make(spec.steps, spec.beta_start, spec.beta_end)
    return schedules.zero_snr(found) if spec.zero_snr else found
