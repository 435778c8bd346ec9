"""Train the denoising U-Net on latents that are computed once (Rombach et al., arXiv 2112.10752, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.checkpoints import configs, tokenizer
from latentdiff.checkpoints.families import EMBEDDED, ModelSpec, ScheduleSpec
from latentdiff.checkpoints.files import read_json, write_json, write_safetensors, write_text
from latentdiff.checkpoints.fill import Options, on_meta
from latentdiff.checkpoints.io import Parts, from_folder, load_vae
from latentdiff.checkpoints.save import save_folder
from latentdiff.conditioning import Cond
from latentdiff.diffusion import schedules
from latentdiff.diffusion.denoiser import Denoiser, Prediction, min_snr
from latentdiff.diffusion.guidance import cfg, guided
from latentdiff.diffusion.samplers import ddim
from latentdiff.images import save_grid
from latentdiff.models.attention import Attention
from latentdiff.models.initialise import init_for_training
from latentdiff.models.text import TextTower, Tokenizer
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE
from latentdiff.training.checkpoint import digest
from latentdiff.training.clip import token_ids
from latentdiff.training.data import PictureSource, batches, open_source
from latentdiff.training.drawings import ComposeConfig
from latentdiff.training.loop import LoopConfig, autocast, fit, near, once, plain, processes
from latentdiff.training.vae import to_float

SHARD = 1000  # pictures a file of latents
RIDGE = 0.03  # of the mean variance of the text's states: directions that vary less than that are not made to vary as the others do
PROMPTS = ("a cat", "a dog", "a red apple", "a blue heart", "a car", "a house", "a tree", "a smiling face")


@dataclass(frozen=True, kw_only=True)
class UNetTraining(LoopConfig):
    """`latentdiff train unet`."""

    data: Path
    """A built drawing dataset, a folder of captioned pictures, or a WebDataset tar."""
    vae: Path
    """Model folder that holds `vae/`, such as `train vae` writes."""
    clip: Path
    """Model folder that holds `text_encoder/` and `tokenizer/` (and `clip/`), such as `train clip` writes."""
    compose: ComposeConfig = field(default_factory=ComposeConfig)
    """How drawings are composed (only for a drawing dataset)."""
    pictures: int = 40_000
    """Pictures whose latents are computed, once, before training."""
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
    """Noise levels of training."""
    drop: float = 0.1
    """Chance that a caption is dropped, for classifier-free guidance (Ho & Salimans, arXiv 2207.12598, algorithm 1)."""
    levels: tuple[float, float] | None = None
    """Mean and standard deviation of logit(t / T), to train most at the levels where shapes are decided (Esser et al., arXiv
    2403.03206, equation 19); None for all levels alike."""
    min_snr: float | None = None
    """gamma of the min-SNR weights; None for the plain loss, which v needs at the noisiest levels (their min-SNR weight is 0)."""
    start: Path | None = None
    """Begin with the U-Net of this model folder instead of new weights."""
    prompts: tuple[str, ...] = PROMPTS
    """What the sample grids show."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.attention) != len(self.widths):
            raise ValueError(f"attention must have one entry a width ({len(self.widths)}), got {self.attention!r}")
        if self.head_width < 1 or any(w < self.head_width or w % self.head_width for w in self.widths):
            raise ValueError(f"widths must be multiples of head_width ({self.head_width}), got {self.widths!r}")
        if self.pictures < 1 or not self.prompts:
            raise ValueError(f"pictures and prompts must be at least one, got {self.pictures!r} and {self.prompts!r}")
        if not 0 <= self.drop <= 1:
            raise ValueError(f"drop must lie in [0, 1], got {self.drop!r}")
        if self.levels is not None and not (all(map(math.isfinite, self.levels)) and self.levels[1] > 0):
            raise ValueError(f"levels must be a number and a positive one, or None, got {self.levels!r}")
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr must be a positive number or None, got {self.min_snr!r}")


@dataclass(frozen=True, eq=False)
class Latents:
    """Encoded pictures: posterior mean and std [n, c, h, w] in float16 (not scaled), and which caption each has."""

    mean: Tensor
    std: Tensor
    caption: Tensor
    captions: Sequence[str]


