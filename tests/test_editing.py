"""Editing by words: what must be identical is, what may change does, and bad input is refused before computing."""

from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from weakref import WeakSet

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import latentdiff
from latentdiff import editing, inversion
from latentdiff import images as I
from latentdiff.conditioning import TextEncoder
from latentdiff.diffusion.rules import pag
from latentdiff.editing import Edits
from latentdiff.models import graphs
from latentdiff.sound import NonFiniteError

FEW = {"steps": 4, "seed": 3, "progress": False}
TWO = FEW | {"steps": 2}
METHODS = ["img2img", "ddim", "null-text", "edit-friendly", "prompt-to-prompt"]


def photo(width=32, height=32, seed=0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


def close(a: Image.Image, b: Image.Image) -> bool:
    """Equal but for single levels of 255, here and there."""
    off = np.abs(array(a) - array(b))
    return bool(off.max() <= 1 and (off > 0).mean() < 0.01)


def differ(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(array(a) - array(b)).mean())


# --------------------------------------------------------------------------------------------------------- identities


def test_identical_prompts_give_the_identical_picture(tiny_pipe):
    """The source's, to the last bit, whatever is controlled; an ordinary run's up to rounding (its attention is not wrapped)."""
    plain = tiny_pipe("a red cat", sampler="ddim", **FEW)[0]
    for options in ({}, {"cross": 1, "self_attention": 1}, {"words": "refine", "region": "cat"}, {"weights": {"cat": 1}}):
        edits = tiny_pipe.edit(None, source="a red cat", target="a red cat", **options, **FEW)
        assert same(edits[0], edits.before[0])
        assert close(edits[0], plain)


@pytest.mark.parametrize("embedded", [False, True])
def test_zero_control_is_an_ordinary_run(tiny_pipe, embedded):
    """To the last bit, also where a time embedded beside another would round otherwise than by itself."""
    pipe = latentdiff.load(device="cpu", dtype="float32") if embedded else tiny_pipe
    edits = pipe.edit(None, source="a cat", target="a flat red dog", cross=0, self_attention=0, **FEW)
    assert same(edits[0], pipe("a flat red dog", sampler="ddim", **FEW)[0])
    assert same(edits.before[0], pipe("a cat", sampler="ddim", **FEW)[0])


def test_reweighting_by_1_is_the_identity_and_by_more_is_not(tiny_pipe):
    asked = {"source": "a red cat", "target": "a red dog"} | FEW
    plain = tiny_pipe.edit(None, **asked)[0]
    assert same(tiny_pipe.edit(None, **asked, weights={"red": 1.0})[0], plain)
    assert differ(tiny_pipe.edit(None, **asked, weights={"red": 4.0})[0], plain) > 0.1


def test_control_brings_the_target_nearer_to_the_source(tiny_pipe):
    asked = {"source": "a red cat", "target": "a blue dog"} | FEW | {"guidance": 1}
    shares = [(0, 0), (0.5, 0.5), (1, 1)]
    edits = [tiny_pipe.edit(None, **asked, cross=c, self_attention=s) for c, s in shares]
    far = [differ(e[0], e.before[0]) for e in edits]
    assert far[0] > far[1] > far[2] > 0


def test_guidance_1_runs_one_half_and_is_controlled_too(tiny_pipe):
    asked = {"source": "a red cat", "guidance": 1} | FEW
    same_prompts = tiny_pipe.edit(None, **asked, target="a red cat")
    assert close(same_prompts[0], tiny_pipe("a red cat", sampler="ddim", guidance=1, **FEW)[0])
    assert not same(tiny_pipe.edit(None, **asked, target="a red dog")[0], same_prompts[0])


def test_prompts_of_different_lengths_are_edited(tiny_pipe):
    """One chunk against two: the maps are not square."""
    long = "a red cat and a dog on a mat, flat style, with a blue hat and a green tree next to a house"
    edits = tiny_pipe.edit(None, source="a red cat", target=long, words="refine", **FEW)
    assert not same(edits[0], edits.before[0])


# ------------------------------------------------------------------------------------------------------------ inversion


@pytest.mark.parametrize("method", ["ddim", "edit-friendly", "prompt-to-prompt"])
def test_a_picture_is_rebuilt_to_the_vaes_own_error(tiny_pipe, method):
    edits = tiny_pipe.edit(photo(), source="a cat", target="a dog", method=method, **FEW | {"steps": 10})
    (report,) = edits.reports
    assert abs(report.rebuilt - report.limit) < 0.5
    assert same(edits.before[0], photo())


@pytest.mark.parametrize("method", METHODS[1:])
def test_the_same_prompt_without_guidance_changes_nothing_but_what_the_vae_does(tiny_pipe, method):
    edits = tiny_pipe.edit(photo(), source="a cat", target="a cat", method=method, guidance=1, **FEW | {"steps": 10})
    floor = I.to_pil(tiny_pipe.decode(tiny_pipe.encode(I.to_tensor([photo()]))))[0]
    assert differ(edits[0], floor) < 1.0


def test_null_text_is_nearer_than_ddim_under_guidance(tiny_pipe):
    """With the same prompt and strong guidance the plain inversion drifts off, null-text holds on."""
    floor, off = I.to_pil(tiny_pipe.decode(tiny_pipe.encode(I.to_tensor([photo()]))))[0], {}
    for method in ("ddim", "null-text"):
        asked = {"source": "a cat", "target": "a cat", "guidance": 4.0} | FEW
        off[method] = differ(tiny_pipe.edit(photo(), method=method, **asked)[0], floor)
    assert off["null-text"] < 0.7 * off["ddim"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_edits_at_any_size_and_repeats_itself(tiny_pipe, method):
    asked = {"source": "a cat", "target": "a red dog", "method": method} | TWO
    edits = tiny_pipe.edit(photo(50, 41), **asked)
    assert edits[0].size == (50, 41)
    assert not same(edits[0], photo(50, 41))
    assert same(tiny_pipe.edit(photo(50, 41), **asked)[0], edits[0])


@pytest.mark.parametrize("method", METHODS)
def test_strength_0_gives_the_picture_back(tiny_pipe, tmp_path, method):
    """With a recipe, as every other picture."""
    edits = tiny_pipe.edit(photo(45, 61), source="a", target="b", method=method, strength=0, **FEW)
    assert same(edits[0], photo(45, 61))
    recipe = I.read_recipe(*edits.save(tmp_path / "a.png"))
    assert (recipe["method"], recipe["strength"], recipe["source"]) == (method, 0, "a")
    assert same(tiny_pipe.edit(photo(45, 61), **recipe, progress=False)[0], photo(45, 61))


@pytest.mark.parametrize("method", METHODS)
def test_outside_a_mask_nothing_changes(tiny_pipe, method):
    mask = Image.new("L", (50, 41), 0)
    ImageDraw.Draw(mask).rectangle((10, 8, 29, 30), fill=255)
    result = tiny_pipe.edit(photo(50, 41), source="a cat", target="a red dog", method=method, mask=mask, blur=2, **TWO)[0]
    outside = np.asarray(mask) == 0
    assert (array(result) == array(photo(50, 41)))[outside].all()
    assert (array(result) != array(photo(50, 41)))[~outside].any()


def test_a_region_keeps_the_edit_inside(tiny_pipe):
    asked = {"source": "a red cat", "target": "a red dog", "cross": 0, "self_attention": 0} | FEW
    everywhere, inside = tiny_pipe.edit(None, **asked), tiny_pipe.edit(None, **asked, region=["cat", "dog"], threshold=0.9)
    assert differ(inside[0], inside.before[0]) < differ(everywhere[0], everywhere.before[0])
    assert close(tiny_pipe.edit(None, **asked, region=["cat"], threshold=1.0)[0], everywhere.before[0])


def test_a_region_counts_inside_a_mask_too(tiny_pipe):
    """No place is hotter than 1, so that no latent may change from the fifth part of the steps on."""
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 32, 16))
    asked = {"source": "a red cat", "target": "a red dog", "mask": mask, "cross": 0, "self_attention": 0} | FEW
    edits, inside = tiny_pipe.edit(photo(), **asked), tiny_pipe.edit(photo(), **asked, region="cat", threshold=1.0)
    assert differ(inside[0], edits[0]) > 0
    assert (array(inside[0]) == array(photo()))[16:].all()
    rebuilt = tiny_pipe.edit(photo(), **asked | {"target": "a red cat", "guidance": 1})[0]
    assert close(inside[0], rebuilt)


