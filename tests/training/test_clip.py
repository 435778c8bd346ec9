"""Training the CLIP: its vocabulary, its folder in the field's programs, its learning, exact resume."""

import json
import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.checkpoints import tokenizer
from latentdiff.evaluation.clip_score import ClipScorer, load_clip, ranks, top
from latentdiff.images import to_pil
from latentdiff.models.text import Tokenizer
from latentdiff.training import clip as trainer
from latentdiff.training.clip import (
    CLIPTraining,
    build_clip,
    learn_vocabulary,
    save_clip,
    token_ids,
    train_clip,
    trim,
)
from latentdiff.training.data import open_source
from latentdiff.training.unet import load_tower
from latentdiff.training.vae import to_float

CAPTIONS = ["a red apple", "a red apple on a blue background", "three apples", "a cat and a dog", "a cat's face, flat style"] * 20
TEXTS = [
    *CAPTIONS[:5], "", "A RED   Apple!", "zebra crossing", "it's 42 o'clock", "naïve café — ½", "猫と犬", "🐈 cat",
    "<|endoftext|> a cat", "don't!!! x" * 30,
]  # fmt: skip


def config(out: Path, pictures: Path, sizes: dict[str, Any], **changes: Any) -> CLIPTraining:
    return CLIPTraining(**{"out": out, "data": pictures, "steps": 7, "batch": 5, "lr": 1e-2, **sizes, **changes})


def all_pictures(pictures: Path, size: int) -> tuple[Tensor, list[str]]:
    source = open_source(pictures, size=size)
    found = [source.get(i, 0) for i in range(len(source))]
    return torch.stack([image for image, _ in found]), [caption for _, caption in found]


# ------------------------------------------------------------------------------------------------ vocabulary


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return learn_vocabulary(CAPTIONS, 600, 16)


def test_words_that_are_seen_often_become_one_token(words: Tokenizer) -> None:
    assert [words.token(i) for i in words("a red apple")] == ["a</w>", "red</w>", "apple</w>"]
    assert len(words("zebra")) > 1  # unseen, and still spelt
    assert 514 < len(words) <= 600
    assert (words.begin_id, words.end_id) == (len(words) - 2, len(words) - 1)


def test_the_vocabulary_is_cut_to_size() -> None:
    small = learn_vocabulary(CAPTIONS, 520, 16)
    assert len(small) == 520
    assert len(small.merges) == 520 - 514


def test_every_text_survives_the_vocabulary(words: Tokenizer) -> None:
    """Bytes are in it, so nothing is unknown: tokens spell the lower-cased text without its spaces."""
    letters = {letter: byte for byte, letter in zip(_bytes(), tokenizer._byte_letters(), strict=True)}
    for text in TEXTS:
        spelt = "".join(str(words.token(i)).removesuffix("</w>") for i in words(text))
        assert bytes(letters[c] for c in spelt).decode() == "".join(text.lower().split())


def _bytes() -> list[int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*printable, *(b for b in range(256) if b not in printable)]


