"""`latentdiff bench`: how fast this machine makes pictures, against other programs and against its own limits."""

from __future__ import annotations

import gc
import json
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from latentdiff.bench import alone
from latentdiff.bench.ceilings import best_kernels, big_product, ceiling, datasheet, shortest
from latentdiff.bench.contestants import Contestant, Run, contestants
from latentdiff.bench.ladder import ladder
from latentdiff.bench.machine import describe
from latentdiff.bench.options import options
from latentdiff.bench.report import Report, markdown, plot
from latentdiff.bench.subjects import subject
from latentdiff.bench.timing import Times, compare, in_turns
from latentdiff.bench.work import Product, flops, products, shares
from latentdiff.checkpoints.families import ModelSpec
from latentdiff.checkpoints.fill import on_meta
from latentdiff.checkpoints.io import Parts
from latentdiff.doctor import installed
from latentdiff.images import check_folder
from latentdiff.loading import best_device, best_dtype, checked_device, checked_dtype, embedded
from latentdiff.models.unet import UNet
from latentdiff.models.vae import VAE
from latentdiff.request import MAX_PICTURES, integer

Model = Literal["embedded", "sd15", "sd21", "sdxl"]
Stage = Literal["text", "step", "loop", "decode", "picture"]
STAGES: tuple[Stage, ...] = ("text", "step", "loop", "decode", "picture")


def bench(
    *,
    models: Sequence[Model] = ("embedded",),
    out: Path = Path("bench"),
    device: str | None = None,
    dtype: str | None = None,
    seconds: float = 20.0,
    steps: int = 20,
    batches: Sequence[int] = (),
    stages: Sequence[Stage] = STAGES,
    peer_dtypes: Sequence[str] = (),
    compile: bool | None = None,
    compile_own: bool = True,
    climb: bool = True,
    mlperf: bool = False,
    sustained: float = 0.0,
    processes: bool = True,
    quick: bool = False,
) -> Report:
    """Measure speed, and write report.json, report.md and report.png.

    diffusers, where it is installed, runs in the same process on the same weights, in turns with this library; no win is claimed
    whose 95 % interval reaches 1. The embedded model is measured as it is, the others with random weights of their true sizes.

    Parameters
    ----------
    models
        What to measure.
    out
        The folder to write to.
    device
        As in `generate`.
    dtype
        Of this library and of diffusers at its best; unless given, what this machine runs best.
    seconds
        For each measurement; at least five rounds are run.
    steps
        Of a picture.
    batches
        Pictures in a batch; unless given, 1 and, on a GPU, twice as many as long as it pays.
    stages
        Which parts of a picture's making are measured.
    peer_dtypes
        In which diffusers runs too, channels last: float32, float16 or bfloat16.
    compile
        Also measure compiled networks; unless given, on a GPU. The first run takes minutes.
    compile_own
        Of these, also this library's.
    climb
        Also measure the ladder of optimisations, and (if pictures are measured) what is faster at the price of another picture.
    mlperf
        Also run as MLPerf's text-to-image does: 20 Euler steps at guidance 8.
    sustained
        Also make pictures for so many seconds on end (60 or more, because chips throttle).
    processes
        Also measure what needs processes of their own: memory, and on a CPU the start.
    quick
        The embedded model alone, 1.5 seconds a measurement: less than two minutes on two cores.
    """
    if quick:
        models, seconds, steps, batches, processes = ("embedded",), 1.5, 8, (1,), False
    steps, batches = integer("steps", steps, 1, 1000), [integer("batches", n, 1, MAX_PICTURES) for n in batches]
    check_folder(out)
    place = best_device() if device is None else checked_device(device)
    kind = best_dtype(place) if dtype is None else checked_dtype(dtype)
    others = [checked_dtype(other) for other in peer_dtypes]
    compiled = (place.type == "cuda" and not quick) if compile is None else compile
    report: Report = {"machine": describe(place), "command": shlex.join(["latentdiff", *sys.argv[1:]]), "models": {}}
    for name in models:
        tell(f"{name}: building")
        parts = subject(name, place)
        model: Report = {"dtype": str(kind).removeprefix("torch."), "cost": cost(parts.spec), "stages": []}
        report["models"][name] = model
        model["ladder"] = rungs(parts, place, kind, seconds, compiled) if climb else []
        store(report, out)
        entrants = contestants(parts, place, kind, compiled=compiled, compile_own=compile_own, peer_dtypes=others)
        model["ceilings"] = limits(parts.spec, place, kind, 0.1 if quick else 0.3)
        model["alone"] = by_itself(entrants[0], place, stages)
        sizes = batches or growing(place, entrants[0].step)
        for stage in measured(entrants, place, seconds, steps, sizes, stages):
            model["stages"].append(stage)
            model["ceilings"]["says"] = against_limits(model)
            store(report, out)
        if mlperf:
            model["stages"].append(mlperf_like(entrants, place, seconds, sizes))
        if sustained:
            model["stages"].append(on_end(entrants[0], place, sustained, steps))
        model["options"] = choices(parts, place, kind, seconds, steps) if climb and "picture" in stages else []
        del entrants, parts
        gc.collect()
        if place.type == "cuda":
            torch.cuda.empty_cache()
        if processes and place.type in ("cpu", "cuda"):
            model["memory"] = memory(name, place, kind)
    if processes and "embedded" in models and place.type == "cpu":
        report["cold_start"] = cold_start()
    report["machine_after"] = describe(place)
    write(report, out)
    return report


