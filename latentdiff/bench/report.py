"""A measurement as Markdown and as a plot; the JSON beside them holds all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Report = dict[str, Any]


def markdown(report: Report) -> str:
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    machine = report["machine"]
    where = machine.get("gpu") or machine["cpu"]
    yield f"# Speed on {where}\n"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield f"{machine['date']}, commit {machine['commit']}, {machine['threads']} threads, load {machine['load']}; {versions}."
    yield f"\n`{report['command']}`\n" if report.get("command") else ""
    if machine.get("cpu_mhz"):
        yield f"CPU: {machine['cpu_capability']}, {machine['cpu_mhz']} MHz as the system tells it.\n"
    if machine.get("gpu_state"):
        yield f"Driver, clocks, power: {machine['gpu_state']}.\n"
    for name, model in report["models"].items():
        yield from _model(name, model)
    if report.get("cold_start"):
        yield from _table(
            "From the command to the first picture of the embedded model, a new process each time", report["cold_start"]
        )


def _model(name: str, model: Report) -> Iterator[str]:
    cost = model["cost"]
    yield f"\n## {name}\n"
    kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in cost["shares"].items())
    yield f"A guided step costs {cost['step']:.4g} TFLOP ({kinds}), decoding a picture {cost['decode']:.4g}."
    limits = {
        "datasheet": model["ceilings"]["datasheet"],
        "big matrix product": model["ceilings"]["big_product"],
        "best kernel for each product": model["ceilings"]["best_kernels"],
    }
    known = [f"{what} {rate:.3f}" for what, rate in limits.items() if rate is not None]
    unknown = [what for what, rate in limits.items() if rate is None]
    yield f"Limits in TFLOP/s, {model['dtype']}: {', '.join(known)}" + (
        f"; {', '.join(unknown)}: not known here." if unknown else "."
    )
    yield model["ceilings"].get("says", "") + "\n"
    for stage in model["stages"]:
        yield from _table(stage["title"], stage)
    if model.get("ladder"):
        yield "\n| rung (each on top of those above) | ms | against the first | difference from float32 |\n|---|---|---|---|"
        for rung in model["ladder"]:
            yield f"| {rung['name']} | {1000 * rung['p50']:.1f} | {rung['ratio']:.2f}× | {rung['difference']:.2e} |"
    if model.get("options"):
        yield "\n| another picture, if asked for | takes | against as it is | change, of 255 |\n|---|---|---|---|"
        for option in model["options"]:
            yield f"| {option['name']} | {seconds(option['p50'])} | {option['ratio']:.2f}× | {option['change']:.2f} |"
    for title, memory in model.get("memory", {}).items():
        sizes = {who: "not known here" if size is None else f"{size / 2**30:.2f} GiB" for who, size in memory.items()}
        yield f"\nPeak memory, {title}: {', '.join(f'{who} {size}' for who, size in sizes.items())}."
    for text in model.get("notes", []):
        yield f"\n{text}"


def _table(title: str, stage: Report) -> Iterator[str]:
    yield f"\n**{title}**\n\n| | dtype | p50 | p90 | p99 | first | {stage['rate']} | rounds | ours is |"
    yield "|---" * 9 + "|"
    for who, row in stage["rows"].items():
        claim = row.get("against")
        said = f"{claim['ratio']:.2f}× [{claim['low']:.2f}, {claim['high']:.2f}] {claim['verdict']}" if claim else ""
        times = " | ".join(seconds(row[key]) for key in ("p50", "p90", "p99", "first"))
        yield f"| {who} | {row.get('dtype', '')} | {times} | {row['rate']:.3g} | {row['rounds']} | {said} |"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def plot(report: Report, path: Path) -> bool:
    """Bars of each stage's time against ours, with the interval, and the ladder. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rungs = {name: model["ladder"] for name, model in report["models"].items() if model.get("ladder")}
    figure, axes = pyplot.subplots(1, 1 + bool(rungs), figsize=(7 * (1 + bool(rungs)), 5), squeeze=False, layout="constrained")
    bars = list(_bars(report))
    ys = list(range(len(bars)))[::-1]
    errors = [[c["ratio"] - c["low"] for _, c in bars], [c["high"] - c["ratio"] for _, c in bars]]
    axes[0][0].barh(ys, [c["ratio"] for _, c in bars], xerr=errors, color=[COLOURS[c["verdict"]] for _, c in bars])
    axes[0][0].set_yticks(ys, [label for label, _ in bars])
    axes[0][0].axvline(1, color="black", linewidth=1)
    axes[0][0].set_xlabel("their time / ours, with the 95 % interval")
    for name, ladder in rungs.items():
        axes[0][1].plot([r["name"] for r in ladder], [r["ratio"] for r in ladder], marker="o", label=name)
    if rungs:
        axes[0][1].set_ylabel("speed against float32")
        pyplot.setp(axes[0][1].get_xticklabels(), rotation=30, ha="right", rotation_mode="anchor")
        axes[0][1].legend()
    figure.savefig(path)
    pyplot.close(figure)
    return True


COLOURS = {"faster": "tab:green", "slower": "tab:red", "no difference shown": "tab:gray"}


def _bars(report: Report) -> Iterator[tuple[str, Report]]:
    for name, model in report["models"].items():
        for stage in model["stages"]:
            for who, row in stage["rows"].items():
                if row.get("against"):
                    yield f"{name}, {stage['stage']}, {who}", row["against"]
