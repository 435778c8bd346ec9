"""LoRAs and words on a pipeline: another pipeline; the first makes the same pictures as before."""

from copy import deepcopy
from dataclasses import replace
from itertools import product

import pytest
import torch
from PIL import Image

from latentdiff import cli
from latentdiff.adapting import adapt
from latentdiff.checkpoints.adapted import scaled, worded
from latentdiff.checkpoints.files import CheckpointError, write_safetensors
from latentdiff.models import recorded
from latentdiff.models.attention import Attention
from latentdiff.models.caching import Cached

FEW = {"steps": 2, "seed": 1, "progress": False}


def lora(pipe, path, part="attn"):
    tensors = {}
    for key, w in pipe.unet.state_dict().items():
        if part in key and w.ndim == 2:
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            generator = torch.Generator().manual_seed(len(tensors))
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, w.shape[1], generator=generator)
            tensors[f"{name}.lora_up.weight"] = torch.randn(w.shape[0], 2, generator=generator)
    write_safetensors(path, tensors)
    return path


def picture(pipe, prompt="a cat"):
    (image,) = pipe(prompt, **FEW)
    return image.tobytes()


def test_loras_make_another_pipeline(tiny_pipe, tmp_path):
    before, path = picture(tiny_pipe), lora(tiny_pipe, tmp_path / "l.safetensors")
    on = adapt(tiny_pipe, lora={path: 0.8})
    assert picture(on) != before
    assert on.title == f"{tiny_pipe.title} + l:0.8"  # pictures tell of it
    assert picture(tiny_pipe) == before
    assert picture(adapt(tiny_pipe, lora={path: 0.0})) == before
    assert picture(adapt(tiny_pipe, lora=str(path))) == picture(adapt(tiny_pipe, lora=[path]))
    assert picture(adapt(tiny_pipe, lora={path: 1.0})) != picture(on)
    off = adapt(on, lora={path: -0.8})  # from merged weights: close, not equal; the first pipeline is the way back
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(off.unet.parameters(), tiny_pipe.unet.parameters(), strict=True))


def test_what_is_on_already_stays_on(tiny_pipe, tmp_path):
    """A LoRA that was not merged, under a second one and under a new word; and features that are kept for some steps."""
    path = lora(tiny_pipe, tmp_path / "l.safetensors")
    width = tiny_pipe.spec.towers[0].width
    write_safetensors(tmp_path / "w.safetensors", {"toyword": torch.ones(1, width)})
    on = adapt(tiny_pipe, lora={path: 0.3}, merge=False)
    twice = adapt(adapt(on, lora={path: 0.4}), embeddings=tmp_path / "w.safetensors")
    near, far = (differ(picture(twice), picture(adapt(tiny_pipe, lora={path: scale}))) for scale in (0.7, 0.4))
    assert 10 * near < far
    cached = replace(tiny_pipe, network=Cached(tiny_pipe.unet, 3))
    found = adapt(cached, lora=path)
    assert isinstance(found.network, Cached)
    assert (found.network.unet, found.network.every) == (found.unet, 3)
    with pytest.raises(ValueError, match="compile must be False for a model that was loaded with cache"):
        adapt(cached, lora=path, compile=True)


def differ(a: bytes, b: bytes) -> int:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def products(pipe):
    """Of each self-attention: the weights that make queries, keys and values in one product; None where three do."""
    return [m.joined() for m in pipe.unet.modules() if isinstance(m, Attention) and not m.cross]


def places(pipe):
    return {name: weight.data_ptr() for name, weight in pipe.unet.state_dict().items()}


@torch.no_grad()
def test_one_product_makes_queries_keys_and_values_as_in_a_loaded_model(tiny_pipe, tmp_path, monkeypatch):
    """A copy of the model, in which three do, is the oracle. What no LoRA changes is not copied for it."""
    before, there = picture(tiny_pipe), places(tiny_pipe)
    everywhere, elsewhere, keys = (lora(tiny_pipe, tmp_path / f"{part}.st", part) for part in ("attn", "attn2", "attn1.to_k"))
    for path, merge in product((everywhere, elsewhere, keys), (True, False)):
        on = adapt(tiny_pipe, lora={path: 0.08}, merge=merge)
        plain = replace(on, unet=deepcopy(on.unet), network=None)
        heard = not merge and path is not elsewhere  # each layer by itself
        assert all((whole is None) is heard for whole in products(on))
        assert all(whole is None for whole in products(plain))
        assert differ(picture(on), picture(plain)) <= 1
        changed = {name for name, place in places(on).items() if place != there[name]}
        if not merge:
            assert not changed
        elif path is elsewhere:
            assert all("attn2" in name for name in changed)
    assert (picture(tiny_pipe), places(tiny_pipe)) == (before, there)
    assert all(whole is not None for whole in products(tiny_pipe))
    monkeypatch.setattr(recorded, "SMALL", 0)
    assert all(whole is None for whole in products(adapt(tiny_pipe, lora=everywhere)))


