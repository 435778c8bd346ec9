"""`latentdiff evaluate`: the questions it asks, its numbers where they are known, and its report."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.evaluation import evaluate as module
from latentdiff.evaluation.clip_score import ClipScorer
from latentdiff.evaluation.evaluate import MEANINGS, Evaluation, Exam, distances, drawn_numbers, evaluate, open_exam, vae_psnr
from latentdiff.evaluation.kept import Kept, fingerprint
from latentdiff.training.drawings import Drawings

COLOURS = {"a red thing": (220, 0, 0), "a green thing": (0, 220, 0), "a blue thing": (0, 0, 220), "a grey thing": (90, 90, 90)}


@pytest.fixture
def config(drawings_folder: Path, judged_folder: Path, tmp_path: Path) -> Evaluation:
    return Evaluation(
        data=drawings_folder, model=str(judged_folder), out=tmp_path / "out", prompts=3, pictures=4, steps=2, device="cpu",
        dtype="float32", progress=False,
    )  # fmt: skip


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(6):
        Image.fromarray(np.full((40, 30, 3), 40 * k, np.uint8)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"picture number {k % 5}")
    return folder


@pytest.fixture
def half_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seventeen drawings three per cent would be none."""
    monkeypatch.setattr(module, "Drawings", lambda path: Drawings(path, held_out=0.4))


def colour_judge() -> ClipScorer:
    """A judge that sees a picture's mean colour and knows the colours' names."""
    return ClipScorer(
        "colours",
        lambda texts: torch.tensor([COLOURS[text] for text in texts]).float(),
        lambda images: torch.tensor(np.array([np.asarray(image).reshape(-1, 3).mean(0) for image in images])).float(),
    )


def plain(*names: str) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), COLOURS[name]) for name in names]


# ------------------------------------------------------------------------------------------------ questions


@pytest.mark.usefixtures("half_held_out")
def test_drawings_are_examined_on_what_training_has_not_seen(config: Evaluation) -> None:
    drawings = module.Drawings(config.data)
    exam = open_exam(replace(config, pictures=100), 32)
    assert len(exam.held_out) == len(exam.captions) == len(exam.others) == len(drawings.held_out) > 1
    for image, i, caption in zip(exam.held_out, drawings.held_out, exam.captions, strict=True):
        assert np.array_equal(np.asarray(image), drawings.plain(i, 32))
        assert caption == drawings.words[drawings.records[i]["concept"]]["phrases"][0]
    others = {drawings.plain(i, 32).tobytes() for i in drawings.train}
    assert all(image.tobytes() in others for image in exam.others)
    assert len(exam.names) == len(set(exam.names))
    assert set(exam.prompts) | set(exam.captions) <= set(exam.names)


@pytest.mark.usefixtures("half_held_out")
def test_prompts_are_drawn_by_the_seed(config: Evaluation) -> None:
    everyday = open_exam(replace(config, prompts=100), 32).prompts
    assert len(everyday) > 3
    chosen = [open_exam(replace(config, seed=seed), 32).prompts for seed in (0, 0, 1, 2, 3)]
    assert chosen[0] == chosen[1]
    assert len({tuple(c) for c in chosen}) > 1
    assert all(len(c) == len(set(c)) == 3 and set(c) <= set(everyday) for c in chosen)


def test_a_folder_of_pictures_is_its_own_exam(config: Evaluation, captioned: Path) -> None:
    exam = open_exam(replace(config, data=captioned, prompts=3, pictures=100), 16)
    assert [image.size for image in exam.held_out] == [(16, 16)] * 6
    assert len(exam.names) == 5
    assert len(exam.prompts) == 3
    assert set(exam.prompts) < set(exam.names) == set(exam.captions)
    assert exam.others == []


# ------------------------------------------------------------------------------------------------ numbers


def test_accuracy_and_score_of_pictures_that_are_known() -> None:
    """Of four pictures one is of the wrong colour; of the held-out ones none."""
    names, judge = list(COLOURS), colour_judge()
    exam = Exam(prompts=names, names=names, captions=names[:2], held_out=plain(*names[:2]))
    drawn = plain("a red thing", "a green thing", "a green thing", "a grey thing")
    found = drawn_numbers(judge, judge.texts(names), exam, drawn)
    assert found == pytest.approx(
        {"clip_score": 75, "top1": 75, "top5": 100, "clip_score_real": 100, "top1_real": 100, "top5_real": 100}, rel=1e-5
    )
    assert list(found) == [name for name in MEANINGS if name in found]


