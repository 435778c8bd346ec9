"""Detection, strictness and safety of loading (reliability 10–13), on small models and on the headers of true-size ones."""

import gc
import json
import shutil
import socket
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentdiff.checkpoints import configs, detect, families, keymap, tokenizer
from latentdiff.checkpoints.files import CheckpointError, Entry, TensorFile, open_tensors, write_safetensors
from latentdiff.checkpoints.io import load_parts, networks, single_sources
from latentdiff.checkpoints.report import inspect
from latentdiff.checkpoints.save import (
    convert,
    follows_from_names,
    markers,
    metadata,
    original_tensors,
    save_single,
    single_tensors,
)
from latentdiff.models.unet import UNet
from latentdiff.models.vae_tiny import TinyVAEConfig

ALL = list(families.FAMILIES.values())


def header(spec, **metadata: str) -> TensorFile:
    """A true-size single file without its data."""
    return TensorFile(Path("model.safetensors"), _entries(spec), lambda name: torch.tensor(875000), metadata)


@cache
def _entries(spec) -> dict[str, Entry]:
    modules = networks(spec)
    tensors = {}
    for part, sources in single_sources(modules, keymap.text_layout(spec)).items():
        tensors |= original_tensors(modules[part].state_dict(), sources)
    return {name: Entry(torch.float16, tuple(t.shape)) for name, t in tensors.items()}


def with_tensors(file: TensorFile, *names: str) -> TensorFile:
    return replace(file, entries={**file.entries, **{n: Entry(torch.float32, (1,)) for n in names}})


@pytest.fixture(scope="module")
def sd15(folder):
    return load_parts(folder("sd15"))


