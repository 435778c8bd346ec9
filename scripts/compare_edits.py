"""How well do the methods of editing do?  python scripts/compare_edits.py data/drawings --out comparison

At least 100 edits of pictures that are composed of held-out drawings, so that it is known which part an edit is about. For each
method and strength: the CLIP score of the new words (the edit was done) against PSNR and a distance of features (LPIPS-like: the
autoencoder's encoder is the eye) outside the edited part (the rest was kept). Then how well each inversion rebuilds a picture that
is not edited. Writes a table, the numbers, a plot and a sheet; a run that was stopped goes on where it was.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cyclopts import run
from PIL import Image
from tqdm import tqdm

import latentdiff
from latentdiff.checkpoints.files import replacing, write_json
from latentdiff.editing import Edits
from latentdiff.evaluation.clip_score import ClipScorer
from latentdiff.evaluation.kept import Kept, fingerprint
from latentdiff.images import open_picture, tile, to_pil, to_tensor
from latentdiff.loading import embedded
from latentdiff.training.drawings import BACKGROUNDS, Drawings

KINDS = ("swap", "remove", "background")
RUNS: dict[str, list[dict[str, Any]]] = {  # method -> the points of its curve
    "img2img": [{"strength": s} for s in (0.3, 0.5, 0.7, 0.9)],
    "ddim": [{"strength": 1.0}],
    "null-text": [{"strength": 0.75, "steps": 8}],  # each of its steps costs forty of another method's
    "edit-friendly": [{"strength": s} for s in (0.5, 0.7, 0.9)],
    "prompt-to-prompt": [{"strength": s, "cross": 0.3, "self_attention": 0.7} for s in (0.5, 0.7, 0.9)],
}
REBUILT = {"ddim": 1.0, "edit-friendly": 1.0, "null-text": 7.5}  # inversion -> the guidance at which it must hold on
REBUILT_STEPS = 50
TOGETHER = 8  # edits in one network call


@dataclass(frozen=True)
class Task:
    """A picture, its words, the new words, and where [h, w] it must stay as it is."""

    kind: str
    picture: Image.Image
    source: str
    target: str
    kept: np.ndarray


@dataclass(frozen=True)
class Point:
    """A method at one setting, measured over all tasks."""

    method: str
    options: dict[str, Any]
    clip: float
    psnr: float
    distance: float


def main(
    drawings: Path, *, model: str | None = None, out: Path = Path("comparison"), n: int = 102, steps: int = 20,
    guidance: float | None = None, seed: int = 0, judge: Path | None = None, rebuild: int = 6, workers: int | None = None,
) -> None:  # fmt: skip
    """Compare the methods.

    Parameters
    ----------
    drawings
        The data set of drawings (scripts/build_dataset.py).
    model
        The model that edits; without it, the embedded one.
    out
        Folder for comparison.json, comparison.md, comparison.png and sheet.png.
    n
        Number of edits.
    judge
        A model folder with the CLIP that scores; without it, the editing model's own.
    steps
        Steps of each run.
    seed
        Of the choice of drawings, and of the first edit; the next has the next.
    rebuild
        Pictures that each inversion rebuilds, in 50 steps.
    workers
        Groups of edits at a time; without it, one a core of a CPU, and one on a GPU.
    """
    from matplotlib.figure import Figure  # before hours of edits, not after

    pipe = latentdiff.load(model)
    scorer = ClipScorer.from_folder(judge or (Path(model) if model else embedded()), pipe.device)
    todo = tasks(Drawings(drawings), n, pipe.spec.size, seed)
    workers = workers or (torch.get_num_threads() if pipe.device.type == "cpu" else 1)
    settings: dict[str, Any] = {"steps": steps, "guidance": guidance}
    weights = fingerprint(pipe.unet, pipe.vae, pipe.text)
    asked = {"weights": weights, "dtype": str(pipe.dtype), "drawings": drawings, "seed": seed, **settings}
    half_done = out / f"unfinished-{hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:8]}"
    points, shown = [nothing_done(pipe, scorer, todo)], {"before": [t.picture for t in todo]}
    for method, options in [(m, o) for m, several in RUNS.items() for o in several]:
        folder = half_done / "-".join(map(str, (method, *options.values())))
        after = edited(pipe, todo, method, settings | options, seed, folder, workers)
        points.append(measured(method, options, pipe, scorer, todo, after))
        if options == RUNS[method][len(RUNS[method]) // 2]:
            shown[method] = after
    found = rebuilt(pipe, todo[:rebuild], seed, Kept(half_done / "rebuilt.json", {}), workers) if rebuild else []
    text = table(points) + (rebuilt_table(found) if rebuild else "")
    write_json(out / "comparison.json", {"points": [asdict(p) for p in points], "rebuilt": found})
    (out / "comparison.md").write_text(text)
    print(text)
    plot(points, Figure(figsize=(11, 4.5), layout="constrained")).savefig(out / "comparison.png", dpi=120)
    rows = [[name, *(pictures[k] for pictures in shown.values())] for k, name in enumerate(t.target for t in todo[:12])]
    labels = [label for row in rows for label in (row[0], *list(shown)[1:])]
    tile([picture for row in rows for picture in row[1:]], len(shown), labels).save(out / "sheet.png")
    shutil.rmtree(half_done, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------------ edits


def edited(
    pipe: latentdiff.Pipeline, todo: Sequence[Task], method: str, settings: dict[str, Any], seed: int, folder: Path, workers: int
) -> list[Image.Image]:
    """The edit of each task, task k with seed + k. Each is written to the folder at once; what is there already is not made."""

    def make(group: Sequence[int]) -> None:
        own, asked = [todo[k] for k in group], {"method": method} | settings
        made = together(pipe, own, [t.target for t in own], seed + group[0], asked)
        for k, image in zip(group, made, strict=True):
            with replacing(folder / f"{k}.png") as part:
                image.save(part, "PNG")

    left = [g for g in grouped(len(todo), workers) if not all((folder / f"{k}.png").is_file() for k in g)]
    each(make, left, workers, folder.name)
    return [open_picture(folder / f"{k}.png") for k in range(len(todo))]


def grouped(n: int, workers: int) -> list[range]:
    """Which edits go through the network together: `TOGETHER`, or fewer where some worker would have nothing to do."""
    size = min(TOGETHER, -(-n // workers))
    return [range(n)[k : k + size] for k in range(0, n, size)]


def together(pipe: latentdiff.Pipeline, own: Sequence[Task], targets: Sequence[str], seed: int, asked: dict[str, Any]) -> Edits:
    pictures, sources = [t.picture for t in own], [t.source for t in own]
    return pipe.edit(pictures, source=sources, target=targets, seed=seed, batch=len(own), progress=False, **asked)


def rebuilt(pipe: latentdiff.Pipeline, todo: Sequence[Task], seed: int, kept: Kept, workers: int) -> list[dict[str, Any]]:
    """What each inversion makes of pictures that are not edited, in dB, what the autoencoder alone does, and the most lost."""
    rows = []
    for method, guidance in REBUILT.items():
        asked: dict[str, Any] = {"method": method, "guidance": guidance, "steps": REBUILT_STEPS}

        def report(group: range, asked: dict[str, Any] = asked) -> list[dict[str, float]]:
            own = todo[group.start : group.stop]
            edits = together(pipe, own, [t.source for t in own], seed + group.start, asked)
            return [asdict(r) for r in edits.reports if r is not None]

        def part(group: range, method: str = method, report: Callable[[range], Any] = report) -> list[dict[str, float]]:
            return kept(f"{method} {group}", lambda: report(group))

        found = [r for some in each(part, grouped(len(todo), workers), workers, f"{method} rebuilds") for r in some]
        mean = {name: float(np.mean([r[name] for r in found])) for name in ("rebuilt", "limit")}
        lost = max(r["limit"] - r["rebuilt"] for r in found)
        rows.append({"method": method, "guidance": guidance, "steps": REBUILT_STEPS, "pictures": len(found), **mean, "lost": lost})
    return rows


def each(work: Callable[[Any], Any], items: Sequence[Any], workers: int, about: str) -> list[Any]:
    """`work` of every item in threads, which share the cores: one core a thread serves small networks best."""
    all_cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(max(1, all_cores // workers),))
    try:
        return list(tqdm(pool.map(work, items), total=len(items), desc=about, dynamic_ncols=True))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(all_cores)  # what a thread sets is also what every thread starts with that comes later


# ------------------------------------------------------------------------------------------------------------------ tasks


def tasks(drawings: Drawings, n: int, size: int, seed: int) -> list[Task]:
    rng = np.random.default_rng(seed)
    return [task(KINDS[k % len(KINDS)], drawings, size, rng) for k in range(n)]


def task(kind: str, drawings: Drawings, size: int, rng: np.random.Generator) -> Task:
    """swap, remove: two drawings side by side, the right one is edited. background: one drawing, all but it is edited."""
    a, b = rng.choice(drawings.held_out, 2, replace=False)
    first, second = (drawings.prompt(drawings.records[k]["concept"]) for k in (a, b))
    if kind == "background":
        old, new = rng.choice(list(BACKGROUNDS), 2, replace=False)
        picture, cover = composed(drawings, [(a, 0.5, 0.8)], BACKGROUNDS[old], size)
        return Task(kind, picture, f"{first} on a {old} background", f"{first} on a {new} background", cover > 0.95)
    picture, _ = composed(drawings, [(a, 0.26, 0.48), (b, 0.74, 0.48)], (255, 255, 255), size)
    left = np.zeros((size, size), bool)
    left[:, : size // 2] = True
    other = drawings.prompt(rng.choice(drawings.everyday))
    return Task(kind, picture, f"{first} and {second}", first if kind == "remove" else f"{first} and {other}", left)


def composed(
    drawings: Drawings, parts: Sequence[tuple[int, float, float]], background: tuple[int, int, int], size: int
) -> tuple[Image.Image, np.ndarray]:
    """(picture, how much each pixel is covered): drawings at (middle, side), in picture sides, on one colour."""
    canvas, cover = np.full((size, size, 3), background, float), np.zeros((size, size))
    for index, x, side in parts:
        k = round(side * size)
        pixels = torch.from_numpy(np.array(drawings.pixels[index])).permute(2, 0, 1)[None].float()
        small = F.interpolate(pixels, (k, k), mode="area")[0].permute(1, 2, 0).numpy()  # premultiplied by alpha
        left, top = round(x * size - k / 2), round(size / 2 - k / 2)
        place = (slice(top, top + k), slice(left, left + k))
        alpha = small[..., 3] / 255
        canvas[place] = small[..., :3] + canvas[place] * (1 - alpha[..., None])
        cover[place] = np.maximum(cover[place], alpha)
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8)), cover


# ---------------------------------------------------------------------------------------------------------------- measuring


def nothing_done(pipe: latentdiff.Pipeline, scorer: ClipScorer, todo: Sequence[Task]) -> Point:
    """Encoded and decoded only: all is kept that can be, and nothing is done."""
    return measured("nothing", {}, pipe, scorer, todo, [through_vae(pipe, t.picture) for t in todo])


def through_vae(pipe: latentdiff.Pipeline, picture: Image.Image) -> Image.Image:
    decoded = pipe.decode(pipe.encode(to_tensor([picture])))
    return to_pil(decoded)[0]


def measured(
    method: str, options: dict[str, Any], pipe: latentdiff.Pipeline, scorer: ClipScorer, todo: Sequence[Task],
    after: Sequence[Image.Image],
) -> Point:  # fmt: skip
    clip = scorer.score(after, [t.target for t in todo]).mean().item()
    errors = [psnr_where(t.picture, image, t.kept) for t, image in zip(todo, after, strict=True)]
    far = [distance_where(pipe, t.picture, image, t.kept) for t, image in zip(todo, after, strict=True)]
    return Point(method, options, clip, float(np.mean(errors)), float(np.mean(far)))


def psnr_where(a: Image.Image, b: Image.Image, where: np.ndarray) -> float:
    off = (np.asarray(a, float) - np.asarray(b, float))[where]
    return 10 * math.log10(255**2 / max(float(np.mean(off**2)), 1e-3)) if off.size else math.nan


@torch.no_grad()
def distance_where(pipe: latentdiff.Pipeline, a: Image.Image, b: Image.Image, where: np.ndarray) -> float:
    """Mean over the encoder's levels of the squared distance of unit feature vectors, in the places that `where` covers."""
    found = [features(pipe, image) for image in (a, b)]
    mask, total = torch.from_numpy(where)[None, None].float(), 0.0
    for x, y in zip(*found, strict=True):
        weight = F.interpolate(mask, x.shape[-2:], mode="area").to(x.device)
        total += (((F.normalize(x) - F.normalize(y)).square().sum(1, keepdim=True) * weight).sum() / weight.sum()).item()
    return total / len(found[0])


