"""The table of names: complete, one-to-one, without dead rules, and right where the names of real files are known."""

import re

import pytest
import torch

from latentdiff.checkpoints import families, keymap
from latentdiff.checkpoints.io import networks, single_sources

ALL = list(families.FAMILIES.values())
COUNTS = {"sd15": (686, 248, [196]), "sd21": (686, 248, [372]), "sdxl": (1680, 248, [196, 517])}


def plan(spec):
    return single_sources(networks(spec), keymap.text_layout(spec))


@pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)
def test_map_is_a_bijection_on_all_names_of_a_model(spec):
    modules = networks(spec)
    places = []
    for part, sources in plan(spec).items():
        assert list(sources) == list(modules[part].state_dict())
        places += list(sources.values())
    assert len(set(places)) == len(places)
    thirds = [p for p in places if p.op.endswith("/3")]
    assert len(set(p.name for p in places)) == len(places) - len(thirds) * 2 // 3


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_the_released_models(name):
    sources = plan(families.FAMILIES[name])
    unet, vae, text = COUNTS[name]
    assert len(sources["unet"]) == unet
    assert len(sources["vae"]) == vae
    assert [len(sources[f"text {i}"]) for i in range(len(text))] == text


def test_every_rule_fires():
    tables = (keymap.UNET, keymap.VAE, keymap.OPEN_CLIP, keymap.TRANSFORMERS, keymap.RES_BLOCK, keymap.VAE_RES_BLOCK)
    rules = {rule for table in tables for rule in table}
    assert 40 <= len(rules) <= 55
    names = {name for spec in ALL for part in plan(spec).values() for name in part}
    for ours, *_ in rules:
        inner = (ours, *_) in keymap.RES_BLOCK or (ours, *_) in keymap.VAE_RES_BLOCK
        pattern = keymap._pattern(ours)
        hits = [n for n in names if (re.search(rf"resnets\.\d\.{ours}\.", n) if inner else pattern.match(n))]
        assert hits, f"rule {ours} fits no name of any model"


def test_every_synonym_and_ignorable_pattern_fires():
    real = [
        "model_ema.diffusion_modelinput_blocks00weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.model.logit_scale",
        "alphas_cumprod_prev",
        "betas",
        "cond_stage_model.model.attn_mask",
        "cond_stage_model.model.transformer.resblocks.23.ln_1.weight",
        "conditioner.embedders.1.model.visual.proj",
        "first_stage_model.loss.logvar",
        "denoiser.sigmas",
        "cond_stage_model.transformer.visual_projection.weight",
        "conditioner.embedders.0.transformer.text_projection.weight",
    ]
    for pattern in keymap.IGNORABLE:
        assert any(re.fullmatch(pattern, name) for name in real), pattern
    for name in real:
        assert keymap.ignorable(name)
    for spec in ALL:  # nothing that a model needs is ever ignorable
        for part in plan(spec).values():
            assert not [s.name for s in part.values() if keymap.ignorable(s.name)]


# Names as they stand in v1-5-pruned.safetensors, 512-base-ema.ckpt and sd_xl_base_1.0.safetensors.
KNOWN = {
    ("sd15", "unet"): {
        "down_blocks.0.downsamplers.0.conv.weight": "model.diffusion_model.input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
        "down_blocks.3.resnets.1.time_emb_proj.bias": "model.diffusion_model.input_blocks.11.0.emb_layers.1.bias",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj.weight": (
            "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight"
        ),
        "up_blocks.0.upsamplers.0.conv.weight": "model.diffusion_model.output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "model.diffusion_model.output_blocks.5.2.conv.weight",
        "up_blocks.2.attentions.0.proj_in.weight": "model.diffusion_model.output_blocks.6.1.proj_in.weight",
        "up_blocks.3.resnets.2.conv_shortcut.weight": "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "time_embedding.linear_2.bias": "model.diffusion_model.time_embed.2.bias",
        "conv_norm_out.weight": "model.diffusion_model.out.0.weight",
    },
    ("sd15", "vae"): {
        "encoder.down_blocks.1.resnets.0.conv_shortcut.weight": "first_stage_model.encoder.down.1.block.0.nin_shortcut.weight",
        "decoder.up_blocks.0.upsamplers.0.conv.bias": "first_stage_model.decoder.up.3.upsample.conv.bias",
        "decoder.up_blocks.3.resnets.0.conv_shortcut.weight": "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.mid_block.attentions.0.to_out.0.weight": "first_stage_model.decoder.mid.attn_1.proj_out.weight",
        "encoder.mid_block.resnets.1.norm1.weight": "first_stage_model.encoder.mid.block_2.norm1.weight",
    },
    ("sd15", "text 0"): {
        "text_model.encoder.layers.11.mlp.fc1.weight": "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight",
    },
    ("sd21", "text 0"): {
        "text_model.encoder.layers.0.self_attn.k_proj.bias": "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias",
        "text_model.embeddings.position_embedding.weight": "cond_stage_model.model.positional_embedding",
        "text_model.embeddings.token_embedding.weight": "cond_stage_model.model.token_embedding.weight",
    },
    ("sdxl", "unet"): {
        "add_embedding.linear_1.weight": "model.diffusion_model.label_emb.0.0.weight",
        "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight": (
            "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight"
        ),
        "up_blocks.0.upsamplers.0.conv.weight": "model.diffusion_model.output_blocks.2.2.conv.weight",
        "up_blocks.2.resnets.0.norm1.weight": "model.diffusion_model.output_blocks.6.0.in_layers.0.weight",
    },
    ("sdxl", "text 1"): {
        "text_projection.weight": "conditioner.embedders.1.model.text_projection",
        "text_model.final_layer_norm.bias": "conditioner.embedders.1.model.ln_final.bias",
        "text_model.encoder.layers.31.mlp.fc2.weight": ("conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_proj.weight"),
    },
    ("sdxl-refiner", "text 0"): {
        "text_model.encoder.layers.9.mlp.fc2.bias": "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias",
    },
}


@pytest.mark.parametrize("spec_part", KNOWN, ids=" ".join)
def test_names_of_released_files(spec_part):
    spec, part = spec_part
    sources = plan(families.FAMILIES[spec])[part]
    for ours, original in KNOWN[spec_part].items():
        assert sources[ours].name == original


@pytest.mark.parametrize("op", ["", "conv", "T", "0/3"])
def test_operations_undo_each_other(op):
    if op == "0/3":
        whole = torch.randn(6, 5)
        thirds = [keymap.Source("x", f"{i}/3").ours(whole) for i in range(3)]  # type: ignore[arg-type]
        assert torch.equal(thirds[1], whole[2:4])
        assert torch.equal(keymap.Source("x", op).original(thirds), whole)
        return
    ours = torch.randn(4, 5)
    source = keymap.Source("x", op)
    stored = source.original([ours])
    assert tuple(stored.shape) == source.shapes((4, 5))[0]
    assert torch.equal(source.ours(stored), ours)
    if op != "T":
        assert torch.equal(source.ours(source.original([torch.ones(3)])), torch.ones(3))  # biases pass as they are


def test_ema_names_have_no_dots():
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert keymap.ema_name(name) == "model_ema.diffusion_modelinput_blocks00weight"


def test_a_name_outside_the_table_is_an_error_that_lists_it():
    with pytest.raises(ValueError, match=r"no names for 'time_embedding\.cond_proj\.weight'"):
        keymap.unet_sources(["conv_in.weight", "time_embedding.cond_proj.weight"], families.SD15.unet)
