"""Full guided runs of ten steps with the same noise: every family, at its true architecture but narrow, against diffusers."""

import socket

import numpy as np
import pytest
import torch
from PIL import Image

import latentdiff
from latentdiff import cli, origin
from latentdiff.checkpoints.io import load_parts
from latentdiff.checkpoints.save import save_folder, save_single
from latentdiff.images import to_tensor
from latentdiff.refining import refine

from .conftest import SMALL, randomise

pytestmark = pytest.mark.oracle
PROMPT = "a red cat, flat style"  # no "!": diffusers takes a typed one for OpenCLIP's padding
SIDE = 64


def photo() -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((SIDE, SIDE))


def mask() -> Image.Image:
    image = Image.new("L", (SIDE, SIDE), 0)
    image.paste(255, (16, 8, 56, 40))
    return image


def ours(pipe, **options) -> torch.Tensor:
    """The latents that a run ends on."""
    *_, last = pipe.stream(PROMPT, steps=10, seed=7, size=SIDE, sampler="ddim", **options)
    return last.x / (1 + last.sigma**2).sqrt()


def theirs(folder, name: str, **options) -> torch.Tensor:
    import diffusers

    return drawn(getattr(diffusers, SMALL[name].pipeline).from_pretrained(folder, local_files_only=True), **options)


def drawn(pipe, **options):
    """What diffusers' pipeline ends on: the latents, unless asked otherwise."""
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "generator": torch.Generator().manual_seed(7), "output_type": "latent", **options}
    return pipe(prompt=PROMPT, **options).images


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert b.std() > 0.1
    error = float((a - b).abs().max() / b.abs().max())
    assert error < 1e-4, error


@pytest.fixture(params=["folder", "single file"])
def loaded(folder, tmp_path, request):
    """A small family, through `latentdiff.load`: the folder that diffusers wrote, or our single file of it."""

    def load(name: str):
        path = folder(name)
        if request.param == "single file":
            save_single(load_parts(path), tmp_path / f"{name}.safetensors")
            path = tmp_path / f"{name}.safetensors"
        return latentdiff.load(path, device="cpu", dtype="float32")

    return load


@pytest.mark.parametrize("negative", [None, "a dog"])
@pytest.mark.parametrize("name", ["sd15", "sd21-base", "sd21", "sdxl"])
@torch.no_grad()
def test_text_to_image(folder, loaded, name, negative):
    a = ours(loaded(name), negative=negative, guidance=7.5)
    b = theirs(folder(name), name, negative_prompt=negative, guidance_scale=7.5, height=SIDE, width=SIDE)
    close(a, b)


def drawn_by_diffusers(pipe, **options) -> np.ndarray:
    """The picture of a run, its pixels from 0 to 255."""
    options = {"negative_prompt": "a dog", "guidance_scale": 7.5, "height": SIDE, "width": SIDE, **options}
    return drawn(pipe, output_type="np", **options)[0] * 255


@pytest.mark.parametrize("layout", ["folder", "single file"])
@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
@torch.no_grad()
def test_diffusers_draws_the_same_picture_from_what_we_save(folder, tmp_path, name, layout):
    import diffusers

    kind, parts, path = getattr(diffusers, SMALL[name].pipeline), load_parts(folder(name)), tmp_path / "ours"
    if layout == "folder":
        save_folder(parts, path)
        theirs = kind.from_pretrained(path, local_files_only=True)
    else:
        path = path.with_suffix(".safetensors")
        save_single(parts, path)
        theirs = kind.from_single_file(path, config=str(folder(name)), local_files_only=True)
    pipe = latentdiff.load(path, device="cpu", dtype="float32")
    options = {"negative": "a dog", "guidance": 7.5, "steps": 10, "sampler": "ddim", "seed": 7, "size": SIDE}
    (picture,) = pipe(PROMPT, **options, progress=False)
    assert np.abs(np.asarray(picture) - drawn_by_diffusers(theirs)).max() < 0.6  # 0.5 is rounding's


