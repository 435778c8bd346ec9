"""The attention function and its layout in memory."""

import copy

import pytest
import torch
import torch.nn.functional as F

from latentdiff.models import onednn
from latentdiff.models.attention import (
    Attention,
    FeedForward,
    Site,
    blocked,
    dot_product_attention,
    feature_map,
    filled_up,
    sdpa,
    tokens,
)


def test_sdpa_is_the_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    weights = torch.softmax(q.double() @ k.double().mT / 8**0.5, dim=-1)
    actual = sdpa(q, k, v, Site("anywhere", cross=True))
    torch.testing.assert_close(actual.double(), weights @ v.double(), rtol=1e-6, atol=1e-6)


def test_tokens_are_a_view_of_a_channels_last_map_and_back():
    x = torch.randn(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    y = tokens(x)
    assert y.data_ptr() == x.data_ptr()
    assert torch.equal(y[1, 2 * 5 + 4], x[1, :, 2, 4])
    z = feature_map(y, 3, 5)
    assert z.data_ptr() == x.data_ptr()
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(z, x)


def test_heads_are_consecutive_channels():
    attention = Attention(channels=6, heads=3)
    x = torch.randn(2, 5, 6)
    heads = attention.split(x)
    assert heads.shape == (2, 3, 5, 2)
    assert torch.equal(heads[:, 1], x[:, :, 2:4])


@pytest.mark.parametrize("sharpness", [1.0, 4.0])
@pytest.mark.parametrize(("queries", "keys", "width"), [(700, 700, 40), (64, 1030, 64), (513, 513, 24)])
@torch.no_grad()
def test_blocked_is_as_near_the_formula_as_torchs_own_in_bfloat16(queries, keys, width, sharpness, monkeypatch):
    monkeypatch.setattr("latentdiff.models.onednn.AMX", False)
    torch.manual_seed(0)
    q, k, v = sharpness * torch.randn(2, 3, queries, width), torch.randn(2, 3, keys, width), torch.randn(2, 3, keys, width)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    half = [t.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # laid out as the network's
    own = (F.scaled_dot_product_attention(*half) - exact).square().mean().sqrt()
    assert (blocked(*half) - exact).square().mean().sqrt() < 1.3 * own
    assert torch.equal(blocked(*half), sdpa(*half, Site("anywhere", cross=False)))


@pytest.mark.parametrize(("queries", "keys", "width"), [(700, 77, 40), (256, 154, 64), (300, 5, 24), (256, 80, 16)])
@torch.no_grad()
def test_keys_filled_up_change_nothing(queries, keys, width, monkeypatch):
    asked = []
    monkeypatch.setattr("latentdiff.models.onednn.AMX", True)
    monkeypatch.setattr("latentdiff.models.attention.filled_up", lambda *args: asked.append(True) or filled_up(*args))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, rows, 3, width).transpose(1, 2) for rows in (queries, keys, keys))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(filled_up(q, k, v).double(), exact, rtol=1e-5, atol=1e-5)
    half = [t.bfloat16() for t in (q, k, v)]
    own = (F.scaled_dot_product_attention(*half) - exact).square().mean().sqrt()
    assert (sdpa(*half, Site("anywhere", cross=True)) - exact).square().mean().sqrt() < 1.05 * own
    assert bool(asked) == (keys % 16 != 0)


@torch.no_grad()
def test_torchs_own_is_left_alone_where_tiles_are_full(monkeypatch):
    monkeypatch.setattr("latentdiff.models.onednn.AMX", True)
    for queries, keys in ((1024, 1024), (64, 77), (1024, 1000)):
        q, k = torch.randn(1, 2, queries, 40).bfloat16(), torch.randn(1, 2, keys, 40).bfloat16()
        assert torch.equal(sdpa(q, k, k, Site("anywhere", cross=True)), F.scaled_dot_product_attention(q, k, k))


