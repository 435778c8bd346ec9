"""Prompt-to-prompt: what the values are given to do is what the paper does to the maps."""

from dataclasses import replace

import pytest
import torch

from latentdiff import prompt_to_prompt as p2p
from latentdiff.models.attention import Site, sdpa

CROSS, SELF = Site("a.attn2", True), Site("a.attn1", False)


def words(prompt: str, *counts: int, length: int = 12) -> p2p.Words:
    """Each word with so many tokens, one after the other from position 1 on."""
    spans, at = [], 1
    for n in counts or [1] * len(prompt.split()):
        spans.append(tuple(range(at, at + n)))
        at += n
    return p2p.Words(prompt, tuple(prompt.split()), tuple(spans), length)


# ------------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    "prompt", ["a cat on a mat", "A Cat, on: a mat!", "", "a " * 40, "cat-like (things) don't 3d", "a red cat, " * 9]
)
def test_words_lie_where_the_encoder_puts_their_tokens(tiny_pipe, prompt):
    text = tiny_pipe.text
    (chunks,) = text.chunks(prompt)
    ids = [id for chunk in chunks for id in chunk.ids]
    found = p2p.words(text, prompt, len(ids))
    for word, span in zip(found.words, found.spans, strict=True):
        assert [ids[p] for p in span] == text.tokenizers[0](word)
    begins_and_ends = {text.towers[0].spec.begin, text.towers[0].spec.end, text.towers[0].spec.pad}
    assert {ids[p] for p in found.others()} <= begins_and_ends
    assert len(found.words) == len(prompt.split())


def test_words_are_found_whatever_their_case_and_signs():
    found = words("a Cat, a big cat on a mat")
    assert found.find("cat") == (2, 5)
    assert found.find("big cat") == (4, 5)
    assert found.find("big mat") == ()
    with pytest.raises(ValueError, match=r"word must be a word of the prompt 'a Cat, a big cat on a mat', got 'dog'"):
        found.span("dog", "word")


# --------------------------------------------------------------------------------------------------------------- alignment


def test_identical_prompts_are_aligned_token_by_token():
    for way in ("replace", "refine"):
        assert torch.equal(p2p.alignment(words("a cat on a mat"), words("a cat on a mat"), way), torch.eye(12))


def test_replace_gives_new_words_the_old_ones_maps():
    mixed = p2p.alignment(words("a cat runs", 1, 1, 1), words("a hippopotamus runs", 1, 3, 1), "replace")
    assert mixed[2, 2:5].tolist() == pytest.approx([1 / 3] * 3)
    assert mixed[3, 5] == 1  # runs
    assert mixed[4, 6] == 1  # the end, and then the padding
    assert mixed.sum(0)[2:5].tolist() == pytest.approx([1 / 3] * 3)


def test_replace_pairs_as_many_words_as_there_are():
    mixed = p2p.alignment(words("red cat", 1, 1), words("blue puppy", 1, 2), "replace")
    assert mixed[1, 1] == 1
    assert mixed[2, 2:4].tolist() == [0.5, 0.5]


def test_refine_leaves_new_words_their_own_maps():
    mixed = p2p.alignment(words("a cat"), words("a fluffy white cat"), "refine")
    assert mixed[:, 2:4].sum() == 0
    assert mixed[2, 4] == 1
    assert mixed[1, 1] == 1


# ----------------------------------------------------------------------------------------------------------------- control


def attention_of(old, new, control):
    """What the target's attention gives once the source has passed."""
    pair = p2p.Pair(lambda *a: None, lambda *a: None, control)
    pair._watch(sdpa, 1.0, 1, *old, CROSS)
    return pair._control(sdpa, 1.0, 1, *new, CROSS)


def qkv(seed: int, n=5, m=12, d=8, b=2):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(b, 3, k, d, generator=g) for k in (n, m, m))


def control(mixed, scale=None, cross=0.0):
    own = (mixed.sum(0) == 0).float()
    scale = torch.ones(mixed.shape[1]) if scale is None else scale
    return p2p.Control(source=mixed[None], own=own[None], scale=scale[None], cross_above=cross, self_above=2.0)


def test_values_do_what_the_paper_does_to_the_maps():
    """Hertz et al., section 4.1, written with maps: M_source spread over the new tokens, own maps elsewhere, then the weights."""
    mixed = p2p.alignment(words("a cat sat"), words("a big dog sat"), "refine")
    mixed[2, 3] = 1  # cat -> dog
    scale = torch.ones(12)
    scale[2] = -1.5
    old, new = qkv(1), qkv(2)
    found = attention_of(old, new, control(mixed, scale))

    def maps(q, k):
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)

    edited = (maps(*old[:2])[0] @ mixed + maps(*new[:2])[0] * (mixed.sum(0) == 0)) * scale
    assert torch.allclose(found[0], edited @ new[2][0], atol=1e-5)
    assert torch.equal(found[1], sdpa(*new, CROSS)[1])  # the negative prompt's half is nobody's business


@pytest.mark.parametrize(("target", "way"), [("a dog sat", "replace"), ("a big dog sat", "refine")])
def test_words_are_replaced_where_there_are_as_many_and_else_refined(target, way):
    options = {"cross": 0.5, "self_attention": 0.5, "weights": {}}
    left, chosen = (
        p2p.control(words("a cat sat"), words(target), torch.tensor([2.0, 1.0, 0.0]), way=w, **options) for w in (None, way)
    )
    other = p2p.alignment(words("a cat sat"), words(target), "refine" if way == "replace" else "replace")
    assert torch.equal(left.source, chosen.source)
    assert not torch.equal(left.source[0], other)


