"""What holds for every sampler in the table: its facts, order and laws, its independence of the batch, how it is stopped."""

import inspect
import itertools
import math
from functools import partial

import pytest
import torch

from latentdiff.diffusion.exact import Mixture
from latentdiff.diffusion.samplers import FACTS, SAME, SAMPLERS, bind, resolve, rows
from latentdiff.diffusion.schedules import SPACINGS, cosine, grid, karras, scaled_linear, zero_snr

every_sampler = pytest.mark.parametrize("name", SAMPLERS)
STOCHASTIC = [name for name, facts in FACTS.items() if facts.stochastic]
DETERMINISTIC = [name for name, facts in FACTS.items() if not facts.stochastic]


def to(level, steps, top=14.6):
    """A Karras grid in float64 from `top` to `level`, or to 0."""
    levels = karras(level or 0.03, top, steps + bool(level))
    return levels if level else torch.cat([levels, torch.zeros(1, dtype=torch.float64)])


def denoise(x, sigma):
    return Mixture().denoise(x, sigma)


def last_of(steps):
    *_, last = steps
    return last


def randn_of(seeds):
    """Noise for each picture from its own generator, as the pipeline draws it."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda x: torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators]).to(x.dtype)


# -- the table --


def test_the_table_and_its_facts_have_the_same_names():
    assert list(FACTS) == list(SAMPLERS)


@every_sampler
def test_evaluations_and_noise_are_what_the_facts_say(name):
    calls, draws = [], []

    def counted(x, sigma):
        calls.append(float(sigma))
        return denoise(x, sigma)

    def randn(x):
        draws.append(x)
        return torch.randn_like(x)

    steps = 12
    for _ in SAMPLERS[name](counted, torch.ones(1, 1, 2, 2, dtype=torch.float64), to(0, steps), randn=randn):
        pass
    extra = {"plms": 1, "pndm": 9}.get(name, 0) - (FACTS[name].evaluations - 1)  # two-evaluation samplers use one to reach 0
    assert len(calls) == FACTS[name].evaluations * steps + extra
    assert bool(draws) == FACTS[name].stochastic
    assert all(s > 0 for s in calls)


@every_sampler
def test_each_docstring_cites_its_source_and_says_what_it_costs(name):
    doc = inspect.getdoc(SAMPLERS[name])
    assert "arXiv" in doc or "k-diffusion" in doc
    assert ("Order" in doc) == (FACTS[name].order is not None)
    assert "evaluation" in doc
    assert ("stochastic" in doc) if FACTS[name].stochastic else ("deterministic" in doc or "for eta > 0" in doc)


def test_the_printed_table_has_a_line_for_each():
    table = rows()
    assert [row[0] for row in table] == list(SAMPLERS)
    assert all(kind in ("stochastic", "deterministic") and len(line) > 20 for _, _, _, kind, line in table)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M", ("dpmpp_2m", None)),
        ("dpmpp_2m", ("dpmpp_2m", None)),
        ("sample_dpmpp_2m", ("dpmpp_2m", None)),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ 2M SDE", ("dpmpp_2m_sde", None)),
        ("dpmpp_2m_sde_gpu", ("dpmpp_2m_sde", None)),
        ("DPM++ 3M SDE Karras", ("dpmpp_3m_sde", "karras")),
        ("DPM++ SDE Karras", ("dpmpp_sde", "karras")),
        ("DPM++ 2S a Karras", ("dpmpp_2s_ancestral", "karras")),
        ("DPM2 a Karras", ("dpm2_ancestral", "karras")),
        ("dpm_2_ancestral", ("dpm2_ancestral", None)),
        ("DPM2", ("dpm2", None)),
        ("Euler a", ("euler_ancestral", None)),
        ("k_euler_a", ("euler_ancestral", None)),
        ("Euler", ("euler", None)),
        ("euler sgm_uniform", ("euler", "trailing")),
        ("Euler a Automatic", ("euler_ancestral", None)),
        ("Euler Uniform", ("euler", "linspace")),
        ("Euler Normal", ("euler", "linspace")),
        ("Euler ddim_uniform", ("euler", "leading")),
        ("DPM++ 2M Align Your Steps", ("dpmpp_2m", "ays")),
        ("LMS Karras", ("lms", "karras")),
        ("DDIM", ("ddim", None)),
        ("PLMS", ("plms", None)),
        ("UniPC", ("unipc", None)),
        ("uni_pc_bh2", ("unipc", None)),
        ("UniPC AYS", ("unipc", "ays")),
        ("DEIS beta", ("deis", "beta")),
        ("EulerAncestralDiscreteScheduler", ("euler_ancestral", None)),
        ("DPMSolverMultistepScheduler", ("dpmpp_2m", None)),
        ("LCM", ("lcm", "lcm")),
        ("TCD", ("tcd", "lcm")),
        *((name, (name, "lcm" if name in ("lcm", "tcd") else None)) for name in SAMPLERS),
        *((f"{name} {spacing}", (name, spacing)) for name, spacing in itertools.product(SAMPLERS, SPACINGS) if spacing != "lcm"),
    ],
)
def test_names_of_other_programs(name, expected):
    assert resolve(name) == expected


@pytest.mark.parametrize("name", ["", "karras", "automatic", "dpm++ 2m kars", "eulr", "Euler a b", None, 3, ["ddim"]])
def test_an_unknown_name_is_refused_by_name(name):
    with pytest.raises(ValueError, match="sampler must be one of ddpm, ddim") as error:
        resolve(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("name", "near"), [("heum", "heun"), ("ddmi", "ddpm or ddim"), ("eulr", "euler or euler_ancestral"), ("plmss", "plms or lms")]
)
def test_what_is_near_an_unknown_name_is_told(name, near):
    with pytest.raises(ValueError, match=rf"got '{name}'; did you mean {near}\?$"):
        resolve(name)


# -- order --


def error(sampler, sigmas, x):
    exact = Mixture().flow(x, sigmas[0].item(), sigmas[-1].item())
    return (last_of(sampler(denoise, x, sigmas, randn=None)).x - exact).abs().max().item()


@pytest.mark.parametrize(
    ("name", "sampler", "order"),
    [
        *((name, SAMPLERS[name], FACTS[name].order) for name in DETERMINISTIC),
        ("unipc, full order to the end", partial(SAMPLERS["unipc"], lower_order_final=False), 3),
        ("unipc bh1, full order to the end", partial(SAMPLERS["unipc"], variant="bh1", lower_order_final=False), 3),
        ("unipc 3, full order to the end", partial(SAMPLERS["unipc"], order=3, lower_order_final=False), 4),
        ("lms 3", partial(SAMPLERS["lms"], order=3), 3),
        ("dpmpp_2m_sde, eta 0", partial(SAMPLERS["dpmpp_2m_sde"], eta=0.0), 2),
        ("dpmpp_2m_sde heun, eta 0", partial(SAMPLERS["dpmpp_2m_sde"], eta=0.0, midpoint=False), 2),
        ("dpmpp_3m_sde, eta 0", partial(SAMPLERS["dpmpp_3m_sde"], eta=0.0), 2),
        ("dpmpp_2s_ancestral, eta 0", partial(SAMPLERS["dpmpp_2s_ancestral"], eta=0.0), 2),
        ("dpm2_ancestral, eta 0", partial(SAMPLERS["dpm2_ancestral"], eta=0.0), 2),
        ("dpmpp_sde, eta 0", partial(SAMPLERS["dpmpp_sde"], eta=0.0), 2),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_the_order_on_a_mixture_of_gaussians(name, sampler, order):
    """The slope of log error over log steps, against the ODE's exact solution.

    The grid starts where x is almost noise alone, so that the low order of multistep methods' first steps does not show.
    """
    x = torch.linspace(-80, 80, 9, dtype=torch.float64)
    few, many = (error(sampler, to(0.15, n, top=80.0), x) for n in (128, 512))
    assert math.log2(few / many) / 2 == pytest.approx(order, abs=0.3)


def test_unipc_corrects_what_it_predicts():
    """UniC raises the order by one: its error is far below that of a rule of the same order without it."""
    x = torch.linspace(-80, 80, 9, dtype=torch.float64)
    corrected = error(partial(SAMPLERS["unipc"], lower_order_final=False), to(0.15, 128, 80.0), x)
    assert corrected < error(SAMPLERS["dpmpp_2m"], to(0.15, 128, 80.0), x) / 5


# -- laws of the stochastic ones --


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if FACTS[name].order])
@pytest.mark.parametrize("final", [0, 0.05])
def test_stochastic_samplers_reach_the_mean_and_the_covariance(name, final):
    """On a correlated Gaussian in the plane, whose denoiser is a matrix; checked to the sampling error and a small bias."""
    n, mean = 20_000, torch.tensor([0.5, -1.0], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)

    def exact(x, sigma):
        gain = torch.linalg.solve(covariance + sigma**2 * eye, covariance)
        return mean + (x - mean) @ gain

    sigmas = to(final, 150, top=20.0)
    g = torch.Generator().manual_seed(2)
    start = torch.randn(n, 2, generator=g, dtype=torch.float64) @ torch.linalg.cholesky(covariance + sigmas[0] ** 2 * eye).T + mean
    randn = lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64)  # noqa: E731
    x = last_of(SAMPLERS[name](exact, start, sigmas, randn=randn)).x
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=4 / math.sqrt(n))
    bias = 0.045 if FACTS[name].evaluations == 1 and "m_sde" not in name else 0.02
    torch.testing.assert_close(x.T.cov(), covariance + final**2 * eye, rtol=bias + 4 * math.sqrt(2 / n), atol=0)


@pytest.mark.parametrize("name", [name for name in STOCHASTIC if not FACTS[name].order])
def test_samplers_of_distilled_models_keep_the_law_in_each_step(name):
    """On a Gaussian, whose flow is known: the x0 is what such a model learns, the one that leads to the flow's end exactly."""
    n, mean, std, sigmas, eta = 20_000, 0.4, 0.6, to(0.05, 4, top=20.0), 0.3
    levels = sigmas.tolist()
    ends = {s: (1 - eta) * s_next if name == "tcd" else 0.0 for s, s_next in itertools.pairwise(levels)}

    def model(x, sigma):
        s, low = sigma.item(), ends[sigma.item()]
        there = mean + (x - mean) * math.sqrt((std**2 + low**2) / (std**2 + s**2))
        return (there - low / s * x) / (1 - low / s)

    g = torch.Generator().manual_seed(2)
    randn = lambda x: torch.randn(x.shape, generator=g, dtype=torch.float64)  # noqa: E731
    x = mean + math.sqrt(std**2 + levels[0] ** 2) * randn(torch.empty(n))
    for step in SAMPLERS[name](model, x, sigmas, randn=randn):
        spread = math.sqrt(std**2 + step.sigma.item() ** 2)
        assert step.x.mean().item() == pytest.approx(mean, abs=4 * spread / math.sqrt(n))
        assert step.x.std().item() == pytest.approx(spread, rel=4 / math.sqrt(2 * n))


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_has_the_variance_of_the_level(name):
    """Where x0 is 0 everywhere, every state is noise of its level exactly: coefficients, not samples, are checked."""
    sigmas = to(0.1, 6)
    draws = []

    def randn(x):  # the k-th draw is the k-th unit vector, so that x holds each draw's weight
        draws.append(x)
        return torch.eye(32, dtype=torch.float64)[len(draws)].reshape(1, 1, 1, 32).expand_as(x)

    x = torch.zeros(1, 1, 1, 32, dtype=torch.float64)
    x[..., 0] = sigmas[0]
    for step in SAMPLERS[name](lambda x, sigma: torch.zeros_like(x), x, sigmas, randn=randn):
        assert step.x.square().sum().sqrt().item() == pytest.approx(step.sigma.item(), rel=1e-12)