@torch.no_grad()
def test_blocked_bears_scores_far_above_those_it_looked_at():
    """The one key that counts is none of the 128 from which the rough maximum is taken; and large values of one sign."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, 4, 16), 0.1 * torch.randn(1, 1, 1024, 16), torch.randn(1, 1, 1024, 16)
    k[:, :, 333] = 40 * q[:, :, 1]
    q, k, v = (t.bfloat16() for t in (q, k, v))
    torch.testing.assert_close(blocked(q, k, v)[0, 0, 1], v[0, 0, 333])
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(blocked(q, k, v).double(), exact, rtol=0.02, atol=0.02)


def test_blocked_stays_away_from_training_and_from_float32():
    q = torch.randn(1, 1, 600, 16, dtype=torch.bfloat16, requires_grad=True)
    sdpa(q, q, q, Site("anywhere", cross=False)).sum().backward()
    assert q.grad is not None
    with torch.no_grad():
        x = torch.randn(1, 1, 600, 16)
        assert torch.equal(sdpa(x, x, x, Site("anywhere", cross=False)), F.scaled_dot_product_attention(x, x, x))


class Doubled(torch.nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def joined_attention() -> Attention:
    torch.manual_seed(0)
    attention = Attention(16, 2).requires_grad_(False)
    attention.site = Site("here", False)
    return attention


@torch.no_grad()
def test_the_feed_forward_net_in_parts_in_float32(monkeypatch):
    """The same numbers, some rows at a time; whoever listens to a part of it hears all at once."""
    torch.manual_seed(0)
    net, x, other = FeedForward(96), torch.randn(2, 7, 96), torch.randn(2, 7, 96)
    expected, rows = net(x, other), []
    inner, linear = net.net[0].proj, F.linear  # type: ignore[union-attr]
    monkeypatch.setattr(onednn, "PART", 1000)
    monkeypatch.setattr(F, "linear", lambda x, *rest: rows.append(len(x)) or linear(x, *rest))
    torch.testing.assert_close(net(x, other), expected)
    assert rows == ([2, 2] * 7 if onednn.has_operators(torch.float32) else [2, 2])
    heard = []
    inner.register_forward_hook(lambda _layer, given, _out: heard.append(given[0].shape))
    torch.testing.assert_close(net(x, other), expected)
    assert heard == [(2, 7, 96)]


@torch.no_grad()
def test_one_product_makes_queries_keys_and_values():
    attention, x = joined_attention(), torch.randn(2, 5, 16)
    expected, names = attention.to_itself(x, sdpa), list(attention.state_dict())
    weights = [w.clone() for w in attention.parameters()]
    attention.join()
    assert attention.joined() is not None
    torch.testing.assert_close(attention.to_itself(x, sdpa), expected, rtol=1e-5, atol=1e-6)
    assert list(attention.state_dict()) == names
    place = attention.to_q.weight.data_ptr()
    attention.to(torch.float32).join()  # changes nothing: a recording would not hear of it
    assert attention.to_q.weight.data_ptr() == place
    assert attention.joined() is not None
    assert all(torch.equal(a, b) for a, b in zip(attention.parameters(), weights, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("layer", ["to_q", "to_k", "to_v"])
@pytest.mark.parametrize("change", ["in place", "other", "state", "data", "hook", "before", "type", "copy", "dtype"])
def test_a_changed_layer_is_heard_by_the_one_product(layer, change):
    """The plain attention, changed alike, is the oracle."""
    attention, plain, x = joined_attention(), joined_attention(), torch.randn(2, 5, 16)
    attention.join()
    new = torch.randn(16, 16)
    for a in (attention, plain):
        own = getattr(a, layer)
        if change == "in place":
            own.weight.mul_(new)  # through the parameter, a view of what is joined
        elif change == "other":
            own.weight = torch.nn.Parameter(new, requires_grad=False)
        elif change == "state":
            a.load_state_dict(a.state_dict() | {f"{layer}.weight": new}, assign=True)
        elif change == "data":
            own.weight.data = new
        elif change == "before":
            own.register_forward_pre_hook(lambda _layer, inputs: (2 * inputs[0],))
        elif change == "type":  # as wrappers are that add something and show the weight of what they wrap
            own.__class__ = Doubled
        elif change == "hook":
            own.register_forward_hook(lambda _layer, inputs, out: out + inputs[0] @ new)
        elif change == "dtype":
            a.double()
            own.weight.mul_(new)
            a.float()
    if change == "copy":
        attention, plain = copy.deepcopy(attention), copy.deepcopy(plain)
        for a in (attention, plain):
            getattr(a, layer).weight.mul_(new)
    torch.testing.assert_close(attention.to_itself(x, sdpa), plain.to_itself(x, sdpa), rtol=1e-4, atol=1e-5)


def test_each_layer_learns_by_itself():
    attention, x = joined_attention().requires_grad_(True), torch.randn(2, 5, 16)
    attention.join()
    attention.to_itself(x, sdpa).sum().backward()
    assert all(layer.weight.grad is not None for layer in (attention.to_q, attention.to_k, attention.to_v))


@torch.no_grad()
def test_one_product_compiles_whole():
    attention, x = joined_attention(), torch.randn(2, 5, 16)
    attention.join()
    compiled = torch.compile(lambda x: attention.to_itself(x, sdpa), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), attention.to_itself(x, sdpa))
    attention.to_k.weight = torch.nn.Parameter(torch.randn(16, 16), requires_grad=False)
    torch.testing.assert_close(compiled(x), attention.to_itself(x, sdpa), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@torch.no_grad()
def test_wide_heads_on_a_gpu_are_nearly_as_near_the_formula_as_torchs_own():
    """Scores are stored in 16 bits: the attention's own error may be half as large again; a whole decode's is not (`blocked`)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 512, device="cuda", dtype=torch.bfloat16) for n in (700, 4096, 4096))
    exact = torch.softmax(q.double() @ k.double().mT * 512**-0.5, -1) @ v.double()
    own = (F.scaled_dot_product_attention(q, k, v) - exact).square().mean().sqrt()
    assert (dot_product_attention(q, k, v) - exact).square().mean().sqrt() < 1.5 * own