def features(pipe: latentdiff.Pipeline, image: Image.Image) -> list[torch.Tensor]:
    kept: list[torch.Tensor] = []
    blocks = getattr(pipe.vae.encoder, "down_blocks", None)
    if blocks is None:
        raise ValueError("model must have a KL autoencoder, whose encoder compares the pictures")
    hooks = [block.register_forward_hook(lambda _m, _i, output: kept.append(output.float())) for block in blocks]
    pipe.encode(to_tensor([image]))
    for hook in hooks:
        hook.remove()
    return kept


# ---------------------------------------------------------------------------------------------------------------- reporting


def above(point: Point, curve: Sequence[Point]) -> float | None:
    """dB of kept picture that a point has over a curve at its own CLIP score, at least: over the curve's end where it lies beyond
    the highest score; None below the lowest. The curve is the best of its method: a point that another beats in both is none of it.
    """
    pairs = sorted((p.clip, p.psnr) for p in curve if not any(q.clip > p.clip and q.psnr > p.psnr for q in curve))
    clips, kept = [clip for clip, _ in pairs], [psnr for _, psnr in pairs]
    return point.psnr - float(np.interp(point.clip, clips, kept)) if point.clip >= clips[0] else None


def table(points: Sequence[Point]) -> str:
    curve = [p for p in points if p.method == "img2img"]
    rows = [
        "| method | setting | CLIP score | PSNR outside, dB | distance | over img2img, dB |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        setting = ", ".join(f"{k} {v}" for k, v in p.options.items())
        more = above(p, curve) if p.method not in ("img2img", "nothing") else None
        over = "" if more is None else f"{more:+.2f}"
        rows.append(f"| {p.method} | {setting} | {p.clip:.2f} | {p.psnr:.2f} | {p.distance:.4f} | {over} |")
    return "\n".join(rows) + "\n"


def rebuilt_table(rows: Iterable[dict[str, Any]]) -> str:
    lines = [
        "",
        "| inversion | guidance | steps | pictures | rebuilt, dB | the autoencoder alone, dB | most lost, dB |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        numbers = " | ".join(f"{r[name]:.2f}" for name in ("rebuilt", "limit", "lost"))
        lines.append(f"| {r['method']} | {r['guidance']:g} | {r['steps']} | {r['pictures']} | {numbers} |")
    return "\n".join(lines) + "\n"


def plot(points: Sequence[Point], figure: Any) -> Any:
    """The methods' curves, drawn in an empty matplotlib figure."""
    for axes, name, label in zip(
        figure.subplots(1, 2), ("psnr", "distance"), ("PSNR outside the edit, dB", "feature distance outside the edit"), strict=True
    ):
        for method in dict.fromkeys(p.method for p in points):
            own = [p for p in points if p.method == method]
            axes.plot([p.clip for p in own], [getattr(p, name) for p in own], "o-", label=method)
        axes.set_xlabel("CLIP score of the new words")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


if __name__ == "__main__":
    run(main)
