"""Distances between two sets of pictures, from features of each: the Fréchet distance (FID) and the kernel distance (KID)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """|mu_a − mu_b|² + tr(A + B − 2 (A B)^½) of the Gaussians with the means and covariances A, B of both sets.

    Heusel et al. (arXiv 1706.08500), eq. 6, after Dowson & Landau (1982). 0 for equal moments; no upper end; it depends on the
    features and, with few pictures, on their number (it is biased upwards), so only values of one set-up compare.
    Errors: ValueError for fewer than two rows, other widths, or numbers that are not finite.
    """
    a, b = _checked(a, b)
    root_a, root_b = _root(a), _root(b)
    # With A = Ra' Ra and B = Rb' Rb, tr (A B)^½ is the sum of the singular values of Ra Rb': no matrix square root, whose small
    # eigenvalues would come out negative or imaginary, and nothing is lost where there are fewer pictures than features.
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + root_a.square().sum() + root_b.square().sum() - 2 * cross
    return max(distance.item(), 0.0)


def _root(x: Float[Tensor, "n d"]) -> Float[Tensor, "r d"]:
    """R with R' R = the covariance (over n − 1) of the rows of x; r = min(n, d)."""
    return torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """The unbiased squared maximum mean discrepancy under the kernel (x·y / d + 1)³ (Bińkowski et al., arXiv 1801.01401, sec. 3.1).

    0 on average for equal distributions, whatever the number of pictures, so that single values may be negative.
    """
    a, b = _checked(a, b)
    return (_mean_off_diagonal(_kernel(a, a)) + _mean_off_diagonal(_kernel(b, b)) - 2 * _kernel(a, b).mean()).item()


def _kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(k: Float[Tensor, "n n"]) -> Tensor:
    return (k.sum() - k.trace()) / (len(k) * (len(k) - 1))


def _checked(a: Tensor, b: Tensor) -> list[Float[Tensor, "n d"]]:
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"{name} must be features [n, d] of at least two pictures, got shape {list(x.shape)}")
        if broken := int((~x.isfinite()).any(1).sum()):
            raise ValueError(f"{name} must be finite numbers, got NaN or infinity in {broken} of {len(x)} rows")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must be of one width, got {a.shape[1]} and {b.shape[1]}")
    return [x.detach().double().cpu() for x in (a, b)]
