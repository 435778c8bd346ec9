"""The pipeline: the same picture as diffusers', whatever the batch, and never one from bad input."""

import copy
import os
import pkgutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import latentdiff
from latentdiff import images as I
from latentdiff import request
from latentdiff.checkpoints.families import SD15, SamplingSpec, ScheduleSpec, noise_schedule
from latentdiff.checkpoints.save import save_folder
from latentdiff.conditioning import TextEncoder
from latentdiff.diffusion.samplers import SAMPLERS, Step, ddim
from latentdiff.models.unet import rows_of
from latentdiff.pipeline import Pipeline

LONG = " ".join(f"a {colour} cat and a dog," for colour in ("red", "blue", "quick", "brown", "flat"))
FEW = {"steps": 3, "progress": False}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


def of_parts(parts) -> Pipeline:
    text = TextEncoder(parts.text_encoders, parts.tokenizers, parts.spec)
    return Pipeline(unet=parts.unet, vae=parts.vae, text=text, spec=parts.spec, title=parts.title)


# ------------------------------------------------------------------------------------------------------- the field's picture

SD = {
    "schedule": ScheduleSpec(),
    "prediction": "eps",
    "sampling": SamplingSpec(spacing="leading", steps_offset=1, final="sigma_min"),
}


def through_diffusers(folder, prompt, negative, *, steps, guidance, seed, eta=0.0, n=1):
    """Pictures of diffusers' own pipeline, float in [0, 1], from the noise that our seed gives.

    Steps that divide 1000: with others its DDIM goes down to t - 1000 // steps, which is not where it then runs the network.
    """
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed + k) for k in range(n)]
    with torch.no_grad():
        return pipe(
            [prompt] * n, negative_prompt=negative and [negative] * n, num_inference_steps=steps, guidance_scale=guidance, eta=eta,
            generator=generator, output_type="np",
        ).images  # fmt: skip


def float_pictures(pipe, *args, **options) -> np.ndarray:
    """Our pictures before they are rounded to 8 bits, in [0, 1]."""
    *_, last = pipe.stream(*args, **options)
    decoded = pipe.decode(last.x / (1 + last.sigma**2).sqrt())
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.oracle
@pytest.mark.parametrize("changes", [{}, SD, SD | {"prediction": "v"}], ids=["v-cosine-trailing", "eps-sd-leading", "v-sd-leading"])
@pytest.mark.parametrize(("steps", "guidance", "eta"), [(5, 7.5, 0.0), (4, 1.0, 0.0), (8, 3.0, 0.7)])
def test_the_picture_is_diffusers_own(tiny_parts, tmp_path, changes, steps, guidance, eta):
    save_folder(tiny_parts(**changes), tmp_path / "m")
    pipe = latentdiff.load(tmp_path / "m", device="cpu", dtype="float32")
    asked = {"steps": steps, "guidance": guidance, "seed": 7, "eta": eta, "n": 2}
    ours = float_pictures(pipe, "a cat, flat style", negative="a dog", **asked)
    theirs = through_diffusers(tmp_path / "m", "a cat, flat style", "a dog", **asked)
    assert ours.std() > 0.1
    assert np.abs(ours[0] - ours[1]).mean() > 0.05
    assert np.abs(ours - theirs).max() < 1e-5


@pytest.mark.oracle
def test_the_picture_of_an_xl_model_is_diffusers_own(tiny_parts, tmp_path):
    """Two towers, pooled text, sizes, zeros for the absent negative."""
    parts = tiny_parts(**xl(tiny_parts))
    save_folder(parts, tmp_path / "m")
    pipe = latentdiff.load(tmp_path / "m", device="cpu", dtype="float32")
    for negative in (None, "a dog"):
        ours = float_pictures(pipe, "a cat", negative=negative, steps=4, seed=1, guidance=5.0)
        theirs = through_diffusers(tmp_path / "m", "a cat", negative, steps=4, guidance=5.0, seed=1)
        assert np.abs(ours - theirs).max() < 1e-5


