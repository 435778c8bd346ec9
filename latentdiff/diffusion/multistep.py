"""Samplers that reach a higher order by what they saw in earlier steps, at one evaluation a step.

Two families. Those of Adams and Bashforth (`lms`, `deis`, `plms`, `pndm`, `ipndm`) put a polynomial through the last slopes
eps = (x - x0) / sigma and integrate it. The exponential ones (`dpmpp_2m` and on, `unipc`) put it through the last x0, in log sigma,
where the linear part of the ODE is solved exactly.

A step to sigma = 0 takes x0 as it is seen last, wherever log sigma is used: no step in log sigma reaches 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoise
from latentdiff.diffusion.schedules import NOISE_ALONE
from latentdiff.diffusion.singlestep import Grid, Latents, Randn, Step, add_noise, carry, steps

# -- Adams-Bashforth --

Weights = Callable[[Sequence[float], float], list[float]]  # (levels of the slopes, newest first; next level) -> weight of each
Slope = Callable[[Denoise, Tensor, Tensor, Tensor, Tensor], Tensor]  # (denoise, x, slope, sigma, sigma_next) -> better slope


def _adams(denoise: Denoise, x: Latents, sigmas: Grid, order: int, weights: Weights, begin: Sequence[Slope] = ()) -> Iterator[Step]:
    """x + sum of weights · slopes over the last `order` slopes. `begin` gives those of the first steps, save from noise alone."""
    slopes: list[Tensor] = []
    levels = sigmas.tolist()
    for i, s, s_next in steps(sigmas):
        x0 = denoise(x, sigmas[i])
        slopes = [(x - x0) / s, *slopes][:order]
        if i < len(begin) and s_next > 0 and s < NOISE_ALONE:
            x = x + (s_next - s) * begin[i](denoise, x, slopes[0], sigmas[i], sigmas[i + 1])
        else:
            seen = levels[max(i + 1 - len(slopes), 0) : i + 1][::-1]
            x = x + sum(w * slope for w, slope in zip(weights(seen, s_next), slopes, strict=True))
        yield Step(i, sigmas[i + 1], x, x0)


def lms(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, order: int = 4) -> Iterator[Step]:
    """The linear multistep method of k-diffusion: Adams-Bashforth with exact weights on any grid of sigma.

    Order 4 after three steps of rising order, one evaluation a step, deterministic. diffusers computes the weights by quadrature.
    """
    return _adams(denoise, x, sigmas, order, lambda seen, s_next: lagrange_integrals(seen, seen[0], s_next, lambda u: 1.0))


def deis(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, order: int = 3) -> Iterator[Step]:
    """The slopes' polynomial in log sigma, integrated exactly: DEIS in log rho (Zhang & Chen, arXiv 2204.13902).

    Order 3 after two steps of rising order, one evaluation a step, deterministic. diffusers lowers the order in the last step of
    runs below 15 steps, and ends at the lowest trained level.
    """

    def weights(seen: Sequence[float], s_next: float) -> list[float]:
        if s_next == 0:
            return [-seen[0], *[0.0] * (len(seen) - 1)]
        logs = [math.log(s) for s in seen]
        return lagrange_integrals(logs, logs[0], math.log(s_next), math.exp)

    return _adams(denoise, x, sigmas, order, weights)


def _adams_bashforth(seen: Sequence[float], s_next: float) -> list[float]:
    """The weights for steps of equal length, scaled by this one's: PNDM's "pseudo" rule (Liu et al., arXiv 2202.09778)."""
    table = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    return [(s_next - seen[0]) * w for w in table[len(seen) - 1]]


def ipndm(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn) -> Iterator[Step]:
    """Adams-Bashforth weights for equal steps, of rising order over the first: improved PNDM (Zhang & Chen, arXiv 2204.13902).

    Order 2 where steps differ in length, 4 slopes, one evaluation a step, deterministic. diffusers has the same rule, on a grid of
    its own alone.
    """
    return _adams(denoise, x, sigmas, 4, _adams_bashforth)


def plms(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn) -> Iterator[Step]:
    """PNDM's linear multistep (Liu et al., arXiv 2202.09778) with a Heun step first: the PLMS of Stable Diffusion's own code.

    Order 2, one evaluation a step and one more, deterministic. It is diffusers' PNDM with skip_prk_steps.
    """
    return _adams(denoise, x, sigmas, 4, _adams_bashforth, begin=[_heun_slope])


def pndm(
    denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, middle: Callable[[float, float], float] | None = None
) -> Iterator[Step]:
    """Three Runge-Kutta steps, then linear multistep: PNDM (Liu et al., arXiv 2202.09778, algorithm 2).

    Order 2, one evaluation a step and nine more, deterministic. middle: the level halfway between two; the paper means the middle
    of their times (`samplers.bind` makes that from a schedule), without it the geometric mean is taken.
    """

    def slope(denoise: Denoise, x: Tensor, k1: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        s, s_next = sigma.item(), sigma_next.item()
        mid = middle(s, s_next) if middle else math.sqrt(s * s_next)
        k2 = _slope(denoise, x + (mid - s) * k1, sigma.new_tensor(mid))
        k3 = _slope(denoise, x + (mid - s) * k2, sigma.new_tensor(mid))
        k4 = _slope(denoise, x + (s_next - s) * k3, sigma_next)
        return (k1 + 2 * k2 + 2 * k3 + k4) / 6

    return _adams(denoise, x, sigmas, 4, _adams_bashforth, begin=[slope] * 3)


def _heun_slope(denoise: Denoise, x: Tensor, slope: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    return (slope + _slope(denoise, x + (sigma_next - sigma).item() * slope, sigma_next)) / 2


def _slope(denoise: Denoise, x: Tensor, sigma: Tensor) -> Tensor:
    return (x - denoise(x, sigma)) / sigma.item()


def lagrange_integrals(nodes: Sequence[float], a: float, b: float, density: Callable[[float], float]) -> list[float]:
    """∫_a^b L_j(u) density(u) du for the Lagrange polynomial L_j of each node.

    By 16-point Gauss-Legendre quadrature: exact for density 1, and to the last digits for exp over a step.
    """
    points = [((b - a) / 2 * z + (a + b) / 2, (b - a) / 2 * w) for z, w in _gauss_legendre()]
    return [sum(w * density(u) * _lagrange(nodes, j, u) for u, w in points) for j in range(len(nodes))]


def _lagrange(nodes: Sequence[float], j: int, u: float) -> float:
    return math.prod((u - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)


@cache
def _gauss_legendre(n: int = 16) -> list[tuple[float, float]]:
    """Points and weights on [-1, 1] from the eigenvectors of the Jacobi matrix (Golub & Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64, device="cpu")
    off = k / (4 * k**2 - 1).sqrt()
    points, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return list(zip(points.tolist(), (2 * vectors[0] ** 2).tolist(), strict=True))


