"""The sums that the field's biggest library publishes for its schedulers, from our samplers.

Its toy: x = arange(768) / 768 as [4, 3, 8, 8], the "model" gives x · t / (t + 1), 1000 training steps, linear betas 0.0001–0.02.
The toy has habits that no pipeline has. They are copied here, in the tests, and each is named where it stands.
"""

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.denoiser import Denoiser, consistency
from latentdiff.diffusion.samplers import SAMPLERS, bind
from latentdiff.diffusion.schedules import NoiseSchedule, grid, karras, leading, linear, scaled_linear


def sample() -> Tensor:
    return (torch.arange(768, dtype=torch.float64).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2).contiguous()


def toy(z: Tensor, t: Tensor, context, vector=None) -> Tensor:
    t = t.reshape(-1, 1, 1, 1).double()
    return z * t / (t + 1)


def toy_denoiser(schedule: NoiseSchedule, prediction="eps"):
    """(x, sigma) -> x0 as the library's public Denoiser gives it."""

    class Nothing:
        context = vector = None

    denoiser = Denoiser(toy, schedule, prediction)
    return lambda x, sigma: denoiser(x, sigma, Nothing)


def to_x(z: Tensor, sigma: Tensor) -> Tensor:
    return z * (1 + sigma**2).sqrt()


def to_z(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma**2).sqrt()


def last_of(steps):
    *_, last = steps
    return last


def check(z: Tensor, total: float | None, mean: float, rel: float = 1e-5) -> None:
    """There the tolerances are 1e-2 on sums and 1e-3 on means; here they are what float64 tables allow, and the digits given."""
    if total is not None:
        assert z.abs().sum().item() == pytest.approx(total, rel=rel, abs=6e-5)
    assert z.abs().mean().item() == pytest.approx(mean, rel=rel, abs=6e-5)


def levels(schedule: NoiseSchedule, t: Tensor, last: Tensor | float) -> Tensor:
    return torch.cat([schedule.sigmas[t.long()], torch.as_tensor(last, dtype=torch.float64).reshape(1)])


@pytest.mark.parametrize(
    ("beta_start", "prediction", "final", "total", "mean"),
    [
        (0.0001, "eps", "one", 172.0067, 0.223967),
        (0.0001, "v", "one", 52.5302, 0.0684),
        (0.01, "eps", "one", 149.8295, 0.1951),
        (0.01, "eps", "first", 149.0784, 0.1941),
    ],
)
def test_ddim(beta_start, prediction, final, total, mean):
    """Habit: x0 is clipped to [-1, 1], but the step keeps the eps of before. An x0 that makes our rule do both is solved for."""
    schedule = linear(1000, beta_start, 0.02)
    sigmas = levels(schedule, leading(1000, 10), 0.0 if final == "one" else schedule.sigmas[0])
    sigmas = sigmas[:-1] if sigmas[-1] == sigmas[-2] else sigmas  # habit: a last step from a level to itself, which does nothing
    after = dict(zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True))
    plain = toy_denoiser(schedule, prediction)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = plain(x, sigma)
        ratio = after[sigma.item()] / sigma.item()
        return (x0.clamp(-1, 1) - ratio * x0) / (1 - ratio)

    last = last_of(SAMPLERS["ddim"](denoise, to_x(sample(), sigmas[0]), sigmas, randn=None))
    z = to_z(last.x, last.sigma)
    if final == "first":  # the step that does nothing still clips
        x0 = plain(last.x, last.sigma)
        z = to_z(x0.clamp(-1, 1) + (last.x - x0), last.sigma)
    check(z, total, mean)


@pytest.mark.parametrize(("prediction", "total", "mean"), [("eps", 258.9606, 0.3372), ("v", 202.0296, 0.2631)])
def test_ddpm(prediction, total, mean):
    """All 1000 steps with the small variance. Habits: x0 is clipped, and the noise is a float32 draw for the whole batch."""
    schedule = linear()
    plain = toy_denoiser(schedule, prediction)
    sigmas = levels(schedule, leading(1000, 1000), 0.0)
    g = torch.Generator().manual_seed(0)
    last = last_of(
        SAMPLERS["ddpm"](
            lambda x, sigma: plain(x, sigma).clamp(-1, 1),
            to_x(sample(), sigmas[0]),
            sigmas,
            randn=lambda x: torch.randn(x.shape, generator=g).double(),
        )
    )
    check(last.x, total, mean)


def overwriting(denoise):
    """Habit of the sigma family: each turn overwrites the state by the scaled model input before it steps."""

    def overwrite(x: Tensor, sigma: Tensor) -> Tensor:
        z = to_z(x, sigma)
        x0 = denoise(to_x(z, sigma), sigma)
        # The toy's eps is that of z; its x0 is what a step from z, not from x, would take.
        eps = (to_x(z, sigma) - x0) / sigma
        x.copy_(z)
        return z - sigma * eps

    return overwrite


