"""Pictures in, pictures out, and the recipe that travels with them."""

import gc
import io
import math
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from latentdiff import images as I

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)
tricky = st.lists(
    st.sampled_from(
        [
            "\n",
            "Negative prompt: ",
            "Steps: 3, Sampler: x, Seed: 1",
            ", ",
            ": ",
            '"',
            "\\",
            "a cat",
            "\r",
            " ",
            "\x00",
            "Exact prompt: ",
        ]
    ),
    max_size=8,
).map("".join)
prompts = texts | tricky
levels = st.floats(min_value=0, max_value=1e6, allow_nan=False)
recipes = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "steps": st.integers(1, 1000),
        "sampler": st.sampled_from(["ddim", "dpm++ 2m"]),
        "seed": st.integers(0, 2**64 - 1),
    },
    optional={
        "negative": prompts.filter(bool),
        "guidance": st.floats(allow_nan=False, allow_infinity=False),
        "rescale": st.floats(0, 1),
        "eta": st.floats(0, 1),
        "spacing": st.sampled_from(["trailing", "karras"]) | st.lists(levels, min_size=2, max_size=5),
        "size": st.tuples(st.integers(8, 4096), st.integers(8, 4096)),
    },
)


@given(recipes, st.dictionaries(st.sampled_from(["Model", "Version"]), texts))
@settings(deadline=None, max_examples=300)
@example({"prompt": "a\nNegative prompt: b", "steps": 1, "sampler": "ddim", "seed": 0}, {})
@example({"prompt": "", "negative": "x\nSteps: 1, Seed: 2, Size: 8x8", "steps": 1, "sampler": "ddim", "seed": 0}, {})
def test_reading_a_recipe_gives_what_was_written(recipe, extra):
    found, others = I.parse_parameters(I.write_parameters(recipe, extra))
    assert found == recipe
    assert {k: v for k, v in others.items() if k not in I.EXACT} == extra


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@given(recipe=recipes)
@settings(deadline=None, max_examples=50)
def test_a_recipe_survives_the_file(tmp_path_factory, recipe, suffix):
    path = tmp_path_factory.getbasetemp() / f"recipe{suffix}"
    image = Image.new("RGB", (2, 2))
    image.info["parameters"] = I.write_parameters(recipe)
    I.save_image(image, path)
    assert I.read_recipe(path) == recipe


