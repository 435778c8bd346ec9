"""The benchmark: its costs are torch's count and the published ones, its claims are cautious, and it measures what it says."""

import json
import mmap
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.bench import alone, ceilings, machine, run, subjects, timing
from latentdiff.bench.contestants import contestants
from latentdiff.bench.ladder import ladder
from latentdiff.bench.report import markdown
from latentdiff.bench.timing import Comparison, compare, in_turns
from latentdiff.bench.work import Attend, Conv, Linear, flops, products, shares
from latentdiff.checkpoints.families import SD15, SD21, SDXL, ModelSpec
from latentdiff.doctor import installed
from latentdiff.loading import embedded
from latentdiff.models import onednn
from latentdiff.models.convolution import Conv2d
from latentdiff.models.text import TextTower
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE

CPU = torch.device("cpu")


def tiny(spec: ModelSpec) -> ModelSpec:
    """The family's topology, narrow and shallow."""
    unet = replace(
        spec.unet,
        block_out_channels=tuple(c // 20 for c in spec.unet.block_out_channels),
        norm_groups=4,
        heads=tuple(2 * h // spec.unet.heads[0] for h in spec.unet.heads),
        transformer_layers=(1,) * len(spec.unet.heads),
        context_dim=32 * len(spec.towers),
        vector_dim=spec.unet.vector_dim and 32 + 6 * 256,
        sample_size=8,
    )
    vae = replace(spec.vae, block_out_channels=(4, 4, 8, 8), norm_groups=4, layers_per_block=1)
    towers = tuple(
        replace(t, width=32, mlp=64, layers=2, heads=4, projection=t.projection and 32, vocab=49408) for t in spec.towers
    )
    return replace(spec, unet=unet, vae=vae, towers=towers, size=64)


# -- cost --


@pytest.mark.parametrize(
    ("spec", "step", "decode"), [(SD15, 0.803, 2.515), (SD21, 2.149, None), (SDXL, 6.761, 10.470)], ids=["sd15", "sd21", "sdxl"]
)
def test_costs_are_the_published_ones(spec, step, decode):
    """TFLOP of one forward, prompt's keys and values included; a guided step is two, without them."""
    with torch.device("meta"):
        unet = UNet(spec.unet)
        side, vector = spec.unet.sample_size, spec.unet.vector_dim and torch.empty(1, spec.unet.vector_dim)
        work = products(
            lambda: unet(torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 77, spec.unet.context_dim), vector)
        )
    assert flops(work) / 1e12 == pytest.approx(step, abs=0.0006)
    assert flops(run.work_of_step(spec)) < 2 * flops(work) < 1.02 * flops(run.work_of_step(spec))
    if decode:
        assert flops(run.work_of_decode(spec)) / 1e12 == pytest.approx(decode, abs=0.006)


@pytest.mark.parametrize("spec", [SD15, SD21, SDXL], ids=["sd15", "sd21", "sdxl"])
@torch.no_grad()
def test_costs_by_formula_are_torchs_count(spec):
    spec = tiny(spec)
    torch.manual_seed(0)
    unet, vae, tower = UNet(spec.unet), VAE(spec.vae), TextTower(spec.towers[-1])
    vector = spec.unet.vector_dim and torch.randn(2, spec.unet.vector_dim)
    runs = [
        lambda: unet(torch.randn(2, 4, 16, 8), torch.ones(2), torch.randn(2, 7, spec.unet.context_dim), vector),
        lambda: vae.decode(torch.randn(1, 4, 6, 10)),
        lambda: vae.encode(torch.randn(2, 3, 32, 48)),
        lambda: tower(torch.zeros(2, 77, dtype=torch.long)),
    ]
    for work in runs:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # not every release counts a CPU's own kernel
            work()
        assert flops(products(work)) == counter.get_total_flops() > 0


def test_shares_of_kinds():
    work = products(lambda: torch.nn.functional.linear(torch.ones(2, 3, 5), torch.ones(7, 5)))
    assert work == {Linear(6, 5, 7): 1}
    assert flops(work) == 2 * 6 * 5 * 7
    assert shares(work) == {"linear": 1.0}
    assert Attend((1, 2, 5, 8), 5).kind == "self-attention"
    assert Attend((1, 2, 5, 8), 77).kind == "cross-attention"
    assert Conv((1, 3, 9, 9), 4, 3, 2, 1).flops == 2 * 5 * 5 * 4 * 3 * 9


# -- claims --


def test_the_ratio_is_paired_and_its_interval_holds_it():
    ours = [1.0, 2.0, 4.0, 1.0, 3.0, 2.0]
    found = compare(ours, [2 * t for t in ours])
    assert (found.ratio, found.low, found.high) == pytest.approx((2, 2, 2))  # noise that both share says nothing
    assert found.verdict == "faster"
    back = compare([2 * t for t in ours], ours)
    assert back.ratio == pytest.approx(0.5)
    assert back.verdict == "slower"


def test_no_win_is_claimed_whose_interval_reaches_1():
    torch.manual_seed(0)
    ours = (1 + 0.2 * torch.rand(20)).tolist()
    for factor, verdicts in ((1.0, {"no difference shown"}), (1.4, {"faster"}), (0.7, {"slower"})):
        theirs = (factor * (1 + 0.2 * torch.rand(20))).tolist()
        found = compare(ours, theirs)
        assert found.low <= found.ratio <= found.high
        assert found.verdict in verdicts
    assert compare([1.0] * 4, [9.0] * 4).verdict == "no difference shown"  # too few rounds
    assert Comparison(ratio=1.1, low=1.0, high=1.2, rounds=50).verdict == "no difference shown"


@pytest.mark.parametrize("rounds", [timing.LEAST, 30])
def test_the_interval_covers_the_truth_19_times_of_20(rounds):
    """With the fewest rounds too: a bootstrap's would miss it three times as often there."""
    generator, hits = torch.Generator().manual_seed(0), 0
    for _ in range(1000):
        noise = torch.randn(2, rounds, generator=generator, dtype=torch.float64)
        found = compare((0.3 * noise[0]).exp().tolist(), (0.1 + 0.3 * noise[1]).exp().tolist())
        hits += found.low <= torch.tensor(0.1).exp() <= found.high
    assert 930 <= hits <= 970


def test_students_quantile_is_that_of_the_tables():
    for freedom, expected in ((4, 2.776), (5, 2.571), (9, 2.262), (29, 2.045), (1000, 1.962)):
        assert timing.student(freedom) == pytest.approx(expected, rel=5e-3)


def test_runs_take_turns_and_each_comes_first():
    order = []
    times = in_turns({name: lambda name=name: order.append(name) for name in "abc"}, CPU, seconds=0.0)
    assert "".join(order) == "abc" + "abcbcacababcbca"
    assert all(len(t.seconds) == timing.LEAST for t in times.values())
    assert times["a"].percentile(50) == sorted(times["a"].seconds)[2]


def test_a_peer_that_fails_is_left_out_and_named():
    def fail() -> None:
        raise OSError("no such kernel")

    with pytest.warns(UserWarning, match="theirs failed and is left out: OSError: no such kernel"):
        assert list(in_turns({"ours": lambda: None, "theirs": fail}, CPU, seconds=0.0)) == ["ours"]
    with pytest.raises(OSError, match="no such kernel"):
        in_turns({"ours": fail, "theirs": lambda: None}, CPU, seconds=0.0)


# -- the run --


@pytest.mark.oracle
@pytest.mark.parametrize("spec", [SD15, SDXL], ids=["sd15", "sdxl"])
@torch.no_grad()
def test_peers_compute_the_same_on_the_same_memory(spec):
    pytest.importorskip("diffusers")
    from latentdiff.bench.contestants import GUIDANCE, PROMPT, Peer, latents, ours
    from latentdiff.loading import ready

    parts = subjects.random_parts(tiny(spec))
    pipe = ready(parts, CPU, torch.float32)
    peer = Peer(parts, CPU, torch.float32, name="diffusers", channels_last=True)
    theirs = dict(peer.pipe.unet.named_parameters())
    assert all(p.data_ptr() == theirs[name].data_ptr() for name, p in pipe.unet.named_parameters())

    z = latents(4, 8, 2)
    expected = peer.pipe.vae.decode(z / spec.vae.scale, return_dict=False)[0]
    torch.testing.assert_close(pipe.decode(z), expected, rtol=1e-4, atol=1e-5)
    cond, _ = pipe.text.encode(PROMPT, "", size=(64, 64))
    embeds, pooled = peer.encode()
    torch.testing.assert_close(embeds, cond.context, rtol=1e-5, atol=1e-5)
    assert (pooled is None) == (cond.vector is None)
    *_, last = pipe.stream(PROMPT, negative=PROMPT, steps=4, seed=0, guidance=GUIDANCE, sampler="ddim")
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = peer.keywords(1) | {"latents": start, "height": 64, "width": 64, "output_type": "latent"}
    found = peer.pipe(**given, num_inference_steps=4).images
    torch.testing.assert_close(last.x / (1 + last.sigma**2).sqrt(), found, rtol=1e-3, atol=1e-4)
    assert ours(pipe, "latentdiff").dtype == "float32"


def test_ladder_tells_the_difference_of_every_rung(monkeypatch):
    parts = subjects.random_parts(tiny(SD15))
    before = {name: p.clone() for name, p in parts.unet.named_parameters()}
    found = {r.name: r.difference for r in ladder(parts.spec, parts.unet, CPU, torch.bfloat16, seconds=0.0, compiled=False)}
    assert list(found) == [
        "float32", "channels-last", "bfloat16", "keys, values and time once", "best attention", "shared halves",
        "oneDNN's own operators", "operations written down",
    ]  # fmt: skip
    assert found["float32"] == 0
    assert found["channels-last"] < 1e-5
    assert 1e-4 < found["bfloat16"] < 0.1
    assert found["shared halves"] == pytest.approx(found["bfloat16"], rel=0.2)
    assert all(torch.equal(p, before[name]) for name, p in parts.unet.named_parameters())
    for name, value in (("light", 0), ("heavy", 1)):  # all of them as products
        monkeypatch.setattr(Conv2d, name, value)
    found = ladder(parts.spec, parts.unet, CPU, torch.float32, seconds=0.0, compiled=False)
    assert [r.name for r in found][-3:] == ["shared halves", "oneDNN's own operators", "operations written down"]
    assert found[-1].difference == found[-2].difference
    assert all(r.difference < 1e-5 for r in found)
    assert onednn.enabled


def test_best_kernels_are_found_for_each_product(monkeypatch):
    work = products(lambda: torch.nn.functional.conv2d(torch.ones(1, 8, 6, 6), torch.ones(4, 8, 3, 3), None, 1, 1))
    work += {Linear(8, 16, 16): 3, Attend((1, 2, 16, 8), 16): 1}
    kernels = ceilings.best_kernels(work, CPU, torch.float32, seconds=0.001)
    assert ceilings.ceiling(work, kernels) == pytest.approx(sum(kernels[p] * n for p, n in work.items()))
    assert min(kernels.values()) > 0
    assert len(list(ceilings.ways(Conv((1, 8, 6, 6), 4, 3, 1, 1), CPU, torch.float32))) == 4
    for size, doubled in (((6, 6), True), ((5, 6), False)):
        (conv,) = products(
            lambda size=size: torch.conv2d(F.interpolate(torch.ones(1, 8, 3, 3), size), torch.ones(4, 8, 3, 3), None, 1, 1)
        )
        assert conv == Conv((1, 8, *size), 4, 3, 1, 1, doubled)
        ways = list(ceilings.ways(conv, CPU, torch.float32))
        assert len(ways) == 4 + (doubled and onednn.doubles(torch.float32))
        with torch.no_grad():
            assert {way().shape for way in ways} == {(1, 4, *size)}

    def both():
        large, weight = F.interpolate(torch.ones(1, 8, 3, 3), (6, 6)), torch.ones(4, 8, 3, 3)
        return F.conv2d(large, weight, None, 1, 1), F.conv2d(large + 1, weight, None, 1, 1)

    assert sorted(conv.doubled for conv in products(both)) == [False, True]
    assert ceilings.datasheet(CPU) is None
    for name, known in (("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA L4", 121.0), ("NVIDIA L40", None), ("NVIDIA RTX A1000", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert ceilings.datasheet(torch.device("cuda")) == (known and 1e12 * known)


def test_memory_is_the_peak_of_the_run():
    def run() -> None:  # asked of the system itself: the heap may have as much to give back from earlier tests
        torch.frombuffer(mmap.mmap(-1, 64 << 20), dtype=torch.uint8).fill_(1)

    found = []
    for _ in range(3):  # what other tests left may be freed between the two
        before, after = machine.peak_memory(lambda: None, CPU), machine.peak_memory(run, CPU)
        if before is None or after is None:
            pytest.skip("no /proc here")
        found.append(after - before)
    assert any(50 << 20 < more < 100 << 20 for more in found), found


def test_memory_that_cannot_be_read_is_not_known(tmp_path: Path, monkeypatch):
    """As on macOS, where nothing tells a process's peak."""
    monkeypatch.setattr(run, "subject", lambda name, device: subjects.random_parts(tiny(SD15)))
    monkeypatch.setattr(run, "limits", lambda *a: {"datasheet": None, "big_product": 0.1, "best_kernels": 0.2})
    monkeypatch.setattr(alone, "memory", lambda *a: None)
    run.bench(models=("sd15",), out=tmp_path, device="cpu", dtype="float32", seconds=0.0, stages=(), climb=False)
    assert "Peak memory, a guided step and a decode in float32: latentdiff not known here" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"steps": 0}, "steps must be"),
        ({"batches": (1, 0)}, "batches must be"),
        ({"out": Path(__file__)}, "path must be in a folder"),
    ],
)
def test_what_cannot_be_measured_is_told_before_the_work(asked, said, monkeypatch):
    monkeypatch.setattr(run, "subject", lambda *_: pytest.fail("began"))
    with pytest.raises(ValueError, match=said):
        run.bench(**asked)