@dataclass(frozen=True, eq=False)
class Contexts:
    """What the frozen text tower says of each distinct caption, float16 [n, length, d]; the last is the empty one."""

    states: Tensor


@dataclass(frozen=True, eq=False)
class Whitening:
    """Coordinates in which the states of the text tower vary alike in all directions: states [n, length, d] @ to, and @ back.

    Both are [d, d], symmetric, float32. Whitened inputs are LeCun et al.'s (Efficient BackProp, 1998, section 4.3).
    A tower that is trained for a short time tells colours apart in a few directions of great variance, and a star from a key in
    many of little: of ours, twelve of 256 hold nine tenths. Adam makes steps of one size, so that a U-Net hears the others last.
    """

    to: Tensor
    back: Tensor

    def of(self, contexts: Contexts) -> Contexts:
        """The same captions in these coordinates."""
        device = processes().device
        to = self.to.to(device)
        return Contexts(torch.cat([(part.to(device).float() @ to).half().cpu() for part in contexts.states.split(256)]))


def train_unet(config: UNetTraining) -> UNet:
    """Train, resume or finish a U-Net; when it stops, `out/model` is a whole model folder.

    Returns it on the training device. Errors: as `fit`, and those of loading the data and the other two networks.
    """
    words, tower = load_tower(config.clip)
    vae = load_vae(config.vae, EMBEDDED, Options(dtype=torch.float32))
    if not isinstance(vae, VAE):
        raise ValueError(f"vae: {config.vae} holds a tiny autoencoder, whose encoder gives no distribution to train on")
    spec = model_spec(config, vae, tower)
    source = open_source(config.data, size=config.size, compose=config.compose)
    made_from = origin(config, vae, source)
    latents = encode_pictures(vae, source, config, made_from)
    device = next(vae.parameters()).device  # the training's own, since they were encoded
    meta = {"network": "unet", "sizes": repr(spec.unet), "prediction": config.prediction, "schedule": config.schedule, **made_from}
    meta["text"], meta["ridge"] = digest(tower.state_dict()), RIDGE
    contexts = encode_captions(tower, words, [*latents.captions, ""])
    white = whitening(contexts)
    contexts, shown = white.of(contexts), white.of(encode_captions(tower, words, [*config.prompts, ""]))
    means, stds, said, states = near(device, latents.mean, latents.std, latents.caption, contexts.states)
    schedule = getattr(schedules, config.schedule)()

    unet = begin(config, spec.unet)
    if config.start is not None:
        rewrite(unet, white.back)

    def loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        n, rows = len(batch), batch.to(means.device)
        mean, std = means[rows].to(device), stds[rows].to(device)
        x0 = (mean + std * torch.randn(mean.shape, generator=generator, device=device)) * vae.config.scale
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
        save_grid(draw(model, vae, shown, config), path)

    trained = fit(unet, loss, stream, config, meta=meta, sample=sample)
    rewrite(trained, white.to)
    rest = config.clip / "clip" if (config.clip / "clip" / "config.json").is_file() else None
    parts = Parts(spec=spec, unet=trained, vae=vae, text_encoders=(tower,), tokenizers=(words,), title=config.out.name, clip=rest)
    once(lambda: save_folder(parts, config.out / "model"))
    return trained


def draw_levels(levels: tuple[float, float] | None, steps: int, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """n of the levels 0 … steps - 1, as `UNetTraining.levels` wants them, on the generator's device."""
    if levels is None:
        return torch.randint(steps, (n,), generator=generator, device=generator.device)
    mean, std = levels
    share = torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=generator.device))
    return (share * steps).long().clamp(max=steps - 1)


def begin(config: UNetTraining, sizes: UNetConfig) -> UNet:
    """New weights, or those of `config.start`."""
    if config.start is not None:
        loaded = from_folder(on_meta(UNet, sizes), config.start / "unet", Options(dtype=torch.float32), "U-Net")
        return loaded.train().requires_grad_()
    torch.manual_seed(config.seed)
    unet = UNet(sizes)
    init_for_training(unet)
    return unet


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
        schedule=ScheduleSpec(kind=config.schedule),
        prediction=config.prediction,
        size=config.size,
    )