def test_distances_are_zero_for_the_held_out_pictures_themselves() -> None:
    names = list(COLOURS)
    exam = Exam(prompts=names, names=names, captions=names, held_out=plain(*names))
    assert distances(colour_judge(), exam, plain(*names))["fid"] == pytest.approx(0, abs=1e-6)
    with_others = distances(colour_judge(), replace(exam, others=plain(*names)), plain(*names[:2]))
    assert list(with_others) == ["fid", "fid_floor", "kid", "kid_floor"]
    assert with_others["fid"] > 1000 > with_others["fid_floor"]


def test_psnr_is_of_eight_bit_pictures() -> None:
    """A VAE that makes everything brighter by 10 of 255: 20 log10(255 / 10)."""

    class Brighter:
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def decode(self, z: torch.Tensor) -> torch.Tensor:
            return z + 10 / 127.5

    found = vae_psnr(Brighter(), plain("a grey thing"))  # type: ignore[arg-type]
    assert found == pytest.approx(20 * np.log10(25.5), rel=1e-9)


# ------------------------------------------------------------------------------------------------ the whole


@pytest.mark.usefixtures("half_held_out")
def test_the_report_of_a_model(config: Evaluation) -> None:
    config = replace(config, samplers=("ddim", "DPM++ 2M Karras", "heun"), sampler_steps=(2, 3), sampler_pictures=2, batch=2)
    report = evaluate(config)
    assert list(report.numbers) == [name for name in MEANINGS if name in report.numbers]
    assert set(report.numbers) == set(MEANINGS)
    assert all(np.isfinite(value) for value in report.numbers.values())
    assert report.numbers["top5"] >= report.numbers["top1"] >= 0
    assert [(r["sampler"], r["spacing"], r["steps"], r["evaluations"], r["pictures"]) for r in report.samplers] == [
        ("ddim", "trailing", 2, 2, 2), ("ddim", "trailing", 3, 3, 2),
        ("DPM++ 2M Karras", "karras", 2, 2, 2), ("DPM++ 2M Karras", "karras", 3, 3, 2),
        ("heun", "trailing", 2, 3, 2), ("heun", "trailing", 3, 5, 2),
    ]  # fmt: skip

    written = json.loads((config.out / "evaluation.json").read_text())
    assert written["numbers"] == dict(report.numbers)
    assert written["samplers"] == list(report.samplers)
    expected = {"steps": 2, "sampler": "ddim", "guidance": 7.5, "seed": 0, "prompts": 3, "device": "cpu", "dtype": "float32"}
    assert expected.items() <= written["settings"].items()
    table = (config.out / "evaluation.md").read_text()
    assert table == report.markdown()
    for name, meaning in MEANINGS.items():
        assert f"| {name} | {report.numbers[name]:.4g} | {meaning} |" in table
    assert "| sampler | grid | evaluations | FID 2 | FID 3 | CLIP 2 | CLIP 3 |" in table
    assert Image.open(config.out / "pictures.png").width == 3 * 32

    assert not (config.out / "unfinished.json").exists()

    again = evaluate(replace(config, samplers=()))
    first, second = ({k: v for k, v in r.numbers.items() if k != "seconds"} for r in (report, again))
    assert first == second


def test_a_folder_of_pictures_is_enough(config: Evaluation, captioned: Path) -> None:
    report = evaluate(replace(config, data=captioned))
    assert set(MEANINGS) - set(report.numbers) == {"fid_floor", "kid_floor"}


@pytest.mark.usefixtures("half_held_out")
def test_pictures_come_from_the_configured_settings(config: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(pipe: Any, prompts: Any, config: Evaluation, what: str, **options: Any) -> Any:
        asked.append((what, len(prompts), options))
        return real(pipe, prompts, config, what, **options)

    real = module.generate
    monkeypatch.setattr(module, "generate", generate)
    module.show(replace(config, sampler="euler", guidance=2.0, seed=5))
    assert asked == [("zero-shot", 3, {}), ("FID", 4, {})]
    recipe = json.loads((config.out / "evaluation.json").read_text())["settings"]
    assert (recipe["sampler"], recipe["guidance"], recipe["seed"]) == ("euler", 2.0, 5)


def test_a_picture_does_not_depend_on_how_many_there_are(tiny_pipe: Any, config: Evaluation) -> None:
    prompts = ["a cat", "a dog", "a star", "a house", "an apple"]
    whole, seconds = module.generate(tiny_pipe, prompts, replace(config, batch=5), "")
    parts, _ = module.generate(tiny_pipe, prompts, replace(config, batch=2), "")
    ones = [tiny_pipe(prompt, seed=k, steps=2, progress=False)[0] for k, prompt in enumerate(prompts)]
    for many in (whole, parts):  # other batches round otherwise, no more
        assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(many, ones, strict=True))
    assert seconds > 0


