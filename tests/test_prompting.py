"""Prompt syntax, guidance rules and few-step models, through the whole pipeline on a tiny random model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import latentdiff
from latentdiff.checkpoints.families import SamplingSpec, ScheduleSpec
from latentdiff.checkpoints.save import save_folder
from latentdiff.conditioning import TextEncoder
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.rules import autoguidance, cfg, interval, pag
from latentdiff.images import parse_parameters
from latentdiff.models.caching import Cached
from latentdiff.models.unet import UNet, rows_of
from latentdiff.pipeline import Pipeline
from latentdiff.prompts import SYNTAXES

FEW = {"steps": 4, "seed": 3, "progress": False}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


def near(a: Image.Image, b: Image.Image) -> bool:
    return bool(np.abs(pixels(a) - pixels(b)).max() <= 1)


def of_parts(parts) -> Pipeline:
    text = TextEncoder(parts.text_encoders, parts.tokenizers, parts.spec)
    return Pipeline(unet=parts.unet, vae=parts.vae, text=text, spec=parts.spec, title=parts.title)


def xl(tiny_parts) -> dict:
    """The changes that make the tiny model one of two towers."""
    spec = tiny_parts().spec
    (tower,) = spec.towers
    towers = (replace(tower, layer=-2, final_norm=False), replace(tower, layer=-2, final_norm=False, projection=24, pooled=True))
    unet = replace(spec.unet, context_dim=64, vector_dim=24 + 6 * 256, attention=(False, True), linear_projection=True)
    return {"towers": towers, "unet": unet, "vector": "size", "zero_empty_negative": True}


@pytest.fixture(scope="module")
def pipes(tiny_parts, tiny_pipe):
    """A model with one tower, and one with two."""
    return tiny_pipe, of_parts(tiny_parts(**xl(tiny_parts)))


# -- weights --


@pytest.mark.parametrize("syntax", [name for name in SYNTAXES if name != "plain"])
def test_weights_of_1_are_no_weights_bit_for_bit(pipes, syntax):
    for pipe in pipes:
        plain = pipe("a red cat", negative="a dog", syntax="plain", **FEW)[0]
        assert same(pipe("a (red:1.0) cat", negative="(a dog:1)", syntax=syntax, **FEW)[0], plain)


def test_weights_change_the_picture_as_their_syntax_says(pipes):
    for pipe in pipes:
        made = {name: pipe("a (red:1.5) cat", syntax=name, **FEW)[0] for name in SYNTAXES}
        names = list(made)
        assert not any(same(made[a], made[b]) for i, a in enumerate(names) for b in names[:i])
        assert not same(pipe("a (red:1.2) cat", **FEW)[0], made["a1111"])
        assert same(pipe("a (red:1.5) cat", **FEW)[0], made["a1111"])
        negative = [pipe("a cat", negative=f"a (red:{w}) dog", **FEW)[0] for w in (1.0, 1.5)]
        assert not same(*negative)


def test_a_recipe_keeps_the_syntax(tiny_pipe, tmp_path):
    for syntax in ("a1111", "comfyui"):
        (path,) = tiny_pipe("a (red:1.5) cat", syntax=syntax, **FEW).save(tmp_path / f"{syntax}.png")
        recipe = latentdiff.read_recipe(path)
        assert recipe.get("syntax") == (None if syntax == "a1111" else syntax)
        assert same(tiny_pipe(**recipe, progress=False)[0], Image.open(path))


# -- length --


def test_a_long_prompt_differs_from_its_first_77_tokens(pipes):
    """On towers that read 16 at once; prompts and negatives alike, to the last token."""
    words = ["cat", "dog", "red", "apple", "blue", "background", "two", "stars", "above", "house", "flat", "style", "fox"]
    text = [words[k * k % len(words)] for k in range(300)]
    for pipe in pipes:
        long, cut, other = (" ".join(t) for t in (text, text[:77], [*text[:-1], "zebra"]))
        assert len(pipe.text.tokenizers[0](long)) >= 300
        pictures = [pipe(prompt, **FEW)[0] for prompt in (long, cut, other)]
        pictures += [pipe("a cat", negative=prompt, **FEW)[0] for prompt in (long, cut, other)]
        assert not any(same(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_break_starts_a_chunk(tiny_pipe):
    stages = [tiny_pipe.text.stages(p, "", syntax="a1111", steps=4, size=(32, 32))[0] for p in ("a cat a dog", "a cat BREAK a dog")]
    assert [stage.parts[0][0].tokens for stage in stages] == [16, 32]
    assert stages[1].negative.tokens == 32


# -- schedules --


def states(pipe, *args, **options):
    return [step.x for step in pipe.stream(*args, **{k: v for k, v in options.items() if k != "progress"})]


def test_a_prompt_changes_in_its_step(tiny_pipe):
    """Up to then, states are bit for bit those of the first prompt; from then on they are not those of either."""
    options = FEW | {"steps": 6}
    cat, changed = states(tiny_pipe, "a cat", **options), states(tiny_pipe, "a [cat:dog:0.5]", **options)
    assert [torch.equal(a, b) for a, b in zip(cat, changed, strict=True)] == [True] * 3 + [False] * 3
    assert all(torch.equal(a, b) for a, b in zip(changed, states(tiny_pipe, "a [cat:dog:3]", **options), strict=True))
    assert not torch.equal(changed[-1], states(tiny_pipe, "a dog", **options)[-1])


def test_a_negative_changes_too(tiny_pipe):
    plain, changed = states(tiny_pipe, "a cat", **FEW), states(tiny_pipe, "a cat", negative="[a dog:2]", **FEW)
    assert [torch.equal(a, b) for a, b in zip(plain, changed, strict=True)] == [True, True, False, False]


def test_a_prompt_takes_turns(tiny_pipe):
    a, b = states(tiny_pipe, "a [cat|dog]", **FEW), states(tiny_pipe, "a [cat:dog:1]", **FEW)
    assert [torch.equal(x, y) for x, y in zip(a, b, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde", "unipc", "plms", "euler_ancestral"])
def test_schedules_work_with_every_kind_of_sampler(tiny_pipe, sampler):
    cat, changed = (states(tiny_pipe, p, sampler=sampler, **FEW | {"steps": 6}) for p in ("a cat", "a [cat:dog:3]"))
    assert torch.equal(cat[1], changed[1])
    assert not torch.equal(cat[-1], changed[-1])


def test_a_run_of_no_steps_says_nothing(tiny_pipe):
    """img2img so weak that no step is left: the picture comes back, whatever the prompt, and no text is read."""
    photo = tiny_pipe("a dog", **FEW)[0]
    blind = replace(tiny_pipe, text=None)
    for options in ({"strength": 0}, {"strength": 0.1, "exact": False}):
        made = blind("a [cat|dog]", negative="[x|y]", image=photo, **options, **FEW)[0]
        assert same(made, photo)


def test_keys_and_values_are_made_once_a_text(tiny_pipe, monkeypatch):
    """Not once a step, nor once a picture; and anew for each call, since weights may have changed."""
    made, project = [], UNet.project_context
    monkeypatch.setattr(UNet, "project_context", lambda unet, context: made.append(len(context)) or project(unet, context))
    few = {"seed": 3, "progress": False}
    alone = [tiny_pipe("a [cat|dog]", seed=3 + k, steps=6, progress=False)[0] for k in range(3)]
    assert made == [2, 2] * 3
    made.clear()
    assert all(map(same, alone, tiny_pipe("a [cat|dog]", n=3, steps=6, **few)))
    assert made == [2, 2]
    made.clear()
    tiny_pipe(["a cat", "a dog", "a cat"], n=2, steps=1, batch=2, **few)
    assert made == [4, 4]
    made.clear()
    tiny_pipe("a cat", n=8, steps=2, guidance=autoguidance(tiny_pipe.denoiser(), 2.0), **few)
    assert made == [1, 1]


# -- AND --


def test_and_adds_directions(tiny_pipe):
    """A part of weight 0 adds nothing; halves of one prompt are the prompt; order does not matter."""
    cat = tiny_pipe("a cat", **FEW)[0]
    assert near(tiny_pipe("a cat AND a dog :0", **FEW)[0], cat)
    assert near(tiny_pipe("a cat :0.5 AND a cat :0.5", **FEW)[0], cat)
    both = tiny_pipe("a cat AND a dog :0.5", **FEW)[0]
    assert near(both, tiny_pipe("a dog :0.5 AND a cat", **FEW)[0])
    assert not near(both, cat)
    assert near(tiny_pipe("a cat AND a dog", guidance=1, **FEW)[0], tiny_pipe("a dog AND a cat", guidance=1, **FEW)[0])


def test_each_picture_of_a_batch_has_its_own_prompt_program(tiny_pipe):
    """Also where the network takes them together: other lengths, parts, weights and changes."""
    prompts = ["a cat", "a [cat:dog:0.5]", "a cat AND a dog :0.5", "a (red:1.4) cat", "[a|b] AND c AND d :-0.2", "a cat " * 12]
    negatives = ["", "a dog", "[x:y:1]", "", "z", ""]
    alone = [tiny_pipe(p, negative=n, **FEW | {"seed": 3 + k})[0] for k, (p, n) in enumerate(zip(prompts, negatives, strict=True))]
    for batch in (1, 2, 6):
        made = tiny_pipe(prompts, negative=negatives, batch=batch, **FEW)
        for a, b in zip(made, alone, strict=True):
            assert same(a, b) if batch == 1 else near(a, b)


# -- guidance --


class Calls:
    """How many prompts a pipeline's U-Net is called with."""

    def __init__(self, pipe):
        self.sizes: list[int] = []
        self.hook = pipe.unet.register_forward_pre_hook(lambda module, args: self.sizes.append(rows_of(args[2])))

    def __enter__(self):
        return self.sizes

    def __exit__(self, *_):
        self.hook.remove()


