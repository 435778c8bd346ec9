"""Train a CLIP from scratch: two towers, one space (Radford et al. 2021, arXiv 2103.00020, section 2.3 and figure 3)."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from latentdiff.checkpoints import configs, tokenizer
from latentdiff.checkpoints.files import write_json, write_safetensors
from latentdiff.models.text import Tokenizer, TowerSpec
from latentdiff.training.checkpoint import latest
from latentdiff.training.data import PictureSource, batches, open_source
from latentdiff.training.drawings import ComposeConfig
from latentdiff.training.loop import LoopConfig, check_run, fit, once, store
from latentdiff.training.vae import to_float

LARGEST_SCALE = math.log(100)  # of the logits (Radford et al., section 2.5)


@dataclass(frozen=True, kw_only=True)
class CLIPCompose(ComposeConfig):
    """Drawings as a CLIP is to see them: of more ideas than the everyday ones."""

    everyday: float = 0.3
    """Chance of an everyday idea (rather than any drawing)."""


@dataclass(frozen=True, kw_only=True)
class CLIPTraining(LoopConfig):
    """`latentdiff train clip`."""

    data: Path
    """A built drawing dataset, or a folder or WebDataset tar of captioned pictures, of which the central square is taken."""
    compose: CLIPCompose = field(default_factory=CLIPCompose)
    """How drawings are composed; only for a drawing dataset."""
    size: int = 128
    """Side of the pictures, in pixels."""
    patch: int = 16
    """Side of the image tower's patches, in pixels."""
    width: int = 256
    """Width of both towers, and of the space they share."""
    text_layers: int = 3
    """Blocks of the text tower."""
    image_layers: int = 4
    """Blocks of the image tower."""
    heads: int = 4
    """Attention heads of both towers."""
    vocab: int = 3072
    """Size of the vocabulary, which is learnt from the captions."""
    length: int = 32
    """Tokens the text tower reads at once, begin and end included; longer captions are cut, with a warning."""
    freeze_text: bool = False
    """Leave the text tower as it is (Zhai et al., arXiv 2111.07991): for when a U-Net already listens to it."""
    start: Path | None = None
    """Begin with the CLIP of this model folder, its sizes and its vocabulary, instead of new weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, whole, part in (("size", "patch", self.patch), ("width", "heads", self.heads)):
            if part < 1 or getattr(self, name) < part or getattr(self, name) % part:
                raise ValueError(f"{name} must be a multiple of {whole} ({part}), got {getattr(self, name)!r}")
        self.at_least(1, "text_layers", "image_layers")
        self.at_least(2 * 256 + 2, "vocab")
        self.at_least(3, "length")


class TwoTowers(nn.Module):
    """Both towers as one forward, which is what a distributed trainer needs."""

    clip: Any  # transformers' CLIPModel, which is imported only where it is built

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip = clip

    def forward(self, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.clip(input_ids=ids, pixel_values=images)
        return out.image_embeds, out.text_embeds, self.clip.logit_scale.exp()


def learn_vocabulary(captions: Iterable[str], size: int, length: int) -> Tokenizer:
    """CLIP's byte-pair encoding, learnt from captions: bytes, bytes that end a word, merged pairs, begin, end."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, trainers

    letters = tokenizer._byte_letters()
    plain = Tokenizer({c: i for i, c in enumerate([*letters, tokenizer.BEGIN, tokenizer.END])}, [])
    learner = Backend(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = plain.backend.normalizer, plain.backend.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, initial_alphabet=letters, end_of_word_suffix="</w>", limit_alphabet=256, show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: size - 2 * len(letters) - 2]
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), tokenizer.BEGIN, tokenizer.END]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, length=length)


def token_ids(words: Tokenizer, captions: Iterable[str], pad: int | None = None) -> Tensor:
    """int64 [b, length]: begin, tokens, end, and `pad`, or the end again; longer captions are cut, with a warning."""
    read = [words(c) for c in captions]
    if any(len(tokens) > words.length - 2 for tokens in read):  # said once: the text is always the same
        advice = f"a CLIP that is trained with a greater length than {words.length} reads them whole"
        warnings.warn(f"captions of more than {words.length - 2} tokens are cut; {advice}", stacklevel=2)
    rows = [[words.begin_id, *tokens[: words.length - 2], words.end_id] for tokens in read]
    return torch.tensor([row + [words.end_id if pad is None else pad] * (words.length - len(row)) for row in rows])


def trim(ids: Int[Tensor, "b n"], end: int) -> Int[Tensor, "b m"]:
    """Without the columns after the last caption's end: a causal tower that is read at the end does not hear them."""
    return ids[:, : int((ids == end).long().argmax(1).max()) + 1]


def build_clip(config: CLIPTraining, words: Tokenizer) -> Any:
    """transformers' CLIPModel at the configured size, newly drawn."""
    from transformers.models.clip.configuration_clip import CLIPConfig
    from transformers.models.clip.modeling_clip import CLIPModel

    shared = {
        "hidden_size": config.width,
        "intermediate_size": 4 * config.width,
        "num_attention_heads": config.heads,
        "projection_dim": config.width,
        "hidden_act": "quick_gelu",
    }
    special = {"bos_token_id": words.begin_id, "eos_token_id": words.end_id, "pad_token_id": words.end_id}
    text = {
        **shared,
        **special,
        "num_hidden_layers": config.text_layers,
        "vocab_size": len(words),
        "max_position_embeddings": config.length,
    }
    vision = {**shared, "num_hidden_layers": config.image_layers, "image_size": config.size, "patch_size": config.patch}
    torch.manual_seed(config.seed)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.width))