def test_dpmpp_sde_sees_one_brownian_path():
    """The half step's noise is the first increment of the whole step's: their correlation is the root of the share of its time."""
    s, mid, s_next = 4.0, 2.0, 1.0
    units = iter(torch.eye(2, dtype=torch.float64).reshape(2, 1, 1, 1, 2))
    seen = []

    def zero(x, sigma):
        seen.append(x)
        return torch.zeros_like(x)

    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    step = next(SAMPLERS["dpmpp_sde"](zero, x, torch.tensor([s, s_next], dtype=torch.float64), randn=lambda x: next(units)))
    half, whole = seen[1].flatten(), step.x.flatten()
    assert (half @ whole / half.norm() / whole.norm()).item() == pytest.approx(math.sqrt((s - mid) / (s - s_next)), rel=1e-12)


def test_3m_sde_is_k_diffusions_rule(noise):
    """Written out in its own notation; diffusers has another sign in the last term."""
    sigmas, x = to(0.1, 6), 14.6 * noise(1, 1, 4, 4)
    draws = [noise(1, 1, 4, 4, seed=k) for k in range(6)]
    eta, h_1, h_2, d_1, d_2, y = 1.0, None, None, None, None, x
    for k in range(6):
        d, h = denoise(y, sigmas[k]), (sigmas[k] / sigmas[k + 1]).log()
        h_eta = h * (eta + 1)
        y = (-h_eta).exp() * y - (-h_eta).expm1() * d
        phi_2 = (-h_eta).expm1() / h_eta + 1
        if h_2 is not None:
            r0, r1 = h_1 / h, h_2 / h
            d1_0, d1_1 = (d - d_1) / r0, (d_1 - d_2) / r1
            y = y + phi_2 * (d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)) - (phi_2 / h_eta - 0.5) * (d1_0 - d1_1) / (r0 + r1)
        elif h_1 is not None:
            y = y + phi_2 * (d - d_1) / (h_1 / h)
        y = y + draws[k] * sigmas[k + 1] * (1 - (-2 * h * eta).exp()).sqrt()
        h_1, h_2, d_1, d_2 = h, h_1, d, d_1
    replay = iter(draws)
    got = last_of(SAMPLERS["dpmpp_3m_sde"](denoise, x, sigmas, randn=lambda x: next(replay)))
    torch.testing.assert_close(got.x, y, rtol=1e-10, atol=1e-10)


