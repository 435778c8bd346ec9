"""Weights in fewer bits: as near as their bits allow, less memory, and refused elsewhere."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentdiff.models.narrow import Narrow, narrow
from latentdiff.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(32, 64), layers_per_block=1, attention=(True, True), transformer_layers=(1, 1), heads=(2, 2),
    context_dim=48,
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("width", "off"), [("int8", 0.5 / 127), ("bfloat16", 2**-8)])
def test_each_weight_is_as_near_as_its_bits_allow(width, off):
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(8, 6, 3, stride=2, padding=1), nn.Linear(8, 6)
    for layer in (conv, linear):
        layer.weight *= torch.logspace(-3, 3, 6).view(-1, *[1] * (layer.weight.ndim - 1))
    for layer, x in ((conv, torch.randn(2, 8, 9, 9)), (linear, torch.randn(2, 5, 8))):
        own = Narrow(layer, width)
        wide = own.weight.float() * (1 if own.scale is None else own.scale)
        largest = layer.weight.flatten(1).abs().amax(1).view(-1, *[1] * (layer.weight.ndim - 1))
        assert ((wide - layer.weight).abs() <= 1.001 * off * largest).all()
        exact = F.conv2d(x, wide, layer.bias, 2, 1) if layer is conv else F.linear(x, wide, layer.bias)
        torch.testing.assert_close(own(x), exact)


@torch.no_grad()
@pytest.mark.parametrize(("width", "share"), [("int8", 0.3), ("bfloat16", 0.55)])
def test_the_network_is_nearly_the_same_in_less_memory(width, share):
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    own = copy.deepcopy(unet)
    narrow(own, width)
    assert next(own.parameters()).dtype == torch.float32
    size = lambda net: sum(t.numel() * t.element_size() for t in net.state_dict().values())  # noqa: E731
    ends = size(unet.conv_in) + size(unet.conv_out) + size(unet.time_embedding)
    assert size(own) - ends < share * (size(unet) - ends)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 20.0]), torch.randn(2, 7, 48)
    expected, actual = unet(x, t, context), own(x, t, own.project_context(context))
    assert 0 < (actual - expected).std() < 0.02 * expected.std()


@pytest.mark.parametrize(("device", "width"), [("cpu", "int4"), ("meta", "int8")])
def test_other_widths_and_devices_are_refused(device, width):
    with pytest.raises(ValueError, match=f"weights must be int8 or bfloat16, on a CPU, got '{width}' on {device}"):
        narrow(UNet(CONFIG).to(device), width)
