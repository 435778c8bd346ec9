"""Training the autoencoder: its losses, its crops, its folder, exact resume."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from latentdiff.checkpoints.families import EMBEDDED
from latentdiff.checkpoints.fill import Options
from latentdiff.checkpoints.io import load_vae
from latentdiff.training import vae as trainer
from latentdiff.training.data import open_source
from latentdiff.training.vae import VAETraining, crops, kl_loss, latent_scale, reconstruction_loss, to_float, train_vae


def config(out: Path, pictures: Path, sizes: dict[str, Any], **changes: Any) -> VAETraining:
    return VAETraining(**{"out": out, "data": pictures, "steps": 7, "batch": 5, "lr": 1e-2, **sizes, **changes})


# ------------------------------------------------------------------------------------------------ losses


def test_kl_is_the_divergence_from_a_standard_gaussian() -> None:
    mean, logvar = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double()
    mine = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    wanted = torch.distributions.kl_divergence(mine, torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    torch.testing.assert_close(kl_loss(mean, logvar), wanted.mean(), rtol=1e-12, atol=0)
    assert kl_loss(torch.zeros(5), torch.zeros(5)) == 0


def test_reconstruction_loss_of_a_constant_error() -> None:
    """Off by c everywhere: |c| + c² at full size, half of |c| at each of two coarser ones, and no edges."""
    x, c = torch.rand(2, 3, 8, 8).double(), 0.3
    assert reconstruction_loss(x, x, edges=0.5) == 0
    torch.testing.assert_close(reconstruction_loss(x, x + c, edges=7.0).item(), c + c**2 + c, rtol=1e-12, atol=0)


def test_reconstruction_loss_sees_edges() -> None:
    """A checkerboard of ± c around the picture: no coarse error, and gradients off by 2c."""
    x, c = torch.zeros(1, 1, 8, 8).double(), 0.1
    board = c * (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8)).double()
    found = [reconstruction_loss(x, x + board, edges).item() for edges in (0.0, 0.5)]
    assert found == pytest.approx([c + c**2, c + c**2 + 0.5 * (2 * c + 2 * c)], rel=1e-12)


# ------------------------------------------------------------------------------------------------ data


def test_pictures_become_numbers_from_minus_one_to_one() -> None:
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def numbered(n: int, side: int) -> Tensor:
    """Pictures whose every pixel says where it is: channels are picture, row and column."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.stack([torch.full_like(rows, k), rows, columns]) for k in range(n)]).to(torch.uint8)


def test_crops_are_windows_of_their_own_pictures() -> None:
    found = ((crops(numbered(40, 12), 8, torch.Generator().manual_seed(0)) + 1) * 127.5).round().long()
    assert found.shape == (40, 3, 8, 8)
    corners = set()
    for k, picture in enumerate(found):
        top, left = int(picture[1, 0, 0]), int(picture[2, 0, 0])
        assert torch.equal(picture, numbered(40, 12)[k, :, top : top + 8, left : left + 8].long())
        corners.add((top, left))
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(5))  # every place, edges included


@pytest.mark.parametrize("side", [None, 12, 99])
def test_no_crop_gives_the_pictures(side: int | None) -> None:
    assert torch.equal(crops(numbered(2, 12), side, torch.Generator()), to_float(numbered(2, 12)))


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("kill_at", "precision"), [(1, "no"), (3, "auto")])
def test_resume_is_exact(runs: Any, pictures: Path, tmp_path: Path, kill_at: int, precision: str) -> None:
    """12 pictures, 5 a step: both kills are in the middle of an epoch."""
    c = config(tmp_path, pictures, runs.VAE_SIZES, crop=8, precision=precision)
    runs.assert_resumes_exactly(train_vae, c, tmp_path, kill_at)


def test_learns_to_give_pictures_back(runs: Any, pictures: Path, tmp_path: Path) -> None:
    c = config(tmp_path, pictures, runs.VAE_SIZES, steps=140, batch=12, precision="no", ema=0.9)
    vae = train_vae(c)
    source = open_source(pictures, size=runs.SIZE)
    x = to_float(torch.stack([source.get(i, 0)[0] for i in range(12)]))
    error = (vae.decode(vae.encode(x)) - x).square().mean().item()
    assert error < 0.15 * (x - x.mean()).square().mean().item()  # 85 % of the variance explained
    assert (tmp_path / "samples" / "step-00000140.png").is_file()


