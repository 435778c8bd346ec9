"""Training data: composing drawings, reading files, and the order of a run."""

import io
import json
import pickle
import struct
import tarfile
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from latentdiff import images
from latentdiff.training import data, drawings
from latentdiff.training.data import FileSource, batches, open_source, order, square_picture
from latentdiff.training.drawings import BACKGROUNDS, PAINTS, ComposeConfig, Drawings, DrawingSource, _painted, _paste

SIZE = 48
SINGLE = ComposeConfig(everyday=0, pair=0, several=0, triple=0, recolour=0, mirror=0, style=0)


@pytest.fixture(scope="module")
def tiny(drawings_folder: Path) -> Drawings:
    return Drawings(drawings_folder, held_out=0.4)


def by_name(d: Drawings, style: str, name: str) -> int:
    return next(i for i, r in enumerate(d.records) if (r["style"], r["name"]) == (style, name))


def composed(d: Drawings, config: ComposeConfig, n: int = 120) -> list[drawings.Picture]:
    source = DrawingSource(d, config, SIZE)
    return [source.compose(np.random.default_rng((7, k))) for k in range(n)]


# ------------------------------------------------------------------------------------------------ drawings


def test_held_out_drawings_are_drawn_by_another_hand_in_training(tiny: Drawings) -> None:
    assert tiny.held_out
    assert sorted(tiny.train + tiny.held_out) == list(range(len(tiny.records)))
    for i in tiny.held_out:
        others = [j for j in tiny.train if tiny.records[j]["concept"] == tiny.records[i]["concept"]]
        assert any(tiny.records[j]["style"] != tiny.records[i]["style"] for j in others)


def test_the_split_depends_on_the_names_alone(tiny: Drawings, drawings_folder: Path) -> None:
    again = Drawings(drawings_folder, held_out=0.4)
    assert again.held_out == tiny.held_out
    assert set(Drawings(drawings_folder, held_out=0.2).held_out) <= set(tiny.held_out)
    assert Drawings(drawings_folder, held_out=0).held_out == []
    assert drawings._fraction("@iconify-json/noto:cat") == 0xFE5780E5A91811B7 / 2**64  # sha256sum says so: for ever


def test_every_concept_has_a_prompt(tiny: Drawings) -> None:
    prompts = {concept: tiny.prompt(concept) for concept in tiny.concepts}
    assert prompts["cat face"] == "a cat"
    assert prompts["cat"] == "a standing cat"  # the whole animal: one prompt, one picture
    assert prompts["one o'clock"] == "a clock showing one o'clock"
    assert set(prompts) == {r["concept"] for r in tiny.records}


def test_paste_is_the_over_operator() -> None:
    rng = np.random.default_rng(0)
    alpha = rng.random((SIZE, SIZE, 1))
    rgba = np.concatenate([alpha * rng.random((SIZE, SIZE, 3)), alpha], -1)
    under = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    canvas, rgba8 = under.copy(), np.round(rgba * 255).astype(np.uint8)
    _paste(canvas, rgba8, 0.5, 0.5, 1)
    exact = rgba8[..., :3] + under * (1 - rgba8[..., 3:] / 255)
    assert np.abs(canvas - exact).max() <= 0.51


def test_paste_cuts_off_what_sticks_out() -> None:
    canvas = np.zeros((20, 20, 3), np.uint8)
    _paste(canvas, np.full((10, 10, 4), 255, np.uint8), 0, 1, 0.5)
    assert canvas[15:, :5].min() == 255
    assert canvas.sum() == 255 * 3 * 25


def test_plain_drawings_lie_in_the_middle_of_white(tiny: Drawings) -> None:
    image = tiny.plain(by_name(tiny, "noto", "blue-heart"), 64)
    assert image[32, 32].tolist() == [0x30, 0x60, 0xE0]
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    covered = np.argwhere((image < 255).any(-1))
    assert np.abs(covered.mean(0) - 31.5).max() < 0.5


def test_same_generator_same_picture(tiny: Drawings) -> None:
    for a, b in zip(composed(tiny, ComposeConfig()), composed(tiny, ComposeConfig()), strict=True):
        assert np.array_equal(a.image, b.image)
        assert (a.caption, a.drawings) == (b.caption, b.drawings)