def load_tower(folder: Path) -> tuple[Tokenizer, TextTower]:
    """Tokenizer and text tower (float32) of a model folder."""
    words, pad = tokenizer.read(folder / "tokenizer")
    config = configs.Config(folder / "text_encoder" / "config.json")
    spec = replace(configs.read_tower(config, pad=pad, begin=words.begin_id, end=words.end_id), projection=None, pooled=False)
    return words, from_folder(on_meta(TextTower, spec), folder / "text_encoder", Options(dtype=torch.float32), "text tower")


def order(seed: int, n: int, start: int, count: int) -> Tensor:
    """Which of n pictures come at positions start … start+count-1 of a run: epochs, each in its own order."""
    epochs, places = np.divmod(np.arange(start, start + count), n)
    return torch.from_numpy(np.concatenate([_shuffled(seed, int(e), n)[places[epochs == e]] for e in np.unique(epochs)]))


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(n)


def origin(config: UNetTraining, vae: VAE, source: PictureSource) -> Mapping[str, Any]:
    """What latents are made from: those on the disk serve a later start only if it is the same."""
    return plain(
        {
            "vae": digest(vae.state_dict()),
            "scale": vae.config.scale,
            "source": len(source),
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
    state, folder = processes(), config.out / "latents"
    note = folder / "made_from.json"
    once(lambda: None if note.is_file() else write_json(note, made_from))
    if (found := read_json(note)) != made_from:
        raise ValueError(f"out: {folder} was made from {found}, now wanted from {made_from}; remove it, or choose a new folder")
    shards, rank, world = -(-config.pictures // SHARD), state.process_index, state.num_processes
    mine = range(rank, shards, world)
    done = next((i for i, k in enumerate(mine) if not (folder / f"{k:05d}.txt").exists()), len(mine))
    stream = batches(source, SHARD, seed=config.seed, start=done, rank=rank, world=world, workers=config.workers)
    vae = vae.to(state.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for k in tqdm(mine[done:], desc="latents", disable=not state.is_main_process, dynamic_ncols=True):
        images, captions = next(stream)
        n = min(SHARD, config.pictures - k * SHARD)
        _write_shard(folder / f"{k:05d}", vae, images[:n], captions[:n], config.precision)
    state.wait_for_everyone()
    return _read_shards([folder / f"{k:05d}" for k in range(shards)])


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
def encode_captions(tower: TextTower, words: Tokenizer, captions: Sequence[str]) -> Contexts:
    """The tower's states of every distinct caption, once."""
    device = processes().device
    tower = tower.to(device)
    chunks = [captions[i : i + 256] for i in range(0, len(captions), 256)]
    return Contexts(torch.cat([tower(token_ids(words, c).to(device))[0].half().cpu() for c in chunks]))


def whitening(contexts: Contexts) -> Whitening:
    """to = (M + r I)^(-1/2), back = (M + r I)^(1/2), of the states' second moment M and r = RIDGE · trace(M) / d.

    The mean is not taken off: keys and values have no bias to make up for it; what all states have in common is one direction of M.
    """
    device = processes().device
    parts = (part.to(device).flatten(0, 1).float() for part in contexts.states.split(256))
    moment = sum((part.T @ part for part in parts), torch.zeros((), device=device)).double().cpu()
    moment /= contexts.states.shape[0] * contexts.states.shape[1]
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
def draw(unet: nn.Module, vae: VAE, shown: Contexts, config: UNetTraining) -> Float[Tensor, "b 3 h w"]:
    """Pictures of `config.prompts` at guidance 5, 20 DDIM steps, from one seed: to watch a training by."""
    device, n = processes().device, len(config.prompts)
    states = shown.states.float().to(device)
    side = config.size // vae.factor
    noise = torch.randn(n, vae.config.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    schedule = getattr(schedules, config.schedule)()
    sigmas = schedules.grid(schedule, 20, "trailing")
    denoiser = Denoiser(unet, schedule, config.prediction)
    denoise = guided(denoiser, Cond(states[:-1]), Cond(states[-1:].expand(n, -1, -1)), cfg(5.0))
    x = noise.to(device) * (1 + sigmas[0] ** 2).sqrt()
    for step in ddim(denoise, x, sigmas, randn=torch.randn_like):
        x = step.x
    return vae.decode(x).float().cpu()
