"""Two models on one picture: where a model hands over to itself, nothing changes."""

import pytest

from latentdiff.refine import refine


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler_ancestral"])
@pytest.mark.parametrize("handoff", [0.0, 0.3, 0.5, 1.0])
def test_handing_over_to_oneself_is_one_run(tiny_pipe, sampler, handoff):
    """Also for samplers that add noise: the second part goes on in the same row of draws."""
    asked = {"steps": 6, "seed": 3, "n": 2, "sampler": sampler, "progress": False}
    one = tiny_pipe("a cat", **asked)
    two = refine(tiny_pipe, tiny_pipe, "a cat", handoff=handoff, **asked)
    assert [a.tobytes() for a in one] == [b.tobytes() for b in two]


def test_drawn_seeds_are_reported_and_the_same_in_both_parts(tiny_pipe):
    (picture,) = refine(tiny_pipe, tiny_pipe, "a cat", steps=2, progress=False)
    from latentdiff.images import parse_parameters

    seed = parse_parameters(picture.info["parameters"])[0]["seed"]
    (again,) = tiny_pipe("a cat", steps=2, seed=seed, progress=False)
    assert again.tobytes() == picture.tobytes()


@pytest.mark.parametrize("handoff", [-0.1, 1.1, float("nan"), "0.8"])
def test_bad_handoffs(tiny_pipe, handoff):
    with pytest.raises((ValueError, TypeError), match="handoff"):
        refine(tiny_pipe, tiny_pipe, "a cat", handoff=handoff)
