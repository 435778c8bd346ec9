"""A convolution in a faster way is the convolution; and it is made so only where that is faster."""

import copy

import pytest
import torch
import torch.nn.functional as F

from latentdiff.models import fused
from latentdiff.models.convolution import Conv2d, product
from latentdiff.models.onednn import has_operators


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 8, 4, 4), (1, 16, 5, 7), (3, 5, 1, 6)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_product_is_the_convolution(shape, layout):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout)
    weight = torch.randn(6, shape[1], 3, 3, dtype=torch.float64).contiguous(memory_format=layout)
    bias = torch.randn(6, dtype=torch.float64)
    y = product(x, weight, bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=1), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_in_float32_it_is_as_exact():
    """At a true size: to 1e-5 the same as torch's convolution."""
    torch.manual_seed(0)
    conv = Conv2d(1280, 1280, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(1, 1280, 8, 8).contiguous(memory_format=torch.channels_last)
    expected, actual = F.conv2d(x, conv.weight, conv.bias, padding=1), product(x, conv.weight, conv.bias)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "capability", "amx"), [(torch.float32, "AVX2", False), (torch.bfloat16, "AVX512", True)])
def test_only_small_maps_with_many_channels_are_products(dtype, capability, amx, monkeypatch):
    if not has_operators(dtype):
        pytest.skip(f"this processor has no operators for {dtype}")
    asked = []
    monkeypatch.setattr("latentdiff.models.convolution.product", lambda x, *rest: asked.append(x.shape) or x)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("latentdiff.models.onednn.AMX", amx)
    monkeypatch.setattr(Conv2d, "light", 0)
    monkeypatch.setattr(Conv2d, "heavy", 9 * 8 * 8)
    monkeypatch.setattr(Conv2d, "products", 2 * 4 * 4)
    conv, small = Conv2d(8, 8, 3, padding=1).to(dtype), maps(2, 8, 4, 4, dtype=dtype)
    conv(small)
    assert asked == [(2, 8, 4, 4)]
    for large in (maps(3, 8, 4, 4, dtype=dtype), maps(1, 8, 6, 6, dtype=dtype)):
        conv(large)
    Conv2d(8, 7, 3, padding=1).to(dtype)(small)
    Conv2d(8, 16, 3, padding=1, stride=2).to(dtype)(small)
    with torch.enable_grad():
        conv(small)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr("latentdiff.models.onednn.AMX", False)
    conv(small)
    assert len(asked) == 1


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def ordered(*args: int, dtype: torch.dtype = torch.float32, **kwargs: object) -> Conv2d:
    if not has_operators(dtype):
        pytest.skip(f"this processor orders no {dtype} weights")
    return Conv2d(*args, **kwargs).requires_grad_(False).to(dtype, memory_format=torch.channels_last)  # type: ignore[arg-type,call-overload]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "shape"),
    [
        (3, 1, 1, (2, 24, 4, 4)),
        (3, 1, 1, (1, 24, 16, 12)),
        (3, 2, 1, (2, 24, 8, 8)),
        (3, 2, 0, (1, 24, 9, 9)),
        (1, 1, 0, (2, 24, 8, 8)),
    ],
)
def test_weights_ordered_once_give_the_same(dtype, bias, kernel, stride, padding, shape):
    torch.manual_seed(0)
    conv = ordered(24, 40, kernel, stride=stride, padding=padding, bias=bias, dtype=dtype)
    x = maps(*shape, dtype=dtype)
    expected = F.conv2d(x, conv.weight, conv.bias, stride, padding)
    as_linear = kernel == 1 and dtype == torch.bfloat16  # by the number of positions
    for _ in range(2):
        actual = conv(x)
        assert list(conv._ordered) == [len(x) * x.shape[2] * x.shape[3] if as_linear else x.shape]
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)


@torch.no_grad()
def test_weights_that_change_are_ordered_anew():
    conv, x = ordered(8, 8, 3, padding=1), maps(1, 8, 4, 4)
    plain = lambda: F.conv2d(x, conv.weight, conv.bias, padding=1)  # noqa: E731
    conv(x)
    for change in (
        lambda: conv.weight.mul_(2),
        lambda: conv.load_state_dict({"weight": torch.ones(8, 8, 3, 3), "bias": torch.zeros(8)}),
        lambda: setattr(conv.weight, "data", torch.randn(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)),
        lambda: conv.weight.data.add_(0.1),  # as old scripts merge a LoRA, which torch does not count
        lambda: torch._foreach_lerp_([conv.weight], [torch.zeros(8, 8, 3, 3)], 0.5),  # as EMA does  # type: ignore[attr-defined]
    ):
        change()
        torch.testing.assert_close(conv(x), plain())


def test_training_between_is_seen():
    """A fused optimiser leaves no trace in the weights' version, so that whatever was kept is dropped in training."""
    conv, x = ordered(8, 8, 3, padding=1), maps(1, 8, 4, 4)
    with torch.no_grad():
        conv(x)
    conv.requires_grad_()
    optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)
    conv(x).square().mean().backward()
    optimizer.step()
    conv.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))


