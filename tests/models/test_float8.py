"""Products in 8 bits, as a CPU computes them: near, and only where they were asked for."""

import pytest
import torch
from torch import nn

from latentdiff.models.float8 import Float8Linear, has_float8, quantise
from latentdiff.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(32, 64), layers_per_block=1, attention=(True, True), transformer_layers=(1, 1), heads=(2, 2),
    context_dim=48, linear_projection=True,
)  # fmt: skip

able = pytest.mark.skipif(not has_float8(torch.device("cpu")), reason="an older torch")


@able
@torch.no_grad()
def test_a_row_keeps_its_size_whatever_the_others():
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).bfloat16()
    linear.weight *= torch.logspace(-3, 3, 32)[:, None]
    x = torch.randn(2, 5, 64).bfloat16() * torch.logspace(-4, 4, 10).view(2, 5, 1)
    exact = nn.functional.linear(x.double(), linear.weight.double())
    linear.bias.zero_()
    off = (Float8Linear(linear)(x) - exact).abs() / (x.double().norm(dim=-1, keepdim=True) * linear.weight.double().norm(dim=1))
    assert off.max() < 0.02


@able
@torch.no_grad()
def test_the_network_is_nearly_the_same():
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval().bfloat16()
    x, t, context = torch.randn(2, 4, 16, 16).bfloat16(), torch.tensor([500.0, 20.0]), torch.randn(2, 7, 48).bfloat16()
    expected = unet(x, t, context)
    quantise(unet)
    kinds = {name: type(m) for name, m in unet.named_modules() if isinstance(m, nn.Linear | Float8Linear)}
    assert {name for name, kind in kinds.items() if kind is nn.Linear} == {
        name for name in kinds if "transformer_blocks" not in name
    }
    actual = unet(x, t, context)
    assert 0 < (actual - expected).float().std() < 0.05 * expected.float().std()
    prompt = unet.project_context(context)
    torch.testing.assert_close(unet(x, t, prompt), actual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="float8 needs a bfloat16 model"):
        quantise(UNet(CONFIG).to(dtype))
