"""Against diffusers and open_clip, on the same random weights: what they write we run, what we write they run."""

from dataclasses import replace

import pytest
import torch

from latentdiff.checkpoints import keymap
from latentdiff.checkpoints.files import in_memory, open_safetensors
from latentdiff.checkpoints.fill import Options, fill, on_meta
from latentdiff.checkpoints.io import load_parts
from latentdiff.checkpoints.save import save_folder, save_single
from latentdiff.models.text import TextTower, TowerSpec

from .conftest import SMALL, randomise

pytestmark = pytest.mark.oracle
FAMILIES = list(SMALL)


def close(ours, theirs, rtol=1e-5):
    """Relative to the largest number: what float32 can promise after dozens of layers."""
    scale = theirs.abs().max()
    assert scale > 1e-3
    error = float((ours - theirs).abs().max() / scale)
    assert error < rtol, error


def oracle(path):
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(path, local_files_only=True)


def towers(pipe):
    return [t for n in ("text_encoder", "text_encoder_2") if (t := getattr(pipe, n, None)) is not None]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_folder_of_diffusers_runs_the_same(folder, name):
    pipe, parts = oracle(folder(name)), load_parts(folder(name))
    config = parts.spec.unet
    torch.manual_seed(0)
    x, t = torch.randn(2, config.in_channels, 16, 16), torch.tensor([999.0, 3.0])
    context = torch.randn(2, 7, config.context_dim)
    vector, added = None, {}
    if config.vector_dim is not None:
        pooled, ids = torch.randn(2, 64), torch.rand(2, (config.vector_dim - 64) // 256) * 1000
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        vector = torch.cat([pooled, pipe.unet.add_time_proj(ids.flatten()).reshape(2, -1)], dim=-1)
    close(parts.unet(x, t, context, vector), pipe.unet(x, t, context, **added).sample)

    image, z = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 4, 4, 4)
    scale = pipe.vae.config.scaling_factor
    close(parts.vae.encode(image), pipe.vae.encode(image).latent_dist.mode() * scale)
    close(parts.vae.decode(z), pipe.vae.decode(z / scale).sample)

    ids = torch.randint(0, 49405, (2, 77))
    ids[:, 0], ids[0, 9:], ids[1, 30:] = 49406, 49407, 49407
    for ours, theirs, spec in zip(parts.text_encoders, towers(pipe), parts.spec.towers, strict=True):
        out = theirs(ids, output_hidden_states=True)
        hidden, pooled = ours(ids)
        close(hidden, out.last_hidden_state if spec.final_norm else out.hidden_states[-2])
        if spec.pooled:
            close(pooled, out.text_embeds)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    strip = {k.removeprefix("text_model."): v for k, v in b.items()}
    assert {k.removeprefix("text_model.") for k in a} == set(strip) - {"embeddings.position_ids"}
    for name, weight in a.items():
        assert torch.equal(weight, strip[name.removeprefix("text_model.")]), name


def same_model(ours, theirs):
    same_weights(ours.unet, theirs.unet)
    same_weights(ours.vae, theirs.vae)
    for a, b in zip(ours.text_encoders, towers(theirs), strict=True):
        same_weights(a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_opens_our_folder(folder, name, tmp_path):
    parts = load_parts(folder(name))
    save_folder(parts, tmp_path / "ours")
    pipe, before = oracle(tmp_path / "ours"), oracle(folder(name))
    same_model(parts, pipe)
    assert type(pipe) is type(before)
    for part in ("unet", "vae", "scheduler"):
        now, then = getattr(pipe, part).config, getattr(before, part).config
        for key in set(now) & set(then) - {"_diffusers_version", "_name_or_path", "_use_default_values"}:
            if key != "force_upcast" or SMALL[name].xl:  # says true everywhere, and only SDXL's pipelines look at it
                assert _plain(now[key]) == _plain(then[key]), (part, key)


def _plain(value):
    """diffusers takes a number for a list of equal numbers, and nothing for false."""
    return value[0] if isinstance(value, list | tuple) and len(set(value)) == 1 else value or None


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_opens_our_single_file(folder, name, tmp_path):
    import diffusers

    parts = load_parts(folder(name))
    save_single(parts, tmp_path / "ours.safetensors")
    kind = getattr(diffusers, SMALL[name].pipeline)
    pipe = kind.from_single_file(tmp_path / "ours.safetensors", config=str(folder(name)), local_files_only=True)
    same_model(parts, pipe)


@pytest.mark.parametrize("name", FAMILIES)
def test_single_file_loads_as_it_was_saved(folder, name, tmp_path):
    parts = load_parts(folder(name))
    save_single(parts, tmp_path / "ours.safetensors")
    again = load_parts(tmp_path / "ours.safetensors")
    assert again.spec == parts.spec
    for a, b in zip((parts.unet, parts.vae, *parts.text_encoders), (again.unet, again.vae, *again.text_encoders), strict=True):
        same_weights(a, b)


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_names_agree_with_the_readers_of_diffusers(folder, name, tmp_path):
    """diffusers' own converters, fed with our single file's tensors, give back exactly its folder's names and values."""
    single = pytest.importorskip("diffusers.loaders.single_file_utils")
    parts = load_parts(folder(name))
    save_single(parts, tmp_path / "ours.safetensors")
    file = open_safetensors(tmp_path / "ours.safetensors")
    tensors = {n: file.get(n) for n in file.entries}
    pipe = oracle(folder(name))
    unet = single.convert_ldm_unet_checkpoint(dict(tensors), pipe.unet.config)
    vae = single.convert_ldm_vae_checkpoint(dict(tensors), pipe.vae.config)
    for converted, module in ((unet, pipe.unet), (vae, pipe.vae)):
        assert set(converted) == set(module.state_dict())
        assert all(torch.equal(converted[k], v) for k, v in module.state_dict().items())


@torch.no_grad()
def test_open_clip_tower_is_open_clips():
    """An OpenCLIP text tower, in open_clip's own names, gives what open_clip computes: pooled and penultimate."""
    model = pytest.importorskip("open_clip.model")
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 3}
    clip = model.CLIP(embed_dim=48, vision_cfg=vision, text_cfg=text).eval()

    randomise(clip)
    prefix = "conditioner.embedders.0.model."
    file = in_memory("open_clip", {prefix + k: v for k, v in clip.state_dict().items()})
    spec = TowerSpec(
        width=64, mlp=256, layers=3, heads=4, activation="gelu", projection=48, layer=-2, final_norm=False, pooled=True
    )
    module = on_meta(TextTower, spec)
    sources = keymap.text_sources(module.state_dict(), prefix, keymap.OPEN_CLIP)
    left = set(file.entries) - {s.name for s in sources.values()}
    assert all(keymap.ignorable(name) for name in left), left
    tower = fill(module, file, sources, Options(), "text tower")

    ids = torch.randint(1, 49405, (2, 77))
    ids[:, 0], ids[0, 9], ids[1, 30] = 49406, 49407, 49407
    ids[0, 10:], ids[1, 31:] = 0, 0
    states = []
    for block in clip.transformer.resblocks:
        block.register_forward_hook(lambda _m, _i, out: states.append(out))
    pooled = clip.encode_text(ids)
    hidden, ours = tower(ids)
    close(ours, pooled, 1e-5)
    close(hidden, states[-2], 1e-5)
    normed = on_meta(TextTower, replace(spec, final_norm=True))
    normed = fill(normed, file, sources, Options(), "text tower")
    close(normed(ids)[0], clip.ln_final(states[-2]), 1e-5)