def test_below_its_level_control_is_nothing_at_all():
    old, new = qkv(1), qkv(2)
    assert torch.equal(attention_of(old, new, control(torch.eye(12), cross=1.0)), sdpa(*new, CROSS))


def test_the_level_of_a_share_of_the_steps():
    """The first round(share · steps) steps are controlled."""
    sigmas = torch.tensor([10.0, 8.0, 5.0, 2.0, 1.0, 0.0])
    for share, steps in ((0, 0), (0.4, 2), (0.8, 4), (1, 5)):
        made = p2p.control(words("a cat"), words("a dog"), sigmas, way=None, cross=share, self_attention=1 - share, weights={})
        assert sum(bool(s > made.cross_above) for s in sigmas[:-1]) == steps
        assert sum(bool(s > made.self_above) for s in sigmas[:-1]) == 5 - steps


def test_self_attention_is_the_sources_on_the_targets_values():
    old, new = qkv(1, n=12), qkv(2, n=12)
    pair = p2p.Pair(lambda *a: None, lambda *a: None, control(torch.eye(12)))
    pair.control = replace(pair.control, cross_above=2.0, self_above=0.0)
    pair._watch(sdpa, 1.0, 1, *old, SELF)
    found = pair._control(sdpa, 1.0, 1, *new, SELF)
    assert torch.equal(found[0], sdpa(old[0][:1], old[1][:1], new[2][:1], SELF)[0])


# -------------------------------------------------------------------------------------------------------------------- maps


@pytest.mark.parametrize(("height", "width"), [(16, 16), (12, 20), (7, 9), (5, 1)])
def test_maps_of_any_size_are_told_apart(height, width):
    h, w = height, width
    for _ in range(3):
        assert p2p.resolution(h * w, height, width) == (h, w)
        h, w = -(-h // 2), -(-w // 2)


def test_a_words_map_is_where_queries_agree_with_its_key():
    """One place of 4 x 4 asks for token 2, in two heads, at two resolutions."""
    maps = p2p.Maps(((2,),), 8, 8)
    k = torch.zeros(1, 2, 5, 4)
    k[0, :, 2, 0] = 10
    for n in (64, 16):
        side = int(n**0.5)
        q = torch.zeros(1, 2, side, side, 4)
        q[0, :, side // 4, side // 2, 0] = 10
        maps.look(q.flatten(2, 3), k, torch.zeros(1, 2, 5, 4), CROSS)
    heat = maps.heat()[0]
    assert heat.shape == (8, 8)
    assert heat.max() == 1
    assert divmod(int(heat.argmax()), 8) == (2, 4)
    assert heat[6:, :2].max() < 0.01


def test_a_map_is_the_sum_over_sites_of_the_share_that_heads_give_to_the_tokens():
    spans, maps = ((1, 3), (2,)), p2p.Maps(((1, 3), (2,)), 4, 6)
    expected = torch.zeros(2, 4, 6, dtype=torch.float64)
    for seed in range(2):
        q, k, v = (torch.randn(3, 2, n, 8, generator=torch.Generator().manual_seed(seed)) for n in (24, 5, 5))
        maps.look(q, k, v, CROSS)
        maps.look(q, q, q, SELF)  # places look at places: no words
        for row, span in enumerate(spans):  # the third row is a negative prompt's
            for place in range(24):
                for head in range(2):
                    scores = torch.stack([q[row, head, place].double() @ k[row, head, j].double() / 8**0.5 for j in range(5)])
                    expected[row, place // 6, place % 6] += (scores.exp() / scores.exp().sum())[list(span)].sum() / 2
    torch.testing.assert_close(maps.total.double(), expected, rtol=0, atol=1e-6)


def test_however_many_words_are_watched_attention_is_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(p2p, "sdpa", lambda q, k, v, site: calls.append(site) or v)
    maps = [p2p.Maps((span,), 8, 8) for span in ((1,), (2,), (1, 2))]
    q, k = torch.randn(1, 2, 64, 4), torch.randn(1, 2, 5, 4)
    p2p.watched(lambda x, sigma, attend: attend(q, k, k, CROSS), maps)(torch.zeros(1), torch.zeros(()))
    assert calls == [CROSS]
    assert all(m.heat().max() == 1 for m in maps)


def test_outside_its_region_the_target_is_the_source():
    region = p2p.Region(words=(((1,),), ((1,),)), below=5.0, threshold=0.5)
    x = torch.zeros(2, 4, 8, 8)
    for which in (0, 1):
        look = region.look(which, x)
        q, k = torch.zeros(1, 1, 64, 2), torch.zeros(1, 1, 3, 2)
        k[..., 1, 0], q[..., 20 + 3 * which, 0] = 9, 9
        look(q, k, k, CROSS)
    old, new = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    kept = region.keep(old, new, 1.0)
    expected = torch.zeros(8, 8)
    for at in (20, 23):
        r, c = divmod(at, 8)
        expected[max(r - 1, 0) : r + 2, max(c - 1, 0) : c + 2] = 1
    assert torch.equal(kept[0, 0], expected)
    assert torch.equal(region.keep(old, new, 6.0), new)