@pytest.fixture
def single(sd15, tmp_path) -> Path:
    """A small SD 1.5 as one file, as `broken` below changes it."""
    save_single(sd15, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def broken(path: Path, change) -> Path:
    """The file again, with its dictionary of tensors changed."""
    file = open_tensors(path)
    tensors = {name: file.get(name).clone() for name in file.entries}
    change(tensors)
    write_safetensors(path, tensors, file.metadata)
    return path


# -------------------------------------------------------------------------------------------------------- detection


@pytest.mark.parametrize("spec", ALL, ids=lambda s: s.name)
def test_families_are_told_by_names_and_shapes(spec):
    found = detect.detect(header(spec))
    if spec in (families.SD21, families.SD21_BASE):
        assert (found.spec, found.evidence) == (families.SD21, None)  # left to the trial run
    else:
        assert (found.spec, found.evidence) == (spec, "family")


@pytest.mark.parametrize("said", ["v", "epsilon"])
def test_prediction_of_sd2_from_modelspec_metadata(said):
    file = header(families.SD21, **{"modelspec.prediction_type": said})
    assert detect.detect(file).spec == (families.SD21 if said == "v" else families.SD21_BASE)


def test_prediction_of_sd2_base_from_its_global_step():
    found = detect.detect(with_tensors(header(families.SD21), "global_step"))
    assert found.spec == families.SD21_BASE
    assert found.evidence == "global_step 875000"


def test_markers_of_xl_v_models():
    v = detect.detect(with_tensors(header(families.SDXL), "v_pred"))
    assert (v.spec.prediction, v.spec.schedule.zero_snr, v.evidence) == ("v", False, "v_pred")
    zero = detect.detect(with_tensors(header(families.SDXL), "v_pred", "ztsnr"))
    assert (zero.spec.prediction, zero.spec.schedule.zero_snr, zero.spec.sampling.spacing) == ("v", True, "trailing")
    said = detect.detect(with_tensors(header(families.SDXL, **{"modelspec.prediction_type": "epsilon"}), "v_pred"))
    assert said.spec.prediction == "eps"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out", "prediction"), [(-0.6, "v"), (0.5, "eps"), (-0.4, "eps")])
def test_the_trial_run_tells_v_from_eps(sd15, out, prediction, dtype):
    unet = UNet(sd15.spec.unet).to(dtype)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.constant_(unet.conv_out.bias, out)
    assert detect.try_prediction(unet) == prediction


def small_sd2(folder, path: Path, out: float) -> Path:
    """A file of a small SD 2 that says nothing of its prediction, and whose U-Net always answers `out`."""
    parts = load_parts(folder("sd21"))
    tensors = single_tensors(parts)
    tensors["model.diffusion_model.out.2.weight"] = torch.zeros_like(tensors["model.diffusion_model.out.2.weight"])
    tensors["model.diffusion_model.out.2.bias"] = torch.full((4,), out)
    write_safetensors(path, tensors)
    return path


def test_the_users_word_comes_before_any_trial(folder, tmp_path, recwarn, monkeypatch):
    small = load_parts(folder("sd21")).spec
    monkeypatch.setitem(detect.FAMILIES, ("sd2", 4), small)
    monkeypatch.setattr(families, "SD21", small)
    monkeypatch.setattr(families, "SD21_BASE", replace(small, prediction="eps"))
    path = small_sd2(folder, tmp_path / "m.safetensors", -2.0)
    with pytest.warns(UserWarning, match="nothing in this .* file says what its U-Net predicts; a trial run says 'v'"):
        assert load_parts(path).spec.prediction == "v"
    recwarn.clear()
    assert load_parts(path, prediction="eps").spec.prediction == "eps"
    assert not recwarn.list


FOREIGN = {
    "model.diffusion_model.joint_blocks.0.x": "Stable Diffusion 3; latentdiff does not run it",
    "double_blocks.0.img_attn.norm.key_norm.scale": "Flux; latentdiff does not run it",
    "lora_unet_down_blocks_0.lora_down.weight": "LoRA; load the model it was made for, then add it with `lora`",
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": "LoRA; load the model it was made for, then add it with `lora`",
    "control_model.time_embed.0.weight": "ControlNet; latentdiff does not run it",
    "down_blocks.0.resnets.0.conv1.weight": "U-Net of a folder; load the folder",
    "text_model.encoder.layers.0.layer_norm1.bias": "text tower of a folder; load the folder",
    "vision_model.embeddings.class_embedding": "CLIP; what pictures are scored with",
    "first_stage_model.encoder.conv_in.weight": "autoencoder; load a model and give this file as `vae`",
    "clip_l": "textual inversion; load a model, then add it",
    "something.else": "unknown; it is no Stable Diffusion 1.x, 2.x or XL, nor anything else that latentdiff knows",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_architectures_are_named(tmp_path, name):
    write_safetensors(tmp_path / "m.safetensors", {name: torch.ones(1)})
    with pytest.raises(CheckpointError, match=f"expected a U-Net with .*, found another kind of file: {FOREIGN[name]}"):
        load_parts(tmp_path / "m.safetensors")


def test_a_strange_number_of_channels_is_named():
    spec = replace(families.SD15, unet=replace(families.SD15.unet, in_channels=5))
    with pytest.raises(CheckpointError, match=r"the U-Net takes 5 channels; known for this kind of model \(sd1\) are 4, 9, 8"):
        detect.detect(header(spec))


def test_small_models_say_what_they_are_and_released_ones_need_not(sd15):
    assert "latentdiff" in metadata(sd15)
    for spec in ALL:
        assert follows_from_names(spec)
    assert follows_from_names(detect.with_zero_snr(replace(families.SDXL, prediction="v")))
    assert not follows_from_names(families.EMBEDDED)
    named = replace(sd15, spec=families.SD15, title="x")
    assert "latentdiff" not in metadata(named)
    assert metadata(named)["modelspec.architecture"] == "stable-diffusion-v1"


# -------------------------------------------------------------------------------------------------- strict loading

UNET = "model.diffusion_model."
FAULTS = {
    "missing": (lambda t: t.pop(UNET + "out.2.bias"), r"1 of 686 tensors of the custom U-Net are missing: '.*out\.2\.bias'"),
    "missing tower": (
        lambda t: [t.pop(k) for k in list(t) if k.startswith("cond_stage")],
        r"52 of 52 tensors of the custom text tower 0 are missing",
    ),
    "extra": (lambda t: t.update({"foo.bar": torch.ones(1)}), r"1 tensors belong to no part of a custom model: 'foo\.bar'"),
    "shape": (
        lambda t: t.update({UNET + "input_blocks.0.0.weight": torch.ones(33, 4, 3, 3)}),
        r"input_blocks\.0\.0\.weight: expected \[32, 4, 3, 3\], found \[33, 4, 3, 3\]",
    ),
    "nan": (lambda t: t[UNET + "out.2.bias"].fill_(float("nan")), r"out\.2\.bias of the custom U-Net holds NaN or infinite"),
    "inf": (lambda t: t["first_stage_model.quant_conv.bias"].fill_(float("inf")), r"quant_conv\.bias of the .* VAE holds NaN"),
    "integers": (
        lambda t: t.update({UNET + "out.2.bias": torch.ones(4, dtype=torch.int8)}),
        r"out\.2\.bias of the custom U-Net must hold floats, found torch\.int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_tensor_is_named(single, fault):
    change, message = FAULTS[fault]
    broken(single, change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_parts(single)
    assert str(single) in str(error.value)


def test_numbers_that_do_not_fit_the_dtype(single):
    broken(single, lambda t: t[UNET + "out.2.bias"].fill_(1e6))
    assert load_parts(single).unet.conv_out.bias[0] == 1e6
    with pytest.raises(CheckpointError, match=r"holds NaN or infinite numbers \(as torch.float16\)"):
        load_parts(single, dtype=torch.float16)


def test_what_real_files_carry_besides_is_ignored(single, sd15):
    extra = ["model_ema.decay", "betas", "cond_stage_model.transformer.text_model.embeddings.position_ids"]
    broken(single, lambda t: t.update({name: torch.ones(1) for name in extra}))
    assert torch.equal(load_parts(single).unet.conv_in.weight, sd15.unet.conv_in.weight)


def test_text_towers_without_their_middle_name(single, sd15):
    """Some mergers leave `text_model` out."""

    def rename(tensors):
        for name in [n for n in tensors if ".text_model." in n]:
            tensors[name.replace(".text_model.", ".")] = tensors.pop(name)

    broken(single, rename)
    assert torch.equal(load_parts(single).text_encoders[0].text_model.final_layer_norm.bias, norm_bias(sd15))


@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
def test_a_text_projection_under_the_folders_name_lies_as_in_folders(folder, tmp_path, name):
    """So it stands in SDXL files that diffusers' script of 2023 wrote from folders."""
    parts = load_parts(folder(name))
    tensors, prefix = single_tensors(parts), keymap.TEXT_LAYOUTS[keymap.text_layout(parts.spec)][-1][0]
    tensors[f"{prefix}text_projection.weight"] = tensors.pop(f"{prefix}text_projection").T.contiguous()
    write_safetensors(tmp_path / "m.safetensors", tensors, metadata(parts))
    assert not inspect(tmp_path / "m.safetensors").missing
    ours, theirs = load_parts(tmp_path / "m.safetensors").text_encoders[-1], parts.text_encoders[-1]
    assert torch.equal(ours.state_dict()["text_projection.weight"], theirs.state_dict()["text_projection.weight"])


def norm_bias(parts):
    return parts.text_encoders[0].text_model.final_layer_norm.bias


def test_a_failed_load_leaves_what_was_loaded_alone(single, sd15):
    parts = load_parts(single)
    x, t, context = torch.ones(1, 4, 8, 8), torch.ones(1), torch.ones(1, 2, 32)
    before = parts.unet(x, t, context)
    for change, _ in FAULTS.values():
        shutil.copy(single, single.with_name("other.safetensors"))
        other = broken(single.with_name("other.safetensors"), change)
        with pytest.raises(CheckpointError):
            load_parts(other)
    assert torch.equal(parts.unet(x, t, context), before)
    save_single(parts, single)  # over the very file that it is mapped from
    assert torch.equal(parts.unet(x, t, context), before)
    assert torch.equal(load_parts(single).unet(x, t, context), before)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(single, enabled):
    assert gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        load_parts(single)
        with pytest.raises(FileNotFoundError):
            load_parts("nothing.safetensors")
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


def test_the_moving_average_is_taken_on_demand(single):
    def add(tensors):
        for name in [n for n in tensors if n.startswith(UNET)]:
            tensors[keymap.ema_name(name)] = tensors[name] + 1

    broken(single, add)
    plain, ema = load_parts(single).unet, load_parts(single, ema=True).unet
    for a, b in zip(plain.parameters(), ema.parameters(), strict=True):
        assert torch.equal(a + 1, b)


def test_no_moving_average(single):
    with pytest.raises(CheckpointError, match="ema=True, but the file holds no moving average"):
        load_parts(single, ema=True)


def test_dtypes_are_kept_or_changed(single):
    assert load_parts(single).unet.conv_in.weight.dtype == torch.float32
    convert(single, single.with_name("half.safetensors"), dtype=torch.bfloat16)
    parts = load_parts(single.with_name("half.safetensors"))
    for module in (parts.unet, parts.vae, *parts.text_encoders):
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert load_parts(single.with_name("half.safetensors"), dtype=torch.float32).unet.conv_in.weight.dtype == torch.float32


def test_a_stray_tensor_of_another_dtype_follows_the_others(single):
    broken(single, lambda t: t.update({UNET + "out.2.bias": t[UNET + "out.2.bias"].double()}))
    assert {p.dtype for p in load_parts(single).unet.parameters()} == {torch.float32}


def test_ckpt_only_with_the_switch(single, sd15):
    file = open_tensors(single)
    tensors = {n: file.get(n) for n in file.entries}
    torch.save({"state_dict": tensors, "global_step": 1}, single.with_suffix(".ckpt"))
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        load_parts(single.with_suffix(".ckpt"))
    parts = load_parts(single.with_suffix(".ckpt"), allow_pickle=True, spec=sd15.spec)
    assert torch.equal(parts.unet.conv_in.weight, sd15.unet.conv_in.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "epsilon"}, "prediction must be eps, v or x0, got 'epsilon'"),
        ({"dtype": torch.int8}, "dtype must be one of .*, got torch.int8"),
        ({"path": ""}, r"path must be a file, a folder or a hub id \(owner/name\), got ''"),
        ({"path": 5}, "path must be a file, .* got 5"),
        ({"path": ["a"]}, r"path must be a file, .* got \['a'\]"),
        ({"path": __file__, "vae": 5}, "vae must be a file, .* got 5"),
        ({"path": "no/such/thing"}, "no/such/thing: there is no such file or folder"),
        ({"path": "model.safetensors"}, "model.safetensors: there is no such file or folder"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_parts(**{"path": "x.safetensors", **arguments})


# ---------------------------------------------------------------------------------------------------------- folders


@pytest.fixture
def copied(folder, tmp_path):
    def copy(name: str = "sd15") -> Path:
        shutil.copytree(folder(name), tmp_path / name)
        return tmp_path / name

    return copy


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.oracle
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shards", ["10GB", "2MB"])
@pytest.mark.parametrize("safe", [True, False])
def test_shards_variants_and_pickles_of_diffusers(folder, tmp_path, sd15, variant, shards, safe):
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("sd15"), local_files_only=True)
    pipe.save_pretrained(tmp_path / "m", variant=variant, max_shard_size=shards, safe_serialization=safe)
    assert (len(list((tmp_path / "m" / "unet").iterdir())) > 5) == (shards == "2MB")
    parts = load_parts(tmp_path / "m", allow_pickle=not safe)
    assert torch.equal(parts.unet.conv_in.weight, sd15.unet.conv_in.weight)
    assert torch.equal(norm_bias(parts), norm_bias(sd15))
    if not safe:
        with pytest.raises((CheckpointError, FileNotFoundError), match=r"a pickle|expected"):
            load_parts(tmp_path / "m")


def test_the_wanted_variant_is_taken(copied):
    path = copied()
    whole = path / "unet" / "diffusion_pytorch_model.safetensors"
    file = open_tensors(whole)
    write_safetensors(whole.with_name("diffusion_pytorch_model.fp16.safetensors"), {n: file.get(n).half() for n in file.entries})
    assert load_parts(path).unet.conv_in.weight.dtype == torch.float32
    assert load_parts(path, variant="fp16").unet.conv_in.weight.dtype == torch.float16
    whole.unlink()
    assert load_parts(path).unet.conv_in.weight.dtype == torch.float16


def test_old_folders_name_the_vaes_attention_otherwise(copied, sd15):
    path = copied() / "vae" / "diffusion_pytorch_model.safetensors"
    broken(path, names_of_2022)
    assert any(".query." in n for n in open_tensors(path).entries)
    vae = load_parts(path.parent.parent).vae
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), sd15.vae.parameters(), strict=True))


def names_of_2022(tensors):
    for name in [n for n in tensors if "attentions" in n]:
        new = name
        for ours, theirs in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            new = new.replace(f".{ours}.", f".{theirs}.")
        tensors[new] = tensors.pop(name)


def test_a_tensor_under_its_older_and_its_newer_name(copied):
    path, new = copied(), "encoder.mid_block.attentions.0.to_q.bias"
    file, old = path / "vae" / "diffusion_pytorch_model.safetensors", new.replace("to_q", "query")
    broken(file, lambda t: t.update({old: t[new].clone()}))
    load_parts(path)
    broken(file, lambda t: t[old].add_(1))
    with pytest.raises(CheckpointError, match=rf"'{old}' and '{new}' mean the same and differ|'{new}' and '{old}' mean"):
        load_parts(path)


def test_position_ids_of_old_text_towers_are_ignored(copied):
    path = copied() / "text_encoder" / "model.safetensors"
    broken(path, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(77)[None]}))
    load_parts(path.parent.parent)