SIGMA_FAMILY = linear(1100)  # habit: 1100 training steps


def run_overwriting(name: str, sigmas: Tensor, **options) -> Tensor:
    """The state starts at x · init_noise_sigma, which for linspace is the first level."""
    x = sample() * sigmas[0]
    return last_of(SAMPLERS[name](overwriting(toy_denoiser(SIGMA_FAMILY)), x, sigmas, **options)).x


def test_the_toys_linspace_is_ours():
    """Up to rounding to float32, and to diffusers interpolating sigma between trained levels, where we interpolate its log."""
    assert grid(SIGMA_FAMILY, 10, "linspace")[1].item() == pytest.approx(81.40568542480469, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "total", "mean"),
    [("euler", 10.0807, 0.0131), ("heun", 0.1233, 0.0002), ("lms", 1006.388, 1.31), ("euler_ancestral", 152.3192, 0.1983)],
)
def test_sigma_family(name, total, mean):
    """Habit of the ancestral one: a float32 draw for the whole batch."""
    g = torch.Generator().manual_seed(0)
    randn = lambda x: torch.randn(x.shape, generator=g).double()  # noqa: E731
    sigmas = SIGMA_FAMILY.sigma(torch.linspace(1099, 0, 10, dtype=torch.float64))
    z = run_overwriting(name, torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]), randn=randn)
    check(z, total, mean if name != "lms" else total / 768)


def test_euler_on_karras_grid():
    """The published sum is that of a float32 run; the same scheduler in float64 gives ours, 124.51781."""
    ends = SIGMA_FAMILY.sigmas[0].item(), SIGMA_FAMILY.sigmas[-1].item()
    sigmas = torch.cat([karras(*ends, 10), torch.zeros(1, dtype=torch.float64)])
    z = run_overwriting("euler", sigmas, randn=None)
    check(z, 124.52299, 0.162139, rel=5e-5)
    assert z.abs().sum().item() == pytest.approx(124.51781003542376, rel=1e-8)


def test_pndm():
    """Habit: the last of its steps goes from the lowest level to itself; it is left out."""
    schedule = linear()
    sigmas = schedule.sigmas[leading(1000, 10).long()]
    last = last_of(bind("pndm", schedule)(toy_denoiser(schedule), to_x(sample(), sigmas[0]), sigmas, randn=None))
    check(to_z(last.x, last.sigma), 198.1318, 0.2580)


def ends_at_sigma_min(name: str, schedule: NoiseSchedule, sigmas: Tensor, network=toy, prediction="eps") -> Tensor:
    class Nothing:
        context = vector = None

    denoiser = Denoiser(network, schedule, prediction)
    x = to_x(sample(), sigmas[0])
    last = last_of(SAMPLERS[name](lambda x, sigma: denoiser(x, sigma, Nothing), x, sigmas, randn=None))
    return to_z(last.x, last.sigma)


@pytest.mark.parametrize(("name", "mean"), [("dpmpp_2m", 0.3301), ("unipc", 0.2464)])
def test_multistep(name, mean):
    """Habit: the times are those of linspace with one step more, without its last."""
    schedule = linear()
    t = torch.linspace(999, 0, 11, dtype=torch.float64).round()[:-1]
    check(ends_at_sigma_min(name, schedule, levels(schedule, t, schedule.sigmas[0])), None, mean)


def test_dpmpp_2m_v_on_karras_grid():
    """Habits: t is rounded for the model; the last step, from sigma_min to itself, does nothing and is left out.

    The published digits are an earlier version's; diffusers 0.42 in float64 gives ours, 0.2091999073648488.
    """
    schedule = linear()
    sigmas = karras(schedule.sigmas[0].item(), schedule.sigmas[-1].item(), 10)
    z = ends_at_sigma_min("dpmpp_2m", schedule, sigmas, lambda z, t, *rest: toy(z, t.round(), *rest), "v")
    assert z.abs().mean().item() == pytest.approx(0.2096, abs=1e-3)
    assert z.abs().mean().item() == pytest.approx(0.2091999073648488, rel=1e-8)


def test_lcm():
    schedule = scaled_linear()
    sigmas = grid(schedule, 1, "lcm").double()
    assert schedule.t(sigmas[0]).item() == 999
    sigmas[0] = schedule.sigmas[999]
    last = last_of(SAMPLERS["lcm"](consistency(toy_denoiser(schedule), schedule), to_x(sample(), sigmas[0]), sigmas, randn=None))
    check(last.x, 18.7097, 0.0244)
