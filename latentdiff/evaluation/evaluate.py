"""What `latentdiff evaluate` measures: a model's pictures against their prompts and against held-out pictures, and its VAE.

Each number is explained in MEANINGS, which the report repeats. The judge is by default the model's own CLIP. It works offline and
knows the kind of pictures, but the U-Net listens to the same text tower: its numbers compare settings and trainings of one
model, not models of others; name an `open_clip` judge for that.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff import __version__
from latentdiff.checkpoints.files import write_json, write_text
from latentdiff.diffusion.samplers import SAME, SAMPLERS, bind, resolve
from latentdiff.diffusion.schedules import grid
from latentdiff.evaluation.clip_score import ClipScorer, clip_score, ranks, top
from latentdiff.evaluation.fid import frechet_distance, kernel_distance
from latentdiff.evaluation.kept import Kept, fingerprint
from latentdiff.images import parse_parameters, save_image, tile, to_pil, to_tensor
from latentdiff.loading import embedded, load
from latentdiff.pipeline import Pipeline
from latentdiff.request import final
from latentdiff.training.data import open_source
from latentdiff.training.drawings import Drawings

BATCH = 16  # pictures in one network call: on a CPU at a third of the time of one by one, and equal to them but for rounding
SHOWN = 64  # pictures in the sheet

MEANINGS = {
    "clip_score": "100 · cosine of each picture and its prompt, averaged (0 to 100); to be compared with clip_score_real.",
    "clip_score_real": "The same for held-out pictures and their own words: about what perfect pictures would get.",
    "top1": "Generated pictures, in %, whose prompt suits them best among all names, in the judge's eyes.",
    "top5": "The same, among the best five.",
    "top1_real": "Held-out pictures, in %, whose own name suits them best: the judge's own zero-shot accuracy, a ceiling for top1.",
    "top5_real": "The same, among the best five.",
    "fid": "Fréchet distance of the judge's features, generated for the held-out pictures' words, against those (0 is best).",
    "fid_floor": "The same for other people's drawings of the same things in the pictures' place: what a perfect model might get.",
    "kid": "Kernel distance · 1000 of the same two sets; unbiased, so that sets of other sizes compare (0 is best, may be below).",
    "kid_floor": "The same for other people's drawings of the same things.",
    "vae_psnr": "dB between held-out pictures and what the VAE makes of them, 8 bits, averaged over pictures (higher is better).",
    "seconds": "Wall-clock seconds for a generated picture, on this machine, as busy as it was.",
}


MOST_STEPS = 1000  # of any schedule that we know


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`latentdiff evaluate`."""

    data: Path
    """Built drawings (scripts/build_dataset.py), or a folder or tar of captioned pictures, of which training has seen none."""
    model: str | None = None
    """A model file, folder or hub id; the embedded model if not given."""
    out: Path = Path("evaluation")
    """Folder for evaluation.json, evaluation.md and pictures.png."""
    prompts: int = 300
    """Pictures to generate for the zero-shot accuracy: of everyday ideas, or of captions of the `pictures` compared with."""
    pictures: int = 500
    """Most held-out pictures to compare with, and to generate for that."""
    guidance: float | None = None
    """Guidance scale; the model's own if not given. Steps, sampler likewise."""
    steps: int | None = None
    """Sampling steps."""
    sampler: str | None = None
    """Sampler."""
    seed: int = 0
    """Of the choice of prompts, and of the first picture; the next has the next."""
    batch: int = BATCH
    """Pictures in one network call; on a GPU 128 is faster."""
    samplers: tuple[str, ...] = ()
    """Samplers to compare, each at each of `sampler_steps`, also with a grid: "DPM++ 2M Karras". "all" is all of the table."""
    sampler_steps: tuple[int, ...] = (5, 10, 20)
    """Step counts at which samplers are compared."""
    sampler_pictures: int = 64
    """Pictures to generate for each of those: this times the sum of the steps times the samplers is what it costs."""
    samplers_alone: bool = False
    """Compare samplers and measure nothing else."""
    judge: str | None = None
    """Another CLIP as judge: open_clip's name for it, "=", and a file with its weights, as in ViT-B-32=weights.safetensors."""
    device: str | None = None
    """cpu, cuda, mps; the best there is if not given."""
    dtype: str | None = None
    """float32, float16, bfloat16; the device's usual one if not given."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        for name, low in (("prompts", 1), ("pictures", 2), ("sampler_pictures", 2), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)!r}")
        if not self.data.exists():
            raise FileNotFoundError(f"data: {self.data} does not exist")
        if self.out.exists() and not self.out.is_dir():
            raise NotADirectoryError(f"out must be a folder, got {self.out}, which is a file")
        if self.judge is not None and not all(self.judge.partition("=")):
            raise ValueError(f"judge must be NAME=FILE, as in ViT-B-32=weights.safetensors, got {self.judge!r}")
        for name in self.compared:
            resolve(name)
        if self.samplers_alone and not self.samplers:
            raise ValueError("samplers must be named, or all, where they alone are compared; got none")
        if not self.sampler_steps or not all(1 <= steps <= MOST_STEPS for steps in self.sampler_steps):
            raise ValueError(f"sampler_steps must be numbers from 1 to {MOST_STEPS}, got {list(self.sampler_steps)}")
        if self.steps is not None and not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps must be from 1 to {MOST_STEPS}, got {self.steps!r}")
        if self.sampler is not None:
            resolve(self.sampler)

    @property
    def compared(self) -> tuple[str, ...]:
        """The samplers in the order given, each once."""
        return tuple(dict.fromkeys(name for given in self.samplers for name in (SAMPLERS if given == "all" else [given])))


@dataclass(frozen=True, eq=False)
class Exam:
    """What a model is asked, and what its answers are held against."""

    prompts: list[str]  # what to draw
    names: list[str]  # all that a picture might be called: distinct, with every prompt and caption among them
    captions: list[str]  # of the held-out pictures
    held_out: list[Image.Image]
    others: list[Image.Image] = field(default_factory=list)  # of the same things, not by the model; may be none


@dataclass(frozen=True, eq=False)
class Report:
    """Numbers by their names in MEANINGS, a row for each sampler and step count, and how all of it was measured."""

    numbers: Mapping[str, float]
    samplers: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    def markdown(self) -> str:
        lines = ["# Evaluation", "", ", ".join(f"{k} {v}" for k, v in self.settings.items())]
        if self.numbers:
            lines += ["", "| measure | value | what it means |", "| --- | --- | --- |"]
            lines += [f"| {name} | {value:.4g} | {MEANINGS[name]} |" for name, value in self.numbers.items()]
        if self.samplers:
            lines += ["", *sampler_table(self.samplers)]
        return "\n".join(lines) + "\n"


def sampler_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of Markdown: a row for each sampler and grid, columns of steps; names of one rule share a row, bold is the best."""
    steps, found = list(dict.fromkeys(row["steps"] for row in rows)), {}
    for row in rows:
        sampler, spacing = resolve(row["sampler"])
        names, at = found.setdefault((row["rule"], spacing or row["spacing"]), ({}, {}))
        names[sampler], at[row["steps"]] = None, row
    heads = ["sampler", "grid", "evaluations", *(f"{what} {n}" for what in ("FID", "CLIP") for n in steps)]
    best = {("fid", n): min(at[n]["fid"] for _, at in found.values()) for n in steps}
    best |= {("clip_score", n): max(at[n]["clip_score"] for _, at in found.values()) for n in steps}

    def cell(row: Mapping[str, Any], what: str) -> str:
        text = f"{row[what]:.1f}"
        return f"**{text}**" if text == f"{best[what, row['steps']]:.1f}" else text

    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " --: |" * (len(heads) - 2)]
    for (_, spacing), (names, at) in found.items():
        cells = [", ".join(names), spacing, ", ".join(str(at[n]["evaluations"]) for n in steps)]
        lines.append(f"| {' | '.join([*cells, *(cell(at[n], what) for what in ('fid', 'clip_score') for n in steps)])} |")
    note = (
        f"FID (0 is best) and CLIP score at the numbers of steps in the heads, of {rows[0]['pictures']} pictures a cell;"
        " so few raise FID: compare cells with each other alone. What a run costs are its evaluations of the network."
    )
    return [note, "", *lines]