def test_a_recipe_too_long_for_a_jpeg_does_not_keep_it_from_being_saved(tmp_path):
    image = Image.new("RGB", (2, 2))
    image.info["parameters"] = I.write_parameters({"prompt": 32_300 * "a", "steps": 1, "sampler": "ddim", "seed": 0})
    I.save_image(image, tmp_path / "fits.jpg")
    assert len(I.read_recipe(tmp_path / "fits.jpg")["prompt"]) == 32_300
    image.info["parameters"] += 300 * " "
    I.save_image(image, tmp_path / "long.jpg")
    with pytest.raises(ValueError, match="carries no recipe"):
        I.read_recipe(tmp_path / "long.jpg")


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0MM\0*", b"Exif\0\0II*\0\x08\0\0\0\x01\0i\x87\4\0\1\0\0\0\xff\xff\xff\xff"]
)
def test_other_comments_and_damaged_exif_are_no_recipe(tmp_path, exif):
    for name in ("a.jpg", "a.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name, exif=exif)
        with pytest.raises(ValueError, match="carries no recipe"):
            I.read_recipe(tmp_path / name)
    other = Image.Exif()
    other.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0a cat, Steps: 3"
    Image.new("RGB", (2, 2)).save(tmp_path / "b.jpg", exif=other)
    with pytest.raises(ValueError, match="carries no recipe"):
        I.read_recipe(tmp_path / "b.jpg")


def test_the_comment_has_the_type_that_exif_asks_for(tmp_path):
    image, text = Image.new("RGB", (2, 2)), "a cat\nSteps: 1, Sampler: ddim, Seed: 0"
    image.info["parameters"] = text
    for suffix in (".jpg", ".webp"):
        I.save_image(image, tmp_path / f"a{suffix}")
        with Image.open(tmp_path / f"a{suffix}") as saved:
            comment = saved.getexif().get_ifd(0x8769)[0x9286]
            assert b"\x92\x86\0\7" + struct.pack(">I", len(comment)) in saved.info["exif"]  # 7: undefined; as piexif wants it
        assert comment == b"UNICODE\0" + text.encode("utf-16-be")


def test_a_comment_in_the_other_order_of_bytes_is_read_too(tmp_path):
    text = "a cat, 一一一\nSteps: 3, Sampler: Euler a, Seed: 7"
    for name, code in (("big.jpg", "utf-16-be"), ("little.jpg", "utf-16-le")):
        Image.new("RGB", (2, 2)).save(tmp_path / name, exif=I.exif_of(I.UTF16 + text.encode(code)))
        assert I.read_recipe(tmp_path / name) == {"prompt": "a cat, 一一一", "steps": 3, "sampler": "Euler a", "seed": 7}


def test_pixels_are_not_decoded_to_look_for_a_recipe(tmp_path):
    (tmp_path / "a.png").write_bytes(png(13_000, 13_000))  # that has no such pixels
    with pytest.warns(Image.DecompressionBombWarning):
        image = Image.open(tmp_path / "a.png")
    image.load = lambda: pytest.fail("decoded")
    assert I.parameters_of(image) is None


def test_the_text_is_what_other_programs_read():
    recipe = dict(
        prompt="a cat,\nsitting",
        negative="blurry",
        steps=20,
        sampler="ddim",
        spacing="trailing",
        guidance=7.0,
        seed=5,
        size=(512, 768),
    )
    text = I.write_parameters(recipe, {"Model": "a, b", "Version": "latentdiff 1"})
    assert text == (
        "a cat,\nsitting\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: ddim, Schedule type: trailing, CFG scale: 7, Seed: 5, Size: 512x768, "
        'Model: "a, b", Version: latentdiff 1'
    )
    assert "Exact" not in text


def test_a_text_of_another_program_is_read():
    """The example of A1111's own documentation; what is not ours is handed back apart."""
    text = (
        "a (cat:1.2)\nin a hat\nNegative prompt: bad\nugly\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, "
        'Seed: 965400086, Size: 512x640, Model hash: 45dee52b, Model: "x, y", Clip skip: 2'
    )
    recipe, others = I.parse_parameters(text)
    assert recipe == {
        "prompt": "a (cat:1.2)\nin a hat", "negative": "bad\nugly", "steps": 20, "sampler": "DPM++ 2M", "spacing": "Karras",
        "guidance": 7.5, "seed": 965400086, "size": (512, 640),
    }  # fmt: skip
    assert others == {"Model hash": "45dee52b", "Model": "x, y", "Clip skip": "2"}


def test_fewer_than_three_pairs_are_part_of_the_prompt():
    assert I.parse_parameters("a cat\nSteps: 3, Seed: 1") == ({"prompt": "a cat\nSteps: 3, Seed: 1"}, {})


@given(texts)
@settings(deadline=None)
def test_any_text_is_read_without_error(text):
    I.parse_parameters(text + "\n" + text)


@pytest.mark.parametrize("text", ["a" * 100_000, "a " * 50_000, " " * 100_000])
def test_a_long_text_is_read_in_no_time(text):
    began = time.process_time()
    assert I.parse_parameters(f"x\n{text}") == ({"prompt": f"x\n{text}"}, {})
    assert time.process_time() - began < 3


def test_forged_values_stay_text_for_the_pipeline_to_refuse():
    recipe, _ = I.parse_parameters("x\nSteps: __import__('os'), Seed: 1e9, Size: 8, CFG scale: ten, Sampler: y")
    assert recipe == {"prompt": "x", "steps": "__import__('os')", "seed": "1e9", "size": "8", "guidance": "ten", "sampler": "y"}


def test_png_without_recipe_and_other_files(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="carries no recipe"):
        I.read_recipe(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("<html>")
    with pytest.raises(ValueError, match="no picture in one of the formats"):
        I.read_recipe(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError, match="no such file"):
        I.read_recipe(tmp_path / "c.png")


# ------------------------------------------------------------------------------------------------------ tensors and tiles


def test_all_8_bit_values_survive_the_tensor():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values, values[::-1], values.T], -1))
    (back,) = I.to_pil(I.to_tensor([image]))
    assert np.array_equal(np.asarray(back), np.asarray(image))


def test_tensors_are_clamped_and_rounded():
    image = torch.tensor([-2.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1.0, 7.0]).expand(1, 3, 1, 6)
    assert np.asarray(I.to_pil(image)[0])[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def solid(*colours):
    return [Image.new("RGB", (8, 6), colour) for colour in colours]


def test_tiles_stand_in_rows_on_white():
    sheet = np.asarray(I.tile(solid("red", "lime", "blue"), columns=2))
    assert sheet.shape == (12, 16, 3)
    corners = [sheet[0, 0], sheet[0, 15], sheet[11, 0], sheet[11, 15]]
    assert [c.tolist() for c in corners] == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]
    assert I.tile(solid(*["red"] * 5)).size == (24, 12)
    assert I.tile(solid("red"), columns=10**9).size == (8, 6)


