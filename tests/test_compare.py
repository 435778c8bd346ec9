"""Samplers side by side: the grid of pictures, the errors and their plot, and the commands that make them."""

import math
from dataclasses import replace

import pytest
from PIL import Image

from latentdiff import compare
from latentdiff.cli import main
from latentdiff.diffusion.samplers import FACTS, SAMPLERS


def test_the_grid_has_a_row_a_sampler_and_a_column_a_number_of_steps(tiny_pipe):
    sheet = compare.sampler_grid(tiny_pipe, "a cat", ["euler", "DPM++ 2M Karras", "Euler a"], [1, 2], seed=4)
    assert sheet.width == 2 * 32
    row = sheet.height // 3
    for i, name in enumerate(("euler", "DPM++ 2M Karras", "Euler a")):
        for k, steps in enumerate((1, 2)):
            alone = tiny_pipe("a cat", sampler=name, steps=steps, seed=4, progress=False)[0]
            assert sheet.crop((32 * k, row * i, 32 * (k + 1), row * i + 32)).tobytes() == alone.tobytes()


def test_a_seed_that_is_drawn_is_one_for_all(tiny_pipe):
    for seed in (-1, None):
        sheet = compare.sampler_grid(tiny_pipe, "a cat", ["euler"], [2, 2], seed=seed)
        assert sheet.crop((0, 0, 32, 32)).tobytes() == sheet.crop((32, 0, 64, 32)).tobytes()


@pytest.mark.parametrize(
    ("samplers", "steps", "message"),
    [
        (["euler", "oiler"], [2], "sampler must be one of .*got 'oiler'"),
        ([], [2], "at least one"),
        (["euler"], [], "at least one"),
        (["euler"], [2, 0], "steps must be an integer from 1 to 1000, got 0"),
    ],
)
def test_a_bad_comparison_is_refused_before_any_picture(tiny_pipe, samplers, steps, message):
    with pytest.raises(ValueError, match=message):
        compare.sampler_grid(replace(tiny_pipe, text=None), "a cat", samplers, steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_of_each_sampler_is_watched_and_stopped(tiny_pipe, name):
    """Each step has its preview, and a run that is left computes no more; the last step's is what the call gives."""
    called = []
    hook = tiny_pipe.unet.register_forward_pre_hook(lambda module, args: called.append(len(args[0])))
    try:
        run = tiny_pipe.stream("a cat", sampler=name, steps=5, seed=1)
        previews = [next(run).preview()[0] for _ in range(2)]
        done = len(called)
        run.close()
        assert len(called) == done
        steps = list(tiny_pipe.stream("a cat", sampler=name, steps=5, seed=1))
        assert len(called) - done > done
    finally:
        hook.remove()
    assert [step.i for step in steps] == list(range(5))
    assert all(a.tobytes() == step.preview()[0].tobytes() for a, step in zip(previews, steps, strict=False))
    assert steps[-1].images()[0].tobytes() == tiny_pipe("a cat", sampler=name, steps=5, seed=1, progress=False)[0].tobytes()


def test_errors_fall_as_the_orders_say_and_evaluations_are_counted():
    found = compare.convergence(counts=(64, 128))
    assert list(found) == [name for name in SAMPLERS if not FACTS[name].stochastic]
    for name, ((few, large), (many, small)) in found.items():
        assert many - few == 64 * FACTS[name].evaluations
        assert math.log2(large / small) > min(FACTS[name].order, 3) - 0.5  # 4 shows where the start is finer than this
    assert found["deis"][0][1] < found["dpmpp_2m"][0][1] < found["ddim"][0][1]
    assert list(compare.convergence(["UniPC"], counts=(8,))) == ["unipc"]


def test_the_plot_and_the_table(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(compare.plot_convergence, "__defaults__", (("ddim", "unipc"), (4, 8)))
    with pytest.raises(SystemExit) as exit:
        main(["samplers", "--plot", str(tmp_path / "docs" / "c.png")])
    assert exit.value.code == 0
    assert Image.open(tmp_path / "docs" / "c.png").width > 500
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(SAMPLERS)
    assert "stochastic" in lines[1]


def test_the_compare_command(tmp_path, tiny_folder, capsys):
    out = tmp_path / "grid.png"
    arguments = ["compare", "a cat", "-m", str(tiny_folder), "--samplers", "euler", "unipc", "--steps", "1", "2", "-o", str(out)]
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--guidance", "cfg(3) + pag(1)", "--device", "cpu"])
    assert exit.value.code == 0, capsys.readouterr().err
    assert Image.open(out).width == 64