# ------------------------------------------------------------------------------------------------------ batches, recipes


def test_levels_that_are_given_are_the_steps(tiny_pipe):
    edited = tiny_pipe.edit(photo(), source="a cat", target="a dog", spacing=[9.0, 2.0, 0.0], seed=3, progress=False)
    assert I.parse_parameters(edited[0].info["parameters"])[0]["steps"] == 2


@pytest.mark.parametrize("method", ["img2img", "prompt-to-prompt"])
def test_a_batch_of_edits_is_each_edit_by_itself(tiny_pipe, method):
    photos = [photo(seed=1), photo(40, 60, seed=2)]
    asked = {"source": "a cat", "target": "a dog", "method": method} | FEW
    batch = tiny_pipe.edit(photos, **asked)
    for k in range(2):
        assert same(batch[k], tiny_pipe.edit(photos[k], **asked | {"seed": 3 + k})[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"region": "cat"}, {"weights": {"a": 3}}, {"mask": True}])
def test_edits_in_one_network_call_are_those_made_one_by_one(tiny_pipe, method, options):
    """Each with its picture, its words and its seed; a prompt of another length goes by itself. Equal up to rounding."""
    if method == "img2img" and ("region" in options or "weights" in options):
        return
    if "mask" in options:
        options = {"mask": Image.new("L", (32, 32), 0)}
        options["mask"].paste(255, (8, 4, 20, 28))
    words = [("a cat", "a red dog"), ("a mat on a cat", "a mat on a dog"), ("a cat", "a dog, " * 6)]
    photos, common = [photo(seed=k) for k in range(3)], {"method": method, **options} | TWO
    batch = tiny_pipe.edit(photos, source=[w[0] for w in words], target=[w[1] for w in words], batch=8, **common)
    assert not same(batch[0], batch[1])
    for k, (source, target) in enumerate(words):
        alone = tiny_pipe.edit(photos[k], source=source, target=target, **common | {"seed": 3 + k})
        assert np.abs(array(batch[k]) - array(alone[0])).max() <= 2
        assert same(batch.before[k], photos[k])
        if method != "img2img":
            assert batch.reports[k].rebuilt == pytest.approx(alone.reports[0].rebuilt, abs=0.05)