def test_the_saved_folder_loads_and_has_latents_of_unit_variance(runs: Any, pictures: Path, tmp_path: Path) -> None:
    trained = train_vae(config(tmp_path, pictures, runs.VAE_SIZES))
    vae = load_vae(tmp_path / "model", EMBEDDED, Options())
    for (name, a), b in zip(trained.state_dict().items(), vae.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    x = to_float(torch.stack([open_source(pictures, size=runs.SIZE).get(i, 1)[0] for i in range(12)]))
    noise = torch.randn(40, 12, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = torch.stack([vae.encode(x, sample=n) for n in noise])
    assert z.std().item() == pytest.approx(1, rel=0.01)
    assert vae.config.sample_size == runs.SIZE


@pytest.mark.filterwarnings("ignore:.*leaving out:UserWarning")
def test_a_finished_vae_stays_as_it_is(runs: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scale too, which belongs to every U-Net that was made of it, and which other machines would find a little different."""
    c = config(tmp_path / "run", pictures, runs.VAE_SIZES, steps=1)
    train_vae(c)
    before = {p: p.stat().st_mtime_ns for p in (c.out / "model").rglob("*.*")}
    monkeypatch.setattr(trainer, "latent_scale", lambda *_: 7.0)
    train_vae(c)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    train_vae(replace(c, steps=2))  # other weights
    assert load_vae(c.out / "model", EMBEDDED, Options()).config.scale == 7
    others = tmp_path / "others"
    shutil.copytree(pictures, others)
    (others / "red-disc.txt").unlink()
    with pytest.raises(ValueError, match=r"another model or data \(data was '\w{16}', is '\w{16}'\)"):
        train_vae(replace(c, steps=2, data=others))


def test_latent_scale_looks_at_all_of_a_small_set(vae_folder: Path) -> None:
    """One picture in five differs: a sample of the first few would not see it."""
    vae = load_vae(vae_folder, EMBEDDED, Options())

    class Source:
        seen: list[int] = []  # noqa: RUF012

        def __len__(self) -> int:
            return 20

        def get(self, index: int, seed: int) -> tuple[Tensor, str]:
            self.seen.append(index)
            return torch.full((3, 16, 16), 255 * (index % 5 == 4), dtype=torch.uint8), ""

    latent_scale(vae, Source(), pictures=256)
    assert Source.seen == list(range(20))
    Source.seen.clear()
    latent_scale(vae, Source(), pictures=4)
    assert Source.seen == [0, 5, 10, 15]


@pytest.mark.oracle
def test_diffusers_opens_what_was_trained(vae_folder: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL.from_pretrained(vae_folder / "vae")
    ours = load_vae(vae_folder, EMBEDDED, Options())
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x).latent_dist.mode() * ours.config.scale, ours.encode(x), rtol=1e-5, atol=1e-5)
    assert theirs.config.scaling_factor == ours.config.scale


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 17}, "size must be a multiple of 2 .*, got 17"),
        ({"size": 0}, "size must be a multiple of 2 .*, got 0"),
        ({"crop": 7}, "crop must be a multiple of 2 .*, got 7"),
        ({"widths": (8, 8, 8, 8, 8, 8), "size": 48}, "size must be a multiple of 32 .*, got 48"),
        ({"widths": ()}, r"widths must be multiples of groups \(4\), got \(\)"),
        ({"widths": (8, 10)}, r"widths must be multiples of groups \(4\), got \(8, 10\)"),
        ({"widths": (0, 8)}, r"widths must be multiples of groups \(4\), got \(0, 8\)"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"latent_channels": 0}, "latent_channels must be at least 1, got 0"),
        ({"kl": -1.0}, "kl must be at least 0, got -1.0"),
        ({"edges": float("nan")}, "edges must be at least 0, got nan"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused_by_name(runs: Any, pictures: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, pictures, runs.VAE_SIZES, **changes)


@pytest.mark.filterwarnings("ignore:.*passing over:UserWarning")
def test_goes_on_from_a_folder_with_its_sizes(runs: Any, pictures: Path, vae_folder: Path, tmp_path: Path) -> None:
    other = {name: value for name, value in runs.VAE_SIZES.items() if name != "widths"} | {"widths": (4, 4, 4)}
    with pytest.warns(UserWarning, match=r"start: the sizes of the model there stay, widths \(8, 16\) and not \(4, 4, 4\)$"):
        train_vae(config(tmp_path / "still", pictures, other, start=vae_folder, steps=1, lr=1e-12))
    before, after = (
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors") for folder in (vae_folder, tmp_path / "still" / "model")
    )
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-9)
    assert (vae_folder / "vae" / "config.json").read_text() == (tmp_path / "still" / "model" / "vae" / "config.json").read_text()
    c = config(tmp_path / "on", pictures, runs.VAE_SIZES, start=vae_folder, steps=40)
    train_vae(c)
    log = [json.loads(line) for line in (c.out / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"]
    with pytest.raises(FileNotFoundError, match="start must be a model folder with vae/"):
        train_vae(replace(c, start=tmp_path))


def test_a_start_whose_latents_are_scaled_and_shifted_is_trained_as_it_draws(
    runs: Any, pictures: Path, vae_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(vae_folder, tmp_path / "start")
    file = tmp_path / "start" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 7.0, "shift_factor": 3.0}))
    losses = []
    for start in (vae_folder, tmp_path / "start"):
        train_vae(config(tmp_path / start.name, pictures, runs.VAE_SIZES, start=start, steps=1, precision="no"))
        losses.append(json.loads((tmp_path / start.name / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("n", [12, 37, 74])
def test_the_sample_grid_shows_different_pictures(
    runs: Any, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    (tmp_path / "data").mkdir()
    for i in range(n):
        Image.new("RGB", (16, 16), (3 * i, 200, 9)).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text("a colour")
    shown = []
    monkeypatch.setattr(trainer, "save_grid", lambda images, *_, **__: shown.append(images))
    train_vae(config(tmp_path / "run", tmp_path / "data", runs.VAE_SIZES, steps=1))
    originals = torch.cat([shown[0][:8], shown[0][16:24]])
    assert len({x.numpy().tobytes() for x in originals}) == min(n, 16)


def test_bad_pictures_are_skipped_while_training(runs: Any, tmp_path: Path) -> None:
    """One file in thirty is no picture: training goes on without it, and in the same order on every start."""
    data = tmp_path / "data"
    data.mkdir()
    for k in range(30):
        Image.fromarray(np.full((16, 16, 3), 8 * k, np.uint8)).save(data / f"{k:02}.png")
        (data / f"{k:02}.txt").write_text(f"grey {k}")
    (data / "13.png").write_bytes(b"\x89PNG\r\n\x1a\n not a picture")
    runs.assert_resumes_exactly(train_vae, config(tmp_path, data, runs.VAE_SIZES), tmp_path, 3)
