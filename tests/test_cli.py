"""The command line: in the same process by `main`, and once as a user starts it."""

import os
import re
import select
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import cli
from latentdiff import images as I
from latentdiff.doctor import OPTIONAL, Finding, examine, torchvision_fit


@pytest.fixture
def run(tiny_folder, capsys, tmp_path, monkeypatch):
    """run("generate", …) -> (exit code, stdout, stderr), in an empty folder; `model` adds the tiny model."""
    monkeypatch.chdir(tmp_path)

    def call(*tokens, model=True):
        extra = ["--model", str(tiny_folder)] if model and tokens[0] == "generate" else []
        extra += [] if "--device" in tokens or not extra else ["--device", "cpu"]
        with pytest.raises(SystemExit) as exit:
            cli.main([*map(str, tokens), *extra])
        out, err = capsys.readouterr()
        return exit.value.code, out, err

    return call


def equal(a, b) -> bool:
    return np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b)))


def test_a_picture_and_what_is_said_of_it(run):
    code, out, err = run("generate", "a cat", "-o", "new/cat.png", "--steps", 2, "--seed", 7)
    assert (code, out) == (0, "new/cat.png  seed 7\n")
    assert "2/2" in err  # the bar
    assert Image.open("new/cat.png").size == (32, 32)
    assert run("generate", "a cat", "-o", "b.png", "--steps", 2, "--seed", 7, "--quiet")[2] == ""
    assert equal("new/cat.png", "b.png")


def test_every_option_reaches_the_pipeline(run):
    run(
        "generate", "a cat", "-o", "a.png", "--negative", "a dog", "--guidance", 3.5, "--rescale", 0.2, "--steps", 3,
        "--sampler", "ddim", "--spacing", "leading", "--eta", 0.5,
        "--seed", 2**64 - 1, "--size", "40x16", "--batch", 2, "--dtype", "float32", "-q",
    )  # fmt: skip
    assert I.read_recipe("a.png") == {
        "prompt": "a cat", "negative": "a dog", "guidance": 3.5, "rescale": 0.2, "steps": 3, "sampler": "ddim",
        "spacing": "leading", "eta": 0.5, "seed": 2**64 - 1, "size": (40, 16),
    }  # fmt: skip