def test_labels_stand_under_their_picture_and_fit():
    black = [Image.new("RGB", (100, 80), "white")] * 2
    sheet = np.asarray(I.tile(black, labels=["i", "a label that is much too long for its picture"], columns=2))
    ink = (sheet < 128).all(-1)
    assert not ink[:80].any()
    assert ink[80:, 40:60].any()
    assert not ink[:, :40].any()  # a short label is centred
    assert ink[:, 100:].any()
    assert not ink[:, 99:101].any()  # a long one stays in its column


def test_a_long_label_is_shortened_at_once():
    lengths = []

    class Font:
        def getlength(self, text):
            lengths.append(len(text))
            return 5.0 * len(text)

    assert I.fitted("word " * 20_000, Font(), 38) == "word w…"
    assert I.fitted("猫", Font(), 1) == "…"
    assert I.fitted("", Font(), 1) == ""
    assert len(lengths) < 30


@pytest.mark.parametrize("bad", [{"columns": 0}, {"labels": ["a"]}])
def test_bad_tiles(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        I.tile(solid("red", "lime"), **bad)
    with pytest.raises(ValueError, match="images"):
        I.tile([])


def test_images_save_slice_and_show(tmp_path):
    images = I.Images(solid("red", "lime", "blue"))
    for k, image in enumerate(images):
        image.info["parameters"] = I.write_parameters({"prompt": "A Cat/../x", "steps": 1, "sampler": "s", "seed": k // 2})
    assert [p.name for p in images.save(tmp_path / "new" / "cat.png")] == ["cat-1.png", "cat-2.png", "cat-3.png"]
    assert images[:1].save(tmp_path / "one.webp") == [tmp_path / "one.webp"]
    assert [p.name for p in images.save(f"{tmp_path}/out/")] == ["a-cat-x-0.png", "a-cat-x-0-2.png", "a-cat-x-1.png"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a-cat-x-0.png", "a-cat-x-0-2.png", "a-cat-x-1.png"}
    assert [p.name for p in images[1:].save(tmp_path / "out")] == ["a-cat-x-0-3.png", "a-cat-x-1-2.png"]  # none is replaced
    assert I.read_recipe(tmp_path / "new" / "cat-3.png")["seed"] == 1
    assert Image.open(io.BytesIO(images._repr_png_())).size == (16, 12)
    assert Image.open(io.BytesIO(images[:1]._repr_png_())).size == (8, 6)
    assert I.Images()._repr_png_() is None
    for name in ("cat", "cat.gif", "cat.png.exe"):
        with pytest.raises(ValueError, match="path must end in"):
            images.save(tmp_path / name)


def test_the_longest_words_and_seed_are_a_file_name(tmp_path):
    image = solid("red")[0]
    image.info["parameters"] = I.write_parameters({"prompt": "\U00010400" * 99, "steps": 1, "sampler": "s", "seed": 2**64 - 1})
    assert I.Images([image] * 2).save(f"{tmp_path}/")[1].name.endswith("-18446744073709551615-2.png")


@pytest.mark.parametrize("name", ["a.webp", "a.jpg"])
def test_what_a_format_cannot_hold_replaces_nothing(tmp_path, name):
    I.save_image(solid("red")[0], tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises((ValueError, OSError)):
        I.save_image(Image.new("RGB", (70_000, 1)), tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("folder.png", "which is a folder"), ("file/a.png", "in a folder that can be written to"), ("file/b/a.png", "got .*file/b'"),
     ("new/a.gif", "path must end in"), ("here.png", "another file"), ("shut/new/a.png", "got .*shut/new'")],
)  # fmt: skip
def test_files_that_cannot_be_written_are_refused(tmp_path, monkeypatch, name, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "shut").mkdir()
    for file in ("file", "here.png"):
        (tmp_path / file).touch()
    monkeypatch.setattr("os.access", lambda path, _: path.name != "shut")  # who runs tests may be allowed everything
    with pytest.raises(ValueError, match=message):
        I.check_files([tmp_path / "new" / "a.png", tmp_path / name], [tmp_path / "here.png", tmp_path / "none.png"])


# ---------------------------------------------------------------------------------------------------- pictures of a user


def saved(path, image, **options):
    image.save(path, **options)
    return path


def pixel(image, x=0, y=0):
    return image.getpixel((x, y))


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 16), "white")
    image.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    opened = I.open_picture(saved(tmp_path / "a.png", image, exif=exif))
    assert opened.size == (16, 8)
    assert pixel(opened, 15, 4) == (255, 0, 0)
    assert pixel(opened, 0, 4) == (255, 255, 255)


def test_cmyk(tmp_path):
    opened = I.open_picture(saved(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)), quality=100))
    assert opened.mode == "RGB"
    assert all(abs(a - b) <= 3 for a, b in zip(pixel(opened), (255, 0, 0), strict=True))