def test_a_report_from_end_to_end(tmp_path: Path, monkeypatch):
    parts = subjects.random_parts(tiny(SD15))
    monkeypatch.setattr(run, "subject", lambda name, device: parts)
    monkeypatch.setattr(
        run, "limits", lambda *a: {"datasheet": None, "big_product": 0.1, "best_kernels": 0.2, "step": 1e-3, "decode": 1e-3}
    )
    report = run.bench(
        models=("sd15",), out=tmp_path, device="cpu", dtype="bfloat16", seconds=0.01, steps=2, batches=(1, 2),
        stages=("text", "step", "picture"), mlperf=True, sustained=0.01, processes=False,
    )  # fmt: skip
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["models"]["sd15"]["stages"] == report["models"]["sd15"]["stages"]
    stages = [(s["stage"], s["pictures"]) for s in report["models"]["sd15"]["stages"]]
    both = [(stage, pictures) for stage in ("step", "picture") for pictures in (1, 2)]
    assert stages == [("text", 1), *both, ("mlperf", 2), ("sustained", 1)]
    assert report["models"]["sd15"]["ladder"][0]["name"] == "float32"
    plain, *others = report["models"]["sd15"]["options"]
    assert (plain["name"], plain["change"], plain["ratio"]) == ("as it is", 0, 1)
    assert len(others) == 4 + onednn.multiplies_int8(torch.bfloat16)
    assert all(0 < other["change"] < 100 for other in others)
    text = (tmp_path / "report.md").read_text()
    assert text == markdown(report)
    for word in ("p50", "p90", "p99", "rounds", "TFLOP", "best kernels", "As MLPerf", "on end", "deep features of a step for 2"):
        assert word in text
    for stage in report["models"]["sd15"]["stages"]:
        for row in stage["rows"].values():
            assert len(row["seconds"]) == row["rounds"] >= timing.LEAST
            assert min(row["seconds"]) <= row["p50"] <= row["p90"] <= row["p99"] <= max(row["seconds"])


