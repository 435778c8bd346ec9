"""Training the U-Net: latents made once, the order of a run, dropped captions, exact resume, and the model folder at the end."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdiff.checkpoints.families import EMBEDDED, noise_schedule
from latentdiff.checkpoints.fill import Options
from latentdiff.checkpoints.io import load_parts, load_vae
from latentdiff.diffusion import schedules
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.training import unet as trainer
from latentdiff.training.clip import token_ids
from latentdiff.training.data import batches, open_source
from latentdiff.training.unet import (
    UNetTraining,
    Whitening,
    draw_levels,
    encode_captions,
    encode_pictures,
    load_autoencoder,
    load_tower,
    origin,
    rewrite,
    train_unet,
    whitening,
)
from latentdiff.training.vae import VAETraining, to_float, train_vae

SIZES: dict[str, Any] = {"size": 16, "widths": (8, 16), "attention": (False, True), "head_width": 8, "groups": 4, "warmup": 0}
PROMPTS = ("a red disc", "a blue square")


@pytest.fixture
def config(pictures: Path, vae_folder: Path, clip_folder: Path, tmp_path: Path) -> UNetTraining:
    return UNetTraining(
        out=tmp_path, data=pictures, vae=vae_folder, clip=clip_folder, steps=7, batch=5, lr=1e-2, pictures=13, prompts=PROMPTS,
        **SIZES,
    )  # fmt: skip


def changed(config: UNetTraining, **changes: Any) -> UNetTraining:
    return replace(config, **changes)


# ------------------------------------------------------------------------------------------------ latents


def encoded(config: UNetTraining) -> trainer.Latents:
    vae = load_autoencoder(config.vae)
    source = open_source(config.data, size=config.size)
    return encode_pictures(vae, source, config, origin(config, vae, source))


def test_latents_are_the_posterior_of_the_pictures_of_a_run(config: UNetTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SHARD", 5)
    config = changed(config, precision="no")
    found = encoded(config)
    stream = batches(open_source(config.data, size=16), 13, seed=config.seed)
    images, captions = next(stream)
    vae: Any = load_vae(config.vae, EMBEDDED, Options())
    with torch.no_grad():
        mean, logvar = vae.moments(to_float(images))
    assert found.mean.shape == found.std.shape == (13, 4, 8, 8)
    torch.testing.assert_close(found.mean.float(), mean, rtol=1e-3, atol=1e-3)  # they are kept in float16
    torch.testing.assert_close(found.std.float(), (0.5 * logvar).exp(), rtol=1e-3, atol=1e-3)
    assert [found.captions[i] for i in found.caption] == captions
    assert len(set(found.captions)) == len(found.captions)
    assert sorted(p.name for p in (config.out / "latents").glob("*.txt")) == ["00000.txt", "00001.txt", "00002.txt"]


def test_shards_that_a_killed_start_left_are_not_made_again(config: UNetTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "SHARD", 5)
    whole, folder = encoded(config), config.out / "latents"
    for name in ("00001.txt", "00002.txt", "00002.safetensors"):  # killed before the mark of the second shard
        (folder / name).unlink()
    made, write = [], trainer._write_shard
    monkeypatch.setattr(trainer, "_write_shard", lambda path, *rest: (made.append(path.name), write(path, *rest)))
    monkeypatch.setattr(trainer, "LOADED", 2)  # nor does it matter how many are loaded at once
    again = encoded(config)
    assert made == ["00001", "00002"]
    assert torch.equal(again.mean, whole.mean)
    assert torch.equal(again.std, whole.std)
    assert (again.captions, again.caption.tolist()) == (whole.captions, whole.caption.tolist())


@pytest.mark.parametrize("changes", [{"pictures": 14}, {"seed": 1}])
def test_latents_of_something_else_are_not_taken(config: UNetTraining, changes: dict[str, int]) -> None:
    encoded(config)
    ((name, value),) = changes.items()
    said = rf"out: .*latents was made from something else \({name} was \d+, is {value}\); remove it, or choose a new folder"
    with pytest.raises(ValueError, match=said):
        encoded(changed(config, **changes))


def test_latents_of_other_data_are_not_taken(config: UNetTraining, tmp_path: Path) -> None:
    encoded(config)
    others = tmp_path / "others"
    shutil.copytree(config.data, others)
    (others / "red-disc.txt").write_text("a red disk")
    with pytest.raises(ValueError, match=r"made from something else \(data was '\w{16}', is '\w{16}'\)"):
        encoded(changed(config, data=others))


def test_pictures_are_loaded_a_few_at_once(config: UNetTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def remembered(positions: Iterable[range], *rest: Any, **options: Any) -> Any:
        asked.extend(positions)
        return real(asked, *rest, **options)

    real = trainer.pictures_at
    monkeypatch.setattr(trainer, "pictures_at", remembered)
    monkeypatch.setattr(trainer, "SHARD", 10)
    monkeypatch.setattr(trainer, "LOADED", 5)
    encoded(config)
    assert asked == [range(0, 5), range(5, 10), range(10, 13)]  # and none that is not wanted


def test_captions_are_padded_as_the_model_pads_its_prompts(clip_folder: Path) -> None:
    words, tower = load_tower(clip_folder)
    tower.spec = replace(tower.spec, pad=0)
    found = encode_captions(tower, words, ["a red disc"])
    with torch.no_grad():
        wanted = tower(token_ids(words, ["a red disc"], 0))[0]
    torch.testing.assert_close(found.float(), wanted, rtol=1e-3, atol=1e-3)


def test_contexts_are_the_towers_and_the_last_is_of_nothing(clip_folder: Path) -> None:
    words, tower = load_tower(clip_folder)
    found = encode_captions(tower, words, ["a red disc", "a blue square", ""])
    with torch.no_grad():
        empty = tower(torch.tensor([[words.begin_id, *[words.end_id] * 11]]))[0]
    torch.testing.assert_close(found[-1:].float(), empty, rtol=1e-3, atol=1e-3)
    assert found.shape == (3, 12, 16)
    assert not torch.equal(found[0], found[1])


# ------------------------------------------------------------------------------------------------ whitening


def test_white_states_vary_alike_where_they_vary_at_all() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(16, 16, generator=generator) * torch.logspace(1, 0, 16)  # variances from 100 down to 1
    states = (torch.randn(40, 25, 16, generator=generator) + 1) @ mixed
    white = whitening(states.half())
    found = white.of(states.half()).flatten(0, 1).float()
    before, after = (torch.linalg.eigvalsh(x.T @ x / len(x)) for x in (states.flatten(0, 1), found))
    assert before[-1] / before[-12] > 50
    assert 0.3 < after[-12] < after[-1] < 1.01
    torch.testing.assert_close(white.to @ white.back, torch.eye(16), rtol=0, atol=1e-3)


def test_a_network_of_white_states_is_one_of_the_towers_states(config: UNetTraining) -> None:
    """A training that changes next to nothing gives the network back that it began with."""
    first = train_unet(changed(config, out=config.out / "first", steps=1))
    same = train_unet(changed(config, out=config.out / "same", start=config.out / "first" / "model", steps=1, lr=1e-30))
    for name, weight in same.state_dict().items():
        torch.testing.assert_close(weight, first.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)
    words, tower = load_tower(config.clip)
    contexts = encode_captions(tower, words, [*PROMPTS, ""])
    white = whitening(contexts)
    with torch.no_grad():
        wanted, _ = same.project_context(contexts.float())[0]
        rewrite(same, white.back)
        found, _ = same.project_context(white.of(contexts).float())[0]
        other, _ = same.project_context(contexts.float())[0]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-2)
    assert (other - wanted).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------ loss


class Spy(nn.Module):
    """A network that answers 0 and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vector: None) -> Tensor:
        self.seen.append((x.detach(), t, context))
        return x * self.weight


