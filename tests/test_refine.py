"""Two models on one picture: where a model hands over to itself, nothing changes."""

import numpy as np
import pytest
import torch

from latentdiff.conditioning import TextEncoder
from latentdiff.pipeline import Pipeline
from latentdiff.refining import refine
from latentdiff.sound import NonFiniteError


@pytest.mark.parametrize(
    ("sampler", "prompt"),
    [
        ("ddim", "a cat"),
        ("ddpm", "a [cat|dog]"),
        ("dpmpp_sde", "a cat"),
        ("dpmpp_2m", "a [cat:dog:2]"),
        ("heun", "a [cat:dog:0.5]"),
    ],
)
@pytest.mark.parametrize("handoff", [0.0, 0.4, 1.0])
def test_handing_over_to_oneself_is_one_run(tiny_pipe, sampler, handoff, prompt):
    """Noise, what a sampler keeps of its last steps, and what a prompt says when, go on from the first part to the second."""
    asked = {"steps": 6, "seed": 3, "n": 2, "sampler": sampler, "progress": False}
    one = tiny_pipe(prompt, **asked)
    two = refine(tiny_pipe, tiny_pipe, prompt, handoff=handoff, **asked)
    assert [a.tobytes() for a in one] == [b.tobytes() for b in two]


def test_the_refiner_draws_the_rest_and_decodes(tiny_pipe, tiny_parts):
    """Its U-Net is asked at the levels below the hand-off alone, and overflows there to no harm."""
    parts = tiny_parts()
    text = TextEncoder(parts.text_encoders, parts.tokenizers, parts.spec)
    refiner = Pipeline(unet=parts.unet.half(), vae=parts.vae, text=text, spec=parts.spec, title="fine")
    calls = []

    def poison(module, args, output):
        calls.append(output.dtype)
        if output.dtype == torch.float16:
            output[..., 0] = torch.inf

    parts.unet.register_forward_hook(poison)
    with pytest.warns(UserWarning, match="the U-Net gave NaN or infinity in torch.float16"):
        (made,) = refine(tiny_pipe, refiner, "a cat", handoff=0.5, steps=4, seed=3, progress=False)
    assert calls == [torch.float16] * 2 + [torch.float32] * 2
    (alone,) = tiny_pipe("a cat", steps=4, seed=3, progress=False)
    assert np.abs(np.asarray(made).astype(int) - np.asarray(alone)).max() <= 1
    assert "Refiner: fine, Refiner switch at: 0.5" in made.info["parameters"]


def test_what_is_no_number_in_float32_is_not_run_again(tiny_pipe, tiny_parts):
    parts, calls = tiny_parts(), []
    parts.unet.register_forward_hook(lambda module, args, output: calls.append(1) or output * torch.nan)
    text = TextEncoder(parts.text_encoders, parts.tokenizers, parts.spec)
    base = Pipeline(unet=parts.unet, vae=parts.vae, text=text, spec=parts.spec, title="broken")
    with pytest.raises(NonFiniteError, match="U-Net"):
        refine(base, tiny_pipe, "a cat", handoff=0.5, steps=4, seed=3, progress=False)
    assert len(calls) == 2


def test_drawn_seeds_are_reported_and_the_same_in_both_parts(tiny_pipe):
    (picture,) = refine(tiny_pipe, tiny_pipe, "a cat", steps=2, progress=False)
    from latentdiff.images import parse_parameters

    seed = parse_parameters(picture.info["parameters"])[0]["seed"]
    (again,) = tiny_pipe("a cat", steps=2, seed=seed, progress=False)
    assert again.tobytes() == picture.tobytes()


def test_a_rule_that_names_no_layer_is_told_of(tiny_pipe):
    with pytest.raises(ValueError, match=r"guidance must name layers with self-attention, in .*, got 'nowhere'"):
        refine(tiny_pipe, tiny_pipe, "a cat", guidance="cfg(3) + pag(2, 'nowhere')", steps=2, progress=False)


@pytest.mark.parametrize("handoff", [-0.1, 1.1, float("nan"), "0.8"])
def test_bad_handoffs(tiny_pipe, handoff):
    with pytest.raises((ValueError, TypeError), match="handoff"):
        refine(tiny_pipe, tiny_pipe, "a cat", handoff=handoff)
