"""Every sampler against diffusers' scheduler of that name: same grid, same noise, float64.

diffusers computes its tables and some states in float32. The fixture `scheduler` swaps float32 for float64 in a scheduler's module,
so that what is compared are the rules.
"""

import importlib
import importlib.util
import inspect
import math
import sys
from functools import partial
from types import ModuleType

import pytest
import torch

from latentdiff.diffusion import multistep
from latentdiff.diffusion.denoiser import consistency
from latentdiff.diffusion.samplers import SAMPLERS, bind
from latentdiff.diffusion.schedules import grid, scaled_linear

pytest.importorskip("diffusers")
pytestmark = pytest.mark.oracle

BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Double:
    """A module whose float32 is float64."""

    def __init__(self, module):
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, "float64" if name == "float32" else name)


@pytest.fixture
def scheduler(monkeypatch):
    """scheduler(name, **config): diffusers' class of that name, in float64."""

    def make(name, **config):
        cls = getattr(importlib.import_module("diffusers"), name)
        module = importlib.import_module(cls.__module__)
        for used in ("torch", "np"):
            if hasattr(module, used):
                monkeypatch.setattr(module, used, Double(getattr(module, used)))
        taken = inspect.signature(cls.__init__).parameters
        return cls(**{key: value for key, value in BETAS.items() if key in taken} | config)

    return make


def eps(z, sigma):
    """The network of these tests: nonlinear, and dependent on the level."""
    return torch.sin(1.3 * z + 0.7 * math.log(sigma)) + 0.3 * z


def denoise(x, sigma):
    s = sigma.item()
    return x - s * eps(x / math.sqrt(1 + s**2), s)


def start(sigma):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * math.sqrt(
        1 + float(sigma) ** 2
    )


def randn_from(seed):
    g = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=g, dtype=x.dtype)


def last_of(steps):
    *_, last = steps
    return last.x


# Schedulers whose state is our x.


def run_in_x(scheduler, x, **options):
    for t in scheduler.timesteps:
        c_in = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), t).item()
        sigma = math.sqrt(1 / c_in**2 - 1)
        x = scheduler.step(eps(scheduler.scale_model_input(x, t), sigma), t, x, **options).prev_sample
    return x


@pytest.mark.parametrize("spacing", [{}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}])
@pytest.mark.parametrize("steps", [1, 2, 13])
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("euler", "EulerDiscreteScheduler"),
        ("heun", "HeunDiscreteScheduler"),
        ("lms", "LMSDiscreteScheduler"),
        ("dpm2", "KDPM2DiscreteScheduler"),
    ],
)
def test_deterministic(name, cls, steps, spacing, scheduler):
    theirs = scheduler(cls, **spacing)
    theirs.set_timesteps(steps)
    sigmas = unrepeated(theirs.sigmas)
    assert len(sigmas) == steps + 1
    x = start(sigmas[0])
    expected = run_in_x(theirs, x)
    got = last_of(SAMPLERS[name](denoise, x, sigmas, randn=None))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def unrepeated(sigmas):
    """Schedulers of two evaluations a step hold each level twice."""
    return torch.tensor(sorted(set(sigmas.tolist()), reverse=True), dtype=torch.float64)


@pytest.mark.parametrize("steps", [2, 13])
@pytest.mark.parametrize(
    ("name", "cls"), [("euler_ancestral", "EulerAncestralDiscreteScheduler"), ("dpm2_ancestral", "KDPM2AncestralDiscreteScheduler")]
)
def test_ancestral(name, cls, steps, scheduler):
    theirs = scheduler(cls, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    sigmas = unrepeated(theirs.sigmas)
    x = start(sigmas[0])
    expected = run_in_x(theirs, x, generator=torch.Generator().manual_seed(5))
    ours = SAMPLERS[name](denoise, x, sigmas, randn=randn_from(5))
    torch.testing.assert_close(last_of(ours), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("steps", [2, 9])
def test_dpmpp_sde_on_one_brownian_path(steps, scheduler, monkeypatch):
    """Their tree of intervals is replaced by the path that our draws are increments of."""
    if importlib.util.find_spec("torchsde") is None:
        monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))  # imported there for the tree alone
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    monkeypatch.setattr(module, "torch", Double(torch))
    monkeypatch.setattr(module, "np", Double(module.np))
    theirs = module.DPMSolverSDEScheduler(**BETAS, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    sigmas = unrepeated(theirs.sigmas)
    draw, halves = randn_from(3), []

    def increments(a, b):
        """W(b) - W(a) in units of its std; asked first for the half of a step, then for the whole."""
        a, b = float(a), float(b)
        if not halves:
            halves.extend([b, draw(x), draw(x)])
            return halves[1]
        mid, first, second = halves
        halves.clear()
        return (math.sqrt(a - mid) * first + math.sqrt(mid - b) * second) / math.sqrt(a - b)

    x = start(sigmas[0])
    theirs.noise_sampler = increments
    expected = run_in_x(theirs, x)
    got = last_of(SAMPLERS["dpmpp_sde"](denoise, x, sigmas, randn=randn_from(3)))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


# Schedulers whose state is the papers' z = x / sqrt(1 + sigma²).


def run_in_z(scheduler, z, sigma_of, **options):
    for t in scheduler.timesteps:
        z = scheduler.step(eps(z, sigma_of(t)), t, z, **options).prev_sample
    return z


def sigma_at(scheduler, t):
    abar = scheduler.alphas_cumprod[t]
    return ((1 - abar) / abar).sqrt().item()


def compare_in_z(theirs, sampler, sigmas, *, noisy=False):
    x = start(sigmas[0])
    z = x / math.sqrt(1 + sigmas[0].item() ** 2)
    options = {"generator": torch.Generator().manual_seed(5)} if noisy else {}
    level = dict(zip(theirs.timesteps.tolist(), sigmas.tolist(), strict=False))
    expected = run_in_z(theirs, z, lambda t: level[int(t)], **options)
    got = last_of(sampler(denoise, x, sigmas, randn=randn_from(5))) / math.sqrt(1 + sigmas[-1].item() ** 2)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [2, 3, 13])
