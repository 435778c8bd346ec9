"""Runs that start from a picture: img2img, inpainting, outpainting, instruct. As in diffusers; and the rest of a picture stays."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import latentdiff
from latentdiff import images as I
from latentdiff import origin
from latentdiff.checkpoints.families import SamplingSpec, ScheduleSpec
from latentdiff.checkpoints.save import save_folder
from latentdiff.conditioning import TextEncoder
from latentdiff.diffusion.schedules import cosine, grid, scaled_linear
from latentdiff.pipeline import Pipeline

SD = {
    "schedule": ScheduleSpec(),
    "prediction": "eps",
    "sampling": SamplingSpec(spacing="leading", steps_offset=1, final="sigma_min"),
}
FEW = {"steps": 4, "seed": 3, "progress": False}


def photo(width=32, height=32, seed=0) -> Image.Image:
    """Smooth coloured noise, every pixel different from its neighbour."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def white_box(size, box) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    return mask


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


def of_parts(parts) -> Pipeline:
    return Pipeline(
        unet=parts.unet,
        vae=parts.vae,
        text=TextEncoder(parts.text_encoders, parts.tokenizers, parts.spec),
        spec=parts.spec,
        title=parts.title,
    )


def with_channels(tiny_parts, channels: int):
    spec = tiny_parts().spec
    return tiny_parts(**SD, unet=replace(spec.unet, in_channels=channels))


# ------------------------------------------------------------------------------------------------------- the field's picture