def test_rules_as_objects_text_and_in_recipes(tiny_pipe, tmp_path):
    made = tiny_pipe("a cat", guidance=interval(cfg(7.5), 0.3, 5.0) + pag(2.0), **FEW)
    assert same(made[0], tiny_pipe("a cat", guidance="interval(cfg(7.5), 0.3, 5) + pag(2)", **FEW)[0])
    (path,) = made.save(tmp_path / "a.png")
    recipe = latentdiff.read_recipe(path)
    assert recipe["guidance"] == "interval(cfg(7.5), 0.3, 5) + pag(2)"
    assert same(tiny_pipe(**recipe, progress=False)[0], made[0])
    assert same(tiny_pipe("a cat", guidance="7.5", **FEW)[0], tiny_pipe("a cat", guidance=7.5, **FEW)[0])
    rescaled = tiny_pipe("a cat", guidance="cfg(7.5) + rescale(0.5)", **FEW)[0]
    assert same(rescaled, tiny_pipe("a cat", guidance=7.5, rescale=0.5, **FEW)[0])


def test_rules_cost_what_they_say(tiny_pipe):
    levels = [14.0, 6.0, 2.0, 0.5, 0.0]
    for rule, expected in {
        "1": [1, 1, 1, 1],
        "7.5": [2, 2, 2, 2],
        "interval(cfg(7.5), 1, 7)": [1, 2, 2, 1],
        "pag(2)": [2, 2, 2, 2],
        "cfg(3) + pag(2) + freeu() + rescale(0.5) + threshold(0.99)": [3, 3, 3, 3],
        "apg(5) + interval(pag(2), 0, 1)": [2, 2, 2, 3],
    }.items():
        with Calls(tiny_pipe) as sizes:
            tiny_pipe("a cat", guidance=rule, spacing=levels, **FEW)
        assert sizes == expected, rule


