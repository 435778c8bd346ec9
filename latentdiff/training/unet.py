"""Train the denoising U-Net on latents that are computed once (Rombach et al., arXiv 2112.10752, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Float16, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.checkpoints import configs, tokenizer
from latentdiff.checkpoints.families import EMBEDDED, ModelSpec, ScheduleSpec, noise_schedule
from latentdiff.checkpoints.files import read_json, write_json, write_safetensors, write_text
from latentdiff.checkpoints.fill import Options, on_meta
from latentdiff.checkpoints.io import Parts, from_folder, read_folder
from latentdiff.checkpoints.save import check_replaceable, save_folder
from latentdiff.conditioning import Cond
from latentdiff.diffusion import schedules
from latentdiff.diffusion.denoiser import Denoiser, Prediction, min_snr
from latentdiff.diffusion.guidance import guided
from latentdiff.diffusion.rules import cfg
from latentdiff.diffusion.samplers import ddim
from latentdiff.images import save_grid
from latentdiff.models.attention import Attention
from latentdiff.models.initialise import init_for_training
from latentdiff.models.text import TextTower, Tokenizer
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE
from latentdiff.training.checkpoint import digest
from latentdiff.training.clip import token_ids
from latentdiff.training.data import FileSource, PictureSource, open_source, order, pictures_at
from latentdiff.training.drawings import ComposeConfig
from latentdiff.training.loop import LoopConfig, autocast, check_run, differences, fit, near, once, plain, processes, store
from latentdiff.training.vae import load_autoencoder, to_float

DRAWINGS = 40_000  # pictures composed of them
SHARD = 1000  # pictures a file of latents
LOADED = 50  # pictures a batch that a worker loads ahead of them
RIDGE = 0.03  # of the mean variance of the text's states: directions that vary less than that are not made to vary as the others do
SCHEDULES = {
    "cosine": ScheduleSpec(kind="cosine"),
    "linear": ScheduleSpec(kind="linear", beta_start=1e-4, beta_end=0.02),  # Ho et al., section 4
    "scaled_linear": ScheduleSpec(kind="scaled_linear"),
}
PROMPTS = ("a cat", "a dog", "a red apple", "a blue heart", "a car", "a house", "a tree", "a smiling face")


@dataclass(frozen=True, kw_only=True)
class UNetTraining(LoopConfig):
    """`latentdiff train unet`."""

    data: Path
    """A built drawing dataset, or a folder or WebDataset tar of captioned pictures, of which the central square is taken."""
    vae: Path
    """Model folder that holds `vae/`, such as `train vae` writes."""
    clip: Path
    """Model folder that holds `text_encoder/` and `tokenizer/` (and `clip/`), such as `train clip` writes."""
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    """How drawings are composed; only for a drawing dataset."""
    pictures: int | None = None
    """Pictures to encode once, before training: all of a folder or tar, with each caption, or 40,000 drawings, unless told."""
    size: int = 128
    """Side of the pictures, in pixels."""
    widths: tuple[int, ...] = (96, 160, 192)
    """Channels of each level."""
    attention: tuple[bool, ...] = (False, True, True)
    """Which levels have transformer blocks; the middle always has. In the shell: --no-attention --attention --attention."""
    head_width: int = 32
    """Channels of an attention head."""
    layers: int = 1
    """Residual blocks a level."""
    groups: int = 16
    """Groups of the group norms."""
    prediction: Prediction = "v"
    """What the network predicts."""
    schedule: Literal["cosine", "linear", "scaled_linear"] = "cosine"
    """Noise levels of training: Nichol & Dhariwal's, Ho et al.'s or Stable Diffusion's."""
    drop: float = 0.1
    """Chance that a caption is dropped, for classifier-free guidance (Ho & Salimans, arXiv 2207.12598, algorithm 1)."""
    levels: tuple[float, float] | None = None
    """Mean and std of logit(t / T), to train most where shapes are decided (arXiv 2403.03206, eq. 19); None: all levels alike."""
    min_snr: float | None = None
    """gamma of the min-SNR weights; None for the plain loss, which v needs at the noisiest levels (their min-SNR weight is 0)."""
    start: Path | None = None
    """Begin with the U-Net of this model folder, which must be of these sizes, prediction and schedule, instead of new weights."""
    prompts: tuple[str, ...] = PROMPTS
    """What the sample grids show."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "layers", "head_width", "groups", *(["pictures"] if self.pictures is not None else []))
        if len(self.attention) != len(self.widths):
            raise ValueError(f"attention must have one entry a width ({len(self.widths)}), got {self.attention!r}")
        for name in ("head_width", "groups"):
            if not self.widths or any(w < 1 or w % getattr(self, name) for w in self.widths):
                raise ValueError(f"widths must be multiples of {name} ({getattr(self, name)}), got {self.widths!r}")
        for name, allowed in (("prediction", get_args(Prediction)), ("schedule", SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not self.prompts:
            raise ValueError(f"prompts must be at least one text, got {self.prompts!r}")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must lie in [0, 1], got {self.drop!r}")
        if self.levels is not None and not (all(map(math.isfinite, self.levels)) and self.levels[1] > 0):
            raise ValueError(f"levels must be a number and a positive one, or None, got {self.levels!r}")
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr must be a positive number or None, got {self.min_snr!r}")


States = Float16[Tensor, "n length d"]  # what the frozen text tower says of each of n captions, on the CPU


@dataclass(frozen=True, eq=False)
class Latents:
    """Encoded pictures: posterior mean and std [n, c, h, w] in float16 (not scaled), and which caption each has."""

    mean: Tensor
    std: Tensor
    caption: Tensor
    captions: Sequence[str]


@dataclass(frozen=True, eq=False)
class Whitening:
    """Coordinates in which the states of the text tower vary alike in all directions: states [n, length, d] @ to, and @ back.

    Both are [d, d], symmetric, float32. Whitened inputs are LeCun et al.'s (Efficient BackProp, 1998, section 4.3).
    A tower that is trained for a short time tells colours apart in a few directions of great variance, and a star from a key in
    many of little: of ours, twelve of 256 hold nine tenths. Adam makes steps of one size, so that a U-Net hears the others last.
    """

    to: Tensor
    back: Tensor

    def of(self, states: States) -> States:
        """The same captions in these coordinates."""
        device = processes().device
        to = self.to.to(device)
        return torch.cat([(part.to(device).float() @ to).half().cpu() for part in states.split(256)])


def train_unet(config: UNetTraining) -> UNet:
    """Train, resume or finish a U-Net; when it stops, `out/model` is a whole model folder.

    Returns it on the training device. Errors: as `fit`, and those of loading the data and the other two networks.
    """
    config.must_hold("clip", "text_encoder", "tokenizer")
    config.must_hold("vae", "vae")
    if config.start is not None:
        config.must_hold("start", "unet")
    words, tower = load_tower(config.clip)
    vae = load_autoencoder(config.vae)
    if config.size < 1 or config.size % vae.factor:
        raise ValueError(f"size must be a multiple of {vae.factor} (pixels a latent of {config.vae}), got {config.size}")
    spec = model_spec(config, vae, tower)
    unet = begin(config, spec)
    source = open_source(config.data, size=config.size, compose=config.compose)
    if config.pictures is None:
        config = replace(config, pictures=source.captions() if isinstance(source, FileSource) else DRAWINGS)
    made_from = origin(config, vae, source)
    meta = {"network": "unet", "sizes": repr(spec.unet), "prediction": config.prediction, "schedule": config.schedule, **made_from}
    meta["text"], meta["ridge"] = digest(tower.state_dict()), RIDGE
    check_run(config, meta)
    check_replaceable(config.out / "model")
    latents = encode_pictures(vae, source, config, made_from)
    device = next(vae.parameters()).device  # the training's own, since they were encoded
    contexts = encode_captions(tower, words, [*latents.captions, ""])
    white = whitening(contexts)
    if config.start is not None:
        rewrite(unet, white.back)
    contexts, shown = white.of(contexts), white.of(encode_captions(tower, words, [*config.prompts, ""]))
    means, stds, said, states = near(device, latents.mean, latents.std, latents.caption, contexts)
    schedule = noise_schedule(spec.schedule)

    def loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        n, rows = len(batch), batch.to(means.device)
        mean, std = means[rows].to(device), stds[rows].to(device)
        x0 = mean + std * torch.randn(mean.shape, generator=generator, device=device)
        x0 = (x0 - vae.config.shift) * vae.config.scale
        eps = torch.randn(x0.shape, generator=generator, device=device)
        t = draw_levels(config.levels, len(schedule), n, generator)
        drop = torch.rand(n, generator=generator, device=device) < config.drop
        cond = Cond(states[said[rows].masked_fill(drop.to(said.device), -1)].to(device).float())
        weight = None if config.min_snr is None else min_snr(schedule, config.prediction, t, config.min_snr)
        x0 = x0.contiguous(memory_format=torch.channels_last)
        return Denoiser(model, schedule, config.prediction).loss(x0, cond, eps, t, weight), {}

    def stream(start: int, rank: int, world: int) -> Iterator[Tensor]:
        n, step = config.batch // world, start
        while True:
            yield order(config.seed, len(latents.mean), (step * world + rank) * n, n)
            step += 1

    def sample(model: nn.Module, path: Path) -> None:
        save_grid(draw(model, vae, shown, spec), path)

    trained = fit(unet, loss, stream, config, meta=meta, sample=sample)
    rewrite(trained, white.to)
    rest = config.clip / "clip" if (config.clip / "clip" / "config.json").is_file() else None
    parts = Parts(spec=spec, unet=trained, vae=vae, text_encoders=(tower,), tokenizers=(words,), title=config.out.name, clip=rest)
    store(lambda folder: save_folder(parts, folder), config.out / "model")
    return trained


def draw_levels(levels: tuple[float, float] | None, steps: int, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """n of the levels 0 … steps - 1, as `UNetTraining.levels` wants them, on the generator's device."""
    if levels is None:
        return torch.randint(steps, (n,), generator=generator, device=generator.device)
    mean, std = levels
    share = torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=generator.device))
    return (share * steps).long().clamp(max=steps - 1)


