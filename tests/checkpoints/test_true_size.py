"""Once at the true size of SD 1.5 and SDXL: folders that diffusers writes, and our single files of them, compute the same."""

import gc
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from latentdiff.checkpoints import configs, families, tokenizer
from latentdiff.checkpoints.files import write_json
from latentdiff.checkpoints.io import load_parts
from latentdiff.checkpoints.save import save_single

from .test_oracle import close

pytestmark = [pytest.mark.slow, pytest.mark.oracle]
SPECS = {"sd15": families.SD15, "sdxl": families.SDXL}


@dataclass(frozen=True)
class Inputs:
    """What both libraries are given."""

    x: torch.Tensor
    t: torch.Tensor
    context: torch.Tensor
    pooled: torch.Tensor
    ids: torch.Tensor
    image: torch.Tensor
    tokens: torch.Tensor


def inputs(spec) -> Inputs:
    torch.manual_seed(0)
    tokens = torch.randint(0, 49405, (1, 77))
    tokens[0, 0], tokens[0, 20:] = 49406, 49407
    size = torch.rand(1, 6) * 1000
    x = torch.randn(1, 4, 16, 16)
    return Inputs(
        x, torch.tensor([500.0]), torch.randn(1, 77, spec.unet.context_dim), torch.randn(1, 1280), size, x[:, :3] / 3, tokens
    )


def fill(module: torch.nn.Module) -> torch.nn.Module:
    """Numbers of a sensible size in float16 steps, from one block of noise."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            row = noise.roll(i).repeat(-(-p.numel() // len(noise)))[: p.numel()].reshape(p.shape)
            p.copy_((row / p[0].numel() ** 0.5 if p.ndim > 1 else row * 0.1 + 1).half())
    return module


def write(spec, folder: Path) -> None:
    """A folder of diffusers' and transformers' own networks, in float16; one network is in memory at a time."""
    import diffusers
    import transformers

    index, names = configs.index_json(spec), ["text_encoder", "text_encoder_2"][: len(spec.towers)]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config({**configs.unet_json(spec.unet)})
        vae = diffusers.AutoencoderKL.from_config(configs.vae_json(spec.vae))
    fill(unet.half()).save_pretrained(folder / "unet", max_shard_size="3GB")
    del unet
    gc.collect()
    fill(vae.half()).save_pretrained(folder / "vae")
    for name, tower in zip(names, spec.towers, strict=True):
        config = transformers.CLIPTextConfig(**configs.tower_json(tower))
        with torch.device("meta"):
            module = getattr(transformers, index[name][1])(config)
        for inner in module.modules():
            if hasattr(inner, "position_ids"):
                inner.position_ids = torch.arange(77)[None]
        fill(module.half()).save_pretrained(folder / name)
        tokenizer.write(folder / name.replace("text_encoder", "tokenizer"), tokenizer.standard(), tower.pad)
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", configs.scheduler_json(spec))


@torch.no_grad()
def ours(path: Path, spec, given: Inputs) -> list[torch.Tensor]:
    parts = load_parts(path, dtype=torch.float32)
    assert parts.spec.name == spec.name
    vector = None
    if spec.vector == "size":
        from latentdiff.models.unet import sinusoids

        vector = torch.cat([given.pooled, sinusoids(given.ids.flatten(), 256).flatten()[None]], dim=-1)
    out = [parts.unet(given.x, given.t, given.context, vector), parts.vae.encode(given.image), parts.vae.decode(given.x)]
    for tower in parts.text_encoders:
        hidden, pooled = tower(given.tokens)
        out += [hidden] if pooled is None else [hidden, pooled]
    return out


@torch.no_grad()
def theirs(folder: Path, spec, given: Inputs) -> list[torch.Tensor]:
    """The same numbers, one network at a time."""
    import diffusers
    import transformers

    options = {"torch_dtype": torch.float32, "local_files_only": True}
    added = {"added_cond_kwargs": {"text_embeds": given.pooled, "time_ids": given.ids}} if spec.vector == "size" else {}
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet", **options)
    out = [unet(given.x, given.t, given.context, **added).sample]
    del unet
    gc.collect()
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae", **options)
    scale = spec.vae.scale
    out += [vae.encode(given.image).latent_dist.mode() * scale, vae.decode(given.x / scale).sample]
    for i, tower in enumerate(spec.towers):
        kind = transformers.CLIPTextModelWithProjection if tower.pooled else transformers.CLIPTextModel
        module = kind.from_pretrained(folder / f"text_encoder{'_2' if i else ''}", dtype=torch.float32, local_files_only=True)
        found = module(given.tokens, output_hidden_states=True)
        out += [found.last_hidden_state if tower.final_norm else found.hidden_states[tower.layer]]
        out += [found.text_embeds] if tower.pooled else []
    return out


@pytest.mark.parametrize("name", SPECS)
def test_true_size(tmp_path, name):
    spec = SPECS[name]
    given = inputs(spec)
    write(spec, tmp_path / "folder")
    expected = theirs(tmp_path / "folder", spec, given)
    gc.collect()
    found = ours(tmp_path / "folder", spec, given)
    for a, b in zip(found, expected, strict=True):
        close(a, b)
    gc.collect()
    save_single(load_parts(tmp_path / "folder"), tmp_path / "model.safetensors")
    again = ours(tmp_path / "model.safetensors", spec, given)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
