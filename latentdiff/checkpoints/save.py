"""A model to a folder or to a single file, whole or not at all, so that the programs of the field open it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.checkpoints import configs, keymap, tokenizer
from latentdiff.checkpoints.detect import FAMILIES, PREDICTIONS, predicting, with_zero_snr
from latentdiff.checkpoints.families import ModelSpec, Prediction
from latentdiff.checkpoints.files import replacing_folder, some_names, write_json, write_safetensors
from latentdiff.checkpoints.io import Parts, load_parts, single_sources
from latentdiff.checkpoints.keymap import Source
from latentdiff.models.narrow import is_narrowed
from latentdiff.models.vae_tiny import TinyVAEConfig

# ModelSpec 1.0.1 (github.com/Stability-AI/ModelSpec), the metadata of single files that the field reads.
ARCHITECTURES: Mapping[str, str] = {
    "sd15": "stable-diffusion-v1",
    "sd15-inpaint": "stable-diffusion-v1/inpainting",
    "instruct-pix2pix": "stable-diffusion-v1/instruct-pix2pix",
    "sd21": "stable-diffusion-v2-768-v",
    "sd21-base": "stable-diffusion-v2-512",
    "sd2-inpaint": "stable-diffusion-v2-512/inpainting",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-inpaint": "stable-diffusion-xl-v1-base/inpainting",
    "sdxl-instruct": "stable-diffusion-xl-v1-base/instruct-pix2pix",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
# What a folder that we write may hold, and what file managers write into folders that are looked into.
FOLDER = ("model_index.json", "scheduler", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "clip")
SEEN = (".DS_Store", "desktop.ini", "Thumbs.db")


def save_folder(parts: Parts, path: str | os.PathLike) -> None:
    """Write a model folder (diffusers layout); an older model folder of that name is replaced once the new one is whole.

    Errors: FileExistsError if `path` is anything else than a model folder, or holds more than that; ValueError for a U-Net in fewer
    bits.
    """
    spec = parts.spec
    check_replaceable(Path(path))
    check_whole(parts)
    with replacing_folder(Path(path)) as folder:
        scheduler = scheduler_of(parts)
        index = configs.index_json(spec) | {"scheduler": ["diffusers", scheduler["_class_name"]]}
        write_json(folder / "model_index.json", index)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        _write_part(folder / "unet", "diffusion_pytorch_model", configs.unet_json(spec.unet), parts.unet)
        _write_part(folder / "vae", "diffusion_pytorch_model", configs.vae_json(spec.vae), parts.vae)
        names = ["_2"] if spec.vector == "aesthetic" else ["", "_2"]  # the refiner's only tower is called the second
        for name, tower, module, words in zip(names, spec.towers, parts.text_encoders, parts.tokenizers, strict=False):
            _write_part(folder / f"text_encoder{name}", "model", configs.tower_json(tower), module)
            tokenizer.write(folder / f"tokenizer{name}", words, tower.pad)
        if parts.clip is not None:
            shutil.copytree(parts.clip, folder / "clip")


def scheduler_of(parts: Parts) -> Mapping[str, Any]:
    """The file that the model came with, as long as it says what the model is; other programs take their sampler from it."""
    written, own = configs.scheduler_json(parts.spec), parts.scheduler
    if own is None or not isinstance(own.get("_class_name"), str):
        return written
    old, new = (configs.read_schedule(configs.Config(Path("scheduler_config.json"), dict(found))) for found in (own, written))
    return own if old == new else written


def check_whole(parts: Parts) -> None:
    if is_narrowed(parts.unet):
        raise ValueError("a U-Net that was narrowed (float8, int8, weights) is not that of its files: save it loaded without")


def check_replaceable(path: Path) -> None:
    """Only a model folder is ever replaced, and none that holds something else, which would be lost."""
    if path.name in ("", ".."):
        raise ValueError(f"target {path}: needs the name of a folder, which is written beside it and then renamed")
    found = sorted(p.name for p in path.iterdir() if p.name not in SEEN) if path.is_dir() else []
    if path.exists() and not (path.is_dir() and ("model_index.json" in found or not found)):
        raise FileExistsError(f"{path}: exists and is no model folder (model_index.json); it is not replaced")
    if others := [name for name in found if name not in FOLDER]:
        raise FileExistsError(f"{path}: holds {some_names(others)} beside a model, and is not replaced; write to another name")


def _write_part(folder: Path, stem: str, config: Mapping, module: nn.Module) -> None:
    write_json(folder / "config.json", config)
    write_safetensors(folder / f"{stem}.safetensors", module.state_dict())


def save_single(parts: Parts, path: str | os.PathLike) -> None:
    """Write one `.safetensors` file in the original naming, with ModelSpec metadata.

    A model of no family, or with a tokenizer of its own, gets its configurations and vocabulary into the metadata too.
    Errors: ValueError for a tiny autoencoder, or anything else without a name in the original layout, and a U-Net in fewer bits.
    """
    check_whole(parts)
    if isinstance(parts.spec.vae, TinyVAEConfig):
        raise ValueError("a tiny autoencoder has no names in the single-file layout; save a folder, or load the model's own VAE")
    write_safetensors(Path(path), single_tensors(parts), metadata(parts))


def single_tensors(parts: Parts) -> dict[str, Tensor]:
    """All of a model's tensors under their original names."""
    modules: dict[str, nn.Module] = {"unet": parts.unet, "vae": parts.vae}
    modules |= {f"text {i}": tower for i, tower in enumerate(parts.text_encoders)}
    tensors: dict[str, Tensor] = {}
    for part, sources in single_sources(modules, keymap.text_layout(parts.spec)).items():
        tensors |= original_tensors(modules[part].state_dict(), sources)
    return tensors | {name: torch.ones(1) for name in markers(parts.spec)}


