"""The Triton kernels against their plain twins: on a GPU where there is one, else under Triton's interpreter."""

import os
import subprocess
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from latentdiff.models import fused
from latentdiff.models.convolution import Conv2d

KERNELS = ("group_norm", "layer_norm", "geglu", "add_", "double")
SHAPES = [(1, 32, 4, 4, 8), (2, 320, 9, 7, 32), (1, 96, 16, 16, 16), (3, 24, 1, 5, 4), (1, 64, 40, 40, 32), (2, 960, 8, 8, 32)]
SHAPES += [(2, 64, 1, 1, 8), (1, 32, 6, 6, 32)]  # Triton builds another kernel where a number is 1


def check(device: str, dtype: torch.dtype, tolerance: float) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    def close(actual: torch.Tensor, exact: torch.Tensor) -> None:
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)

    from latentdiff.models import kernels

    torch.manual_seed(0)
    for batch, channels, height, width, groups in SHAPES:
        x = 3 * random(batch, channels, height, width) + 5 * random(channels, 1, 1)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias, added = (random(channels).to(dtype) for _ in range(3))
        moved = random(batch, 3 * channels).to(dtype)[:, channels : 2 * channels]  # one of several, side by side
        for silu, extra in ((False, {}), (True, {}), (True, {"added": added}), (True, {"added": added, "moved": moved})):
            total = x.double() + sum(e.double().reshape(-1, channels, 1, 1) for e in extra.values())
            exact = F.group_norm(total, groups, weight.double(), bias.double(), 1e-5)
            actual = kernels.group_norm(x, groups, weight, bias, 1e-5, silu=silu, **extra)
            close(actual, F.silu(exact) if silu else exact)
            assert actual.is_contiguous(memory_format=torch.channels_last)
        if dtype == torch.float32:
            far = x + 1000  # a mean a hundred times the spread takes no digits of the variance
            exact = F.silu(F.group_norm(far.double(), groups, weight.double(), bias.double(), 1e-5))
            actual = kernels.group_norm(far, groups, weight, bias, 1e-5, silu=True)
            torch.testing.assert_close(actual.double(), exact, rtol=1e-3, atol=1e-3)
        other = torch.randn_like(x)
        close(kernels.add_(x.clone(), bias, other), x.double() + bias.double()[:, None, None] + other.double())
        close(kernels.add_(x.clone(), bias), x.double() + bias.double()[:, None, None])
        doubled = kernels.double(x)
        assert torch.equal(doubled, F.interpolate(x, scale_factor=2.0, mode="nearest"))
        assert doubled.is_contiguous(memory_format=torch.channels_last)
    for shape in ((2, 7, 320), (1, 3, 40), (1, 130, 64), (5, 1280)):
        x, other = (3 * random(*shape).to(dtype) for _ in range(2))
        weight, bias = random(shape[-1]).to(dtype), random(shape[-1]).to(dtype)
        for given in (None, other):
            total, y = kernels.layer_norm(x, weight, bias, 1e-5, given)
            exact = x.double() if given is None else x.double() + given.double()
            close(total, exact)
            close(y, F.layer_norm(exact, shape[-1:], weight.double(), bias.double(), 1e-5))
        value, gate = x.double().chunk(2, -1)
        close(kernels.geglu(x), value * F.gelu(gate))


