"""Guidance: on x0 as on eps, at no cost where it does nothing, and each rule against its paper's formula."""

import inspect
import itertools
import math
import re
from dataclasses import replace
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.guidance import guided, scheduled
from latentdiff.diffusion.rules import (
    NEGATIVE,
    PROMPT,
    RULES,
    apg,
    autoguidance,
    cfg,
    freeu,
    interval,
    pag,
    rescale,
    rule,
    threshold,
)
from latentdiff.diffusion.schedules import linear, scaled_linear
from latentdiff.models.unet import UNet, UNetConfig

SIGMA = torch.tensor(2.0)


@pytest.fixture
def counted(network):
    """A network, and how many prompts it was called with."""
    sizes = []

    def F(x, t, context, vector=None):
        sizes.append(len(context))
        return network(x, t, context)

    return F, sizes


def estimates(noise, seed=0):
    return {PROMPT: 2 + noise(2, 4, 6, 6, seed=seed), NEGATIVE: noise(2, 4, 6, 6, seed=seed + 1)}


def combined(rule, x0, sigma=2.0):
    return rule.combine(x0, rule.at(sigma))


# -- evaluating --


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


def test_guidance_1_is_the_conditional_run_bit_for_bit_at_half_the_cost(counted, cond, noise):
    network, sizes = counted
    denoiser, x = Denoiser(network, linear(), "v"), noise(3, 4, 5, 5)
    alone = denoiser(x, SIGMA, cond(1.0, 3))
    for made in (guided(denoiser, cond(1.0, 3)), guided(denoiser, cond(1.0, 3), cond(0.0, 3), cfg(1.0))):
        assert torch.equal(made(x, SIGMA), alone)
    assert sizes == [3, 3, 3]
    guided(denoiser, cond(1.0, 3), cond(0.0, 3), cfg(1.5))(x, SIGMA)
    assert sizes[3:] == [6]


def test_outside_of_its_interval_guidance_is_not_computed(counted, cond, noise):
    network, sizes = counted
    denoiser, x = Denoiser(network, linear()), noise(2, 4, 5, 5)
    within = guided(denoiser, cond(1.0, 2), cond(0.0, 2), interval(cfg(7.5), 0.3, 5.0))
    everywhere = guided(denoiser, cond(1.0, 2), cond(0.0, 2), cfg(7.5))
    for sigma, inside in ((0.3, False), (0.30001, True), (5.0, True), (5.1, False)):
        sigma = torch.tensor(sigma, dtype=torch.float64)
        sizes.clear()
        got = within(x, sigma)
        assert sizes == ([4] if inside else [2])
        expected = everywhere(x, sigma) if inside else denoiser(x, sigma, cond(1.0, 2))
        assert torch.equal(got, expected)


def test_prompts_joined_by_and(counted, cond, noise):
    """negative + sum of weights · (prompt - negative), then whatever the rule does with it; a weight may differ by picture."""
    network, sizes = counted
    denoiser, x = Denoiser(network, linear()), noise(2, 4, 5, 5)
    a, b, n = (denoiser(x, SIGMA, cond(v, 2)) for v in (1.0, 2.0, -1.0))
    sizes.clear()
    weight = torch.tensor([0.5, -1.0])
    got = guided(denoiser, [(cond(1.0, 2), 1.0), (cond(2.0, 2), weight)], cond(-1.0, 2), cfg(4.0))(x, SIGMA)
    assert sizes == [6]
    together = n + (a - n) + weight.double().reshape(2, 1, 1, 1) * (b - n)
    torch.testing.assert_close(got, n + 4.0 * (together - n), rtol=1e-12, atol=1e-12)


def test_one_prompt_of_weight_1_is_that_prompt(network, cond, noise):
    denoiser, x = Denoiser(network, linear()), noise(2, 4, 5, 5)
    one, plain = (guided(denoiser, c, cond(-1.0, 2), cfg(4.0)) for c in ([(cond(1.0, 2), 1.0)], cond(1.0, 2)))
    assert torch.equal(one(x, SIGMA), plain(x, SIGMA))