def test_ipndm_is_adams_bashforth_of_rising_order(noise):
    """x' = x + (sigma' - sigma) (55 e_n - 59 e_(n-1) + 37 e_(n-2) - 9 e_(n-3)) / 24, and its lower orders at first."""
    sigmas, x = to(0.1, 6), 14.6 * noise(1, 1, 4, 4)
    y, e = x, []
    for s, s_next in itertools.pairwise(sigmas):
        e.append((y - denoise(y, s)) / s)
        if len(e) == 1:
            slope = e[0]
        elif len(e) == 2:
            slope = (3 * e[-1] - e[-2]) / 2
        elif len(e) == 3:
            slope = (23 * e[-1] - 16 * e[-2] + 5 * e[-3]) / 12
        else:
            slope = (55 * e[-1] - 59 * e[-2] + 37 * e[-3] - 9 * e[-4]) / 24
        y = y + (s_next - s) * slope
    torch.testing.assert_close(last_of(SAMPLERS["ipndm"](denoise, x, sigmas, randn=None)).x, y, rtol=1e-12, atol=1e-12)


# -- what every sampler owes its caller --


@every_sampler
def test_a_picture_does_not_depend_on_its_batch(name, noise):
    sampler, sigmas = bind(name, scaled_linear()), grid(scaled_linear(), 7, "karras")
    x = (14.6 * noise(4, 3, 4, 4)).float()
    together = list(sampler(denoise, x, sigmas, randn=randn_of([5, 6, 7, 8])))
    for k in range(4):
        alone = list(sampler(denoise, x[k : k + 1], sigmas, randn=randn_of([5 + k])))
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a.x[k : k + 1], b.x)
            assert torch.equal(a.x0[k : k + 1], b.x0)