def tell(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def store(report: Report, out: Path) -> None:
    """What is known so far: a benchmark of hours may be stopped."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")


def write(report: Report, out: Path) -> None:
    store(report, out)
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
    drawn = plot(report, out / "report.png")
    tell(f"wrote {out / 'report.md'}, report.json{' and report.png' if drawn else '; no plot: matplotlib is not installed'}")


# ------------------------------------------------------------------------------------------------------------- cost and limits


def work_of_step(spec: ModelSpec) -> Counter[Product]:
    """The products of the U-Net for one picture with guidance, but for the prompt's keys and values, which are made once.

    Nominal: what both halves of guidance share before they hear the prompt (3 % of SD 1.5's, 7 % of the embedded model's) counts
    twice, though ours does it once.
    """
    unet = on_meta(UNet, spec.unet)
    side, dim = spec.unet.sample_size, spec.unet.vector_dim
    with torch.device("meta"), torch.no_grad():
        prompt = unet.project_context(torch.empty(2, spec.towers[0].length, spec.unet.context_dim))
        vector = None if dim is None else torch.empty(2, dim)
        return products(lambda: unet(torch.empty(2, spec.unet.in_channels, side, side), torch.empty(2), prompt, vector))


def work_of_decode(spec: ModelSpec) -> Counter[Product]:
    vae = on_meta(VAE, spec.vae)
    side = spec.unet.sample_size
    return products(lambda: vae.decode(torch.empty(1, spec.vae.latent_channels, side, side, device="meta")))


def cost(spec: ModelSpec) -> Report:
    """TFLOP of a guided step and of decoding a picture."""
    step = work_of_step(spec)
    return {"step": flops(step) / 1e12, "decode": flops(work_of_decode(spec)) / 1e12, "shares": shares(step)}


def limits(spec: ModelSpec, device: torch.device, dtype: torch.dtype, seconds: float) -> Report:
    """Three ceilings in TFLOP/s, and what the third allows: seconds of a guided step and of a decode."""
    tell("the machine's limits")
    step, decode = work_of_step(spec), work_of_decode(spec)
    kernels = best_kernels(step | decode, device, dtype, seconds)
    sheet = datasheet(device)
    return {
        "datasheet": None if sheet is None else sheet / 1e12,
        "big_product": big_product(device, dtype) / 1e12,
        "best_kernels": flops(step) / ceiling(step, kernels) / 1e12,
        "step": ceiling(step, kernels),
        "decode": ceiling(decode, kernels),
    }


def by_itself(ours: Contestant, device: torch.device, stages: Sequence[Stage]) -> Report:
    """Seconds of the shortest of several runs in a row, as the best kernels are measured: in turns with others, caches are cold."""
    return {stage: shortest(getattr(ours, stage)(1), device, 3.0) for stage in ("step", "decode") if stage in stages}


def against_limits(model: Report) -> str:
    """Our step and decode as shares of the limits."""
    said = []
    for stage in ("step", "decode"):
        rows = [s["rows"]["latentdiff"] for s in model["stages"] if s["stage"] == stage and s["pictures"] == 1]
        if not rows:
            continue
        taken, limit = rows[0]["p50"], model["ceilings"]
        rate = model["cost"][stage] / taken
        parts = [
            f"{limit[stage] / taken:.0%} of the best kernels by themselves ({limit[stage] / model['alone'][stage]:.0%} by itself)",
            f"{rate / limit['big_product']:.0%} of a big product",
        ]
        if limit["datasheet"]:
            parts.append(f"{rate / limit['datasheet']:.0%} of the datasheet")
        said.append(f"Our {stage} runs at {rate:.3f} TFLOP/s: {', '.join(parts)}.")
    return " ".join(said)


# ------------------------------------------------------------------------------------------------------------------ stages


def measured(
    entrants: list[Contestant],
    device: torch.device,
    seconds: float,
    steps: int,
    batches: Sequence[int],
    stages: Sequence[Stage],
) -> Iterator[Report]:
    """Each stage at each batch, contestants in turns."""
    titles = {
        "text": "Prompt and negative prompt to embeddings",
        "step": "One guided step",
        "loop": f"{steps} guided steps",
        "decode": "Latents to pixels",
        "picture": f"Prompt to picture, {steps} steps",
    }
    for stage in stages:
        if stage == "text":
            yield turns(stage, titles[stage], {c.name: c.text() for c in entrants}, entrants, device, seconds)
            continue
        for pictures in batches:
            given = (steps, pictures) if stage in ("loop", "picture") else (pictures,)
            runs = {c.name: getattr(c, stage)(*given) for c in entrants}
            title = titles[stage] + (f", {pictures} at once" if pictures > 1 else "")
            yield turns(stage, title, runs, entrants, device, seconds, pictures=pictures)


def growing(device: torch.device, step: Callable[[int], Run]) -> list[int]:
    """1, and on a GPU twice as many as long as pictures a second rise by 3 % and memory is left; the last is the best."""
    found = [1]
    if device.type != "cuda":
        return found
    tell("the best batch")
    rate = 0.0
    while found[-1] < 256:
        try:
            times = in_turns({"": step(found[-1])}, device, seconds=1.0)[""]
        except torch.OutOfMemoryError:
            break
        now = found[-1] / times.percentile(50)
        if now < 1.03 * rate:
            break
        rate = now
        found.append(2 * found[-1])
    return found[:-1] or [1]


def turns(
    stage: str,
    title: str,
    runs: dict[str, Run],
    entrants: list[Contestant],
    device: torch.device,
    seconds: float,
    pictures: int = 1,
) -> Report:
    """One table: contestants in turns, and every peer against each of ours' first."""
    tell(f"{title}: {', '.join(runs)}")
    times = in_turns(runs, device, seconds=seconds)
    title += "".join(f"; {name} failed" for name in runs if name not in times)
    dtypes = {c.name: c.dtype for c in entrants}
    rows = {name: row(own, pictures) | {"dtype": dtypes[name]} for name, own in times.items()}
    claim(rows)
    rate = "steps/s" if stage == "step" else "prompts/s" if stage == "text" else "pictures/s"
    return {"stage": stage, "title": title, "pictures": pictures, "rate": rate, "rows": rows}


def claim(rows: dict[str, Report]) -> None:
    """Put beside each but the first, ours, how it compares with that."""
    ours, *others = rows.values()
    for other in others:
        found = compare(ours["seconds"], other["seconds"])
        other["against"] = asdict(found) | {"verdict": found.verdict}


def row(times: Times, pictures: int = 1) -> Report:
    p50, p90, p99 = (times.percentile(share) for share in (50, 90, 99))
    numbers = {"p50": p50, "p90": p90, "p99": p99, "first": times.first, "rate": pictures / p50}
    return numbers | {"rounds": len(times.seconds), "seconds": list(times.seconds)}


def mlperf_like(entrants: list[Contestant], device: torch.device, seconds: float, batches: Sequence[int]) -> Report:
    """20 Euler steps at guidance 8, the largest batch: MLPerf's text-to-image task, but for its prompts and its quality gate."""
    pictures = max(batches)
    runs = {c.name: c.picture(20, pictures, sampler="euler", guidance=8.0) for c in entrants}
    return turns("mlperf", f"As MLPerf: 20 Euler steps, guidance 8, {pictures} at once", runs, entrants, device, seconds, pictures)


def on_end(ours: Contestant, device: torch.device, seconds: float, steps: int) -> Report:
    """Ours alone, picture after picture: the last quarter against the first shows whether the chip throttles."""
    tell(f"pictures for {seconds:.0f} s")
    times = in_turns({ours.name: ours.picture(steps, 1)}, device, seconds=seconds, most=1_000_000)[ours.name]
    quarter = max(1, len(times.seconds) // 4)
    first, last = times.seconds[:quarter], times.seconds[-quarter:]
    title = f"Pictures for {seconds:.0f} s on end; last quarter / first quarter: {sum(last) / sum(first):.3f}"
    return {"stage": "sustained", "title": title, "pictures": 1, "rate": "pictures/s", "rows": {ours.name: row(times)}}


def choices(parts: Parts, device: torch.device, dtype: torch.dtype, seconds: float, steps: int) -> list[Report]:
    """What is faster at the price of another picture, as data; `ratio` is the speed against the picture as it is."""
    tell("what changes the picture")
    found = options(parts, device, dtype, steps=steps, seconds=2 * seconds)
    base = found[0].times.seconds
    gc.collect()
    return [{"name": o.name, "change": o.change, "ratio": compare(o.times.seconds, base).ratio} | row(o.times) for o in found]


def rungs(parts: Parts, device: torch.device, dtype: torch.dtype, seconds: float, compiled: bool) -> list[Report]:
    """The ladder, as data; `ratio` is the speed against the first rung."""
    tell("the ladder")
    found = ladder(parts.spec, parts.unet, device, dtype, seconds=2 * seconds, compiled=compiled)
    base = found[0].times.seconds
    gc.collect()
    return [
        {"name": r.name, "difference": r.difference, "ratio": compare(r.times.seconds, base).ratio} | row(r.times) for r in found
    ]


# ---------------------------------------------------------------------------------------------------- processes of their own


def memory(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, int | None]]:
    """Peak bytes of a step and a decode, each contestant in a process of its own, both in our dtype."""
    tell("memory, in processes of their own")
    kind = str(dtype).removeprefix("torch.")
    who = ["latentdiff", *(["diffusers"] if installed("diffusers") else [])]
    return {f"a guided step and a decode in {kind}": {one: alone.memory(name, one, kind, str(device)) for one in who}}


def cold_start() -> Report:
    """A new process each time, in turns."""
    tell("from the command to the first picture")
    who = ["latentdiff", *(["diffusers"] if installed("diffusers") else [])]
    taken = {one: [] for one in who}
    for _ in range(5):
        for one in who:
            taken[one].append(alone.cold_start(embedded(), one))
    rows = {one: row(Times(first=own[0], seconds=tuple(own))) for one, own in taken.items()}
    claim(rows)
    return {"rows": rows, "rate": "1/s"}
