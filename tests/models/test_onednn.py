"""Products that do what follows them are what they stand for, at every place of the networks, and only where they may be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentdiff.models import attention, fused, onednn
from latentdiff.models.convolution import Conv2d
from latentdiff.models.narrow import narrow
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE, VAEConfig

pytestmark = pytest.mark.skipif(not onednn.has_operators(torch.bfloat16), reason="no oneDNN, or none in bfloat16")


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def no_further(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """Of bfloat16's results ours is as near to the exact one as that of separate operations."""
    assert actual.dtype == torch.bfloat16
    assert rms(actual - exact) <= 1.05 * rms(plain - exact)
    assert rms(actual - exact) < 1e-2 * rms(exact)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(5, 32), (2, 7, 48), (1, 1, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_and_what_follows(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(shape[-1], 40, bias=bias).bfloat16()
    x, other = torch.randn(shape).bfloat16(), torch.randn(*shape[:-1], 40).bfloat16()
    exact = copy.deepcopy(layer).double()(x.double())
    given = x, layer.weight, layer.bias
    no_further(onednn.linear(*given), layer(x), exact)
    no_further(onednn.linear(*given, gelu=True), F.gelu(layer(x)), F.gelu(exact))
    no_further(onednn.linear(*given, add=other), other + layer(x), other + exact)
    no_further(onednn.linear(*given, times=other), other * layer(x), other * exact)
    no_further(fused.linear_add(layer, x, other), other + layer(x), other + exact)


@torch.no_grad()
def test_other_layouts_of_what_is_added():
    layer, x = nn.Linear(32, 40).bfloat16(), torch.randn(3, 32, 6).mT.bfloat16()
    other = torch.randn(3, 40, 6).mT.bfloat16()
    torch.testing.assert_close(fused.linear_add(layer, x, other), other + layer(x), rtol=2e-2, atol=2e-2)


@torch.no_grad()
@pytest.mark.parametrize("part", [10**6, 1000, 384])
@pytest.mark.parametrize("turned", [False, True])
def test_the_feed_forward_net_at_once_and_in_parts(part, turned, monkeypatch):
    rows = 7
    monkeypatch.setattr(onednn, "PART", part)
    torch.manual_seed(0)
    net = attention.FeedForward(96).bfloat16()
    x, other = torch.randn(2, rows, 96).bfloat16(), torch.randn(2, rows, 96).bfloat16()
    other = other.mT.contiguous().mT if turned else other  # as the tokens of a map that is not channels-last
    actual = net(x, other)
    with torch.enable_grad():
        plain = net(x, other).detach()
        exact = copy.deepcopy(net).double()(x.double(), other.double()).detach()
    no_further(actual, plain, exact)
    assert not torch.equal(actual, plain)  # which rounds more often


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("way", ["as it is", "ordered", "as a product", "in parts"])
def test_a_convolution_and_what_follows(dtype, bias, kernel, stride, way, monkeypatch):
    monkeypatch.setattr(onednn, "REUSED", 2000 if way == "in parts" else onednn.REUSED)
    monkeypatch.setattr(Conv2d, "light", 1 << 20 if way == "ordered" else 0)
    monkeypatch.setattr(Conv2d, "heavy", 1)
    monkeypatch.setattr(Conv2d, "is_faster_as_product", lambda *_: way == "as a product" and (kernel, stride) == (3, 1))
    torch.manual_seed(0)
    conv = Conv2d(24, 40, kernel, stride=stride, padding=kernel // 2, bias=bias).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    norm, x = nn.GroupNorm(4, 40).to(dtype), last(2, 24, 8, 6, dtype=dtype)
    plain = F.conv2d(x, conv.weight, conv.bias, stride, kernel // 2)
    exact = F.conv2d(x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double(), stride, kernel // 2)
    other, shift = torch.randn_like(plain), torch.randn(1, 40).to(dtype).expand(2, -1)
    found = conv(x), fused.conv_add(conv, x, other), fused.conv_norm_silu(conv, norm, x, shift)
    exact_norm = copy.deepcopy(norm).double()
    moved = shift[:, :, None, None]
    plains = plain, other + plain, F.silu(norm(plain + moved))
    exacts = exact, other + exact, F.silu(exact_norm(exact + moved))
    for a, b, c in zip(found, plains, exacts, strict=True):
        assert a.is_contiguous(memory_format=torch.channels_last)
        if dtype == torch.float32:
            torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)
        else:
            no_further(a, b, c)


def last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_shifts_that_differ_from_picture_to_picture():
    torch.manual_seed(0)
    conv, norm = Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last), nn.GroupNorm(2, 8)  # type: ignore[call-overload]
    x, shift = last(2, 8, 5, 5, dtype=torch.float32), torch.randn(2, 8)
    expected = F.silu(norm(F.conv2d(x, conv.weight, conv.bias, padding=1) + shift[:, :, None, None]))
    torch.testing.assert_close(fused.conv_norm_silu(conv, norm, x, shift), expected, rtol=1e-5, atol=1e-5)


def networks(dtype: torch.dtype) -> tuple[UNet, VAE]:
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(32, 64), attention=(True, True), transformer_layers=(1, 2), heads=(2, 4), context_dim=24, norm_groups=8
    )
    unet, vae = UNet(config), VAE(VAEConfig(block_out_channels=(32, 64), norm_groups=8))
    for net in (unet, vae):
        net.eval().requires_grad_(False).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return unet, vae


def outputs(dtype: torch.dtype, change=lambda unet: None) -> list[torch.Tensor]:
    unet, vae = networks(dtype)
    change(unet)
    z, context, t = last(2, 4, 16, 16, dtype=dtype), torch.randn(2, 5, 24).to(dtype), torch.tensor([500.0, 500.0])
    grid = unet.embed_grid([500.0], None, 2, z)[500.0]
    with torch.no_grad():
        return [unet(z, t, context), unet(z, grid, unet.project_context(context)), vae.decode(z)]


def test_whole_networks_come_no_further_from_exact_ones(monkeypatch):
    exact, actual = outputs(torch.float64), outputs(torch.bfloat16)
    in_float32 = outputs(torch.float32)
    monkeypatch.setattr(onednn, "enabled", False)
    plain = outputs(torch.bfloat16)
    for a, b, c, d in zip(actual, plain, in_float32, exact, strict=True):
        assert not torch.equal(a, b)
        assert rms(a - d) <= 1.05 * rms(b - d)
        assert rms(c - d) < 1e-5 * rms(d)


def test_they_are_at_all_their_places(monkeypatch):
    """Each second-last layer of a residual, each first convolution with its shift, each feed-forward net, each larger map."""
    linears, convolutions, linear, convolution = [], [], onednn.linear, onednn.convolution
    doubled, transposed = [], onednn.transposed_convolution

    def count_linear(*args, **kwargs):
        linears.append(next((name for name, value in kwargs.items() if value is not None), "alone"))
        return linear(*args, **kwargs)

    def count_convolution(*args, add=None):
        convolutions.append(add is not None)
        return convolution(*args, add=add)

    monkeypatch.setattr(onednn, "linear", count_linear)
    monkeypatch.setattr(onednn, "convolution", count_convolution)
    monkeypatch.setattr(onednn, "transposed_convolution", lambda *args: (doubled.append(1), transposed(*args))[1])
    unet, vae = networks(torch.bfloat16)
    z = last(2, 4, 16, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        unet(z, unet.embed_grid([500.0], None, 2, z)[500.0], torch.randn(2, 5, 24).bfloat16())
    blocks = [m for m in unet.modules() if isinstance(m, attention.TransformerBlock)]
    transformers = [m for m in unet.modules() if isinstance(m, attention.Transformer)]
    shortcuts = [block for block in unet.res_blocks if isinstance(block.conv_shortcut, nn.Conv2d)]
    assert {kind: linears.count(kind) for kind in set(linears)} == {
        "add": 3 * len(blocks) + len(transformers), "gelu": len(blocks), "times": len(blocks),
        "alone": len(transformers) + len(shortcuts),
    }  # fmt: skip
    assert convolutions.count(True) == len(unet.res_blocks)
    assert len(doubled) == 1
    with torch.no_grad():
        vae.decode(z)
    assert len(doubled) == 2


@pytest.mark.parametrize("way", ["hook", "forward"])
def test_a_layer_that_somebody_listens_to_is_called(way):
    """As a LoRA that is not merged does: by a hook, or by a `forward` set on the layer."""
    heard, listened = [], []
    places = ("to_q", "to_out.0", "proj", "net.2", "conv1", "conv2", "proj_out", "upsamplers.0.conv", "time_emb_proj")

    def listen(unet):
        for attention_ in [m for m in unet.modules() if isinstance(m, attention.Attention) and not m.cross]:
            attention_.join()
        for name, layer in unet.named_modules():
            if name.endswith(places):
                listened.append(name)
                loud = lambda out, name=name: heard.append(name) or 2 * out  # noqa: E731
                if way == "hook":
                    layer.register_forward_hook(lambda _layer, _inputs, out, loud=loud: loud(out))
                else:
                    layer.forward = lambda *given, loud=loud, forward=layer.forward, **named: loud(forward(*given, **named))

    loud, plain = outputs(torch.bfloat16, listen), outputs(torch.bfloat16)
    assert {place for place in places if any(name.endswith(place) for name in heard)} == {*places}
    assert set(heard) == set(listened)
    assert rms(loud[0] - plain[0]) > 0.1 * rms(plain[0])


def test_hooks_hear_a_convolutions_own_output():
    torch.manual_seed(0)
    conv = Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    conv.register_forward_hook(lambda _layer, _inputs, out: 2 * out)
    x, other = last(1, 8, 4, 4, dtype=torch.float32), last(1, 8, 4, 4, dtype=torch.float32)
    expected = other + 2 * F.conv2d(x, conv.weight, conv.bias, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(fused.conv_add(conv, x, other), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_who_listens_to_a_norm_keeps_what_it_gave(dtype):
    torch.manual_seed(0)
    norm, x, heard = nn.GroupNorm(4, 8).to(dtype), last(1, 8, 4, 4, dtype=dtype), []
    expected = fused.norm_silu(norm, x)
    norm.register_forward_hook(lambda _layer, _inputs, out: heard.append(out))
    y = fused.norm_silu(norm, x)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert torch.equal(heard[0], norm(x))
    assert torch.equal(F.silu(heard[0]), y)


def test_other_modules_in_their_place():
    exact = outputs(torch.float32, lambda unet: narrow(unet, "bfloat16"))
    actual = outputs(torch.bfloat16, lambda unet: narrow(unet, "bfloat16"))
    for a, b in zip(actual, exact, strict=True):
        assert rms(a - b) < 0.05 * rms(b)


@torch.no_grad()
def test_where_they_stand():
    layer, x = nn.Linear(8, 8).bfloat16(), torch.randn(2, 8).bfloat16()
    assert onednn.takes(x, layer)
    assert not onednn.takes(x.float(), layer.float())
    layer.bfloat16()
    with torch.enable_grad():
        assert not onednn.takes(x, layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.takes(x, layer)
    assert not onednn.takes(x.to("meta"), layer)
    assert not onednn.takes(x, layer, nn.Sequential())
    assert not onednn.takes(x, layer.float())
    layer.bfloat16()
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn.takes(x, layer)
    seen = []
    torch.compile(lambda x: seen.append(onednn.takes(x, layer)) or x + 1, backend="eager")(x)
    assert seen == [False]