def floats(pipe: Pipeline, *args, **options) -> np.ndarray:
    """Our pictures before rounding and before they are put back, in [0, 1]."""
    *_, last = pipe.stream(*args, **options)
    z = last.request.origin.latents(last.x / (1 + last.sigma**2).sqrt())
    return (pipe.decode(z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def theirs(kind: str, folder, **options) -> np.ndarray:
    """Pictures of diffusers' pipeline of this kind. It gets latents where it would draw a sample from the VAE; ours does not."""
    diffusers = pytest.importorskip("diffusers")
    pipe = getattr(diffusers, kind).from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipe(generator=[torch.Generator().manual_seed(7)], output_type="np", **options).images


@pytest.mark.oracle
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("steps", "strength"), [(8, 0.75), (5, 0.6), (10, 0.31)])
def test_img2img_is_diffusers_own(tiny_parts, tmp_path, prediction, steps, strength):
    save_folder(tiny_parts(**SD | {"prediction": prediction}), tmp_path / "m")
    pipe = latentdiff.load(tmp_path / "m", device="cpu", dtype="float32")
    z = pipe.encode(I.to_tensor([photo()]))
    asked = {"negative": "a dog", "steps": steps, "guidance": 7.5, "seed": 7}
    ours = floats(pipe, "a cat", image=photo(), strength=strength, exact=False, **asked)
    other = theirs(
        "StableDiffusionImg2ImgPipeline", tmp_path / "m", prompt="a cat", negative_prompt="a dog", image=z,
        strength=strength, num_inference_steps=steps, guidance_scale=7.5,
    )  # fmt: skip
    assert ours.std() > 0.05
    assert np.abs(ours - other).max() < 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize(("steps", "strength"), [(8, 0.75), (10, 0.99)])
def test_inpainting_with_any_model_is_diffusers_own(tiny_parts, tmp_path, steps, strength):
    save_folder(tiny_parts(**SD), tmp_path / "m")
    pipe = latentdiff.load(tmp_path / "m", device="cpu", dtype="float32")
    mask, z = white_box((32, 32), (8, 12, 28, 24)), pipe.encode(I.to_tensor([photo()]))
    ours = floats(pipe, "a cat", image=photo(), mask=mask, strength=strength, exact=False, steps=steps, guidance=5.0, seed=7)
    other = theirs(
        "StableDiffusionInpaintPipeline", tmp_path / "m", prompt="a cat", image=z, mask_image=mask, masked_image_latents=z,
        height=32, width=32, strength=strength, num_inference_steps=steps, guidance_scale=5.0,
    )  # fmt: skip
    assert np.abs(ours - other).max() < 1e-4


@pytest.mark.oracle
@pytest.mark.parametrize("strength", [0.75, 1.0])
def test_a_nine_channel_model_inpaints_as_in_diffusers(tiny_parts, tmp_path, strength):
    save_folder(with_channels(tiny_parts, 9), tmp_path / "m")
    pipe = latentdiff.load(tmp_path / "m", device="cpu", dtype="float32")
    mask = white_box((32, 32), (8, 12, 28, 24))
    found = origin.canvas(photo(), mask, native=32, factor=4)
    z, hidden = pipe.encode(I.to_tensor([photo()])), pipe.encode(origin.without_masked([found], [photo()]))
    ours = floats(pipe, "a cat", image=photo(), mask=mask, strength=strength, exact=False, steps=8, guidance=5.0, seed=7)
    other = theirs(
        "StableDiffusionInpaintPipeline", tmp_path / "m", prompt="a cat", image=z, mask_image=mask, masked_image_latents=hidden,
        height=32, width=32, strength=strength, num_inference_steps=8, guidance_scale=5.0,
    )  # fmt: skip
    assert np.abs(ours - other).max() < 1e-4


@pytest.mark.oracle
def test_an_instruct_model_edits_as_in_diffusers(tiny_parts, tmp_path):
    save_folder(with_channels(tiny_parts, 8), tmp_path / "m")
    pipe = latentdiff.load(tmp_path / "m", device="cpu", dtype="float32")
    ours = floats(pipe, "a cat", negative="a dog", image=photo(), image_guidance=1.7, guidance=6.0, steps=8, seed=7)
    other = theirs(
        "StableDiffusionInstructPix2PixPipeline", tmp_path / "m", prompt="a cat", negative_prompt="a dog", image=photo(),
        num_inference_steps=8, guidance_scale=6.0, image_guidance_scale=1.7,
    )  # fmt: skip
    assert np.abs(ours - other).max() < 1e-4


def test_instruct_guidance_is_its_papers_equation():
    """Brooks et al., eq. 3, spelled with a network whose output tells which conditions it saw."""

    def network(x, t, context, vector=None):
        return x[:, 4:] * 0.5 + context.mean((1, 2))[:, None, None, None]

    from latentdiff.conditioning import Cond
    from latentdiff.diffusion.denoiser import Denoiser

    picture = torch.randn(2, 4, 3, 3)
    text, nothing = Cond(torch.full((2, 1, 1), 3.0)), Cond(torch.full((2, 1, 1), 1.0))
    denoise = origin.instructed(Denoiser(network, cosine(), "x0"), text, nothing, picture, 7.0, 1.5)
    expected = 1.0 + 1.5 * (0.5 * picture) + 7.0 * (3.0 - 1.0)
    assert torch.allclose(denoise(torch.randn(2, 4, 3, 3), torch.tensor(2.0)), expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------ how far, and in how many steps


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras"])
@pytest.mark.parametrize("strength", [0.03, 0.5, 0.77, 1.0])
def test_exactly_the_steps_asked_for_reach_the_asked_strength(spacing, strength):
    schedule = scaled_linear()
    whole = grid(schedule, 20, spacing, offset=1, final="zero")
    part = origin.shortened(schedule, whole, strength, exact=True)
    assert len(part) == 21
    assert bool((part.diff() < 0).all())
    assert part[-1] == 0
    assert float(schedule.t(part[0])) == pytest.approx(strength * float(schedule.t(whole[0])), abs=1e-3)


def test_tiny_strengths_still_give_a_decreasing_grid():
    for strength in (1e-3, 1e-5, 1e-9):
        part = origin.shortened(cosine(), grid(cosine(), 50, "trailing"), strength, exact=True)
        assert 2 <= len(part) <= 51
        assert bool((part.diff() < 0).all())


def test_the_classic_rule_runs_the_last_steps():
    whole = grid(scaled_linear(), 20)
    assert torch.equal(origin.shortened(scaled_linear(), whole, 0.75, exact=False), whole[5:])
    assert torch.equal(origin.shortened(scaled_linear(), whole, 1.0, exact=False), whole)
    assert torch.equal(origin.shortened(scaled_linear(), whole, 0.04, exact=False), whole[-1:])


def test_a_run_says_how_many_steps_it_takes(tiny_pipe):
    for exact, steps in ((True, 10), (False, 6)):
        run = list(tiny_pipe.stream("a cat", image=photo(), strength=0.6, steps=10, exact=exact, seed=1))
        assert [p.i for p in run] == list(range(steps))
        assert {p.steps for p in run} == {steps}


def test_a_recipe_tells_the_strength_of_a_single_step_and_0_of_none(tiny_pipe):
    """exact=False runs int(10 · strength) of ten steps."""
    for strength, told in ((0.15, 0.15), (0.05, 0)):
        options = {"strength": strength, "exact": False, "steps": 10, "seed": 1, "progress": False}
        recipe, _ = I.parse_parameters(tiny_pipe("a cat", image=photo(), **options)[0].info["parameters"])
        assert recipe["strength"] == told


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("size", [(32, 32), (45, 61)])
def test_strength_0_gives_the_picture_back(tiny_pipe, exact, size):
    assert same(tiny_pipe("a cat", image=photo(*size), strength=0, exact=exact, **FEW)[0], photo(*size))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp_2m"])
def test_strength_1_ignores_the_picture(tiny_pipe, sampler):
    plain = tiny_pipe("a cat", sampler=sampler, **FEW)[0]
    for seed in (0, 1):
        assert same(tiny_pipe("a cat", image=photo(seed=seed), strength=1, sampler=sampler, **FEW)[0], plain)


def test_less_strength_changes_less(tiny_pipe):
    floor = array(I.to_pil(tiny_pipe.decode(tiny_pipe.encode(I.to_tensor([photo()]))))[0])
    made = [tiny_pipe("a cat", image=photo(), strength=s, guidance=1, **FEW)[0] for s in (0.002, 0.3, 0.9)]
    changes = [np.abs(array(image) - floor).mean() for image in made]
    assert changes[0] < changes[1] < changes[2]
    assert changes[0] < 5


# ------------------------------------------------------------------------------------------------------------ what stays


@pytest.mark.parametrize("options", [{}, {"blur": 3}, {"padding": 5}, {"padding": 0, "blur": 2}, {"strength": 0.5}])
@pytest.mark.parametrize("size", [(32, 32), (57, 90)])
def test_every_pixel_outside_the_mask_stays_to_the_last_bit(tiny_pipe, options, size):
    mask = white_box(size, (7, 9, 25, 23))
    result = tiny_pipe("a cat", image=photo(*size), mask=mask, **options, **FEW)[0]
    outside = np.asarray(mask) == 0
    assert result.size == size
    assert (array(result) == array(photo(*size)))[outside].all()
    assert (array(result) != array(photo(*size))).any(-1)[~outside].mean() > 0.5


def test_a_nine_channel_model_leaves_the_rest_too(tiny_parts):
    mask = white_box((40, 56), (7, 9, 25, 23))
    result = of_parts(with_channels(tiny_parts, 9))("a cat", image=photo(40, 56), mask=mask, **FEW)[0]
    assert (array(result) == array(photo(40, 56)))[np.asarray(mask) == 0].all()
    assert not same(result, photo(40, 56))


def test_what_is_held_is_held_in_the_latents_by_every_kind_of_sampler(tiny_pipe):
    """At a level s the known part is z + s · noise: its standard deviation around z, over s, is 1 at every step."""
    mask = white_box((32, 32), (0, 0, 16, 32))
    for sampler in ("ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_sde"):
        for p in tiny_pipe.stream("a cat", image=[photo()] * 8, mask=mask, strength=0.8, sampler=sampler, steps=6, seed=1):
            known = p.request.origin.repaint == 0
            off = (p.x - p.request.origin.z)[known.expand_as(p.x)]
            assert off.std() == pytest.approx(float(p.sigma), rel=0.15, abs=1e-6)
        assert off.abs().max() < 1e-6


def test_the_edge_fades_in_inside_the_mask():
    mask = white_box((60, 60), (10, 10, 50, 50))
    soft = array(origin.faded(mask, 4))
    assert (soft[np.asarray(mask) == 0] == 0).all()
    assert soft[30, 30] > 250
    assert 0 <= soft[30, 10] < 60
    assert (np.diff(soft[30, 10:30]) >= 0).all()
    assert soft[30, 9:16].tolist() == [0, 32, 96, 159, 223, 255, 255]  # at ½, 1½, 2½, 3½ of 4 pixels
    assert soft[11, 11] < 100  # by the nearest edge
    assert soft[30, 30:].tolist() == soft[30, 29::-1].tolist()


def test_a_picture_has_no_edge_where_it_ends():
    assert array(origin.faded(Image.new("L", (9, 9), 255), 4)).min() == 255
    assert array(origin.faded(white_box((9, 9), (0, 0, 5, 9)), 2))[4].tolist() == [255, 255, 255, 191, 64, 0, 0, 0, 0]


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_mask_narrower_than_the_blur_still_changes_its_middle(width):
    soft = array(origin.faded(white_box((40, 40), (20, 0, 20 + width, 40)), 12))
    assert soft.max() == 255
    assert (soft[:, :20] == 0).all()
    assert (soft[:, 20 : 20 + width] > 0).all()


def test_the_depth_of_a_place_is_its_distance_to_the_edge():
    scipy = pytest.importorskip("scipy.ndimage")
    inside = np.random.default_rng(0).random((60, 80)) > 0.02
    ours, exact = origin.depth(inside), scipy.distance_transform_edt(inside)
    assert (ours >= exact - 1e-4).all()
    assert (ours <= 1.083 * exact).all()


def test_a_latent_is_repainted_if_any_of_its_pixels_is_masked():
    mask = white_box((32, 32), (7, 8, 9, 9))
    assert origin.canvas(photo(), mask, native=32, factor=4).repaint(4)[0, 0].nonzero().tolist() == [[2, 1], [2, 2]]
    dot = white_box((960, 960), (700, 100, 701, 101))  # a thousandth of the model's pixel
    assert origin.canvas(photo(960, 960), dot, native=32, factor=4).repaint(4)[0, 0].nonzero().tolist() == [[0, 5]]


# --------------------------------------------------------------------------------------------------------- sizes and canvases


@pytest.mark.parametrize(
    ("size", "native", "factor", "expected"),
    [
        ((512, 512), 512, 8, (512, 512)),
        ((512, 768), 512, 8, (512, 768)),
        ((3000, 4000), 512, 8, (512, 680)),
        ((100, 100), 128, 8, (128, 128)),
        ((4000, 100), 128, 8, (1144, 32)),
    ],
)
def test_pictures_are_fitted_to_the_models_size(size, native, factor, expected):
    assert origin.fitted(size, native, factor) == expected


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (31, 33), (300, 200)])
def test_any_size_is_brought_back(tiny_pipe, size):
    assert tiny_pipe("a cat", image=photo(*size), **FEW)[0].size == size


