"""scripts/build_dataset.py on three tiny packages of our own."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentdiff.training.data import FileSource

Packages = tuple[Path, tuple[Any, ...], Any]


@pytest.fixture(scope="module")
def english(builder: ModuleType) -> Any:
    return builder.read_words()[1]


def test_drawings_of_one_idea_share_a_concept(drawings_folder: Path) -> None:
    index = json.loads((drawings_folder / "index.json").read_text())
    found = {(r["style"], r["name"]): r["concept"] for r in index["drawings"]}
    assert found == {
        ("noto", "cat-face"): "cat face", ("noto", "cat"): "cat", ("noto", "dog-face"): "dog face",
        ("noto", "red-apple"): "red apple", ("noto", "automobile"): "automobile", ("noto", "right-arrow"): "right arrow",
        ("noto", "baby"): "baby", ("noto", "blue-heart"): "blue heart", ("noto", "one-oclock"): "one o'clock",
        ("fluent-emoji-flat", "cat-face"): "cat face", ("fluent-emoji-flat", "dog-face"): "dog face",
        ("fluent-emoji-flat", "red-apple"): "red apple", ("fluent-emoji-flat", "automobile"): "automobile",
        ("fluent-emoji-flat", "blue-heart"): "blue heart",
        ("fxemoji", "cat"): "cat face", ("fxemoji", "catside"): "cat", ("fxemoji", "dog"): "dog face",
        ("fxemoji", "redapple"): "red apple",
    }  # fmt: skip
    assert set(index["concepts"]) == set(found.values())


def test_words_of_a_concept(drawings_folder: Path) -> None:
    concepts = json.loads((drawings_folder / "index.json").read_text())["concepts"]
    assert concepts["cat face"]["phrases"] == ["a cat", "a cat face"]
    assert concepts["cat face"]["plurals"] == ["cats", "cat faces"]
    assert concepts["one o'clock"]["phrases"] == ["a clock showing one o'clock"]
    assert concepts["automobile"]["recolour"] == {"noun": "car", "plural": "cars", "is_plural": False}
    assert [concepts[c]["mirror"] for c in ("cat face", "automobile", "right arrow", "one o'clock")] == [True, True, False, False]
    assert concepts["red apple"]["sure"] == ["a red apple"]  # its label says so
    assert concepts["automobile"]["sure"] == []  # "a red car" is true of red ones only


def test_pictures_are_premultiplied_and_in_the_records_order(drawings_folder: Path) -> None:
    index = json.loads((drawings_folder / "index.json").read_text())
    pixels = np.load(drawings_folder / "drawings.npy")
    assert pixels.shape == (len(index["drawings"]), 40, 40, 4)
    assert pixels.dtype == np.uint8
    place = {(r["style"], r["name"]): i for i, r in enumerate(index["drawings"])}
    assert pixels[place["noto", "blue-heart"]][20, 20].tolist() == [0x30, 0x60, 0xE0, 255]
    assert pixels[place["noto", "blue-heart"]][0, 0].tolist() == [0, 0, 0, 0]
    half = pixels[place["fxemoji", "redapple"]][20, 20].astype(int)
    assert np.abs(half - [0xF0 / 2, 0x20 / 2, 0x30 / 2, 128]).max() <= 1


def test_licences_are_counted(drawings_folder: Path) -> None:
    rows = json.loads((drawings_folder / "licences.json").read_text())
    assert {r["name"]: r["drawings"] for r in rows} == {
        "@iconify-json/noto": 9, "@iconify-json/fluent-emoji-flat": 5, "@iconify-json/fxemoji": 4, "emojibase-data": 0,
    }  # fmt: skip
    assert all(r["licence"] == "MIT" and r["version"] == "9.9.9" for r in rows)
    assert "9 drawings by us (here), MIT" in (drawings_folder / "ATTRIBUTION.md").read_text()


@pytest.mark.parametrize(
    ("noun", "phrase", "plural"),
    [
        ("cat", "a cat", "cats"), ("owl", "an owl", "owls"), ("hourglass", "an hourglass", "hourglasses"),
        ("unicorn", "a unicorn", "unicorns"), ("SUV", "an SUV", "SUVs"), ("UFO", "a UFO", "UFOs"), ("mouse", "a mouse", "mice"),
        ("wolf face", "a wolf face", "wolf faces"), ("cup of tea", "a cup of tea", "cups of tea"), ("knife", "a knife", "knives"),
        ("strawberry", "a strawberry", "strawberries"), ("box of popcorn", "a box of popcorn", "boxes of popcorn"),
        ("bus", "a bus", "buses"),
        ("person lifting weights", "a person lifting weights", "people lifting weights"), ("ring", "a ring", "rings"),
        ("snowman", "a snowman", "snowmen"), ("tomato", "a tomato", "tomatoes"), ("rhinoceros", "a rhinoceros", "rhinoceroses"),
        ("grapes", "grapes", None), ("french fries", "french fries", None), ("people wrestling", "people wrestling", None),
        ("bread", "bread", None), ("sun", "the sun", None), ("Santa Claus", "Santa Claus", None), ("broccoli", "broccoli", None),
        ("woman dancing", "a woman dancing", None),
    ],
)  # fmt: skip
def test_articles_and_plurals(english: Any, noun: str, phrase: str, plural: str | None) -> None:
    assert english.phrase(noun) == phrase
    assert english.plural(noun) == plural


@pytest.mark.parametrize(
    ("label", "said"),
    [("person: blond hair", "person with blond hair"), ("man: beard", "man with a beard"), ("woman: bald", "bald woman"),
     ("man walking: facing right", "man walking facing right"), ("cat face", "cat face")],
)  # fmt: skip
def test_labels_are_made_readable(builder: ModuleType, label: str, said: str) -> None:
    assert builder.readable(label) == said


@pytest.mark.parametrize(
    ("rgb", "name"),
    [((224, 32, 32), "red"), ((250, 140, 20), "orange"), ((250, 210, 40), "yellow"), ((40, 160, 60), "green"),
     ((40, 100, 220), "blue"), ((140, 60, 190), "purple"), ((250, 150, 190), "pink"), ((120, 70, 40), "brown"),
     ((128, 128, 128), None), ((245, 245, 250), None)],
)  # fmt: skip
def test_a_strong_hue_is_found_and_named(builder: ModuleType, rgb: tuple[int, int, int], name: str | None) -> None:
    rgba = np.zeros((40, 40, 4), np.uint8)
    rgba[5:35, 5:35] = (*rgb, 255)
    seen = builder.look(rgba)
    assert seen["mean"] == list(rgb)
    assert seen["colour"] == name
    assert (seen["hue"] is None) == (name is None)


def test_the_word_list_is_consistent(builder: ModuleType) -> None:
    words, english = builder.read_words()
    styles = [package.style for package in builder.PACKAGES]
    assert list(words["styles"]) == styles
    assert set(words["icon_names"]) <= set(styles)
    assert all(name.split(":")[0] in styles for name in words["left_out"])
    assert len(words["everyday"]) > 400
    assert not set(words["nouns"]) & set(words["everyday"])  # everyday ideas name their nouns themselves
    assert all(len(nouns) == 1 and english.phrase(nouns[0]) for nouns in words["recolour"].values())
    assert not any("openmoji" in package.name for package in builder.PACKAGES)  # share-alike


def test_a_changed_package_is_refused(builder: ModuleType, packages: Packages, tmp_path: Path) -> None:
    folder, (package, *_), _ = packages
    shutil.copy(folder / package.tarball, tmp_path)
    assert builder.fetch(package, tmp_path) == tmp_path / package.tarball
    (tmp_path / package.tarball).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"has sha256 .*, expected"):
        builder.fetch(package, tmp_path)


def test_npm_that_fails_or_is_missing_is_named(builder: ModuleType, packages: Packages, tmp_path: Path, monkeypatch: Any) -> None:
    package = packages[1][0]
    failed = subprocess.CompletedProcess([], 1, "", "npm error 404")
    monkeypatch.setattr(builder.shutil, "which", lambda name: "/usr/bin/npm")
    monkeypatch.setattr(builder.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match=r"npm could not pack @iconify-json/noto@9.9.9:\nnpm error 404"):
        builder.fetch(package, tmp_path)
    monkeypatch.setattr(builder.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="npm is not installed"):
        builder.fetch(package, tmp_path)


def test_a_build_that_fails_leaves_nothing(builder: ModuleType, packages: Packages, tmp_path: Path, monkeypatch: Any) -> None:
    folder, icon_packages, base = packages
    monkeypatch.setattr(builder, "PACKAGES", icon_packages)
    monkeypatch.setattr(builder, "EMOJIBASE", base)
    monkeypatch.setattr(builder, "look", lambda rgba: 1 / 0)
    pytest.importorskip("resvg_py")
    with pytest.raises(ZeroDivisionError):
        builder.main([str(tmp_path / "data"), "--size", "16", "--packages", str(folder)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--size", "0"], "--size is 0, must be from 16 to 2048"), (["--pictures", "3"], "--pictures and --to go together"),
     (["--picture-size", "1"], "--picture-size is 1, must be from 16"), (["--size", "x"], "invalid int value")],
)  # fmt: skip
def test_bad_arguments(builder: ModuleType, tmp_path: Path, capsys: Any, arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit):
        builder.main([str(tmp_path / "data"), *arguments])
    assert said in capsys.readouterr().err


def test_a_folder_of_something_else_is_not_touched(builder: ModuleType, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(SystemExit):
        builder.main([str(tmp_path)])
    assert "is no built data set" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "important"


def test_pictures_are_written_with_captions_and_licences(builder: ModuleType, drawings_folder: Path, tmp_path: Path) -> None:
    for to in ("pictures", "pictures.tar"):
        builder.main([str(drawings_folder), "--pictures", "6", "--picture-size", "48", "--to", str(tmp_path / to), "--seed", "3"])
    folder, tar = FileSource.folder(tmp_path / "pictures", 48), FileSource.tar(tmp_path / "pictures.tar", 48)
    assert len(folder) == len(tar) == 6
    for i in range(6):
        about = json.loads((tmp_path / "pictures" / f"{i:08d}.json").read_text())
        image, caption = folder.get(i, 0)
        assert caption == about["caption"]
        assert set(about["licences"]) <= {f"MIT (@iconify-json/{s} 9.9.9)" for s in ("noto", "fluent-emoji-flat", "fxemoji")}
        assert about["drawings"]
        png = np.asarray(Image.open(tmp_path / "pictures" / f"{i:08d}.png"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), png)
        assert np.array_equal(tar.get(i, 0)[0].numpy(), image.numpy())
        assert tar.get(i, 0)[1] == caption
    with tarfile.open(tmp_path / "pictures.tar") as archive:
        assert archive.getnames()[:3] == ["00000000.png", "00000000.txt", "00000000.json"]


def test_a_built_data_set_is_not_built_again(builder: ModuleType, drawings_folder: Path, capsys: Any) -> None:
    before = (drawings_folder / "drawings.npy").stat().st_mtime_ns
    builder.main([str(drawings_folder)])
    assert "is built already" in capsys.readouterr().err
    assert (drawings_folder / "drawings.npy").stat().st_mtime_ns == before