def test_a_projection_that_nobody_asks_for_is_ignored(copied):
    """As in text towers that were saved with the pooled state's projection, for a model that does not use it."""
    path = copied() / "text_encoder" / "model.safetensors"
    broken(path, lambda t: t.update({"text_projection.weight": torch.ones(4, 4)}))
    load_parts(path.parent.parent)


def test_folder_faults(copied):
    path = copied()
    broken(path / "unet" / "diffusion_pytorch_model.safetensors", lambda t: t.update({"x": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"unet.*1 tensors belong to no part of a U-Net: 'x'"):
        load_parts(path)
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"unet: expected diffusion_pytorch_model.safetensors .* found config.json"):
        load_parts(path)
    shutil.rmtree(path / "unet")
    with pytest.raises(CheckpointError, match="expected a model folder"):
        load_parts(path)


def test_a_folder_without_its_tokenizer(copied, sd15):
    """CLIP's own is known; another can not be guessed, and half of one is none."""
    path = copied()
    shutil.rmtree(path / "tokenizer")
    parts = load_parts(path)
    assert parts.spec == sd15.spec
    assert parts.tokenizers[0]("a cat!") == sd15.tokenizers[0]("a cat!")
    config = path / "text_encoder" / "config.json"
    edit(config, vocab_size=500)
    with pytest.raises(CheckpointError, match=r"vocab_size is 500, but there are 49408 tokens in .*tokenizer, which is not there"):
        load_parts(path)
    edit(config, vocab_size=50000)
    with pytest.raises(CheckpointError, match=r"text_encoder.config.json: vocab_size is 50000, .* which is not there, .*Copy"):
        load_parts(path)


def merged(folder: Path, pair: str) -> None:
    """A pair that the vocabulary does not know, in whichever file has its merges."""
    tokenizer.write(folder, tokenizer.read(folder)[0], 49407)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    with (folder / "merges.txt").open("a", encoding="utf-8") as f:
        f.write(pair)


TOKENIZERS = {
    "empty": (lambda t: [p.unlink() for p in t.iterdir()], "expected vocab.json and merges.txt, or tokenizer.json, found nothing"),
    "half": (
        lambda t: [p.unlink() for p in t.iterdir() if p.name != "tokenizer_config.json"],
        "or tokenizer.json, found tokenizer_config.json; copy the tokenizer's files again",
    ),
    "another's": (lambda t: (t / "tokenizer.json").write_text("{}"), r"are not a CLIP tokenizer's \(KeyError\('model'\)\)"),
    "torn": (lambda t: (t / "tokenizer.json").write_text('{"model'), r"tokenizer\.json: this is no JSON"),
    "another's merges": (lambda t: merged(t, "猫 猫"), "vocabulary and merges are not of one tokenizer .*猫"),
    "no number": (lambda t: (t / "added_tokens.json").write_text('{"a": 49408, "b": "x"}'), "are not a CLIP tokenizer's"),
    "no finite number": (lambda t: (t / "added_tokens.json").write_text('{"a": 1e999}'), "are not a CLIP tokenizer's"),
}  # fmt: skip


@pytest.mark.parametrize("fault", TOKENIZERS)
def test_a_faulty_tokenizer_is_named(copied, fault):
    path = copied()
    change, message = TOKENIZERS[fault]
    change(path / "tokenizer")
    with pytest.raises(CheckpointError, match=message) as error:
        load_parts(path)
    assert str(path / "tokenizer") in str(error.value)


def test_more_tokens_than_the_tower_knows(copied):
    path = copied()
    edit(path / "text_encoder" / "config.json", vocab_size=49407)
    with pytest.raises(CheckpointError, match=r"vocab_size is 49407, but there are 49408 tokens in .*tokenizer$"):
        load_parts(path)


def test_prediction_and_schedule_of_a_folder(copied):
    path = copied()
    file = path / "scheduler" / "scheduler_config.json"
    edit(file, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", beta_schedule="linear")
    spec = load_parts(path).spec
    assert (spec.prediction, spec.schedule.zero_snr, spec.schedule.kind) == ("v", True, "linear")
    assert (spec.sampling.spacing, spec.sampling.final) == ("trailing", "sigma_min")
    assert load_parts(path, prediction="eps").spec.prediction == "eps"


SCHEDULERS = {
    "PNDMScheduler": ({}, families.SamplingSpec(spacing="leading", steps_offset=0, final="sigma_min")),
    "DDIMScheduler": ({}, families.SamplingSpec(spacing="leading", steps_offset=0, final="zero")),
    "EulerDiscreteScheduler": (  # SDXL's, with what a DDIM file left behind
        {"steps_offset": 1, "set_alpha_to_one": False, "timestep_spacing": "leading"},
        families.SamplingSpec(spacing="leading", steps_offset=1, final="zero"),
    ),
    "DPMSolverSDEScheduler": ({}, families.SamplingSpec(spacing="linspace", steps_offset=0, final="zero")),
    "LCMScheduler": (
        {"set_alpha_to_one": True},
        families.SamplingSpec(spacing="lcm", steps_offset=0, final="zero", sampler="lcm", steps=4, guidance=1.0),
    ),
    "TCDScheduler": (
        {"set_alpha_to_one": True, "steps_offset": 1},
        families.SamplingSpec(spacing="lcm", steps_offset=0, final="sigma_min", sampler="tcd", steps=4, guidance=1.0),
    ),
    "EulerAncestralDiscreteScheduler": (
        {"timestep_spacing": "trailing"},
        families.SamplingSpec(spacing="trailing", steps_offset=0, final="zero", sampler="euler_ancestral", steps=4, guidance=1.0),
    ),
    "DPMSolverMultistepScheduler": (
        {"final_sigmas_type": "sigma_min"},
        families.SamplingSpec(spacing="linspace", steps_offset=0, final="sigma_min"),
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_files(name):
    fields, expected = SCHEDULERS[name]
    file = {"_class_name": name, "beta_schedule": "scaled_linear", "prediction_type": "epsilon", **fields}
    _, sampling, prediction = configs.read_schedule(configs.Config(Path("s.json"), file))
    assert (sampling, prediction) == (expected, "eps")


@pytest.mark.parametrize(
    "fields",
    [
        {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "CosineDPMSolverMultistepScheduler", "sigma_data": 1.0},
        {"shift": 3.0},
    ],
)
def test_models_of_other_noise_levels_are_refused(fields):
    with pytest.raises(CheckpointError, match=r"s\.json: .* is for models trained on other noise levels than betas"):
        configs.read_schedule(configs.Config(Path("s.json"), fields))


def sampled(spec, **changes):
    """The spec with other habits of sampling, as the owner of a model writes them in its scheduler's file."""
    return replace(spec, name=f"{spec.name} {changes}", sampling=replace(spec.sampling, **changes))


OWN = [
    sampled(families.EMBEDDED, sampler="dpmpp_2m", spacing="karras", steps=20, guidance=5.0),
    sampled(families.SD15, sampler="unipc", steps=12),
    sampled(families.SDXL, sampler="euler", spacing="trailing", steps=6, guidance=1.5),
]


@pytest.mark.parametrize("spec", [*ALL, families.EMBEDDED, *OWN], ids=lambda s: s.name)
def test_configurations_survive_a_round_trip(spec):
    again = by_folder(spec)
    assert again == replace(spec, name=again.name)
    assert again.name == spec.name or spec is families.EMBEDDED or spec in OWN


def by_folder(spec):
    """The spec as it is written to a folder's configurations and read again."""
    path = Path("config.json")
    return configs.assemble(
        unet=configs.Config(path, configs.unet_json(spec.unet)),
        vae=configs.Config(path, configs.vae_json(spec.vae)),
        scheduler=configs.Config(path, configs.scheduler_json(spec)),
        towers=[
            configs.read_tower(configs.Config(path, configs.tower_json(t)), pad=t.pad, begin=t.begin, end=t.end)
            for t in spec.towers
        ],
        index=configs.index_json(spec),
    )


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("family", ALL, ids=lambda s: s.name)
def test_every_prediction_survives_a_file_and_a_folder(sd15, family, prediction):
    """As a user's word makes it of a folder and of a file, which differ for SD 2.x in the size; and of SDXL with zero SNR."""
    specs = [configs.named(replace(family, prediction=prediction)), detect.predicting(family, prediction)]
    if family.vector != "none":
        leading = replace(specs[0], schedule=replace(family.schedule, zero_snr=True))
        specs += [leading, *map(detect.with_zero_snr, specs)]
    for spec in specs:
        said = metadata(replace(sd15, spec=spec, tokenizers=sd15.tokenizers * len(spec.towers)))
        assert detect.detect(with_tensors(header(family, **said), *markers(spec))).spec == spec
        assert by_folder(spec) == spec


def test_the_users_word_on_a_folders_prediction_names_its_family(monkeypatch, copied):
    path, small = copied("sd21"), load_parts(copied("sd21-base")).spec
    base = replace(small, name="sd21-base")
    monkeypatch.setattr(configs, "FAMILIES", {"sd21": replace(base, name="sd21", prediction="v"), "sd21-base": base})
    assert load_parts(path).spec.name == "sd21"
    assert load_parts(path, prediction="eps").spec.name == "sd21-base"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"sampler": "ddmi"}, "sampler is 'ddmi'; latentdiff runs only 'ddpm' or 'ddim'"),
        ({"spacing": "karas"}, "spacing is 'karas'; latentdiff runs only"),
        ({"steps": "20"}, "steps must be int, found '20'"),
        ({"step": 20}, "_sampling may hold sampler, spacing, steps, guidance, found 'step'"),
        ("ddim", "_sampling must be dict, found 'ddim'"),
    ],
)
def test_bad_habits_of_sampling_are_named(own, message):
    with pytest.raises(CheckpointError, match=message):
        configs.read_schedule(configs.Config(Path("s.json"), {"_class_name": "DDIMScheduler", "_sampling": own}))


