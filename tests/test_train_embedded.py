"""The recipe of the embedded model, at the size of a thimble: every stage, in order, to a folder that ships."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.run import parse_args

pytest.importorskip("accelerate")

from latentdiff.checkpoints.files import read_header
from latentdiff.evaluation.clip_score import load_clip
from latentdiff.loading import load
from latentdiff.training.clip import CLIPTraining
from latentdiff.training.drawings import ComposeConfig
from latentdiff.training.unet import UNetTraining
from latentdiff.training.vae import VAETraining

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_embedded.py"
FEW: dict[str, Any] = {"steps": 2, "batch": 4, "size": 32, "warmup": 0}
CLIP: dict[str, Any] = {"patch": 16, "width": 16, "heads": 2, "text_layers": 1, "image_layers": 1, "vocab": 600, "length": 12}


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    """scripts/train_embedded.py with one more preset, whose networks are tiny."""
    spec = importlib.util.spec_from_file_location("train_embedded", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    compose = {"everyday": 0.5}
    module.PRESETS = {
        "cpu": module.Recipe(
            vae={**FEW, "widths": (8, 8), "groups": 4},
            clip={**FEW, **CLIP},
            judge={**FEW, **CLIP, "freeze_text": True},
            unet={**FEW, "widths": (8, 16), "attention": (False, True), "head_width": 8, "groups": 4, "pictures": 9},
            compose={"vae": compose, "clip": compose, "judge": compose, "unet": compose},
        )
    }
    return module


@pytest.fixture(scope="module")
def made(recipe: ModuleType, drawings_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipe leaves behind: RUN, and in RUN/../weights the model."""
    run = tmp_path_factory.mktemp("recipe") / "run"
    weights = run.parent / "weights"
    weights.mkdir()
    (weights / "README.md").write_text("the card")
    recipe.main(run, data=drawings_folder, weights=weights)
    return run


