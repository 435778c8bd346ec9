"""A convolution as a matrix product is the convolution; and it is one only where that is faster."""

import pytest
import torch
import torch.nn.functional as F

from latentdiff.models.convolution import Conv3x3, product


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
    conv = Conv3x3(1280, 1280, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(1, 1280, 8, 8).contiguous(memory_format=torch.channels_last)
    expected, actual = F.conv2d(x, conv.weight, conv.bias, padding=1), product(x, conv.weight, conv.bias)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_only_small_maps_with_many_channels_are_products(monkeypatch):
    asked = []
    monkeypatch.setattr("latentdiff.models.convolution.product", lambda x, *rest: asked.append(x.shape) or x)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(Conv3x3, "least", 9 * 8 * 8)
    monkeypatch.setattr(Conv3x3, "most", 2 * 4 * 4)
    conv, small = Conv3x3(8, 8, 3, padding=1), torch.randn(2, 8, 4, 4)
    conv(small)
    assert asked == [(2, 8, 4, 4)]
    for large in (torch.randn(3, 8, 4, 4), torch.randn(1, 8, 6, 6)):
        conv(large)
    Conv3x3(8, 7, 3, padding=1)(small)
    conv.bfloat16()(small.bfloat16())
    conv.float()
    with torch.enable_grad():
        conv(small)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    conv(small)
    assert len(asked) == 1