@pytest.mark.parametrize("bad", [(0.5, cfg(1.0)), (1.0, cfg(2.0)), (1.0, apg(3.0))])
def test_a_missing_negative_is_named(bad, network, cond):
    weight, rule = bad
    with pytest.raises(ValueError, match="uncond must be given"):
        guided(Denoiser(network, linear()), [(cond(1.0), weight)], None, rule)


@pytest.mark.parametrize("entries", [(1, 1), (1, 3), (2, 4)])
def test_conditions_of_other_than_all_pictures_are_refused(entries, unet, prompt, noise):
    """Where they make a multiple of the pictures in all, the network would take one's for another's."""
    conds = [replace(prompt(seed), context=noise(n, 5, 12, seed=seed)) for seed, n in enumerate(entries)]
    with pytest.raises(ValueError, match=r"cond and uncond must have one entry for each of 2 pictures, got \[(1|1, 3|2, 4)\]"):
        guided(Denoiser(unet, linear()), *conds, cfg(4.0))(noise(2, 4, 8, 8), SIGMA)


def test_conditions_are_prepared_once_for_each_model(network, cond, noise):
    prepared = []
    denoiser = Denoiser(network, linear(), prepare=lambda *c: prepared.append(len(c)) or reduce(lambda a, b: a.join(b), c))
    denoise = guided(denoiser, cond(1.0, 2), cond(0.0, 2), interval(cfg(3.0), 1.0, 5.0))
    for sigma in (4.0, 3.0, 2.0, 0.5, 0.4):
        denoise(noise(2, 4, 2, 2), torch.tensor(sigma))
    assert prepared == [2, 1]


def test_a_schedule_changes_the_prompt_after_its_step():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    denoise = scheduled(sigmas, [(1, lambda x, s: "a"), (3, lambda x, s: "b"), (4, lambda x, s: "c")])
    said = [denoise(None, torch.tensor(s)) for s in (8.0, 6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5)]
    assert said == ["a", "a", "b", "b", "b", "b", "c", "c"]


# -- the rules --