def evaluate(config: Evaluation) -> Report:
    """Measure a model, and write what comes out to `config.out`. A measurement that was stopped goes on where it was.

    Errors: those of loading the model and the data; ValueError for a model without a CLIP of its own, if no judge is named.
    """
    pipe = load(config.model, device=config.device, dtype=config.dtype)
    exam = open_exam(config, pipe.spec.size)
    judge = open_judge(config, pipe.device)
    kept = Kept(config.out / "unfinished.json", question(config, pipe, exam))
    numbers, recipe = ({}, {}) if config.samplers_alone else measure(pipe, judge, exam, config, kept)
    rows = compare_samplers(pipe, judge, exam, config, kept)
    recipe = recipe or {"guidance": rows[0]["guidance"], "seed": config.seed}  # the rest stands in each row
    report = Report(numbers, rows, settings(pipe, judge, exam, recipe) | {"batch": config.batch})
    write_json(config.out / "evaluation.json", asdict(report))
    write_text(config.out / "evaluation.md", report.markdown())
    kept.done()
    return report


def measure(
    pipe: Pipeline, judge: ClipScorer, exam: Exam, config: Evaluation, kept: Kept
) -> tuple[dict[str, float], dict[str, Any]]:
    """All numbers but those of the samplers, and the recipe of the first generated picture."""
    drawn = kept("zero-shot", lambda: zero_shot(pipe, judge, exam, config))
    numbers = drawn["numbers"] | kept("FID", lambda: distances(judge, exam, generate(pipe, exam.captions, config, "FID")[0]))
    numbers |= {"vae_psnr": kept("VAE", lambda: vae_psnr(pipe, exam.held_out)), "seconds": drawn["seconds"]}
    return numbers, drawn["recipe"]


