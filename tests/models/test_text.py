"""The text tower and the tokenizer against transformers', on the same weights and vocabulary."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.models.text import TextTower, Tokenizer, TowerSpec

TINY = TowerSpec(width=32, mlp=64, layers=3, heads=4, vocab=99, length=16, begin=97, end=98, pad=98)
SPECS = {
    "sd1": TINY,
    "sd2": replace(TINY, activation="gelu", pad=0),
    "sdxl_l": replace(TINY, layer=-2, final_norm=False),
    "sdxl_g": replace(TINY, activation="gelu", projection=24, layer=-2, final_norm=False, pooled=True, pad=0),
}


def ids(spec: TowerSpec, *lengths: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 97, (n,), generator=generator).tolist() for n in lengths]
    return torch.tensor([[spec.begin, *row, spec.end, *[spec.pad] * (spec.length - 2 - len(row))] for row in rows])


@pytest.mark.oracle
@pytest.mark.parametrize("name", SPECS)
def test_tower_equals_transformers(name):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    spec = SPECS[name]
    config = CLIPTextConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.width,
        intermediate_size=spec.mlp,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.length,
        hidden_act=spec.activation,
        projection_dim=spec.projection or 24,
        eos_token_id=spec.end,
        bos_token_id=spec.begin,
        pad_token_id=spec.pad,
    )
    torch.manual_seed(0)
    reference = CLIPTextModelWithProjection(config).double().eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.3)  # far from the identity that fresh weights are close to
    weights = reference.state_dict()
    if spec.projection is None:
        del weights["text_projection.weight"]
    tower = TextTower(spec).double()
    tower.load_state_dict(weights, strict=True)
    tokens = ids(spec, 0, 5, 14)
    with torch.no_grad():
        hidden, pooled = tower(tokens)
        expected = reference(tokens, output_hidden_states=True)
    if spec.final_norm:
        assert (hidden - expected.last_hidden_state).abs().max() < 1e-12
    else:
        assert (hidden - expected.hidden_states[spec.layer]).abs().max() < 1e-12
    assert (pooled is None) != spec.pooled
    if pooled is not None:
        assert (pooled - expected.text_embeds).abs().max() < 1e-12


def test_pooled_is_the_first_end_token_also_where_padding_is_the_end_token():
    spec = replace(SPECS["sdxl_g"], pad=98)
    tower = TextTower(spec)
    tokens = ids(spec, 5)
    before = tower(tokens)[1]
    tokens[0, 8:] = 1  # what follows the end token cannot reach it
    assert torch.equal(before, tower(tokens)[1])


@pytest.mark.parametrize("bad", [{"activation": "relu"}, {"pooled": True}, {"layer": 0}, {"layer": -5}])
def test_bad_specs_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(TINY, **bad)


@pytest.fixture(scope="module")
def pair():
    """Our tokenizer and transformers', of OpenAI's vocabulary."""
    from transformers import CLIPTokenizer

    from latentdiff.checkpoints.tokenizer import _standard_vocabulary

    vocab, merges = _standard_vocabulary()
    return Tokenizer(vocab, merges), CLIPTokenizer(vocab=dict(vocab), merges=list(merges))


TEXTS = [
    "",
    " ",
    "a cat",
    "A  photo\tof an ASTRONAUT\n riding a horse!",
    "!",
    "!!! it's we'll they've I'd I'm you're can't",
    "naïve café  \u0301e",
    "日本語のテキスト, 한국어, עברית, العربية",
    "😀👩‍👩‍👧 emoji 1234567890",
    "a\0b \x07 \u200b\ufeff\u00a0",
    "don’t ((worry:1.3)) [be] <lora:x:1> {happy} \\ / _under_score_",
    "ǅ İstanbul ß ẞ ﬁ",
]


@pytest.mark.oracle
@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_transformers(pair, text):
    ours, theirs = pair
    assert ours(text) == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.oracle
@given(st.text(max_size=60).filter(lambda text: "<|" not in text))  # typed, `<|endoftext|>` is a token to them: see below
@settings(max_examples=300, deadline=None)
def test_ids_equal_transformers_for_any_text(pair, text):
    ours, theirs = pair
    assert ours(text) == theirs(text, add_special_tokens=False)["input_ids"]


def test_known_ids(pair):
    """From OpenAI's own repository: clip.tokenize("a diagram") and the notebook's "hello world!"."""
    assert pair[0]("hello world!") == [3306, 1002, 256]
    assert pair[0]("a diagram") == [320, 22697]


def test_typed_special_tokens_stay_text(pair):
    tokens = pair[0]("a <|endoftext|> b <|startoftext|> !")
    assert not {49406, 49407, 0} & set(tokens)


def test_added_words_get_the_next_ids(pair):
    ours = pair[0]
    bigger = Tokenizer(ours.vocab, ours.merges, added=["<my-cat>", "zwx7"])
    assert bigger("a <my-cat> zwx7") == [320, 49408, 49409]
    assert bigger("a cat") == ours("a cat")
    assert (len(bigger), bigger.id("zwx7"), bigger.token(49408)) == (49410, 49409, "<my-cat>")
