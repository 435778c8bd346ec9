"""The autoencoder against diffusers' on the same weights, and its scaling."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from latentdiff.models import fused, vae
from latentdiff.models.initialise import init_for_training
from latentdiff.models.vae import VAE, VAEConfig

SMALL = VAEConfig(block_out_channels=(32, 64, 64, 96))
VARIANTS = {
    "sd": SMALL,
    "embedded": VAEConfig(block_out_channels=(16, 32, 64, 128), layers_per_block=1, norm_groups=16, scale=0.9),
    "bare": replace(SMALL, latent_channels=16, quant_conv=False, post_quant_conv=False, mid_attention=False),
}


def build_diffusers(config: VAEConfig) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    levels = len(config.block_out_channels)
    return diffusers.AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_groups,
        mid_block_add_attention=config.mid_attention,
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.post_quant_conv,
    ).eval()


def perturb(module: nn.Module) -> nn.Module:
    """Move every weight, so that no norm is the identity and no bias is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module


def make(config: VAEConfig) -> VAE:
    torch.manual_seed(0)
    vae = VAE(config).eval()
    perturb(vae)
    return vae


@pytest.mark.oracle
@pytest.mark.parametrize("size", [(32, 48), (37, 42)], ids=["even", "odd"])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_encoder_and_decoder_equal_diffusers(name, size):
    config = VARIANTS[name]
    torch.manual_seed(0)
    theirs = perturb(build_diffusers(config))
    ours = VAE(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = 2 * torch.rand(2, 3, *size) - 1
    expected = theirs.encode(images).latent_dist
    mean, logvar = ours.moments(images)
    assert expected.mean.std() > 0.05
    torch.testing.assert_close(mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logvar, expected.logvar, rtol=1e-5, atol=1e-5)
    z = torch.randn_like(mean)
    decoded = theirs.decode(z / config.scale).sample
    assert decoded.std() > 0.05
    torch.testing.assert_close(ours.decode(z), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.oracle
def test_names_and_shapes_at_true_size_equal_diffusers():
    with torch.device("meta"):
        ours, theirs = VAE(VAEConfig()), build_diffusers(VAEConfig())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert {m.eps for m in ours.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}  # too small to be seen in an output
    assert {m.eps for m in theirs.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


def test_published_sizes():
    with torch.device("meta"):
        vae = VAE(VAEConfig())
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in vae.named_children()}
    assert len(vae.state_dict()) == 248
    assert round((count["encoder"] + count["quant_conv"]) / 1e6, 2) == 34.16
    assert round((count["decoder"] + count["post_quant_conv"]) / 1e6, 2) == 49.49
    assert vae.factor == 8


@torch.no_grad()
def test_encode_gives_the_mode_or_a_sample_shifted_and_scaled():
    vae = make(replace(SMALL, scale=0.3, shift=0.7))
    images = 2 * torch.rand(2, 3, 16, 16) - 1
    mean, logvar = vae.moments(images)
    noise = torch.randn_like(mean)
    torch.testing.assert_close(vae.encode(images), (mean - 0.7) * 0.3)
    torch.testing.assert_close(vae.encode(images, sample=noise), (mean + noise * logvar.exp().sqrt() - 0.7) * 0.3)
    unscaled = make(replace(SMALL, scale=1.0, shift=0.0))
    torch.testing.assert_close(vae.decode((mean - 0.7) * 0.3), unscaled.decode(mean), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_log_variance_is_clamped():
    vae = make(SMALL)
    vae.quant_conv.bias[4:] = torch.tensor([-1e3, 1e3, 0.0, 0.0])
    logvar = vae.moments(torch.zeros(1, 3, 16, 16))[1]
    assert (logvar[:, 0] == -30).all()
    assert (logvar[:, 1] == 20).all()
    assert logvar[:, 2:].abs().max() < 20


@torch.no_grad()
def test_channels_last_changes_the_memory_only():
    vae, z = make(SMALL), torch.randn(2, 4, 4, 6)
    expected = vae.decode(z)
    actual = vae.to(memory_format=torch.channels_last).decode(z.contiguous(memory_format=torch.channels_last))
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_compiles_without_graph_breaks():
    vae, images = make(VAEConfig(block_out_channels=(32, 64), layers_per_block=1)), torch.randn(1, 3, 16, 16)
    encode = torch.compile(vae.encode, fullgraph=True, backend="eager")
    decode = torch.compile(vae.decode, fullgraph=True, backend="eager")
    z = vae.encode(images)
    assert torch.equal(encode(images), z)
    assert torch.equal(decode(z), vae.decode(z))


def test_init_for_training_fills_a_network_from_meta_and_lets_both_ends_live():
    with torch.device("meta"):
        vae = VAE(SMALL)
    vae.to_empty(device="cpu")
    torch.manual_seed(0)
    init_for_training(vae)
    images = 2 * torch.rand(2, 3, 16, 16) - 1
    z = vae.encode(images)
    assert z.std() > 1e-3
    assert vae.decode(z).std() > 1e-3
    assert not any(p.any() for block in vae.modules() if hasattr(block, "conv2") for p in block.conv2.parameters())


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("encode", torch.zeros(1, 4, 8, 8), r"images has shape \[1, 4, 8, 8\]: needs \[batch, 3, height, width\]"),
        ("moments", torch.zeros(3, 8, 8), r"images has shape \[3, 8, 8\]"),
        ("decode", torch.zeros(1, 3, 8, 8), r"z has shape \[1, 3, 8, 8\]: needs \[batch, 4, height, width\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(method, value, message):
    with torch.device("meta"):
        vae = VAE(SMALL)
    with pytest.raises(ValueError, match=message):
        getattr(vae, method)(value)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="multiple of norm_groups=32"):
        VAEConfig(block_out_channels=(16, 32))


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_map_is_given_up_before_the_next_norm_makes_another(layout, monkeypatch):
    """In the last blocks of a decode each map of a large picture takes hundreds of megabytes."""
    made, left = [], []

    def watched(norm, x):
        left.append([ref() is not None for ref in made])
        out = fused.group_norm(norm, x, silu=True)
        made.append(weakref.ref(out))
        return out

    block = vae.ResBlock(SMALL, 32, 64).to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(1, 32, 8, 8).contiguous(memory_format=layout)
    expected = block(x)
    for module in (vae, fused):
        monkeypatch.setattr(module, "norm_silu", watched)
    assert torch.equal(block(x), expected)
    assert left == [[], [False]]