def test_16_bit_grey_keeps_its_range(tmp_path):
    grey = np.array([[0, 257 * 128, 65535]], dtype=np.uint16)
    opened = I.open_picture(saved(tmp_path / "a.png", Image.fromarray(grey)))
    assert np.asarray(opened)[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]
    assert np.asarray(I.open_picture(tmp_path / "a.png", "L"))[0].tolist() == [0, 128, 255]


def test_palette_with_alpha_lies_on_white(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), 1)
    opened = I.open_picture(saved(tmp_path / "a.png", image, transparency=0))
    assert [pixel(opened), pixel(opened, 1)] == [(255, 255, 255), (0, 255, 0)]


@pytest.mark.parametrize(
    ("mode", "colour", "rgb"),
    [("1", 1, (255,) * 3), ("L", 7, (7,) * 3), ("LA", (0, 128), (127,) * 3), ("RGBA", (255, 0, 0, 0), (255,) * 3)],
)
def test_other_modes(tmp_path, mode, colour, rgb):
    opened = I.open_picture(saved(tmp_path / "a.png", Image.new(mode, (4, 4), colour)))
    assert opened.mode == "RGB"
    assert pixel(opened) == rgb


def test_a_mask_is_what_is_painted_on_a_transparent_layer():
    layer = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    layer.putpixel((1, 0), (255, 255, 255, 255))
    assert np.asarray(I.open_picture(layer, "L")).tolist() == [[0, 255]]


def grey_profile() -> bytes:
    """An ICC profile of greys whose values are amounts of light (gamma 1)."""
    white = struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061)  # D50
    tags, body = {b"wtpt": white, b"kTRC": struct.pack(">4s4xI", b"curv", 0)}, b""
    table = struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack(">I4xI4s4s4s12x4s28x3i48x", 128 + len(table + body), 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp",
                       63190, 65536, 54061)  # fmt: skip
    return head + table + body


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_greys_with_a_profile_become_srgb_and_those_of_a_mask_stay(mode):
    image = Image.new(mode, (2, 2), {"L": 55, "LA": (55, 255), "I;16": 55 * 257}[mode])
    image.info["icc_profile"] = grey_profile()
    opened = I.open_picture(image)
    assert pixel(opened) == pytest.approx((128,) * 3, abs=1)  # 0.216 of the light
    assert not opened.info["icc_profile"]
    assert pixel(I.open_picture(image, "L")) == 55


