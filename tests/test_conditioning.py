"""Prompts to conditions: one tower or two, chunks, weights, sizes; against diffusers' own encoding."""

from dataclasses import replace

import pytest
import torch

from latentdiff.conditioning import AESTHETIC_SCORES, Chunk, Cond, TextEncoder, chunk, chunks, parts, plain
from latentdiff.models.text import TowerSpec
from latentdiff.models.unet import sinusoids

SPEC = TowerSpec(length=6, begin=90, end=91, pad=0)


@pytest.fixture
def encoder(tiny_parts):
    """encoder(**changes of the spec): the tiny model's text encoder in float64."""

    def make(**changes) -> TextEncoder:
        parts = tiny_parts(**changes)
        return TextEncoder(tuple(t.double() for t in parts.text_encoders), parts.tokenizers, parts.spec)

    return make


@pytest.fixture
def xl(tiny_parts):
    """The changes that make the tiny model an SDXL, with a second tower that pads with 0."""
    (tower,) = tiny_parts().spec.towers
    second = replace(tower, layer=-2, final_norm=False, projection=24, pooled=True, pad=0)
    unet = replace(tiny_parts().spec.unet, context_dim=64, vector_dim=24 + 6 * 256)
    towers = (replace(tower, layer=-2, final_norm=False), second)
    return {"towers": towers, "unet": unet, "vector": "size", "zero_empty_negative": True}


def random_cond(b=2, vector=True, projected=False, seed=0) -> Cond:
    g = torch.Generator().manual_seed(seed)
    context = torch.randn(b, 5, 8, generator=g)
    pairs = [(torch.randn(b, 2, 5, 4, generator=g), torch.randn(b, 2, 5, 4, generator=g)) for _ in range(3)]
    return Cond(pairs if projected else context, torch.randn(b, 7, generator=g) if vector else None)


def flat(cond: Cond) -> list[torch.Tensor]:
    return cond._tensors()


# ---------------------------------------------------------------------------------------------------------------------- Cond


@pytest.mark.parametrize("vector", [True, False])
@pytest.mark.parametrize("projected", [True, False])
def test_join_and_to(vector, projected):
    a, b = random_cond(2, vector, projected, 0), random_cond(3, vector, projected, 1)
    both = a.join(b)
    assert (len(a), len(both), both.tokens) == (2, 5, 5)
    for x, y, z in zip(flat(a), flat(b), flat(both), strict=True):
        assert torch.equal(z, torch.cat([x, y]))
    assert {t.dtype for t in flat(a.to(dtype=torch.float16))} == {torch.float16}
    assert (both.vector is None) is not vector
    assert isinstance(both.context, list) is projected


def test_conditions_that_do_not_fit_are_not_joined():
    with pytest.raises(ValueError, match="other"):
        random_cond(vector=True).join(random_cond(vector=False))
    with pytest.raises(ValueError, match="other"):
        random_cond().join(Cond(torch.zeros(1, 6, 8), torch.zeros(1, 7)))


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_one_bad_number_anywhere_is_seen(projected, value):
    assert random_cond(projected=projected).finite()
    for k in range(len(flat(random_cond(projected=projected)))):
        cond = random_cond(projected=projected)
        flat(cond)[k].view(-1)[-1] = value
        assert not cond.finite()


def test_projected_conditions_give_the_same_estimate(tiny_parts):
    unet = tiny_parts().unet.double()
    g = torch.Generator().manual_seed(0)
    cond = Cond(torch.randn(2, 16, 32, generator=g, dtype=torch.float64))
    x, t = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64), torch.tensor([3.0, 700.0])
    projected = cond.project(unet)
    assert projected.project(unet) is projected
    assert torch.equal(unet(x, t, cond.context), unet(x, t, projected.context))


# -------------------------------------------------------------------------------------------------------------------- chunks


def test_a_chunk_is_begin_tokens_end_padding():
    assert chunk([(5, 1.0), (6, 1.3)], SPEC) == Chunk((90, 5, 6, 91, 0, 0), (1.0, 1.0, 1.3, 1.0, 1.0, 1.0))
    assert chunk([], SPEC).ids == (90, 91, 0, 0, 0, 0)


