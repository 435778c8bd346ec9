"""Guidance: on x0 as on eps, at half the cost where it does nothing, and each rule against its paper's own formula."""

import pytest
import torch

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.guidance import cfg, guided
from latentdiff.diffusion.schedules import linear


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_guidance_on_x0_is_guidance_on_the_prediction(kind, scale, network, cond, noise):
    schedule, x = linear(), 4 * noise(2, 4, 3, 3)
    denoise = guided(Denoiser(network, schedule, kind), cond(1.0, 2), cond(-0.5, 2), cfg(scale))

    def on_prediction(z, t, context, vector=None):
        c, u = network(z, t, context), network(z, t, cond(-0.5, 2).context)
        return u + scale * (c - u)

    for t in (0, 400, 999):
        expected = Denoiser(on_prediction, schedule, kind)(x, schedule.sigmas[t], cond(1.0, 2))
        torch.testing.assert_close(denoise(x, schedule.sigmas[t]), expected, rtol=1e-10, atol=1e-10)
