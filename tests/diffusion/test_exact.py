"""The mixture of Gaussians: its denoiser and its flow against integrals and a fine solver."""

import torch

from latentdiff.diffusion.exact import Mixture
from latentdiff.diffusion.samplers import SAMPLERS


def test_the_denoiser_is_the_posterior_mean():
    """E[x0 | x] by numerical integration over x0."""
    mixture = Mixture()
    x0 = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    prior = sum(
        w / s * (-(((x0 - m) / s) ** 2) / 2).exp() for m, s, w in zip(mixture.means, mixture.stds, mixture.weights, strict=True)
    )
    for sigma in (0.05, 0.7, 5.0):
        for x in (-3.0, -0.4, 0.0, 1.9):
            weight = prior * (-((x - x0) ** 2) / (2 * sigma**2)).exp()
            expected = (x0 * weight).sum() / weight.sum()
            got = mixture.denoise(torch.tensor([x], dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
            torch.testing.assert_close(got[0], expected, rtol=1e-9, atol=1e-9)


def test_the_flow_solves_the_ode():
    """A fine run of a solver arrives there, and the flow back returns."""
    mixture, x = Mixture(), torch.linspace(-12, 12, 7, dtype=torch.float64)
    there = mixture.flow(x, 8.0, 0.1)
    torch.testing.assert_close(mixture.flow(there, 0.1, 8.0), x, rtol=1e-8, atol=1e-8)
    *_, last = SAMPLERS["lms"](mixture.denoise, x, torch.logspace(0.9030899869919435, -1, 2001, dtype=torch.float64), randn=None)
    torch.testing.assert_close(last.x, there, rtol=1e-5, atol=1e-5)


def test_float32_states_get_float32_estimates():
    assert Mixture().denoise(torch.zeros(3), torch.tensor(1.0, dtype=torch.float64)).dtype == torch.float32
