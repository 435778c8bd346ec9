"""Our DDPM and DDIM against the papers' own loops, written here in the papers' own notation, in float64."""

import math

import pytest
import torch

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.samplers import ddim, ddpm
from latentdiff.diffusion.schedules import leading, linear, trailing


def ho_algorithm_2(eps_theta, x_T, betas, draw):
    """Ho et al., algorithm 2, line by line; sigma_t² = beta-tilde_t (eq. 7). Yields x_{T-1} … x_0."""
    alpha = [1 - b for b in betas]
    alpha_bar = [math.prod(alpha[: t + 1]) for t in range(len(betas))]
    x = x_T
    for t in range(len(betas), 0, -1):
        a, ab, ab_prev = alpha[t - 1], alpha_bar[t - 1], alpha_bar[t - 2] if t > 1 else 1.0
        beta_tilde = (1 - ab_prev) / (1 - ab) * betas[t - 1]
        z = draw(x) if t > 1 else torch.zeros_like(x)
        x = (x - (1 - a) / math.sqrt(1 - ab) * eps_theta(x, t - 1)) / math.sqrt(a) + math.sqrt(beta_tilde) * z
        yield x


def song_eq_12(eps_theta, x, tau, alpha_bar, eta, draw):
    """Song et al., eq. 12 with sigma from eq. 16, along the subsequence tau (noisiest first); their alpha is alpha_bar."""
    levels = [alpha_bar[t] for t in tau] + [1.0]
    for t, a, a_prev in zip(tau, levels[:-1], levels[1:], strict=True):
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
        eps = eps_theta(x, t)
        predicted_x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        direction = math.sqrt(1 - a_prev - sigma**2) * eps
        noise = sigma * draw(x) if sigma > 0 else 0
        x = math.sqrt(a_prev) * predicted_x0 + direction + noise
        yield x


def papers(step):
    """Our state in the papers' coordinates: z = x / sqrt(1 + sigma²)."""
    return step.x / (1 + step.sigma**2).sqrt()


def levels(schedule, t):
    return torch.cat([schedule.sigmas[t.long()], torch.zeros(1, dtype=torch.float64)])


@pytest.fixture
def eps_theta(network, cond):
    return lambda z, t: network(z, torch.full((len(z),), t), cond(0.4, len(z)).context)


@pytest.mark.parametrize("T", [5, 40, 1000])
def test_ddpm_is_algorithm_2(T, network, eps_theta, cond, noise, randn):
    betas = torch.linspace(1e-4, 0.02 * min(1000 / T, 20), T, dtype=torch.float64)
    schedule = linear(T, betas[0].item(), betas[-1].item())
    sigmas = levels(schedule, leading(T, T))
    z = noise(2, 3, 2, 2)
    ours = ddpm(
        lambda x, sigma: Denoiser(network, schedule)(x, sigma, cond(0.4, 2)),
        z * (1 + sigmas[0] ** 2).sqrt(),
        sigmas,
        randn=randn(7),
    )
    theirs = ho_algorithm_2(eps_theta, z, betas.tolist(), randn(7))
    count = 0
    for step, x in zip(ours, theirs, strict=True):
        torch.testing.assert_close(papers(step), x, rtol=1e-10, atol=1e-10)
        count += 1
    assert count == T


@pytest.mark.parametrize("eta", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize(("steps", "spacing"), [(1, leading), (4, trailing), (50, leading), (50, trailing), (333, leading)])
def test_ddim_is_eq_12(steps, spacing, eta, network, eps_theta, cond, noise, randn):
    schedule = linear()
    tau = spacing(1000, steps)
    sigmas = levels(schedule, tau)
    z = noise(2, 3, 2, 2)
    denoise = lambda x, sigma: Denoiser(network, schedule)(x, sigma, cond(0.4, 2))  # noqa: E731
    ours = ddim(denoise, z * (1 + sigmas[0] ** 2).sqrt(), sigmas, randn=randn(3), eta=eta)
    theirs = song_eq_12(eps_theta, z, [int(t) for t in tau], schedule.abar.tolist(), eta, randn(3))
    for step, x in zip(ours, theirs, strict=True):
        torch.testing.assert_close(papers(step), x, rtol=1e-10, atol=1e-10)


def gaussian(mean, std):
    """The exact denoiser of data N(mean, std²)."""
    return lambda x, sigma: (mean * sigma**2 + x * std**2) / (std**2 + sigma**2)


def test_ddim_is_order_1_on_a_gaussian_with_a_known_answer():
    """The ODE keeps x's quantile: (x - mean) / sqrt(std² + sigma²) is constant along it."""
    mean, std, x = 0.3, 0.5, torch.tensor([[[[-9.0, 2.0, 14.0]]]], dtype=torch.float64)
    errors = []
    for n in (32, 64, 128, 256):
        sigmas = torch.logspace(1, -1, n + 1, dtype=torch.float64)
        exact = mean + (x - mean) * ((std**2 + sigmas[-1] ** 2) / (std**2 + sigmas[0] ** 2)).sqrt()
        *_, last = ddim(gaussian(mean, std), x, sigmas, randn=torch.zeros_like)
        errors.append((last.x - exact).abs().max())
    orders = (torch.stack(errors[:-1]) / torch.stack(errors[1:])).log2()
    assert ((orders > 0.93) & (orders < 1.07)).all(), orders
    assert errors[-1] < 0.02


def moments_of_ddim(mean, std, sigmas, eta):
    """Mean and variance at the end of a run on data N(mean, std²), without sampling.

    Every step is affine in x and adds independent noise, x' = p·x + q + up·n, so both follow exactly from p, q and up, which
    are read off single steps.
    """
    m, var = mean, std**2 + sigmas[0].item() ** 2
    for pair in sigmas.unfold(0, 2, 1):

        def at(x, n, pair=pair):
            x, randn = torch.tensor([x], dtype=torch.float64), lambda x: torch.full_like(x, n)
            return next(ddim(gaussian(mean, std), x, pair, eta=eta, randn=randn)).x.item()

        q = at(0.0, 0.0)
        p, up = at(1.0, 0.0) - q, at(0.0, 1.0) - q
        m, var = p * m + q, p**2 * var + up**2
    return m, var


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_variance_converges_to_that_of_gaussian_data(eta):
    """The bias of n steps falls as 1/n, so that of 2n is half, and extrapolated to infinitely many it is 0."""
    mean, std = 0.3, 0.5
    bias = []
    for n in (500, 1000):
        sigmas = torch.logspace(1.5, -2.5, n + 1, dtype=torch.float64)
        m, var = moments_of_ddim(mean, std, sigmas, eta)
        assert m == pytest.approx(mean, abs=1e-9)
        bias.append(var - std**2 - sigmas[-1].item() ** 2)
    assert bias[0] / bias[1] == pytest.approx(2, abs=0.03)
    assert abs(2 * bias[1] - bias[0]) < 4e-5


def test_ddpm_samples_have_the_mean_and_variance_that_the_recursion_gives(noise, randn):
    mean, std, n = 0.3, 0.5, 40_000
    sigmas = torch.cat([torch.logspace(1.5, -2, 100, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    x = mean + noise(n, 1) * math.sqrt(std**2 + sigmas[0].item() ** 2)
    *_, last = ddpm(gaussian(mean, std), x, sigmas, randn=randn(5))
    m, var = moments_of_ddim(mean, std, sigmas, eta=1.0)
    assert last.x.mean().item() == pytest.approx(m, abs=4 * std / math.sqrt(n))
    assert last.x.var().item() == pytest.approx(var, rel=4 * math.sqrt(2 / n))
