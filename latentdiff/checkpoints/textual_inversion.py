"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): new words for the text towers, learned as embeddings.

A file holds n vectors for each tower. They become the tokens `word, word_1, …`, and writing `word` in a prompt means all of them.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.checkpoints.files import CheckpointError, open_tensors, some_names
from latentdiff.checkpoints.lora import twin
from latentdiff.models.text import TextTower, Tokenizer

SDXL = ("clip_l", "clip_g")  # keys of SDXL's pairs, in the order of its towers
ONE = re.compile(r"string_to_param\..*|emb_params|\*|clip_[lg]")  # keys of files with one set of vectors, which name no word


@dataclass(frozen=True, eq=False)
class Inversion:
    """A word and its vectors [n, width], for each tower."""

    word: str
    vectors: tuple[Tensor, ...]

    @property
    def tokens(self) -> list[str]:
        return [self.word, *(f"{self.word}_{i}" for i in range(1, len(self.vectors[0])))]


def read_inversion(
    path: str | os.PathLike, towers: Sequence[TextTower], *, word: str | None = None, allow_pickle: bool = False
) -> Inversion:
    """Read A1111's, diffusers' and SDXL's files.

    word: what to write in prompts; None takes the file's own word, or its name without the ending.
    Errors: CheckpointError for a file that holds something else, or vectors of other widths than the towers'.
    """
    file = open_tensors(Path(path), allow_pickle=allow_pickle)
    names = list(file.entries)
    if set(names) == set(SDXL):
        keys, own = list(SDXL) if len(towers) == 2 else ["clip_g"], None
    elif len(one := [name for name in names if ONE.fullmatch(name)]) == 1:
        keys, own = one, file.metadata.get("name")
    elif len(names) == 1:
        keys, own = names, names[0]
    else:
        raise CheckpointError(
            f"{file.path}: expected a textual inversion (string_to_param, emb_params, one word, or clip_l and clip_g), "
            f"found {len(names)} tensors: {some_names(names)}"
        )
    vectors = tuple(torch.atleast_2d(file.get(key)).float() for key in keys)
    word = word or own or file.path.stem
    _check(file.path, word, vectors, towers)
    return Inversion(word, vectors)


def _check(path: Path, word: str, vectors: Sequence[Tensor], towers: Sequence[TextTower]) -> None:
    widths, found = [t.spec.width for t in towers], [tuple(v.shape) for v in vectors]
    if [shape[-1] for shape in found] != widths or len({shape[0] for shape in found}) != 1 or any(len(s) != 2 for s in found):
        raise CheckpointError(
            f"{path}: its vectors have shapes {found}; this model's {len(towers)} text tower(s) are {widths} wide. It was made for "
            "another kind of model"
        )
    if not all(v.isfinite().all() for v in vectors):
        raise CheckpointError(f"{path}: its vectors hold NaN or infinite numbers")
    if not word.strip() or any(c.isspace() for c in word):
        raise CheckpointError(f"{path}: the word {word!r} must have no spaces; give another as `word`")


def with_inversions(
    towers: Sequence[TextTower], tokenizers: Sequence[Tokenizer], inversions: Sequence[Inversion]
) -> tuple[tuple[TextTower, ...], tuple[Tokenizer, ...]]:
    """New towers and tokenizers that know the words; the given ones stay as they are, and share all else.

    Errors: ValueError for a word that a tokenizer has already.
    """
    made = [_extended(i, tower, tokens, inversions) for i, (tower, tokens) in enumerate(zip(towers, tokenizers, strict=True))]
    return tuple(t for t, _ in made), tuple(t for _, t in made)


def _extended(index: int, tower: TextTower, tokenizer: Tokenizer, inversions: Sequence[Inversion]) -> tuple[TextTower, Tokenizer]:
    words = [token for inversion in inversions for token in inversion.tokens]
    known = [word for i, word in enumerate(words) if tokenizer.id(word) is not None or word in words[:i]]
    if known:
        raise ValueError(f"the word {known[0]!r} is a token of this model already; give another (file:word on the command line)")
    table = tower.text_model.embeddings.token_embedding.weight
    if len(tokenizer) != len(table):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the tower {len(table)}: words can not be added")
    table = torch.cat([table, *(inversion.vectors[index].to(table) for inversion in inversions)])
    state = {**tower.state_dict(), "text_model.embeddings.token_embedding.weight": table}
    new = twin(tower, state, replace(tower.spec, vocab=len(table)))
    t = tokenizer
    return new, Tokenizer(t.vocab, t.merges, begin=t.begin, end=t.end, length=t.length, added=[*t.added, *words])
