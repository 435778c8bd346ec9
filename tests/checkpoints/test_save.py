"""Inspect and convert, and saving whole or not at all."""

import json
import shutil
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from latentdiff.checkpoints import keymap
from latentdiff.checkpoints.files import CheckpointError, open_tensors, write_safetensors
from latentdiff.checkpoints.io import load_parts
from latentdiff.checkpoints.report import inspect
from latentdiff.checkpoints.save import check_replaceable, convert, save_folder, save_single, single_tensors


@pytest.fixture(scope="module")
def sdxl(folder):
    return load_parts(folder("sdxl"))


def states(parts):
    return [m.state_dict() for m in (parts.unet, parts.vae, *parts.text_encoders)]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl-refiner"])
def test_converting_there_and_back_changes_nothing(folder, tmp_path, name):
    convert(folder(name), tmp_path / "m.safetensors")
    convert(tmp_path / "m.safetensors", tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "again.safetensors")
    before, after = load_parts(folder(name)), load_parts(tmp_path / "m")
    assert before.spec == after.spec
    for a, b in zip(states(before), states(after), strict=True):
        assert list(a) == list(b)
        assert all(torch.equal(a[k], b[k]) for k in a)
    first, second = open_tensors(tmp_path / "m.safetensors"), open_tensors(tmp_path / "again.safetensors")
    assert first.entries == second.entries
    assert all(torch.equal(first.get(n), second.get(n)) for n in first.entries)


def test_converting_changes_dtype_and_takes_the_moving_average(folder, tmp_path):
    parts = load_parts(folder("sd15"))
    tensors = single_tensors(parts)
    ema = {keymap.ema_name(n): t * 2 for n, t in tensors.items() if n.startswith(keymap.UNET_PREFIX)}
    convert(folder("sd15"), tmp_path / "plain.safetensors")
    said = open_tensors(tmp_path / "plain.safetensors").metadata
    write_safetensors(tmp_path / "both.safetensors", tensors | ema, said)
    assert inspect(tmp_path / "both.safetensors").ema
    convert(tmp_path / "both.safetensors", tmp_path / "half", dtype=torch.float16, ema=True)
    half = load_parts(tmp_path / "half")
    assert torch.equal(half.unet.conv_in.weight, (parts.unet.conv_in.weight * 2).half())
    assert torch.equal(half.vae.quant_conv.weight, parts.vae.quant_conv.weight.half())
    assert inspect(tmp_path / "half").dtypes.keys() == {"float16"}


def test_models_are_not_written_as_pickles(folder, tmp_path):
    with pytest.raises(ValueError, match=r"target .*m\.ckpt: models are written as a \.safetensors file or as a folder"):
        convert(folder("sd15"), tmp_path / "m.ckpt")
    assert not list(tmp_path.iterdir())
    (one := tmp_path / "one.safetensors").touch()
    with pytest.raises(ValueError, match="target must be another file than source"):
        convert(one, tmp_path / "." / "one.safetensors", dtype=torch.bfloat16)


