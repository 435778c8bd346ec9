"""The attention function and its layout in memory."""

import pytest
import torch
import torch.nn.functional as F

from latentdiff.models.attention import Attention, Site, blocked, feature_map, sdpa, tokens


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
def test_blocked_is_as_near_the_formula_as_torchs_own_in_bfloat16(queries, keys, width, sharpness):
    torch.manual_seed(0)
    q, k, v = sharpness * torch.randn(2, 3, queries, width), torch.randn(2, 3, keys, width), torch.randn(2, 3, keys, width)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    half = [t.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # laid out as the network's
    own = (F.scaled_dot_product_attention(*half) - exact).square().mean().sqrt()
    assert (blocked(*half) - exact).square().mean().sqrt() < 1.3 * own
    assert torch.equal(blocked(*half), sdpa(*half, Site("anywhere", cross=False)))


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