# What stands in the folders of 2022: CompVis/stable-diffusion-v1-4, runwayml/stable-diffusion-inpainting.
LEVELS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
UNET_2022 = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0.dev0", "act_fn": "silu", "attention_head_dim": 8,
    "center_input_sample": False, "cross_attention_dim": 768, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
    "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32,
    "out_channels": 4, "sample_size": 64, **LEVELS,
}  # fmt: skip
VAE_2022 = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.5.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
PNDM_2022 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.4.0.dev0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "trained_betas": None,
}  # fmt: skip


@pytest.mark.parametrize("offset", [{}, {"steps_offset": 1}])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("family", [families.SD15, families.SD15_INPAINT], ids=lambda f: f.name)
def test_the_first_folders_are_their_families(family, size, offset):
    """Sizes of 32 and no offset stand in some of them; diffusers' pipelines mend both, and so do we."""
    unet = UNET_2022 | {"in_channels": family.unet.in_channels, "sample_size": size}
    files = {"unet": unet, "vae": VAE_2022, "scheduler": PNDM_2022 | offset}
    towers = [replace(families.CLIP_L, projection=768)]
    made = {part: configs.Config(Path(f"{part}.json"), data) for part, data in files.items()}
    assert configs.assemble(**made, towers=towers, index={}) == family


