"""Noise schedules against their papers' formulas; grids against the rules that every sampler relies on."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.diffusion.schedules import (
    AYS,
    SPACINGS,
    NoiseSchedule,
    beta,
    beta_quantile,
    cosine,
    exponential,
    from_betas,
    grid,
    karras,
    leading,
    linear,
    linspace,
    scaled_linear,
    simple,
    trailing,
    zero_snr,
)

SCHEDULES = {
    "linear": linear(),
    "scaled_linear": scaled_linear(),
    "cosine": cosine(),
    "zero_snr": zero_snr(scaled_linear()),
    "short": linear(T=20, beta_start=0.01, beta_end=0.4),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def test_linear_is_ho_et_al():
    abar = 1.0
    for i, got in enumerate(linear().abar.tolist()):
        abar *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        assert got == pytest.approx(abar, rel=1e-12)


def test_scaled_linear_has_stable_diffusions_ends():
    sigmas = scaled_linear().sigmas
    assert sigmas[0].item() == pytest.approx(math.sqrt(0.00085 / (1 - 0.00085)), rel=1e-12)
    assert sigmas[-1].item() == pytest.approx(14.6146, rel=1e-5)


def test_cosine_is_nichol_and_dhariwal_eq_17():
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    abar = cosine().abar
    uncapped = torch.tensor([f[t + 1] / f[0] for t in range(990)], dtype=torch.float64)
    torch.testing.assert_close(abar[:990], uncapped, rtol=1e-10, atol=0)
    assert (1 - abar[-1] / abar[-2]).item() == pytest.approx(0.999)


def test_zero_snr_ends_without_signal_and_keeps_the_first_level():
    plain, rescaled = scaled_linear(), zero_snr(scaled_linear())
    assert rescaled.abar[0].item() == pytest.approx(plain.abar[0].item(), rel=1e-12)
    assert rescaled.abar[-1].item() == 1e-10
    root, mine = plain.abar.sqrt(), rescaled.abar[:-1].sqrt()
    torch.testing.assert_close(mine, ((root - root[-1]) * root[0] / (root[0] - root[-1]))[:-1], rtol=1e-12, atol=0)


@every_schedule
def test_sigma_is_the_dictionary(schedule):
    sigmas = schedule.sigmas
    assert sigmas.dtype == torch.float64
    assert (sigmas.diff() > 0).all()
    torch.testing.assert_close(1 / (1 + sigmas**2), schedule.abar, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.snr(torch.arange(len(schedule))), sigmas**-2, rtol=1e-12, atol=0)


@every_schedule
def test_t_inverts_sigma_at_every_trained_level_even_from_float32(schedule):
    t = torch.arange(len(schedule), dtype=torch.float64)
    assert torch.equal(schedule.t(schedule.sigmas), t)
    assert torch.equal(schedule.t(schedule.sigmas.float()), t)
    assert torch.equal(torch.stack([schedule.t(s) for s in schedule.sigmas.float()[:20]]), t[:20])


@every_schedule
@given(fraction=st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_t_inverts_sigma_between_the_levels(schedule, fraction):
    t = torch.tensor(fraction * (len(schedule) - 1), dtype=torch.float64)
    assert schedule.t(schedule.sigma(t)).item() == pytest.approx(t.item(), abs=1.1e-3)  # 1e-3: where t snaps to an integer


@every_schedule
def test_t_is_clamped_outside_the_table(schedule):
    assert schedule.t(torch.tensor(0.0)).item() == 0
    assert schedule.t(torch.tensor(1e9)).item() == len(schedule) - 1


def test_spacings_are_the_ones_of_lin_et_al_table_2():
    assert leading(1000, 10).tolist() == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert leading(1000, 10, offset=1).tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert trailing(1000, 10).tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert linspace(1000, 10).tolist() == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert simple(1000, 7).tolist() == [999, 857, 714, 571, 428, 285, 142]
    assert [f(1000, 1).item() for f in (leading, trailing, linspace, simple, beta)] == [0, 999, 999, 999, 999]


def test_an_offset_never_leaves_the_table():
    assert leading(1000, 1000, offset=1).tolist() == list(range(999, -1, -1))
    assert leading(1000, 500, offset=7)[0] == 999


def test_beta_is_the_quantile_function():
    special = pytest.importorskip("scipy.special")
    p = torch.linspace(0, 1, 41, dtype=torch.float64)
    for a, b in ((0.6, 0.6), (0.5, 1.0), (2.0, 0.7)):
        expected = torch.from_numpy(special.betaincinv(a, b, p.numpy()))
        torch.testing.assert_close(beta_quantile(p, a, b), expected, rtol=1e-11, atol=1e-14)
    arcsine = (torch.pi * p / 2).sin() ** 2
    torch.testing.assert_close(beta_quantile(p, 0.5, 0.5), arcsine, rtol=1e-12, atol=1e-14)
    times = 999 * torch.from_numpy(special.betaincinv(0.6, 0.6, 1 - torch.arange(10).numpy() / 10))
    torch.testing.assert_close(beta(1000, 10), times, rtol=1e-10, atol=0)


@pytest.mark.oracle
def test_align_your_steps_are_the_authors_levels():
    from diffusers.schedulers import AysSchedules

    for name, theirs in (("sd15", "StableDiffusionSigmas"), ("sdxl", "StableDiffusionXLSigmas")):
        assert list(AYS[name][:10]) == AysSchedules[theirs][:10]


def test_karras_is_eq_5():
    sigmas = karras(0.002, 80.0, 18)
    for i, sigma in enumerate(sigmas.tolist()):
        assert sigma == pytest.approx((80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, rel=1e-12)
    assert karras(0.002, 80.0, 1).tolist() == pytest.approx([80.0])


def test_exponential_is_geometric():
    assert exponential(0.01, 100.0, 5).tolist() == pytest.approx([100, 10, 1, 0.1, 0.01], rel=1e-12)


def test_ramps_leave_out_what_is_noise_alone():
    for name, shape in (("karras", karras), ("exponential", exponential)):
        schedule, seen = cosine(), linear().sigmas
        sigmas = grid(schedule, 10, name)
        assert sigmas[0] == schedule.sigmas[-1].float()
        assert torch.equal(sigmas[1:-1], shape(schedule.sigmas[0].item(), 80.0, 10)[1:].float())
        assert torch.equal(grid(linear(), 10, name)[:-1], shape(seen[0].item(), seen[-1].item(), 10).float())


def test_ays_is_the_published_list_at_10_steps_and_log_linear_between():
    for name, spacing in (("sd15", "ays"), ("sdxl", "ays_sdxl")):
        assert grid(scaled_linear(), 10, spacing).tolist() == pytest.approx([*AYS[name][:10], 0], rel=1e-6)
    twenty = grid(scaled_linear(), 20, "ays")
    torch.testing.assert_close(twenty[:-1:2], grid(scaled_linear(), 10, "ays")[:-1])
    torch.testing.assert_close(twenty[1:-2:2] ** 2, twenty[:-3:2] * twenty[2:-1:2])


@every_schedule
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_every_grid_is_float32_strictly_decreasing_and_inside_the_table(schedule, data):
    T = len(schedule)
    steps = data.draw(st.integers(1, T))
    spacing = data.draw(st.sampled_from([s for s in sorted(SPACINGS) if not s.startswith("ays")]))
    final = data.draw(st.sampled_from(["zero", "sigma_min"]))
    offset = data.draw(st.integers(0, 2000))
    sigmas = grid(schedule, steps, spacing, offset=offset, final=final)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float32
    assert sigmas.device.type == "cpu"
    assert (sigmas.diff() < 0).all()
    assert sigmas[0] <= schedule.sigmas[-1].float()
    assert sigmas[-2] >= schedule.sigmas[0].float()
    assert sigmas[-1] in (0, schedule.sigmas[0].float())
    if final == "zero":
        assert sigmas[-1] == 0


@given(steps=st.integers(1, 1000), spacing=st.sampled_from(["ays", "ays_sdxl"]))
@settings(deadline=None, max_examples=40)
def test_ays_is_a_grid_for_every_count(steps, spacing):
    for final in ("zero", "sigma_min"):
        sigmas = grid(scaled_linear(), steps, spacing, final=final)
        assert sigmas.shape == (steps + 1,)
        assert (sigmas.diff() < 0).all()


def test_a_list_of_levels_is_a_grid():
    assert grid(scaled_linear(), 3, [14.0, 3.0, 1.0, 0.0]).tolist() == [14, 3, 1, 0]
    assert grid(scaled_linear(), 1, torch.tensor([1.0, 0.5], dtype=torch.float64)).dtype == torch.float32


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([3.0, 1.0, 0.0], "steps \\+ 1 = 4"),
        ([3.0, 1.0, 1.0, 0.0], "decrease strictly"),
        ([3.0, float("nan"), 1.0, 0.0], "decrease strictly"),
        ([3.0, 2.0, 1.0, -1.0], "decrease strictly"),
        ([20.0, 2.0, 1.0, 0.0], "no level above 14.61"),
        ([[3.0]], "steps \\+ 1 = 4"),
        (["a", "b", "c", "d"], "a name or a list of noise levels"),
        (None, "a name or a list of noise levels"),
        ("ays", "no level above"),
    ],
)
def test_a_bad_list_of_levels_is_named(levels, message):
    schedule = SCHEDULES["short"] if levels == "ays" else scaled_linear()
    with pytest.raises(ValueError, match=message):
        grid(schedule, 3, levels)


def test_a_grid_holds_the_trained_levels_of_its_spacing():
    schedule = scaled_linear()
    sigmas = grid(schedule, 20, "leading", offset=1, final="sigma_min")
    assert torch.equal(sigmas[:-1], schedule.sigmas[leading(1000, 20, 1).long()].float())
    assert sigmas[-1] == schedule.sigmas[0].float()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "steps must be an integer from 1 to 1000, got 0"),
        ({"steps": 1001}, "got 1001"),
        ({"steps": "10"}, "got '10'"),
        ({"steps": True}, "got True"),
        ({"steps": 10.0}, r"got 10\.0"),
        ({"steps": 10, "spacing": "karas"}, "spacing must be one of .*, got 'karas'"),
        ({"steps": 10, "final": "one"}, "final must be zero or sigma_min, got 'one'"),
    ],
)
def test_a_bad_grid_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        grid(linear(), **kwargs)


def test_times_and_levels_beyond_the_table_are_its_ends():
    two = NoiseSchedule(torch.tensor([0.9, 0.1], dtype=torch.float64))
    for schedule in (two, linear()):
        low, high = schedule.sigmas[0].item(), schedule.sigmas[-1].item()
        assert [schedule.sigma(t).item() for t in (-3.0, 0, len(schedule) - 1, 5000.0)] == pytest.approx([low, low, high, high])
        assert [schedule.t(s).item() for s in (0.0, low / 2, low, high, 2 * high)] == [0, 0, 0, *[len(schedule) - 1] * 2]


@pytest.mark.parametrize("abar", [[0.5], [0.5, 0.6], [0.5, 0.5], [1.0, 0.5], [0.5, 0.0], [0.5, float("nan")]])
def test_a_schedule_that_is_no_schedule_is_refused(abar):
    with pytest.raises(ValueError, match="abar must be a decreasing sequence"):
        NoiseSchedule(torch.tensor(abar, dtype=torch.float64))


def test_a_final_beta_of_one_is_floored():
    assert from_betas(torch.tensor([0.1, 0.5, 1.0])).abar[-1].item() == 1e-10