@torch.no_grad()
def test_what_is_kept_is_little_and_is_not_copied():
    conv = ordered(8, 8, 3, padding=1)
    for side in range(4, 12):
        conv(maps(1, 8, side, side))
    assert [shape[-1] for shape in conv._ordered] == [8, 9, 10, 11]
    twin, x = copy.deepcopy(conv), maps(1, 8, 8, 8)
    assert not twin._ordered
    assert torch.equal(twin(x), conv(x))
    assert list(conv.state_dict()) == ["weight", "bias"]
    conv(maps(1, 8, 65, 64))  # too large
    assert [shape[-1] for shape in conv._ordered] == [8, 9, 10, 11]


def repeated_first(conv: Conv2d, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), conv.weight, conv.bias, padding=1)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24, 1, 2), (2, 24, 4, 4), (1, 24, 5, 9), (3, 24, 16, 2)])
def test_pixels_that_are_repeated_are_not_made(bias, shape):
    torch.manual_seed(0)
    conv = ordered(24, 40, 3, padding=1, bias=bias)
    x, size = maps(*shape), [2 * side for side in shape[2:]]
    expected = repeated_first(conv, x)
    for _ in range(2):
        actual = fused.conv_enlarged(conv, x, size)
        assert list(conv._ordered) == [(x.shape, "doubled")]
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_single_pixel_is_left_to_torch():
    """Its memory is channels-last and is not, which some versions of oneDNN's operators do not bear."""
    conv, x, other = ordered(24, 24, 3, padding=1), maps(2, 24, 1, 1), maps(2, 24, 1, 1)
    torch.testing.assert_close(fused.conv_add(conv, x, other), other + F.conv2d(x, conv.weight, conv.bias, padding=1))
    assert not conv._ordered


@torch.no_grad()
def test_pixels_that_are_repeated_in_bfloat16():
    """Sums of weights are rounded once more: beside the rounding of the weights themselves, a sixth more error. In whole networks,
    see test_onednn."""
    torch.manual_seed(0)
    exact, x = Conv2d(64, 64, 3, padding=1).double(), maps(2, 64, 16, 16)
    conv = ordered(64, 64, 3, padding=1)
    conv.load_state_dict(exact.state_dict())
    conv = conv.bfloat16()
    y, x = repeated_first(exact, x.double()), x.bfloat16()
    found, plain = fused.conv_enlarged(conv, x, (32, 32)), conv(fused.enlarge(x, (32, 32)))
    error, plain_error = ((z - y).square().mean().sqrt() for z in (found, plain))
    assert error <= 1.25 * plain_error


@torch.no_grad()
def test_pixels_are_repeated_where_that_is_another_thing(monkeypatch):
    torch.manual_seed(0)
    x = maps(1, 8, 3, 4)
    conv, strided = ordered(8, 8, 3, padding=1), ordered(8, 8, 3, padding=1, stride=2)
    others = [ordered(8, 8, 3, padding=1, **more) for more in ({"padding_mode": "circular"}, {"dilation": 2}, {"groups": 2})]
    for layer, size in ((conv, (5, 8)), (conv, (6, 7)), (conv, (3, 4)), (strided, (6, 8)), *((other, (6, 8)) for other in others)):
        assert torch.equal(fused.conv_enlarged(layer, x, size), layer(F.interpolate(x, size=size)))
    assert not any("doubled" in str(layer._ordered) for layer in (conv, strided, *others))
    fused.conv_enlarged(conv, x.contiguous(), (6, 8))  # channels first
    assert not any("doubled" in str(key) for key in conv._ordered)
    heard: list[torch.Size] = []
    hook = conv.register_forward_hook(lambda _layer, inputs, _out: heard.append(inputs[0].shape))
    fused.conv_enlarged(conv, x, (6, 8))
    hook.remove()
    assert heard == [(1, 8, 6, 8)]
    monkeypatch.setattr(Conv2d, "heavy", conv.weight.numel())
    fused.conv_enlarged(conv, x, (6, 8))
    assert not any("doubled" in str(key) for key in conv._ordered)
    with torch.enable_grad():
        assert fused.conv_enlarged(conv, x.clone().requires_grad_(), (6, 8)).requires_grad


@torch.no_grad()
def test_weights_added_beforehand_are_added_anew_if_they_change():
    conv, x = ordered(8, 8, 3, padding=1), maps(1, 8, 4, 4)
    fused.conv_enlarged(conv, x, (8, 8))
    for change in (
        lambda: conv.weight.mul_(2),
        lambda: conv.weight[0, 0, 0, 1].add_(5),  # which is none of the sample
        lambda: conv.weight.data.add_(0.1),
        lambda: conv.bias.add_(1),  # type: ignore[union-attr]
    ):
        change()
        torch.testing.assert_close(fused.conv_enlarged(conv, x, (8, 8)), repeated_first(conv, x))


@torch.no_grad()
def test_of_heavy_weights_one_order_is_kept(monkeypatch):
    monkeypatch.setattr(Conv2d, "light", 0)
    conv = ordered(8, 8, 3, padding=1)
    for side in (4, 5):
        fused.conv_enlarged(conv, maps(1, 8, side, side), (2 * side, 2 * side))
    assert list(conv._ordered) == [((1, 8, 5, 5), "doubled")]