def train_clip(config: CLIPTraining) -> Any:
    """Train, resume or finish a CLIP; when it stops, `out/model` holds `text_encoder/`, `tokenizer/` and `clip/`.

    Returns transformers' CLIPModel on the training device. Errors: as `fit`, and those of loading the data.
    """
    from open_clip.loss import ClipLoss

    from latentdiff.evaluation.clip_score import IMAGE_SIZES, TEXT_SIZES, load_clip, sizes

    if config.start is not None:
        config.must_hold("start", "clip", "text_encoder", "tokenizer")
    start = None if config.start is None else load_clip(config.start).train().requires_grad_()
    if start is not None:
        config.tell_of_others(own_sizes(start))
    size = config.size if start is None else start.config.vision_config.image_size
    source = open_source(config.data, size=size, compose=config.compose)
    meta = {"network": "clip", "data": source.fingerprint()}
    check_run(config, meta)  # before a vocabulary is written beside another's run
    words = _vocabulary(config, source)
    clip = build_clip(config, words) if start is None else start
    if config.freeze_text:
        clip.text_model.requires_grad_(False)
    known = hashlib.sha256(json.dumps(tokenizer.as_data(words), sort_keys=True).encode()).hexdigest()[:16]
    meta["vocabulary"] = known
    if start is None:
        meta |= {"vocab": config.vocab, "length": config.length}
    for kind, names in (("text", TEXT_SIZES), ("vision", IMAGE_SIZES)):
        tower = getattr(clip.config, f"{kind}_config").to_dict()  # which says much else, such as transformers' version
        meta |= {f"{kind} {name}": value for name, value in sizes(tower, names).items()}

    def stream(start: int, rank: int, world: int) -> Iterator[Any]:
        shared.rank, shared.world_size = rank, world
        return batches(source, config.batch // world, seed=config.seed, start=start, rank=rank, world=world, workers=config.workers)

    shared = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)

    def loss(model: nn.Module, batch: Any, generator: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        device = generator.device
        with torch.no_grad():
            clip.logit_scale.clamp_(max=LARGEST_SCALE)  # the weight: were only its use clamped, it would have no gradient there
        ids = trim(token_ids(words, batch[1]), words.end_id)
        images, texts, scale = model(ids.to(device), to_float(batch[0].to(device)))
        with torch.autocast(device.type, enabled=False):  # logits near 100, where bf16 has steps of a half
            images, texts = images.float(), texts.float()
            value = shared(images, texts, scale.float())
            right = (images @ texts.T).argmax(1) == torch.arange(len(images), device=device)
        return value, {"scale": scale.detach(), "top1": right.float().mean()}

    trained = fit(TwoTowers(clip), loss, stream, config, meta=meta).clip
    store(lambda folder: save_clip(trained, words, folder), config.out / "model")
    return trained


def own_sizes(clip: Any) -> Mapping[str, Any]:
    """Those that a configuration tells, of a CLIP that is there."""
    text, vision = clip.config.text_config, clip.config.vision_config
    own = {"size": vision.image_size, "patch": vision.patch_size, "width": text.hidden_size, "heads": text.num_attention_heads}
    own |= {"text_layers": text.num_hidden_layers, "image_layers": vision.num_hidden_layers}
    return own | {"vocab": text.vocab_size, "length": text.max_position_embeddings}


def _vocabulary(config: CLIPTraining, source: PictureSource) -> Tokenizer:
    """The vocabulary of `start`, of the run that is resumed, or one learnt from the run's first 10,000 captions."""
    folder = (config.start or config.out) / "tokenizer"
    if config.start is None:
        once(lambda: _learn_missing(folder, config, source))
    return tokenizer.read(folder)[0]


def _learn_missing(folder: Path, config: CLIPTraining, source: PictureSource) -> None:
    if latest(config.out) and (folder / "tokenizer_config.json").is_file():  # the file that is written last
        return
    batch = min(500, len(source))
    some = islice(batches(source, batch, seed=config.seed, workers=config.workers), 20)
    words = learn_vocabulary((caption for _, captions in some for caption in captions), config.vocab, config.length)
    tokenizer.write(folder, words, words.end_id)


def save_clip(clip: Any, words: Tokenizer, folder: Path) -> None:
    """Text tower and tokenizer in the folder layout; what they lack of a CLIPModel beside them in `clip/`."""
    text = clip.config.text_config
    spec = TowerSpec(
        width=text.hidden_size, mlp=text.intermediate_size, layers=text.num_hidden_layers, heads=text.num_attention_heads,
        activation=text.hidden_act, vocab=text.vocab_size, length=text.max_position_embeddings,
        begin=words.begin_id, end=words.end_id, pad=words.end_id,
    )  # fmt: skip
    state = clip.state_dict()
    for name, config, tensors in (
        ("text_encoder", configs.tower_json(spec), {k: v for k, v in state.items() if k.startswith("text_model.")}),
        ("clip", json.loads(clip.config.to_json_string()), {k: v for k, v in state.items() if not k.startswith("text_model.")}),
    ):
        write_json(folder / name / "config.json", config)
        write_safetensors(folder / name / "model.safetensors", {k: v for k, v in tensors.items() if "position_ids" not in k})
    write_json(folder / "clip" / "preprocessor_config.json", preprocessing(clip.config.vision_config.image_size))
    tokenizer.write(folder / "tokenizer", words, words.end_id)


def preprocessing(size: int) -> Mapping[str, Any]:
    """How other programs have to prepare pictures for the image tower: to [-1, 1], at its size."""
    half = [0.5, 0.5, 0.5]
    square = {"height": size, "width": size}
    yes = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    return {
        "image_processor_type": "CLIPImageProcessor", **yes, "do_center_crop": False, "size": square, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": half, "image_std": half,
    }  # fmt: skip