@torch.no_grad()
def check_networks(device: str) -> None:
    """All kernels at their places in a U-Net and a VAE, against the networks without them; `fuses` is told to say yes."""
    from latentdiff.models import fused
    from latentdiff.models.unet import UNet, UNetConfig
    from latentdiff.models.vae import VAE, VAEConfig

    torch.manual_seed(0)
    sizes = dict(block_out_channels=(32, 64), attention=(True, True), transformer_layers=(1, 2), heads=(2, 4), context_dim=16)
    unet = UNet(UNetConfig(**sizes, layers_per_block=1, sample_size=8)).to(device)
    linear = UNet(UNetConfig(**sizes, layers_per_block=1, sample_size=8, linear_projection=True)).to(device)
    vae = VAE(VAEConfig(block_out_channels=(32, 64), layers_per_block=1)).to(device)
    for module in (unet, linear, vae):
        module.to(memory_format=torch.channels_last)
        for weight in module.parameters():  # biases too
            weight.normal_(0.0, 0.05).add_(weight.ndim == 1)
    x = torch.randn(2, 4, 8, 8, device=device).contiguous(memory_format=torch.channels_last)
    images = torch.randn(1, 3, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    t, context = torch.tensor([3.0, 700.0], device=device), torch.randn(2, 5, 16, device=device)

    def run() -> list[torch.Tensor]:
        return [unet(x, t, context), linear(x, t, context), vae.decode(x), *vae.moments(images)]

    calls = Counter()

    def counted() -> Any:
        from latentdiff.models import kernels

        return SimpleNamespace(**{n: partial(count, n, getattr(kernels, n)) for n in KERNELS})

    def count(name: str, kernel: Any, *args: Any, **kwargs: Any) -> Any:
        calls[name] += 1
        return kernel(*args, **kwargs)

    says, imported = fused.fuses, fused.kernels
    try:
        fused.fuses = lambda x: False
        expected = run()
        fused.fuses, fused.kernels = lambda x: True, counted
        actual = run()
    finally:
        fused.fuses, fused.kernels = says, imported
    assert set(calls) == set(KERNELS), calls
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("kernel", ["moments", "join", "apply"])
def test_maps_of_large_pictures_fit_in_a_launch(kernel, monkeypatch):
    """CUDA starts no more than 65,535 blocks along the second and third axes."""
    kernels = pytest.importorskip("latentdiff.models.kernels")
    grids = {}
    for name in ("moments", "join", "apply"):
        launch = {"__getitem__": lambda _, grid, name=name: lambda *_, **__: grids.update({name: grid})}
        monkeypatch.setattr(kernels, name, type("Launch", (), launch)())
    x = torch.empty(2, 64, 4096, 4096, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.empty(64, device="meta")
    kernels.group_norm(x, 32, weight, weight, 1e-5, silu=True)
    assert len(grids) == 3
    assert max(grids[kernel][1:]) <= 65_535


@torch.no_grad()
def test_who_listens_or_stands_in_their_place_is_heard_on_a_gpu(monkeypatch):
    def add_(x: torch.Tensor, bias: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        x += bias[:, None, None] + (0 if other is None else other)
        return x

    monkeypatch.setattr(fused, "fuses", lambda x: True)
    monkeypatch.setattr(fused, "kernels", lambda: SimpleNamespace(add_=add_))
    x, other = (torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last) for _ in range(2))
    conv, heard = Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last), []  # type: ignore[call-overload]
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(fused.conv_add(conv, x, other), other + plain)
    hook = conv.register_forward_hook(lambda _layer, _inputs, out: heard.append(2 * out) or heard[0])
    torch.testing.assert_close(fused.conv_add(conv, x, other), other + 2 * plain)
    torch.testing.assert_close(heard[0], 2 * plain)  # nobody wrote over it
    hook.remove()
    conv.padding_mode = "circular"
    circular = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), conv.weight, conv.bias)
    torch.testing.assert_close(fused.conv_add(conv, x, other), other + circular)
    conv.__class__ = torch.nn.Conv2d
    torch.testing.assert_close(fused.conv_add(conv, x, other), other + circular)
    for norm, run in (
        (torch.nn.GroupNorm(4, 8), lambda norm: fused.norm_silu(norm, x)),
        (torch.nn.GroupNorm(4, 8), lambda norm: fused.conv_norm_silu(conv, norm, x)),
        (torch.nn.LayerNorm(5), lambda norm: fused.layer_norm(norm, x)),
        (torch.nn.LayerNorm(5), lambda norm: fused.linear_add_norm(torch.nn.Linear(5, 5), norm, x, x)),
    ):
        heard.clear()
        norm.register_forward_hook(lambda _layer, _inputs, out: heard.append(out))
        run(norm)
        assert len(heard) == 1


def test_kernels_under_the_interpreter():
    """In a process of its own: Triton decides at its import whether it interprets."""
    pytest.importorskip("triton")
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import torch, test_kernels as t; "
    code += "t.check('cpu', torch.float32, 1e-5); t.check('cpu', torch.bfloat16, 1e-2); t.check_networks('cpu')"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_kernels_on_a_gpu(dtype, tolerance):
    check("cuda", dtype, tolerance)


@pytest.mark.gpu
def test_networks_with_kernels_on_a_gpu():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # products have none by default
        check_networks("cuda")
