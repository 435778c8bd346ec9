"""What `load` refuses before it reads."""

import pytest

import latentdiff
from latentdiff import loading


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"cache": 0}, "cache must be at least 1, and 1 with compile=True, in whole numbers, got 0"),
        ({"cache": 1.5}, r"cache must be .*, got 1\.5"),
        ({"cache": "2"}, "cache must be .*, got '2'"),
        ({"cache": 2, "compile": True}, "cache must be .* 1 with compile=True"),
        ({"weights": "int4"}, "weights must be int8 or bfloat16, on a CPU, got 'int4' on cpu"),
        ({"int8": True, "weights": "int8"}, "int8 goes without compile, float8 and weights, got compile=False, .* weights='int8'"),
        ({"int8": True, "compile": True}, "int8 goes without .* got compile=True"),
        ({"float8": True}, "float8 needs a bfloat16 model .* got torch.float32 on cpu"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_a_model_is_read(monkeypatch, bad, message):
    monkeypatch.setattr(loading, "load_parts", lambda *_, **__: pytest.fail("read a model"))
    with pytest.raises(ValueError, match=message):
        latentdiff.load(device="cpu", dtype="float32", **bad)


@pytest.mark.parametrize("files", [{"lora": "no.safetensors"}, {"lora": {"no.safetensors": 2}}, {"embeddings": ["no.safetensors"]}])
def test_files_that_are_not_there_are_missed_before_a_model_is_read(monkeypatch, files):
    monkeypatch.setattr(loading, "load_parts", lambda *_, **__: pytest.fail("read a model"))
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors: there is no such file"):
        latentdiff.load(device="cpu", dtype="float32", **files)