def test_several_prompts_pictures_and_a_file_of_prompts(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\n  two stars \n", encoding="utf-8-sig")  # as editors of Windows do
    code, out, _ = run("generate", "a cat", "--prompts-file", "prompts.txt", "-n", 2, "--seed", 3, "--steps", 1, "-o", "out/", "-q")
    assert code == 0
    names = ["a-cat"] * 2 + ["a-dog"] * 2 + ["two-stars"] * 2
    assert out.splitlines() == [f"out/{name}-{seed}.png  seed {seed}" for seed, name in enumerate(names, 3)]
    assert I.read_recipe("out/two-stars-8.png")["prompt"] == "two stars"
    assert run("generate", "a cat", "-n", 2, "--steps", 1, "-o", "c.png", "-q")[1].split()[::3] == ["c-1.png", "c-2.png"]


def test_a_grid_is_one_picture(run):
    code, out, _ = run("generate", "a cat", "-n", 3, "--steps", 1, "-o", "g.png", "--grid", "--columns", 3, "--seed", 5, "-q")
    assert (code, out) == (0, "g.png  3 pictures, seeds 5 to 7\n")
    assert Image.open("g.png").size == (96, 32)
    run("generate", "a cat", "--steps", 1, "-o", "h.png", "--grid", "--labels", "-q")
    assert Image.open("h.png").height > 32


def test_a_recipe_makes_the_picture_again(run):
    run("generate", 'a cat, "x":\nSteps: 1', "-n", 2, "-o", "a.png", "--steps", 3, "--sampler", "ddpm", "--size", "16x24", "-q")
    code, out, err = run("generate", "--recipe", "a-2.png", "-o", "b.png", "-q")
    assert code == 0
    assert equal("a-2.png", "b.png")
    assert out == f"b.png  seed {I.read_recipe('a-2.png')['seed']}\n"
    assert err.startswith("latentdiff: recipe of a-2.png (Model: tiny, Precision: ")
    assert I.read_recipe("b.png") == I.read_recipe("a-2.png")
    run("generate", "--recipe", "a-2.png", "-o", "c.png", "-q", "--size", "16")
    assert I.read_recipe("c.png") == I.read_recipe("a-2.png") | {"size": (16, 16)}


def test_a_recipe_of_another_model_is_told_of(run):
    run("generate", "a cat", "-o", "a.png", "--steps", 1, "--seed", 1, "--size", 16, "-q")
    with Image.open("a.png") as image:
        image.info["parameters"] = image.info["parameters"].replace("Model: tiny", "Model: tiny + flat:0.8")
        I.save_image(image, Path("b.png"))
    code, _, err = run("generate", "--recipe", "b.png", "-o", "c.png", "-q")
    assert code == 0
    assert err.endswith("latentdiff: the recipe's Model is tiny + flat:0.8, here it is tiny: maybe another picture\n")
    _, _, err = run("generate", "--recipe", "a.png", "-o", "c.png", "-q")
    assert "maybe another picture" not in err


def test_a_recipe_of_another_precision_is_told_of(run):
    run("generate", "a cat", "-o", "a.png", "--steps", 2, "--seed", 1, "--size", 16, "--dtype", "float32", "-q")
    again = ("generate", "--recipe", "a.png", "-o", "b.png", "-q", "--dtype")
    _, _, err = run(*again, "bfloat16")
    assert err.endswith("latentdiff: the recipe's Precision is float32, here it is bfloat16: maybe another picture\n")
    _, _, err = run(*again, "float32")
    assert "maybe another picture" not in err
    with Image.open("a.png") as image:  # an older one does not tell
        image.info["parameters"] = image.info["parameters"].replace("Precision: float32, ", "")
        I.save_image(image, Path("old.png"))
    _, _, err = run("generate", "--recipe", "old.png", "-o", "b.png", "-q", "--dtype", "bfloat16")
    assert "Precision" not in err


def test_nothing_that_is_read_is_replaced_and_nothing_that_nobody_named(run, tmp_path):
    asked = ("generate", "a cat", "--steps", 1, "--seed", 7, "-q")
    assert [run(*asked)[1].split()[0] for _ in range(2)] == ["a-cat-7.png", "a-cat-7-2.png"]
    run(*asked, "-o", "a-2.png")
    before = (tmp_path / "a-2.png").read_bytes()
    for more in (("-o", "a-2.png"), ("-o", "./a.png", "-n", 2), ("-o", "a-2.png", "-n", 2, "--grid")):
        code, _, err = run("generate", "--recipe", "a-2.png", "-q", *more)
        assert code == 2
        assert "path must be another file than those that are read, got 'a-2.png'" in err
    assert (tmp_path / "a-2.png").read_bytes() == before
    assert run(*asked, "-o", "a-2.png", "--negative", "dog")[0] == 0  # named, so replaced
    assert (tmp_path / "a-2.png").read_bytes() != before


def test_a_recipe_that_needs_a_picture_says_which_command_takes_it(run, tiny_pipe, tiny_folder):
    photo = tiny_pipe("a cat", steps=1, progress=False)[0]
    tiny_pipe.edit(photo, source="a cat", target="a dog", steps=1, progress=False).save("edit.png")
    tiny_pipe("a dog", image=photo, steps=1, progress=False).save("img2img.png")
    for name, more in (("edit.png", ()), ("img2img.png", ("--refiner", tiny_folder))):
        code, _, err = run("generate", "--recipe", name, "-o", "again.png", *more)
        assert code == 2
        assert f"got {name}, made from another picture: latentdiff edit PHOTO --recipe" in err


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["generate"], "prompts must be at least one text"),
        (["generate", "a", "--steps", "0"], "steps must be an integer from 1 to 1000, got 0"),
        (["generate", "a", "--steps", "many"], "many"),
        (["generate", "a", "--steps", "2.9"], "--steps: must be a whole number, got 2.9"),
        (["generate", "a", "-n", "1.6"], "-n: must be a whole number, got 1.6"),
        (["compare", "a", "--steps", "2", "2.5"], "--steps must be a whole number, got 2.5"),
        (["train", "vae", "--out", "x", "--data", "y", "--widths", "16", "32.5"], "--widths must be a whole number, got 32.5"),
        (["generate", "a", "--guidance", "nan"], "guidance must be a finite number, got nan"),
        (["generate", "a", "--size", "13"], "size must be .* got 13"),
        (["generate", "a", "--size", "16x16x16"], "size must be a side or WIDTHxHEIGHT"),
        (["generate", "a", "--size", "big"], "size must be a side or WIDTHxHEIGHT"),
        (["generate", "a", "-n", "0"], "n must be an integer from 1 to 10000, got 0"),
        (["generate", "a", "--sampler", "ddmi"], "sampler must be one of .*did you mean"),
        (["generate", "a", "--stesp", "3"], "--stesp"),
        (["generate", "a", "-o", "cat.gif"], "path must end in .png"),
        (["generate", "a", "-o", "cat"], "path must end in .png"),
        (["generate", "a", "--grid"], "out must be a file, such as grid.png"),
        (["generate", "a", "--grid", "--columns", "0", "-o", "g.png"], "columns must be at least 1, got 0"),
        (["generate", "a", "--columns", "2"], "columns needs --grid"),
        (["generate", "a", "--labels"], "labels needs --grid"),
        (["generate", "a", "--prompts-file", "none.txt"], "none.txt"),
        (["generate", "--recipe", "none.png"], "none.png: there is no such file"),
        (["generate", "a", "--device", "tpu"], "device must be"),
        (["generate", "a", "--dtype", "int8"], "int8"),
        (["generte", "a"], 'Did you mean "generate"'),
        (["samplers", "--plot", "out"], "plot must end in .* got 'out'"),
    ],
)
def test_what_is_wrong_is_one_line_and_code_2(run, tokens, message, tmp_path):
    code, out, err = run(*tokens)
    assert (code, out) == (2, "")
    assert err.startswith("latentdiff: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert re.search(message, err)
    assert not list(tmp_path.iterdir())  # nothing was written


def test_a_model_that_is_not_there(run, tmp_path):
    code, _, err = run("generate", "a", "--model", "missing.safetensors", model=False)
    assert (code, err.count("\n")) == (2, 1)
    assert "missing.safetensors: there is no such file" in err
    (tmp_path / "page.safetensors").write_text("<!doctype html>")
    assert "HTML" in run("generate", "a", "--model", "page.safetensors", model=False)[2]


def test_debug_shows_where_an_error_comes_from(run, tiny_folder):
    with pytest.raises(ValueError, match="steps must be"):
        cli.main(["generate", "a", "--steps", "0", "--model", str(tiny_folder), "--debug"])


def test_debug_leaves_the_exit_code(run, monkeypatch):
    monkeypatch.setattr("latentdiff.doctor.examine", lambda: [Finding("torch", "missing", ok=False)])
    assert run("doctor")[0] == run("doctor", "--debug")[0] == 1


def test_errors_that_are_ours_are_not_hidden(monkeypatch, tiny_folder):
    monkeypatch.setattr("latentdiff.loading.load", lambda *_, **__: 1 // "x")
    with pytest.raises(TypeError):
        cli.main(["generate", "a"])


def test_the_help_of_every_command_is_there_without_torch():
    code = (
        "import sys; from latentdiff import cli\n"
        "for tokens in (['--help'], ['generate', '--help'], ['doctor', '--help'], ['train', '--help'], ['--version']):\n"
        "    try: cli.main(tokens)\n"
        "    except SystemExit as e: assert not e.code, tokens\n"
        "assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for text in ("generate", "doctor", "train", "--prompts-file", "--recipe", "unet"):
        assert text in out


@pytest.mark.skipif(not hasattr(select, "poll"), reason="Windows")
def test_a_reader_who_has_seen_enough_is_no_error():
    """As in `latentdiff samplers | head -1`, with Python's buffer and without."""
    for buffered in ("", "1"):
        end_early({**os.environ, "PYTHONUNBUFFERED": buffered})


def end_early(env):
    program = subprocess.Popen(
        [sys.executable, "-m", "latentdiff.cli", "samplers"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )
    assert program.stdout is not None
    program.stdout.close()
    assert program.stderr is not None
    assert program.stderr.read() == b""
    assert program.wait() == 141


@pytest.mark.parametrize("network", ["vae", "clip", "unet"])
def test_trainers_take_their_options_from_their_configuration(network, capsys):
    pytest.importorskip("accelerate")
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", network, "--help"])
    out = capsys.readouterr().out
    assert exit.value.code == 0
    assert "--out PATH" in out
    assert "--data PATH" in out
    assert "--lr FLOAT" in out


def test_the_command_from_outside_with_no_network(tiny_folder, tmp_path):
    """As a user starts it: another folder, sockets blocked, none of the packages that only training needs, and no compiler."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import socket, sys\n"
        "def blocked(*a, **k): raise RuntimeError('network')\n"
        "socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = blocked\n"
        "absent = ('torchvision', 'open_clip', 'transformers', 'accelerate', 'scipy', 'diffusers', 'torch._dynamo')\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
    )
    command = [
        sys.executable,
        "-m",
        "latentdiff.cli",
        "generate",
        "a cat",
        "-o",
        "cat.png",
        "--steps",
        "2",
        "--model",
        str(tiny_folder),
    ]
    env = {**os.environ, "PYTHONPATH": str(guard)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cat.png  seed ")
    assert Image.open(tmp_path / "cat.png").size == (32, 32)


@pytest.mark.parametrize("able", [True, False])
def test_products_in_8_bits_are_asked_for_and_told_of(run, monkeypatch, able):
    from latentdiff import doctor

    def load(*_, int8: bool, **__):
        raise ValueError(f"int8 is {int8}")

    monkeypatch.setattr("latentdiff.loading.load", load)
    assert f"int8 is {able}" in run("generate", "a cat", *["--int8"] * able)[2]
    monkeypatch.setattr(doctor, "multiplies_int8", lambda _: able)
    assert ("products in 8 bits (--int8)" in run("doctor")[1]) is able


# -------------------------------------------------------------------------------------------------------------------- doctor


def test_doctor_reports_and_says_when_weights_are_missing(run, monkeypatch, tiny_folder):
    from latentdiff import doctor

    monkeypatch.setattr(doctor, "embedded", lambda: tiny_folder)
    findings = {f.name: f for f in examine()}
    assert {"latentdiff", "torch", "torchvision", "cpu", "choice", "threads", "weights"} <= set(findings)
    assert "32×32 pixels" in findings["weights"].text
    assert findings["choice"].text.split()[0] in ("cpu", "cuda", "mps")

    def absent():
        raise FileNotFoundError("the embedded model is nowhere")

    monkeypatch.setattr(doctor, "embedded", absent)
    code, out, _ = run("doctor")
    assert code == 1
    assert "! weights          the embedded model is nowhere" in out


def test_the_extras_that_doctor_names_hold_the_packages():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for name, extra in OPTIONAL.items():
        assert any(line.startswith(name) for line in project["optional-dependencies"][extra]), name


@pytest.mark.parametrize(
    ("torch", "vision", "wanted", "error", "ok", "text"),
    [
        ("2.10.0", "0.25.0", "==2.10.0", None, True, "they fit"),
        ("2.10.0+cu128", "0.25.0", "==2.10.0", None, True, "they fit"),
        ("2.11.0", "0.25.0", ">=2.10", None, True, "they fit"),
        ("2.11.0", "0.25.0", "==2.10.0", None, False, "they do not fit"),
        ("2.11.0", "0.25.0", "", "operator torchvision::nms does not exist", False, "nms does not exist"),
        ("2.11.0", None, "", "No module named torchvision", True, "pictures are made without it"),
    ],
)
def test_torchvision_and_torch(torch, vision, wanted, error, ok, text):
    found = torchvision_fit(torch, vision, wanted, error)
    assert found.ok is ok
    assert text in found.text


def test_inspect_and_convert(run, tiny_folder):
    assert run("convert", tiny_folder, "m.safetensors", "--dtype", "float16") == (0, "m.safetensors\n", "")
    code, out, _ = run("inspect", "m.safetensors")
    assert code == 0
    for words in ("m.safetensors: model, single file", "32x32 pixels", "prediction  v", "float16", "unknown     nothing"):
        assert words in out
    assert run("convert", "m.safetensors", "again")[0] == 0
    assert "again: model, folder" in run("inspect", "again")[1]
    code, out, err = run("inspect", "nothing.safetensors")
    assert (code, out) == (2, "")
    assert "nothing.safetensors: there is no such file or folder" in err


def test_loras_words_and_a_refiner_from_the_command_line(run, tiny_pipe, tiny_folder):
    from latentdiff.checkpoints.files import write_safetensors

    name, weight = next((n, w) for n, w in tiny_pipe.unet.state_dict().items() if n.endswith("to_q.weight"))
    tensors = {f"unet.{name.removesuffix('.weight')}.lora_A.weight": torch.ones(1, weight.shape[1])}
    tensors[f"unet.{name.removesuffix('.weight')}.lora_B.weight"] = torch.ones(weight.shape[0], 1)
    write_safetensors(Path("l.safetensors"), tensors)
    write_safetensors(Path("w.safetensors"), {"toyword": torch.ones(2, tiny_pipe.spec.towers[0].width)})
    asked = ("generate", "a toyword", "--steps", 2, "--seed", 1, "-q")
    options = {
        "a": (),
        "b": ("--lora", "l.safetensors:0.5"),
        "c": ("--lora", "l.safetensors:0.0"),
        "d": ("--embedding", "w.safetensors"),
        "e": ("--refiner", tiny_folder, "--handoff", 0.5),
        "f": ("--handoff", 0.5),
    }
    codes = {key: run(*asked, "-o", f"{key}.png", *more)[0] for key, more in options.items()}
    assert codes == {"a": 0, "b": 0, "c": 0, "d": 0, "e": 0, "f": 2}
    assert not equal("a.png", "b.png")
    assert equal("a.png", "c.png")
    assert not equal("a.png", "d.png")
    assert equal("a.png", "e.png")  # handed over to itself
    assert "Refiner: " in Image.open("e.png").info["parameters"]

    again = ("edit", "a.png", "--to", "a toyword", "--steps", 2, "--seed", 1, "-q", "--device", "cpu", "--model", tiny_folder)
    assert [run(*again, "-o", f"{key}-2.png", *options[key])[0] for key in "abcd"] == 4 * [0]
    assert not equal("a-2.png", "b-2.png")
    assert equal("a-2.png", "c-2.png")
    assert not equal("a-2.png", "d-2.png")

    grid = ("compare", "a toyword", "--steps", 2, "--samplers", "ddim", "--device", "cpu", "--model", tiny_folder)
    assert [run(*grid, "-o", f"{key}-3.png", *options[key])[0] for key in "abc"] == 3 * [0]
    assert not equal("a-3.png", "b-3.png")
    assert equal("a-3.png", "c-3.png")

    code, _, err = run(*asked, "--lora", "l.safetensors:0.5", "l.safetensors:-0.5")
    assert code == 2
    assert "lora must name each file once, got l.safetensors, l.safetensors" in err
    for command in ("generate", "edit"):
        code, _, err = run(command, "--lora", "l.safetensors", "a.png")
        assert code == 2
        assert "; put them before options that take several values" in err


def test_a_recipe_of_another_vae_is_told_of(run, tiny_folder):
    run(
        "generate",
        "a cat",
        "-o",
        "a.png",
        "--steps",
        1,
        "--seed",
        1,
        "--size",
        16,
        "-q",
        "--vae",
        tiny_folder,
        "--prediction",
        "x0",
    )
    _, _, err = run("generate", "--recipe", "a.png", "-o", "b.png", "-q")
    assert err.endswith("Model is tiny + vae:tiny + prediction:x0, here it is tiny: maybe another picture\n")
