"""A model from a file, a folder or a hub id: detect, build on `meta`, assign what the file maps into memory.

Loading is strict: every tensor of ours must be in the file with the right shape and finite numbers, and every tensor of the
file must be ours or ignorable (`keymap.IGNORABLE`). Weights kept in the file's own dtype are the mapped file itself, not a copy.
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff.checkpoints import configs, hub, keymap, tokenizer
from latentdiff.checkpoints.configs import Config
from latentdiff.checkpoints.detect import CONV_IN, Found, detect, predicting, try_prediction
from latentdiff.checkpoints.families import ModelSpec, Prediction
from latentdiff.checkpoints.files import CheckpointError, TensorFile, open_shards, open_tensors, read_json
from latentdiff.checkpoints.fill import FLOATS, M, Options, check_leftovers, fill, on_meta
from latentdiff.checkpoints.keymap import Source
from latentdiff.models.graphs import uncollected
from latentdiff.models.text import TextTower, Tokenizer
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE, VAEConfig
from latentdiff.models.vae_tiny import TinyVAE, TinyVAEConfig

PARTS = {"unet": "U-Net", "vae": "VAE"}  # in messages


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """A loaded model. `clip` is the folder with the rest of its CLIP (image tower and projections), where it has one."""

    spec: ModelSpec
    unet: UNet
    vae: VAE | TinyVAE
    text_encoders: tuple[TextTower, ...]
    tokenizers: tuple[Tokenizer, ...]
    title: str  # the file's or folder's name, without its path
    clip: Path | None = None
    scheduler: Mapping[str, Any] | None = None  # of a folder: what its scheduler_config.json says


@uncollected()  # a load makes many small objects that stay, and they would be looked through again and again
def load_parts(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    prediction: Prediction | None = None,
    allow_pickle: bool = False,
    variant: str | None = None,
    revision: str | None = None,
    vae: str | os.PathLike[str] | None = None,
    ema: bool = False,
    spec: ModelSpec | None = None,
) -> Parts:
    """Load a model.

    path: a single file in the original naming, a folder in the diffusers layout, or a hub id `owner/name` (only this uses the
    network). dtype: of the weights; None keeps the file's. prediction: overrides what the model's files say.
    allow_pickle: also read `.ckpt` and `.bin`, with torch's `weights_only=True`. variant: `fp16` picks `….fp16.safetensors`.
    vae: another autoencoder (file, folder or hub id; also a tiny one). ema: the U-Net's moving average, where a single file has
    one. spec: the model's sizes, for single files that belong to no family.
    Errors: FileNotFoundError; CheckpointError (a ValueError) with path, expectation, finding and remedy; nothing is half loaded.
    """
    if prediction not in (None, "eps", "v", "x0"):
        raise ValueError(f"prediction must be eps, v or x0, got {prediction!r}")
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    options = Options(dtype=dtype, device=torch.device(device), allow_pickle=allow_pickle, variant=variant, ema=ema)
    where = locate(path, variant=variant, revision=revision, allow_pickle=allow_pickle, vae=None if vae is None else False)
    other = None if vae is None else locate(vae, variant=variant, allow_pickle=allow_pickle, vae=True)
    if not where.is_dir():
        return _load_single(where, prediction, other, options, spec)
    if ema or spec is not None:
        why = "holds one set of weights" if ema else "tells its own sizes"
        raise ValueError(f"{'ema' if ema else 'spec'} is for single files, got {where}: a folder {why}")
    return _load_folder(where, prediction, other, options)


def locate(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    vae: bool | None = None,
) -> Path:
    """A file or folder on this machine, fetched first if `path` is a hub id and nothing of that name is here.

    vae: True where only an autoencoder is wanted of it, False where all but that.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        name = "vae" if vae else "path"
        raise ValueError(f"{name} must be a file, a folder or a hub id (owner/name), got {path!r}")
    here = Path(path)
    if here.exists():
        return here
    if isinstance(path, str) and hub.is_id(path):
        return hub.fetch(path, variant=variant, revision=revision, allow_pickle=allow_pickle, vae=vae)
    raise FileNotFoundError(f"{here}: there is no such file or folder, and it is no hub id (owner/name)")


# ---------------------------------------------------------------------------------------------------------- folders


def _load_folder(folder: Path, prediction: Prediction | None, vae: Path | None, options: Options) -> Parts:
    spec, tokenizers = read_folder(folder)
    check_variant(folder, options.variant)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    spec = configs.named(replace(spec, prediction=prediction or spec.prediction))
    towers = [
        from_folder(on_meta(TextTower, tower), folder / name, options, f"text tower {name}", keymap.TEXT_SYNONYMS)
        for name, tower in zip(tower_folders(folder), spec.towers, strict=True)
    ]
    unet = from_folder(on_meta(UNet, spec.unet), folder / "unet", options, "U-Net")
    autoencoder = load_vae(vae or folder / "vae", spec, options)
    return Parts(
        spec=replace(spec, vae=autoencoder.config),
        unet=unet,
        vae=autoencoder,
        text_encoders=tuple(towers),
        tokenizers=tokenizers,
        title=title_of(folder.resolve()),
        clip=folder / "clip" if (folder / "clip" / "config.json").is_file() else None,
        scheduler=read_json(scheduler) if scheduler.is_file() else None,
    )