def test_a_named_background_is_the_background(tiny: Drawings) -> None:
    named = Counter()
    for picture in composed(tiny, SINGLE, 300):
        if "background" in picture.caption:
            colour = picture.caption.split(" on a")[1].removeprefix("n").removesuffix(" background").strip()
            named[colour] += 1
            assert picture.image[0, 0].tolist() == list(BACKGROUNDS[colour])
    assert len(named) > 8


def test_a_drawing_can_be_seen_on_its_background(tiny: Drawings) -> None:
    for picture in composed(tiny, SINGLE, 300):
        middle, corner = picture.image[SIZE // 2, SIZE // 2].astype(float), picture.image[0, 0].astype(float)
        assert np.linalg.norm(middle - corner) > (drawings.CONTRAST / 2 if corner.min() == 255 else drawings.CONTRAST)


def test_half_of_the_backgrounds_are_white(tiny: Drawings) -> None:
    white = [bool((p.image[0, 0] == 255).all()) for p in composed(tiny, SINGLE, 400)]
    assert 0.4 < np.mean(white) < 0.6
    assert not any((p.image[0, 0] == 255).all() for p in composed(tiny, ComposeConfig(white=0, recolour=0), 60))


def test_the_colour_in_a_caption_is_in_the_picture(tiny: Drawings) -> None:
    """A blue automobile is never "a red car", and a painted one has the colour that the caption says."""
    source = DrawingSource(tiny, SINGLE, SIZE)
    blue = by_name(tiny, "fluent-emoji-flat", "automobile")
    captions = {source.compose(np.random.default_rng(k), blue).caption.split(" on ")[0] for k in range(60)}
    assert not any("red" in caption for caption in captions)
    painter = DrawingSource(tiny, ComposeConfig(everyday=0, pair=0, several=0, triple=0, recolour=1, mirror=0, style=0), SIZE)
    seen = set()
    for k in range(150):
        picture = painter.compose(np.random.default_rng(k), blue)
        paint = next(word for word in picture.caption.split() if word in PAINTS)
        rgb = picture.image[SIZE // 2, SIZE // 2]
        hue, sat, val = np.asarray(Image.fromarray(rgb[None, None]).convert("HSV"))[0, 0] / 255
        seen.add(paint)
        if PAINTS[paint][1] > 0.3:
            assert abs((hue - PAINTS[paint][0] / 360 + 0.5) % 1 - 0.5) < 0.02, picture.caption
        assert sat == pytest.approx(PAINTS[paint][1], abs=0.06), picture.caption
        assert val == pytest.approx(PAINTS[paint][2], abs=0.06), picture.caption
    assert seen == set(PAINTS)


def test_painting_keeps_other_hues_and_transparency() -> None:
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[0] = (200, 20, 20, 255)  # the hue to change
    rgba[1] = (20, 160, 60, 255)  # another
    rgba[2] = (100, 10, 10, 128)  # the first, half transparent
    painted = _painted(rgba, [0.0, 0.9, 0.78, 0.6], "blue")
    assert (painted[..., 3] == rgba[..., 3]).all()
    assert np.abs(painted[1].astype(int) - rgba[1]).max() <= 3
    assert painted[0, 0, 2] > 2 * painted[0, 0, 0]
    assert np.abs(painted[0, 0, :3] / 2 - painted[2, 0, :3].astype(int)).max() <= 3
    assert (painted[..., :3] <= painted[..., 3:]).all()


def test_above_and_left_are_where_they_say(tiny: Drawings) -> None:
    """Words for places hold: the first named drawing lies on the named side of the second."""
    config = ComposeConfig(everyday=1, pair=1, several=0, triple=0, recolour=0, mirror=0, white=1, style=0)
    axis = {" above ": (1, -1), " below ": (1, 1), " to the left of ": (0, -1), " to the right of ": (0, 1), " and ": (0, -1)}
    tested = Counter()
    for picture in composed(tiny, config, 200):
        first, second = (tiny.pixels[i][20, 20, :3].astype(int) for i in picture.drawings)
        relation = next((r for r in axis if r in picture.caption), None)
        if relation is None or np.abs(first - second).sum() < 60:
            continue
        places = []
        for colour in (first, second):
            near = np.abs(picture.image.astype(int) - colour).sum(-1) < 12
            places.append(np.argwhere(near).mean(0)[::-1])  # x, y
        dimension, sign = axis[relation]
        assert sign * (places[0] - places[1])[dimension] > SIZE / 4, picture.caption
        tested[relation] += 1
    assert len(tested) == len(axis)


def test_as_many_as_the_caption_counts(tiny: Drawings) -> None:
    config = ComposeConfig(everyday=1, pair=0, several=1, triple=0, recolour=0, style=0)
    counts = Counter()
    for picture in composed(tiny, config, 60):
        first = picture.caption.split()[0]
        expected = {"two": 2, "three": 3, "four": 4}.get(first, 1)
        assert len(picture.drawings) == expected
        counts[expected] += 1
    assert {2, 3, 4} <= set(counts)


def test_three_different_ideas(tiny: Drawings) -> None:
    config = ComposeConfig(everyday=1, pair=0, several=0, triple=1, recolour=0, style=0)
    for picture in composed(tiny, config, 30):
        assert len(picture.drawings) == 3
        names = picture.caption.split(" on ")[0].replace(" and ", ", ").split(", ")
        assert len(set(names)) == 3


def test_what_must_not_be_mirrored_is_not(tiny: Drawings) -> None:
    source = DrawingSource(tiny, ComposeConfig(everyday=0, pair=0, several=0, triple=0, mirror=1, offset=0), SIZE)
    arrow = by_name(tiny, "noto", "right-arrow")
    for k in range(20):
        blue = np.abs(source.compose(np.random.default_rng(k), arrow).image.astype(int) - [0x20, 0x60, 0xC0]).sum(-1) < 40
        columns = np.flatnonzero(blue.any(0))
        assert blue[:, columns[-3]].sum() < blue[:, columns[2]].sum()  # the tip is on the right still


def test_the_everyday_share(tiny: Drawings) -> None:
    never = DrawingSource(tiny, SINGLE, SIZE)
    arrow = by_name(tiny, "noto", "right-arrow")  # no everyday idea
    assert all(never.compose(np.random.default_rng(k), arrow).drawings == [arrow] for k in range(20))
    always = DrawingSource(tiny, ComposeConfig(everyday=1, pair=0, triple=0), SIZE)
    assert all(arrow not in always.compose(np.random.default_rng(k), arrow).drawings for k in range(60))


def test_training_never_shows_a_held_out_drawing(tiny: Drawings) -> None:
    shown = {i for picture in composed(tiny, ComposeConfig(pair=0.4, triple=0.2), 400) for i in picture.drawings}
    assert not shown & set(tiny.held_out)


def test_a_worker_maps_the_file_instead_of_copying_it(tiny: Drawings) -> None:
    copied = pickle.dumps(tiny)
    assert len(copied) < 1000
    assert pickle.loads(copied).held_out == tiny.held_out


def test_favourites_and_the_hand_that_draws_them_come_as_often_as_asked(tiny: Drawings) -> None:
    config = ComposeConfig(everyday=1, favourites=("cat face", "dog face"), favour=0.8, hand="noto", handed=0.9, pair=0, triple=0)
    shown = [tiny.records[picture.drawings[0]] for picture in composed(tiny, config, 1000)]
    favoured = [record for record in shown if record["concept"] in config.favourites]
    others = 2 / len(tiny.everyday)  # the favourites' share of what is drawn from all
    assert len(favoured) / 1000 == pytest.approx(0.8 + 0.2 * others, abs=0.05)
    by_noto = sum(record["style"] == "noto" for record in favoured) / len(favoured)
    hands = [[tiny.records[i]["style"] for i in tiny.hands[name]] for name in config.favourites]
    share = np.mean([0.9 * ("noto" in styles) + 0.1 * styles.count("noto") / len(styles) for styles in hands])
    assert by_noto == pytest.approx(share, abs=0.05)
    assert share > 0.4


def test_hands_other_than_the_chosen_one_are_named(tiny: Drawings) -> None:
    """So that a prompt that names none gets the chosen hand's."""
    config = ComposeConfig(everyday=0.5, hand="noto", handed=0.5, style=0)
    said = {True: 0, False: 0}
    for picture in composed(tiny, config, 300):
        style = tiny.records[picture.drawings[0]]["style"]
        named = picture.caption.endswith(tuple(f", {name}" for name in tiny.styles[style]))
        assert named == (style != "noto"), picture.caption
        said[named] += 1
    assert min(said.values()) > 30


def test_an_unknown_favourite_or_hand_is_refused(tiny: Drawings) -> None:
    with pytest.raises(ValueError, match="favourites must be concepts of the drawings, got 'unicorn'"):
        DrawingSource(tiny, ComposeConfig(favourites=("unicorn",)), SIZE)
    with pytest.raises(ValueError, match=r"hand must be one of .*noto.*, got 'rembrandt'"):
        DrawingSource(tiny, ComposeConfig(hand="rembrandt"), SIZE)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"everyday": 1.5}, "everyday is 1.5"), ({"pair": 0.6, "triple": 0.6}, r"pair \+ several \+ triple is"),
     ({"favour": 0.5}, "favour is 0.5, must be 0 without favourites"), ({"handed": 0.5}, "handed is 0.5, must be 0 without hand"),
     ({"scale": (0.9, 0.5)}, "scale is"), ({"offset": 1.0}, "offset is 1.0"),
     ({"mirror": -0.1}, "mirror is -0.1"), ({"white": float("nan")}, "white is nan")],
)  # fmt: skip
def test_bad_compose_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ComposeConfig(**options)


