"""A CLIP as judge: how well pictures and words go together, and whether a picture's own words are its nearest."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from latentdiff.checkpoints import tokenizer
from latentdiff.checkpoints.files import CheckpointError, TensorFile, read_json
from latentdiff.checkpoints.fill import Options, check_leftovers, fill
from latentdiff.checkpoints.io import open_part
from latentdiff.checkpoints.keymap import Source
from latentdiff.images import to_tensor
from latentdiff.models.text import ACTIVATIONS

BATCH = 50  # pictures or texts at once
TEXT_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps", "projection_dim",
    "vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
IMAGE_SIZES = (*TEXT_SIZES[:6], "image_size", "patch_size", "num_channels")


def load_clip(folder: str | Path) -> Any:
    """transformers' CLIPModel of a model folder, float32: the text tower lies in `text_encoder/`, all the rest in `clip/`.

    Errors: FileNotFoundError where a part is missing; CheckpointError for missing, mis-shaped, non-finite or left-over tensors.
    """
    from transformers.models.clip.configuration_clip import CLIPConfig
    from transformers.models.clip.modeling_clip import CLIPModel

    folder = Path(folder)
    found = read_json(folder / "clip" / "config.json")
    text, vision = sizes(found.get("text_config"), TEXT_SIZES), sizes(found.get("vision_config"), IMAGE_SIZES)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=text.get("projection_dim", 512))
    with torch.random.fork_rng(devices=[]):  # its random weights, which are replaced, shall not move the caller's generator
        clip: Any = CLIPModel(config)
    file = joined(folder, [open_part(folder / part, Options()) for part in ("text_encoder", "clip")])
    sources = {name: Source(name) for name in clip.state_dict()}
    check_leftovers(file, sources.values(), "CLIP")
    return fill(clip, file, sources, Options(dtype=torch.float32), "CLIP")


def sizes(tower: Any, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of a tower's configuration and its activation; nothing else in the file, which may name code, is looked at."""
    if not isinstance(tower, dict) or tower.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
        raise CheckpointError(
            f"clip/config.json: needs text_config and vision_config, with hidden_act one of {', '.join(ACTIVATIONS)}"
        )
    if wrong := [name for name in names if not isinstance(tower.get(name, 0), int | float)]:
        raise CheckpointError(f"clip/config.json: {wrong[0]} must be a number, got {tower[wrong[0]]!r}")
    return {"hidden_act": tower.get("hidden_act", "quick_gelu")} | {name: tower[name] for name in names if name in tower}


def joined(path: Path, files: Sequence[TensorFile]) -> TensorFile:
    """Several files as one. Errors: CheckpointError where two hold a tensor of the same name."""
    owner = {name: file for file in files for name in file.entries}
    if len(owner) < sum(len(file.entries) for file in files):
        raise CheckpointError(f"{path}: text_encoder/ and clip/ hold the same tensors; each must be stored once")
    return TensorFile(path, {name: file.entries[name] for name, file in owner.items()}, lambda name: owner[name].get(name))


@dataclass(frozen=True, eq=False)
class ClipScorer:
    """A CLIP behind two functions, so that any can judge: `texts` -> [n, d], `images` -> [n, d], neither of unit length."""

    name: str
    texts: Callable[[Sequence[str]], Float[Tensor, "n d"]]
    images: Callable[[Sequence[Image.Image]], Float[Tensor, "n d"]]

    @classmethod
    def from_folder(cls, folder: str | Path, device: str | torch.device = "cpu") -> ClipScorer:
        """The CLIP of a model folder, such as the embedded model's."""
        clip, (words, pad) = load_clip(folder).to(device), tokenizer.read(Path(folder) / "tokenizer")
        length, side = clip.config.text_config.max_position_embeddings, clip.config.vision_config.image_size

        def texts(batch: Sequence[str]) -> Tensor:
            rows = [[words.begin_id, *words(text)[: length - 2], words.end_id] for text in batch]
            ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
            return clip.text_projection(clip.text_model(input_ids=ids).pooler_output)

        def images(batch: Sequence[Image.Image]) -> Tensor:
            return clip.visual_projection(clip.vision_model(pixel_values=pixels(batch, side).to(device)).pooler_output)

        return cls(f"the model's own CLIP ({Path(folder).name})", _in_batches(texts), _in_batches(images))

    @classmethod
    def from_open_clip(cls, name: str, weights: str | Path, device: str | torch.device = "cpu") -> ClipScorer:
        """A CLIP of `open_clip`: an architecture's name ("ViT-B-32") and a file with its weights.

        Errors: FileNotFoundError; ValueError where open_clip does not know the name or cannot take the weights.
        """
        import open_clip

        if not Path(weights).is_file():
            raise FileNotFoundError(f"{weights}: there is no such file with the weights of {name}")
        try:
            model, _, prepare = open_clip.create_model_and_transforms(name, pretrained=str(weights), device=device)
        except Exception as error:  # of many types: an unknown name, a file of no weights or of another network's
            why = re.split(r"\n|\. |\(1\)", str(error).strip())[0]  # torch goes on with advice to run what is in the file
            raise ValueError(f"judge: open_clip makes no {name} of {weights} ({shorten(why, 200)})") from error
        judge: Any = model.eval()
        tokenize, transform = open_clip.get_tokenizer(name), cast(Any, prepare)

        def texts(batch: Sequence[str]) -> Tensor:
            return judge.encode_text(tokenize(list(batch)).to(device))

        def images(batch: Sequence[Image.Image]) -> Tensor:
            return judge.encode_image(torch.stack([transform(image) for image in batch]).to(device))

        return cls(name, _in_batches(texts), _in_batches(images))

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Float[Tensor, " n"]:
        """CLIP score of each picture and its own text (Hessel et al., arXiv 2104.08718, eq. 1, with w = 100)."""
        return clip_score(self.images(images), self.texts(texts))


def clip_score(images: Float[Tensor, "n d"], texts: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """100 · max(cos, 0) of each pair of features."""
    if len(images) != len(texts):
        raise ValueError(f"texts must be one a picture ({len(images)}), got {len(texts)}")
    return 100 * F.cosine_similarity(images, texts).clamp(min=0)


def ranks(images: Float[Tensor, "n d"], names: Float[Tensor, "k d"], own: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many of the names suit each picture better than its own name does; 0 is a zero-shot hit (Radford et al. 2021, sec. 3.1).

    own: the index of each picture's name. A name as good as the own one counts as better: a judge that cannot tell, is wrong.
    """
    cosines = F.normalize(images, dim=-1) @ F.normalize(names, dim=-1).T  # [n, k]
    better = cosines >= cosines.gather(1, own[:, None])
    return better.sum(1) - 1  # not itself


def top(found: Int[Tensor, " n"], k: int) -> float:
    """The share, in percent, of ranks within the first k."""
    return 100 * (found < k).double().mean().item()


def pixels(images: Sequence[Image.Image], side: int) -> Float[Tensor, "n 3 side side"]:
    """RGB pictures squeezed to a square and put in [-1, 1], as our CLIP was trained."""
    square = (side, side)
    return to_tensor(i if i.size == square else i.convert("RGB").resize(square, Image.Resampling.BICUBIC) for i in images)


def _in_batches(function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """A function of a few items made one of many, in float32 on the CPU."""

    @torch.no_grad()
    def run(items: Any) -> Tensor:
        if not len(items):
            raise ValueError("there is nothing to judge: no pictures, or no texts")
        return torch.cat([function(items[i : i + BATCH]).float().cpu() for i in range(0, len(items), BATCH)])

    return run