def test_every_rule_changes_the_picture(pipes):
    for pipe in pipes:
        rules = ["cfg(5)", "apg(5)", "pag(2)", "freeu()", "cfg(5) + rescale(0.9)", "cfg(5) + threshold(0.9)", "cfg(5) + freeu()"]
        made = [pipe("a cat", guidance=rule, **FEW)[0] for rule in [*rules, "1"]]
        assert not any(same(a, b) for i, a in enumerate(made) for b in made[:i])


def test_autoguidance_by_another_pipeline(tiny_parts, tiny_pipe):
    weak = of_parts(tiny_parts())
    weak.unet.conv_out.weight.mul_(0.5)
    rule = autoguidance(weak.denoiser(), 2.0)
    assert isinstance(weak.denoiser(), Denoiser)
    with Calls(weak) as sizes, Calls(tiny_pipe) as strong:
        made = tiny_pipe("a cat", guidance=rule, **FEW)[0]
    assert (sizes, strong) == ([1] * 4, [1] * 4)
    assert not same(made, tiny_pipe("a cat", guidance=1, **FEW)[0])
    assert near(
        tiny_pipe("a cat", guidance=autoguidance(tiny_pipe.denoiser(), 2.0), **FEW)[0], tiny_pipe("a cat", guidance=1, **FEW)[0]
    )