@every_sampler
def test_the_same_seed_gives_the_same_steps_and_leaves_its_input_alone(name, noise):
    sigmas, x = grid(scaled_linear(), 7, "trailing"), (14.6 * noise(2, 3, 4, 4)).float()
    before = x.clone()
    first, second = (last_of(SAMPLERS[name](denoise, x, sigmas, randn=randn_of([1, 2]))).x for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(x, before)
    if FACTS[name].stochastic:
        assert not torch.equal(first, last_of(SAMPLERS[name](denoise, x, sigmas, randn=randn_of([3, 4]))).x)


@every_sampler
def test_each_step_can_be_looked_into_and_is_the_last_that_is_computed(name, noise):
    """Cancelling is leaving the loop: nothing is evaluated ahead, and the previews close in on the result."""
    sigmas, calls = grid(scaled_linear(), 9, "karras"), []

    def counted(x, sigma):
        calls.append(float(sigma))
        return denoise(x, sigma)

    steps, previews = [], []
    for step in SAMPLERS[name](counted, (14.6 * noise(2, 3, 8, 8)).float(), sigmas, randn=randn_of([1, 2])):
        steps.append((step.i, float(step.sigma)))
        previews.append(step.x0)
        assert min(calls) >= float(step.sigma)
        assert step.x.dtype == step.x0.dtype == torch.float32
        if step.i == 5:
            break
    done = len(calls)
    assert steps == [(i, float(sigmas[i + 1])) for i in range(6)]
    assert len(calls) == done
    *_, last = SAMPLERS[name](denoise, (14.6 * noise(2, 3, 8, 8)).float(), sigmas, randn=randn_of([1, 2]))
    errors = [(preview - last.x).square().mean().item() for preview in previews]
    assert errors[-1] < errors[0]


@every_sampler
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_last_step_to_0_gives_the_last_x0(name, steps, noise):
    sigmas = to(0, steps)
    last = last_of(SAMPLERS[name](denoise, 14.6 * noise(1, 3, 4, 4), sigmas, randn=randn_of([1])))
    assert last.sigma == 0
    assert last.x.isfinite().all()
    if name not in ("lms", "plms", "pndm", "ipndm"):  # these put their polynomial through 0 as well
        torch.testing.assert_close(last.x, last.x0, rtol=0, atol=1e-12)


@every_sampler
def test_float32_state_and_grid_are_enough(name, noise):
    """50 steps differ from float64's by rounding alone."""
    sigmas, x = grid(scaled_linear(), 50, "karras"), (14.6 * noise(1, 3, 4, 4)).float()
    single = last_of(SAMPLERS[name](denoise, x, sigmas, randn=randn_of([1]))).x
    double = last_of(SAMPLERS[name](denoise, x.double(), sigmas.double(), randn=randn_of([1]))).x
    torch.testing.assert_close(single.double(), double, rtol=0, atol=2e-4)


@every_sampler
@pytest.mark.parametrize("schedule", [cosine(), zero_snr(scaled_linear())], ids=["cosine", "zero_snr"])
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_runs_may_start_from_noise_alone(name, schedule, spacing, noise):
    """A first level of 2e4 or 1e5, and a first step by a factor of thousands: the result still lies where the data do."""
    sigmas = grid(schedule, 16, spacing)
    assert sigmas[0] > 1e4
    assert sigmas[1] < 100
    last = last_of(bind(name, schedule)(denoise, noise(1, 3, 8, 8).float() * sigmas[0], sigmas, randn=randn_of([1])))
    assert last.x.abs().max() < 4.5


@pytest.mark.parametrize(("s", "s_next"), [(1000.0, 5.0), (2e4, 60.0), (999.0, 5.0)])
def test_the_first_step_from_noise_alone_is_that_of_x0_not_of_the_slope(s, s_next, noise):
    """Heun takes the mean of both x0, DPM2 holds the x0 of the middle; below a sigma of 1000 both do as their papers say."""
    x, sigmas, alone = s * noise(1, 3, 4, 4), torch.tensor([s, s_next], dtype=torch.float64), s >= 1000
    first = denoise(x, sigmas[0])
    ahead = first + s_next / s * (x - first)
    second = denoise(ahead, sigmas[1])
    mean = (first + second) / 2
    slope = ((x - first) / s + (ahead - second) / s_next) / 2
    expected = mean + s_next / s * (x - mean) if alone else x + (s_next - s) * slope
    torch.testing.assert_close(last_of(SAMPLERS["heun"](denoise, x, sigmas, randn=None)).x, expected, rtol=1e-12, atol=0)

    mid = math.sqrt(s * s_next)
    halfway = first + mid / s * (x - first)
    held = denoise(halfway, torch.tensor(mid, dtype=torch.float64))
    expected = held + s_next / s * (x - held) if alone else x + (s_next - s) * (halfway - held) / mid
    torch.testing.assert_close(last_of(SAMPLERS["dpm2"](denoise, x, sigmas, randn=None)).x, expected, rtol=1e-12, atol=0)


def test_one_rule_has_several_names(noise):
    sigmas, x = to(0, 9), 14.6 * noise(1, 3, 4, 4)
    run = lambda name, **options: last_of(SAMPLERS[name](denoise, x, sigmas, randn=randn_of([1]), **options)).x  # noqa: E731
    assert SAME == {"euler": "ddim", "euler_ancestral": "ddpm"}
    assert all(torch.equal(run(name), run(other)) for name, other in SAME.items())
    assert torch.equal(run("ddpm"), run("ddim", eta=1.0))
    assert torch.equal(run("dpm2"), run("dpm2_ancestral", eta=0.0))
    assert torch.equal(run("dpmpp_2m"), run("dpmpp_2m_sde", eta=0.0))
    assert torch.equal(run("dpmpp_3m"), run("dpmpp_3m_sde", eta=0.0))
    assert torch.equal(run("lcm"), run("tcd", eta=1.0))
    assert torch.equal(run("ddim"), run("tcd", eta=0.0))
    torch.testing.assert_close(run("dpmpp_sde", eta=0.0), run("dpmpp_2s_ancestral", eta=0.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run("lms", order=1), run("ddim"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run("deis", order=1), run("ddim"), rtol=1e-12, atol=1e-12)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant must be bh1 or bh2, got 'bh3'"):
        next(SAMPLERS["unipc"](denoise, torch.ones(1), to(0, 2), randn=None, variant="bh3"))