def markers(spec: ModelSpec) -> list[str]:
    """Names of tensors that say by being there what an SDXL predicts, and of its schedule."""
    marks = {"v_pred": spec.prediction == "v", "ztsnr": spec.schedule.zero_snr}
    return [name for name, there in marks.items() if there and spec.vector != "none"]


def original_tensors(state: Mapping[str, Tensor], sources: Mapping[str, Source]) -> dict[str, Tensor]:
    shared: dict[str, list[tuple[Source, Tensor]]] = {}
    for name, source in sources.items():
        shared.setdefault(source.name, []).append((source, state[name]))
    for found in shared.values():
        found.sort(key=lambda pair: pair[0].op)  # thirds in their order
    return {name: found[0][0].original([tensor for _, tensor in found]) for name, found in shared.items()}


def metadata(parts: Parts) -> dict[str, str]:
    spec = parts.spec
    xl, layout = spec.vector != "none", keymap.text_layout(spec)
    said = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES.get(spec.name, f"{ARCHITECTURES[FAMILIES[layout, 4].name]}/custom"),
        "modelspec.implementation": f"https://github.com/{'Stability-AI/generative-models' if xl else 'CompVis/stable-diffusion'}",
        "modelspec.title": parts.title,
        "modelspec.resolution": f"{spec.size}x{spec.size}",
        "modelspec.prediction_type": next(name for name, p in PREDICTIONS.items() if p == spec.prediction),
    }
    standard = all(tokenizer.is_standard(t) for t in parts.tokenizers)
    if not (standard and follows_from_names(spec)):
        own = {
            "unet": configs.unet_json(spec.unet),
            "vae": configs.vae_json(spec.vae),
            "text": [configs.tower_json(t) for t in spec.towers],
            "scheduler": configs.scheduler_json(spec),
            "index": configs.index_json(spec),
            "tokenizer": None if standard else tokenizer.as_data(parts.tokenizers[0]),
        }
        said["latentdiff"] = json.dumps(own, separators=(",", ":"))
    return said


def follows_from_names(spec: ModelSpec) -> bool:
    """Whether `detect` finds this spec again, from names, shapes and markers."""
    family = FAMILIES.get((keymap.text_layout(spec), spec.unet.in_channels))
    if family is None:
        return False
    found = predicting(family, spec.prediction)
    return spec == (with_zero_snr(found) if spec.schedule.zero_snr and spec.vector != "none" else found)


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    ema: bool = False,
    prediction: Prediction | None = None,
    allow_pickle: bool = False,
    variant: str | None = None,
) -> None:
    """Load a model and save it: as one file if `target` ends in `.safetensors`, else as a folder.

    dtype: of the written weights; None keeps them. ema: take the U-Net's moving average. The others as in `load_parts`.
    Errors: ValueError and FileExistsError for a target, before anything is read; else those of `load_parts`.
    """
    target = Path(target)
    if target.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise ValueError(f"target {target}: models are written as a .safetensors file or as a folder, not as a pickle")
    single = target.suffix.lower() == ".safetensors"
    if not single:
        check_replaceable(target)
    elif target.is_dir():
        raise FileExistsError(f"{target}: is a folder; a name that ends in .safetensors is for one file")
    elif target.exists() and os.path.exists(source) and os.path.samefile(source, target):
        raise ValueError(f"target must be another file than source, got {target}")
    parts = load_parts(source, dtype=dtype, ema=ema, prediction=prediction, allow_pickle=allow_pickle, variant=variant)
    (save_single if single else save_folder)(parts, target)