def spied(config: UNetTraining, monkeypatch: pytest.MonkeyPatch) -> tuple[Spy, list[float]]:
    """The batches that the trainer makes of latents, and the losses of a network that answers 0."""
    spy, losses = Spy(), []

    def fit(model: nn.Module, loss: Any, stream: Any, config: UNetTraining, **_: Any) -> nn.Module:
        batch_of = stream(0, 0, 1)
        for step in range(config.steps):
            losses.append(loss(spy, next(batch_of), torch.Generator().manual_seed(step))[0].item())
        return model

    monkeypatch.setattr(trainer, "fit", fit)
    train_unet(config)
    return spy, losses


@pytest.mark.parametrize("drop", [0.0, 0.25, 1.0])
def test_captions_are_dropped_as_often_as_asked(config: UNetTraining, monkeypatch: pytest.MonkeyPatch, drop: float) -> None:
    monkeypatch.setattr(trainer, "whitening", lambda _: Whitening(to=torch.eye(16), back=torch.eye(16)))
    config = changed(config, drop=drop, steps=100, batch=20)
    spy, _ = spied(config, monkeypatch)
    words, tower = load_tower(config.clip)
    empty = encode_captions(tower, words, [""]).float()
    contexts = torch.cat([context for *_, context in spy.seen])
    share = (contexts == empty).flatten(1).all(1).double().mean().item()
    assert share == pytest.approx(drop, abs=4 * (drop * (1 - drop) / 2000) ** 0.5)


