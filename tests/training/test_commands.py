"""`latentdiff train …`: the configurations as options, from a line in a shell to a trained network."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from latentdiff import cli


def run(capsys: pytest.CaptureFixture[str], *tokens: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as exit:
        cli.main([str(token) for token in tokens])
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


def test_options_reach_the_configuration(capsys: pytest.CaptureFixture[str], drawings_folder: Path, tmp_path: Path) -> None:
    code, _, err = run(
        capsys, "train", "vae", "--out", tmp_path / "vae", "--data", drawings_folder, "--steps", 2, "--batch", 4, "--size", 16,
        "--widths", 8, 16, "--groups", 4, "--betas", 0.8, 0.95, "--precision", "no", "--max-minutes", 9.5,
        "--compose.everyday", 0.25, "--compose.scale", 0.5, 0.6,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "vae" / "step-00000002" / "state.json").read_text())["config"]
    wanted = {"steps": 2, "batch": 4, "widths": [8, 16], "betas": [0.8, 0.95], "precision": "no", "max_minutes": 9.5, "crop": None}
    assert wanted.items() <= found.items()
    assert (found["compose"]["everyday"], found["compose"]["scale"], found["compose"]["pair"]) == (0.25, [0.5, 0.6], 0.14)
    assert (tmp_path / "vae" / "model" / "vae" / "config.json").is_file()


@pytest.mark.parametrize("more", [(), ("--compose.pair", 0.2)])
def test_one_option_of_composing_changes_no_other(
    capsys: pytest.CaptureFixture[str], runs: Any, drawings_folder: Path, tmp_path: Path, more: tuple[Any, ...]
) -> None:
    sizes = [token for name, value in runs.CLIP_SIZES.items() for token in (f"--{name.replace('_', '-')}", value)]
    code, _, err = run(
        capsys, "train", "clip", "--out", tmp_path, "--data", drawings_folder, "--steps", 1, "--batch", 4, *sizes, *more
    )
    assert code == 0, err
    found = json.loads((tmp_path / "step-00000001" / "state.json").read_text())["config"]["compose"]
    assert found["everyday"] == 0.3
    assert found["pair"] == (0.2 if more else 0.14)
    assert "[default: 0.3]" in run(capsys, "train", "clip", "--help")[1]


def test_levels_with_attention_are_flags_in_order(
    capsys: pytest.CaptureFixture[str], runs: Any, pictures: Path, vae_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    code, _, err = run(
        capsys, "train", "unet", "--out", tmp_path, "--data", pictures, "--vae", vae_folder, "--clip", clip_folder, "--steps", 1,
        "--batch", 2, "--size", 16, "--widths", 8, 16, "--no-attention", "--attention", "--head-width", 8, "--groups", 4,
        "--pictures", 5, "--prompts", "a red disc", "a blue square",
    )  # fmt: skip
    assert code == 0, err
    config = json.loads((tmp_path / "model" / "unet" / "config.json").read_text())
    assert config["down_block_types"] == ["DownBlock2D", "CrossAttnDownBlock2D"]
    assert (tmp_path / "samples" / "step-00000001.png").is_file()


@pytest.mark.parametrize("network", ["vae", "clip", "unet"])
def test_every_option_is_explained(capsys: pytest.CaptureFixture[str], network: str) -> None:
    from dataclasses import fields

    from latentdiff.training.clip import CLIPTraining
    from latentdiff.training.drawings import ComposeConfig
    from latentdiff.training.unet import UNetTraining
    from latentdiff.training.vae import VAETraining

    kind: Any = {"vae": VAETraining, "clip": CLIPTraining, "unet": UNetTraining}[network]
    out = " ".join(run(capsys, "train", network, "--help")[1].replace("│", " ").split())
    for name in [f.name for f in fields(kind) if f.name != "compose"] + [f"compose.{f.name}" for f in fields(ComposeConfig)]:
        assert f"--{name.replace('_', '-')} " in out, name
    for text in ("An existing run in it is resumed.", "Chance of an everyday idea (rather than any drawing)."):
        assert text in out


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--steps", "many"], "steps"),
        (["--compose.everyday", "2"], "everyday is 2.0, must be a share from 0 to 1"),
        (["--stepz", "3"], "stepz"),
        (["--data", "nowhere"], "data must be a folder or an uncompressed .tar, got nowhere"),
        (["--crop", "256"], "crop must be at most size (128), got 256"),
    ],
)
def test_mistakes_are_one_line_that_names_them(
    capsys: pytest.CaptureFixture[str], pictures: Path, tmp_path: Path, tokens: list[str], message: str
) -> None:
    data = [] if "--data" in tokens else ["--data", pictures]
    code, _, err = run(capsys, "train", "vae", "--out", tmp_path / "x", *data, *tokens)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("more", [("--out", "x", "--data", "y"), ("--help",)])
def test_a_package_that_is_missing_is_named(tmp_path: Path, more: tuple[str, ...]) -> None:
    code = f"import sys; sys.modules['accelerate'] = None; from latentdiff.cli import main; main(['train', 'vae', *{more!r}])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (told.returncode, told.stdout) == (2, "")
    assert told.stderr == 'latentdiff: training needs accelerate: pip install "latentdiff[train]"\n'


def test_a_missing_option_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "train", "clip", "--out", tmp_path)
    assert code == 2
    assert "--data" in err


@pytest.mark.slow
def test_torchrun_starts_several(runs: Any, pictures: Path, tmp_path: Path) -> None:
    """The command itself in two processes: each sees half of every batch, one writes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "latentdiff.cli"]
    sizes = ["--steps", "3", "--batch", "4", "--size", "16", "--widths", "8", "8", "--groups", "4"]
    command = [sys.executable, *launch, "train", "vae", "--out", tmp_path, "--data", pictures, *sizes]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000003"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