def test_autoguidance_by_a_pipeline_that_keeps_features(tiny_pipe):
    """They are one run's; a weak model serves many."""
    weak = replace(tiny_pipe, network=Cached(tiny_pipe.unet, 2))
    rule = autoguidance(weak.denoiser(), 2.0)
    first, _, again = (tiny_pipe(prompt, guidance=rule, **FEW | {"steps": 3})[0] for prompt in ("a cat", "a dog", "a cat"))
    assert same(first, again)
    assert near(first, tiny_pipe("a cat", guidance=1, **FEW | {"steps": 3})[0])


def test_features_are_kept_where_another_picture_of_the_batch_takes_turns(tiny_pipe):
    pipe = replace(tiny_pipe, network=Cached(tiny_pipe.unet, 4))
    alone = pipe("a cat", guidance="pag(2)", **FEW)[0]
    assert not same(alone, tiny_pipe("a cat", guidance="pag(2)", **FEW)[0])
    assert near(pipe(["a cat", "[a|b] dog"], guidance="pag(2)", batch=2, **FEW)[0], alone)


def test_rules_work_on_models_that_take_a_picture(tiny_parts):
    spec = tiny_parts().spec
    pipe = of_parts(tiny_parts(unet=replace(spec.unet, in_channels=9)))
    photo, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 255)
    made = [
        pipe(prompt, image=photo, mask=mask, guidance=rule, **FEW)[0]
        for prompt in ("a [cat:dog:2]", "a cat AND a dog")
        for rule in ("cfg(3)", "cfg(3) + pag(2) + freeu()")
    ]
    assert not any(same(a, b) for i, a in enumerate(made) for b in made[:i])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": "cfg(7.5) + pag(2)"}, "guidance must be a finite number, got 'cfg"),
        ({"guidance": cfg(7.5)}, "guidance must be a finite number, got Rule"),
        ({"prompt": "a cat AND a dog"}, "prompt must be a single one for a model that follows instructions"),
        ({"rescale": 0.5}, "rescale must be 0 for this model .*, got 0.5"),
    ],
)
def test_models_that_follow_instructions_refuse_rules_before_any_computing(tiny_parts, options, message):
    pipe = replace(of_parts(tiny_parts(unet=replace(tiny_parts().spec.unet, in_channels=8))), text=None)
    pipe.vae.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    pipe.vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("computed"))
    with pytest.raises(ValueError, match=message):
        pipe.stream(**{"prompt": "a cat"} | options, image=Image.new("RGB", (32, 32)))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"guidance": "cfg(7.5) + pga(2)"}, r"guidance must be a number or a sum of cfg, .*got 'cfg\(7.5\) \+ pga\(2\)'"),
        ({"guidance": "threshold(2)"}, "share must be from 0 to 1, got 2"),
        ({"syntax": "a111"}, "syntax must be one of a1111, .*got 'a111'"),
        ({"syntax": None}, "syntax must be one of"),
    ],
)
def test_bad_rules_and_syntaxes_are_named_before_any_computing(tiny_pipe, bad, message):
    with Calls(tiny_pipe) as sizes, pytest.raises(ValueError, match=message):
        tiny_pipe("a cat", **bad, **FEW)
    assert sizes == []