SD_FILE = {  # what stands in the scheduler's file of SD 1.5, and the spacing that its class takes without a word of it
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "clip_sample": False,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("sampler", "name", "end"),
    [
        ("ddim", "DDIMScheduler", "final_alpha_cumprod"),
        ("plms", "PNDMScheduler", "final_alpha_cumprod"),
        ("ddpm", "DDPMScheduler", 1.0),
        ("lcm", "LCMScheduler", 1.0),  # its last step adds no noise
        ("tcd", "TCDScheduler", "alphas_cumprod"),  # its last step goes to t = 0
        ("euler", "EulerDiscreteScheduler", None),
        ("euler_ancestral", "EulerAncestralDiscreteScheduler", None),
        ("heun", "HeunDiscreteScheduler", None),
        ("lms", "LMSDiscreteScheduler", None),
        ("dpm2", "KDPM2DiscreteScheduler", None),
        ("dpm2_ancestral", "KDPM2AncestralDiscreteScheduler", None),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", None),
        ("dpmpp_2m_sde", "DPMSolverMultistepScheduler", None),
        ("unipc", "UniPCMultistepScheduler", None),
    ],
)
@pytest.mark.parametrize("steps", [4, 8, 20])
def test_the_grid_of_each_sampler_on_sd_is_diffusers_own(sampler, name, end, steps):
    """Of DPM++ and UniPC the last level alone: their "leading" divides the times by steps + 1 there.

    Left out are DEIS, which ends at the lowest level there and, as in other programs, at 0 here; and iPNDM, which has a grid of its
    own. A file without a spacing, such as SD 1.5's, leaves that to the class there, and to the model's file here.
    """
    theirs = getattr(pytest.importorskip("diffusers"), name).from_config(SD_FILE)
    theirs.set_timesteps(steps)
    unsaid = dict.fromkeys(("negative", "guidance", "spacing", "eta", "size", "batch"))
    asked = request.request(
        SD15, noise_schedule(SD15.schedule), 8, prompt="a", steps=steps, sampler=sampler, rescale=0.0, seed=0, n=1, **unsaid
    )
    if end is None:
        levels = sorted(set(theirs.sigmas.tolist()), reverse=True)  # where a step evaluates twice, each stands there twice
    else:
        last = getattr(theirs, end).flatten()[0].item() if isinstance(end, str) else end
        abar = [*(theirs.alphas_cumprod[int(t)].item() for t in dict.fromkeys(theirs.timesteps.tolist())), last]
        levels = [((1 - a) / a) ** 0.5 for a in abar]
    assert asked.sigmas[-1].item() == pytest.approx(levels[-1], rel=1e-4)
    if not name.endswith("MultistepScheduler"):
        assert asked.sigmas.tolist() == pytest.approx(levels, rel=1e-4)


def xl(tiny_parts) -> dict:
    """The changes that make the tiny model an SDXL."""
    spec = tiny_parts().spec
    (tower,) = spec.towers
    towers = (replace(tower, layer=-2, final_norm=False), replace(tower, layer=-2, final_norm=False, projection=24, pooled=True))
    unet = replace(spec.unet, context_dim=64, vector_dim=24 + 6 * 256, attention=(False, True), linear_projection=True)
    vae = replace(spec.vae, force_upcast=True)
    return SD | {"towers": towers, "unet": unet, "vae": vae, "vector": "size", "zero_empty_negative": True}


# ------------------------------------------------------------------------------------------------------------ same pictures


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_of_a_batch_is_its_own_run(tiny_pipe, sampler):
    batch = tiny_pipe("a cat", negative="a dog", seed=2**63 - 2, n=3, sampler=sampler, **FEW)
    for k in (0, 2):
        assert same(batch[k], tiny_pipe("a cat", negative="a dog", seed=2**63 - 2 + k, sampler=sampler, **FEW)[0])
    assert not same(batch[0], batch[1])


def test_a_list_of_prompts_is_each_prompt_by_itself(tiny_pipe):
    """Prompts of different lengths, so that one of them would have to be padded to share a batch."""
    batch = tiny_pipe(["a cat", LONG], negative=["", "a dog"], n=2, seed=5, **FEW)
    assert [I.parse_parameters(i.info["parameters"])[0]["seed"] for i in batch] == [5, 6, 7, 8]
    for k, (prompt, negative) in enumerate([("a cat", None), ("a cat", ""), (LONG, "a dog"), (LONG, "a dog")]):
        assert same(batch[k], tiny_pipe(prompt, negative=negative, seed=5 + k, **FEW)[0])


def test_network_batches_change_rounding_alone(tiny_pipe):
    one = float_pictures(tiny_pipe, ["a cat", LONG, "a dog"], n=2, seed=1, steps=3)
    for batch in (2, 8):
        assert np.abs(one - float_pictures(tiny_pipe, ["a cat", LONG, "a dog"], n=2, seed=1, steps=3, batch=batch)).max() < 1e-4