@pytest.mark.usefixtures("half_held_out")
def test_a_measurement_that_was_stopped_goes_on_and_no_rule_is_measured_twice(
    config: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its fourth part: the second run makes what is missing, and reports what an undisturbed one does."""
    asked, patience = [], [3]

    def generate(pipe: Any, prompts: Any, config: Evaluation, what: str, **options: Any) -> Any:
        if len(asked) == patience[0]:
            raise KeyboardInterrupt
        asked.append(what)
        return real(pipe, prompts, config, what, **options)

    real = module.generate
    monkeypatch.setattr(module, "generate", generate)
    config = replace(config, samplers=("ddim", "euler", "Euler Karras"), sampler_steps=(1, 2), sampler_pictures=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config)
    assert asked == ["zero-shot", "FID", "ddim, 1 steps"]
    patience[0] = 100
    report = evaluate(config)
    assert asked[3:] == ["ddim, 2 steps", "Euler Karras, 1 steps", "Euler Karras, 2 steps"]
    assert [row["sampler"] for row in report.samplers] == ["ddim"] * 2 + ["euler"] * 2 + ["Euler Karras"] * 2
    assert [{**row, "sampler": ""} for row in report.samplers[:2]] == [{**row, "sampler": ""} for row in report.samplers[2:4]]

    whole = evaluate(config)
    assert len(asked) == 6 + 6
    assert {**whole.numbers, "seconds": 0} == {**report.numbers, "seconds": 0}
    assert whole.settings == report.settings


def test_parts_of_another_question_count_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a" / "unfinished.json"
    assert Kept(path, {"n": 1})("part", lambda: {"x": 0.1}) == {"x": 0.1}
    assert Kept(path, {"n": 1})("part", lambda: 2) == {"x": 0.1}
    assert Kept(path, {"n": 2})("part", lambda: 2) == 2
    path.write_text("{")
    assert Kept(path, {"n": 2})("part", lambda: 3) == 3
    Kept(path, {"n": 2}).done()
    assert not path.exists()


def test_another_vae_other_habits_or_other_pictures_are_another_question(config: Evaluation, tiny_pipe: Any) -> None:
    whole = replace(config, samplers=("heun",), samplers_alone=True, out=Path("x"))
    exam = Exam(prompts=["a"], names=["a", "b"], captions=["b"], held_out=plain("a red thing"))
    asked = module.question(config, tiny_pipe, exam)
    assert module.question(whole, tiny_pipe, exam) == asked
    for change in ({"prompts": ["b"]}, {"names": ["a", "b", "c"]}, {"captions": ["a"]}, {"held_out": plain("a grey thing")}):
        assert module.question(config, tiny_pipe, replace(exam, **change)) != asked
    sampling = replace(tiny_pipe.spec.sampling, guidance=2.0)
    assert module.question(config, replace(tiny_pipe, spec=replace(tiny_pipe.spec, sampling=sampling)), exam) != asked
    vae = copy.deepcopy(tiny_pipe.vae)
    with torch.no_grad():
        next(vae.parameters()).add_(1)
    assert module.question(config, replace(tiny_pipe, vae=vae), exam) != asked


def test_a_fingerprint_tells_weights_apart() -> None:
    a, b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).bfloat16()
    assert fingerprint(a) == fingerprint(a) != fingerprint(b)
    assert len({fingerprint(a), fingerprint(a, b), fingerprint(b, a)}) == 3
    before = fingerprint(b)
    with torch.no_grad():
        b.bias[0] += 1
    assert fingerprint(b) != before


def test_all_samplers_by_one_word(config: Evaluation) -> None:
    assert replace(config, samplers=("all",)).compared == tuple(SAMPLERS)
    assert replace(config, samplers=("ddim", "euler a")).compared == ("ddim", "euler a")
    assert replace(config, samplers=("all", "lms", "lms karras")).compared == (*SAMPLERS, "lms karras")


def test_the_table_of_samplers_has_a_row_for_each_rule_and_grid() -> None:
    def row(sampler: str, spacing: str, steps: int, fid: float, clip_score: float, evaluations: int) -> dict[str, Any]:
        rule = {"euler": "ddim", "DPM++ 2M Karras": "dpmpp_2m"}.get(sampler, sampler)
        found = {"sampler": sampler, "rule": rule, "spacing": spacing, "steps": steps, "fid": fid, "clip_score": clip_score}
        return found | {"evaluations": evaluations, "pictures": 64}

    rows = [row("ddim", "trailing", 5, 30.26, 60.0, 5), row("ddim", "trailing", 10, 20.0, 62.04, 10)]
    rows += [row("euler", "trailing", 5, 30.26, 60.0, 5), row("euler", "trailing", 10, 20.0, 62.04, 10)]
    rows += [row("DPM++ 2M Karras", "karras", 5, 40.0, 61.0, 5), row("DPM++ 2M Karras", "karras", 10, 18.0, 61.9, 10)]
    rows += [row("dpmpp_2m", "trailing", 5, 25.0, 59.0, 5), row("dpmpp_2m", "trailing", 10, 18.04, 58.0, 10)]
    note, blank, *table = module.sampler_table(rows)
    assert "of 64 pictures a cell" in note
    assert not blank
    assert table == [
        "| sampler | grid | evaluations | FID 5 | FID 10 | CLIP 5 | CLIP 10 |",
        "| --- | --- | --: | --: | --: | --: | --: |",
        "| ddim, euler | trailing | 5, 10 | 30.3 | 20.0 | 60.0 | **62.0** |",
        "| dpmpp_2m | karras | 5, 10 | 40.0 | **18.0** | **61.0** | 61.9 |",
        "| dpmpp_2m | trailing | 5, 10 | **25.0** | **18.0** | 59.0 | 58.0 |",
    ]


@pytest.mark.parametrize("name", SAMPLERS)
def test_evaluations_are_counted_as_the_pipeline_makes_them(name: str, tiny_pipe: Any) -> None:
    called: list[int] = []
    hook = tiny_pipe.unet.register_forward_pre_hook(lambda module, args: called.append(len(args[0])))
    try:
        for spacing in ("trailing", [14.0, 9.0, 6.0, 3.0, 1.0, 0.0]):
            called.clear()
            tiny_pipe("a cat", sampler=name, steps=5, spacing=spacing, guidance=1, progress=False)
            assert module.evaluations(tiny_pipe, {"sampler": name, "steps": 5, "spacing": spacing}) == len(called)
    finally:
        hook.remove()


@pytest.mark.usefixtures("half_held_out")
def test_samplers_alone(config: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is measured, and each number is that of the whole measurement."""
    config = replace(config, samplers=("ddim", "heun"), sampler_steps=(1, 2), sampler_pictures=2, guidance=3.0)
    whole = evaluate(config)
    for name in ("zero_shot", "distances", "vae_psnr"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("measured something else"))
    alone = evaluate(replace(config, samplers_alone=True))
    assert alone.numbers == {}
    assert [{**row, "seconds": 0} for row in alone.samplers] == [{**row, "seconds": 0} for row in whole.samplers]
    assert (alone.settings["guidance"], alone.settings["seed"]) == (3.0, 0)
    text = (config.out / "evaluation.md").read_text()
    assert "| measure |" not in text
    assert "| heun | trailing | 1, 3 |" in text


def test_what_nothing_can_be_compared_with_is_refused_before_anything_is_drawn(config: Evaluation, captioned: Path) -> None:
    """A folder with one picture, and drawings one of which was held out."""
    for picture in sorted(captioned.glob("*.png"))[1:]:
        picture.unlink()
    for data in (captioned, config.data):
        with pytest.raises(ValueError, match=f"data must hold at least 2 held-out pictures, got 1 in {data}"):
            evaluate(replace(config, data=data))
    assert not config.out.exists()


def test_a_model_without_a_clip_needs_a_judge(config: Evaluation, tiny_folder: Path, captioned: Path) -> None:
    with pytest.raises(ValueError, match=r"judge must be named: .* has no CLIP of its own"):
        evaluate(replace(config, model=str(tiny_folder), data=captioned))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": 0}, ValueError, "prompts must be at least 1, got 0"),
        ({"pictures": 1}, ValueError, "pictures must be at least 2, got 1"),
        ({"sampler_pictures": 1}, ValueError, "sampler_pictures must be at least 2, got 1"),
        ({"data": Path("nowhere")}, FileNotFoundError, "data: nowhere does not exist"),
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"out": Path(__file__)}, NotADirectoryError, "out must be a folder, got .*test_evaluate.py"),
        ({"judge": "ViT-B-32"}, ValueError, "judge must be NAME=FILE, .* got 'ViT-B-32'"),
        ({"samplers": ("ddim", "ddmi")}, ValueError, "sampler must be one of .* got 'ddmi'"),
        ({"samplers_alone": True}, ValueError, "samplers must be named, or all"),
        ({"sampler_steps": ()}, ValueError, r"sampler_steps must be numbers from 1 to 1000, got \[\]"),
        ({"sampler_steps": (5, 0)}, ValueError, r"got \[5, 0\]"),
        ({"sampler_steps": (5, 5000)}, ValueError, r"got \[5, 5000\]"),
        ({"steps": 0}, ValueError, "steps must be from 1 to 1000, got 0"),
        ({"sampler": "ddmi"}, ValueError, "sampler must be one of .* got 'ddmi'"),
    ],
)
def test_bad_values_are_refused_by_name(config: Evaluation, changes: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        replace(config, **changes)