def test_the_network_sees_every_level_and_unit_variance(config: UNetTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    spy, losses = spied(changed(config, steps=100, batch=20), monkeypatch)
    t = torch.cat([t for _, t, _ in spy.seen])
    assert t.min() < 10
    assert t.max() > 989
    assert t.mean().item() == pytest.approx(499.5, abs=4 * (1e6 / 12 / 2000) ** 0.5)
    x = torch.cat([x for x, *_ in spy.seen])
    assert x.square().mean().item() == pytest.approx(1, abs=0.1)
    assert sum(losses) / len(losses) == pytest.approx(1, abs=0.1)  # v has the variance of x0 and eps


def test_levels_follow_the_logit_normal_density() -> None:
    t = draw_levels((0.8, 1.2), 1000, 100_000, torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() <= 999
    logit = torch.logit((t.double() + 0.5) / 1000)
    assert logit.mean().item() == pytest.approx(0.8, abs=0.02)
    assert logit.std().item() == pytest.approx(1.2, abs=0.02)
    edge = draw_levels((50.0, 1.0), 1000, 100, torch.Generator().manual_seed(0))  # sigmoid rounds to 1 there
    assert edge.unique().tolist() == [999]


def test_the_loss_is_the_denoisers(config: UNetTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    """eps, v and x0, with and without min-SNR weights: what is minimised is what `Denoiser.loss` gives."""
    calls = []

    def remembered(self: Denoiser, x0: Tensor, cond: Any, eps: Tensor, t: Tensor, weight: Tensor | None = None) -> Tensor:
        calls.append((self.prediction, None if weight is None else weight.max().item()))
        return real(self, x0, cond, eps, t, weight)

    real = Denoiser.loss
    monkeypatch.setattr(Denoiser, "loss", remembered)
    for k, (prediction, gamma) in enumerate([("eps", None), ("v", 5.0), ("x0", 3.0)]):
        spied(changed(config, out=config.out / str(k), prediction=prediction, min_snr=gamma, steps=3, batch=20), monkeypatch)
    assert [c[0] for c in calls] == ["eps"] * 3 + ["v"] * 3 + ["x0"] * 3
    assert all(weight is None for _, weight in calls[:3])
    assert all(weight <= 5 / 6 + 1e-6 for _, weight in calls[3:6])  # min(snr, 5) / (snr + 1)
    assert max(weight for _, weight in calls[6:]) == pytest.approx(3.0)  # min(snr, 3)


@pytest.mark.parametrize("kind", ["cosine", "linear", "scaled_linear"])
def test_a_model_is_sampled_at_the_levels_of_its_training(config: UNetTraining, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    trained_on = []
    real = Denoiser.loss
    monkeypatch.setattr(Denoiser, "loss", lambda self, *rest: (trained_on.append(self.schedule), real(self, *rest))[1])
    spied(changed(config, schedule=kind, steps=1), monkeypatch)
    saved = noise_schedule(load_parts(config.out / "model").spec.schedule)
    assert torch.equal(saved.sigmas, trained_on[0].sigmas)
    assert torch.equal(saved.sigmas, getattr(schedules, kind)().sigmas)


def test_latents_are_shifted_and_scaled_as_the_vae_does(config: UNetTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Denoiser, "loss", lambda self, x0, *_: (seen.append(x0), x0.sum())[1])
    spied(changed(config, out=config.out / "plain", steps=1), monkeypatch)
    other = config.out / "vae"
    shutil.copytree(config.vae, other)
    file = other / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_factor": 0.5}))
    spied(changed(config, out=config.out / "shifted", vae=other, steps=1), monkeypatch)
    torch.testing.assert_close(seen[1], seen[0] - 0.5 * load_autoencoder(config.vae).config.scale)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize(("kill_at", "precision"), [(1, "auto"), (4, "no")])
def test_resume_is_exact(runs: Any, config: UNetTraining, kill_at: int, precision: str) -> None:
    """13 pictures, 5 a step: both kills are in the middle of an epoch."""
    runs.assert_resumes_exactly(train_unet, changed(config, precision=precision), config.out, kill_at)


def test_overfits_four_latents(config: UNetTraining) -> None:
    """Four flat latents of unit variance: predicting them from their noise is soon learnt."""
    losses: list[float] = []
    flat = torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(0)).expand(4, 4, 8, 8)

    def given(vae: Any, *_: Any) -> trainer.Latents:
        return trainer.Latents(flat / flat.std() / vae.config.scale, torch.zeros(4, 4, 8, 8), torch.arange(4), ["a", "b", "c", "d"])

    def watched(model: Any, loss: Any, stream: Any, config: Any, **rest: Any) -> Any:
        def spy(*arguments: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
            value, metrics = loss(*arguments)
            losses.append(value.item())
            return value, metrics

        return real(model, spy, stream, config, **rest)

    real = trainer.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", watched)
        patch.setattr(trainer, "encode_pictures", given)
        train_unet(changed(config, pictures=4, batch=16, steps=100, precision="no"))
    assert losses[0] == pytest.approx(1, abs=0.35)  # new weights answer 0
    assert sum(losses[-20:]) / 20 < 0.65 * sum(losses[:5]) / 5


def test_a_folder_is_encoded_once_unless_told_otherwise(config: UNetTraining, monkeypatch: pytest.MonkeyPatch) -> None:
    class Enough(Exception):
        pass

    def counted(vae: Any, source: Any, config: UNetTraining, *_: Any) -> trainer.Latents:
        asked.append((config.pictures, len(source)))
        raise Enough

    asked: list[tuple[int | None, int]] = []
    monkeypatch.setattr(trainer, "encode_pictures", counted)
    for pictures in (None, 7):
        with pytest.raises(Enough):
            train_unet(changed(config, pictures=pictures, out=config.out / str(pictures)))
    files = asked[0][1]
    assert files > 1
    assert asked == [(files, files), (7, files)]
    several = config.out / "several"
    shutil.copytree(config.data, several)
    for text in [*several.glob("*.txt")][: files // 2]:
        text.with_suffix(".json").write_text('["one", "two", "three"]')
        text.unlink()
    with pytest.raises(Enough):
        train_unet(changed(config, pictures=None, data=several, out=config.out / "more"))
    assert asked[-1] == (2 * files, files)
    drawings = type("Drawings", (), {"fingerprint": lambda self: "theirs", "__len__": lambda self: 3})()
    monkeypatch.setattr(trainer, "open_source", lambda *_, **__: drawings)
    with pytest.raises(Enough):
        train_unet(changed(config, pictures=None, out=config.out / "drawings"))
    assert asked[-1] == (trainer.DRAWINGS, 3)


def test_ends_with_a_model_that_loads_and_draws(runs: Any, config: UNetTraining) -> None:
    trained = train_unet(config)
    parts = load_parts(config.out / "model")
    assert runs.differing(dict(parts.unet.state_dict()), dict(trained.state_dict())) == []
    assert (parts.spec.prediction, parts.spec.size, parts.spec.schedule.kind) == ("v", 16, "cosine")
    assert (parts.spec.sampling.spacing, parts.spec.sampling.final) == ("trailing", "zero")
    assert parts.tokenizers[0].length == 12
    assert parts.clip is not None
    pipeline = pytest.importorskip("latentdiff.loading").load(config.out / "model", device="cpu", dtype="float32")
    picture = pipeline("a red disc", steps=2, seed=0, progress=False)[0]
    assert picture.size == (16, 16)
    assert (config.out / "samples" / "step-00000007.png").is_file()


@pytest.mark.oracle
def test_diffusers_opens_what_was_trained_and_draws_the_same(config: UNetTraining) -> None:
    diffusers = pytest.importorskip("diffusers")
    train_unet(config)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(config.out / "model", safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    ours = pytest.importorskip("latentdiff.loading").load(config.out / "model", device="cpu", dtype="float32")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    wanted = theirs("a red disc", latents=noise, num_inference_steps=4, height=16, width=16, output_type="np").images[0]
    found = ours("a red disc", steps=4, seed=5, progress=False)[0]
    difference = torch.tensor(wanted * 255) - torch.frombuffer(bytearray(found.tobytes()), dtype=torch.uint8).reshape(16, 16, 3)
    assert difference.abs().max() < 0.51  # ours is rounded to 8 bits


def test_goes_on_from_a_model(runs: Any, config: UNetTraining) -> None:
    first = train_unet(changed(config, out=config.out / "first"))
    start = trainer.begin(changed(config, start=config.out / "first" / "model"), load_parts(config.out / "first" / "model").spec)
    assert runs.differing(dict(start.state_dict()), dict(first.state_dict())) == []
    second = train_unet(changed(config, out=config.out / "second", start=config.out / "first" / "model", lr=1e-3, steps=2))
    assert runs.differing(dict(second.state_dict()), dict(first.state_dict()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "eps"}, "prediction was 'v', is 'eps'"),
        ({"schedule": "linear"}, r"schedule was .*'cosine'.*, is .*'linear'"),
        ({"head_width": 4}, r"heads was \(1, 2\), is \(2, 4\)"),
    ],
)
def test_a_start_of_another_kind_is_refused(
    runs: Any, config: UNetTraining, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    spied(changed(config, steps=1), monkeypatch)
    start = changed(config, out=config.out / "next", start=config.out / "model", **changes)
    with pytest.raises(ValueError, match=f"start: .* is another model than is to be trained .*{message}"):
        train_unet(start)
    assert not start.out.exists()


def test_what_cannot_go_on_is_refused_before_anything_is_encoded(config: UNetTraining) -> None:
    train_unet(changed(config, steps=1))
    shutil.rmtree(config.out / "latents")
    with pytest.raises(ValueError, match=r"another model or data \(prediction was 'v', is 'eps'\)"):
        train_unet(changed(config, prediction="eps", steps=2))
    assert not (config.out / "latents").exists()


@pytest.mark.parametrize(("name", "part"), [("vae", "vae"), ("clip", "text_encoder"), ("start", "unet")])
def test_a_folder_that_is_no_models_is_named(config: UNetTraining, tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / "run" / "model" / part).mkdir(parents=True)
    said = f"{name} must be a model folder with {part}/, got {tmp_path / 'run'}: maybe {tmp_path / 'run' / 'model'} is meant"
    with pytest.raises(FileNotFoundError, match=said):
        train_unet(replace(config, **{name: tmp_path / "run"}))
    with pytest.raises(FileNotFoundError, match=f"{name} must be a model folder with {part}/, got nowhere$"):
        train_unet(replace(config, **{name: Path("nowhere")}))


def test_paths_and_lists_may_be_texts_and_lists(config: UNetTraining) -> None:
    plain = {"vae": str(config.vae), "clip": str(config.clip), "widths": [8, 16], "attention": [False, True], "prompts": ["a"]}
    found = replace(config, **plain)  # pyright: ignore[reportArgumentType]
    assert found == replace(config, widths=(8, 16), attention=(False, True), prompts=("a",))
    with pytest.raises(ValueError, match="prompts must be several values, got 'a red disc'"):
        replace(config, prompts="a red disc")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("size", [17, 1, 0, -2])
def test_pictures_that_are_no_whole_number_of_latents_are_refused(config: UNetTraining, size: int) -> None:
    with pytest.raises(ValueError, match=rf"size must be a multiple of 2 \(pixels a latent of .*\), got {size}"):
        train_unet(changed(config, size=size))
    assert not (config.out / "latents").exists()


def test_latents_may_have_any_number_of_channels(runs: Any, config: UNetTraining) -> None:
    out = config.out / "vae"
    train_vae(VAETraining(out=out, data=config.data, steps=1, batch=4, **{**runs.VAE_SIZES, "latent_channels": 6}))
    train_unet(changed(config, vae=out / "model", steps=1))
    spec = load_parts(config.out / "model").spec
    assert (spec.unet.in_channels, spec.unet.out_channels, spec.task) == (6, 6, "text")


def test_a_run_is_not_resumed_on_another_text_tower(config: UNetTraining, clip_folder: Path) -> None:
    train_unet(changed(config, steps=1))
    other = config.out / "other"
    shutil.copytree(clip_folder, other)
    file = other / "text_encoder" / "model.safetensors"
    save_file({k: v + 1e-3 for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"another model or data \(text was '\w{16}', is '\w{16}'\)"):
        train_unet(changed(config, steps=2, clip=other))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": (True,)}, r"attention must have one entry a width \(2\), got \(True,\)"),
        ({"widths": (8, 12)}, r"widths must be multiples of head_width \(8\), got \(8, 12\)"),
        ({"widths": (8, 16), "groups": 3}, r"widths must be multiples of groups \(3\), got \(8, 16\)"),
        ({"widths": (), "attention": ()}, r"widths must be multiples of head_width \(8\), got \(\)"),
        ({"head_width": 0}, "head_width must be at least 1, got 0"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"pictures": 0}, "pictures must be at least 1, got 0"),
        ({"prompts": ()}, r"prompts must be at least one text, got \(\)"),
        ({"prediction": "epsilon"}, "prediction must be one of eps, v, x0, got 'epsilon'"),
        ({"schedule": "sqrt"}, "schedule must be one of cosine, linear, scaled_linear, got 'sqrt'"),
        ({"drop": 1.5}, r"drop must lie in \[0, 1\], got 1.5"),
        ({"levels": (0.0, 0.0)}, r"levels must be a number and a positive one, or None, got \(0.0, 0.0\)"),
        ({"min_snr": 0.0}, "min_snr must be a positive number or None, got 0.0"),
        ({"lr": -1.0}, "lr must be a positive number, got -1.0"),
    ],
)
def test_bad_values_are_refused_by_name(config: UNetTraining, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(config, **changes)