TARGETS = {
    "photos": (["cat.png"], "photos: exists and is no model folder"),
    "seen": ([".DS_Store", "cat.png"], "seen: exists and is no model folder"),
    "mine": (["model_index.json", "unet/x", "v1.safetensors"], r"mine: holds 'v1\.safetensors' beside a model"),
    "x.safetensors": (["y"], r"x\.safetensors: is a folder; a name that ends in \.safetensors is for one file"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_would_be_lost_is_refused_before_anything_is_read(tmp_path, name):
    files, message = TARGETS[name]
    for file in files:
        (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name / file).touch()
    with pytest.raises(FileExistsError, match=message):
        convert(tmp_path / "there is no such source", tmp_path / name)
    if name != "x.safetensors":
        with pytest.raises(FileExistsError, match=message):
            save_folder(SimpleNamespace(spec=None), tmp_path / name)  # type: ignore[arg-type]
    assert all((tmp_path / name / file).exists() for file in files)


def test_what_a_file_manager_left_is_in_nobodys_way(folder, tmp_path):
    """macOS's Finder and Windows' Explorer write files of their own into every folder that somebody looks into."""
    for seen in ("empty", "m"):
        (tmp_path / seen).mkdir()
        (tmp_path / seen / ".DS_Store").touch()
    for name in ("model_index.json", "desktop.ini", "Thumbs.db"):
        (tmp_path / "m" / name).touch()
    for seen in ("empty", "m"):
        check_replaceable(tmp_path / seen)


@pytest.mark.parametrize("target", ["", ".", ".."])
def test_a_folder_without_a_name_is_refused_before_anything_is_read(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"target \.+: needs the name of a folder"):
        convert(tmp_path / "there is no such source", target)


def test_a_full_disk_leaves_what_was_there(folder, tmp_path, monkeypatch):
    """A save that stops in the middle: the old model still loads, and nothing else is left."""
    parts = load_parts(folder("sd15"))
    save_folder(parts, tmp_path / "m")
    save_single(parts, tmp_path / "m.safetensors")
    other = replace(parts, title="other")
    with torch.no_grad():
        other = replace(other, unet=load_parts(folder("sd15"), dtype=torch.float16).unet)
    from latentdiff.checkpoints import files

    real, count = files.os.fsync, iter(range(100))
    monkeypatch.setattr(files.os, "fsync", lambda fd: real(fd) if next(count) < 4 else (_ for _ in ()).throw(OSError("disk full")))
    for save, path in ((save_folder, tmp_path / "m"), (save_single, tmp_path / "m.safetensors")):
        with pytest.raises(OSError, match="disk full"):
            save(other, path)
        assert load_parts(path).unet.conv_in.weight.dtype == torch.float32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.safetensors"]


def test_v_prediction_and_zero_snr_of_xl_are_marked(sdxl, tmp_path):
    spec = replace(sdxl.spec, prediction="v", schedule=replace(sdxl.spec.schedule, zero_snr=True))
    save_single(replace(sdxl, spec=spec), tmp_path / "m.safetensors")
    assert {"v_pred", "ztsnr"} <= set(open_tensors(tmp_path / "m.safetensors").entries)
    assert load_parts(tmp_path / "m.safetensors").spec == spec


def test_inspect_a_model(folder, sdxl, tmp_path):
    save_single(sdxl, tmp_path / "m.safetensors")
    file = open_tensors(tmp_path / "m.safetensors")
    tensors = {n: file.get(n) for n in file.entries if n != "model.diffusion_model.out.2.bias"} | {"foo.bar": torch.ones(3)}
    write_safetensors(tmp_path / "m.safetensors", tensors, file.metadata)
    report = inspect(tmp_path / "m.safetensors")
    assert report.kind == "model"
    assert (report.layout, report.prediction_from) == ("single file", "metadata")
    assert report.spec == sdxl.spec
    assert report.unknown == ("foo.bar",)
    assert report.missing == ("model.diffusion_model.out.2.bias",)
    assert report.parts["unet"] == sum(p.numel() for p in sdxl.unet.parameters()) - 4
    text = str(report)
    for word in ("sdxl", "128x128", "eps", "float32", "foo.bar", "out.2.bias", "modelspec.title"):
        assert word in text or word == "sdxl"
    whole = inspect(folder("sdxl"))
    assert (whole.layout, whole.spec, whole.unknown, whole.missing) == ("folder", sdxl.spec, (), ())
    assert whole.parts["vae"] == sum(p.numel() for p in sdxl.vae.parameters())


def test_inspect_a_folder_that_does_not_fit(folder, tmp_path):
    shutil.copytree(folder("sdxl"), tmp_path / "m")
    path = tmp_path / "m" / "text_encoder_2" / "model.safetensors"
    file = open_tensors(path)
    tensors = {n: file.get(n).clone() for n in file.entries}
    write_safetensors(path, {n: t for n, t in tensors.items() if n != "text_projection.weight"} | {"foo": torch.ones(1)})
    report = inspect(tmp_path / "m")
    assert report.unknown == ("text_encoder_2/foo",)
    assert report.missing == ("text_encoder_2/text_projection.weight",)


def test_inspect_a_folder_with_a_tiny_autoencoder(folder, tmp_path):
    tiny = pytest.importorskip("diffusers").AutoencoderTiny(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4
    )
    tiny.save_pretrained(tmp_path / "tiny")
    parts = load_parts(folder("sd15"), vae=tmp_path / "tiny")
    save_folder(parts, tmp_path / "m")
    report = inspect(tmp_path / "m")
    assert (report.unknown, report.missing) == ((), ())
    assert report.parts["vae"] == sum(p.numel() for p in tiny.parameters())


def test_inspect_other_files(tmp_path):
    kinds = {
        "LoRA": "lora_unet_x.lora_down.weight",
        "textual inversion": "clip_l",
        "ControlNet": "control_model.x",
        "Flux": "double_blocks.0.img_mod.lin.weight",
        "autoencoder": "decoder.conv_in.weight",
        "U-Net of a folder": "down_blocks.0.resnets.0.conv1.weight",
        "text tower of a folder": "embeddings.token_embedding.weight",
        "CLIP": "visual.proj",
        "unknown": "x",
    }
    for kind, name in kinds.items():
        write_safetensors(tmp_path / "x.safetensors", {name: torch.ones(2)})
        report = inspect(tmp_path / "x.safetensors")
        assert report.kind == kind
        assert f"x.safetensors: {kind}" in str(report)
    for name in ("x.lora_A.default.weight", "x.diff", "x.lokr_w2", "x.w_norm", "x.hada_w1_b"):
        write_safetensors(tmp_path / "x.safetensors", {name: torch.ones(2)})
        assert inspect(tmp_path / "x.safetensors").kind == "LoRA"
    for name, shape in (("<toy>", (768,)), ("<toy>", (4, 1024)), ("emb_params", (2, 32))):
        write_safetensors(tmp_path / "x.safetensors", {name: torch.ones(shape)})
        assert inspect(tmp_path / "x.safetensors").kind == "textual inversion"


def test_what_a_file_says_gives_the_terminal_no_commands(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"\x1b[2Jx": torch.ones(2)}, {"a\x1b]0;b": "c\x1b[31m\x07 é"})
    assert "metadata    a]0;b = c[31m é" in str(inspect(tmp_path / "x.safetensors"))
    assert str(inspect(tmp_path / "x.safetensors")).replace("\n", "").isprintable()


def test_inspecting_reads_no_tensor(folder, tmp_path, monkeypatch):
    """Headers only: a file whose data is missing parts of its values is described all the same."""
    convert(folder("sd15"), tmp_path / "m.safetensors")
    monkeypatch.setattr("latentdiff.checkpoints.fill.fill", lambda *a: pytest.fail("built a model"))
    monkeypatch.setattr("latentdiff.checkpoints.io.fill", lambda *a: pytest.fail("built a model"))
    assert inspect(tmp_path / "m.safetensors").spec == load_spec(folder)


def load_spec(folder):
    return inspect(folder("sd15")).spec


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"]
)
def test_a_folder_keeps_the_sampler_that_other_programs_take_from_it(folder, tmp_path, name):
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("sd15"), local_files_only=True)
    more = {"use_karras_sigmas": True} if name.startswith("DPM") else {}
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **more)
    pipe.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", name]
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "ours", local_files_only=True)
    assert type(again.scheduler).__name__ == name
    there, here = (tmp_path / whose / "scheduler" / "scheduler_config.json" for whose in ("theirs", "ours"))
    assert json.loads(here.read_text()) == json.loads(there.read_text())
    # what the user says otherwise goes before what the file says
    convert(tmp_path / "theirs", tmp_path / "v", prediction="v")
    said = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    assert (said["_class_name"], said["prediction_type"]) == ("DDIMScheduler", "v_prediction")


