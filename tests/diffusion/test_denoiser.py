"""The prediction table: eps, v and x0 networks that know the same thing give the same x0; the loss is each paper's own."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff.diffusion.denoiser import Denoiser, min_snr, scalings
from latentdiff.diffusion.schedules import linear, scaled_linear, zero_snr

PREDICTIONS = ("eps", "v", "x0")


def alpha_sigma(schedule, t):
    """sqrt(abar) and sqrt(1 - abar): the papers' coefficients of signal and noise, as factors of pictures."""
    abar = schedule.abar[t].reshape(-1, 1, 1, 1)
    return abar.sqrt(), (1 - abar).sqrt()


def as_prediction(kind, eps_network, schedule):
    """The network of another kind that knows what eps_network knows, in the papers' notation (z = sqrt(abar) x)."""

    def F(z, t, context, vector=None):
        eps = eps_network(z, t, context)
        a, s = alpha_sigma(schedule, t.long())
        x0 = (z - s * eps) / a
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[kind]

    return F


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("schedule", [linear(), scaled_linear()])
def test_eps_v_and_x0_networks_give_the_same_x0(kind, schedule, network, cond, noise):
    x = 5 * noise(3, 4, 5, 5)
    denoiser = Denoiser(as_prediction(kind, network, schedule), schedule, kind)
    for t in (0, 1, 10, 500, 999):
        sigma = schedule.sigmas[t]
        z = x * schedule.abar[t].sqrt()
        eps = network(z, torch.full((3,), t), cond(0.3, 3).context)
        a, s = alpha_sigma(schedule, torch.tensor([t]))
        torch.testing.assert_close(denoiser(x, sigma, cond(0.3, 3)), (z - s * eps) / a, rtol=1e-10, atol=1e-10)


def test_a_level_for_each_picture_equals_one_at_a_time(network, cond, noise):
    schedule, x = scaled_linear(), noise(3, 4, 2, 2)
    denoiser = Denoiser(network, schedule, "v")
    sigmas = schedule.sigmas[torch.tensor([3, 400, 999])]
    together = denoiser(x, sigmas, cond(1, 3))
    for k in range(3):
        assert torch.equal(together[k : k + 1], denoiser(x[k : k + 1], sigmas[k], cond(1)))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_loss_is_the_textbook_loss(kind, network, cond, noise):
    """Ho et al. eq. 14 for eps; Salimans & Ho section 4 for x0 and v: targets written from z, not from sigma."""
    schedule = linear()
    x0, eps, t = noise(4, 3, 6, 6), noise(4, 3, 6, 6, seed=1), torch.tensor([0, 7, 500, 999])
    weight = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    a, s = alpha_sigma(schedule, t)
    z = a * x0 + s * eps
    target = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[kind]
    error = (network(z, t, cond(0.2, 4).context) - target).square().flatten(1).mean(1)
    denoiser = Denoiser(network, schedule, kind)
    # The network's output enters as float32, which bounds the agreement.
    torch.testing.assert_close(denoiser.loss(x0, cond(0.2, 4), eps, t), error.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(denoiser.loss(x0, cond(0.2, 4), eps, t, weight), (weight * error).mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_loss_is_zero_for_the_network_that_knows(kind, cond, noise):
    """Also where the schedule ends without signal and the quotient (x0 - c_skip x) / c_out would lose all digits."""
    schedule = zero_snr(scaled_linear())
    x0, eps, t = noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1), torch.tensor([0, 999])
    a, s = alpha_sigma(schedule, t)
    answer = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[kind]
    denoiser = Denoiser(lambda *_: answer, schedule, kind)
    assert denoiser.loss(x0, cond(0, 2), eps, t).item() < 1e-12


class NoFloat64(TorchDispatchMode):
    """The meta device as one without float64, such as Apple's."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        assert not (out.device.type == "meta" and out.dtype == torch.float64), operation
        return out


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_training_needs_no_float64_on_the_device(kind, cond):
    schedule = scaled_linear()
    x0, t = torch.empty(2, 4, 3, 3, device="meta"), torch.empty(2, dtype=torch.long, device="meta")
    with NoFloat64():
        weight = min_snr(schedule, kind, t)
        loss = Denoiser(lambda x, *_: x, schedule, kind).loss(x0, cond(0, 2), x0, t, weight)
    assert (loss.device.type, loss.dtype, weight.dtype) == ("meta", torch.float32, torch.float32)


def test_the_network_gets_its_own_dtype_and_the_state_keeps_its(cond, noise):
    seen = []

    def F(x, t, context, vector=None):
        seen.append((x.dtype, t.dtype))
        return x

    x = noise(1, 4, 2, 2).float()
    x0 = Denoiser(F, scaled_linear(), "eps", dtype=torch.bfloat16)(x, torch.tensor(3.0), cond(0))
    assert seen == [(torch.bfloat16, torch.float32)]
    assert x0.dtype == torch.float32


def test_min_snr_is_eq_6_for_each_prediction():
    schedule, t = linear(), torch.tensor([0, 300, 999])
    snr = schedule.abar[t] / (1 - schedule.abar[t])
    capped = torch.minimum(snr, torch.tensor(5.0))
    expected = {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}
    for kind in PREDICTIONS:
        torch.testing.assert_close(min_snr(schedule, kind, t), expected[kind].float())


def test_an_unknown_prediction_is_named(network):
    with pytest.raises(ValueError, match="prediction must be eps, v or x0, got 'epsilon'"):
        scalings("epsilon", torch.tensor(1.0))


def test_a_denoiser_is_frozen(network):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Denoiser(network, linear()).prediction = "v"
