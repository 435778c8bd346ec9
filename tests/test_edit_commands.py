"""The ways to edit from a shell: the command, the script, and the comparison of methods."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import latentdiff
from latentdiff import cli
from latentdiff import images as I
from latentdiff.evaluation.clip_score import ClipScorer
from latentdiff.pipeline import Pipeline
from latentdiff.training.drawings import BACKGROUNDS, Drawings

SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def photo(width=40, height=32) -> Image.Image:
    small = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a picture and a mask."""
    tmp_path = tmp_path / "folder"
    tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)
    photo().save("photo.png")
    mask = Image.new("L", (40, 32), 0)
    ImageDraw.Draw(mask).rectangle((4, 4, 19, 19), fill=255)
    mask.save("mask.png")
    return tmp_path


def run(*tokens) -> int:
    with pytest.raises(SystemExit) as exit:
        cli.main(["edit", *map(str, tokens)])
    return exit.value.code


def equal(path, image: Image.Image) -> bool:
    return np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


# ------------------------------------------------------------------------------------------------------------- the command


def test_the_command_edits_by_words(folder, tiny_folder, tiny_pipe, capsys):
    common = ("-m", tiny_folder, "--dtype", "float32", "--device", "cpu", "--steps", 3, "--seed", 5, "-q")
    asked = ("photo.png", "--from", "a cat", "--to", "a red dog", "--region", "cat", "dog", "--cross", 0.5, "--self-attention", 0.2)
    assert run(*asked, "--words", "refine", "--sheet", "sheet.png", "-o", "out.png", *common) == 0
    assert capsys.readouterr().out == "out.png  seed 5\n"
    wanted = tiny_pipe.edit(
        photo(), source="a cat", target="a red dog", region=["cat", "dog"], cross=0.5, self_attention=0.2, words="refine", steps=3,
        seed=5, progress=False,
    )  # fmt: skip
    assert equal("out.png", wanted[0])
    assert equal("sheet.png", wanted.sheet())


def test_without_from_the_command_inpaints(folder, tiny_folder, tiny_pipe):
    common = ("-m", tiny_folder, "--dtype", "float32", "--device", "cpu", "--steps", 3, "--seed", 5, "-q", "-o", "out.png")
    assert run("photo.png", "--to", "a dog", "--mask", "mask.png", "--padding", 4, "--blur", 2, *common) == 0
    mask = Image.open("mask.png")
    assert equal("out.png", tiny_pipe("a dog", image=photo(), mask=mask, padding=4, blur=2, steps=3, seed=5, progress=False)[0])
    assert run("photo.png", "--to", "a dog", "--expand", 1, 2, 3, 4, "--sheet", "sheet.png", *common) == 0
    assert Image.open("out.png").size == (44, 38)
    difference = Image.open("sheet.png").crop((88, 0, 132, 38))
    assert difference.crop((1, 2, 41, 34)).getbbox() is None  # the picture lies where it lay
    assert difference.getbbox() is not None


