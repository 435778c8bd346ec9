"""Small models of every family, built and written by diffusers: its layers and layout at the true architecture, narrow."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

UNET_1 = {
    "sample_size": 8,
    "block_out_channels": (32, 64, 128, 128),
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
}
UNET_2 = {**UNET_1, "attention_head_dim": (1, 2, 4, 4), "use_linear_projection": True}
UNET_XL = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 32 + 64,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 64 + 6 * 256,
}
UNET_REFINER = {
    **UNET_XL,
    "block_out_channels": (32, 64, 128, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 4, 4),
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 64,
    "projection_class_embeddings_input_dim": 64 + 5 * 256,
}
CLIP_L = {"hidden_act": "quick_gelu", "num_hidden_layers": 3, "hidden_size": 32}
OPENCLIP = {"hidden_act": "gelu", "num_hidden_layers": 3, "hidden_size": 32}
BIGG = {"hidden_act": "gelu", "num_hidden_layers": 3, "hidden_size": 64, "projection_dim": 64}  # wider, as diffusers tells it by
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Small:
    """What diffusers needs to build a family."""

    pipeline: str
    unet: dict
    towers: tuple[dict, ...] = (CLIP_L,)
    prediction: str = "epsilon"
    xl: bool = False


SMALL = {
    "sd15": Small("StableDiffusionPipeline", UNET_1),
    "sd15-inpaint": Small("StableDiffusionInpaintPipeline", {**UNET_1, "in_channels": 9}),
    "instruct-pix2pix": Small("StableDiffusionInstructPix2PixPipeline", {**UNET_1, "in_channels": 8}),
    "sd21-base": Small("StableDiffusionPipeline", UNET_2, (OPENCLIP,)),
    "sd21": Small("StableDiffusionPipeline", UNET_2, (OPENCLIP,), "v_prediction"),
    "sd2-inpaint": Small("StableDiffusionInpaintPipeline", {**UNET_2, "in_channels": 9}, (OPENCLIP,)),
    "sdxl": Small("StableDiffusionXLPipeline", UNET_XL, (CLIP_L, BIGG), xl=True),
    "sdxl-inpaint": Small("StableDiffusionXLInpaintPipeline", {**UNET_XL, "in_channels": 9}, (CLIP_L, BIGG), xl=True),
    "sdxl-instruct": Small("StableDiffusionXLInstructPix2PixPipeline", {**UNET_XL, "in_channels": 8}, (CLIP_L, BIGG), xl=True),
    "sdxl-refiner": Small("StableDiffusionXLImg2ImgPipeline", UNET_REFINER, (BIGG,), xl=True),
}


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights at which every layer matters: also biases and norms, which start as zeros and ones, are drawn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.1 * noise + (1 if "norm" in name and name.endswith("weight") else 0))


def build(name: str):
    """The diffusers pipeline of a small family, with random weights."""
    diffusers = pytest.importorskip("diffusers")
    import transformers

    small = SMALL[name]
    unet = diffusers.UNet2DConditionModel(**small.unet)
    blocks = 4 * ["DownEncoderBlock2D"], 4 * ["UpDecoderBlock2D"]
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        sample_size=64,
        scaling_factor=0.13025 if small.xl else 0.18215,
    )
    towers = []
    for i, extra in enumerate(small.towers):
        config = transformers.CLIPTextConfig(intermediate_size=64, num_attention_heads=4, **extra)
        last = small.xl and i == len(small.towers) - 1
        towers.append((transformers.CLIPTextModelWithProjection if last else transformers.CLIPTextModel)(config))
    for i, module in enumerate((unet, vae, *towers)):
        randomise(module, i)
    tokenizers = [clip_tokenizer("<|endoftext|>" if t is CLIP_L else "!") for t in small.towers]
    parts = {"unet": unet, "vae": vae, "scheduler": diffusers.DDIMScheduler(**SCHEDULER, prediction_type=small.prediction)}
    if small.xl:
        first = 2 - len(towers)
        names = ["", "_2"][first:]
        parts |= {f"text_encoder{n}": t for n, t in zip(names, towers, strict=True)}
        parts |= {f"tokenizer{n}": t for n, t in zip(names, tokenizers, strict=True)}
        if first:
            parts |= {"text_encoder": None, "tokenizer": None, "requires_aesthetics_score": True}
            parts |= {"force_zeros_for_empty_prompt": False}
    else:
        parts |= {"text_encoder": towers[0], "tokenizer": tokenizers[0], "safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    return getattr(diffusers, small.pipeline)(**parts)


def clip_tokenizer(pad: str):
    """transformers' tokenizer on open_clip's own reading of its vocabulary."""
    open_clip = pytest.importorskip("open_clip.tokenizer")
    import transformers

    simple = open_clip.SimpleTokenizer()
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocab = {special.get(word, word): i for word, i in simple.encoder.items()}
    merges = [pair for pair, _ in sorted(simple.bpe_ranks.items(), key=lambda item: item[1])]
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad, model_max_length=77)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """family -> a folder that diffusers wrote; each is built once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / name
            build(name).save_pretrained(made[name])
        return made[name]

    return get
