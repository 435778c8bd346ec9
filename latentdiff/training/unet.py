"""Train the denoising U-Net on latents that are computed once (Rombach et al., arXiv 2112.10752, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.checkpoints import configs, tokenizer
from latentdiff.checkpoints.families import EMBEDDED, ModelSpec, SamplingSpec, ScheduleSpec
from latentdiff.checkpoints.files import write_safetensors
from latentdiff.checkpoints.fill import Options, on_meta
from latentdiff.checkpoints.io import Parts, from_folder, load_vae
from latentdiff.checkpoints.save import save_folder
from latentdiff.conditioning import Cond
from latentdiff.diffusion import schedules
from latentdiff.diffusion.denoiser import Denoiser, Prediction, min_snr
from latentdiff.diffusion.guidance import cfg, guided
from latentdiff.diffusion.samplers import ddim
from latentdiff.images import save_grid
from latentdiff.models.initialise import init_for_training
from latentdiff.models.text import TextTower, Tokenizer
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE
from latentdiff.training.clip import token_ids
from latentdiff.training.data import PictureSource, open_source
from latentdiff.training.drawings import ComposeConfig
from latentdiff.training.loop import LoopConfig, fit, once, processes
from latentdiff.training.vae import to_float

SHARD = 1000  # pictures a file of latents
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
    """Which levels have transformer blocks; the middle always has."""
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
    min_snr: float | None = None
    """gamma of the min-SNR weights; None for the plain loss, which v needs at the noisiest levels (their min-SNR weight is 0)."""
    start: Path | None = None
    """Begin with the U-Net of this model folder instead of new weights."""


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
    latents = encode_pictures(vae, source, config)
    contexts = encode_captions(tower, words, [*latents.captions, ""])
    schedule = getattr(schedules, config.schedule)()

    torch.manual_seed(config.seed)
    if config.start is None:
        unet = UNet(spec.unet)
        init_for_training(unet)
    else:
        unet = from_folder(on_meta(UNet, spec.unet), config.start / "unet", Options(dtype=torch.float32), "U-Net").requires_grad_()

    def loss(model: nn.Module, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        device, n = next(model.parameters()).device, len(batch)
        noise = torch.randn(n, *latents.mean.shape[1:], generator=generator)
        x0 = (latents.mean[batch] + latents.std[batch] * noise) * vae.config.scale
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randint(len(schedule), (n,), generator=generator)
        caption = latents.caption[batch].masked_fill(torch.rand(n, generator=generator) < config.drop, -1)
        cond = Cond(contexts.states[caption].float().to(device))
        weight = None if config.min_snr is None else min_snr(schedule, config.prediction, t, config.min_snr).to(device)
        x0 = x0.to(device).contiguous(memory_format=torch.channels_last)
        return Denoiser(model, schedule, config.prediction).loss(x0, cond, eps.to(device), t.to(device), weight), {}

    def stream(start: int, rank: int, world: int) -> Iterator[Tensor]:
        n, step = config.batch // world, start
        while True:
            yield order(config.seed, len(latents.mean), (step * world + rank) * n, n)
            step += 1

    def sample(model: nn.Module, path: Path) -> None:
        device = next(model.parameters()).device
        save_grid(draw(model, vae.to(device), tower, words, config, device), path, columns=len(PROMPTS) // 2)

    trained = fit(unet, loss, stream, config, meta={"network": "unet", "sizes": repr(spec.unet)}, sample=sample)
    rest = config.clip / "clip" if (config.clip / "clip" / "config.json").is_file() else None
    parts = Parts(spec=spec, unet=trained, vae=vae, text_encoders=(tower,), tokenizers=(words,), title=config.out.name, clip=rest)
    once(lambda: save_folder(parts, config.out / "model"))
    return trained


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
        sampling=SamplingSpec(spacing="trailing", steps_offset=0, final="zero"),
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
    """Which pictures come at positions start … start+count-1 of a run: epochs, each in its own order."""
    positions = np.arange(start, start + count)
    shuffled = {e: np.random.default_rng((seed, int(e))).permutation(n) for e in np.unique(positions // n)}
    return torch.from_numpy(np.array([shuffled[p // n][p % n] for p in positions]))


@torch.no_grad()
def encode_pictures(vae: VAE, source: PictureSource, config: UNetTraining) -> Latents:
    """Encode `config.pictures` pictures, in shards under `out/latents` that a later start finds again; processes share the work."""
    state, folder = processes(), config.out / "latents"
    shards = -(-config.pictures // SHARD)
    folder.mkdir(parents=True, exist_ok=True)
    todo = [k for k in range(shards) if k % state.num_processes == state.process_index and not (folder / f"{k:05d}.txt").exists()]
    vae = vae.to(state.device, memory_format=torch.channels_last)
    for k in tqdm(todo, desc="latents", disable=not state.is_main_process, dynamic_ncols=True):
        _encode_shard(vae, source, k, min(SHARD, config.pictures - k * SHARD), folder, config.seed, state.device)
    state.wait_for_everyone()
    parts = [load_file(folder / f"{k:05d}.safetensors") for k in range(shards)]
    captions = [line for k in range(shards) for line in (folder / f"{k:05d}.txt").read_text(encoding="utf-8").split("\n")]
    distinct = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    which = torch.tensor([distinct[c] for c in captions])
    return Latents(torch.cat([p["mean"] for p in parts]), torch.cat([p["std"] for p in parts]), which, list(distinct))


def _encode_shard(vae: VAE, source: PictureSource, k: int, n: int, folder: Path, seed: int, device: torch.device) -> None:
    means, stds, captions = [], [], []
    for i in range(k * SHARD, k * SHARD + n, 50):
        items = [source.get(j % len(source), seed + j // len(source)) for j in range(i, min(i + 50, k * SHARD + n))]
        images = to_float(torch.stack([image for image, _ in items])).to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            mean, logvar = vae.moments(images)
        means.append(mean.half().cpu())
        stds.append((0.5 * logvar.float()).exp().half().cpu())
        captions += [" ".join(caption.split()) for _, caption in items]
    write_safetensors(folder / f"{k:05d}.safetensors", {"mean": torch.cat(means), "std": torch.cat(stds)})
    (folder / f"{k:05d}.txt").write_text("\n".join(captions), encoding="utf-8")  # last: the mark of a whole shard


@torch.no_grad()
def encode_captions(tower: TextTower, words: Tokenizer, captions: Sequence[str]) -> Contexts:
    """The tower's states of every distinct caption, once."""
    device = processes().device
    tower = tower.to(device)
    chunks = [captions[i : i + 256] for i in range(0, len(captions), 256)]
    return Contexts(torch.cat([tower(token_ids(words, c).to(device))[0].half().cpu() for c in chunks]))


@torch.no_grad()
def draw(
    unet: nn.Module, vae: VAE, tower: TextTower, words: Tokenizer, config: UNetTraining, device: torch.device
) -> Float[Tensor, "b 3 h w"]:
    """Pictures of PROMPTS at guidance 5, 20 DDIM steps, from one seed: to watch a training by."""
    ids = token_ids(words, [*PROMPTS, ""]).to(device)
    states = tower(ids)[0].float()
    side = config.size // vae.factor
    noise = torch.randn(len(PROMPTS), vae.config.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    schedule = getattr(schedules, config.schedule)()
    sigmas = schedules.grid(schedule, 20, "trailing")
    empty = states[-1:].expand(len(PROMPTS), -1, -1)
    denoise = guided(Denoiser(unet, schedule, config.prediction), Cond(states[:-1]), Cond(empty), cfg(5.0))
    x = noise.to(device) * (1 + sigmas[0] ** 2).sqrt()
    for step in ddim(denoise, x, sigmas, randn=torch.randn_like):
        x = step.x
    return vae.decode(x).float().cpu()
