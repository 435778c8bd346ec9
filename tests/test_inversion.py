"""Inversion: the run that is found rebuilds what it was found from, shown on distributions whose denoiser is a formula."""

from functools import partial

import pytest
import torch

from latentdiff import inversion
from latentdiff.diffusion.exact import Mixture
from latentdiff.diffusion.schedules import cosine, grid, scaled_linear
from latentdiff.diffusion.singlestep import carry, ddim
from latentdiff.request import randn

Z = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0)).double()
GRIDS = {
    "cosine-trailing-zero": grid(cosine(), 20, "trailing"),
    "sd-leading-sigma_min": grid(scaled_linear(), 20, "leading", offset=1, final="sigma_min"),
    "karras": grid(scaled_linear(), 12, "karras"),
}


def rebuild(denoise, found):
    *_, last = ddim(denoise, found.states[0], found.sigmas, randn=found.randn(), eta=found.eta)
    x = last.x if found.rest is None else last.x + found.rest
    return x / (1 + found.sigmas[-1] ** 2).sqrt()


@pytest.mark.parametrize("name", GRIDS)
def test_ddim_inversion_is_solved_and_not_only_guessed(name):
    denoise, sigmas = Mixture().denoise, GRIDS[name]
    errors = [(rebuild(denoise, inversion.ddim(denoise, Z, sigmas, n, enough=1e-10)) - Z).abs().max().item() for n in (1, 3, 30)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] > 1e-2
    assert errors[2] < 5e-4


def test_one_iteration_for_gaussian_latents_is_exact():
    """There the assumed slope is the true one, so Newton's method arrives in one step, at every level."""

    def denoise(x, sigma):
        return x / (1 + sigma**2)

    for sigmas in GRIDS.values():
        assert torch.allclose(rebuild(denoise, inversion.ddim(denoise, Z, sigmas.double(), 2, enough=0)), Z, atol=1e-9)


def test_a_good_enough_inversion_costs_less_and_is_good_enough():
    """The default stops at about 50 dB after fifty steps, with fewer evaluations than all six iterations take."""
    mixture, sigmas, calls = Mixture(), grid(cosine(), 50, "trailing"), []

    def denoise(x, sigma):
        calls.append(sigma)
        return mixture.denoise(x, sigma)

    found = inversion.ddim(denoise, Z, sigmas)
    assert len(calls) < 4 * 50
    assert (rebuild(mixture.denoise, found) - Z).square().mean() < 2e-5


def test_ddim_inversion_of_a_flow_arrives_where_the_flow_does():
    """With many steps, at the same quantile of the noisy distribution."""
    mixture, sigmas = Mixture(), grid(scaled_linear(), 400, "karras")[:-1]
    z = Z.clamp(-2, 2)
    found = inversion.ddim(mixture.denoise, z / (1 + sigmas[-1] ** 2).sqrt().double(), sigmas)
    exact = mixture.flow(z, sigmas[-1].item(), sigmas[0].item())
    assert (found.states[0] - exact).abs().max() < 0.05 * sigmas[0]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_edit_friendly_noise_rebuilds_to_rounding(name, eta):
    denoise = Mixture().denoise
    found = inversion.edit_friendly(denoise, Z, GRIDS[name], randn([1, 2]), eta)
    assert torch.allclose(rebuild(denoise, found), Z, atol=1e-9)


def test_edit_friendly_states_are_independently_noised_pictures():
    """Arxiv 2304.06140, eq. 6: each x_t has its own noise, unlike the states of a run, whose noises are nearly the same."""
    z = torch.randn(1, 4, 64, 64)
    found = inversion.edit_friendly(Mixture().denoise, z, GRIDS["karras"], randn([1]))
    noises = torch.stack([((x - z) / s).flatten() for x, s in zip(found.states[:-1], found.sigmas, strict=False)])
    assert torch.allclose(noises.std(1), torch.ones(len(noises)), atol=0.02)
    assert (torch.corrcoef(noises) - torch.eye(len(noises))).abs().max() < 0.04


def test_null_text_follows_the_unguided_run_under_guidance():
    """A denoiser whose unconditional half can be moved by its context: without that the guided run ends far from z."""
    mixture, sigmas = Mixture(), GRIDS["karras"]
    z = Z[:1]

    def told(x, sigma):
        return mixture.denoise(x, sigma)

    def untold(x, sigma, context):
        return 0.9 * mixture.denoise(x, sigma) + context.view(1, 4, 6, 6) / 10

    null = torch.zeros(1, 1, 144)
    straight = inversion.ddim(told, z, sigmas, 30, enough=0)
    found = inversion.null_text(straight, told, untold, null, 7.5, inner=200, rate=0.1, enough=(1e-9, 1e-9))

    def run(nulls):
        x = found.states[0]
        for i, (s, s_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            other = untold(x, s, nulls[i])
            x = carry(x, other + 7.5 * (told(x, s) - other), float(s_next / s))
        return (x - z).abs().max().item()

    assert len(found.nulls) == len(sigmas) - 1
    assert run([null] * len(found.nulls)) > 0.5
    assert run(found.nulls) < 0.02
    assert torch.equal(null, torch.zeros(1, 1, 144))


def test_fit_never_ends_worse_than_it_began():
    null = torch.ones(1, 2, 3)
    follow = partial(torch.Tensor.mul, torch.full((1, 2, 3), 1e6))
    best = inversion.fit(follow, torch.full((1, 2, 3), 1e6), 1.0, null, 5, 1e-2, 0.0)
    assert torch.equal(best, null)


def test_psnr_is_in_decibels_of_the_full_range():
    a = torch.zeros(1, 3, 4, 4)
    assert inversion.psnr(a, a) == float("inf")
    assert inversion.psnr(a, a + 0.2) == pytest.approx(20)