def test_cmyk_is_never_saved_with_its_profile(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    I.save_image(I.open_picture(saved(tmp_path / "a.jpg", image, icc_profile=b"damaged", quality=100)), tmp_path / "b.png")
    found = Image.open(tmp_path / "b.png")
    assert "icc_profile" not in found.info
    assert all(abs(a - b) <= 3 for a, b in zip(pixel(found), (255, 0, 0), strict=True))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_the_profile_of_rgb_stays_with_its_pixels(tmp_path, mode):
    image = Image.new("RGB", (16, 16), (10, 200, 30)).convert(mode)
    opened = I.open_picture(saved(tmp_path / "a.png", image, icc_profile=b"whatever"))
    assert pixel(opened) == pixel(image.convert("RGB"))
    for suffix in I.SAVES:
        I.save_image(opened, tmp_path / f"b{suffix}")
        assert Image.open(tmp_path / f"b{suffix}").info["icc_profile"] == b"whatever"


def test_what_a_picture_says_beside_its_pixels_stays_with_the_user(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "private"
    opened = I.open_picture(saved(tmp_path / "a.jpg", Image.new("RGB", (8, 8)), exif=exif, comment=b"private"))
    for suffix in I.SAVES:
        I.save_image(opened, tmp_path / f"b{suffix}")
        assert b"private" not in (tmp_path / f"b{suffix}").read_bytes()


def test_exif_that_cannot_be_read_is_ignored(tmp_path):
    path = saved(tmp_path / "a.png", Image.new("RGB", (8, 8), "red"), exif=b"Exif\0\0II*\0")
    assert pixel(I.open_picture(path)) == (255, 0, 0)


def png(width, height, *chunks):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [60_000, 10_000, math.isqrt(I.MAX_PIXELS) + 1])
def test_bombs_are_refused_before_decoding(tmp_path, side, monkeypatch):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    (tmp_path / "a.png").write_bytes(png(side, side))
    with pytest.raises(ValueError, match="pixels"):
        I.open_picture(tmp_path / "a.png")


def test_text_bombs_are_refused(tmp_path):
    text = b"parameters\0\0" + zlib.compress(b"x" * (80 << 20))
    (tmp_path / "a.png").write_bytes(png(8, 8, (b"zTXt", text)))
    for read in (I.open_picture, I.read_recipe):
        with pytest.raises(ValueError, match="too large"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PPM", "ICO", "EPS"])
def test_other_formats_are_refused(tmp_path, kind):
    path = saved(tmp_path / "a.png", Image.new("RGB", (32, 32)), format=kind)
    with pytest.raises(ValueError, match="formats PNG, JPEG, WEBP, BMP"):
        I.open_picture(path)


def test_animations_and_damaged_files_are_refused(tmp_path):
    frames = solid("red", "lime")
    path = saved(tmp_path / "a.webp", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="animation"):
        I.open_picture(path)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = saved(tmp_path / "b.png", noise).read_bytes()
    for n in (0, 10, 40, len(whole) // 2):
        (tmp_path / "b.png").write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"b\.png"):
            I.open_picture(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError, match="no such file"):
        I.open_picture(tmp_path / "c.png")


def test_threads_that_save_into_one_folder_lose_nothing(tmp_path):
    pictures = [Image.new("RGB", (4, 4), (k, 0, 0)) for k in range(64)]
    for picture in pictures:
        picture.info["parameters"] = I.write_parameters({"prompt": "a cat", "steps": 1, "sampler": "ddim", "seed": 1})
    with ThreadPoolExecutor(8) as pool:
        paths = [path for (path,) in pool.map(lambda picture: I.Images([picture]).save(tmp_path), pictures)]
    assert len({*paths}) == len([*tmp_path.iterdir()]) == 64
    assert all(pixel(Image.open(path)) == pixel(picture) for path, picture in zip(paths, pictures, strict=True))


def test_a_recipe_that_does_not_fit_is_told_of(tmp_path):
    picture = Image.new("RGB", (4, 4))
    picture.info["parameters"] = I.write_parameters({"prompt": "a dog, " * 6000, "steps": 1, "sampler": "ddim", "seed": 1})
    for suffix, kind in ((".jpg", "JPEG"), (".webp", "WEBP")):
        with pytest.warns(UserWarning, match=f"a{suffix}: the recipe is too long for a {kind} and is left out; a PNG holds it"):
            I.save_image(picture, tmp_path / f"a{suffix}")
    with warnings.catch_warnings(action="error"):
        I.save_image(picture, tmp_path / "a.png")
        I.save_image(Image.new("RGB", (4, 4)), tmp_path / "b.jpg")


def test_the_refiner_of_a_recipe_is_told_of_and_the_file_is_closed(tmp_path):
    picture = Image.new("RGB", (4, 4))
    picture.info["parameters"] = I.write_parameters({"prompt": "a", "steps": 1, "sampler": "ddim", "seed": 1}, {"Refiner": "xl"})
    I.save_image(picture, tmp_path / "a.png")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        I.read_recipe(tmp_path / "a.png")
        gc.collect()
    (warning,) = told  # and none of an open file
    assert "a.png: the refiner, xl, is no part of the recipe" in str(warning.message)


def test_numbers_of_a_picture_that_mean_nothing_are_refused():
    assert pixel(I.open_picture(Image.new("F", (2, 2), 0.5))) == (128, 128, 128)
    for value in (228.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="numbers of mode F must lie from 0 to 1"):
            I.open_picture(Image.new("F", (2, 2), value))
    with pytest.raises(ValueError, match="picture: has 0×5 pixels; at least one is needed"):
        I.open_picture(Image.new("RGB", (0, 5)))


def test_a_picture_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path, monkeypatch):
    picture = Image.new("RGB", (4, 4))
    picture.info["parameters"] = I.write_parameters({"prompt": "a cat", "steps": 1, "sampler": "ddim", "seed": 1})
    full = io.BytesIO()
    full.write = lambda content: (_ for _ in ()).throw(OSError(28, "No space left on device"))

    def opened(path, mode):
        assert mode == "xb"
        path.touch(exist_ok=False)
        return full

    monkeypatch.setattr(I.Path, "open", opened)
    with pytest.raises(OSError, match="No space left"):
        I.Images([picture]).save(tmp_path)
    assert not [*tmp_path.iterdir()]