@pytest.mark.parametrize("field", [*configs.UNET_FIXED, "addition_time_embed_dim"])
def test_what_our_unet_cannot_do_is_refused(field):
    unet = configs.unet_json(families.SDXL.unet) | {field: "something"}
    with pytest.raises(CheckpointError, match=rf"unet.json: {field} is 'something'; latentdiff runs only"):
        configs.read_unet(configs.Config(Path("unet.json"), unet))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("down_block_types", ["AttnDownBlock2D"] * 4, "down_block_types"),
        ("up_block_types", ["UpBlock2D"] * 4, "up_block_types"),
        ("block_out_channels", [33, 64, 128, 128], "multiple of"),
        ("block_out_channels", "320", "block_out_channels must be list"),
        ("attention_head_dim", [8, 8], "attention_head_dim must be a whole number or 4 of them"),
        ("layers_per_block", [2, 2, 3, 2], "layers_per_block must be one whole number"),
        ("cross_attention_dim", None, None),
        ("in_channels", "4", "in_channels must be int, found '4'"),
        ("in_channels", True, "in_channels must be int, found True"),
        ("down_block_types", [["DownBlock2D"]] * 4, "down_block_types"),
        ("down_block_types", ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"], "down_block_types"),
        ("cross_attention_dim", [[768], [768]], r"cross_attention_dim must be one whole number, found \[\[768\], \[768\]\]"),
        ("norm_num_groups", 0, "each must be a multiple of norm_groups=0"),
        ("in_channels", -1, "in_channels must not be negative, found -1"),
        ("layers_per_block", -1, "layers_per_block must be one whole number, found -1"),
        ("time_cond_proj_dim", "256", "time_cond_proj_dim must be int, found '256'"),
    ],
)
def test_bad_values_in_a_config(field, value, message):
    unet = configs.unet_json(families.SD15.unet) | {field: value}
    config = configs.Config(Path("unet.json"), unet)
    if message is None:
        assert configs.read_unet(config).context_dim == 1280  # what diffusers means by a missing field
        return
    with pytest.raises(CheckpointError, match=message):
        configs.read_unet(config)