@pytest.mark.parametrize(("n", "expected"), [(0, 1), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3), (4000, 1000)])
def test_no_token_is_lost_or_doubled(n, expected):
    made = chunks([[(i, 1.0) for i in range(n)]], SPEC)
    assert len(made) == expected
    assert {len(c.ids) for c in made} == {SPEC.length}
    room = SPEC.length - 2
    assert [i for k, c in enumerate(made) for i in c.ids[1 : 1 + min(room, n - k * room)]] == list(range(n))


def test_a_section_starts_a_chunk():
    made = chunks([[(1, 1.0)], [], [(i, 0.5) for i in range(5)]], SPEC)
    assert [c.ids[1] for c in made] == [1, 91, 0, 4]
    assert made[3].weights == (1.0, 0.5, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("commas", "n", "expected"),
    [
        ([60], 80, [61, 19]),  # the last comma ends the chunk that would be full
        ([55, 70], 80, [71, 9]),
        ([54], 80, [75, 5]),  # too far back
        ([55], 80, [56, 24]),
        ([60], 75, [75]),  # nothing to break
        ([60, 75], 80, [75, 5]),  # a comma is what does not fit: it starts the next chunk
        ([60, 130], 200, [61, 70, 69]),
        ([], 200, [75, 75, 50]),
    ],
)
def test_a_chunk_breaks_after_a_late_comma(commas, n, expected):
    tokens = [(7 if k in commas else 100 + k, 1.0) for k in range(n)]
    made = parts(tokens, 75, comma=7)
    assert [len(part) for part in made] == expected
    assert [token for part in made for token in part] == tokens


# ------------------------------------------------------------------------------------------------------------------- encoder


def test_both_halves_get_as_many_chunks_as_the_longer(encoder):
    text = encoder()
    long = "a cat and a dog, " * 8
    n = len(text.chunks(long)[0])
    assert n > 2
    for prompt, negative in ((long, "a dog"), ("a dog", long), (long, None)):
        cond, uncond = text.encode(prompt, negative, size=(32, 32))
        assert cond.tokens == uncond.tokens == 16 * n
    short = text.encode("a dog", None, size=(32, 32))[0]
    filled = text.encode("a dog", long, size=(32, 32))[0]
    empty = text.encode("", None, size=(32, 32))[0]
    assert (filled.context[:, :16] - short.context).abs().max() < 1e-12
    assert all((part - empty.context).abs().max() < 1e-12 for part in filled.context[:, 16:].split(16, dim=1))


def test_an_absent_negative_is_the_empty_prompt(encoder):
    text = encoder()
    uncond = text.encode("a cat", None, size=(32, 32))[1]
    assert torch.equal(uncond.context, text.encode("a cat", "", size=(32, 32))[1].context)
    assert (uncond.context - text.encode("", None, size=(32, 32))[0].context).abs().max() < 1e-12
    assert uncond.context.abs().max() > 0.1


def test_an_absent_negative_is_zeros_where_the_model_says_so(encoder, xl):
    text = encoder(**xl)
    cond, uncond = text.encode("a cat", None, size=(32, 32))
    assert not uncond.context.any()
    assert not uncond.vector[:, :24].any()
    assert torch.equal(uncond.vector[:, 24:], cond.vector[:, 24:])
    assert text.encode("a cat", "a dog", size=(32, 32))[1].context.any()


def test_the_vector_is_pooled_text_and_sizes(encoder, xl):
    text = encoder(**xl)
    long = "a cat and a dog, " * 8
    cond, _ = text.encode(long, None, size=(48, 32))
    assert cond.context.shape == (1, 16 * len(text.chunks(long)[0]), 64)
    assert cond.vector.shape == (1, 24 + 6 * 256)
    numbers = torch.tensor([32.0, 48.0, 0.0, 0.0, 32.0, 48.0])  # heights before widths
    assert torch.equal(cond.vector[0, 24:].view(6, 256).float(), sinusoids(numbers, 256))
    first = torch.tensor([text.chunks(long)[1][0].ids])
    assert (cond.vector[:, :24] - text.towers[1](first)[1]).abs().max() < 1e-12