def test_each_edit_takes_its_own_mask_and_negative(tiny_pipe):
    masks = [Image.new("L", (32, 32), 0) for _ in range(2)]
    for k, mask in enumerate(masks):
        mask.paste(255, (16 * k, 0, 16 * k + 16, 32))
    asked, negatives = {"source": "a cat", "target": "a dog"} | TWO, ["flat", "a red house"]
    edits = tiny_pipe.edit(photo(), mask=masks, negative=negatives, **asked)
    for k in range(2):
        alone = tiny_pipe.edit(photo(), mask=masks[k], negative=negatives[k], **asked | {"seed": 3 + k})[0]
        assert same(edits[k], alone)
        assert I.parse_parameters(edits[k].info["parameters"])[0]["negative"] == negatives[k]


def test_a_picture_from_noise_has_a_recipe_without_what_only_photos_have(tiny_pipe, tmp_path):
    edits = tiny_pipe.edit(None, source="a cat", target="a dog", **TWO)
    recipe = I.read_recipe(*edits.save(tmp_path / "a.png"))
    assert not {"strength", "inversion"} & recipe.keys()
    assert same(tiny_pipe.edit(None, **recipe, progress=False)[0], edits[0])


def test_one_photo_takes_several_targets(tiny_pipe):
    edits = tiny_pipe.edit(photo(), source="a cat", target=["a dog", "a red apple"], **TWO)
    assert same(edits[1], tiny_pipe.edit(photo(), source="a cat", target="a red apple", **TWO | {"seed": 4})[0])
    made = tiny_pipe.edit(None, source=["a cat", "a house"], target="a dog", **TWO)
    assert same(made.before[1], tiny_pipe.edit(None, source="a house", target="a dog", **TWO | {"seed": 4}).before[0])


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize(("inverted", "way"), [("ddim", "ddim"), ("null-text", "ddim"), ("edit-friendly", "edit_friendly")])
def test_a_photo_is_inverted_once_for_all_targets(tiny_pipe, monkeypatch, inverted, way, batch):
    targets, rows, plain = ["a dog", "a red apple", "a house"], [], getattr(inversion, way)
    options = TWO | {"source": "a cat", "method": "prompt-to-prompt", "inversion": inverted, "guidance": 2.0}
    alone = [tiny_pipe.edit(photo(), target=t, **options | {"seed": TWO["seed"] + k}) for k, t in enumerate(targets)]
    monkeypatch.setattr(inversion, way, lambda denoise, z, *rest, **more: rows.append(len(z)) or plain(denoise, z, *rest, **more))
    edits = tiny_pipe.edit(photo(), target=targets, batch=batch, **options)
    assert sum(rows) == (3 if inverted == "edit-friendly" else 1)  # which draws other noise for each
    for k in range(3):
        assert close(edits[k], alone[k][0])
        assert batch > 1 or same(edits[k], alone[k][0])
        assert edits.reports[k].rebuilt == pytest.approx(alone[k].reports[0].rebuilt, abs=0.05)
    rows.clear()
    tiny_pipe.edit([photo(), photo(seed=1), photo()], target=targets, batch=batch, **options)
    assert sum(rows) == 3


