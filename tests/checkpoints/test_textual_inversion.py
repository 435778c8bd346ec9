"""Textual inversion: every file layout, and the same text embeddings as diffusers."""

import pytest
import torch

from latentdiff.checkpoints.files import CheckpointError, write_safetensors
from latentdiff.checkpoints.io import load_parts
from latentdiff.checkpoints.save import save_folder
from latentdiff.checkpoints.textual_inversion import read_inversion, with_inversions


@pytest.fixture(scope="module")
def sd15(folder):
    return load_parts(folder("sd15"))


@pytest.fixture(scope="module")
def sdxl(folder):
    return load_parts(folder("sdxl"))


VECTORS = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("key", ["*", "sks"])
def test_a1111(sd15, tmp_path, key):
    torch.save(
        {"string_to_param": {key: VECTORS}, "string_to_token": {key: 265}, "name": "<cat-toy>", "step": 5}, tmp_path / "x.pt"
    )
    with pytest.raises(CheckpointError, match="this is a pickle"):
        read_inversion(tmp_path / "x.pt", sd15.text_encoders)
    found = read_inversion(tmp_path / "x.pt", sd15.text_encoders, allow_pickle=True)
    assert found.tokens == ["<cat-toy>", "<cat-toy>_1", "<cat-toy>_2"]
    assert torch.equal(found.vectors[0], VECTORS)


@pytest.mark.parametrize("vectors", [VECTORS, VECTORS[0]])
def test_diffusers(sd15, tmp_path, vectors):
    write_safetensors(tmp_path / "x.safetensors", {"<toy>": vectors})
    found = read_inversion(tmp_path / "x.safetensors", sd15.text_encoders)
    assert found.word == "<toy>"
    assert torch.equal(found.vectors[0], vectors.reshape(-1, 32))
    assert read_inversion(tmp_path / "x.safetensors", sd15.text_encoders, word="bear").tokens[0] == "bear"


@pytest.mark.parametrize("key", ["emb_params", "clip_l"])
def test_a_file_without_a_word_is_called_by_its_name(sd15, tmp_path, key):
    write_safetensors(tmp_path / "easynegative.safetensors", {key: VECTORS})
    assert read_inversion(tmp_path / "easynegative.safetensors", sd15.text_encoders).word == "easynegative"


def test_sdxl_pairs(sdxl, folder, tmp_path):
    write_safetensors(tmp_path / "xpair.safetensors", {"clip_g": torch.ones(2, 64), "clip_l": torch.ones(2, 32)})
    found = read_inversion(tmp_path / "xpair.safetensors", sdxl.text_encoders)
    assert [tuple(v.shape) for v in found.vectors] == [(2, 32), (2, 64)]
    refiner = load_parts(folder("sdxl-refiner"))
    assert [tuple(v.shape) for v in read_inversion(tmp_path / "xpair.safetensors", refiner.text_encoders).vectors] == [(2, 64)]
    towers, tokenizers = with_inversions(sdxl.text_encoders, sdxl.tokenizers, [found])
    assert [len(t.text_model.embeddings.token_embedding.weight) for t in towers] == [49410, 49410]
    assert all(t("a xpair") == [320, 49408, 49409] for t in tokenizers)


@torch.no_grad()
def test_words_become_their_vectors_and_the_model_stays_as_it_was(sd15, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"<toy>": VECTORS})
    found = read_inversion(tmp_path / "x.safetensors", sd15.text_encoders)
    (tower,), (tokenizer,) = with_inversions(sd15.text_encoders, sd15.tokenizers, [found])
    ids = tokenizer("a <toy> cat")
    assert ids == [320, 49408, 49409, 49410, 2368]
    assert tokenizer("<toy>_1") == [49409]
    table = tower.text_model.embeddings.token_embedding.weight
    assert torch.equal(table[49408:], VECTORS)
    old = sd15.text_encoders[0]
    assert len(old.text_model.embeddings.token_embedding.weight) == 49408
    assert (
        tower.text_model.encoder.layers[0].mlp.fc1.weight.data_ptr() == old.text_model.encoder.layers[0].mlp.fc1.weight.data_ptr()
    )
    assert sd15.tokenizers[0]("a cat") == tokenizer("a cat") == [320, 2368]


