"""Once at the true size of SD 1.5 and SDXL: folders that diffusers writes, and our single files of them, compute the same.

SDXL takes 14 GiB of memory (each library once, in float32), 14 GB of disk and some minutes.
"""

import gc
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import latentdiff
from latentdiff.checkpoints import configs, families, tokenizer
from latentdiff.checkpoints.files import write_json
from latentdiff.checkpoints.io import load_parts
from latentdiff.checkpoints.save import save_single
from latentdiff.models.unet import sinusoids

from . import test_oracle, test_runs
from .conftest import randomise

pytestmark = [pytest.mark.slow, pytest.mark.oracle]
SPECS = {"sd15": families.SD15, "sdxl": families.SDXL}
RUN = {"guidance": 7.5, "negative": "a dog"}


@dataclass(frozen=True)
class Inputs:
    """What both libraries are given."""

    x: torch.Tensor
    t: torch.Tensor
    context: torch.Tensor
    pooled: torch.Tensor
    sizes: torch.Tensor
    image: torch.Tensor
    ids: torch.Tensor


def inputs(spec) -> Inputs:
    torch.manual_seed(0)
    ids = torch.randint(0, 49405, (1, 77))
    ids[0, 0], ids[0, 20:] = 49406, 49407
    return Inputs(
        x=torch.randn(1, 4, 8, 8),
        t=torch.tensor([500.0]),
        context=torch.randn(1, 77, spec.unet.context_dim),
        pooled=torch.randn(1, spec.towers[-1].projection or 1),
        sizes=torch.rand(1, 6) * 1000,
        image=torch.rand(1, 3, 64, 64) * 2 - 1,
        ids=ids,
    )


def write(spec, folder: Path) -> None:
    """A folder of diffusers' and transformers' own networks, in float16; one network is in memory at a time."""
    import diffusers
    import transformers

    index = configs.index_json(spec)
    builds = {
        "unet": lambda: diffusers.UNet2DConditionModel.from_config(configs.unet_json(spec.unet)),
        "vae": lambda: diffusers.AutoencoderKL.from_config(configs.vae_json(spec.vae)),
    }
    for name, tower in zip(("text_encoder", "text_encoder_2"), spec.towers, strict=False):
        config = transformers.CLIPTextConfig(**configs.tower_json(tower))
        builds[name] = lambda kind=index[name][1], config=config: getattr(transformers, kind)(config)
        tokenizer.write(folder / name.replace("text_encoder", "tokenizer"), tokenizer.standard(), tower.pad)
    for name, build in builds.items():
        with torch.device("meta"):
            module = build().half()
        module = module.to_empty(device="cpu")
        randomise(module)
        module.save_pretrained(folder / name, max_shard_size="3GB")
        del module
        gc.collect()
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", configs.scheduler_json(spec))


@torch.no_grad()
def ours(folder: Path, given: Inputs) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What the networks compute, and the latents of a run."""
    pipe = latentdiff.load(folder, device="cpu", dtype="float32")
    vector = None
    if pipe.spec.vector == "size":
        vector = torch.cat([given.pooled, sinusoids(given.sizes.flatten(), 256).flatten()[None]], dim=-1)
    out = [pipe.unet(given.x, given.t, given.context, vector), pipe.vae.encode(given.image), pipe.vae.decode(given.x)]
    for tower in pipe.text.towers:
        hidden, pooled = tower(given.ids)
        out += [hidden] if pooled is None else [hidden, pooled]
    return out, test_runs.ours(pipe, **RUN)


@torch.no_grad()
def theirs(folder: Path, spec, given: Inputs) -> tuple[list[torch.Tensor], torch.Tensor]:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    for part in (pipe.unet, pipe.vae):
        part.to(memory_format=torch.channels_last)  # as ours are: other kernels round otherwise
    added = {"added_cond_kwargs": {"text_embeds": given.pooled, "time_ids": given.sizes}} if spec.vector == "size" else {}
    scale = spec.vae.scale
    out = [
        pipe.unet(given.x, given.t, given.context, **added).sample,
        pipe.vae.encode(given.image).latent_dist.mode() * scale,
        pipe.vae.decode(given.x / scale).sample,
    ]
    for tower, module in zip(spec.towers, test_oracle.towers(pipe), strict=True):
        found = module(given.ids, output_hidden_states=True)
        out += [found.last_hidden_state if tower.final_norm else found.hidden_states[tower.layer]]
        out += [found.text_embeds] if tower.pooled else []
    return out, test_runs.drawn(
        pipe, guidance_scale=RUN["guidance"], negative_prompt=RUN["negative"], height=test_runs.SIDE, width=test_runs.SIDE
    )


@pytest.fixture
def disk(tmp_path):
    """pytest keeps what the last three runs wrote; this is too much to keep."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", SPECS)
def test_true_size(disk, name):
    spec, folder, file = SPECS[name], disk / "folder", disk / "model.safetensors"
    write(spec, folder)
    given = inputs(spec)
    expected, expected_run = theirs(folder, spec, given)
    gc.collect()
    found, run = ours(folder, given)
    gc.collect()
    for a, b in zip(found, expected, strict=True):
        test_oracle.close(a, b)
    test_runs.close(run, expected_run)

    save_single(load_parts(folder), file)
    one, other = load_parts(folder), load_parts(file)
    assert one.spec == other.spec == spec
    for a, b in zip((one.unet, one.vae, *one.text_encoders), (other.unet, other.vae, *other.text_encoders), strict=True):
        test_oracle.same_weights(a, b)