def title_of(folder: Path) -> str:
    """Its name; with the one above it where it is that of all that was trained."""
    return f"{folder.parent.name}/{folder.name}" if folder.name == "model" else folder.name


def read_folder(folder: Path) -> tuple[ModelSpec, tuple[Tokenizer, ...]]:
    """What a folder says it is, from its JSON files alone."""
    if not (folder / "unet" / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: expected a model folder (model_index.json, unet/, vae/, text_encoder/, …), found no unet/config.json; "
            "a single file is loaded by its own path"
        )
    tokenizers, towers = [], []
    for name in tower_folders(folder):
        config = Config(folder / name / "config.json")
        where = folder / name.replace("text_encoder", "tokenizer")
        words, pad = tokenizer.read(where) if where.is_dir() else (tokenizer.standard(), tokenizer.usual_pad(config.data))
        tower = configs.read_tower(config, pad=pad, begin=words.begin_id, end=words.end_id)
        if len(words) > tower.vocab or (len(words) < tower.vocab and not where.is_dir()):
            missing = "" if where.is_dir() else ", which is not there, so that CLIP's own was taken. Copy that folder too"
            raise CheckpointError(
                f"{config.path}: vocab_size is {tower.vocab}, but there are {len(words)} tokens in {where}{missing}"
            )
        tokenizers.append(words)
        towers.append(tower)
    if not towers:
        raise CheckpointError(f"{folder}: expected text_encoder/ or text_encoder_2/ with a config.json, found neither")
    scheduler, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    spec = configs.assemble(
        unet=Config(folder / "unet" / "config.json"),
        vae=Config(folder / "vae" / "config.json"),
        scheduler=Config(scheduler) if scheduler.is_file() else None,
        towers=towers,
        index=read_json(index) if index.is_file() else {},
    )
    return spec, tuple(tokenizers)


def check_variant(folder: Path, variant: str | None) -> None:
    """Errors: CheckpointError for one that no part has; a part without it takes its plain file."""
    if variant is None:
        return
    found = {name for path in folder.glob("*/*.*") for name in re.findall(r"(?:model|index)\.(\w+?)(?:-\d+-of-\d+)?\.", path.name)}
    variants = found - {"safetensors", "bin", "index"}
    if variant not in variants:
        raise CheckpointError(f"{folder}: no part has a variant {variant!r}; there are {', '.join(sorted(variants)) or 'none'}")


def tower_folders(folder: Path) -> list[str]:
    return [name for name in ("text_encoder", "text_encoder_2") if (folder / name / "config.json").is_file()]


def from_folder(module: M, folder: Path, options: Options, what: str, synonyms: Mapping[str, str] | None = None) -> M:
    file = keymap.mended(open_part(folder, options), synonyms or {})
    sources = {name: Source(name) for name in module.state_dict()}
    check_leftovers(file, sources.values(), what)
    return fill(module, file, sources, options, what)


def open_part(folder: Path, options: Options) -> TensorFile:
    """The weights of one part: one file or shards, safetensors before pickles, the wanted variant before the plain one."""
    variants = [f".{options.variant}", "", ".fp16"] if options.variant else ["", ".fp16", ".bf16"]
    for suffix in ("safetensors", "bin"):
        for v in dict.fromkeys(variants):
            for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
                if (whole := folder / f"{stem}{v}.{suffix}").is_file():
                    return open_tensors(whole, allow_pickle=options.allow_pickle)
                for index in (f"{stem}.{suffix}.index{v}.json", f"{stem}{v}.{suffix}.index.json"):
                    if (folder / index).is_file():
                        return open_shards(folder / index, allow_pickle=options.allow_pickle)
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    raise FileNotFoundError(
        f"{folder}: expected diffusion_pytorch_model.safetensors or model.safetensors (or shards with an index, or a variant such "
        f"as .fp16.), found {', '.join(found) or 'nothing'}"
    )


# ----------------------------------------------------------------------------------------------------- single files