@pytest.mark.parametrize("widths", [["64"], [64, None], [[64]], [64, 32]])
def test_bad_widths_of_a_tiny_autoencoder(widths):
    config = configs.Config(Path("vae.json"), configs.vae_json(TinyVAEConfig()) | {"encoder_block_out_channels": widths})
    with pytest.raises(CheckpointError, match=r"vae\.json: encoder"):
        configs.read_vae(config)


def test_a_text_tower_of_no_size():
    config = configs.Config(Path("text.json"), configs.tower_json(families.CLIP_L) | {"num_hidden_layers": -1})
    with pytest.raises(CheckpointError, match=r"text\.json: num_hidden_layers must not be negative"):
        configs.read_tower(config, pad=0, begin=1, end=2)


def test_towers_and_unet_must_fit(copied):
    path = copied()
    edit(path / "unet" / "config.json", cross_attention_dim=64)
    with pytest.raises(CheckpointError, match="cross_attention_dim is 64, but the text towers are 32 wide together"):
        load_parts(path)


def test_nothing_in_a_folder_is_executed_or_changes_what_is_imported(copied, tmp_path, monkeypatch):
    """auto_map, custom_pipeline, class names and attention implementations (CVE-2026-4372, -5241, -44513, -45804)."""
    path = copied()
    canary = tmp_path / "canary"
    evil = f"import pathlib; pathlib.Path({str(canary)!r}).mkdir()\nclass Evil: pass\n"
    for name in ("evil.py", "pipeline.py", "unet/evil.py", "text_encoder/evil.py", "tokenizer/evil.py", "__init__.py"):
        (path / name).write_text(evil)
    tricks = {
        "auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "custom_pipeline": "evil",
        "_attn_implementation_internal": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "trust_remote_code": True,
        "architectures": ["Evil"],
        "tokenizer_class": "Evil",
        "_class_name": ["evil", "Evil"],
    }
    for file in path.rglob("*config.json"):
        edit(file, **(tricks if file.parent.name != "scheduler" else {k: v for k, v in tricks.items() if k != "_class_name"}))
    edit(path / "model_index.json", **{**tricks, "unet": ["evil", "Evil"], "text_encoder": ["evil", "Evil"]})
    monkeypatch.chdir(path)
    before = set(sys.modules)
    load_parts(path)
    assert not canary.exists()
    assert not {m for m in set(sys.modules) - before if "evil" in m or m.startswith(("transformers", "diffusers"))}