# -- exponential --


def _dpmpp(denoise: Denoise, x: Latents, sigmas: Grid, randn: Randn, order: int, eta: float, *, midpoint: bool) -> Iterator[Step]:
    """DPM-Solver++ multistep in lambda = -log sigma (Lu et al., arXiv 2211.01095, algorithm 2), with noise for eta > 0.

    eta scales the noise of the reverse SDE; at 0 and 1 it means what DDIM's means, between them it means another amount.
    """
    history: list[tuple[float, Tensor]] = []  # (lambda, x0), newest first
    for i, s, s_next in steps(sigmas):
        x0 = denoise(x, sigmas[i])
        history = [(-math.log(s), x0), *history][:order]
        if s_next > 0:
            h = math.log(s / s_next)
            x = carry(x, x0, math.exp(-h * (1 + eta))) + _dpmpp_correction(history, h, h * (1 + eta), midpoint=midpoint)
            x = add_noise(x, s_next * math.sqrt(-math.expm1(-2 * h * eta)), randn)
        else:
            x = x0
        yield Step(i, sigmas[i + 1], x, x0)


def _dpmpp_correction(history: list[tuple[float, Tensor]], h: float, decay: float, *, midpoint: bool) -> Tensor | float:
    """What the change of x0 along the step adds, from divided differences of the last two or three x0.

    midpoint: weigh a first difference by (1 - exp(-decay)) / 2, as algorithm 2 does, instead of by phi_2, which is exact.
    """
    if len(history) == 1:
        return 0.0
    phi2 = math.expm1(-decay) / decay + 1
    (l0, m0), (l1, m1) = history[:2]
    d01 = (m0 - m1) * (h / (l0 - l1))
    if len(history) == 2:
        return (-math.expm1(-decay) / 2 if midpoint else phi2) * d01
    l2, m2 = history[2]
    d12 = (m1 - m2) * (h / (l1 - l2))
    curve = (d01 - d12) * (h / (l0 - l2))
    return phi2 * (d01 + curve * ((l0 - l1) / h)) - (phi2 / decay - 0.5) * curve


