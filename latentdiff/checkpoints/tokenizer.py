"""CLIP tokenizers: from a folder's files, read as data, or the standard one, whose vocabulary open_clip's wheel carries.

The padding token of OpenCLIP's towers is "!" (id 0), while a typed "!" must stay token 256: what a tower is padded with stands in
its `TowerSpec.pad`, and no tokenizer knows of it.
"""

import gzip
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.files import CheckpointError, read_json, write_json, write_text
from latentdiff.models.text import Tokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # of the list's pairs, those that CLIP uses


@cache
def standard() -> Tokenizer:
    """The tokenizer of OpenAI's CLIP and of every OpenCLIP tower here: 49,408 tokens, prompts of 77."""
    vocab, merges = _standard_vocabulary()
    return Tokenizer(vocab, merges)


@cache
def _standard_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Bytes, bytes that end a word, 48,894 merged pairs, begin and end (Radford et al. 2021, arXiv 2103.00020, sec. 2.4)."""
    spec = importlib.util.find_spec("open_clip")  # finds the wheel without importing it (which would import torchvision)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the standard CLIP vocabulary is part of open_clip_torch, which is not installed")
    text = gzip.decompress((Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    merges = [(a, b) for a, b in map(str.split, text.split("\n", MERGES + 1)[1:-1])]  # after the title, a pair a line
    letters = _byte_letters()
    tokens = [*letters, *(c + "</w>" for c in letters), *("".join(pair) for pair in merges), BEGIN, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _byte_letters() -> list[str]:
    """A printable letter for each byte: printable ones stand for themselves, the others for 256, 257, …"""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def read(folder: Path) -> tuple[Tokenizer, int]:
    """The tokenizer of a model folder's `tokenizer/`, and the id to pad its tower with."""
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    special = read_json(folder / "special_tokens_map.json") if (folder / "special_tokens_map.json").is_file() else {}

    def token(name: str, default: str) -> str:
        value = config.get(name) or special.get(name) or default
        return str(value.get("content", default) if isinstance(value, dict) else value)

    vocab, merges, added = _read_vocabulary(folder)
    length = config.get("model_max_length")
    if not isinstance(length, int) or not 2 < length <= 100_000:
        length = 77
    begin, end = token("bos_token", BEGIN), token("eos_token", END)
    pad = token("pad_token", END)
    for name, what in ((begin, "bos_token"), (end, "eos_token"), (pad, "pad_token")):
        if name not in vocab and name not in added:
            raise CheckpointError(f"{folder}: {what} {name!r} is not in the vocabulary")
    words = [word for word, _ in sorted(added.items(), key=lambda item: item[1]) if word not in vocab]
    try:
        tokenizer = Tokenizer(vocab, merges, begin=begin, end=end, length=length, added=words)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{folder}: vocabulary and merges are not of one tokenizer ({error!s:.200})") from None
    if moved := [word for word in words if tokenizer.id(word) != added[word]]:
        raise CheckpointError(
            f"{folder}: added words must follow the vocabulary's {len(vocab)} ids; {moved[0]!r} has {added[moved[0]]}"
        )
    return tokenizer, (vocab | added)[pad]


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    """Vocabulary, merges and added words, from `vocab.json` and `merges.txt` or from `tokenizer.json`."""
    found = {p.name for p in folder.iterdir()}
    if not ({"vocab.json", "merges.txt"} <= found or "tokenizer.json" in found):
        raise CheckpointError(
            f"{folder}: expected vocab.json and merges.txt, or tokenizer.json, found {', '.join(sorted(found)) or 'nothing'}; "
            "copy the tokenizer's files again"
        )
    fast = read_json(folder / "tokenizer.json") if "tokenizer.json" in found else {}
    try:
        added = {str(t["content"]): int(t["id"]) for t in fast.get("added_tokens", [])}
        if "added_tokens.json" in found:
            added |= {word: int(id) for word, id in read_json(folder / "added_tokens.json").items()}
        if {"vocab.json", "merges.txt"} <= found:
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
            vocab = dict(read_json(folder / "vocab.json"))
        else:
            vocab = dict(fast["model"]["vocab"])
            merges = [_pair(m) for m in fast["model"]["merges"]]
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{folder}: vocab.json and merges.txt, or tokenizer.json, are not a CLIP tokenizer's ({error!r})"
        ) from None
    return vocab, merges, added


def usual_pad(config: Mapping[str, Any]) -> int:
    """What a tower without a tokenizer beside it is padded with: OpenCLIP's, told by their activation, with 0."""
    return 0 if config.get("hidden_act") == "gelu" else 49407


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def as_data(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `Tokenizer` takes, as JSON can hold it."""
    t = tokenizer
    return {"vocab": t.vocab, "merges": t.merges, "begin": t.begin, "end": t.end, "length": t.length, "added": t.added}


def from_data(data: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `as_data` wrote."""
    return Tokenizer(**{**data, "merges": [_pair(m) for m in data["merges"]]})


def is_standard(tokenizer: Tokenizer) -> bool:
    return tokenizer.vocab == _standard_vocabulary()[0] and not tokenizer.added


def write(folder: Path, tokenizer: Tokenizer, pad: int) -> None:
    """Write `tokenizer/` as every reader of this layout knows it."""
    tokens = {"bos_token": tokenizer.begin, "eos_token": tokenizer.end, "unk_token": tokenizer.end}
    tokens["pad_token"] = tokenizer.token(pad) or tokenizer.end
    write_json(folder / "vocab.json", tokenizer.vocab)
    write_text(folder / "merges.txt", "#version: 0.2\n" + "\n".join(" ".join(m) for m in tokenizer.merges) + "\n")
    write_json(folder / "special_tokens_map.json", tokens)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length, "add_prefix_space": False, **tokens},
    )
    if tokenizer.added:
        write_json(folder / "added_tokens.json", {word: tokenizer.id(word) for word in tokenizer.added})