def test_words(tiny_pipe, tmp_path):
    before = picture(tiny_pipe, "a toyword")
    width = tiny_pipe.spec.towers[0].width
    write_safetensors(
        tmp_path / "w.safetensors", {"toyword": torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 5}
    )
    on = adapt(tiny_pipe, embeddings=tmp_path / "w.safetensors")
    assert len(on.text.tokenizers[0]("toyword")) == 3
    assert on.spec.towers[0].vocab == tiny_pipe.spec.towers[0].vocab + 3
    assert picture(on, "a toyword") != before
    assert picture(on, "a cat") == picture(tiny_pipe, "a cat")
    named = adapt(tiny_pipe, embeddings={tmp_path / "w.safetensors": "<other>"})
    assert picture(named, "a <other>") == picture(on, "a toyword")


def test_faults_are_those_of_the_files(tiny_pipe, tmp_path):
    write_safetensors(tmp_path / "l.safetensors", {"lora_unet_nothing.lora_down.weight": torch.ones(1, 1)})
    with pytest.raises(CheckpointError, match="1 of 1 keys fit no weight"):
        adapt(tiny_pipe, lora=tmp_path / "l.safetensors")
    with pytest.raises(ValueError, match=r"the scale of .* must be a finite number"):
        adapt(tiny_pipe, lora={lora(tiny_pipe, tmp_path / "m.safetensors"): float("nan")})
    with pytest.raises(FileNotFoundError):
        adapt(tiny_pipe, embeddings=tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.safetensors", ("a.safetensors", 1.0)), ("a.safetensors:0.8", ("a.safetensors", 0.8)), ("C:/x/a.st", ("C:/x/a.st", 1.0)),
     ("C:/x/a.st:-1.5", ("C:/x/a.st", -1.5)), (":0.5", (":0.5", 1.0))],
)  # fmt: skip
def test_scales_on_the_command_line(text, expected):
    assert scaled(text) == expected


def test_words_on_the_command_line(tmp_path):
    path = tmp_path / "toy.safetensors"
    path.touch()
    (tmp_path / "a:b").touch()
    assert worded(f"{path}:my:toy") == (f"{path}:my:toy", None)
    assert worded(f"{path}:mytoy") == (str(path), "mytoy")
    for text in (str(path), f"{path}:", str(tmp_path / "a:b"), "nothing:word"):
        assert worded(text) == (text, None)


def test_the_command_line_draws_with_a_loras_scale_and_an_inversions_word(tiny_folder, tiny_pipe, tmp_path, capsys):
    """The same picture as from Python, and not the base's."""
    width = tiny_pipe.spec.towers[0].width
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(0)) * 5
    write_safetensors(tmp_path / "cat.safetensors", {"emb_params": vectors})
    first, second = (lora(tiny_pipe, tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    command = ["generate", "a mytoy", "--model", str(tiny_folder), "--lora", f"{first}:0.3", f"{second}:-0.1", "--embedding"]
    command += [f"{tmp_path / 'cat.safetensors'}:mytoy", "--steps", "2", "--seed", "1", "--device", "cpu", "--dtype", "float32"]
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--quiet", "--out", str(tmp_path / "x.png")])
    assert exit.value.code == 0, capsys.readouterr().err
    on = adapt(tiny_pipe, lora={first: 0.3, second: -0.1}, embeddings={tmp_path / "cat.safetensors": "mytoy"})
    drawn = Image.open(tmp_path / "x.png").tobytes()
    assert drawn == picture(on, "a mytoy")
    assert drawn != picture(tiny_pipe, "a mytoy")
