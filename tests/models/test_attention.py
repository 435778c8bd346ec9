"""The attention function and its layout in memory."""

import torch

from latentdiff.models.attention import Attention, Site, feature_map, sdpa, tokens


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
