"""Fréchet and kernel distances, against closed forms."""

import math

import pytest
import torch
from torch import Tensor

from latentdiff.evaluation.fid import frechet_distance, kernel_distance


def white(n: int, d: int, seed: int) -> Tensor:
    """n rows whose mean is 0 and whose covariance is the identity, exactly."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(x - x.mean(0)).Q * (n - 1) ** 0.5


def coloured(n: int, d: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, their mean, their covariance), exactly."""
    g = torch.Generator().manual_seed(seed + 100)
    mean, root = torch.randn(d, generator=g, dtype=torch.float64), torch.randn(d, d, generator=g, dtype=torch.float64)
    return white(n, d, seed) @ root.T + mean, mean, root @ root.T


def test_equal_sets_have_no_distance() -> None:
    a = coloured(50, 7, 0)[0]
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a[torch.randperm(50)]) == pytest.approx(0, abs=1e-12)


def test_shifted_sets_are_as_far_as_their_means() -> None:
    a, shift = coloured(50, 7, 0)[0], torch.arange(7.0).double()
    assert frechet_distance(a, a + shift) == pytest.approx((shift**2).sum().item(), rel=1e-12)


def test_in_one_dimension_it_is_the_difference_of_means_and_deviations() -> None:
    a, b = 2 * white(40, 1, 0) + 3, 0.5 * white(60, 1, 1) - 1
    assert frechet_distance(a, b) == pytest.approx((3 + 1) ** 2 + (2 - 0.5) ** 2, rel=1e-12)


def test_with_one_set_of_axes_deviations_differ_axis_by_axis() -> None:
    s, t = torch.tensor([3.0, 1.0, 0.0, 2.0]).double(), torch.tensor([1.0, 1.0, 5.0, 0.5]).double()
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    a, b = (white(30, 4, 0) * s) @ turn, (white(44, 4, 1) * t) @ turn
    assert frechet_distance(a, b) == pytest.approx(((s - t) ** 2).sum().item(), rel=1e-12)


def test_without_common_axes_it_is_the_papers_formula() -> None:
    scipy = pytest.importorskip("scipy.linalg")
    (a, mean_a, cov_a), (b, mean_b, cov_b) = coloured(80, 9, 0), coloured(33, 9, 1)
    cross = scipy.sqrtm((cov_a @ cov_b).numpy()).trace().real
    expected = ((mean_a - mean_b) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-9)


def test_fewer_pictures_than_features_are_no_trouble() -> None:
    """Sets that lie in planes which meet at right angles: no covariance in common, so that tr (A B)^½ is 0."""
    a, b = torch.zeros(6, 40).double(), torch.zeros(5, 40).double()
    a[:, :3], b[:, 3:7] = white(6, 3, 0), 2 * white(5, 4, 1)
    assert frechet_distance(a, b) == pytest.approx(3 + 4 * 4, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_features_of_one_value_and_half_precision() -> None:
    assert frechet_distance(torch.ones(5, 3), torch.zeros(4, 3)) == pytest.approx(3, rel=1e-12)
    a, b = coloured(50, 7, 0)[0].half(), coloured(60, 7, 1)[0].half()
    assert frechet_distance(a, b) == frechet_distance(a.double(), b.double())  # computed in float64, whatever comes in


def test_a_large_common_offset_costs_few_digits() -> None:
    a, b = coloured(50, 7, 0)[0], coloured(60, 7, 1)[0]
    assert frechet_distance(a + 1e5, b + 1e5) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_kernel_distance_is_its_definition() -> None:
    a, b = coloured(7, 4, 0)[0], coloured(5, 4, 1)[0]

    def k(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 4 + 1) ** 3

    within_a = sum(k(a[i], a[j]) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    within_b = sum(k(b[i], b[j]) for i in range(5) for j in range(5) if i != j) / (5 * 4)
    between = sum(k(x, y) for x in a for y in b) / 35
    assert kernel_distance(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-10)


def test_kernel_distance_of_equal_distributions_is_zero_on_average() -> None:
    """Whatever the sizes: the Fréchet distance of the same sets is far above 0."""
    g = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(20, 6, generator=g), torch.randn(35, 6, generator=g)) for _ in range(400)]
    found = torch.tensor([kernel_distance(a, b) for a, b in pairs])
    assert abs(found.mean().item()) < 4 * found.std().item() / math.sqrt(400)
    assert found.min() < 0
    assert all(frechet_distance(a, b) > 0.5 for a, b in pairs[:20])


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_what_is_no_set_of_features_is_refused(distance) -> None:
    good = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"a must be features \[n, d\] of at least two pictures, got shape \[1, 3\]"):
        distance(good[:1], good)
    with pytest.raises(ValueError, match=r"b must be features .*, got shape \[3\]"):
        distance(good, good[0])
    with pytest.raises(ValueError, match="a and b must be of one width, got 3 and 2"):
        distance(good, good[:, :2])
    broken = good.clone()
    broken[1, 2] = float("nan")
    broken[4, 0] = float("inf")
    with pytest.raises(ValueError, match="b must be finite numbers, got NaN or infinity in 2 of 5 rows"):
        distance(good, broken)
