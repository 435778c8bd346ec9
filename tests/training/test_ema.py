"""The moving average of weights."""

import pytest
import torch
from torch import nn

from latentdiff.training.ema import EMA


def test_follows_the_closed_form() -> None:
    """After n updates: sum of weights w_k (1 − d_k) times the product of all later d, with d_k = min(decay, (1 + k) / (10 + k))."""
    model, decay, n = nn.Linear(3, 2).double(), 0.6, 40
    average, seen = EMA(model, decay), [model.weight.detach().clone()]
    for _ in range(n):
        with torch.no_grad():
            model.weight.normal_()
        seen.append(model.weight.detach().clone())
        average.update(model)
    expected = seen[0]
    for k, weight in enumerate(seen[1:]):
        d = min(decay, (1 + k) / (10 + k))
        expected = d * expected + (1 - d) * weight
    torch.testing.assert_close(average.model.weight, expected, rtol=0, atol=1e-14)  # type: ignore[attr-defined]
    assert average.updates == n


def test_at_decay_0_it_is_the_last_weights() -> None:
    model = nn.Linear(3, 2)
    average = EMA(model, 0.0)
    for _ in range(3):
        with torch.no_grad():
            model.weight.normal_()
        average.update(model)
    assert torch.equal(average.model.weight, model.weight)  # type: ignore[arg-type]


def test_is_a_frozen_copy_that_takes_buffers_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout())
    average = EMA(model)
    assert not average.model.training
    assert not any(p.requires_grad for p in average.model.parameters())
    model(torch.randn(5, 2, 4, 4))
    average.update(model)
    for (name, own), new in zip(average.model.named_buffers(), model.buffers(), strict=True):
        assert torch.equal(own, new), name
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=r"ema decay must lie in \[0, 1\), got"):
        EMA(nn.Linear(1, 1), decay)
