"""What `load` refuses before it reads."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"lora": "no.safetensors"}, r"lora: no\.safetensors: there is no such file"),
        ({"lora": {"no.safetensors": 2}}, r"lora: no\.safetensors: there is no such file"),
        ({"embeddings": ["no.safetensors"]}, r"embeddings: no\.safetensors: there is no such file"),
        ({"lora": {__file__: 10**400}}, "the scale of .*test_loading.py must be a finite number, got 10"),
        ({"lora": {__file__: float("nan")}}, "the scale of .*test_loading.py must be a finite number, got nan"),
        ({"lora": {__file__: float("inf")}}, "a finite number, got inf"),
        ({"lora": {__file__: "0.8"}}, "a finite number, got '0.8'"),
        ({"lora": {__file__: None}}, "a finite number, got None"),
        ({"embeddings": {__file__: 1}}, "the word of .*test_loading.py must be text, got 1"),
        ({"lora": [(__file__, 0.8)]}, r"takes a file, a list of files or a dict of files .* got \[\('.*test_loading.py', 0.8\)\]"),
        ({"lora": 0.8}, "takes a file, a list of files .* got 0.8"),
        ({"embeddings": None}, "takes a file, a list of files .* got None"),
        ({"lora": iter([__file__])}, "takes a file, a list of files .* got <list_iterator"),  # it would be empty later
        ({"lora": Path(__file__).parent}, "tests is a folder; name the file in it"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_a_model_is_read(monkeypatch, files, message):
    monkeypatch.setattr(loading, "load_parts", lambda *_, **__: pytest.fail("read a model"))
    with pytest.raises((ValueError, FileNotFoundError, IsADirectoryError), match=message):
        latentdiff.load(device="cpu", dtype="float32", **files)


def test_a_model_tells_what_moves_its_pictures():
    assert latentdiff.load(device="cpu", dtype="float32").precision == "float32"
    pipe = latentdiff.load(device="cpu", dtype="bfloat16", weights="int8", cache=2)
    assert pipe.precision == "bfloat16, weights in int8, cache 2"
    assert repr(pipe) == "Pipeline(embedded, 128×128, bfloat16, weights in int8, cache 2 on cpu)"
    assert pipe.marks == {"Model": "embedded", "Precision": pipe.precision}
    assert replace(pipe, unet=copy.deepcopy(pipe.unet).float()).precision == "float32, weights in int8, cache 2"


def test_what_is_loaded_in_inference_mode_is_as_ever():
    with torch.inference_mode():
        pipe = latentdiff.adapt(latentdiff.load(device="cpu"))
        picture = pipe("a cat", seed=1, steps=2, progress=False)[0]
    assert not any(p.is_inference() for p in pipe.unet.parameters())
    assert picture == latentdiff.load(device="cpu")("a cat", seed=1, steps=2, progress=False)[0]