@pytest.mark.parametrize("way", ["edit-friendly", "ddim", "null-text"])
def test_an_inversion_shows_how_far_it_is(tiny_pipe, capsys, way):
    options = TWO | {"source": "a cat", "target": "a dog", "method": way, "guidance": 2.0}
    tiny_pipe.edit(photo(), **options | {"progress": False})
    assert not capsys.readouterr().err
    tiny_pipe.edit(photo(), **options | {"progress": True})
    begun = [line.startswith("inversion: ") for line in capsys.readouterr().err.split("\r") if "  0%" in line]
    assert begun == [True, True, False][way != "null-text" :]


@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_makes_the_edit_again(tiny_pipe, tmp_path, method):
    extra = {"words": "refine", "cross": 0.5, "self_attention": 0.25} if method == "prompt-to-prompt" else {}
    if method != "img2img":
        extra |= {"region": ["cat", "red dog"], "weights": {"red": 1.5}, "threshold": 0.3}
    edits = tiny_pipe.edit(
        photo(), source="a cat", target="a red dog", method=method, guidance=3.0, negative="flat", **extra, **TWO
    )
    (path,) = edits.save(tmp_path / "a.png")
    recipe = I.read_recipe(path)
    assert same(tiny_pipe.edit(photo(), **recipe, progress=False)[0], edits[0])


def test_some_edits_are_edits_and_pictures_add_up(tiny_pipe):
    found = tiny_pipe.edit(photo(), source="a cat", target=["a dog", "a cow", "a car"], method="img2img", **FEW)
    some = found[1:]
    assert isinstance(some, Edits)
    assert [*some] == [*found][1:]
    assert some.sheet().size[1] * 3 == found.sheet().size[1] * 2
    assert len(some.before) == len(some.reports) == 2
    both = found + tiny_pipe("a cat", **FEW)
    assert isinstance(both, I.Images)
    assert len(both) == 4