def question(config: Evaluation, pipe: Pipeline, exam: Exam) -> dict[str, Any]:
    """What the numbers depend on; which samplers are compared is no part of it."""
    free = ("out", "samplers", "sampler_steps", "samplers_alone", "progress")
    asked = {key: value for key, value in asdict(config).items() if key not in free}
    asked |= {"weights": fingerprint(pipe.unet, pipe.vae, pipe.text), "sampling": asdict(pipe.spec.sampling)}
    words, pictures = (exam.prompts, exam.names, exam.captions), (*exam.held_out, *exam.others)
    asked["exam"] = hashlib.sha256(b"".join([repr(words).encode(), *(picture.tobytes() for picture in pictures)])).hexdigest()[:16]
    return asked | {"dtype": str(pipe.dtype), "version": __version__}


def show(config: Evaluation) -> None:
    """`latentdiff evaluate`: measure, write, and print the tables."""
    print(evaluate(config).markdown(), end="")


def settings(pipe: Pipeline, judge: ClipScorer, exam: Exam, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What another needs to know to get the same numbers; recipe: that of the first generated picture."""
    chosen = {k: recipe[k] for k in ("sampler", "spacing", "steps", "guidance", "seed") if k in recipe}
    return {
        "model": pipe.title, "version": f"latentdiff {__version__}", "judge": judge.name,
        "prompts": len(exam.prompts), "names": len(exam.names), "held-out": len(exam.held_out), **chosen,
        "device": str(pipe.device), "dtype": str(pipe.dtype).removeprefix("torch."),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- questions


def open_exam(config: Evaluation, size: int) -> Exam:
    """Questions from built drawings, or from captioned pictures. Errors: ValueError for too few to compare with."""
    built = (config.data / "index.json").is_file()
    exam = drawings_exam(Drawings(config.data), config, size) if built else pictures_exam(config, size)
    if len(exam.held_out) < 2:
        raise ValueError(f"data must hold at least 2 held-out pictures, got {len(exam.held_out)} in {config.data}")
    return exam


def drawings_exam(drawings: Drawings, config: Evaluation, size: int) -> Exam:
    """Everyday ideas to draw; all concepts as names; the held-out drawings, and what other hands made of their concepts."""
    held_out = drawings.held_out[: config.pictures]
    concepts = [drawings.records[i]["concept"] for i in held_out]
    by_others = [
        next(i for i in drawings.hands[c] if drawings.records[i]["style"] != drawings.records[k]["style"])
        for c, k in zip(concepts, held_out, strict=True)
    ]
    everyday = list(dict.fromkeys(map(drawings.prompt, drawings.everyday)))
    return Exam(
        prompts=picked(everyday, config.prompts, config.seed),
        names=list(dict.fromkeys(map(drawings.prompt, drawings.concepts))),
        captions=[drawings.prompt(c) for c in concepts],
        held_out=[Image.fromarray(drawings.plain(i, size)) for i in held_out],
        others=[Image.fromarray(drawings.plain(i, size)) for i in by_others],
    )


def pictures_exam(config: Evaluation, size: int) -> Exam:
    """Captioned pictures: their captions are prompts and names at once."""
    source = open_source(config.data, size)
    found = [source.get(i, config.seed) for i in picked(range(len(source)), config.pictures, config.seed)]
    captions = [caption for _, caption in found]
    names = list(dict.fromkeys(captions))
    held_out = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image, _ in found]
    return Exam(prompts=picked(names, config.prompts, config.seed), names=names, captions=captions, held_out=held_out)


def picked(items: Sequence[Any], n: int, seed: int) -> list[Any]:
    """n of the items, or all if there are fewer, in their order."""
    chosen = np.random.default_rng(seed).permutation(len(items))[:n]
    return [items[i] for i in sorted(chosen)]


def open_judge(config: Evaluation, device: torch.device) -> ClipScorer:
    if config.judge is not None:
        name, _, weights = config.judge.partition("=")
        return ClipScorer.from_open_clip(name, weights, device)
    folder = embedded() if config.model is None else Path(config.model)
    if not (folder / "clip" / "config.json").is_file():
        raise ValueError(
            f"judge must be named: {folder} has no CLIP of its own (clip/config.json); as in ViT-B-32=weights.safetensors"
        )
    return ClipScorer.from_folder(folder, device)


# ------------------------------------------------------------------------------------------------------------- answers


def generate(
    pipe: Pipeline, prompts: Sequence[str], config: Evaluation, what: str, **options: Any
) -> tuple[list[Image.Image], float]:
    """A picture of each prompt, and the seconds that one took. options: as for `pipe`, before the configured ones."""
    keywords = {"guidance": config.guidance, "steps": config.steps, "sampler": config.sampler, "batch": config.batch, **options}
    drawn, began = [], time.perf_counter()
    with tqdm(total=len(prompts), desc=what, unit="picture", disable=not config.progress, dynamic_ncols=True) as bar:
        for start in range(0, len(prompts), config.batch):
            chunk = list(prompts[start : start + config.batch])
            drawn += pipe(chunk, seed=config.seed + start, progress=False, **keywords)
            bar.update(len(chunk))
    return drawn, (time.perf_counter() - began) / len(prompts)


def zero_shot(pipe: Pipeline, judge: ClipScorer, exam: Exam, config: Evaluation) -> dict[str, Any]:
    """Numbers, seconds a picture and the first one's recipe of pictures of the prompts; some are written as pictures.png."""
    drawn, seconds = generate(pipe, exam.prompts, config, "zero-shot")
    save_image(tile(drawn[:SHOWN], columns=8, labels=exam.prompts[:SHOWN]), config.out / "pictures.png")
    recipe = parse_parameters(drawn[0].info["parameters"])[0]
    return {"numbers": drawn_numbers(judge, judge.texts(exam.names), exam, drawn), "seconds": seconds, "recipe": recipe}


def drawn_numbers(judge: ClipScorer, names: Tensor, exam: Exam, drawn: Sequence[Image.Image]) -> dict[str, float]:
    """CLIP score and zero-shot accuracy of generated pictures, and of the held-out ones."""
    found, index = {}, {name: i for i, name in enumerate(exam.names)}
    for suffix, images, texts in (("", drawn, exam.prompts), ("_real", exam.held_out, exam.captions)):
        features, own = judge.images(images), torch.tensor([index[text] for text in texts])
        rank = ranks(features, names, own)
        found |= {f"clip_score{suffix}": clip_score(features, names[own]).mean().item()}
        found |= {f"top1{suffix}": top(rank, 1), f"top5{suffix}": top(rank, 5)}
    return {name: found[name] for name in MEANINGS if name in found}


def distances(judge: ClipScorer, exam: Exam, drawn: Sequence[Image.Image]) -> dict[str, float]:
    """FID and KID of generated pictures, and of other people's, against the held-out ones."""
    real, found = judge.images(exam.held_out), {}
    for suffix, images in (("", drawn), ("_floor", exam.others)):
        if images:
            features = judge.images(images)
            found |= {f"fid{suffix}": frechet_distance(features, real), f"kid{suffix}": 1000 * kernel_distance(features, real)}
    return {name: found[name] for name in MEANINGS if name in found}


def vae_psnr(pipe: Pipeline, pictures: Sequence[Image.Image]) -> float:
    """10 log10(255² / mean squared error) of each picture sent through the VAE, in 8 bits, averaged."""
    found = []
    for picture in pictures:
        back = to_pil(pipe.decode(pipe.encode(to_tensor([picture]))))[0]
        error = np.square(np.asarray(picture, np.float64) - np.asarray(back, np.float64)).mean()
        found.append(10 * np.log10(255**2 / max(error, 1e-6)))
    return float(np.mean(found))


def compare_samplers(pipe: Pipeline, judge: ClipScorer, exam: Exam, config: Evaluation, kept: Kept) -> list[dict[str, Any]]:
    """FID, KID, CLIP score and time of each sampler at each number of steps, on the first held-out pictures' words."""
    if not config.compared:
        return []
    captions, rows = exam.captions[: config.sampler_pictures], []
    real, texts = judge.images(exam.held_out), judge.texts(captions)

    def row(name: str, steps: int) -> dict[str, float]:
        drawn, seconds = generate(pipe, captions, config, f"{name}, {steps} steps", sampler=name, steps=steps)
        features, recipe = judge.images(drawn), parse_parameters(drawn[0].info["parameters"])[0]
        return {
            "spacing": recipe["spacing"],
            "evaluations": evaluations(pipe, recipe),
            "guidance": recipe["guidance"],
            "fid": frechet_distance(features, real),
            "kid": 1000 * kernel_distance(features, real),
            "clip_score": clip_score(features, texts).mean().item(),
            "seconds": seconds,
        }

    for name in config.compared:
        sampler, spacing = resolve(name)
        twin, own = SAME.get(sampler, sampler), pipe.spec.sampling
        rule = (twin if final(twin, own) == final(sampler, own) else sampler, spacing)
        for steps in config.sampler_steps:
            found = kept(f"{rule}, {steps} steps", lambda name=name, steps=steps: row(name, steps))
            rows.append({"sampler": name, "rule": rule[0], "steps": steps, "pictures": len(captions)} | found)
    return rows


def evaluations(pipe: Pipeline, recipe: Mapping[str, Any]) -> int:
    """How often a run calls the network: the sampler at work on a single number."""
    called = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        called.append(sigma)
        return x

    own = pipe.spec.sampling
    sigmas = grid(pipe.schedule, recipe["steps"], recipe["spacing"], offset=own.steps_offset, final=final(recipe["sampler"], own))
    for _ in bind(recipe["sampler"], pipe.schedule)(denoise, torch.ones(1), sigmas, randn=torch.zeros_like):
        pass
    return len(called)