@pytest.mark.parametrize(
    "made",
    [("--from", "a cat", "--to", "a red dog", "--region", "cat"), ("--to", "a dog", "--expand", 1, 2, 3, 4),
     ("--from", "a cat", "--to", "a dog", "--method", "img2img")],
)  # fmt: skip
def test_a_recipe_makes_the_edit_again(folder, tiny_folder, made):
    common = ("photo.png", "-m", tiny_folder, "--dtype", "float32", "--device", "cpu", "-q")
    assert run(*made, "--steps", 2, "-o", "a.png", *common) == 0
    assert run("--recipe", "a.png", "-o", "b.png", *common) == 0
    assert equal("b.png", Image.open("a.png"))
    assert I.read_recipe("b.png") == I.read_recipe("a.png")
    assert run("--recipe", "a.png", "--to", "a house", "-o", "c.png", *common) == 0
    recipe = I.read_recipe("a.png")
    assert I.read_recipe("c.png") == recipe | {"target" if "method" in recipe else "prompt": "a house"}
    for method in ("ddim", "img2img") if "method" in recipe else ():
        assert run("--recipe", "a.png", "--method", method, "-o", "d.png", *common) == 0
        assert I.read_recipe("d.png")["method"] == method


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (("photo.png", "--to", "a dog", "--region", "dog"), ["region", "--from"]),
        (("photo.png", "--from", "a cat", "--to", "a dog", "--padding", 3), ["padding", "--from"]),
        (("--to", "a dog"), ["photos"]),
        (("none.png", "--to", "a dog"), ["none.png"]),
        (("photo.png", "--to", "a dog", "--strength", 2), ["strength", "from 0 to 1"]),
        (("photo.png", "--from", "a cat", "--to", "a dog", "--region", "cow"), ["region", "cow"]),
        (("photo.png", "--to", "a dog", "-o", "a.txt"), [".png"]),
        (("photo.png",), ["to must be"]),
        (("photo.png", "--to", "a dog", "-o", "photo.png"), ["path must be another file", "photo.png"]),
        (("photo.png", "--to", "a dog", "--mask", "mask.png", "-o", "mask.png"), ["path must be another file", "mask.png"]),
        (("photo.png", "--to", "a dog", "-o", "a.png", "--sheet", "photo.png"), ["path must be another file", "photo.png"]),
        (("photo.png", "--to", "a dog", "-o", "a.png", "--sheet", "a.png"), ["sheet must be another file than out", "a.png"]),
        (("photo.png", "--to", "a dog", "-o", "a.png", "--sheet", "../folder/a.png"), ["sheet must be another file than out"]),
        (("photo.png", "--to", "a dog", "--sheet", "s.gif"), [".png", "s.gif"]),
        (("photo.png", "--to", "a dog", "--sheet", "photo.png/s.png"), ["folder that can be written to", "photo.png"]),
        (("photo.png", "--to", "a dog", "-o", "photo.png/new/"), ["folder that can be written to", "photo.png/new"]),
        (("photo.png", "--recipe", "plain.png"), ["recipe", "plain.png", "text alone", "latentdiff generate --recipe"]),
        (("photo.png", "--from", "a cat", "--recipe", "img2img.png"), ["recipe", "with --from", "img2img.png", "sampler"]),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(folder, tiny_folder, capsys, monkeypatch, tokens, words):
    recipe = "a dog\nSteps: 2, Sampler: ddim, Seed: 1"
    for name, text in {"plain.png": recipe, "img2img.png": f"{recipe}, Photo: 0"}.items():
        picture = photo()
        picture.info["parameters"] = text
        I.save_image(picture, Path(name))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(Pipeline, "run", lambda *_: pytest.fail("computed"))
    assert run(*tokens, "-m", tiny_folder, "--device", "cpu", "-q") == 2
    *said, line = capsys.readouterr().err.splitlines()
    assert all(s.startswith("latentdiff: recipe of ") for s in said)
    assert all(word in line for word in words), line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# -------------------------------------------------------------------------------------------------------------- the scripts


def test_the_script_writes_the_edit_and_its_sheet(folder, tiny_folder, capsys):
    script("edit_image").main(Path("photo.png"), source="a cat", target="a dog", model=str(tiny_folder), out=Path("new.png"))
    recipe = I.read_recipe("new.png")
    assert {k: recipe[k] for k in ("source", "target", "method", "seed")} == {
        "source": "a cat", "target": "a dog", "method": "prompt-to-prompt", "seed": 0,
    }  # fmt: skip
    assert Image.open("new-sheet.png").width == 120
    assert "rebuilt with" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["results/", "x.gif", "photo.png", "mask.png"])
def test_the_script_refuses_what_it_cannot_write_before_it_edits(folder, monkeypatch, out):
    module = script("edit_image")
    monkeypatch.setattr(module.latentdiff, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=f"path must .*{Path(out)}"):
        module.main(Path("photo.png"), source="a cat", target="a dog", out=Path(out), mask=Path("mask.png"))