# -- recipes of other programs --


def test_a_picture_of_another_program_is_asked_for_again(tiny_pipe):
    """Its "Automatic" is the model's own spacing, unless the sampler's name says one."""
    text = "a (cat:1.2)\nSteps: 4, Sampler: Euler a, Schedule type: Automatic, CFG scale: 5, Seed: 9, Size: 32x32, Model: x"
    recipe = parse_parameters(text)[0]
    own = tiny_pipe("a (cat:1.2)", steps=4, sampler="euler_ancestral", guidance=5, seed=9, progress=False)[0]
    assert same(tiny_pipe(**recipe, progress=False)[0], own)
    karras = tiny_pipe(**recipe | {"sampler": "Euler a Karras"}, progress=False)[0]
    assert same(karras, tiny_pipe(**recipe | {"spacing": "karras"}, progress=False)[0])
    assert not same(karras, own)


@pytest.mark.parametrize("text", ["a <lora:flat:0.8> cat", "a cat <LoRA:flat>", "<lyco:a:1:2>", "<hypernet:b:0.5>"])
def test_files_named_inside_a_prompt_are_not_taken_for_text(tiny_pipe, text):
    with Calls(tiny_pipe) as sizes:
        for given in ({"prompt": text}, {"prompt": ["a", text], "syntax": "a1111-no-norm"}, {"prompt": "a", "negative": text}):
            name = "negative" if "negative" in given else "prompt"
            with pytest.raises(ValueError, match=f"{name} must not name files, .*--lora.*got '<"):
                tiny_pipe(**given, **FEW)
    assert sizes == []
    assert tiny_pipe(text, syntax="plain", **FEW)[0].size == (32, 32)
    assert tiny_pipe("a <cat>, lora:x", **FEW)[0].size == (32, 32)


@pytest.mark.parametrize(
    ("texts", "got"),
    [
        ({"prompt": "(" * 10_000 + "a cat"}, "prompt must have weights from -1000 to 1000, got inf of 'a cat'"),
        ({"prompt": "(" * 10_000 + "[" * 10_000 + "a cat"}, "got inf of 'a cat'"),
        ({"prompt": "a (red:-1001) cat"}, "got -1001 of 'red'"),
        ({"prompt": "a cat", "negative": f"(blue:{'9' * 400})", "syntax": "comfyui"}, "negative must have weights .* got inf of"),
        ({"prompt": ["a", "a cat AND a dog :1e9 AND b:2000"]}, "got 2000 of 'b'"),
    ],
)
def test_weights_that_would_overflow_are_named_before_any_computing(tiny_pipe, texts, got):
    with Calls(tiny_pipe) as sizes, pytest.raises(ValueError, match=got):
        tiny_pipe(**texts, **FEW)
    assert sizes == []


def test_ten_thousand_brackets_that_leave_each_other_are_a_picture(tiny_pipe):
    nested = tiny_pipe("([" * 5000 + "a cat" + "])" * 5000, **FEW)[0]
    assert near(nested, tiny_pipe("a cat", **FEW)[0])
    assert tiny_pipe("[" * 10_000 + "a cat" + "]" * 10_000, **FEW)[0].size == (32, 32)


# -- few-step models --