def dpmpp_2m(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn) -> Iterator[Step]:
    """DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, algorithm 2).

    Order 2, one evaluation a step, deterministic. diffusers' "lower_order_final" and "euler_at_final" change the last step of
    grids that end above 0, which this does not.
    """
    return _dpmpp(denoise, x, sigmas, randn, 2, 0.0, midpoint=True)


def dpmpp_3m(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn) -> Iterator[Step]:
    """DPM-Solver++(3M), as its authors' code has it (Lu et al., arXiv 2211.01095): one x0 more than 2M.

    Order 2 as measured, one evaluation a step, deterministic: the code weighs the second difference by half of what order 3 needs,
    which still makes the error smaller than 2M's.
    """
    return _dpmpp(denoise, x, sigmas, randn, 3, 0.0, midpoint=False)


def dpmpp_2m_sde(
    denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, eta: float = 1.0, midpoint: bool = True
) -> Iterator[Step]:
    """2M on the reverse SDE: SDE-DPM-Solver++(2M) (Lu et al., arXiv 2211.01095); midpoint=False is its "heun".

    Order 1 (2 at eta = 0), one evaluation a step, stochastic.
    """
    return _dpmpp(denoise, x, sigmas, randn, 2, eta, midpoint=midpoint)


def dpmpp_3m_sde(denoise: Denoise, x: Latents, sigmas: Grid, *, randn: Randn, eta: float = 1.0) -> Iterator[Step]:
    """3M on the reverse SDE, as in k-diffusion.

    Order 1 (2 at eta = 0), one evaluation a step, stochastic. diffusers has -1/2 where the weight of the second difference has
    +1/2, and is the same otherwise.
    """
    return _dpmpp(denoise, x, sigmas, randn, 3, eta, midpoint=False)


def unipc(
    denoise: Denoise,
    x: Latents,
    sigmas: Grid,
    *,
    randn: Randn,
    order: int = 2,
    variant: str = "bh2",
    lower_order_final: bool = True,
) -> Iterator[Step]:
    """Predict, and correct each prediction by the x0 that is seen there: UniPC (Zhao et al., arXiv 2302.04867).

    Order `order`, one evaluation a step, deterministic. variant: the paper's B1 or B2, "bh1" or "bh2". lower_order_final: let
    the order fall to 1 towards the end, as the authors' code does.
    """
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant must be bh1 or bh2, got {variant!r}")
    n = len(sigmas) - 1
    history: list[tuple[float, Tensor]] = []  # (level, x0), newest first
    before, used = x, history  # the state and the x0 that the last prediction was made from
    for i, s, s_next in steps(sigmas):
        x0 = denoise(x, sigmas[i])
        if used:
            x = _unipc_update(before, used, [*used[1:], (s, x0)], s, variant)
        history = [(s, x0), *history][:order]
        before, used = x, history[: n - i] if lower_order_final else history
        x = _unipc_update(x, used, used[1:], s_next, variant) if s_next > 0 else x0
        yield Step(i, sigmas[i + 1], x, x0)


def _unipc_update(
    x: Tensor, used: list[tuple[float, Tensor]], others: list[tuple[float, Tensor]], s_next: float, variant: str
) -> Tensor:
    """From the newest of `used` to s_next, with the x0 of `others`: earlier ones, and for the corrector that at s_next itself."""
    s, m0 = used[0]
    h = math.log(s / s_next)
    b = -h if variant == "bh1" else math.expm1(-h)
    r = [math.log(s / level) / h for level, _ in others]
    x = carry(x, m0, s_next / s)
    for weight, ratio, (_, m) in zip(_unipc_weights(r, h, b), r, others, strict=True):
        x = x - b * weight / ratio * (m - m0)
    return x


def _unipc_weights(r: list[float], h: float, b: float) -> list[float]:
    """The weights that satisfy the order conditions at relative places r: sum of weights · r^(k-1) = k! · phi_(k+1) / B."""
    if len(r) <= 1:
        return [0.5] * len(r)  # the authors' choice, which is exact as h goes to 0
    rhs, phi, factorial = [], math.expm1(-h) / -h - 1, 1
    for k in range(1, len(r) + 1):
        rhs.append(phi * factorial / b)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    powers = torch.tensor([[ratio**k for ratio in r] for k in range(len(r))], dtype=torch.float64, device="cpu")
    return torch.linalg.solve(powers, powers.new_tensor(rhs)).tolist()