def test_only_the_masked_part_is_worked_on_at_full_size(tiny_pipe):
    mask = white_box((320, 320), (200, 40, 216, 56))
    found = origin.canvas(photo(320, 320), mask, native=32, factor=4, padding=8)
    assert found.box == (192, 32, 224, 64)
    assert found.size == (32, 32)
    assert same(found.picture(), photo(320, 320).crop(found.box))


def test_outpainting_keeps_the_old_and_paints_the_new(tiny_pipe):
    result = tiny_pipe("a cat", image=photo(20, 24), expand=(12, 0, 8, 16), **FEW)[0]
    assert result.size == (40, 40)
    assert same(result.crop((12, 0, 32, 24)), photo(20, 24))
    grown, region = origin.expanded(photo(20, 24), None, (12, 0, 8, 16))
    assert (array(result) != array(grown)).any(-1)[np.asarray(region) > 0].mean() > 0.9
    assert (array(grown)[:24, :12] == array(photo(20, 24))[:, :1]).all()
    assert (array(grown)[24:, 32:] == array(photo(20, 24))[-1, -1]).all()


@pytest.mark.parametrize("options", [{}, {"strength": 0}, {"expand": 4}, {"mask": white_box((32, 32), (4, 4, 20, 20))}])
def test_the_colour_profile_comes_back(tiny_pipe, options):
    picture = photo()
    picture.info["icc_profile"] = b"that of a display"
    assert tiny_pipe("a cat", image=picture, **options, **FEW)[0].info["icc_profile"] == b"that of a display"