def _load_single(path: Path, prediction: Prediction | None, vae: Path | None, options: Options, spec: ModelSpec | None) -> Parts:
    file = open_single(path, options.allow_pickle)
    found = detect(file) if spec is None else Found(spec, keymap.text_layout(spec), "spec")
    spec = found.spec if prediction is None else predicting(found.spec, prediction)
    made = networks(spec)
    if vae is not None:
        made.pop("vae", None)
    elif "vae" not in made:
        raise CheckpointError(f"{path}: a single file holds no tiny autoencoder; give it as `vae` (--vae): a file or a folder")
    plan = single_sources(made, found.layout)
    check_leftovers(file, (s for part in plan.values() for s in part.values()), f"{spec.name} model", spare=vae is not None)
    if options.ema:
        plan["unet"] = _ema(file, plan["unet"])
    for part, module in made.items():
        fill(module, file, plan[part], options, f"{spec.name} {PARTS.get(part, part.replace('text', 'text tower'))}")
    unet, autoencoder = made["unet"], made["vae"] if vae is None else load_vae(vae, spec, options)
    if prediction is None and found.evidence is None:
        spec = _tried(spec, unet, path)
    data = found.tokenizer
    return Parts(
        spec=replace(spec, vae=autoencoder.config),
        unet=unet,
        vae=autoencoder,
        text_encoders=tuple(made[f"text {i}"] for i in range(len(spec.towers))),
        tokenizers=(tokenizer.standard() if data is None else tokenizer.from_data(data),) * len(spec.towers),
        title=path.stem,
    )


def open_single(path: Path, allow_pickle: bool) -> TensorFile:
    return keymap.mended(open_tensors(path, allow_pickle=allow_pickle), keymap.SINGLE_SYNONYMS)


def networks(spec: ModelSpec) -> dict[str, Any]:
    """A model's networks on `meta`: "unet", "vae" (but no tiny one, which single files do not hold), "text 0", "text 1"."""
    made: dict[str, nn.Module] = {"unet": on_meta(UNet, spec.unet)}
    if isinstance(spec.vae, VAEConfig):
        made["vae"] = on_meta(VAE, spec.vae)
    return made | {f"text {i}": on_meta(TextTower, tower) for i, tower in enumerate(spec.towers)}


def single_sources(networks: Mapping[str, nn.Module], layout: str) -> dict[str, dict[str, Source]]:
    """For each network, our names -> where the tensors lie in a single file."""
    plan = {}
    for part, module in networks.items():
        names = module.state_dict()
        if isinstance(module, UNet):
            plan[part] = keymap.unet_sources(names, module.config)
        elif isinstance(module, VAE):
            plan[part] = keymap.vae_sources(names, module.config)
        else:
            plan[part] = keymap.text_sources(names, *keymap.TEXT_LAYOUTS[layout][int(part.removeprefix("text "))])
    return plan


def _ema(file: TensorFile, sources: Mapping[str, Source]) -> dict[str, Source]:
    if not any(name.startswith(keymap.EMA_PREFIX) for name in file.entries):
        raise CheckpointError(f"{file.path}: ema=True, but the file holds no moving average ({keymap.EMA_PREFIX}…)")
    return {name: Source(keymap.ema_name(source.name), source.op) for name, source in sources.items()}


def _tried(spec: ModelSpec, unet: UNet, path: Path) -> ModelSpec:
    prediction = try_prediction(unet)
    warnings.warn(
        f"{path}: nothing in this {spec.name} file says what its U-Net predicts; a trial run says {prediction!r}. "
        "Give prediction='eps' or prediction='v' if pictures are wrong",
        stacklevel=4,
    )
    return predicting(spec, prediction)


# ------------------------------------------------------------------------------------------------------ autoencoders


def load_vae(path: Path, spec: ModelSpec, options: Options) -> VAE | TinyVAE:
    """An autoencoder for a model: a folder (its own or a model's), or a single file in either naming, of the model's sizes."""
    if path.is_dir():
        folder = path if (path / "config.json").is_file() else path / "vae"
        config = configs.read_vae(Config(folder / "config.json"))
        if isinstance(config, VAEConfig) and spec.vector == "none":
            config = replace(config, force_upcast=False)  # files say true by default; only SDXL's overflows in float16
        module: Any = on_meta(TinyVAE, config) if isinstance(config, TinyVAEConfig) else on_meta(VAE, config)
        if config.latent_channels != spec.vae.latent_channels:
            raise CheckpointError(
                f"{folder}: this autoencoder has {config.latent_channels} latent channels, "
                f"the model's has {spec.vae.latent_channels}"
            )
        return from_folder(module, folder, options, "VAE", keymap.VAE_SYNONYMS)
    file = open_single(path, options.allow_pickle)
    config = spec.vae if isinstance(spec.vae, VAEConfig) else VAEConfig()
    module = on_meta(VAE, config)
    if any(".mid_block." in name for name in file.entries):  # a folder's weights by themselves
        file, sources = keymap.mended(file, keymap.VAE_SYNONYMS), {name: Source(name) for name in module.state_dict()}
    else:
        prefix = keymap.VAE_PREFIX if any(n.startswith(keymap.VAE_PREFIX) for n in file.entries) else ""
        sources = keymap.vae_sources(module.state_dict(), config, prefix=prefix)
    if CONV_IN not in file.entries:  # of a whole model only its autoencoder is taken
        check_leftovers(file, sources.values(), "VAE")
    return fill(module, file, sources, options, "VAE")