def test_tensors_begin_with_cache_lines_in_files_of_any_kind(folder, tmp_path):
    """Mapped into memory elsewhere, float32's products would round otherwise, and a converted model draw other pixels."""
    save_single(load_parts(folder("sd15")), tmp_path / "m.safetensors")
    save_folder(load_parts(folder("sd15")), tmp_path / "m")
    for path in (tmp_path / "m.safetensors", *(tmp_path / "m").glob("*/*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        places = [entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"]
        assert (8 + length) % 64 == 0
        assert all(begin % 64 == 0 for begin, end in places if (end - begin) % 64 == 0)
        assert len(load_file(path)) == len(places)


def test_a_variant_that_no_part_has_is_named(folder, tmp_path):
    save_folder(load_parts(folder("sd15"), dtype=torch.float16), tmp_path / "m")
    unet = tmp_path / "m" / "unet" / "diffusion_pytorch_model"
    for load in (inspect, load_parts):
        with pytest.raises(CheckpointError, match="no part has a variant 'fp16'; there are none"):
            load(tmp_path / "m", variant="fp16")
    unet.with_suffix(".safetensors").rename(unet.with_suffix(".fp16.safetensors"))
    for load in (inspect, load_parts):
        load(tmp_path / "m", variant="fp16")
        with pytest.raises(CheckpointError, match="no part has a variant 'bogus'; there are fp16"):
            load(tmp_path / "m", variant="bogus")


def test_suffixes_in_capitals_are_suffixes(folder, tmp_path):
    convert(folder("sd15"), tmp_path / "m.SAFETENSORS")
    assert (tmp_path / "m.SAFETENSORS").is_file()
    with pytest.raises(ValueError, match="not as a pickle"):
        convert(folder("sd15"), tmp_path / "m.PTH")