def test_missing_and_damaged_drawings(drawings_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"build them with scripts/build_dataset\.py"):
        Drawings(tmp_path)
    (tmp_path / "index.json").write_bytes((drawings_folder / "index.json").read_bytes())
    np.save(tmp_path / "drawings.npy", np.zeros((3, 4, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="is damaged: 3 pictures, 18 records"):
        Drawings(tmp_path)


# ------------------------------------------------------------------------------------------------ files


def png(colour: Any = "red", size: tuple[int, int] = (20, 20), mode: str = "RGB", form: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, form, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures in two folders, captions as text, JSON and a JSON list."""
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for i in range(20):
        name = root / ("more" if i % 2 else ".") / f"{i:02d}"
        name.with_suffix(".png").write_bytes(png((i * 10, 0, 0)))
        if i % 3 == 0:
            name.with_suffix(".txt").write_text(f"picture\n {i}\n")
        elif i % 3 == 1:
            name.with_suffix(".json").write_text(json.dumps({"caption": f"picture {i}"}))
        else:
            name.with_suffix(".json").write_text(json.dumps({"text": [f"picture {i}", f"image {i}"]}))
    return root


def to_tar(folder: Path, path: Path, mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for file in sorted(folder.rglob("*")):
            tar.add(file, file.relative_to(folder).as_posix(), recursive=False)
    return path


def test_every_picture_comes_with_its_own_caption(folder: Path) -> None:
    source = FileSource.folder(folder, 8)
    assert len(source) == 20
    found = {}
    for i in range(20):
        image, caption = source.get(i, seed=0)
        assert image.shape == (3, 8, 8)
        assert image.dtype == torch.uint8
        found[int(image[0, 0, 0]) // 10] = caption
    assert sorted(found) == list(range(20))
    assert all(caption in (f"picture {i}", f"image {i}") for i, caption in found.items())


def test_files_as_other_systems_write_them(folder: Path, tmp_path: Path) -> None:
    """A byte order mark before the text, names in capitals, and what macOS puts beside each file of a tar or a foreign disk."""
    wanted = sorted(FileSource.folder(folder, 8).get(i, 0)[1] for i in range(20))
    for file in [file for file in folder.rglob("*.*") if file.is_file()]:
        text = b"" if file.suffix == ".png" else b"\xef\xbb\xbf"
        file.with_name(file.name.upper()).write_bytes(text + file.read_bytes())
        file.with_name(f"._{file.name.upper()}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        file.unlink()
    for source in (FileSource.folder(folder, 8), FileSource.tar(to_tar(folder, tmp_path / "p.tar"), 8)):
        assert sorted(source.get(i, 0)[1] for i in range(len(source))) == wanted
        assert not source.bad


def test_pictures_without_a_caption_are_told_of(folder: Path, tmp_path: Path) -> None:
    for name in ("00.txt", "02.json"):
        (folder / name).unlink()
    for what in (folder, to_tar(folder, tmp_path / "p.tar")):
        said = f"{what}: leaving out 2 of 20 pictures, which have no .txt or .json caption of their name, such as 00.png"
        with pytest.warns(UserWarning, match=said):
            assert len(open_source(what, 8)) == 18


def test_what_is_hidden_is_none_of_it_and_what_is_linked_is(folder: Path, tmp_path: Path) -> None:
    more = tmp_path / "elsewhere"
    more.mkdir()
    (more / "a.jfif").write_bytes(png("red", form="jpeg"))
    (more / "a.txt").write_text("linked")
    for name in (".b", ".hidden/c", "in/.d/e"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(png())
        (folder / f"{name}.txt").write_text("hidden")
    (folder / "link").symlink_to(more)
    (more / "back").symlink_to(folder)
    (folder / "a-link-to-in").symlink_to(folder / "in")
    (folder / "in" / "b.png").write_bytes(png())
    (folder / "in" / "b.txt").write_text("inside")
    source = FileSource.folder(folder, 8)
    captions = [source.get(i, 0)[1] for i in range(len(source))]
    assert len(captions) == 22
    assert captions.count("linked") == captions.count("inside") == 1
    assert "in/b.png" in [pair[0] for pair in source.pairs]  # and not by the link, whatever comes first on the disk
    assert len(FileSource.tar(to_tar(folder, tmp_path / "p.tar"), 8)) == 21  # whose links are not followed


def test_pictures_of_other_kinds_are_told_of(folder: Path, tmp_path: Path) -> None:
    for name in ("x.GIF", "y.tif"):
        (folder / name).write_bytes(b"")
    for what in (folder, to_tar(folder, tmp_path / "p.tar")):
        with pytest.warns(UserWarning, match=f"{what}: leaving out what is not in one of the formats .*BMP: 2, such as x.GIF"):
            assert len(open_source(what, 8)) == 20


def test_a_tar_that_is_cut_short_is_told_of(folder: Path, tmp_path: Path) -> None:
    whole = to_tar(folder, tmp_path / "whole.tar")
    with tarfile.open(whole) as tar:
        members = [member for member in tar if member.isfile()]
    for where in (members[9].offset, members[9].offset + 100):  # before a file's header, and within
        (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:where])
        with pytest.warns(UserWarning, match=r"cut.tar has no mark of its end: it may be cut short, after 9 files"):
            FileSource.tar(tmp_path / "cut.tar", 8)
    with warnings.catch_warnings(action="error"):
        FileSource.tar(whole, 8)
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: members[9].offset_data + 1])
    with pytest.raises(ValueError, match=r"cut\.tar is no uncompressed tar, or not all of one"):
        FileSource.tar(tmp_path / "cut.tar", 8)


def test_there_is_nothing_to_compose_without_drawings(folder: Path) -> None:
    assert isinstance(open_source(folder, 8, compose=ComposeConfig()), FileSource)
    with pytest.raises(ValueError, match=f"compose must be left alone for data that is no drawing dataset, such as {folder}"):
        open_source(folder, 8, compose=SINGLE)


def test_one_of_several_captions_is_chosen_by_the_seed(folder: Path) -> None:
    source = FileSource.folder(folder, 8)
    index = next(i for i, pair in enumerate(source.pairs) if pair[0].endswith("02.png"))
    captions = [source.get(index, seed)[1] for seed in range(30)]
    assert set(captions) == {"picture 2", "image 2"}
    assert captions == [source.get(index, seed)[1] for seed in range(30)]


def test_a_tar_gives_what_its_folder_gives(folder: Path, tmp_path: Path) -> None:
    a, b = FileSource.folder(folder, 8), FileSource.tar(to_tar(folder, tmp_path / "p.tar"), 8)
    pictures = [{str(s.get(i, 0)[0].tolist()) + s.get(i, 0)[1] for i in range(20)} for s in (a, b)]
    assert len(pictures[0]) == 20
    assert pictures[0] == pictures[1]


def test_what_lies_at_a_path_is_found_out(folder: Path, tmp_path: Path, drawings_folder: Path) -> None:
    assert isinstance(open_source(folder, 8), FileSource)
    assert isinstance(open_source(to_tar(folder, tmp_path / "p.tar"), 8), FileSource)
    source = open_source(drawings_folder, 8, compose=SINGLE)
    assert isinstance(source, DrawingSource)
    assert source.config is SINGLE


def profile_of_light() -> bytes:
    """sRGB's own ICC profile, but for curves that take numbers as amounts of light (gamma 1)."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", content, 128)
    for name, at, size in (struct.unpack_from(">4sII", content, 132 + 12 * k) for k in range(count)):
        if name.endswith(b"TRC"):
            content[at : at + size] = struct.pack(">4s4xI", b"curv", 0).ljust(size, b"\0")
    return bytes(content)


def test_pictures_with_a_colour_profile_are_read_in_srgb() -> None:
    own, light, broken = (png((55, 55, 255), icc_profile=icc) for icc in (None, profile_of_light(), b"damaged"))
    assert np.abs(square_picture(light, 8).astype(int) - (128, 128, 255)).max() <= 1  # 55 of 255 is 0.216 of the light
    for content in (own, broken):
        assert (square_picture(content, 8) == (55, 55, 255)).all()


def test_pictures_are_upright_on_white_and_cut_to_their_middle() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    sides = Image.new("RGB", (40, 20), "red")
    sides.paste("blue", (0, 0, 20, 20))  # blue on the left: after turning, at the top
    file = io.BytesIO()
    sides.save(file, "png", exif=exif)
    upright = square_picture(file.getvalue(), 20)
    assert upright[2, 10].tolist() == [0, 0, 255]
    assert upright[17, 10].tolist() == [255, 0, 0]
    assert (square_picture(png((0, 0, 0, 0), mode="RGBA"), 8) == 255).all()
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("green", (20, 0, 40, 20))
    file = io.BytesIO()
    wide.save(file, "png")
    assert (square_picture(file.getvalue(), 20)[:, 2:-2] == (0, 128, 0)).all()


@pytest.mark.parametrize(
    "content",
    [png("red", mode="RGB", form="jpeg"), png(200, mode="L"), png(1, mode="1"), png(3, mode="P"), png(40_000, mode="I;16"),
     png((9, 9), mode="LA"), png((0, 99, 99, 0), mode="CMYK", form="jpeg"), png("red", form="webp")],
)  # fmt: skip
def test_every_mode_of_picture_opens(content: bytes) -> None:
    image = square_picture(content, 16)
    assert image.shape == (16, 16, 3)
    assert image.dtype == np.uint8


def test_sixteen_bits_become_eight() -> None:
    assert np.unique(square_picture(png(40_000, mode="I;16"), 8)).tolist() == [round(40_000 / 257)]


def test_bad_pictures_and_captions_are_passed_over_and_counted(folder: Path) -> None:
    (folder / "00.png").write_bytes(b"not a picture")
    (folder / "02.png").write_bytes((folder / "02.png").read_bytes()[:50])
    (folder / "04.json").write_text('{"title": "no caption"}')
    (folder / "06.txt").write_text("  \n")
    (folder / "08.json").write_bytes(b"\xff\xfe{")
    (folder / "10.json").write_text('{"caption": "half a pair \\ud83d"}')
    (folder / "14.json").write_text("[" * 100_000)
    source = FileSource.folder(folder, 8, max_bad=0.4)
    with pytest.warns(UserWarning, match="passing over 00.png: is no picture in one of .*; at most 40% may be bad") as told:
        captions = [source.get(i, seed=0)[1] for i in range(20)]
    assert [str(warning.message).split("passing over ")[1][:2] for warning in told] == ["00", "02", "04", "06", "08"]
    assert str(told[-1].message).endswith("; further ones are not told of")
    assert len(source.bad) == 7
    assert not any(int(caption.split()[1]) in (0, 2, 4, 6, 8, 10, 14) for caption in captions)
    assert captions == [source.get(i, seed=0)[1] for i in range(20)]
    assert len(source.bad) == 7


def test_too_many_bad_pictures_are_an_error(folder: Path) -> None:
    for name in ("00.png", "02.png"):
        (folder / name).write_bytes(b"not a picture")
    source = FileSource.folder(folder, 8, max_bad=0.05)
    said = r"2 of 20 pictures in .* are bad, at most 5% may be: 00.png: is no picture in one of"
    with pytest.raises(ValueError, match=said):
        [source.get(i, 0) for i in range(20)]


@pytest.mark.filterwarnings("ignore:.*passing over:UserWarning")
def test_reading_stops_at_too_many_bad_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for picture in sorted(folder.rglob("*.png"))[:18]:
        picture.write_bytes(b"none")
    read, square = [], data.square_picture
    monkeypatch.setattr(data, "square_picture", lambda *given: (read.append(1), square(*given))[1])
    with pytest.raises(ValueError, match="3 of 20 pictures in"):
        next(batches(FileSource.folder(folder, 8, max_bad=0.1), 4, seed=1))
    assert len(read) <= 3 + 4


@pytest.mark.filterwarnings("ignore:.*passing over:UserWarning")
def test_workers_count_bad_pictures_together(folder: Path) -> None:
    """The error comes at the same batch with workers, each of which meets but some of the bad ones."""
    for i in range(5):
        (folder / f"{2 * i:02}.png").write_bytes(b"GIF89a: none of ours")

    def until_it_fails(workers: int) -> int:
        seen: list[Any] = []
        with pytest.raises(ValueError, match=r"[45] of 20 pictures in"):
            seen.extend(batches(FileSource.folder(folder, 8, max_bad=0.15), 2, seed=0, workers=workers))
        return len(seen)

    alone = until_it_fails(0)
    assert alone > 0
    assert until_it_fails(2) == alone


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_counted_and_told_of_once_whoever_reads(folder: Path, workers: int) -> None:
    for name in ("00.png", "02.png"):
        (folder / name).write_bytes(b"GIF89a: none of ours")
    source = FileSource.folder(folder, 8, max_bad=0.1)
    with pytest.warns(UserWarning, match="passing over 0[02].png") as told:
        list(islice(batches(source, 5, seed=0, workers=workers), 8))  # two epochs
    assert len(told) == len(source.bad) == 2


def test_captions_are_counted_in_full_rounds(folder: Path) -> None:
    """Ten of twenty pictures have a second caption: two rounds show each that is to be seen."""
    assert FileSource.folder(folder, 8).captions() == 40
    for file in folder.rglob("*.json"):
        file.with_suffix(".txt").write_text("one alone")
    assert FileSource.folder(folder, 8).captions() == 20


def test_a_workers_error_is_told_as_it_is(folder: Path) -> None:
    for picture in folder.rglob("*.png"):
        picture.write_bytes(b"none")
    with pytest.raises(ValueError, match=r"of 20 pictures in .* are bad") as error:
        next(batches(FileSource.folder(folder, 8), 4, seed=0, workers=1))
    assert "Traceback" not in str(error.value)


@pytest.mark.parametrize("form", ["png", "webp"])
def test_exif_that_is_cut_off_does_not_matter(form: str) -> None:
    assert square_picture(png("red", form=form, exif=b"Exif\0\0II*\0"), 8).shape == (8, 8, 3)


@pytest.mark.filterwarnings("ignore:.*leaving out:UserWarning")
def test_a_fingerprint_is_of_names_sizes_and_captions(folder: Path, tmp_path: Path, drawings_folder: Path) -> None:
    first = FileSource.folder(folder, 8).fingerprint()
    assert FileSource.folder(folder, 16).fingerprint() == first
    assert FileSource.tar(to_tar(folder, tmp_path / "p.tar"), 8).fingerprint() == first
    seen = {first}
    for change in (
        lambda: (folder / "00.txt").write_text("Picture\n 0\n"),
        lambda: (folder / "02.png").write_bytes(png(size=(30, 30))),
        lambda: (folder / "04.png").rename(folder / "4.png"),
    ):
        change()
        seen.add(FileSource.folder(folder, 8).fingerprint())
    assert len(seen) == 4
    index = json.loads((drawings_folder / "index.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "drawings.npy").symlink_to(drawings_folder / "drawings.npy")
    found = open_source(drawings_folder, 8).fingerprint()
    for concepts in (index["concepts"], index["concepts"] | {"cat face": index["concepts"]["dog face"]}):
        (other / "index.json").write_text(json.dumps(index | {"concepts": concepts}, ensure_ascii=False))
        assert (open_source(other, 8).fingerprint() == found) == (concepts is index["concepts"])


def test_a_picture_that_claims_to_be_huge_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 399)
    with pytest.raises(ValueError, match="20×20 pixels; at most 399 are allowed"):
        square_picture(png(), 8)


def test_nothing_to_train_on(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no picture \(.png, .jpg"):
        FileSource.folder(tmp_path / "empty", 8)
    with pytest.raises(FileNotFoundError, match="data must be a folder"):
        FileSource.folder(tmp_path / "missing", 8)
    with pytest.raises(FileNotFoundError):
        FileSource.tar(tmp_path / "missing.tar", 8)
    (tmp_path / "text.tar").write_text("no tar at all")
    with pytest.raises(ValueError, match="is no uncompressed tar, or not all of one"):
        FileSource.tar(tmp_path / "text.tar", 8)
    with pytest.raises(ValueError, match="is no uncompressed tar, or not all of one"):
        FileSource.tar(to_tar(folder, tmp_path / "packed.tar", "w:gz"), 8)


# ------------------------------------------------------------------------------------------------ order


class Numbers:
    """A source whose pictures say which they are."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def get(self, index: int, seed: int) -> tuple[torch.Tensor, str]:
        return torch.full((3, 2, 2), index, dtype=torch.uint8), f"{index} {seed}"


def captions(source: Any, n: int, size: int = 4, **options: Any) -> list[str]:
    return [c for _, batch in islice(batches(source, size, **options), n) for c in batch]


def test_an_epoch_shows_each_picture_once_in_an_order_of_its_own() -> None:
    shown = captions(Numbers(12), 9, seed=1)
    epochs = [[int(c.split()[0]) for c in shown[i : i + 12]] for i in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({c.split()[1] for c in shown}) == 36  # what varies, varies in every epoch
    assert captions(Numbers(12), 9, seed=2) != shown


def test_the_order_depends_on_the_place_alone() -> None:
    whole = order(3, 11, 0, 60)
    assert torch.equal(torch.cat([order(3, 11, k, 5) for k in range(0, 60, 5)]), whole)
    assert torch.equal(order(3, 11, 17, 9), whole[17:26])
    assert not torch.equal(order(4, 11, 0, 60), whole)


@pytest.mark.parametrize("start", [1, 2, 3, 4, 7])
def test_a_resumed_run_goes_on_where_it_stopped(start: int) -> None:
    """Also in the middle of an epoch: 10 pictures, 4 a batch."""
    assert captions(Numbers(10), 9 - start, seed=5, start=start) == captions(Numbers(10), 9, seed=5)[4 * start :]


def test_processes_share_the_pictures_of_one() -> None:
    alone = captions(Numbers(10), 6, size=4, seed=3)
    shares = [captions(Numbers(10), 6, size=2, seed=3, rank=rank, world=2) for rank in (0, 1)]
    together = [c for k in range(6) for share in shares for c in share[2 * k : 2 * k + 2]]
    assert together == alone
    assert captions(Numbers(10), 3, size=2, seed=3, rank=1, world=2, start=3) == shares[1][6:]


def test_workers_change_nothing(tiny: Drawings) -> None:
    source = DrawingSource(tiny, ComposeConfig(), SIZE)
    alone = list(islice(batches(source, 3, seed=2, start=1), 5))
    helped = list(islice(batches(source, 3, seed=2, start=1, workers=2), 5))
    for (a, words), (b, said) in zip(alone, helped, strict=True):
        assert torch.equal(a, b)
        assert words == said
        assert a.shape == (3, 3, SIZE, SIZE)


def test_data_leaves_the_global_generators_alone(tiny: Drawings) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    next(batches(DrawingSource(tiny, ComposeConfig(), SIZE), 4, seed=0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"batch_size": 0}, "batch_size is 0, must be at least 1"), ({"start": -1}, "start is -1"),
     ({"rank": 2, "world": 2}, "rank is 2, must be"), ({"workers": -1}, "workers is -1")],
)  # fmt: skip
def test_bad_batches(options: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        batches(Numbers(4), **{"batch_size": 2, "seed": 0, **options})