def test_guidance_one_is_the_prompt_alone_at_half_the_cost(tiny_parts):
    parts = tiny_parts()
    calls: list[int] = []
    parts.unet.register_forward_pre_hook(lambda module, args: calls.append(rows_of(args[2])))
    pipe = of_parts(parts)
    alone = pipe("a cat", negative="a dog", guidance=1, seed=1, **FEW)[0]
    assert calls == [1] * 3
    assert same(alone, pipe("a cat", guidance=1.0, seed=1, **FEW)[0])
    nearly = pixels(pipe("a cat", guidance=1 + 1e-6, seed=1, **FEW)[0])
    assert calls[3:] == [1] * 3 + [2] * 3
    assert np.abs(nearly - pixels(alone)).max() <= 1


def test_the_same_call_gives_the_same_bytes_after_another_and_in_another_process(tiny_folder, tiny_pipe):
    import subprocess
    import sys

    first = tiny_pipe("a cat", seed=3, n=2, sampler="ddpm", **FEW)
    tiny_pipe("a dog", seed=9, **FEW)
    assert all(map(same, first, tiny_pipe("a cat", seed=3, n=2, sampler="ddpm", **FEW)))
    code = (
        f"import latentdiff, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        f"pipe = latentdiff.load({str(tiny_folder)!r}, device='cpu', dtype='float32')\n"
        "print(*[i.tobytes().hex() for i in pipe('a cat', seed=3, n=2, sampler='ddpm', steps=3, progress=False)])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == [i.tobytes().hex() for i in first]


def test_two_threads_share_a_pipeline(tiny_pipe):
    calls = [{"prompt": p, "seed": s, "sampler": sampler} for s, (p, sampler) in enumerate([("a cat", "ddpm"), (LONG, "ddim")] * 5)]
    serial = [tiny_pipe(**call, **FEW)[0] for call in calls]
    found: dict[int, Image.Image] = {}

    def work(which):
        for k in which:
            found[k] = tiny_pipe(**calls[k], **FEW)[0]

    threads = [threading.Thread(target=work, args=(range(start, 10, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    assert all(same(serial[k], found[k]) for k in range(10))


def test_global_randomness_is_neither_used_nor_touched(tiny_pipe):
    state = torch.get_rng_state()
    tiny_pipe("a cat", sampler="ddpm", **FEW)
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------------------------- recipes


def test_a_recipe_gives_the_picture_again(tiny_pipe, tmp_path):
    prompt = 'a "cat",\nNegative prompt: dog\nSteps: 4, Seed: 3, Size: 8x8 😀'
    made = tiny_pipe(
        prompt, negative="x, y", n=2, seed=11, size=(16, 24), guidance=3.3, rescale=0.3, eta=0.5, spacing="leading", **FEW
    )
    made.save(tmp_path / "a.png")
    recipe = latentdiff.read_recipe(tmp_path / "a-2.png")
    assert recipe == {
        "prompt": prompt, "negative": "x, y", "steps": 3, "sampler": "ddim", "spacing": "leading", "eta": 0.5, "guidance": 3.3,
        "rescale": 0.3, "seed": 12, "size": (16, 24),
    }  # fmt: skip
    assert same(tiny_pipe(**recipe, progress=False)[0], made[1])
    assert same(Image.open(tmp_path / "a-2.png"), made[1])


def test_a_recipe_says_the_model_and_no_path(tiny_folder, tiny_pipe):
    text = tiny_pipe("a cat", **FEW)[0].info["parameters"]
    assert f"Model: tiny, Precision: float32, Version: latentdiff {latentdiff.__version__}" in text
    assert "/" not in text
    assert str(tiny_folder.parent.name) not in text


def test_a_drawn_seed_is_reported(tiny_pipe):
    for seed in (None, -1):
        first, second = tiny_pipe("a cat", n=2, seed=seed, **FEW)
        recipes = [I.parse_parameters(image.info["parameters"])[0] for image in (first, second)]
        assert 0 <= recipes[0]["seed"] == recipes[1]["seed"] - 1 < 2**32
        assert same(tiny_pipe(**recipes[1], progress=False)[0], second)


def test_seeds_wrap_around(tiny_pipe):
    images = tiny_pipe("a cat", n=2, seed=2**64 - 1, **FEW)
    assert [I.parse_parameters(i.info["parameters"])[0]["seed"] for i in images] == [2**64 - 1, 0]
    assert same(images[1], tiny_pipe("a cat", seed=0, **FEW)[0])


def test_an_own_grid_is_part_of_the_recipe(tiny_pipe):
    levels = [20.0, 3.3, 1 / 3, 0.0]
    made = tiny_pipe("a cat", spacing=levels, seed=1, **FEW)[0]
    recipe = I.parse_parameters(made.info["parameters"])[0]
    assert recipe["spacing"] == levels
    assert same(made, tiny_pipe(**recipe, progress=False)[0])
    assert same(made, tiny_pipe("a cat", spacing=levels, seed=1, progress=False)[0])  # as many steps as the levels make


# -------------------------------------------------------------------------------------------------------------------- stream


def test_the_stream_shows_every_step_and_the_call_is_its_end(tiny_pipe):
    steps = list(tiny_pipe.stream("a cat", steps=4, seed=2))
    assert [s.i for s in steps] == [0, 1, 2, 3]
    assert {s.steps for s in steps} == {4}
    assert [s.sigma.item() for s in steps] == steps[0].request.sigmas[1:].tolist()
    assert steps[0].x.dtype == torch.float32
    assert same(steps[-1].images()[0], tiny_pipe("a cat", steps=4, seed=2, progress=False)[0])
    assert same(steps[-1].preview()[0], steps[-1].images()[0])  # at sigma 0 the state is the estimate
    assert not same(steps[0].preview()[0], steps[-1].preview()[0])
    assert steps[0].preview()[0].size == (32, 32)


@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_torchs_defaults_change_nothing(tiny_pipe, dtype):
    """As people set them for a large model beside ours. The default device is then a GPU; here one that only knows sizes."""
    asked = {"prompt": ["a (cat:1.2)", "a cat AND a dog :0.3"], "guidance": "cfg(3) + freeu()", "sampler": "pndm karras", "seed": 1}
    *_, expected = tiny_pipe.stream(**asked, steps=5)  # between whole times
    pipe = replace(tiny_pipe)  # with no schedule yet
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        torch.set_default_device("meta")
        *_, made = pipe.stream(**asked, steps=5)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert made.x.dtype == torch.float32
    assert torch.equal(made.x, expected.x)


def test_the_finished_picture_alone_has_a_recipe(tiny_pipe):
    photo = tiny_pipe("a dog", seed=5, **FEW)[0]
    for options in ({}, {"image": photo, "strength": 0.5}):
        *_, middle, last = tiny_pipe.stream("a cat", steps=3, seed=2, **options)
        for made in (middle.preview(), middle.images(), last.preview()):
            assert "parameters" not in made[0].info
        assert I.parse_parameters(last.images()[0].info["parameters"])[0]["seed"] == 2

    def early(denoise, x, sigmas, *, randn):
        yield next(ddim(denoise, x, sigmas, randn=randn))

    assert "Seed: 2" in tiny_pipe("a cat", seed=2, sampler=early, **FEW)[0].info["parameters"]


def test_a_cancelled_run_leaves_the_pipeline_as_it_was(tiny_pipe):
    before = tiny_pipe("a cat", seed=2, sampler="ddpm", **FEW)[0]
    for step in tiny_pipe.stream("a dog", sampler="ddpm", steps=4):
        if step.i == 1:
            break
    half = tiny_pipe.stream("a dog", steps=4)
    next(half)
    half.close()
    assert same(before, tiny_pipe("a cat", seed=2, sampler="ddpm", **FEW)[0])
    assert torch.is_grad_enabled()


def test_the_caller_of_a_stream_keeps_its_gradients(tiny_pipe):
    for _ in tiny_pipe.stream("a cat", steps=2):
        assert torch.is_grad_enabled()


def test_a_function_of_the_user_is_a_sampler(tiny_pipe):
    def slow_euler(denoise, x, sigmas, *, randn):
        for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            x0 = denoise(x, sigma)
            x = x + (x - x0) / sigma * (sigma_next - sigma)
            yield Step(i, sigma_next, x, x0)

    mine = tiny_pipe("a cat", seed=1, sampler=slow_euler, **FEW)[0]
    assert np.abs(pixels(mine) - pixels(tiny_pipe("a cat", seed=1, sampler="ddim", **FEW)[0])).max() <= 1
    assert "Sampler: slow_euler" in mine.info["parameters"]
    assert same(tiny_pipe("a cat", seed=1, sampler=partial(ddim, eta=0.5), **FEW)[0], tiny_pipe("a cat", seed=1, eta=0.5, **FEW)[0])

    def silent(denoise, x, sigmas, *, randn):
        yield from ()

    with pytest.raises(ValueError, match="sampler must yield at least one Step"):
        tiny_pipe("a cat", sampler=silent, **FEW)


def test_names_of_other_programs_are_understood(tiny_pipe):
    made = tiny_pipe("a cat", seed=1, sampler="DPM++ 2M Karras", **FEW)[0]
    recipe = I.parse_parameters(made.info["parameters"])[0]
    assert (recipe["sampler"], recipe["spacing"]) == ("dpmpp_2m", "karras")
    assert same(made, tiny_pipe("a cat", seed=1, sampler="dpmpp_2m", spacing="Karras", **FEW)[0])
    assert same(made, tiny_pipe(**recipe, progress=False)[0])


def test_progress_goes_to_stderr_and_can_be_off(tiny_pipe, capsys):
    tiny_pipe("a cat", steps=3)
    out, err = capsys.readouterr()
    assert "3/3" in err
    assert out == ""
    tiny_pipe("a cat", steps=3, progress=False)
    assert capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------------------- any prompt


@pytest.mark.parametrize("prompt", ["", " ", "😀👩‍👩‍👧", "שלום עולם", "a\0cat", "!", "<|endoftext|>", "(((", "\n"])
def test_odd_prompts_make_pictures(tiny_pipe, prompt):
    image = tiny_pipe(prompt, seed=1, **FEW)[0]
    recipe = I.parse_parameters(image.info["parameters"])[0]
    assert recipe["prompt"] == prompt
    assert pixels(image).std() > 10


def test_nothing_of_a_long_prompt_is_cut(tiny_pipe):
    """The last word counts, also of 10,000 tokens."""
    start = "a red cat, " * 2500
    assert len(tiny_pipe.text.tokenizers[0](start)) == 10_000
    ends = [tiny_pipe(start + end, seed=1, steps=1, progress=False)[0] for end in ("dog", "house")]
    assert not same(*ends)


def test_any_size(tiny_pipe):
    assert tiny_pipe("a cat", size=(44, 4), **FEW)[0].size == (44, 4)
    assert tiny_pipe("a cat", size=12, **FEW)[0].size == (12, 12)
    assert tiny_pipe("a cat", size=(np.int64(12), 4), **FEW)[0].size == (12, 4)  # as steps, seed and n may be
    assert tiny_pipe("a cat", **FEW)[0].size == (32, 32)


@pytest.mark.parametrize("options", [{}, {"cache": 2}])
def test_another_unet_in_a_pipeline_is_the_one_that_runs(options):
    pipe = latentdiff.load(device="cpu", **options)
    other = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(0.97)
    found = replace(pipe, unet=other)("a cat", steps=3, seed=1, progress=False)[0]
    assert same(found, replace(pipe, unet=other, network=None)("a cat", steps=3, seed=1, progress=False)[0])
    assert not same(found, pipe("a cat", steps=3, seed=1, progress=False)[0])
    replace(pipe, unet=copy.deepcopy(pipe.unet).float())("a cat", steps=2, progress=False)


def test_a_function_may_stand_for_the_unet(tiny_pipe):
    calls = []

    def network(*inputs, **seams):
        calls.append(inputs[0].shape)
        return tiny_pipe.unet(*inputs, **seams)

    made = replace(tiny_pipe, network=network)("a cat", seed=1, **FEW)[0]
    assert len(calls) == FEW["steps"]
    assert same(made, tiny_pipe("a cat", seed=1, **FEW)[0])


def test_an_own_sampler_of_a_known_name_is_not_taken_for_that(tiny_pipe):
    def own(denoise, x, sigmas, *, randn):
        yield from SAMPLERS["heun"](denoise, x, sigmas, randn=randn)

    own.__name__ = "ddim"
    for sampler, name in ((own, "own ddim"), (SAMPLERS["ddim"], "ddim"), (SAMPLERS["heun"], "heun")):
        made = tiny_pipe("a cat", sampler=sampler, **FEW)[0]
        recipe = I.parse_parameters(made.info["parameters"])[0]
        assert recipe["sampler"] == name
    with pytest.raises(ValueError, match=r"sampler must be one of .*, got 'own ddim'"):
        tiny_pipe("a cat", sampler="own ddim", **FEW)


def test_a_size_far_from_the_models_own_is_told_of(tiny_pipe):
    for size in ((64, 36), (12, 12)):
        with pytest.warns(UserWarning, match=f"size {size[0]}×{size[1]} has .* times the pixels of this model's own 32×32"):
            tiny_pipe.stream("a cat", size=size)
    with warnings.catch_warnings(action="error"):
        for size in (32, (64, 32), (16, 32)):
            tiny_pipe.stream("a cat", size=size)
        tiny_pipe.stream("a cat", image=Image.new("RGB", (64, 64)))  # a picture, made larger, shows what goes where


# ------------------------------------------------------------------------------------------------------------------ bad input

BAD = [
    ({"steps": 0}, r"steps must be an integer from 1 to 1000, got 0"),
    ({"steps": -1}, r"steps must be an integer from 1 to 1000, got -1"),
    ({"steps": 1001}, r"steps must be an integer from 1 to 1000, got 1001"),
    ({"steps": "many"}, r"steps must be .*, got 'many'"),
    ({"steps": 2.5}, r"steps must be .*, got 2.5"),
    ({"steps": True}, r"steps must be .*, got True"),
    ({"guidance": float("nan")}, r"guidance must be a finite number, got nan"),
    ({"guidance": float("inf")}, r"guidance must be a finite number, got inf"),
    ({"guidance": "high"}, r"guidance must be a number or a sum of .*, got 'high'"),
    ({"rescale": 1.5}, r"rescale must be a number from 0 to 1, got 1.5"),
    ({"eta": -0.1}, r"eta must be a number from 0 to 1, got -0.1"),
    ({"eta": 0.5, "sampler": "ddpm"}, r"eta must be None for the sampler ddpm"),
    ({"size": 13}, r"size must be one side, or \(width, height\), in multiples of 4 from 4 to 16384 pixels, got 13"),
    ({"size": 0}, r"size must be .*, got 0"),
    ({"size": -8}, r"size must be .*, got -8"),
    ({"size": (32, 32, 32)}, r"size must be .*, got \(32, 32, 32\)"),
    ({"size": (32, 30)}, r"size must be .*, got \(32, 30\)"),
    ({"size": "big"}, r"size must be .*, got 'big'"),
    ({"size": 10**9}, r"size must be .*, got 1000000000"),
    ({"n": 0}, r"n must be an integer from 1 to 10000, got 0"),
    ({"n": -3}, r"n must be .*, got -3"),
    ({"n": 10**9}, r"n must be .*, got 1000000000"),
    ({"batch": 0}, r"batch must be .*, got 0"),
    ({"sampler": "ddmi"}, r"sampler must be one of .*ddim, .*, got 'ddmi'"),
    ({"sampler": 7}, r"sampler must be one of .*ddim, .*, got 7"),
    ({"spacing": "even"}, r"spacing must be one of leading, .*, got 'even'"),
    ({"spacing": [1.0, 2.0]}, r"spacing must"),
    ({"spacing": [1.0]}, r"spacing must have steps \+ 1 = 2 noise levels, got"),
    ({"guidance": 10**400}, r"guidance must be a finite number, got 1000"),
    ({"guidance": "pag(2, 3)"}, r"layers must be names such as 'mid_block', got 3"),
    (
        {"guidance": "cfg(3) + pag(2, 'mid_block', 'upblocks')"},
        r"guidance must name layers with self-attention, in down_blocks\.0, .*'upblocks'",
    ),
    ({"exact": False}, r"exact needs image, the picture to start from, got none"),
    ({"exact": "no"}, r"exact must be True or False, got 'no'"),
    ({"prompt": None, "image": [Image.new("RGB", (8, 8))] * 2}, r"prompt must be a text or a list of texts, got None"),
    ({"prompt": ["a"] * 10_001}, r"prompt must be at most 10,000 texts, got 10,001"),
    ({"prompt": "([" * 7000 + "a" + ":0])" * 7000}, r"prompt must have weights from -1000 to 1000, got .* of 'a'"),
    ({"spacing": 3}, r"spacing must be .*, got 3"),
    ({"seed": 2**64}, r"seed must be an integer from 0 to 18446744073709551615, got 18446744073709551616"),
    ({"seed": -2}, r"seed must be .*, got -2"),
    ({"seed": "lucky"}, r"seed must be .*, got 'lucky'"),
    ({"seed": 1.0}, r"seed must be .*, got 1.0"),
    ({"prompt": None}, r"prompt must be a text or a list of texts, got None"),
    ({"prompt": []}, r"prompt must be .* at least one text, got an empty list"),
    ({"prompt": ["a", 3]}, r"prompt must be .*, got \['a', 3\]"),
    ({"prompt": "x" * 100_001}, r"prompt must have at most 100,000 characters, got 100,001"),
    ({"prompt": "\ud800"}, r"prompt must be proper Unicode"),
    ({"negative": 5}, r"negative must be a text or a list of texts, got 5"),
    ({"negative": ["a", "b"]}, r"negative must be one text, or one a prompt \(1\), got 2"),
]


@pytest.mark.parametrize(("bad", "message"), BAD, ids=[f"{next(iter(b))}-{i}" for i, (b, _) in enumerate(BAD)])
def test_bad_input_is_refused_before_any_computing(tiny_parts, bad, message):
    pipe = of_parts(tiny_parts())
    for part in (pipe.unet, pipe.vae, *pipe.text.towers):
        part.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    arguments = {"prompt": "a cat", **bad}
    with pytest.raises(ValueError, match=message):
        pipe(**arguments)
    with pytest.raises(ValueError, match=message):
        pipe.stream(**arguments)  # at the call, not at the first step


def test_a_misspelt_keyword_is_a_type_error(tiny_pipe):
    for call in (tiny_pipe, tiny_pipe.stream, latentdiff.load):
        with pytest.raises(TypeError, match="guidence"):
            call("a cat", guidence=3)


def test_models_that_need_a_picture_say_so(tiny_parts):
    parts = tiny_parts(unet=replace(tiny_parts().spec.unet, in_channels=9))
    with pytest.raises(ValueError, match="works on a picture"):
        of_parts(parts)("a cat")


# ---------------------------------------------------------------------------------------------------------- never a black one


def overflowing(parts, which: str):
    """The model in float16, with one stage whose numbers only float32 can hold."""
    for part in (parts.unet, parts.vae, *parts.text_encoders):
        part.half()
    stage = {"U-Net": parts.unet, "VAE": parts.vae, "text encoder": parts.text_encoders[0]}[which]

    def poison(module, args, output):
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.dtype == torch.float16:
            tensor[..., 0] = torch.inf

    if which == "VAE":
        stage.decoder.register_forward_hook(poison)
    else:
        stage.register_forward_hook(poison)
    return of_parts(parts)


@pytest.mark.parametrize("stage", ["text encoder", "U-Net", "VAE"])
def test_a_stage_that_overflows_runs_again_in_float32(tiny_parts, stage):
    good = of_parts(tiny_parts())("a cat", seed=1, **FEW)[0]
    pipe = overflowing(tiny_parts(), stage)
    with pytest.warns(UserWarning, match=f"the {stage} gave NaN or infinity in torch.float16; computing again in float32"):
        image = pipe("a cat", seed=1, **FEW)[0]
    assert np.abs(pixels(image) - pixels(good)).mean() < 4
    assert pipe.dtype == torch.float16  # the model itself was left alone


def test_a_picture_that_overflows_leaves_the_others_of_its_batch_as_they_are(tiny_parts):
    parts = tiny_parts()
    pipe = overflowing(parts, "text encoder")
    parts.text_encoders[0].float()._forward_hooks.clear()
    alone = [pipe("a cat", seed=k, **FEW)[0] for k in (1, 3)]
    calls = []

    def poison(module, args, output):
        calls.append(output.dtype)
        if output.dtype == torch.float16 and len(calls) % 3 == 2:  # a CPU takes one picture at a time
            output[..., 0] = torch.inf

    parts.unet.register_forward_hook(poison)
    with pytest.warns(UserWarning, match="the U-Net gave NaN or infinity"):
        batch = pipe("a cat", seed=1, n=3, **FEW)
    assert same(batch[0], alone[0])
    assert same(batch[2], alone[1])
    good = of_parts(tiny_parts())("a cat", seed=2, **FEW)[0]
    assert np.abs(pixels(batch[1]) - pixels(good)).mean() < 4


def test_a_photo_that_overflows_leaves_the_others_of_its_batch_as_they_are(tiny_parts):
    parts = tiny_parts()
    parts.vae.half()
    photos = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pipe, calls = of_parts(parts), []
    alone = pipe.encode(photos[:1])

    def poison(module, args, output):
        calls.append(output.dtype)
        if output.dtype == torch.float16 and len(calls) == 2:
            output[..., 0] = torch.inf

    parts.vae.encoder.register_forward_hook(poison)
    with pytest.warns(UserWarning, match="the VAE gave NaN or infinity"):
        z = pipe.encode(photos)
    assert torch.equal(z[:1], alone)
    assert z.isfinite().all()


@pytest.mark.parametrize("stage", ["text encoder", "U-Net", "VAE"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_stage_is_an_error_that_names_it(tiny_parts, stage, value):
    parts = tiny_parts()
    broken = {
        "U-Net": parts.unet.conv_out,
        "VAE": parts.vae.decoder.conv_out,
        "text encoder": parts.text_encoders[0].text_model.final_layer_norm,
    }
    broken[stage].bias.data[0] = value
    with pytest.raises(latentdiff.NonFiniteError, match=f"the {stage} gave NaN or infinity"):
        of_parts(parts)("a cat", **FEW)


def test_half_precision_is_near_and_keeps_a_float32_state(tiny_folder, tiny_pipe):
    good = pixels(tiny_pipe("a cat", seed=1, **FEW)[0])
    for dtype, far in (("float16", 2), (torch.bfloat16, 12)):
        pipe = latentdiff.load(tiny_folder, device="cpu", dtype=dtype)
        *_, last = pipe.stream("a cat", seed=1, steps=3)
        assert last.x.dtype == torch.float32
        assert np.abs(pixels(last.images()[0]) - good).mean() < far


# -------------------------------------------------------------------------------------------------------------------- loading


def test_a_vae_that_overflows_float16_is_kept_in_float32(tiny_parts, tmp_path):
    save_folder(tiny_parts(**xl(tiny_parts)), tmp_path / "m")
    pipe = latentdiff.load(tmp_path / "m", dtype="float16", device="cpu")
    assert pipe.spec.vae.force_upcast
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}
    assert pipe.dtype == torch.float16
    bf16 = latentdiff.load(tmp_path / "m", dtype="bfloat16", device="cpu")
    assert {p.dtype for p in bf16.vae.parameters()} == {torch.bfloat16}


def test_without_a_path_the_embedded_model_is_meant(tiny_folder, tmp_path, monkeypatch):
    from latentdiff import loading

    checkout = tmp_path / "checkout"
    (checkout / "latentdiff").mkdir(parents=True)
    monkeypatch.setattr(loading, "__file__", str(checkout / "latentdiff" / "loading.py"))
    with pytest.raises(FileNotFoundError, match=r"the embedded model is neither in .*weights nor in .*weights"):
        latentdiff.load()
    os.symlink(tiny_folder, checkout / "weights")
    assert loading.embedded() == checkout / "weights"
    assert latentdiff.load(device="cpu", dtype="float32").title == "embedded"
    os.symlink(tiny_folder, checkout / "latentdiff" / "weights")  # an installed package brings its own
    assert loading.embedded() == checkout / "latentdiff" / "weights"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"device": "tpu9"}, "device must be .*, got 'tpu9'"),
        ({"device": "cuda:99"}, "device must be .*, got 'cuda:99'"),
        ({"dtype": "float8"}, "dtype must be one of float32, float16, bfloat16, got 'float8'"),
        ({"dtype": torch.int8}, "dtype must be one of float32"),
        ({"prediction": "noise"}, "prediction must be eps, v or x0, got 'noise'"),
    ],
)
def test_bad_arguments_of_load(tiny_folder, bad, message):
    with pytest.raises(ValueError, match=message):
        latentdiff.load(tiny_folder, **bad)


def test_the_users_word_on_the_prediction_counts(tiny_folder, tiny_pipe):
    other = latentdiff.load(tiny_folder, device="cpu", dtype="float32", prediction="eps")
    assert other.spec.prediction == "eps"
    assert not same(other("a cat", seed=1, **FEW)[0], tiny_pipe("a cat", seed=1, **FEW)[0])


def test_schedules_of_specs():
    from latentdiff.diffusion import schedules

    for spec, schedule in [
        (ScheduleSpec(kind="cosine"), schedules.cosine()),
        (ScheduleSpec(), schedules.scaled_linear()),
        (ScheduleSpec(kind="linear", beta_start=1e-4, beta_end=0.02, steps=500), schedules.linear(500)),
        (ScheduleSpec(zero_snr=True), schedules.zero_snr(schedules.scaled_linear())),
    ]:
        assert torch.equal(noise_schedule(spec).abar, schedule.abar)


def test_a_public_name_is_the_same_at_every_use():
    """In a process of its own: a module of the name would take its place once it is imported."""
    code = """
import latentdiff, types
first = [getattr(latentdiff, name) for name in latentdiff.__all__]
import latentdiff.cli
again = [getattr(latentdiff, name) for name in latentdiff.__all__]
assert all(a is b and not isinstance(a, types.ModuleType) for a, b in zip(first, again, strict=True)), again
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not {module.name for module in pkgutil.iter_modules(latentdiff.__path__)} & set(latentdiff.__all__)


def test_the_public_names_are_there_and_cost_nothing_before_they_are_used():
    code = (
        "import sys, latentdiff; assert 'torch' not in sys.modules\n"
        "[getattr(latentdiff, name) for name in latentdiff.__all__]; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"transformers", "torchvision", "open_clip", "gradio", "ray", "diffusers", "accelerate", "scipy"} & set(loaded)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = latentdiff.lod