def begin(config: UNetTraining, spec: ModelSpec) -> UNet:
    """New weights, or those of `config.start`. Errors: ValueError if that is another model than is to be trained."""
    if config.start is not None:
        if other := differences(traits(read_folder(config.start)[0]), traits(spec)):
            raise ValueError(f"start: {config.start} is another model than is to be trained ({other})")
        loaded = from_folder(on_meta(UNet, spec.unet), config.start / "unet", Options(dtype=torch.float32), "U-Net")
        return loaded.train().requires_grad_()
    torch.manual_seed(config.seed)
    unet = UNet(spec.unet)
    init_for_training(unet)
    return unet


def traits(spec: ModelSpec) -> Mapping[str, Any]:
    """What the weights of a U-Net are bound to."""
    bound, schedule = asdict(spec.unet), spec.schedule
    del bound["sample_size"]
    if schedule.kind == "cosine":  # has no betas to set
        schedule = ScheduleSpec(kind="cosine", steps=schedule.steps, zero_snr=schedule.zero_snr)
    return bound | {"prediction": spec.prediction, "schedule": schedule}


def model_spec(config: UNetTraining, vae: VAE, tower: TextTower) -> ModelSpec:
    """The whole model as data."""
    unet = UNetConfig(
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=config.widths,
        layers_per_block=config.layers,
        attention=config.attention,
        transformer_layers=(1,) * len(config.widths),
        heads=tuple(w // config.head_width for w in config.widths),
        context_dim=tower.spec.width,
        norm_groups=config.groups,
        sample_size=config.size // vae.factor,
    )
    return replace(
        EMBEDDED,
        unet=unet,
        vae=vae.config,
        towers=(tower.spec,),
        schedule=SCHEDULES[config.schedule],
        prediction=config.prediction,
        size=config.size,
    )


def load_tower(folder: Path) -> tuple[Tokenizer, TextTower]:
    """Tokenizer and text tower (float32) of a model folder."""
    words, pad = tokenizer.read(folder / "tokenizer")
    config = configs.Config(folder / "text_encoder" / "config.json")
    spec = replace(configs.read_tower(config, pad=pad, begin=words.begin_id, end=words.end_id), projection=None, pooled=False)
    return words, from_folder(on_meta(TextTower, spec), folder / "text_encoder", Options(dtype=torch.float32), "text tower")


def origin(config: UNetTraining, vae: VAE, source: PictureSource) -> Mapping[str, Any]:
    """What latents are made from: those on the disk serve a later start only if it is the same."""
    return plain(
        {
            "vae": digest(vae.state_dict()),
            "scale": vae.config.scale,
            "shift": vae.config.shift,
            "data": source.fingerprint(),
            "compose": asdict(config.compose),
            "size": config.size,
            "seed": config.seed,
            "pictures": config.pictures,
        }
    )


@torch.no_grad()
def encode_pictures(vae: VAE, source: PictureSource, config: UNetTraining, made_from: Mapping[str, Any]) -> Latents:
    """Encode `config.pictures` pictures, in shards under `out/latents` that a later start finds again; processes share the work.

    Errors: ValueError if the shards there were made from something else.
    """
    assert config.pictures is not None
    state, folder, positions = processes(), config.out / "latents", range(config.pictures)
    note = folder / "made_from.json"
    once(lambda: None if note.is_file() else write_json(note, made_from))
    if other := differences(read_json(note), made_from):
        raise ValueError(f"out: {folder} was made from something else ({other}); remove it, or choose a new folder")
    shards = {folder / f"{k // SHARD:05d}": positions[k : k + SHARD] for k in positions[::SHARD]}
    mine = list(shards)[state.process_index :: state.num_processes]
    todo = [path for path in mine if not path.with_suffix(".txt").exists()]
    few = {path: [shards[path][i : i + LOADED] for i in range(0, len(shards[path]), LOADED)] for path in todo}
    stream = pictures_at(chain(*few.values()), source, seed=config.seed, workers=config.workers)
    vae = vae.to(state.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for path in tqdm(todo, desc="latents", disable=not state.is_main_process, dynamic_ncols=True):
        images, captions = zip(*islice(stream, len(few[path])), strict=True)
        _write_shard(path, vae, torch.cat(images), list(chain(*captions)), config.precision)
    state.wait_for_everyone()
    return _read_shards(list(shards))


def _write_shard(path: Path, vae: VAE, images: Tensor, captions: Sequence[str], precision: str) -> None:
    device, means, stds = next(vae.parameters()).device, [], []
    for part in images.split(50 if device.type == "cpu" else 250):
        x = to_float(part.to(device)).contiguous(memory_format=torch.channels_last)
        with autocast(precision, device):
            mean, logvar = vae.moments(x)
        means.append(mean.half().cpu())
        stds.append((0.5 * logvar.float()).exp().half().cpu())
    write_safetensors(path.with_suffix(".safetensors"), {"mean": torch.cat(means), "std": torch.cat(stds)})
    write_text(path.with_suffix(".txt"), "\n".join(" ".join(c.split()) for c in captions))  # last: the mark of a whole shard


def _read_shards(paths: Sequence[Path]) -> Latents:
    parts = [load_file(path.with_suffix(".safetensors")) for path in paths]
    captions = [line for path in paths for line in path.with_suffix(".txt").read_text(encoding="utf-8").split("\n")]
    distinct = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    return Latents(
        mean=torch.cat([p["mean"] for p in parts]),
        std=torch.cat([p["std"] for p in parts]),
        caption=torch.tensor([distinct[c] for c in captions]),
        captions=list(distinct),
    )


@torch.no_grad()
def encode_captions(tower: TextTower, words: Tokenizer, captions: Sequence[str]) -> States:
    """The tower's states of every distinct caption, once."""
    device = processes().device
    tower = tower.to(device)
    chunks = [captions[i : i + 256] for i in range(0, len(captions), 256)]
    return torch.cat([tower(token_ids(words, c, tower.spec.pad).to(device))[0].half().cpu() for c in chunks])


def whitening(states: States) -> Whitening:
    """to = (M + r I)^(-1/2), back = (M + r I)^(1/2), of the states' second moment M and r = RIDGE · trace(M) / d.

    The mean is not taken off: keys and values have no bias to make up for it; what all states have in common is one direction of M.
    """
    device = processes().device
    parts = (part.to(device).flatten(0, 1).float() for part in states.split(256))
    moment = sum((part.T @ part for part in parts), torch.zeros((), device=device)).double().cpu()
    moment /= states.shape[0] * states.shape[1]
    values, vectors = torch.linalg.eigh(moment)
    spread = (values.clamp_min(0) + RIDGE * values.mean()).sqrt()
    return Whitening(to=(vectors / spread @ vectors.T).float(), back=(vectors * spread @ vectors.T).float())


@torch.no_grad()
def rewrite(unet: UNet, matrix: Tensor) -> None:
    """In place: keys and values of the prompt are made of states [b, n, d] as they were made of states @ matrix, matrix [d, d]."""
    for attention in (m for m in unet.modules() if isinstance(m, Attention) and m.cross):
        for layer in (attention.to_k, attention.to_v):
            layer.weight.copy_(layer.weight @ matrix.to(layer.weight.device))


@torch.no_grad()
def draw(unet: nn.Module, vae: VAE, shown: States, spec: ModelSpec) -> Float[Tensor, "b 3 h w"]:
    """Pictures at guidance 5, 20 DDIM steps, from one seed, to watch a training by. The last of `shown` is of no words."""
    device, n = processes().device, len(shown) - 1
    states = shown.float().to(device)
    side = spec.unet.sample_size
    noise = torch.randn(n, spec.unet.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    schedule = noise_schedule(spec.schedule)
    sigmas = schedules.grid(schedule, 20, "trailing")
    denoiser = Denoiser(unet, schedule, spec.prediction)
    denoise = guided(denoiser, Cond(states[:-1]), Cond(states[-1:].expand(n, -1, -1)), cfg(5.0))
    x = noise.to(device) * (1 + sigmas[0] ** 2).sqrt()
    for step in ddim(denoise, x, sigmas, randn=torch.randn_like):
        x = step.x
    return vae.decode(x).float().cpu()