def test_the_sheet_shows_before_after_and_difference(tiny_pipe):
    edits = Edits([photo(seed=1), photo(seed=2)], [photo(seed=1), photo(seed=3)], [None, None])
    sheet = edits.sheet()
    assert sheet.width == 96
    row = sheet.height // 2
    assert same(sheet.crop((0, 0, 32, 32)), photo(seed=1))
    assert array(sheet.crop((64, 0, 96, 32))).max() == 0
    assert same(sheet.crop((32, row, 64, row + 32)), photo(seed=2))
    assert array(sheet.crop((64, row, 96, row + 32))).max() > 0


def test_the_attention_to_a_word_is_a_picture_of_it(tiny_pipe):
    found = tiny_pipe.attention("a red cat on a mat", ["cat", "red cat"], sampler="dpmpp_2m", **FEW)
    assert len(found) == 3
    assert close(found[0], tiny_pipe("a red cat on a mat", sampler="dpmpp_2m", **FEW)[0])
    assert not same(found[1], found[2])
    hot = editing.over(Image.new("RGB", (8, 8), "gray"), torch.eye(8))
    assert array(hot)[0, 0, 0] > array(hot)[0, 7, 0] + 40


def test_what_is_no_number_makes_no_picture(tiny_pipe, monkeypatch):
    unet = deepcopy(tiny_pipe.unet)
    unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="U-Net"):
        replace(tiny_pipe, unet=unet).attention("a cat", "cat", **FEW)
    z = torch.zeros(1, 4, 8, 8)
    monkeypatch.setattr(editing, "run", lambda *_: editing.Result(old=z * torch.nan, new=z, z=None))
    with pytest.raises(NonFiniteError, match="U-Net"):
        tiny_pipe.edit(None, source="a cat", target="a dog", **FEW)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting",
    [partial(default_dtype, torch.float64), partial(torch.device, "meta"), torch.inference_mode],
    ids=["dtype", "meta", "inference"],
)
def test_what_the_caller_has_set_changes_nothing(tiny_pipe, setting):
    calls = [partial(tiny_pipe.attention, "a cat", "cat", **FEW)]
    for options in ({"region": "cat"}, {"method": "null-text"}, {"method": "edit-friendly"}, {"words": "replace"}):
        calls.append(partial(tiny_pipe.edit, photo(), source="a cat", target="a big dog", **options, **TWO))
    for call in calls:
        expected = call()
        with setting():
            assert all(map(same, call(), expected))


def test_attention_is_shown_under_autocast(tiny_pipe):
    with torch.autocast("cpu"):
        assert len(tiny_pipe.attention("a cat", "cat", **FEW)) == 2