def test_building_on_meta_draws_nothing_and_imports_nothing():
    program = """if True:
        import sys
        from latentdiff.checkpoints import families, fill
        from latentdiff.models.text import TextTower
        before = len(sys.modules)
        tower = fill.on_meta(TextTower, families.SD15.towers[0])
        assert all(p.is_meta for p in tower.parameters())
        assert len(sys.modules) - before < 10, len(sys.modules) - before
        assert not {"transformers", "open_clip", "torchvision", "huggingface_hub", "diffusers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("kind", ["folder", "single"])
def test_no_connection_is_even_tried(folder, single, kind, monkeypatch):
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise OSError("blocked")

    for name in ("socket", "create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    load_parts(folder("sdxl") if kind == "folder" else single)
    assert not attempts


# ----------------------------------------------------------------------------------------------- other autoencoders


def test_another_vae_from_a_folder_a_model_and_files(folder, single, sd15, tmp_path):
    other = load_parts(folder("sd21")).vae
    sources = keymap.vae_sources(other.state_dict(), other.config, prefix="")
    write_safetensors(tmp_path / "bare.safetensors", original_tensors(other.state_dict(), sources))
    broken(single, lambda t: [t.pop(k) for k in list(t) if k.startswith("first_stage")])
    with pytest.raises(CheckpointError, match=r"there is no VAE in this file; give one as `vae` \(--vae\)"):
        load_parts(single)
    alone = tmp_path / "alone.safetensors"  # of a folder
    shutil.copy(folder("sd21") / "vae" / "diffusion_pytorch_model.safetensors", alone)
    old = broken(Path(shutil.copy(alone, tmp_path / "old.safetensors")), names_of_2022)
    for vae in (folder("sd21"), folder("sd21") / "vae", tmp_path / "bare.safetensors", alone, old):
        parts = load_parts(single, vae=vae)
        assert parts.vae.config == sd15.vae.config
        assert torch.equal(parts.vae.encoder.conv_in.weight, other.encoder.conv_in.weight)
        assert torch.equal(parts.unet.conv_in.weight, sd15.unet.conv_in.weight)


def test_of_another_vaes_folder_only_that_is_read(copied, folder):
    """So what else is there may be in the older format; the autoencoder itself may not."""
    path = copied("sd21")
    for part in ("unet", "vae"):
        whole = path / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(whole), whole.with_suffix(".bin"))
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    load_parts(folder("sd15"), vae=path)
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="this is a pickle"):
        load_parts(folder("sd15"), vae=path)
    load_parts(folder("sd15"), vae=path, allow_pickle=True)


@pytest.mark.oracle
@torch.no_grad()
def test_a_tiny_autoencoder_stands_in(folder, tmp_path):
    import diffusers

    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4)
    tiny.save_pretrained(tmp_path / "tiny")
    parts = load_parts(folder("sd15"), vae=tmp_path / "tiny")
    z, image = torch.randn(1, 4, 4, 4), torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.allclose(parts.vae.decode(z), tiny.decode(z).sample, atol=1e-5)
    assert torch.allclose(parts.vae.encode(image), tiny.encode(image).latents, atol=1e-5)
    with pytest.raises(ValueError, match="a tiny autoencoder has no names in the single-file layout"):
        save_single(parts, tmp_path / "x.safetensors")


def test_a_single_file_of_a_model_with_a_tiny_autoencoder(single, sd15):
    spec = replace(sd15.spec, vae=TinyVAEConfig())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a single file holds no tiny autoencoder; give it as `vae`"):
        load_parts(single, spec=spec)


def test_a_vae_of_other_latents(copied, folder):
    path = copied("sd21")
    edit(path / "vae" / "config.json", latent_channels=16)
    with pytest.raises(CheckpointError, match="this autoencoder has 16 latent channels, the model's has 4"):
        load_parts(folder("sd15"), vae=path)


@pytest.mark.parametrize(("width", "channels", "spec"), [
    (768, 4, families.SD15), (1024, 4, families.SD21), (2048, 4, families.SDXL), (1280, 4, families.SDXL_REFINER),
    (768, 9, families.SD15_INPAINT), (2048, 9, families.SDXL_INPAINT), (555, 4, families.SD15),
])  # fmt: skip
def test_the_context_tells_what_a_file_without_text_towers_is(tmp_path, width, channels, spec):
    name = f"{keymap.UNET_PREFIX}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    tensors = {detect.CONV_IN: torch.zeros(2, channels, 3, 3), name: torch.zeros(2, width)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    assert detect.detect(open_tensors(tmp_path / "a.safetensors")).spec == spec


def test_a_folder_called_model_is_named_with_the_one_above(folder, tmp_path):
    (tmp_path / "cats").mkdir()
    shutil.copytree(folder("sd15"), tmp_path / "cats" / "model")
    assert load_parts(tmp_path / "cats" / "model").title == "cats/model"
    assert load_parts(folder("sd15")).title == folder("sd15").name


@pytest.mark.parametrize(("spacing", "told"), [("trailing", True), ("leading", False)])
def test_a_model_that_is_taken_for_a_distilled_one_says_so(copied, spacing, told):
    path = copied("sd15")
    edit(path / "scheduler" / "scheduler_config.json", _class_name="EulerDiscreteScheduler", timestep_spacing=spacing)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert (load_parts(path).spec.sampling.steps == 4) == told
    message = "its scheduler (EulerDiscreteScheduler, trailing, epsilon) is the one of models distilled for few steps: unless"
    assert any(str(warning.message).startswith(message) for warning in said) == told


@pytest.mark.parametrize(
    ("changes", "message"), [({"ema": True}, "ema is for .* holds one set"), ({"spec": families.SD15}, "spec is for .* own")]
)
def test_what_is_for_single_files_alone_is_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        load_parts(folder("sd15"), **changes)
