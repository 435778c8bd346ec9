"""The tiny autoencoder against diffusers' AutoencoderTiny on the same weights."""

import pytest
import torch

from latentdiff.models.vae import VAE
from latentdiff.models.vae_tiny import TinyVAE, TinyVAEConfig

SMALL = TinyVAEConfig(width=16, encoder_blocks=(1, 2, 1), decoder_blocks=(2, 1, 1), scale=0.8)


def build_diffusers(config: TinyVAEConfig) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers")
    widths = (config.width,) * len(config.encoder_blocks)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=config.encoder_blocks,
        num_decoder_blocks=config.decoder_blocks,
        scaling_factor=config.scale,
    ).eval()


@pytest.mark.oracle
@torch.no_grad()
def test_encoder_and_decoder_equal_diffusers():
    torch.manual_seed(0)
    theirs, ours = build_diffusers(SMALL), TinyVAE(SMALL).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = 2 * torch.rand(2, 3, 18, 24) - 1
    latents = theirs.encode(images).latents
    torch.testing.assert_close(ours.encode(images), latents * SMALL.scale, rtol=1e-5, atol=1e-6)
    z = 3 * torch.randn(2, 4, 5, 6)  # wide enough for the squashing to matter
    expected = theirs.decode(z / SMALL.scale).sample
    torch.testing.assert_close(ours.decode(z), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.oracle
def test_names_and_shapes_at_true_size_equal_diffusers():
    with torch.device("meta"):
        ours, theirs = TinyVAE(TinyVAEConfig()), build_diffusers(TinyVAEConfig())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_has_the_face_of_the_big_one():
    vae = TinyVAE(TinyVAEConfig(width=4))
    assert vae.factor == 8
    z = vae.encode(torch.zeros(1, 3, 16, 24), sample=torch.zeros(1, 4, 2, 3))
    assert z.shape == (1, 4, 2, 3)
    assert vae.decode(z).shape == (1, 3, 16, 24)
    assert all(hasattr(VAE, name) for name in ("encode", "decode", "factor"))


def test_bad_shapes_are_refused():
    vae = TinyVAE(SMALL)
    with pytest.raises(ValueError, match=r"images has shape \[1, 4, 8, 8\]"):
        vae.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"z has shape \[1, 3, 8, 8\]"):
        vae.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"decoder_blocks=\(1, 1\): needs 4 entries"):
        TinyVAEConfig(decoder_blocks=(1, 1))