@torch.no_grad()
def test_the_command_line_draws_the_picture_of_diffusers(folder, tmp_path, monkeypatch, capsys):
    """One file, one command; no connection is tried."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder("sd15"), local_files_only=True)
    save_single(load_parts(folder("sd15")), tmp_path / "sd15.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("the network was tried"))
    command = ["generate", PROMPT, "--model", "sd15.safetensors", "--negative", "a dog", "--out", "cat.png", "--device", "cpu"]
    command += ["--dtype", "float32", "--steps", "10", "--sampler", "ddim", "--seed", "7", "--size", str(SIDE), "--quiet"]
    with pytest.raises(SystemExit) as exit:
        cli.main(command)
    assert (exit.value.code, capsys.readouterr().out) == (0, "cat.png  seed 7\n")
    assert np.abs(np.asarray(Image.open("cat.png")) - drawn_by_diffusers(pipe)).max() < 0.6


@torch.no_grad()
def test_a_tiny_autoencoder_draws_the_picture_of_diffusers(folder, tmp_path):
    import diffusers

    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4)
    randomise(tiny)
    tiny.save_pretrained(tmp_path / "tiny")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder("sd15"), vae=tiny, local_files_only=True)
    pipe = latentdiff.load(folder("sd15"), vae=tmp_path / "tiny", device="cpu", dtype="float32")
    options = {"negative": "a dog", "guidance": 7.5, "steps": 10, "sampler": "ddim", "seed": 7, "size": SIDE}
    (picture,) = pipe(PROMPT, **options, progress=False)
    assert np.std(picture) > 5
    assert np.abs(np.asarray(picture) - drawn_by_diffusers(theirs)).max() < 0.6


@pytest.mark.parametrize("name", ["sd15-inpaint", "sd2-inpaint", "sdxl-inpaint"])
@torch.no_grad()
def test_inpainting(folder, loaded, name):
    pipe = loaded(name)
    a = ours(pipe, negative="a dog", image=photo(), mask=mask(), guidance=7.5, strength=1.0)
    canvas = origin.canvas(photo(), mask(), native=SIDE, factor=8)
    hidden, z = pipe.encode(origin.without_masked([canvas], [photo()])), pipe.encode(to_tensor([photo()]))
    b = theirs(
        folder(name), name, negative_prompt="a dog", image=z, mask_image=mask(), masked_image_latents=hidden,
        height=SIDE, width=SIDE, guidance_scale=7.5, strength=1.0,
    )  # fmt: skip
    close(a, b)


@pytest.mark.parametrize("name", ["instruct-pix2pix", "sdxl-instruct"])
@torch.no_grad()
def test_instruct(folder, loaded, name):
    a = ours(loaded(name), negative="a dog", image=photo(), guidance=7.5, image_guidance=1.5)
    options = {"negative_prompt": "a dog", "guidance_scale": 7.5, "image_guidance_scale": 1.5}
    options |= {"height": SIDE, "width": SIDE} if name == "sdxl-instruct" else {}
    close(a, theirs(folder(name), name, image=photo(), **options))


@torch.no_grad()
def test_refiner(folder, loaded):
    pipe = loaded("sdxl-refiner")
    a = ours(pipe, negative="a dog", image=photo(), strength=0.5, exact=False, guidance=5.0)
    z = pipe.encode(to_tensor([photo()]))
    b = theirs(folder("sdxl-refiner"), "sdxl-refiner", negative_prompt="a dog", image=z, strength=0.5, guidance_scale=5.0)
    close(a, b)


@pytest.mark.parametrize("handoff", [0.8, 0.5])
@torch.no_grad()
def test_base_and_refiner(folder, handoff):
    """The base's state at a noise level is where the refiner goes on."""
    import diffusers

    base, second = (latentdiff.load(folder(name), device="cpu", dtype="float32") for name in ("sdxl", "sdxl-refiner"))
    asked = {"prompt": PROMPT, "negative": "a dog", "guidance": 5.0, "steps": 10, "seed": 7, "size": SIDE, "handoff": handoff}
    latents = []
    decode = type(second).decode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(second), "decode", lambda self, z: (latents.append(z), decode(self, z))[1])
        (picture,) = refine(base, second, **asked, sampler="ddim", progress=False)
    assert f"Refiner: sdxl-refiner, Refiner switch at: {handoff:g}" in picture.info["parameters"]

    common = {
        "prompt": PROMPT,
        "negative_prompt": "a dog",
        "guidance_scale": 5.0,
        "num_inference_steps": 10,
        "output_type": "latent",
    }
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(folder("sdxl"), local_files_only=True)
    generator = torch.Generator().manual_seed(7)
    z = pipe(**common, generator=generator, denoising_end=handoff, height=SIDE, width=SIDE).images
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(folder("sdxl-refiner"), local_files_only=True)
    close(latents[0], pipe(**common, image=z, denoising_start=handoff).images)