def test_where_memory_runs_out_recordings_are_given_up_and_all_begins_anew(tiny_pipe, monkeypatch):
    monkeypatch.setattr(graphs, "everywhere", WeakSet())
    recordings = graphs.Recordings("network", torch.nn.Identity(), lambda run: ((lambda: None), run()))
    edit = partial(tiny_pipe.edit, None, source="a cat", target="a dog", region="cat", **FEW)
    calls, denoiser, fails = [], editing.Maker.denoiser, lambda: False

    def watched(maker, attend):
        own = denoiser(maker, attend)

        def network(*inputs):
            calls.append(out := own.network(*inputs))  # after the attention was looked at
            if fails():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return out

        return replace(own, network=network)

    monkeypatch.setattr(editing.Maker, "denoiser", watched)
    for make in (edit, partial(tiny_pipe.attention, "a cat", "cat", **FEW)):
        calls.clear()
        fails = lambda: False  # noqa: E731
        expected, n = make(), len(calls)
        recordings.run(lambda x: x + 1, [torch.zeros(1)])
        calls.clear()
        fails = lambda: len(calls) == 2 and any(recordings.known.values())  # noqa: E731
        with pytest.warns(UserWarning, match="memory ran out: recorded kernels are given up"):
            assert all(map(same, make(), expected))
        assert len(calls) == n + 2
        fails = lambda: True  # noqa: E731
        with pytest.raises(MemoryError, match=r"too little memory for these pictures: .*batch"):
            make()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, ["method", "img2img", "magic"]),
        ({"strength": 2}, ["strength", "from 0 to 1"]),
        ({"cross": 1.1}, ["cross", "1.1"]),
        ({"self_attention": -1}, ["self_attention", "-1"]),
        ({"words": "swap"}, ["words", "replace", "swap"]),
        ({"inversion": "magic"}, ["inversion", "magic"]),
        ({"inversion": "img2img"}, ["inversion", "one of ddim", "img2img"]),
        ({"method": "ddim", "cross": 0.3}, ["cross", "prompt-to-prompt"]),
        ({"region": "elephant"}, ["region", "elephant"]),
        ({"weights": {"elephant": 2}}, ["weights", "elephant"]),
        ({"weights": {"dog": float("inf")}}, ["weights", "inf"]),
        ({"weights": "dog"}, ["weights", "dictionary"]),
        ({"threshold": 3}, ["threshold"]),
        ({"source": 5}, ["source"]),
        ({"source": ["a"] * 2, "target": ["b"] * 3}, ["source", "target", "(3)", "got 2"]),
        ({"photo": [photo()] * 2, "target": ["a dog"] * 3}, ["photo", "(3)", "got 2"]),
        ({"batch": 0}, ["batch", "0"]),
        ({"target": ""} | {"region": "dog"}, ["region", "dog"]),
        ({"mask": Image.new("L", (5, 5), 255)}, ["mask", "5×5"]),
        ({"mask": Image.new("L", (32, 32))}, ["mask", "black"]),
        ({"mask": 5}, ["mask", "5"]),
        ({"mask": [Image.new("L", (32, 32), 255)] * 2, "target": ["a dog"] * 3}, ["photo and mask", "(3)", "got 2"]),
        ({"negative": ["a", "b"], "target": ["a dog"] * 3}, ["negative", "(3)", "got 2"]),
        ({"negative": []}, ["negative", "empty"]),
        ({"photo": None, "method": "ddim"}, ["photo"]),
        ({"photo": None, "strength": 0.3}, ["photo", "strength"]),
        ({"photo": None, "inversion": "ddim"}, ["photo", "inversion"]),
        ({"photo": None, "blur": 5}, ["photo", "blur"]),
        ({"photo": []}, ["photo", "empty"]),
        ({"method": "img2img", "region": "dog"}, ["region", "img2img"]),
        ({"steps": 0}, ["steps"]),
        ({"blur": 2}, ["blur", "mask"]),
        ({"guidance": "cfg(3) + pag(2)"}, ["guidance", "a number", "no rules", "pag(2)"]),
        ({"guidance": pag(2.0)}, ["guidance", "a number", "no rules", "pag(2)"]),
        ({"guidance": float("nan")}, ["guidance", "nan"]),
    ],
)
def test_bad_input_is_refused_by_name_before_computing(tiny_pipe, options, words):
    class Blind:
        factor = tiny_pipe.vae.factor

    blind = replace(tiny_pipe, vae=Blind(), unet=None)
    asked = {"photo": photo(), "source": "a cat", "target": "a dog"} | FEW | options
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are checked below
        blind.edit(asked.pop("photo"), **asked)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("change", [{"in_channels": 9}, {"in_channels": 8}, {"time_cond_dim": 16}])
def test_models_that_edit_in_another_way_say_so(tiny_pipe, change):
    spec = tiny_pipe.spec
    task = {9: "inpaint", 8: "instruct"}.get(change.get("in_channels"), "text")
    other = replace(tiny_pipe, unet=None, vae=None, spec=replace(spec, unet=replace(spec.unet, **change)))
    assert other.spec.task == task
    with pytest.raises(ValueError, match=r"words need a .*; this one \(custom\) edits by pipe\(…, image=photo\)"):
        other.edit(photo(), source="a cat", target="a dog", **FEW)


def test_a_word_that_is_not_in_the_prompt_has_no_map(tiny_pipe, monkeypatch):
    monkeypatch.setattr(TextEncoder, "encode", lambda *_, **__: pytest.fail("computed"))
    with pytest.raises(ValueError, match=r"word must be a word of the prompt 'a cat', got 'dog'"):
        tiny_pipe.attention("a cat", "dog", **FEW)