def test_the_refiner_hears_aesthetic_scores(encoder, xl):
    unet = replace(xl["unet"], context_dim=32, vector_dim=24 + 5 * 256)
    changes = xl | {"towers": xl["towers"][1:], "unet": unet, "vector": "aesthetic", "zero_empty_negative": False}
    pair = encoder(**changes).encode("a cat", "a dog", size=(48, 32))
    for cond, score in zip(pair, AESTHETIC_SCORES, strict=True):
        numbers = torch.tensor([32.0, 48.0, 0.0, 0.0, score])
        assert torch.equal(cond.vector[0, 24:].view(5, 256).float(), sinusoids(numbers, 256))


def test_towers_pad_each_in_its_own_way_and_an_exclamation_mark_is_a_word(encoder, xl):
    text = encoder(**xl)
    own, other = text.chunks("!")
    mark = text.tokenizers[0].id("!</w>")
    end = text.towers[0].spec.end
    assert own[0].ids == (text.towers[0].spec.begin, mark, end, *[end] * 13)
    assert other[0].ids == (text.towers[1].spec.begin, mark, end, *[0] * 13)


def test_all_texts_of_a_picture_get_one_length(encoder):
    text = encoder()
    texts, negatives = ["a cat", "a cat and a dog, " * 8], ["", "a dog"]
    conds, unconds = text.encode_all(texts, negatives, size=(32, 32))
    assert len({c.tokens for c in (*conds, *unconds)}) == 1
    assert torch.equal(conds[1].context, text.encode(texts[1], None, size=(32, 32))[0].context)
    assert torch.equal(unconds[1].context[:, :16], text.encode("", "a dog", size=(32, 32))[1].context)


def test_weights_reach_the_rule_once_a_prompt_has_some(encoder):
    seen = []

    def weigh(states, weights, empty):
        seen.append((weights, empty))
        return states * weights[..., None]

    def parse(prompt):
        return [[(word, 2.0 if word == "cat" else 1.0) for word in prompt.split()]]

    text = encoder()
    weighed = replace(text, parse=parse, weigh=weigh)
    before = text.encode("red cat", None, size=(32, 32))[0].context
    after = weighed.encode("red cat", None, size=(32, 32))[0].context
    ((weights, empty),) = seen  # the negative has no weights, and is left alone
    first = 1 + len(text.tokenizers[0]("red"))
    assert weights[0].tolist() == [2.0 if first <= k < first + len(text.tokenizers[0]("cat")) else 1.0 for k in range(16)]
    assert torch.equal(after, before * weights[..., None])
    assert (empty - text.encode("", None, size=(32, 32))[0].context).abs().max() < 1e-12
    assert plain("a (cat)") == [[("a (cat)", 1.0)]]


@pytest.mark.oracle
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_the_embedding_is_diffusers_own(tiny_parts, xl, family, tmp_path):
    """Without "!", which its second SDXL tokenizer takes for the padding."""
    diffusers = pytest.importorskip("diffusers")
    from latentdiff.checkpoints.save import save_folder

    parts = tiny_parts(**(xl if family == "xl" else {}))
    save_folder(parts, tmp_path / "m")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m", local_files_only=True)
    cond, uncond = TextEncoder(parts.text_encoders, parts.tokenizers, parts.spec).encode(
        "A red  cat, café?", "a dog", size=(32, 32)
    )
    with torch.no_grad():
        theirs = pipe.encode_prompt(
            "A red  cat, café?", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="a dog"
        )
    assert (cond.context - theirs[0]).abs().max() < 1e-5
    assert (uncond.context - theirs[1]).abs().max() < 1e-5
    if family == "xl":
        assert (cond.vector[:, :24] - theirs[2]).abs().max() < 1e-5
        assert (uncond.vector[:, :24] - theirs[3]).abs().max() < 1e-5