def test_what_was_measured_before_it_was_stopped_is_kept(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(run, "subject", lambda name, device: subjects.random_parts(tiny(SD15)))
    monkeypatch.setattr(
        run, "limits", lambda *a: {"datasheet": None, "big_product": 0.1, "best_kernels": 0.2, "step": 1, "decode": 1}
    )
    monkeypatch.setattr(run, "mlperf_like", lambda *a: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run.bench(
            models=("sd15",), out=tmp_path, device="cpu", dtype="float32", seconds=0.0, stages=("text", "step"), climb=False,
            mlperf=True, processes=False,
        )  # fmt: skip
    text = markdown(json.loads((tmp_path / "report.json").read_text()))
    assert "One guided step" in text
    assert "Our step runs at" in text


def test_ours_comes_first_and_alone_without_diffusers(monkeypatch):
    from latentdiff.bench import contestants as module

    monkeypatch.setattr(module, "installed", lambda name: None)
    parts = subjects.random_parts(tiny(SD15))
    assert [c.name for c in contestants(parts, CPU, torch.float32, compiled=False)] == ["latentdiff"]
    assert [c.name for c in contestants(parts, CPU, torch.float32, compiled=True, compile_own=False)] == ["latentdiff"]
    both = ["latentdiff", "latentdiff compiled"]
    assert [c.name for c in contestants(parts, CPU, torch.float32, compiled=True)] == both


def test_peers_that_cannot_be_built_are_left_out_and_named(monkeypatch):
    pytest.importorskip("diffusers")
    from latentdiff.bench import contestants as module

    monkeypatch.setattr(module, "theirs_of_vae", lambda parts: 1 // 0)
    with pytest.warns(UserWarning, match="diffusers tuned cannot be built and is left out: ZeroDivisionError"):
        found = contestants(subjects.random_parts(tiny(SD15)), CPU, torch.float32, compiled=False)
    assert [c.name for c in found] == ["latentdiff"]


@torch.no_grad()
def test_backends_of_attention_are_those_that_take_the_shape():
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    found = list(ceilings.backends(q, k, v))
    assert found
    for backend in found:
        torch.testing.assert_close(ceilings.attention(backend, q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_the_best_batch_is_the_last_that_pays(monkeypatch):
    """Pictures a second: 1, 1.5, 1.9, and then no more; or no memory for 4."""
    device, seconds = torch.device("cuda"), {1: 1.0, 2: 4 / 3, 4: 4 / 1.9, 8: 8 / 1.92}
    fake = lambda runs, *_, **__: {"": timing.Times(first=1.0, seconds=(runs[""](),) * 5)}  # noqa: E731
    monkeypatch.setattr(run, "in_turns", fake)
    assert run.growing(device, lambda n: lambda: seconds[n]) == [1, 2, 4]

    def step(n):
        if n == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: seconds[n]

    assert run.growing(device, step) == [1, 2]
    assert run.growing(CPU, step) == [1]


@pytest.mark.slow
def test_quick_ends_in_two_minutes(tmp_path: Path):
    """Of processor time, which other programs disturb less than time on the clock."""
    began = time.process_time()
    report = run.bench(quick=True, out=tmp_path, device="cpu")
    assert (time.process_time() - began) / torch.get_num_threads() < 120
    model = report["models"]["embedded"]
    assert {s["stage"] for s in model["stages"]} == set(run.STAGES)
    assert model["ladder"]
    assert all(0 < option["change"] < 100 for option in model["options"][1:])
    assert (tmp_path / "report.md").is_file()


@pytest.mark.slow
def test_what_needs_processes_of_its_own():
    assert 100 << 20 < alone.memory("embedded", "latentdiff", "bfloat16", "cpu") < 1 << 30
    assert alone.cold_start(embedded(), "latentdiff", steps=1) < 120
    if installed("diffusers"):
        assert 100 << 20 < alone.memory("embedded", "diffusers", "bfloat16", "cpu") < 1 << 30
        assert alone.cold_start(embedded(), "diffusers", steps=1) < 120


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"models": ["sd15", "sd21", "sdxl"], "steps": 20, "mlperf": True, "sustained": 60.0}),
        (
            ["--models=sdxl", "--steps", "3", "--no-mlperf", "--sustained", "0", "--no-compile", "--batches", "1", "8"],
            {"models": ["sdxl"], "steps": 3, "mlperf": False, "sustained": 0.0, "compile": False, "batches": [1, 8]},
        ),
    ],
)
def test_the_script_for_gpus_sets_what_is_not_given(given, expected, monkeypatch):
    from latentdiff import cli

    script = Path(__file__).parents[1] / "scripts" / "benchmark_gpu.py"
    tokens = ["bench", *runpy.run_path(str(script))["arguments"](given)]
    command, bound, _ = cli.app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert command is run.bench
    assert bound.arguments == expected
    monkeypatch.setattr(cli, "main", lambda: None)
    monkeypatch.setattr("sys.argv", [str(script), *given])
    runpy.run_path(str(script), run_name="__main__")
    assert sys.argv[1:] == tokens  # what the report shows as its command


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match="models must be among embedded, sd15, sd21, sdxl, got 'sd3'"):
        subjects.subject("sd3")