def float_pictures(pipe, *args, **options) -> np.ndarray:
    *_, last = pipe.stream(*args, **options)
    decoded = pipe.decode(last.x / (1 + last.sigma**2).sqrt())
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "changes", "steps"),
    [
        ("LCMScheduler", {}, 4),
        ("LCMScheduler", {"time_cond_dim": 32}, 3),
        ("TCDScheduler", {}, 4),
        ("EulerDiscreteScheduler", {}, 2),
    ],
)
def test_few_step_models_by_their_scheduler_file_alone(name, changes, steps, tiny_parts, tmp_path):
    """Sampler, spacing and guidance are the file's; the picture is that of diffusers with the same noise.

    Its pipeline sets eta to 0, where TCD's own default is 0.3; its Euler starts at noise · sigma, not at noise · sqrt(1 + sigma²).
    """
    diffusers = pytest.importorskip("diffusers")
    spec = tiny_parts().spec
    sampler = {"LCMScheduler": "lcm", "TCDScheduler": "tcd", "EulerDiscreteScheduler": "euler"}[name]
    spacing = "trailing" if sampler == "euler" else "lcm"
    sampling = SamplingSpec(spacing=spacing, steps_offset=0, final="zero", sampler=sampler, steps=4, guidance=1.0)
    parts = tiny_parts(prediction="eps", schedule=ScheduleSpec(), sampling=sampling, unet=replace(spec.unet, **changes))
    save_folder(parts, tmp_path / "m")
    assert "_sampling" not in (tmp_path / "m" / "scheduler" / "scheduler_config.json").read_text()  # its class says it all
    pipe = latentdiff.load(tmp_path / "m", device="cpu", dtype="float32")
    assert (pipe.spec.sampling.sampler, pipe.spec.sampling.steps) == (sampler, 4)
    guidance = 8.0 if changes else 1.0
    assert pipe.spec.sampling.guidance == guidance

    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m", safety_checker=None, local_files_only=True)
    assert type(theirs.scheduler).__name__ == name
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": torch.Generator().manual_seed(7)}
    options |= {"eta": 0.3} if name == "TCDScheduler" else {}
    if name == "EulerDiscreteScheduler":
        options["latents"] = noise * (1 + pipe.schedule.sigmas[-1].item() ** -2) ** 0.5
    with torch.no_grad():
        expected = theirs("a cat", output_type="np", **options).images
    ours = float_pictures(pipe, "a cat", steps=steps, seed=7)
    assert ours.std() > 0.05
    assert np.abs(ours - expected).max() < 2e-5
    assert np.abs(float_pictures(pipe, "a cat", steps=steps, seed=7, sampler="Euler a") - ours).max() > 1e-3  # it can be overridden


def test_a_model_that_takes_the_scale_as_input_is_not_guided_again(tiny_parts):
    spec = tiny_parts().spec
    pipe = of_parts(tiny_parts(unet=replace(spec.unet, time_cond_dim=16)))
    with Calls(pipe) as sizes:
        made = [pipe("a cat", guidance=g, **FEW)[0] for g in (2.0, 8.0)]
    assert sizes == [1] * 8
    assert not same(*made)
    with pytest.raises(ValueError, match="guidance must be a finite number"):
        pipe("a cat", guidance="pag(2)", **FEW)
    with pytest.raises(ValueError, match=r"rescale must be 0 for this model .*, got 0\.5"):
        pipe("a cat", rescale=0.5, **FEW)


@pytest.mark.parametrize("steps", [1, 4])
def test_zero_terminal_snr_starts_from_noise_alone(tiny_parts, steps):
    """With the spacing of the model's file, trailing, the first level is the one without signal, and nothing overflows."""
    sampling = SamplingSpec(spacing="trailing", steps_offset=0, final="zero")
    pipe = of_parts(tiny_parts(schedule=ScheduleSpec(zero_snr=True), prediction="v", sampling=sampling))
    *_, last = pipe.stream("a cat", steps=steps, seed=1, rescale=0.7)
    assert last.request.sigmas[0] > 9e4
    assert last.x.isfinite().all()
    assert last.x.abs().max() < 100
