"""Products in 8 bits on a CPU: what they are is exact, and a network of them is near."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import latentdiff
from latentdiff.adapting import adapt
from latentdiff.checkpoints.files import write_safetensors
from latentdiff.checkpoints.save import save_folder, save_single
from latentdiff.evaluation.kept import fingerprint
from latentdiff.loading import ready
from latentdiff.models import onednn, recorded
from latentdiff.models.fused import feed_forward
from latentdiff.models.int8 import Gated, Int8, to_int8, to_uint8
from latentdiff.models.narrow import quantise_int8
from latentdiff.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(32, 64), layers_per_block=1, attention=(True, True), transformer_layers=(1, 1), heads=(2, 2),
    context_dim=48,
)  # fmt: skip

able = pytest.mark.skipif(not onednn.multiplies_int8(torch.float32), reason="this CPU adds no products of 8 bits in 32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", ["both", "positive", "negative", "far", "none", "tiny"])
def test_each_number_is_as_near_as_its_bits_allow_and_zero_is_zero(dtype, numbers):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 64)
    x = {"both": x, "positive": x.abs() + 1, "negative": -x.abs() - 1, "far": x * 1e4 + 3e4, "none": x * 0, "tiny": x * 1e-9}[
        numbers
    ]
    x = x.to(dtype)
    q, scale, zero = to_uint8(x)
    assert q.dtype == torch.uint8
    assert 1 <= zero <= 254
    near = (q.double() - zero) * scale.double()
    assert (near - x.double()).abs().max() <= 0.501 * scale
    assert scale * 253 <= (x.double().clamp(min=0).max() - x.double().clamp(max=0).min()) * 1.001 + 1e-9


@able
@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_that_of_the_rounded_numbers(stride):
    torch.manual_seed(0)
    x, weight, bias = torch.rand(2, 32, 9, 9) + 1, torch.randn(48, 32, 3, 3), torch.randn(48)  # zero is far from the middle
    weight *= torch.logspace(-2, 2, 48).view(-1, 1, 1, 1)
    own = Int8(weight, bias, ([1, 1], [stride] * 2, [1, 1], 1))
    (q, s, z), (qw, sw) = to_uint8(x), to_int8(weight)
    exact = F.conv2d((q.double() - z) * s, qw * sw.double().view(-1, 1, 1, 1), bias.double(), stride, 1)
    torch.testing.assert_close(own(x).double(), exact, rtol=1e-5, atol=1e-4)
    assert own(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@able
@torch.no_grad()
@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64), (2, 3, 5, 64)])
def test_a_linear_layer_is_that_of_the_rounded_numbers(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape) - 0.7, torch.randn(96, 64)
    (q, s, z), (qw, sw) = to_uint8(x), to_int8(weight)
    exact = F.linear((q.double() - z) * s, qw * sw.double()[:, None])
    torch.testing.assert_close(Int8(weight, None)(x).double(), exact, rtol=1e-5, atol=1e-4)


@able
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_network_is_nearly_the_same(dtype):
    if not onednn.multiplies_int8(dtype):
        pytest.skip("not on this CPU")
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval().to(dtype)
    x, t, context = torch.randn(2, 4, 16, 16, dtype=dtype), torch.tensor([500.0, 20.0]), torch.randn(2, 7, 48, dtype=dtype)
    expected, wide = unet(x, t, context), sum(m.weight.numel() for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    quantise_int8(unet)
    left = {name.split(".")[-1] for name, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert left == {"conv_in", "conv_out", "linear_1", "linear_2", "time_emb_proj", "to_k", "to_v", "conv_shortcut"}
    own = sum(m.packed.numel() for m in unet.modules() if isinstance(m, Int8))
    assert own + sum(m.weight.numel() for m in unet.modules() if isinstance(m, nn.Linear | nn.Conv2d)) == wide
    crossed = [name for name, m in unet.named_modules() if name.endswith(("to_k", "to_v")) and isinstance(m, nn.Linear)]
    assert {name.split(".")[-2] for name in crossed} == {"attn2"}
    actual = unet(x, t, context)
    assert 0 < (actual - expected).float().std() < (0.03 if dtype == torch.float32 else 0.05) * expected.float().std()
    torch.testing.assert_close(unet(x, t, unet.project_context(context)), actual)


@able
@torch.no_grad()
@pytest.mark.parametrize("where", [None, ([1, 1], [1, 1], [1, 1], 1)])
def test_rows_of_zeros_no_pictures_and_other_dtypes(where):
    torch.manual_seed(0)
    weight, bias = torch.randn(8, 16, *[] if where is None else [3, 3]), torch.randn(8)
    weight[3] = 0
    own, exact = Int8(weight, bias, where), F.linear if where is None else lambda x, w, b: F.conv2d(x, w, b, padding=1)
    x = torch.randn(2, 16, *[] if where is None else [5, 5])
    assert (own(x).transpose(0, 1)[3] == bias[3]).all()
    assert own(x[:0]).shape == exact(x, weight, bias)[:0].shape
    q, scale = to_int8(weight)
    wide = exact(x, q * scale.view(-1, *[1] * (q.ndim - 1)), bias)
    for dtype, off in ((torch.float64, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        y = own(x.to(dtype))
        assert y.dtype == dtype
        assert (y.float() - wide).norm() < off * wide.norm()


@able
@torch.no_grad()
def test_nan_and_infinity_come_out():
    x, own = torch.randn(2, 16), Int8(torch.randn(8, 16), None)
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not own(torch.where(torch.arange(16) == 3, bad, x)).isfinite().any()


@able
@torch.no_grad()
@pytest.mark.parametrize("which", ["", ".values", ".gates", "outer"])
def test_who_listens_to_a_part_of_the_feed_forward_net_hears_it_once_as_it_was(which):
    unet = UNet(CONFIG).eval()
    quantise_int8(unet)
    net = unet.mid_block.attentions[0].transformer_blocks[0].ff.net
    part, heard = net[2] if which == "outer" else net[0].get_submodule(f"proj{which}"), []
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 20.0]), torch.randn(2, 7, 48)
    part.register_forward_hook(lambda module, args, out: heard.append((out, out.clone())))
    unet(x, t, context)
    assert len(heard) == 1
    assert torch.equal(*heard[0])


@able
@torch.no_grad()
def test_copies_and_stored_networks_give_the_same_bits():
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    quantise_int8(unet)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 20.0]), torch.randn(2, 7, 48)
    expected = unet(x, t, context)
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(other(x, t, context), expected)
    assert torch.equal(unet(x, t, context), expected)


@able
def test_gradients_reach_what_goes_in():
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    own = copy.deepcopy(unet)
    quantise_int8(own)
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 20.0]), torch.randn(2, 7, 48)
    gradients = []
    for network in (unet, own):
        y = x.clone().requires_grad_()
        network(y, t, context).square().sum().backward()
        gradients.append(y.grad)
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[0].norm()


@able
@torch.no_grad()
def test_few_rows_at_once_change_no_more_than_the_scale_does(monkeypatch):
    torch.manual_seed(0)
    inner, outer = nn.Linear(32, 256), nn.Linear(128, 32)
    net = Gated(inner), Int8(outer.weight, outer.bias)
    x, other = torch.randn(2, 40, 32), torch.randn(2, 40, 32)
    values, gates = inner(x).chunk(2, -1)
    exact = other + outer(values * F.gelu(gates))
    whole = feed_forward(*net, x, other)
    monkeypatch.setattr(onednn, "PART", 1000)
    parts = feed_forward(*net, x, other)
    assert not torch.equal(whole, parts)
    for y in (whole, parts):
        assert (y - exact).norm() < 0.04 * (exact - other).norm()


def test_a_cpu_that_cannot_is_refused(monkeypatch):
    monkeypatch.setattr(onednn, "multiplies_int8", lambda dtype: False)
    with pytest.raises(ValueError, match=r"int8 needs a CPU with VNNI or AMX, .* got torch.float32 on cpu"):
        quantise_int8(UNet(CONFIG))


@able
def test_half_precision_and_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"int8 needs .* got torch.float16 on cpu"):
        quantise_int8(UNet(CONFIG).half())
    with torch.device("meta"), pytest.raises(ValueError, match=r"int8 needs .* got torch.float32 on meta"):
        quantise_int8(UNet(CONFIG))


@able
def test_what_a_network_in_8_bits_cannot_take_is_refused(tiny_parts):
    pipe = ready(tiny_parts(), torch.device("cpu"), torch.float32, int8=True)
    with pytest.raises(ValueError, match="compile must be False for a model that was loaded with int8"):
        adapt(pipe, compile=True)
    assert adapt(pipe).unet is pipe.unet


@able
def test_it_is_no_longer_what_its_files_are(tiny_parts, tmp_path):
    parts = tiny_parts()
    told, names = fingerprint(parts.unet), {*parts.unet.state_dict()}
    pipe = ready(parts, torch.device("cpu"), torch.float32, int8=True)
    for save in (save_folder, save_single):
        with pytest.raises(ValueError, match="a U-Net that was narrowed"):
            save(parts, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    kept = {*pipe.unet.state_dict()}
    assert "mid_block.resnets.0.conv1.weight" in names & kept
    found = fingerprint(pipe.unet)
    pipe.unet.mid_block.resnets[0].conv1.scale.mul_(2)
    assert len({told, found, fingerprint(pipe.unet)}) == 3


@able
def test_a_lora_on_it_is_refused_by_what_it_is(tiny_parts, tmp_path):
    pipe = ready(tiny_parts(), torch.device("cpu"), torch.float32, int8=True)
    name, width = next((n, m.packed.shape[0]) for n, m in pipe.unet.named_modules() if n.endswith("attn1.to_q"))
    write_safetensors(
        tmp_path / "l.safetensors",
        {f"unet.{name}.lora_A.weight": torch.ones(2, width), f"unet.{name}.lora_B.weight": torch.ones(width, 2)},
    )
    with pytest.raises(ValueError, match="lora can not be added to weights that were narrowed"):
        adapt(pipe, lora=tmp_path / "l.safetensors")


@pytest.mark.parametrize(("ability", "expected"), [("avx512_vnni", True), ("avx_vnni", True), ("avx512_f", False)])
def test_which_cpus_can(monkeypatch, ability, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {ability: True}, raising=False)  # an older torch has none
    monkeypatch.setattr(onednn, "adds_in_32_bits", lambda dtype: True)
    for operators in (True, False):
        monkeypatch.setattr(onednn, "has_operators", lambda dtype, there=operators: there)
        assert onednn.multiplies_int8.__wrapped__(torch.float32) is (expected and operators)


@able
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_trial_heeds_no_default(dtype):
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        assert onednn.adds_in_32_bits(torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@able
def test_its_weights_count_where_small_networks_are_told_from_large_ones(monkeypatch):
    unet = UNet(CONFIG)
    weights = sum(w.numel() for w in unet.parameters())
    quantise_int8(unet)
    for most, small in ((weights, True), (0.9 * weights, False)):
        monkeypatch.setattr(recorded, "SMALL", most)
        assert recorded.is_small(unet) is small


@able
def test_a_picture_is_nearly_the_same_and_the_same_bits_when_written_down():
    exact = np.asarray(latentdiff.load(device="cpu", dtype="float32")("a cat", steps=8, seed=0, progress=False)[0], float)
    pipe = latentdiff.load(device="cpu", dtype="float32", int8=True)
    first, again = (np.asarray(pipe("a cat", steps=8, seed=0, progress=False)[0], float) for _ in range(2))
    assert (first == again).all()
    assert 0 < np.abs(first - exact).mean() < 4
    plain = replace(pipe, network=None)
    assert (np.asarray(plain("a cat", steps=8, seed=0, progress=False)[0], float) == first).all()