@pytest.mark.parametrize(
    ("sampler", "config"),
    [
        (SAMPLERS["dpmpp_2m"], {}),
        (partial(SAMPLERS["dpmpp_2m_sde"], eta=0.0, midpoint=False), {"solver_type": "heun"}),
        (SAMPLERS["dpmpp_3m"], {"solver_order": 3, "solver_type": "heun"}),
        (SAMPLERS["dpmpp_2m_sde"], {"algorithm_type": "sde-dpmsolver++"}),
        (partial(SAMPLERS["dpmpp_2m_sde"], midpoint=False), {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    ],
    ids=["2m", "2m-heun", "3m", "2m-sde", "2m-sde-heun"],
)
def test_dpmpp_multistep(sampler, config, steps, final, scheduler):
    theirs = scheduler(
        "DPMSolverMultistepScheduler", **config, final_sigmas_type=final, lower_order_final=False, timestep_spacing="trailing"
    )
    theirs.set_timesteps(steps)
    compare_in_z(theirs, sampler, theirs.sigmas, noisy="algorithm_type" in config)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [2, 3, 13])
def test_dpmpp_3m_sde_but_for_the_sign_that_its_docstring_names(steps, final, scheduler, monkeypatch):
    """Where ours and k-diffusion's add half of the second difference, theirs takes half of it away; all else is equal."""
    correction = multistep._dpmpp_correction

    def with_their_sign(history, h, decay, *, midpoint):
        found = correction(history, h, decay, midpoint=midpoint)
        if len(history) < 3:
            return found
        (l0, m0), (l1, m1), (l2, m2) = history
        return found - ((m0 - m1) / (l0 - l1) - (m1 - m2) / (l1 - l2)) * h**2 / (l0 - l2)

    monkeypatch.setattr(multistep, "_dpmpp_correction", with_their_sign)
    theirs = scheduler(
        "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=3, solver_type="heun",
        final_sigmas_type=final, lower_order_final=False, timestep_spacing="trailing",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    compare_in_z(theirs, SAMPLERS["dpmpp_3m_sde"], theirs.sigmas, noisy=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 13])
def test_ipndm(steps, scheduler):
    """Theirs makes eps of a v prediction, and knows z's share of noise as `betas`, by default a sine's; here those of our grid."""
    sigmas = grid(scaled_linear(), steps, "trailing").double()
    roots = (1 + sigmas**2).sqrt()
    theirs = scheduler("IPNDMScheduler", trained_betas=(sigmas / roots).tolist())
    theirs.set_timesteps(steps)
    x = start(sigmas[0])
    z = x / roots[0]
    for t, s, root in zip(theirs.timesteps, sigmas, roots, strict=False):
        e = eps(z, s.item())
        z = theirs.step((e - s * (z * root - s * e)) / root, t, z).prev_sample
    torch.testing.assert_close(last_of(SAMPLERS["ipndm"](denoise, x, sigmas, randn=None)), z, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("final", "variant", "lower"),  # at a last step to 0 diffusers gives NaN for bh1, and without lower_order_final
    [("zero", "bh2", True), *(("sigma_min", variant, lower) for variant in ("bh1", "bh2") for lower in (True, False))],
)
def test_unipc(lower, variant, order, steps, final, scheduler):
    theirs = scheduler(
        "UniPCMultistepScheduler",
        solver_order=order,
        solver_type=variant,
        final_sigmas_type=final,
        lower_order_final=lower,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(steps)
    sampler = partial(SAMPLERS["unipc"], order=order, variant=variant, lower_order_final=lower)
    compare_in_z(theirs, sampler, theirs.sigmas)


@pytest.mark.parametrize("steps", [1, 2, 3, 16])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order, steps, scheduler):
    theirs = scheduler("DEISMultistepScheduler", solver_order=order, lower_order_final=False, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    compare_in_z(theirs, partial(SAMPLERS["deis"], order=order), theirs.sigmas)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_dpmpp_2s(steps, scheduler):
    """Theirs has no noise, and takes the evaluation in the middle for a step of its own: on a grid that holds the middles."""
    theirs = scheduler(
        "DPMSolverSinglestepScheduler",
        solver_order=2,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
        use_karras_sigmas=True,
    )
    theirs.set_timesteps(2 * steps)
    sigmas = theirs.sigmas[::2].clone()
    theirs.sigmas[1::2] = (sigmas[:-1] * sigmas[1:]).sqrt()
    theirs.timesteps = torch.arange(2 * steps, 0, -1)  # told apart by step_index
    x = start(sigmas[0])
    level = dict(zip(theirs.timesteps.tolist(), theirs.sigmas.tolist(), strict=False))
    expected = run_in_z(theirs, x / math.sqrt(1 + sigmas[0].item() ** 2), lambda t: level[int(t)])
    got = last_of(SAMPLERS["dpmpp_2s_ancestral"](denoise, x, sigmas, randn=None, eta=0.0))
    torch.testing.assert_close(got / math.sqrt(1 + sigmas[-1].item() ** 2), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "config", "steps"),
    [
        *(("ddim", {"clip_sample": False}, n) for n in (1, 4, 10, 50)),
        *(("plms", {"skip_prk_steps": True}, n) for n in (4, 10, 50)),
        *(("pndm", {"skip_prk_steps": False}, n) for n in (4, 10, 50)),
        *(("ddpm", {}, n) for n in (1, 4, 10, 50)),
    ],
)
def test_schedulers_over_times(name, config, steps, scheduler):
    cls = {"plms": "PNDM"}.get(name, name.upper())
    config = {"clip_sample": False} if name == "ddpm" else {**config, "set_alpha_to_one": True}
    theirs = scheduler(f"{cls}Scheduler", **config, steps_offset=0)
    theirs.set_timesteps(steps)
    schedule = scaled_linear()
    sigmas = grid(schedule, steps, "leading").double()
    t = schedule.t(sigmas[:-1]).long()
    sigmas = torch.cat([((1 - theirs.alphas_cumprod[t]) / theirs.alphas_cumprod[t]).sqrt(), sigmas[-1:]])
    x = start(sigmas[0])
    z = x / math.sqrt(1 + sigmas[0].item() ** 2)
    options = {"generator": torch.Generator().manual_seed(5)} if name == "ddpm" else {}
    expected = run_in_z(theirs, z, lambda t: sigma_at(theirs, t), **options)
    got = last_of(bind(name, schedule)(denoise, x, sigmas, randn=randn_from(5)))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_tcd(steps, eta, scheduler):
    theirs = scheduler("TCDScheduler", clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(steps)
    schedule = scaled_linear()
    times = [*theirs.timesteps.tolist(), 0]
    assert schedule.t(grid(schedule, steps, "lcm"))[:-1].tolist() == times[:-1]
    sigmas = torch.tensor([sigma_at(theirs, t) for t in times], dtype=torch.float64)
    x = start(sigmas[0])
    z = x / math.sqrt(1 + sigmas[0].item() ** 2)
    expected = run_in_z(theirs, z, lambda t: sigma_at(theirs, t), eta=eta, generator=torch.Generator().manual_seed(5))
    got = last_of(bind("tcd", schedule)(denoise, x, sigmas, randn=randn_from(5), eta=eta))
    torch.testing.assert_close(got / math.sqrt(1 + sigmas[-1].item() ** 2), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_lcm(steps, scheduler):
    theirs = scheduler("LCMScheduler", clip_sample=False)
    theirs.set_timesteps(steps)
    scalings = theirs.get_scalings_for_boundary_condition_discrete
    theirs.get_scalings_for_boundary_condition_discrete = lambda t: scalings(float(t))  # of an integer tensor it makes float32
    schedule = scaled_linear()
    times = theirs.timesteps.tolist()
    assert schedule.t(grid(schedule, steps, "lcm"))[:-1].tolist() == times
    sigmas = torch.tensor([*(sigma_at(theirs, t) for t in times), 0], dtype=torch.float64)
    x = start(sigmas[0])
    z = x / math.sqrt(1 + sigmas[0].item() ** 2)
    expected = run_in_z(theirs, z, lambda t: sigma_at(theirs, t), generator=torch.Generator().manual_seed(5))
    got = last_of(SAMPLERS["lcm"](consistency(denoise, schedule), x, sigmas, randn=randn_from(5)))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("spacing", "config"),
    [
        ("karras", {"use_karras_sigmas": True}),
        ("exponential", {"use_exponential_sigmas": True}),
        ("trailing", {"timestep_spacing": "trailing"}),
        ("leading", {"timestep_spacing": "leading"}),
    ],
)
@pytest.mark.parametrize("steps", [2, 10, 25])
def test_grids(spacing, config, steps, scheduler):
    theirs = scheduler("EulerDiscreteScheduler", **config)
    theirs.set_timesteps(steps)
    torch.testing.assert_close(grid(scaled_linear(), steps, spacing), theirs.sigmas.float(), rtol=2e-6, atol=0)