def test_pictures_of_every_kind_are_read(tiny_pipe, tmp_path):
    exif = photo(20, 30).getexif()
    exif[0x0112] = 6  # turned by a quarter
    photo(20, 30).save(tmp_path / "turned.jpg", exif=exif)
    photo().convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    sizes = {"turned.jpg": (30, 20), "cmyk.jpg": (32, 32), "deep.png": (32, 32), "clear.png": (32, 32)}
    for name, size in sizes.items():
        result = tiny_pipe("a cat", image=tmp_path / name, strength=0.0, **FEW)[0]
        assert (result.size, result.mode) == (size, "RGB")
    assert array(tiny_pipe("a cat", image=tmp_path / "deep.png", strength=0, **FEW)[0])[0, 0].tolist() == [156, 156, 156]


# ------------------------------------------------------------------------------------------------------ batches and recipes


def test_a_batch_of_pictures_is_each_picture_by_itself(tiny_pipe):
    photos, prompts = [photo(seed=1), photo(seed=2)], ["a cat", "a dog"]
    batch = tiny_pipe(prompts, image=photos, n=2, sampler="ddpm", **FEW)
    for k in range(4):
        alone = tiny_pipe(prompts[k // 2], image=photos[k // 2], sampler="ddpm", **FEW | {"seed": 3 + k})[0]
        assert same(batch[k], alone)
    assert same(tiny_pipe("a cat", image=photos, **FEW)[1], tiny_pipe("a cat", image=photos[1], **FEW | {"seed": 4})[0])


@pytest.mark.parametrize(("channels", "calls"), [(4, 1), (8, 1), (9, 2)])
def test_a_picture_is_encoded_once_for_all_that_start_from_it(tiny_parts, monkeypatch, channels, calls):
    pipe = of_parts(with_channels(tiny_parts, channels))
    asked = {"image": photo()} | ({"mask": white_box((32, 32), (4, 4, 20, 20))} if channels == 9 else {}) | FEW
    alone = pipe("a cat", **asked | {"seed": 6})[0]
    encoded, encode = [], pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda x: encoded.append(x) or encode(x))
    batch = pipe("a cat", n=4, **asked)
    assert len(encoded) == calls
    assert same(batch[3], alone)


@pytest.mark.parametrize(
    "options",
    [{}, {"strength": 0.3, "exact": False}, {"mask": True, "padding": 4, "blur": 2}, {"expand": (1, 2, 3, 4)}, {"expand": 9}],
)
def test_the_recipe_with_the_picture_makes_the_picture_again(tiny_pipe, tmp_path, options):
    pictures = {"image": photo(40, 32)}
    if options.get("mask"):
        pictures["mask"] = white_box((40, 32), (8, 8, 24, 24))
    result = tiny_pipe("a cat, flat", **options | pictures, **FEW)
    (path,) = result.save(tmp_path / "a.png")
    recipe, extra = I.read_parameters(path)
    given = {"image": "Photo", "mask": "Mask"}
    marks = {given[name]: origin.fingerprint(picture) for name, picture in pictures.items()}
    assert {name: extra[name] for name in ("Photo", "Mask") if name in extra} == marks
    assert same(tiny_pipe(**recipe, **pictures, progress=False)[0], result[0])


def test_another_programs_denoising_strength_is_not_taken_for_ours():
    recipe, extra = I.parse_parameters("a cat\nSteps: 20, Seed: 1, Denoising strength: 0.7, Hires upscale: 2")
    assert "strength" not in recipe
    assert extra["Denoising strength"] == "0.7"


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strength": 1.01}, ["strength", "from 0 to 1", "1.01"]),
        ({"strength": -0.1}, ["strength", "-0.1"]),
        ({"strength": float("nan")}, ["strength", "nan"]),
        ({"strength": "much"}, ["strength", "much"]),
        ({"mask": Image.new("L", (31, 32), 255)}, ["mask", "32×32", "31×32"]),
        ({"mask": Image.new("L", (32, 32), 0)}, ["mask", "black"]),
        ({"mask": [Image.new("L", (32, 32), 255)] * 2}, ["mask", "got 2"]),
        ({"blur": 3}, ["blur", "mask"]),
        ({"padding": 3}, ["padding", "mask"]),
        ({"blur": -1, "mask": Image.new("L", (32, 32), 255)}, ["blur", "-1"]),
        ({"expand": (1, 2, 3)}, ["expand", "(1, 2, 3)"]),
        ({"expand": 0}, ["expand", "0"]),
        ({"expand": (1, -5, 2, 2)}, ["expand", "-5"]),
        ({"expand": (1, 2, 3, "x")}, ["expand", "'x'"]),
        ({"expand": 16_000}, ["expand", "50,000,000"]),
        ({"image_guidance": 1.5}, ["image_guidance", "instruct"]),
        ({"size": 33}, ["size", "33"]),
        ({"image": []}, ["image", "empty"]),
        ({"image": 5}, ["image", "5"]),
        ({"image": None, "strength": 0.5}, ["strength", "image"]),
        ({"image": None, "mask": Image.new("L", (32, 32), 255)}, ["mask", "image"]),
        ({"image": [photo(), photo(64, 32)]}, ["image", "shape"]),
    ],
)
def test_bad_input_is_refused_by_name_before_computing(tiny_pipe, options, words):
    blind = replace(tiny_pipe, vae=replace_encode(tiny_pipe))
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        blind("a cat", **{"image": photo()} | options | FEW)
    assert all(word in str(error.value) for word in words), error.value


def replace_encode(pipe):
    """A VAE that must not be called."""

    class Blind:
        factor = pipe.vae.factor

    return Blind()


def test_unreadable_and_hostile_files_are_refused(tiny_pipe, tmp_path):
    (tmp_path / "text.png").write_text("hello")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    for name, error in (("text.png", ValueError), ("bomb.png", ValueError), ("none.png", FileNotFoundError)):
        with pytest.raises(error, match=name):
            tiny_pipe("a cat", image=tmp_path / name, **FEW)


def test_models_made_for_pictures_say_what_they_need(tiny_parts):
    with pytest.raises(ValueError, match="mask must be given"):
        of_parts(with_channels(tiny_parts, 9))("a cat", image=photo(), **FEW)
    with pytest.raises(ValueError, match="strength must be None"):
        of_parts(with_channels(tiny_parts, 8))("a cat", image=photo(), strength=0.5, **FEW)
    with pytest.raises(ValueError, match="must be given"):
        of_parts(with_channels(tiny_parts, 8))("a cat", **FEW)