@pytest.mark.oracle
def test_transformers_tokenizer_gives_the_same_ids(words: Tokenizer, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer.write(tmp_path, words, words.end_id)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    plain = [text for text in TEXTS if "<|" not in text]  # theirs takes typed special tokens for real ones
    found = theirs(plain, padding="max_length", truncation=True, max_length=words.length).input_ids
    assert token_ids(words, plain).tolist() == found
    ours, pad = tokenizer.read(tmp_path)
    assert [ours(text) for text in TEXTS] == [words(text) for text in TEXTS]
    assert (pad, ours.length) == (words.end_id, 16)


def test_token_ids_begin_end_and_are_cut(words: Tokenizer) -> None:
    ids = token_ids(words, ["a cat", "a red apple " * 20, ""])
    begin, end = words.begin_id, words.end_id
    assert ids.shape == (3, 16)
    assert ids[0].tolist() == [begin, *words("a cat"), *[end] * 13]
    assert ids[1].tolist() == [begin, *words("a red apple " * 20)[:14], end]
    assert ids[2].tolist() == [begin, *[end] * 15]
    assert token_ids(words, ["a cat"], pad=0)[0].tolist() == [begin, *words("a cat"), end, *[0] * 12]


# ------------------------------------------------------------------------------------------------ folder


@pytest.fixture(scope="module")
def saved(words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A CLIP with weights of some size, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    c = CLIPTraining(out=folder, data=folder, size=32, patch=8, width=24, heads=3, text_layers=2, image_layers=2, length=16)
    clip = build_clip(c, words).eval()
    with torch.no_grad():
        for p in clip.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    save_clip(clip, words, folder)
    return clip, folder


def test_the_folder_holds_every_tensor_once(saved: tuple[Any, Path]) -> None:
    from safetensors import safe_open

    clip, folder = saved
    found = []
    for part in ("text_encoder", "clip"):
        with safe_open(folder / part / "model.safetensors", "pt") as file:
            found += file.keys()
    assert sorted(found) == sorted(clip.state_dict())


def test_the_folder_is_read_back_to_the_bit(saved: tuple[Any, Path], words: Tokenizer) -> None:
    clip, folder = saved
    again = load_clip(folder)
    assert not again.training
    ids, x = token_ids(words, CAPTIONS[:5]), torch.rand(3, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        a, b = (model(input_ids=ids, pixel_values=x) for model in (clip, again))
    assert torch.equal(a.logits_per_image, b.logits_per_image)


@pytest.mark.oracle
def test_transformers_text_model_opens_the_folder(saved: tuple[Any, Path], words: Tokenizer) -> None:
    from transformers import CLIPTextModel

    clip, folder = saved
    theirs = CLIPTextModel.from_pretrained(folder / "text_encoder")
    ours = load_tower(folder)[1]
    ids = token_ids(words, CAPTIONS[:5])
    with torch.no_grad():
        wanted = clip.text_model(input_ids=ids)
        found = theirs(input_ids=ids)
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)
    assert torch.equal(found.pooler_output, wanted.pooler_output)
    torch.testing.assert_close(ours(ids)[0], wanted.last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.oracle
def test_transformers_prepares_pictures_as_training_did(saved: tuple[Any, Path]) -> None:
    from transformers import CLIPImageProcessor

    x = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    found = CLIPImageProcessor.from_pretrained(saved[1] / "clip")(to_pil(to_float(x)), return_tensors="pt").pixel_values
    torch.testing.assert_close(found, to_float(x), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ training


def test_resume_is_exact(runs: Any, pictures: Path, tmp_path: Path) -> None:
    runs.assert_resumes_exactly(train_clip, config(tmp_path, pictures, runs.CLIP_SIZES), tmp_path, 3)


def test_learns_which_words_belong_to_which_picture(runs: Any, pictures: Path, tmp_path: Path) -> None:
    c = config(tmp_path, pictures, runs.CLIP_SIZES, steps=120, batch=12, lr=5e-3, ema=0.9, precision="no")
    train_clip(c)
    judge = ClipScorer.from_folder(tmp_path / "model")
    images, captions = all_pictures(pictures, runs.SIZE)
    found = ranks(judge.images(to_pil(to_float(images))), judge.texts(captions), torch.arange(12))
    assert top(found, 1) >= 90
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.3 * log[0]["loss"]


def test_goes_on_from_a_folder_with_its_vocabulary(runs: Any, pictures: Path, clip_folder: Path, tmp_path: Path) -> None:
    c = config(tmp_path, pictures, {**runs.CLIP_SIZES, "vocab": 600}, start=clip_folder, steps=3)
    trained = train_clip(c)
    before = load_clip(clip_folder).state_dict()
    assert runs.differing(before, dict(trained.state_dict()))
    assert (tmp_path / "model" / "tokenizer" / "vocab.json").read_text() == (clip_folder / "tokenizer" / "vocab.json").read_text()


def test_a_frozen_text_tower_does_not_move(runs: Any, pictures: Path, clip_folder: Path, tmp_path: Path) -> None:
    trained = train_clip(config(tmp_path, pictures, runs.CLIP_SIZES, start=clip_folder, freeze_text=True, steps=3))
    moved = runs.differing(dict(load_clip(clip_folder).state_dict()), dict(trained.state_dict()))
    assert {"visual_projection.weight", "text_projection.weight"} <= set(moved)
    assert not [name for name in moved if name.startswith("text_model.")]
    assert (tmp_path / "model/text_encoder/model.safetensors").read_bytes() == (
        clip_folder / "text_encoder/model.safetensors"
    ).read_bytes()


def test_what_follows_the_end_of_all_captions_is_not_heard(clip_folder: Path) -> None:
    words, clip = tokenizer.read(clip_folder / "tokenizer")[0], load_clip(clip_folder)
    ids = token_ids(words, ["a", "a cat", ""])
    short = trim(ids, words.end_id)
    assert short.shape[1] < ids.shape[1]
    assert (short[1] == words.end_id).nonzero().flatten().tolist() == [short.shape[1] - 1]  # the longest is whole
    with torch.no_grad():
        whole, cut = (clip.text_projection(clip.text_model(input_ids=i).pooler_output) for i in (ids, short))
    torch.testing.assert_close(cut, whole)


def test_the_vocabulary_is_learnt_once(runs: Any, pictures: Path, tmp_path: Path) -> None:
    c = config(tmp_path, pictures, runs.CLIP_SIZES, steps=2)
    train_clip(c)
    vocabulary = tmp_path / "tokenizer" / "vocab.json"
    before = vocabulary.stat().st_mtime_ns
    train_clip(replace(c, steps=3))
    assert vocabulary.stat().st_mtime_ns == before
    for changes, message in (({"vocab": 530}, "vocab was 540, is 530"), ({"length": 14}, "length was 12, is 14")):
        with pytest.raises(ValueError, match=message):
            train_clip(replace(c, steps=4, **changes))


def test_a_vocabulary_that_nothing_was_trained_on_is_learnt_as_it_is_asked_for(
    runs: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config(tmp_path, pictures, runs.CLIP_SIZES, steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "fit", lambda *_, **__: 1 / 0)  # killed before the first checkpoint
        with pytest.raises(ZeroDivisionError):
            train_clip(c)
    train_clip(replace(c, length=14, vocab=520))
    words = tokenizer.read(tmp_path / "model" / "tokenizer")[0]
    assert (words.length, len(words)) == (14, 520)


def test_a_run_is_not_resumed_with_another_vocabulary_or_other_data(runs: Any, pictures: Path, tmp_path: Path) -> None:
    c = config(tmp_path / "run", pictures, runs.CLIP_SIZES, steps=1)
    train_clip(c)
    others = tmp_path / "others"
    shutil.copytree(pictures, others)
    (others / "red-disc.txt").write_text("a red disk")
    with pytest.raises(ValueError, match=r"another model or data \(data was '\w{16}', is '\w{16}'\)"):
        train_clip(replace(c, data=others))
    words, pad = tokenizer.read(c.out / "tokenizer")
    tokenizer.write(c.out / "tokenizer", Tokenizer(words.vocab, words.merges[:-1], length=words.length), pad)
    with pytest.raises(ValueError, match=r"another model or data \(vocabulary was '\w{16}', is '\w{16}'\)"):
        train_clip(c)


def test_a_run_outlives_its_version_of_transformers(
    runs: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.clip import configuration_clip as theirs

    c = config(tmp_path, pictures, runs.CLIP_SIZES, steps=1)
    train_clip(c)
    for kind in (theirs.CLIPConfig, theirs.CLIPTextConfig, theirs.CLIPVisionConfig):  # a later one says more
        monkeypatch.setattr(kind, "to_dict", lambda self, told=kind.to_dict: told(self) | {"new": 1, "transformers_version": "9.9"})
    train_clip(replace(c, steps=2))
    state = tmp_path / "step-00000002" / "state.json"  # and so it is with what a run of before said of itself
    found = json.loads(state.read_text())
    state.write_text(json.dumps(found | {"meta": {"network": "clip", "sizes": '{"transformers_version": "5.0"}'}}))
    train_clip(replace(c, steps=3))


def test_a_start_brings_the_size_of_its_pictures(runs: Any, pictures: Path, clip_folder: Path, tmp_path: Path) -> None:
    sizes = {**runs.CLIP_SIZES, "size": 32}
    with pytest.warns(UserWarning, match=f"start: the sizes of the model there stay, size {runs.SIZE} and not 32$"):
        trained = train_clip(config(tmp_path, pictures, sizes, start=clip_folder, steps=1))
    assert trained.config.vision_config.image_size == runs.SIZE


def test_a_start_that_is_no_model_folder_is_named(runs: Any, pictures: Path, clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copytree(clip_folder, tmp_path / "run" / "model")
    said = f"start must be a model folder with clip/, got {tmp_path / 'run'}: maybe {tmp_path / 'run' / 'model'} is meant"
    with pytest.raises(FileNotFoundError, match=said):
        train_clip(config(tmp_path / "new", pictures, runs.CLIP_SIZES, start=tmp_path / "run"))


def test_captions_that_are_cut_are_told_of(words: Tokenizer) -> None:
    short = Tokenizer(words.vocab, words.merges, length=5)
    with warnings.catch_warnings(action="error"):
        token_ids(short, ["a a a", ""])
    with pytest.warns(UserWarning, match="captions of more than 3 tokens are cut; a CLIP that is trained with a greater length"):
        assert token_ids(short, ["a a a a"]).tolist() == token_ids(short, ["a a a"]).tolist()


def test_a_refused_run_leaves_what_lies_there(runs: Any, pictures: Path, tmp_path: Path) -> None:
    train_clip(config(tmp_path, pictures, runs.CLIP_SIZES, steps=1))
    shutil.rmtree(tmp_path / "tokenizer")
    state = tmp_path / "step-00000001" / "state.json"
    found = json.loads(state.read_text())
    state.write_text(json.dumps(found | {"meta": found["meta"] | {"network": "vae"}}))
    with pytest.raises(ValueError, match="holds a run of another model"):
        train_clip(config(tmp_path, pictures, runs.CLIP_SIZES, steps=2))
    assert not (tmp_path / "tokenizer").exists()


def test_a_scale_above_its_limit_comes_down_and_learns_on(runs: Any, pictures: Path, clip_folder: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(clip_folder, start)
    file = start / "clip" / "model.safetensors"
    save_file({**load_file(file), "logit_scale": torch.tensor(5.0)}, file)
    train_clip(config(tmp_path / "run", pictures, runs.CLIP_SIZES, start=start, steps=2, precision="no", lr=1e-3))
    found = runs.checkpoint_files(tmp_path / "run", 2)["model/clip.logit_scale"].item()
    assert abs(found - math.log(100)) < 3e-3
    assert found != pytest.approx(math.log(100), abs=1e-6)  # it has a gradient


def test_the_contrast_is_computed_in_float32(runs: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip.loss import ClipLoss

    kinds = []

    def remembered(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        kinds.extend(logits.dtype for logits in found)
        return found

    real = ClipLoss.get_logits
    monkeypatch.setattr(ClipLoss, "get_logits", remembered)
    train_clip(config(tmp_path, pictures, runs.CLIP_SIZES, steps=1, precision="bf16"))
    assert kinds == [torch.float32] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 5}, r"size must be a multiple of patch \(5\), got 16"),
        ({"patch": 0}, r"size must be a multiple of patch \(0\)"),
        ({"heads": 3}, r"width must be a multiple of heads \(3\), got 16"),
        ({"vocab": 500}, "vocab must be at least 514, got 500"),
        ({"length": 2}, "length must be at least 3, got 2"),
        ({"image_layers": 0}, "image_layers must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(runs: Any, pictures: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, pictures, runs.CLIP_SIZES, **changes)


@pytest.mark.slow
def test_two_processes_share_one_contrast(runs: Any, pictures: Path, tmp_path: Path) -> None:
    """Every picture is held against the texts of both processes: two halves train as the whole batch does."""
    import os
    import subprocess
    import sys

    c = config(tmp_path / "one", pictures, runs.CLIP_SIZES, steps=4, batch=6, precision="no")
    train_clip(c)
    (tmp_path / "run.py").write_text(
        "from pathlib import Path\nfrom latentdiff.training.clip import CLIPTraining, train_clip\n"
        f"sizes = {runs.CLIP_SIZES!r}\n"
        f"train_clip(CLIPTraining(out=Path({str(tmp_path / 'two')!r}), data=Path({str(pictures)!r}), steps=4, batch=6, lr=1e-2, "
        "precision='no', **sizes))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "run.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = (runs.checkpoint_files(tmp_path / name, 4) for name in ("one", "two"))
    for name in a:
        # Early Adam steps are signs of gradients: near-zero ones may turn with rounding, and those of the keys' biases are nothing
        # else, since all scores of a query rise alike.
        if name.startswith("model/") and not name.endswith("k_proj.bias"):
            assert (a[name] - b[name]).abs().mean() < 2e-4, name
