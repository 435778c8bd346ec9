"""Convolutions with fewer multiplications are convolutions, as exact as torch's; and they are where they are faster."""

import pytest
import torch
import torch.nn.functional as F

from latentdiff.models import winograd
from latentdiff.models.convolution import Conv2d
from latentdiff.models.onednn import has_operators
from latentdiff.models.recorded import Calls
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, ResBlock, VAEConfig


@pytest.fixture
def everywhere(monkeypatch):
    """However small the maps."""
    if not has_operators(torch.float32):
        pytest.skip("this processor has no operators for float32")
    for name in ("ENOUGH_TILES", "ENOUGH_CHANNELS", "ENOUGH_WORK"):
        monkeypatch.setattr(winograd, name, 0)


def last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("tiles", [1, 4, 8, 256])  # at once: less than a row, rows, pictures
@pytest.mark.parametrize("weights", [1, 2 * 16 * 36 * 6, 1 << 22])  # a few channels at once, or all
@pytest.mark.parametrize("shape", [(1, 40, 4, 4), (3, 40, 8, 8), (2, 40, 13, 10), (1, 5, 1, 2), (2, 40, 5, 33), (5, 3, 4, 12)])
@pytest.mark.parametrize("rest", [True, False])
def test_it_is_the_convolution(shape, tiles, weights, rest, monkeypatch):
    """Whatever the size, however it is cut."""
    monkeypatch.setattr(winograd, "TILES", tiles)
    monkeypatch.setattr(winograd, "WEIGHTS", weights)
    torch.manual_seed(0)
    x, weight = last(*shape, dtype=torch.float64), last(6, shape[1], 3, 3, dtype=torch.float64)
    bias, add = (torch.randn(6, dtype=torch.float64), last(len(x), 6, *shape[2:], dtype=torch.float64)) if rest else (None, None)
    given = [t.clone() for t in (x, weight, bias, add) if t is not None]
    y = winograd.convolution(x, weight, bias, add)
    expected = F.conv2d(x, weight, bias, padding=1) + (0 if add is None else add)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(*pair) for pair in zip(given, [t for t in (x, weight, bias, add) if t is not None], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("smooth", [False, True])
def test_in_float32_it_is_as_exact_as_the_plain_one(smooth):
    """At a true size, of noise and of what changes little from place to place."""
    torch.manual_seed(0)
    x, conv = last(1, 320, 32, 32), Conv2d(320, 320, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if smooth:
        x = 5 + F.interpolate(x[:, :, :8, :8], (32, 32), mode="bicubic").contiguous(memory_format=torch.channels_last)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)  # type: ignore[union-attr]
    errors = [
        (y - exact) for y in (winograd.convolution(x, conv.weight, conv.bias), F.conv2d(x, conv.weight, conv.bias, padding=1))
    ]
    ours, plain = (error.square().mean().sqrt().item() for error in errors)
    assert ours < 1.5 * plain
    assert ours < 1.5e-6 * exact.square().mean().sqrt()
    assert errors[0].abs().max() < 1e-5 * exact.abs().max()


@torch.no_grad()
def test_beside_a_jump_the_error_goes_by_what_is_large():
    torch.manual_seed(0)
    x, weight = last(1, 128, 16, 16), last(128, 128, 3, 3) / 34
    x[..., 7:] *= 100  # in the middle of a tile
    error = winograd.convolution(x, weight, None) - F.conv2d(x.double(), weight.double(), padding=1)
    assert error.abs().max() < 4e-6 * x.abs().max()


def asked(monkeypatch) -> list[torch.Size]:
    shapes, run = [], winograd.convolution
    monkeypatch.setattr(winograd, "convolution", lambda x, *rest: shapes.append(x.shape) or run(x, *rest))
    return shapes


@torch.no_grad()
def test_it_is_where_it_is_faster(monkeypatch):
    if not has_operators(torch.float32):
        pytest.skip("this processor has no operators for float32")
    monkeypatch.setattr(winograd, "ENOUGH_TILES", 5)
    monkeypatch.setattr(winograd, "ENOUGH_CHANNELS", 8)
    monkeypatch.setattr(winograd, "ENOUGH_WORK", 6 * 8 * 9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    shapes, conv, x = asked(monkeypatch), Conv2d(8, 9, 3, padding=1), last(2, 8, 9, 4)
    expected = F.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected)
    assert shapes == [(2, 8, 9, 4)]
    for small in (last(1, 8, 8, 8), last(1, 8, 20, 4)):  # tiles, work
        conv(small)
    Conv2d(7, 20, 3, padding=1)(last(2, 7, 9, 4))
    Conv2d(20, 7, 3, padding=1)(last(2, 20, 9, 4))
    for others in ({"stride": 2}, {"padding": 0}, {"dilation": 2}, {"padding_mode": "circular"}):
        Conv2d(8, 9, 3, **{"padding": 1, **others})(x)  # type: ignore[arg-type]
    Conv2d(16, 16, 3, padding=1, groups=2)(last(2, 16, 9, 4))
    Conv2d(8, 9, 1, padding=1)(x)
    conv(x.contiguous())
    if has_operators(torch.bfloat16):
        Conv2d(8, 9, 3, padding=1).bfloat16()(last(2, 8, 9, 4, dtype=torch.bfloat16))
    with torch.enable_grad():
        conv(x)
    with pytest.raises(RuntimeError, match="weight"):
        conv(last(2, 4, 9, 4))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    conv(x)
    assert len(shapes) == 1


@torch.no_grad()
@pytest.mark.usefixtures("everywhere")
def test_written_down_it_is_one_operation():
    """What lies between would be kept until the end, gigabytes of it."""
    conv, x, other = Conv2d(8, 8, 3, padding=1).requires_grad_(False), last(1, 8, 8, 8), last(1, 8, 8, 8)
    with Calls([x]) as calls:
        y = conv(x)
    assert len(calls.lines) == 1
    assert torch.equal(calls.function(y)(other), conv(other))
    opcheck = torch.library.opcheck
    opcheck(winograd.convolution, (x, conv.weight, conv.bias, other), test_utils=("test_schema", "test_faketensor"))


@torch.no_grad()
@pytest.mark.usefixtures("everywhere")
def test_weights_that_change_are_seen(monkeypatch):
    """Nothing is kept of them."""
    shapes, conv, x = asked(monkeypatch), Conv2d(8, 8, 3, padding=1), last(1, 8, 8, 8)
    for _ in range(3):
        torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1), rtol=1e-5, atol=1e-5)
        conv.weight.data.mul_(-2)
    assert len(shapes) == 3
    assert not conv._ordered


def outputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of a U-Net and of a decoder."""
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(32, 64), attention=(True, False), transformer_layers=(1, 1), heads=(2, 4), context_dim=24, norm_groups=8
    )
    unet, vae = UNet(config), VAE(VAEConfig(block_out_channels=(32, 64), norm_groups=8))
    z, context = last(2, 4, 10, 16, dtype=torch.float32).to(dtype), torch.randn(2, 5, 24).to(dtype)
    for net in (unet, vae):
        net.eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        return [unet(z, torch.tensor([500.0, 500.0]), context), vae.decode(z)]


@pytest.mark.usefixtures("everywhere")
def test_whole_networks_are_as_exact(monkeypatch):
    exact = outputs(torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(winograd, "pays", lambda *_: False)
        plain = outputs(torch.float32)
    added, run = [], winograd.convolution
    monkeypatch.setattr(winograd, "convolution", lambda *args: added.append(args[3] is not None) or run(*args))
    actual = outputs(torch.float32)
    with torch.device("meta"):
        vae = VAE(VAEConfig(block_out_channels=(32, 64), norm_groups=8))
    unet_blocks = 2 * 2 + 2 + 2 * 3
    assert added.count(True) == unet_blocks + sum(isinstance(m, ResBlock) for m in vae.decoder.modules())
    assert added.count(False) == added.count(True) + 4  # the first and last of both
    for a, b, c in zip(actual, plain, exact, strict=True):
        assert not torch.equal(a, b)
        assert rms(a - c) < 2 * rms(b - c)
        assert rms(a - c) < 1e-5 * rms(c)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()
