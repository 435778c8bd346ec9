"""Cached features: what is computed anew and what is not, and how far the result is from the whole network's."""

import pytest
import torch

from latentdiff.bench.work import flops, products
from latentdiff.checkpoints.families import SD15
from latentdiff.checkpoints.fill import on_meta
from latentdiff.models.attention import sdpa
from latentdiff.models.caching import Cached
from latentdiff.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(8, 16), layers_per_block=1, attention=(True, True), transformer_layers=(1, 1), heads=(2, 2), context_dim=12,
    norm_groups=4,
)  # fmt: skip


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval()


@pytest.fixture
def call(unet):
    torch.manual_seed(1)
    return torch.randn(2, 4, 8, 8), torch.tensor([900.0, 900.0]), unet.project_context(torch.randn(2, 5, 12))


def count(unet: UNet) -> list[str]:
    """Names of the res blocks as they run."""
    ran = []
    for name, module in unet.named_modules():
        if name.endswith(("resnets.0", "resnets.1")):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


@torch.no_grad()
def test_steps_between_run_the_outermost_blocks_only(unet, call):
    cached, ran, whole = Cached(unet, 3), count(unet), []
    for _ in range(7):
        ran.clear()
        cached(*call)
        whole.append(len(ran) > 1)
        assert ran[-1] == "up_blocks.1.resnets.1"
    assert whole == [True, False, False, True, False, False, True]


@torch.no_grad()
def test_nothing_is_lost_where_nothing_changed(unet, call):
    cached = Cached(unet, 2)
    expected = unet(*call)
    for _ in range(3):
        torch.testing.assert_close(cached(*call), expected, rtol=1e-5, atol=1e-6)
    x, _, prompt = call
    near = cached(x + 0.01, torch.tensor([890.0, 890.0]), prompt)
    true = unet(x + 0.01, torch.tensor([890.0, 890.0]), prompt)
    assert 0 < (near - true).std() < 0.1 * true.std()


@torch.no_grad()
def test_another_batch_attention_or_run_starts_anew(unet, call):
    x, t, prompt = call
    cached, ran = Cached(unet, 5), count(unet)
    one = (x[:1], t[:1], [(k[:1], v[:1]) for k, v in prompt])
    for given, full in ((call, True), (call, False), (one, True), (one, False), (call, True)):
        ran.clear()
        cached(*given)
        assert (len(ran) > 1) == full
    blind = lambda q, k, v, site: v if k.shape == q.shape else sdpa(q, k, v, site)  # noqa: E731
    for seams, full in (({"attend": blind}, True), ({"attend": blind}, False), ({}, True)):
        ran.clear()
        cached(*call, **seams)
        assert (len(ran) > 1) == full
    ran.clear()
    cached.fresh()(*call)
    assert len(ran) > 1


@torch.no_grad()
def test_seams_are_kept(unet, call):
    cached, merged, sites = Cached(unet, 2), [], []
    merge = lambda x, skip, number: (merged.append(number), torch.cat([x, skip], 1))[1]  # noqa: E731
    attend = lambda q, k, v, site: (sites.append(site.name), sdpa(q, k, v, site))[1]  # noqa: E731
    for _ in range(2):
        torch.testing.assert_close(cached(*call, merge=merge, attend=attend), unet(*call), rtol=1e-5, atol=1e-6)
    assert merged == [0, 0, 1, 1, 1]
    assert sites[-2:] == [
        "up_blocks.1.attentions.1.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
    ]


def test_gradients_take_the_whole_network(unet, call):
    cached = Cached(unet, 2)
    for _ in range(2):
        assert torch.equal(cached(*call), unet(*call))
    assert cached.deep is None


@torch.no_grad()
def test_what_it_saves_on_stable_diffusion():
    """At every third step, 2.3 times less work (by formula)."""
    unet = on_meta(UNet, SD15.unet)
    with torch.device("meta"):
        prompt = unet.project_context(torch.empty(1, 77, 768))
        cached = Cached(unet, 3)
        work = [flops(products(lambda: cached(torch.empty(1, 4, 64, 64), torch.empty(1), prompt))) for _ in range(3)]
    assert work[1] == work[2] < 0.16 * work[0]
    assert 3 * work[0] / sum(work) > 2.2


def test_every_second_step_at_least(unet):
    with pytest.raises(ValueError, match="every must be at least 2, got 1"):
        Cached(unet, 1)
