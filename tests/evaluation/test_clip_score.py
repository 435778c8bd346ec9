"""A CLIP as judge: loading it strictly, scores and ranks in closed form, and any open_clip."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.files import CheckpointError
from latentdiff.evaluation.clip_score import ClipScorer, clip_score, load_clip, pixels, ranks, top
from latentdiff.training.clip import token_ids
from latentdiff.training.unet import load_tower

IMAGES = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
TEXTS = ["a red apple", "a cat and a dog", ""]


@pytest.fixture
def copied(judged_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(judged_folder, tmp_path / "model"))


def rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# ------------------------------------------------------------------------------------------------ numbers


def test_scores_are_cosines() -> None:
    images = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-1.0, 0.0]])
    texts = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(clip_score(images, texts), torch.tensor([100.0, 0.0, 100 * 2**-0.5, 0.0]))
    with pytest.raises(ValueError, match=r"texts must be one a picture \(4\), got 2"):
        clip_score(images, texts[:2])


def test_ranks_count_the_names_that_suit_better() -> None:
    names = torch.eye(4) * torch.tensor([1.0, 7.0, 0.1, 3.0])[:, None]  # their lengths say nothing
    images = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0], [-1.0, -2.0, -3.0, -4.0]])
    assert ranks(images, names, torch.tensor([0, 3, 1])).tolist() == [0, 3, 1]


def test_a_judge_that_cannot_tell_is_wrong() -> None:
    names = torch.ones(5, 3)
    assert ranks(torch.rand(2, 3), names, torch.tensor([0, 4])).tolist() == [4, 4]


def test_top_is_a_share_in_percent() -> None:
    found = torch.tensor([0, 4, 5, 1, 0])
    assert [top(found, k) for k in (1, 2, 5, 6)] == pytest.approx([40, 60, 80, 100])


def test_pixels_are_what_training_saw() -> None:
    picture = Image.frombytes("RGB", (2, 1), bytes([0, 127, 255, 255, 0, 51]))
    assert torch.equal(
        pixels([picture.resize((4, 4), Image.Resampling.NEAREST)], 4)[0, :, 0, 0], torch.tensor([0, 127, 255]) / 127.5 - 1
    )
    assert pixels([picture, Image.new("L", (9, 5))], 4).shape == (2, 3, 4, 4)


# ------------------------------------------------------------------------------------------------ our CLIP


def test_the_judge_gives_transformers_features(judged_folder: Path) -> None:
    judge, clip, words = ClipScorer.from_folder(judged_folder), load_clip(judged_folder), load_tower(judged_folder)[0]
    with torch.no_grad():
        out = clip(input_ids=token_ids(words, TEXTS), pixel_values=pixels(IMAGES, 32))
    images, texts = judge.images(IMAGES), judge.texts(TEXTS)
    torch.testing.assert_close(torch.nn.functional.normalize(images), out.image_embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.nn.functional.normalize(texts), out.text_embeds, rtol=1e-5, atol=1e-6)
    own = out.logits_per_image.diagonal() / clip.logit_scale.exp()
    torch.testing.assert_close(judge.score(IMAGES, TEXTS), 100 * own.clamp(min=0), rtol=1e-4, atol=1e-4)


def test_many_are_judged_as_few_are(judged_folder: Path) -> None:
    judge = ClipScorer.from_folder(judged_folder)
    torch.testing.assert_close(judge.images(IMAGES * 40), judge.images(IMAGES).repeat(40, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(judge.texts(TEXTS * 40), judge.texts(TEXTS).repeat(40, 1), rtol=1e-5, atol=1e-5)
    assert judge.texts(["a red apple " * 50]).isfinite().all()  # longer than the tower reads: cut
    with pytest.raises(ValueError, match="nothing to judge"):
        judge.images([])


def test_loading_leaves_the_callers_random_numbers_alone(judged_folder: Path) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    load_clip(judged_folder)
    assert torch.equal(torch.rand(4), wanted)


def test_a_missing_tensor_is_named(copied: Path) -> None:
    rewrite(copied / "clip" / "model.safetensors", lambda t: t.pop("visual_projection.weight"))
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors of the CLIP are missing: 'visual_projection.weight'"):
        load_clip(copied)


def test_a_tensor_too_many_is_named(copied: Path) -> None:
    rewrite(copied / "clip" / "model.safetensors", lambda t: t.update(extra=torch.zeros(2)))
    with pytest.raises(CheckpointError, match="1 tensors belong to no part of a CLIP: 'extra'"):
        load_clip(copied)


def test_a_tensor_in_both_files_is_refused(copied: Path) -> None:
    name = "text_model.final_layer_norm.bias"
    rewrite(copied / "clip" / "model.safetensors", lambda t: t.update({name: torch.zeros(32)}))
    with pytest.raises(CheckpointError, match="hold the same tensors"):
        load_clip(copied)


def test_wrong_shapes_and_nan_are_refused(copied: Path) -> None:
    file = copied / "clip" / "model.safetensors"
    rewrite(file, lambda t: t.update({"text_projection.weight": torch.zeros(32, 31)}))
    with pytest.raises(CheckpointError, match=r"text_projection.weight: expected \[32, 32\], found \[32, 31\]"):
        load_clip(copied)
    rewrite(file, lambda t: t.update({"text_projection.weight": torch.full((32, 32), torch.nan)}))
    with pytest.raises(CheckpointError, match=r"text_projection.weight of the CLIP holds NaN"):
        load_clip(copied)


def test_a_folder_without_a_clip_says_so(tiny_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"clip.config\.json"):
        load_clip(tiny_folder)


def test_a_configuration_cannot_name_code(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that transformers would act on (CVE-2026-4372 and others) are not looked at."""
    canary = tmp_path / "canary"
    (copied / "clip" / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    file = copied / "clip" / "config.json"
    config = json.loads(file.read_text())
    evil = {
        "auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation_internal": "evil/kernels", "attn_implementation": "evil/k",
        "trust_remote_code": True, "architectures": ["evil.Model"], "_name_or_path": "evil/model",
    }  # fmt: skip
    for part in (config, config["text_config"], config["vision_config"]):
        part.update(evil)
    file.write_text(json.dumps(config))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("went to the network"))
    clip = load_clip(copied)
    assert not canary.exists()
    assert "evil" not in clip.config.to_json_string()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": 3}, "needs text_config and vision_config"),
        ({"vision_config": {"hidden_act": "os.system"}}, "hidden_act one of"),
        ({"text_config": {"hidden_size": "32"}}, "hidden_size must be a number, got '32'"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(copied: Path, change: dict[str, Any], message: str) -> None:
    file = copied / "clip" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_clip(copied)


# ------------------------------------------------------------------------------------------------ another CLIP


def test_any_clip_of_open_clip_can_judge(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-judge.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-judge.json")
    model = open_clip.create_model("tiny-judge")
    save_file(model.state_dict(), tmp_path / "judge.safetensors")

    judge = ClipScorer.from_open_clip("tiny-judge", tmp_path / "judge.safetensors")
    with torch.no_grad():
        wanted = model.eval().encode_text(open_clip.get_tokenizer("tiny-judge")(TEXTS))
    torch.testing.assert_close(judge.texts(TEXTS), wanted, rtol=1e-5, atol=1e-6)
    assert judge.images(IMAGES).shape == (3, 16)
    assert judge.name == "tiny-judge"
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors: there is no such file with the weights of tiny-judge"):
        ClipScorer.from_open_clip("tiny-judge", tmp_path / "nothing.safetensors")
    (tmp_path / "text.pt").write_text("no weights")
    for name, weights in (("tiny-jugde", "judge.safetensors"), ("tiny-judge", "text.pt")):
        with pytest.raises(ValueError, match=rf"judge: open_clip makes no {name} of .*{weights} \((?!.*weights_only)"):
            ClipScorer.from_open_clip(name, tmp_path / weights)