@pytest.mark.oracle
@torch.no_grad()
@pytest.mark.parametrize("prompt", ["a <toy> cat", "<toy>, <TOY>", "no word", "with<toy>in"])
def test_diffusers_encodes_the_same(folder, sd15, tmp_path, prompt):
    import diffusers

    write_safetensors(tmp_path / "x.safetensors", {"<toy>": VECTORS})
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("sd15"), local_files_only=True)
    pipe.load_textual_inversion(tmp_path / "x.safetensors")
    expected = pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids
    found = read_inversion(tmp_path / "x.safetensors", sd15.text_encoders)
    (tower,), (tokenizer,) = with_inversions(sd15.text_encoders, sd15.tokenizers, [found])
    if prompt != "<toy>, <TOY>":  # diffusers looks for the words before it lower-cases
        assert [49406, *tokenizer(prompt), 49407] == expected
    ids = torch.tensor([expected])
    assert torch.allclose(tower(ids)[0], pipe.text_encoder(ids).last_hidden_state, atol=1e-5)


def test_a_model_with_words_saves_and_loads(sd15, tmp_path):
    from dataclasses import replace

    write_safetensors(tmp_path / "x.safetensors", {"<toy>": VECTORS})
    found = read_inversion(tmp_path / "x.safetensors", sd15.text_encoders)
    towers, tokenizers = with_inversions(sd15.text_encoders, sd15.tokenizers, [found])
    spec = replace(sd15.spec, towers=tuple(t.spec for t in towers))
    save_folder(replace(sd15, text_encoders=towers, tokenizers=tokenizers, spec=spec), tmp_path / "m")
    again = load_parts(tmp_path / "m")
    assert again.tokenizers[0]("a <toy> cat") == [320, 49408, 49409, 49410, 2368]
    assert again.spec == spec


FAULTS = {
    "width": (
        {"<toy>": torch.ones(2, 33)},
        r"its vectors have shapes \[\(2, 33\)\]; this model's 1 text tower\(s\) are \[32\] wide",
    ),
    "row of rows": ({"<toy>": torch.ones(2, 1, 32)}, r"its vectors have shapes \[\(2, 1, 32\)\]"),
    "pair": ({"clip_l": torch.ones(1, 32), "clip_g": torch.ones(1, 64)}, "this model's 1 text tower"),
    "other": ({"a": torch.ones(1), "b": torch.ones(1)}, "expected a textual inversion .* found 2 tensors: 'a', 'b'"),
    "nan": ({"<toy>": torch.full((1, 32), float("nan"))}, "hold NaN or infinite"),
    "spaces": ({"my toy": torch.ones(1, 32)}, "the word 'my toy' must have no spaces"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(sd15, tmp_path, fault):
    tensors, message = FAULTS[fault]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError, match=message):
        read_inversion(tmp_path / "x.safetensors", sd15.text_encoders)


def test_words_that_exist_are_refused(sd15, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"cat": VECTORS})
    found = read_inversion(tmp_path / "x.safetensors", sd15.text_encoders)
    with pytest.raises(ValueError, match="the word 'cat' is a token of this model already"):
        with_inversions(sd15.text_encoders, sd15.tokenizers, [found])
    other = read_inversion(tmp_path / "x.safetensors", sd15.text_encoders, word="<x>")
    towers, tokenizers = with_inversions(sd15.text_encoders, sd15.tokenizers, [other])
    with pytest.raises(ValueError, match="the tokenizer has 49408 tokens, the tower 49411: words can not be added"):
        with_inversions(towers, sd15.tokenizers, [other])
    assert len(tokenizers[0]) == 49411
    with pytest.raises(ValueError, match="the word '<x>' is a token"):
        with_inversions(sd15.text_encoders, sd15.tokenizers, [other, other])