def test_the_sheet_of_edits_has_a_row_of_each_kind(tiny_folder, tmp_path):
    """Its first row is made again by hand; its last, a masked one, leaves the rest to the last bit."""
    module = script("edit_sheet")
    kinds = [edit.kind for edit in module.EDITS]
    assert len(kinds) >= 8
    assert set(kinds) >= {"animal", "colour", "style", "adding", "removing", "inpainting"}
    with pytest.raises(ValueError, match=f"only must be an integer from 1 to {len(kinds)}, got 0"):
        module.main(out=tmp_path / "sheet.png", model=str(tiny_folder), steps=1, only=[1, 0])
    module.main(out=tmp_path / "sheet.png", model=str(tiny_folder), seed=3, strength=0.5, steps=2, only=[1, len(kinds)])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    first, box = module.EDITS[0], module.EDITS[-1].box
    pipe, common = latentdiff.load(tiny_folder), {"seed": 3, "steps": 2, "progress": False}
    before = pipe(first.source, **common)[0]
    after = pipe.edit(before, source=first.source, target=first.target, strength=0.5, **common)[0]
    assert np.array_equal(sheet[:32, :64], np.hstack([before, after]))
    assert box == (0.0, 0.1, 1.0, 0.55)
    difference = sheet[len(sheet) // 2 :][:32, 64:]
    assert not difference[:3].any()
    assert not difference[18:].any()
    assert difference[3:18].any()


@pytest.fixture
def compare(drawings_folder, monkeypatch):
    """The script, with more of the tiny data set held out and a judge that likes bright pictures."""
    module = script("compare_edits")

    def images(batch):
        return torch.tensor([[np.asarray(image).mean(), 50.0] for image in batch])

    judge = ClipScorer("fake", lambda texts: torch.ones(len(texts), 2), images)
    monkeypatch.setattr(module, "Drawings", lambda path: Drawings(path, held_out=0.6))
    monkeypatch.setattr(module.ClipScorer, "from_folder", lambda *_: judge)
    return module


def test_tasks_say_what_must_stay(compare, drawings_folder):
    todo = compare.tasks(compare.Drawings(drawings_folder), 6, 32, 1)
    assert [t.kind for t in todo] == ["swap", "remove", "background"] * 2
    for t in todo:
        assert t.source != t.target
        assert 0 < t.kept.sum() < 32 * 32
    swap, remove, background = todo[:3]
    assert remove.source.startswith(f"{remove.target} and ")
    assert swap.source.split(" and ")[0] == swap.target.split(" and ")[0]
    assert swap.kept[:, :16].all()
    corner = background.picture.getpixel((0, 0))
    assert corner == BACKGROUNDS[background.source.partition(" on a ")[2].removesuffix(" background")]
    assert not background.kept[0, 0]
    assert background.kept[16, 16]


def test_what_changes_inside_the_edit_does_not_count(compare, tiny_pipe):
    where = np.zeros((32, 32), bool)
    where[:, :16] = True
    a, inside, outside = (photo(32, 32) for _ in range(3))
    inside.paste((255, 0, 0), (24, 8, 32, 24))
    outside.paste((255, 0, 0), (0, 8, 8, 24))
    assert compare.psnr_where(a, inside, where) > 70 > 20 > compare.psnr_where(a, outside, where)
    assert compare.distance_where(tiny_pipe, a, a, where) == 0
    assert compare.distance_where(tiny_pipe, a, inside, where) < 0.5 * compare.distance_where(tiny_pipe, a, outside, where)


def test_a_point_is_compared_with_the_curve_at_its_own_score(compare):
    curve = [compare.Point("img2img", {}, clip, psnr, 0.0) for clip, psnr in ((20.0, 30.0), (24.0, 20.0))]
    assert compare.above(compare.Point("ddim", {}, 22.0, 28.0, 0.0), curve) == pytest.approx(3.0)
    assert compare.above(compare.Point("ddim", {}, 25.0, 28.0, 0.0), curve) == pytest.approx(8.0)
    assert compare.above(compare.Point("ddim", {}, 19.0, 28.0, 0.0), curve) is None
    worse = compare.Point("img2img", {}, 23.9, 5.0, 0.0)  # as where too strong a setting loses both
    assert compare.above(compare.Point("ddim", {}, 22.0, 28.0, 0.0), [*curve, worse]) == pytest.approx(3.0)


def test_the_comparison_writes_table_numbers_plot_and_sheet(compare, drawings_folder, tiny_folder, tmp_path, monkeypatch):
    """Stopped in its second method, it goes on there; nothing of the unfinished run stays."""
    pytest.importorskip("matplotlib")
    runs = {"img2img": [{"strength": 0.3}, {"strength": 0.9}], "edit-friendly": [{"strength": 0.5, "steps": 1}]}
    monkeypatch.setattr(compare, "RUNS", runs)
    monkeypatch.setattr(compare, "REBUILT", {"ddim": 1.0})
    monkeypatch.setattr(compare, "REBUILT_STEPS", 3)
    monkeypatch.setattr(compare, "TOGETHER", 2)
    options, out = {"model": str(tiny_folder), "n": 3, "steps": 2, "rebuild": 2, "workers": 2}, tmp_path / "c"
    made, most, edit = [], [5], Pipeline.edit

    def interrupted(pipe, *args, **kwargs):
        if len(made) == most[0]:
            raise KeyboardInterrupt
        made.append(kwargs["seed"])
        return edit(pipe, *args, **kwargs)

    monkeypatch.setattr(Pipeline, "edit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare.main(drawings_folder, out=out, **options | {"workers": 1})
    (half_done,) = out.glob("unfinished-*")
    pictures = {path.relative_to(half_done).as_posix(): path.read_bytes() for path in half_done.glob("*/*.png")}
    assert set(pictures) == {
        *(f"img2img-0.{s}/{k}.png" for s in (3, 9) for k in range(3)),
        *(f"edit-friendly-0.5-1/{k}.png" for k in range(2)),
    }

    most[0] = 100
    compare.main(drawings_folder, out=out, **options)
    assert made[:5] == [0, 2, 0, 2, 0]  # two and one of each point, and two of the next
    assert sorted(made[5:]) == [0, 1, 2]  # its third, and two rebuilt
    found = json.loads((out / "comparison.json").read_text())
    points, (rebuilt,) = found["points"], found["rebuilt"]
    assert [p["method"] for p in points] == ["nothing", "img2img", "img2img", "edit-friendly"]
    assert all(np.isfinite([p["clip"], p["psnr"], p["distance"]]).all() for p in points)
    assert (rebuilt["pictures"], rebuilt["steps"]) == (2, 3)
    assert rebuilt["lost"] >= rebuilt["limit"] - rebuilt["rebuilt"]
    assert (out / "comparison.md").read_text().count("\n") == 6 + 4
    assert Image.open(out / "comparison.png").width > 800
    assert Image.open(out / "sheet.png").width == 3 * 32
    assert not list(out.glob("unfinished-*"))


def test_the_comparison_looks_for_matplotlib_before_it_edits(compare, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(compare.latentdiff, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ImportError, match="matplotlib"):
        compare.main(Path("none"))


def test_edits_made_together_are_those_made_alone(compare, drawings_folder, tiny_pipe, tmp_path):
    todo = compare.tasks(compare.Drawings(drawings_folder), 3, 32, 0)
    settings = {"strength": 0.7, "steps": 3, "guidance": None}
    together = compare.edited(tiny_pipe, todo, "edit-friendly", settings, 5, tmp_path, 2)
    for k, (t, image) in enumerate(zip(todo, together, strict=True)):
        asked = settings | {"method": "edit-friendly", "seed": 5 + k, "progress": False}
        alone = tiny_pipe.edit(t.picture, source=t.source, target=t.target, **asked)[0]
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 2


def test_no_worker_has_nothing_to_do(compare):
    assert [len(g) for g in compare.grouped(102, 2)] == [8] * 12 + [6]
    assert [len(g) for g in compare.grouped(6, 2)] == [3, 3]
    assert [k for g in compare.grouped(5, 2) for k in g] == [*range(5)]


def test_sharing_the_cores_leaves_later_threads_what_they_had(compare):
    threads = torch.get_num_threads()
    assert compare.each(lambda _: torch.get_num_threads(), range(4), 2, "cores") == [max(1, threads // 2)] * 4
    assert compare.each(lambda _: torch.get_num_threads(), range(1), 1, "cores") == [threads]