def test_what_ships_is_whole_and_in_half_precision(made: Path) -> None:
    weights = made.parent / "weights"
    files = sorted(p.relative_to(weights).as_posix() for p in weights.rglob("*.safetensors"))
    assert files == [
        "clip/model.safetensors", "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    for file in files:
        assert {entry.dtype for entry in read_header(weights / file)[0].values()} == {torch.float16}, file
    assert (weights / "README.md").read_text() == "the card"  # what lay there stays
    pipe = load(weights, device="cpu")
    assert pipe("a cat", steps=1, seed=0, progress=False)[0].size == (32, 32)
    assert load_clip(weights).config.vision_config.image_size == 32


def test_half_precision_draws_the_same_pictures(recipe: ModuleType, made: Path) -> None:
    assert recipe.mean_difference(made / "unet" / "model", made / "weights") < 0.5
    assert recipe.mean_difference(made / "weights", made / "weights") == 0


def test_stages_are_timed(recipe: ModuleType, made: Path) -> None:
    seconds = json.loads((made / "times.json").read_text())
    assert list(seconds) == list(recipe.STAGES)
    assert all(s >= 0 for s in seconds.values())


def test_times_survive_a_kill_while_they_are_written(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text.encode()[:3])
        raise KeyboardInterrupt

    recipe.timed(tmp_path, "vae", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            recipe.timed(tmp_path, "clip", lambda: None)
    recipe.timed(tmp_path, "clip", lambda: None)
    assert list(json.loads((tmp_path / "times.json").read_text())) == ["vae", "clip"]


def test_what_is_done_is_not_done_again(recipe: ModuleType, made: Path, drawings_folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in made.glob("*/step-*/*")}
    seconds = json.loads((made / "times.json").read_text())
    for stage in ("vae", "clip", "judge", "unet"):
        recipe.main(made, data=drawings_folder, stage=stage)
    assert {p: p.stat().st_mtime_ns for p in made.glob("*/step-*/*")} == before
    again = json.loads((made / "times.json").read_text())
    assert all(again[stage] >= seconds[stage] for stage in seconds)


def test_a_finished_model_is_trained_on(recipe: ModuleType, made: Path, drawings_folder: Path, tmp_path: Path) -> None:
    """Only its U-Net, for which the other networks stay to the last bit."""
    weights = made.parent / "weights"
    recipe.main(tmp_path / "run", data=drawings_folder, start=weights)
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if p.is_dir()) == ["clip-half", "unet", "weights"]
    for part, same in (
        ("vae/diffusion_pytorch_model", True),
        ("text_encoder/model", True),
        ("unet/diffusion_pytorch_model", False),
    ):
        then, now = (load_file(folder / f"{part}.safetensors") for folder in (weights, tmp_path / "run" / "weights"))
        assert all(torch.equal(then[name], now[name]) for name in then) == same, part
    with pytest.raises(SystemExit, match="--stage must be one of data, unet, weights with --start, got clip"):
        recipe.main(tmp_path / "run", data=drawings_folder, start=weights, stage="clip")


def test_a_model_too_large_or_too_coarse_is_not_shipped(recipe: ModuleType, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = made.parent / "nothing"
    for name, value, message in (("LARGEST", 1000, "at most 1,000 may be shipped"), ("CLOSE", -1.0, "draw other pictures")):
        with monkeypatch.context() as patch:
            patch.setattr(recipe, name, value)
            with pytest.raises(SystemExit, match=message):
                recipe.assemble(made, target)
    assert not target.exists()


def test_several_processes_are_this_script_again(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, Any]]] = []
    monkeypatch.setattr(recipe.subprocess, "run", lambda command, **options: calls.append(([*map(str, command)], options)))
    recipe.main(tmp_path / "run", data=tmp_path / "data", processes=2, stage="clip")
    recipe.main(tmp_path / "run", data=tmp_path / "data", processes=2, stage="unet", start=tmp_path)
    for (command, options), told in zip(calls, (["clip"], ["unet", "--start", str(tmp_path)]), strict=True):
        assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
        understood = parse_args(command[3:])  # as the launcher does, which has an option --start-method of its own
        assert (understood.standalone, understood.nproc_per_node, understood.training_script) == (True, "2", str(SCRIPT))
        run = [str(tmp_path / "run"), "--preset", "cpu", "--data", str(tmp_path / "data"), "--stage", *told]
        assert understood.training_script_args == run
        assert options["check"]
        assert options["env"]["OMP_NUM_THREADS"] == "1"
    with pytest.raises(SystemExit, match="--processes must be at least 1, got 0"):
        recipe.main(tmp_path, processes=0)


@pytest.mark.parametrize("preset", ["SHORT", "CPU", "GPU"])
def test_presets_are_valid_and_of_one_architecture(recipe: ModuleType, preset: str) -> None:
    chosen, short, folder = getattr(recipe, preset), recipe.SHORT, Path("x")
    shared: dict[str, Any] = {"out": folder, "data": folder}
    VAETraining(**shared, **chosen.vae)
    CLIPTraining(**shared, **chosen.clip)
    CLIPTraining(**shared, **chosen.judge)
    UNetTraining(**shared, vae=folder, clip=folder, **chosen.unet)
    assert set(chosen.compose) == {"vae", "clip", "judge", "unet"}
    for compose in chosen.compose.values():
        ComposeConfig(**compose)
    sizes_of = {"vae": recipe.VAE_SIZES, "clip": recipe.CLIP_SIZES, "judge": {}, "unet": recipe.UNET_SIZES}
    for stage, sizes in sizes_of.items():
        assert sizes.items() <= getattr(chosen, stage).items()
        seen, least = (which["steps"] * which["batch"] for which in (getattr(chosen, stage), getattr(short, stage)))
        assert seen >= least


def test_favourites_are_a_list_of_distinct_names(recipe: ModuleType) -> None:
    assert len(set(recipe.FAVOURITES)) == len(recipe.FAVOURITES) > 200
    assert {"cat", "dog", "red apple", "house"} <= set(recipe.COMMON)
    assert all(name == name.strip() and "\n" not in name and name for name in recipe.FAVOURITES)