def test_cfg_is_the_papers(noise):
    x0 = estimates(noise)
    torch.testing.assert_close(combined(cfg(7.5), x0), x0[NEGATIVE] + 7.5 * (x0[PROMPT] - x0[NEGATIVE]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combined(cfg(0.0), x0), x0[NEGATIVE], rtol=1e-12, atol=1e-12)
    assert torch.equal(combined(cfg(1.0), x0), x0[PROMPT])


def test_rescale_is_eq_14_to_16(noise):
    x0, phi = estimates(noise), 0.7
    plain = combined(cfg(7.5), x0)
    got = combined(cfg(7.5) + rescale(phi), x0)
    for k in range(2):
        rescaled = plain[k] * (x0[PROMPT][k].std() / plain[k].std())
        torch.testing.assert_close(got[k], phi * rescaled + (1 - phi) * plain[k], rtol=1e-12, atol=1e-12)
        assert combined(cfg(7.5) + rescale(1.0), x0)[k].std().item() == pytest.approx(x0[PROMPT][k].std().item())
    assert torch.equal(combined(cfg(7.5) + rescale(0.0), x0), plain)


def test_after_effects_act_only_where_a_term_does(noise):
    x0 = estimates(noise)
    both = interval(cfg(7.5), 1.0, 5.0) + rescale(1.0) + threshold(0.9)
    assert torch.equal(combined(both, x0, sigma=9.0), x0[PROMPT])


def test_apg_against_diffusers(noise):
    apg_of = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance").normalized_guidance
    x0 = estimates(noise)
    for scale, parallel, norm in ((7.5, 0.0, math.inf), (3.0, 0.4, math.inf), (3.0, 0.0, 2.5), (9.0, 1.0, 15.0)):
        expected = apg_of(
            x0[PROMPT], x0[NEGATIVE], scale - 1, None, parallel, 0.0 if norm == math.inf else norm, use_original_formulation=True
        )
        torch.testing.assert_close(combined(apg(scale, parallel, norm), x0), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(combined(apg(7.5, 1.0), x0), combined(cfg(7.5), x0), rtol=1e-12, atol=1e-12)
    change = combined(apg(7.5), x0) - x0[PROMPT]
    assert (change * x0[PROMPT]).flatten(1).sum(1).abs().max() < 1e-9
    one = {PROMPT: x0[PROMPT], NEGATIVE: x0[PROMPT]}
    assert torch.equal(combined(apg(7.5, 0.0, 0.0), one), one[PROMPT])


def test_threshold_is_imagens_with_the_prompts_own_bound(noise):
    x0 = estimates(noise)
    plain, got = combined(cfg(7.5), x0), combined(cfg(7.5) + threshold(0.9), x0)
    for k in range(2):
        s, own = (
            plain[k].abs().flatten().float().quantile(0.9).double(),
            x0[PROMPT][k].abs().flatten().float().quantile(0.9).double(),
        )
        torch.testing.assert_close(got[k], plain[k].clamp(-s, s) / s * own, rtol=1e-6, atol=1e-6)
    wide = {PROMPT: 10 * x0[PROMPT], NEGATIVE: 10 * x0[PROMPT] + 0.01 * x0[NEGATIVE]}
    torch.testing.assert_close(combined(cfg(1.5) + threshold(1.0), wide), combined(cfg(1.5), wide), rtol=1e-2, atol=1e-2)


def test_autoguidance_runs_the_weak_model_on_the_same_prompt(counted, network, cond, noise):
    weak_network, sizes = counted
    strong, x = Denoiser(network, linear(), "v"), noise(2, 4, 5, 5)
    weak = Denoiser(weak_network, scaled_linear(), "eps")
    got = guided(strong, cond(1.0, 2), None, autoguidance(weak, 2.5))(x, SIGMA)
    assert sizes == [2]
    a, b = strong(x, SIGMA, cond(1.0, 2)), weak(x, SIGMA, cond(1.0, 2))
    torch.testing.assert_close(got, b + 2.5 * (a - b), rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        attention=(True, True, False),
        transformer_layers=(1, 1, 1),
        heads=(2, 2, 2),
        context_dim=12,
        norm_groups=4,
    )
    return UNet(config).double().eval().requires_grad_(False)


@pytest.fixture
def prompt(cond, noise):
    """prompt(seed): a condition that the U-Net takes, for two pictures."""
    return lambda seed: replace(cond(0.0), context=noise(2, 5, 12, seed=seed))


def test_pag_looks_away_from_a_run_whose_self_attention_sees_only_its_own_place(unet, prompt, noise):
    x, sites = noise(2, 4, 8, 8), set()

    def blind(q, k, v, site):
        sites.add(site.name)
        if site.name.startswith("mid_block") and not site.cross:
            return v
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    denoiser = Denoiser(unet, linear())
    plain = denoiser(x, SIGMA, prompt(1))
    perturbed = replace(denoiser, attend=blind)(x, SIGMA, prompt(1))
    assert any(name.startswith("mid_block") and "attn1" in name for name in sites)
    assert (plain - perturbed).abs().max() > 1e-6
    got = guided(denoiser, prompt(1), None, pag(3.0))(x, SIGMA)
    torch.testing.assert_close(got, plain + 3.0 * (plain - perturbed), rtol=1e-8, atol=1e-8)
    elsewhere = guided(denoiser, prompt(1), None, pag(3.0, "up_blocks.1", "down_blocks.0"))(x, SIGMA)
    assert (elsewhere - got).abs().max() > 1e-6
    torch.testing.assert_close(guided(denoiser, prompt(1), None, pag(3.0, "no_such_layer"))(x, SIGMA), plain, rtol=1e-8, atol=1e-8)


def test_pag_leaves_another_attention_in_place(unet, prompt, noise):
    """What editing puts there is still reached, for all of the batch that is not blind."""
    seen = []

    def attend(q, k, v, site):
        seen.append((site.name, len(q)))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    guided(Denoiser(unet, linear(), attend=attend), prompt(1), prompt(2), cfg(3.0) + pag(2.0))(noise(2, 4, 8, 8), SIGMA)
    mid = [n for name, n in seen if name.startswith("mid_block") and "attn1" in name]
    assert mid == [2, 2]
    assert {n for name, n in seen if not name.startswith("mid_block")} == {6}


def test_freeu_against_diffusers(noise):
    apply_freeu = pytest.importorskip("diffusers.utils.torch_utils").apply_freeu
    merge = freeu(1.5, 1.6, 0.9, 0.2).terms[0].merge
    for block, (h, w) in itertools.product(range(3), ((8, 8), (6, 10), (1, 3), (2, 2))):
        x, skip = noise(2, 6, h, w).float(), noise(2, 4, h, w, seed=1).float()
        expected = torch.cat(apply_freeu(block, x.clone(), skip.clone(), s1=0.9, s2=0.2, b1=1.5, b2=1.6), dim=1)
        if min(h, w) > 1:
            torch.testing.assert_close(merge(x, skip, block), expected, rtol=1e-5, atol=1e-5)
        assert merge(x, skip, block).shape == expected.shape


def test_freeu_changes_the_network_and_nothing_at_ones(unet, prompt, noise):
    x, denoiser = noise(2, 4, 8, 8), Denoiser(unet, linear())
    plain = guided(denoiser, prompt(1))(x, SIGMA)
    torch.testing.assert_close(guided(denoiser, prompt(1), None, freeu(1, 1, 1, 1))(x, SIGMA), plain, rtol=1e-5, atol=1e-5)
    assert (guided(denoiser, prompt(1), None, freeu())(x, SIGMA) - plain).abs().max() > 1e-3
    assert torch.equal(guided(denoiser, prompt(1))(x, SIGMA), plain)


def test_an_interval_limits_all_that_a_rule_does(unet, prompt, noise):
    """Also what it does to the sum, and to the network."""
    x, denoiser = noise(2, 4, 8, 8), Denoiser(unet, linear())
    for limited in (freeu(), rescale(0.9), threshold(0.9)):
        plain, within, everywhere = (
            guided(denoiser, prompt(1), prompt(2), rule)
            for rule in (cfg(5.0), cfg(5.0) + interval(limited, 1.0, 5.0), cfg(5.0) + limited)
        )
        for sigma, inside in ((8.0, False), (2.0, True), (0.5, False), (2.0, True)):
            sigma = torch.tensor(sigma)
            assert torch.equal(within(x, sigma), (everywhere if inside else plain)(x, sigma))
            assert not torch.equal(everywhere(x, sigma), plain(x, sigma))


def test_rules_add_their_directions(unet, prompt, noise):
    x, denoiser = noise(2, 4, 8, 8), Denoiser(unet, linear())
    run = lambda rule: guided(denoiser, prompt(1), prompt(2), rule)(x, SIGMA)  # noqa: E731
    plain, both = run(cfg(1)), run(cfg(4.0) + pag(2.0))
    torch.testing.assert_close(both, run(cfg(4.0)) + run(pag(2.0)) - plain, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(both, run(pag(2.0) + cfg(4.0)), rtol=1e-8, atol=1e-8)


def test_every_estimate_of_a_rule_is_one_batch(unet, prompt, noise):
    sizes = []

    def F(x, t, context, *args, **seams):
        sizes.append(len(context))
        return unet(x, t, context, *args, **seams)

    denoise = guided(Denoiser(F, linear()), prompt(1), prompt(2), interval(cfg(4.0), 1.0, 3.0) + pag(2.0) + apg(2.0))
    denoise(noise(2, 4, 8, 8), SIGMA)
    denoise(noise(2, 4, 8, 8), torch.tensor(9.0))
    assert sizes == [6, 6]


@pytest.mark.parametrize("make", [*RULES.values(), autoguidance])
def test_each_rule_cites_its_paper_and_says_what_it_costs(make):
    doc = inspect.getdoc(make)
    assert re.search(r"arXiv \d{4}\.\d{5}", doc)
    assert re.search(r"\b(Costs|Saves) ", doc)


# -- rules as text --

TEXTS = [
    "cfg(7.5)",
    "cfg(1)",
    "cfg(-2.5)",
    "cfg(7.123456789)",
    "apg(7.5, 0, inf)",
    "apg(5, 0.25, 15)",
    "pag(3)",
    "pag(3, 'up_blocks.0', 'mid_block')",
    "interval(cfg(7.5), 0.3, 5)",
    "interval(cfg(7.5) + pag(2), 0, inf) + rescale(0.7)",
    "cfg(12) + threshold(0.995) + freeu(1.5, 1.6, 0.9, 0.2)",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_rule_reads_back_what_it_writes(text, noise):
    assert rule(text).text == text
    assert rule(rule(text).text).at(1.0) is not None


def test_defaults_and_numbers_are_written_out():
    assert rule("7.5").text == "cfg(7.5)"
    assert rule(" 3 ").text == "cfg(3)"
    assert rule("apg(7.5)").text == "apg(7.5, 0, inf)"
    assert rule("rescale()").text == "rescale(0.7)"
    assert (cfg(5.0) + rescale()).text == "cfg(5) + rescale(0.7)"


BAD_TEXTS = """cfg; cfg(); cfg(1, 2); cfg(nan); cfg(inf); cfg('a'); cfg(7; cfg(scale=3); cfg(cfg(3)); cfg(True); pag(2) - cfg(3);
__import__('os'); interval(3, 0, 1); interval(cfg(3), 5, 1); freeu() + freeu(); 2 + 3; lambda: 0; threshold(1.5); [7.5]; cfg.x(3);
pag(2, 3)"""
HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    "text", ["", "(" * 5000, HUGE, f"cfg({HUGE})", f"apg(2, 0, {HUGE})", *BAD_TEXTS.replace("\n", " ").split("; ")]
)
def test_a_bad_rule_is_named(text):
    with pytest.raises(ValueError, match="guidance must be"):
        rule(text)


def test_a_recipe_with_a_second_model_says_what_is_missing(network):
    text = (cfg(3.0) + autoguidance(Denoiser(network, scaled_linear(), "eps"), 2.0)).text
    assert text == "cfg(3) + autoguidance(2)"
    with pytest.raises(ValueError, match=r"got 'cfg\(3\) \+ autoguidance\(2\)' \(autoguidance needs its weaker model"):
        rule(text)


PIECES = ["cfg(", "pag(", ")", "3", ",", "+", "interval(", "inf", "-"]


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@given(st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@settings(deadline=None, max_examples=300)
def test_any_text_is_a_rule_or_a_value_error(text):
    try:
        found = rule(text)
    except ValueError:
        return
    assert rule(found.text).text == found.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cfg(math.nan), "guidance must be a finite number, got nan"),
        (lambda: cfg("7"), "guidance must be a finite number, got '7'"),
        (lambda: cfg(math.inf), "guidance must be a finite number, got inf"),
        (lambda: interval(cfg(3), 2.0, 1.0), "high must be at least 2, got 1.0"),
        (lambda: interval(cfg(3), -1.0, 1.0), "low must be at least 0, got -1.0"),
        (lambda: threshold(2.0), "share must be from 0 to 1, got 2.0"),
        (lambda: apg(3.0, norm=-1), "norm must be at least 0, got -1"),
        (lambda: cfg(10**400), "guidance must be a finite number, got 1000"),
        (lambda: apg(math.nan), "guidance must be a finite number, got nan"),
        (lambda: apg(3.0, math.inf), "parallel must be a finite number, got inf"),
        (lambda: autoguidance(None, math.nan), "scale must be a finite number, got nan"),  # type: ignore[arg-type]
        (lambda: pag(math.inf), "scale must be a finite number, got inf"),
        (lambda: rescale(math.nan), "phi must be a finite number, got nan"),
        (lambda: freeu(s2=math.nan), "s2 must be a finite number, got nan"),
        (lambda: pag(2.0, 3), "layers must be names such as 'mid_block', got 3"),
    ],
)
def test_bad_numbers_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
