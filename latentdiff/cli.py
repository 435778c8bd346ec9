"""The command line: each command calls one library function.

To add a command, write a function whose annotated arguments are its options and whose docstring is its help, and put `@app.command`
above it; one that draws takes its model as `Loading`. Import inside the function: `latentdiff --help` loads no torch. A function
elsewhere can be named by its path, as the trainers are.
"""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import cyclopts
from cyclopts import App, Parameter

from latentdiff import __version__

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline


def exactly(kind: Any, tokens: Sequence[cyclopts.Token]) -> Any:
    """What the tokens say; cyclopts alone rounds 2.6 steps to 3. Errors: ValueError for a fraction where it must be whole."""

    def kinds(kind: Any) -> set[Any]:
        return set().union(*map(kinds, get_args(kind))) if get_args(kind) else {kind}

    if int in kinds(kind) and float not in kinds(kind):
        for token in tokens:
            if "." in token.value:
                name = f"{token.keyword} " if len(tokens) > 1 and token.keyword else ""  # else cyclopts says it
                raise ValueError(f"{name}must be a whole number, got {token.value}")
    return cyclopts.convert(kind, tokens)


app = App(
    name="latentdiff",
    help="Latent text-to-image diffusion. Every command has its own --help; --debug shows where an error comes from.",
    version=__version__,
    help_format="plaintext",
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    default_parameter=Parameter(consume_multiple=True, negative_iterable=(), converter=exactly),
)
train = App(name="train", help="Train a network; a run that was stopped goes on.", default_parameter=Parameter(name="*"))
app.command(train)
train.command("latentdiff.training.vae:train_vae", name="vae", help="Train the autoencoder: pictures to latents and back.")
train.command("latentdiff.training.clip:train_clip", name="clip", help="Train a CLIP: captions and pictures.")
train.command("latentdiff.training.unet:train_unet", name="unet", help="Train the denoising U-Net on latents.")

DType = Literal["float32", "float16", "bfloat16"]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Loading:
    """The model of a command that draws, and how it is loaded."""

    model: Annotated[str | None, Parameter(alias="-m")] = None
    """A file, a folder or a hub id (owner/name). Without it, the embedded model."""
    device: str | None = None
    """cpu, cuda, mps, …; without it, the best that there is."""
    dtype: DType | None = None
    """Of the networks; without it what the device does best, which doctor tells."""
    prediction: Literal["eps", "v", "x0"] | None = None
    """What the U-Net predicts, where the model's files do not say."""
    vae: str | None = None
    """Another autoencoder: a file, a folder or a hub id."""
    lora: list[str] | None = None
    """Files of LoRAs, each with its scale: flat.safetensors:0.8"""
    embedding: list[str] | None = None
    """Files of textual inversion; the word for each is the file's own, or its name, or another: toy.safetensors:mytoy"""
    allow_pickle: bool = False
    """Also read .ckpt and .bin files (tensors only; nothing in them is executed)."""
    int8: bool = False
    """The U-Net's products in 8 bits, on a CPU with VNNI or AMX: large models are faster, the picture is nearly the same."""

    def load(self, *, compile: bool = False) -> Pipeline:
        """Errors: those of `latentdiff.load`; ValueError for a LoRA or a textual inversion that is named twice."""
        from latentdiff.checkpoints.adapted import scaled, worded
        from latentdiff.loading import load

        added = {"lora": [*map(scaled, self.lora or [])], "embeddings": [*map(worded, self.embedding or [])]}
        for name, pairs in added.items():
            if len(dict(pairs)) < len(pairs):
                raise ValueError(f"{name} must name each file once, got {', '.join(file for file, _ in pairs)}")
        return load(
            self.model,
            device=self.device,
            dtype=self.dtype,
            prediction=self.prediction,
            vae=self.vae,
            lora=dict(added["lora"]),
            embeddings=dict(added["embeddings"]),
            allow_pickle=self.allow_pickle,
            compile=compile,
            int8=self.int8,
        )

    def hint(self, *lists: list[str] | None) -> str:
        """Said where nothing is left of what comes without a name, after an option that takes all that follows it."""
        return "; put them before options that take several values" if any((self.lora, self.embedding, *lists)) else ""


EMBEDDED = Loading()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. What goes wrong is one line on stderr and exit code 2; with --debug, the traceback."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    if not debug:
        warnings.showwarning = lambda message, *_: print(f"latentdiff: {message}", file=sys.stderr)
    try:
        code = app([token for token in given if token != "--debug"])
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and no_more_is_read():
            sys.exit(141)
        if debug or not is_expected(error):
            raise
        print(f"latentdiff: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def no_more_is_read() -> bool:
    """Whether who reads our lines, such as `head`, has seen enough (not known on Windows); then nothing more is written."""
    if not hasattr(select, "poll"):
        return False
    lines = select.poll()
    lines.register(sys.stdout.fileno(), 0)
    ended = any(event & (select.POLLERR | select.POLLHUP) for _, event in lines.poll(0))
    if ended:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ended


def is_expected(error: Exception) -> bool:
    """Whether a user can mend it: wrong arguments and files, a damaged model, too little memory, a package that is missing."""
    from cyclopts import CycloptsError

    kinds = (CycloptsError, ValueError, OSError, FloatingPointError, ImportError, MemoryError)
    return isinstance(error, kinds) or type(error).__name__ == "OutOfMemoryError"


def one_line(error: BaseException) -> str:
    if isinstance(error, ImportError) and isinstance(error.__cause__, ImportError):  # cyclopts names the module, not what it lacks
        return one_line(error.__cause__)
    return " ".join(str(error).split()) or type(error).__name__


@app.command
def generate(
    *prompts: str,
    out: Annotated[str, Parameter(alias="-o")] = "./",
    n: Annotated[int, Parameter(name="-n")] = 1,
    prompts_file: Path | None = None,
    recipe: Path | None = None,
    negative: str | None = None,
    guidance: str | None = None,
    rescale: float | None = None,
    syntax: str | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    spacing: str | None = None,
    eta: float | None = None,
    seed: int | None = None,
    size: str | None = None,
    batch: int | None = None,
    grid: bool = False,
    labels: bool = False,
    columns: int | None = None,
    loading: Loading = EMBEDDED,
    refiner: str | None = None,
    handoff: float | None = None,
    compile: bool = False,
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> None:
    """Make pictures from text and write them, with the recipe that makes them again.

    Parameters
    ----------
    prompts
        What to draw; several texts make several pictures.
    out
        File (.png, .jpg, .webp; several pictures get -1, -2, …; what has the name is replaced) or folder/ (files are called after
        prompt and seed; none is replaced).
    n
        Pictures of each prompt; picture k has seed + k.
    prompts_file
        A text file of more prompts, one a line.
    recipe
        A picture's file, which carries its recipe: make it again. Options given beside it change the recipe.
    negative
        What not to draw.
    guidance
        How strongly the prompt leads; 1 is the prompt alone. 7.5 for most models. Or rules: "cfg(7.5) + pag(2)".
    rescale
        From 0 to 1: correct the overexposure that strong guidance brings.
    syntax
        What (brackets) and [brackets] in prompts mean: a1111 (the default), a1111-no-norm, comfyui or plain.
    steps
        Network evaluations, 30 for most models.
    sampler
        ddim, ddpm, dpmpp_2m, "Euler a", "DPM++ 2M Karras", …: `latentdiff samplers` lists them.
    spacing
        trailing, leading, linspace, karras, …
    eta
        From 0 to 1: how much noise a sampler adds that takes this option.
    seed
        From 0 to 2^64 - 1; without it, one is drawn and printed.
    size
        Side in pixels, or WIDTHxHEIGHT.
    batch
        Pictures in one network call.
    grid
        Write one picture that shows all of them.
    labels
        With --grid: write the prompt under each picture.
    columns
        With --grid: columns, at most.
    refiner
        A second model that finishes the pictures (SDXL's refiner): a file, a folder or a hub id.
    handoff
        From 0 to 1: the share of the noise levels before the refiner takes over; 0.8.
    compile
        Compile the U-Net first: slow to start, then faster.
    quiet
        No progress bar.
    """
    options = {
        "prompt": [*prompts, *read_prompts(prompts_file)] or None,
        "negative": negative,
        "guidance": guidance,
        "rescale": rescale,
        "syntax": syntax,
        "steps": steps,
        "sampler": sampler,
        "spacing": spacing,
        "eta": eta,
        "seed": seed,
        "size": None if size is None else sides(size),
        "n": n,
        "batch": batch,
    }
    options = {name: value for name, value in options.items() if value is not None}
    known, marks = ({}, {}) if recipe is None else recalled(recipe, pictured=False)
    options = known | options
    if "prompt" not in options:
        raise ValueError(f'prompts must be at least one text, such as latentdiff generate "a cat", got none{loading.hint()}')
    check_grid(out, grid, labels, columns)
    texts = 1 if isinstance(options["prompt"], str) else len(options["prompt"])
    check_out(out, 1 if grid else n * texts, [recipe, prompts_file])
    if handoff is not None and refiner is None:
        raise ValueError(f"handoff needs refiner, the model that takes over, got handoff {handoff} alone")

    pipe = loading.load(compile=compile)
    if refiner is None:
        images = pipe(**options, progress=not quiet)
    else:
        from latentdiff.refining import refine

        options |= {} if handoff is None else {"handoff": handoff}
        second = replace(loading, model=refiner, prediction=None, lora=None, embedding=None).load(compile=compile)
        images = refine(pipe, second, options.pop("prompt"), **options, progress=not quiet)
    tell_of_others(marks, images[0])
    if grid:
        write_grid(images, out, columns, labels)
    for path, image in [] if grid else zip(images.save(out), images, strict=True):
        print(f"{path}  seed {recipe_of(image)['seed']}")


@app.command
def edit(
    *photos: Path,
    to: str | None = None,
    source: Annotated[str | None, Parameter(name="--from")] = None,
    out: Annotated[str, Parameter(alias="-o")] = "./",
    recipe: Path | None = None,
    method: Literal["img2img", "ddim", "null-text", "edit-friendly", "prompt-to-prompt"] | None = None,
    strength: float | None = None,
    cross: float | None = None,
    self_attention: float | None = None,
    words: Literal["replace", "refine"] | None = None,
    region: list[str] | None = None,
    mask: Path | None = None,
    blur: int | None = None,
    padding: int | None = None,
    expand: list[int] | None = None,
    image_guidance: float | None = None,
    negative: str | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    size: str | None = None,
    sheet: Path | None = None,
    loading: Loading = EMBEDDED,
    quiet: Annotated[bool, Parameter(alias="-q")] = False,
) -> None:
    """Change pictures by words: with --from, what the words say changes and the rest stays; without, it is img2img or inpainting.

    Parameters
    ----------
    photos
        Pictures, of any size.
    to
        What they should show; or, for an instruct model, what to do.
    source
        What they show now.
    out
        File (what has the name is replaced), or folder/ (files are called after words and seed; none is replaced).
    recipe
        The file of a picture that was made from another: do the same again. Options given beside it change the recipe.
    method
        With --from: how a picture's run is found and held to. prompt-to-prompt, unless given.
    strength
        From 0 (the picture stays) to 1.
    cross
        With --from: share of the steps in which words attend where the old words did; 0.8.
    self_attention
        With --from: share of the steps in which the layout is held; 0.4.
    words
        With --from: whether new words replace old ones, or refine the description.
    region
        With --from: words; nothing may change outside of their places.
    mask
        A picture, white where something may change; the rest stays to the last bit.
    blur
        Pixels, inside the mask, over which the change fades in.
    padding
        Without --from: work on the masked part alone, with so many pixels around.
    expand
        Without --from: pixels to add around the picture and to paint: one number, or left top right bottom.
    image_guidance
        Of instruct models: how strongly the picture leads.
    negative
        What not to draw.
    guidance
        How strongly the words lead.
    steps
        Network evaluations.
    seed
        From 0 to 2^64 - 1; without it, one is drawn and printed.
    size
        Side in pixels, or WIDTHxHEIGHT, at which the model works; the result has the picture's own.
    sheet
        Also write before, after and difference as one picture.
    quiet
        No progress bar.
    """
    known, marks = ({}, {}) if recipe is None else recalled(recipe, pictured=True)
    prompt, old = known.pop("prompt", None), known.pop("source", None)
    to, source = prompt if to is None else to, old if source is None else source
    both = {"strength": strength, "mask": mask, "blur": blur, "negative": negative, "guidance": guidance, "steps": steps}
    both |= {"seed": seed, "size": None if size is None else sides(size)}
    told = {"method": method, "cross": cross, "self_attention": self_attention, "words": words, "region": region}
    plain = {"padding": padding, "image_guidance": image_guidance}
    plain["expand"] = expand and (expand[0] if len(expand) == 1 else tuple(expand))
    for name, value in (plain if source is not None else told).items():
        if value is not None:
            raise ValueError(f"{name} works {'without' if source is not None else 'only with'} --from, got {value!r}")
    if not photos:
        raise ValueError(f"photos must be at least one picture, got none{loading.hint(region)}")
    if to is None:
        raise ValueError('to must be what the pictures should show, such as --to "a dog", got none')
    check_out(out, len(photos), [*photos, mask, recipe], sheet)

    from latentdiff.editing import sheet as sheet_of
    from latentdiff.images import open_picture, save_image
    from latentdiff.origin import checked_sides, expanded
    from latentdiff.pipeline import Pipeline

    takes = signature(Pipeline.__call__ if source is None else Pipeline.edit).parameters
    for name in known.keys() - takes.keys():
        way = "without" if source is None else "with"
        raise ValueError(f"recipe must be of an edit {way} --from, got {recipe}, which has {name}")
    if method is not None and method != known.get("method"):  # the recipe's has options that another has not
        own = {"inversion", "cross", "self_attention", "words"}
        own |= {"region", "threshold", "weights"} if method == "img2img" else set()
        known = {name: value for name, value in known.items() if name not in own}
    options = known | {name: value for name, value in (both | told | plain).items() if value is not None}
    before = [open_picture(photo) for photo in photos]
    pipe = loading.load()
    if source is None:
        images = pipe(to, image=before, **options, progress=not quiet)
    else:
        images = pipe.edit(before, source=source, target=to, **options, progress=not quiet)
    tell_of_others(marks, images[0])
    for path, image in zip(images.save(out), images, strict=True):
        print(f"{path}  seed {recipe_of(image)['seed']}")
    if sheet is not None:
        if (added := options.get("expand")) is not None:  # as large as the result, each thing in its place
            before = [expanded(photo, None, checked_sides(added))[0] for photo in before]
        save_image(sheet_of(before, images), sheet)


@app.command
def samplers(*, plot: Path | None = None) -> None:
    """List the samplers: order, network evaluations a step, stochastic or not, and what each is.

    Parameters
    ----------
    plot
        Also draw each solver's error against its evaluations, on a distribution with a known answer, to this file.
    """
    from latentdiff.diffusion.samplers import rows

    if plot is not None:
        from latentdiff.compare import check_plot

        check_plot(plot)
    for name, order, evaluations, kind, about in [("name", "order", "evals", "kind", "what it is"), *rows()]:
        print(f"{name:<19} {order:<5} {evaluations!s:<5} {kind:<13} {about}")
    if plot is not None:
        from latentdiff.compare import plot_convergence

        plot_convergence(plot)
        print(plot)


@app.command
def compare(
    prompt: str,
    *,
    out: Annotated[Path, Parameter(alias="-o")] = Path("samplers.png"),
    samplers: tuple[str, ...] = ("ddim", "euler a", "heun", "dpm++ 2m", "dpm++ 2m sde", "unipc", "deis"),
    steps: tuple[int, ...] = (4, 6, 10, 20, 30),
    guidance: str | None = None,
    spacing: str | None = None,
    seed: int = 0,
    loading: Loading = EMBEDDED,
) -> None:
    """Draw one prompt with several samplers, a row each, at several numbers of steps, a column each.

    Parameters
    ----------
    prompt
        What to draw.
    out
        File for the grid of pictures.
    samplers
        Their names, as `latentdiff samplers` lists them or with a spacing: "DPM++ 2M Karras".
    steps
        Numbers of steps.
    guidance
        How strongly the prompt leads, or rules, as in `latentdiff generate`.
    spacing
        The grid of all of them, but for those whose name says one.
    seed
        Of all pictures; -1 draws one.
    """
    from latentdiff.compare import sampler_grid
    from latentdiff.images import check_files, save_image

    check_files([out])
    options = {"guidance": guidance, "spacing": spacing, "seed": seed}
    pipe = loading.load()
    save_image(sampler_grid(pipe, prompt, samplers, steps, **{k: v for k, v in options.items() if v is not None}), out)
    print(out)


app.command("latentdiff.bench.run:bench", name="bench", help="Measure speed, against diffusers and against the machine's limits.")
app.command(
    "latentdiff.evaluation.evaluate:show",
    name="evaluate",
    help="Measure a model: CLIP score, zero-shot accuracy, FID, the VAE; samplers against steps.",
    default_parameter=Parameter(name="*"),
)


@app.command
def inspect(path: str, *, variant: str | None = None, allow_pickle: bool = False) -> None:
    """Say what a model, a LoRA or another file is: family, prediction, sizes, dtypes, metadata, and what is unknown in it.

    Parameters
    ----------
    path
        A file, a folder or a hub id (owner/name).
    variant
        Of a folder with several precisions, the one to look at, such as fp16.
    allow_pickle
        Also read .ckpt and .bin files (tensors only; nothing in them is executed).
    """
    from latentdiff.checkpoints.report import inspect

    print(inspect(path, variant=variant, allow_pickle=allow_pickle))


@app.command
def convert(
    source: str,
    target: Path,
    *,
    dtype: DType | None = None,
    ema: bool = False,
    prediction: Literal["eps", "v", "x0"] | None = None,
    variant: str | None = None,
    allow_pickle: bool = False,
) -> None:
    """Write a model as one .safetensors file in the original naming, or as a folder in the diffusers layout.

    Parameters
    ----------
    source
        A file, a folder or a hub id (owner/name).
    target
        A name that ends in .safetensors is a file, any other a folder.
    dtype
        Of the written weights; without it they stay as they are.
    ema
        Take the U-Net's moving average, where a file has one.
    prediction
        What the U-Net predicts, where the model's files do not say.
    variant
        Of a folder with several precisions, the one to read, such as fp16.
    allow_pickle
        Also read .ckpt and .bin files (tensors only; nothing in them is executed).
    """
    from latentdiff.checkpoints.save import convert
    from latentdiff.loading import checked_dtype

    kind = None if dtype is None else checked_dtype(dtype)
    convert(source, target, dtype=kind, ema=ema, prediction=prediction, variant=variant, allow_pickle=allow_pickle)
    print(target)


@app.command
def doctor() -> int:
    """Show versions, devices, the choices made from them, and what does not fit. Exit code 1 if something has to be done."""
    from latentdiff.doctor import examine

    fine = True
    for finding in examine():
        print(f"{'  ' if finding.ok else '! '}{finding.name:<16} {finding.text}")
        fine = fine and finding.ok
    return 0 if fine else 1


# -------------------------------------------------------------------------------------------------------- small readers


def read_prompts(path: Path | None) -> list[str]:
    """The lines of a text file that are not empty."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        why = f" ({error.strerror})" if isinstance(error, OSError) else ""
        raise ValueError(f"prompts-file must be a text file in UTF-8, got {path}{why}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise ValueError(f"prompts-file must hold at least one prompt, one a line, got {path}, which is empty")
    return found


def sides(size: str) -> int | tuple[int, int]:
    """512, or 512x768 as (512, 768)."""
    try:
        numbers = [int(side) for side in size.lower().split("x")]
        if len(numbers) == 1:
            return numbers[0]
        width, height = numbers
        return width, height
    except ValueError:
        raise ValueError(f"size must be a side or WIDTHxHEIGHT in pixels, such as 512 or 512x768, got {size!r}") from None


def recalled(path: Path, *, pictured: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe of a file, pictured: one made from a picture; and what else it says, which is shown, not followed."""
    from latentdiff.images import PHOTO, read_parameters

    recipe, others = read_parameters(path)
    if (PHOTO in others) != pictured:
        made_from, command = ("text alone", "generate") if pictured else ("another picture", "edit PHOTO")
        raise ValueError(f"recipe must be one for this command, got {path}, made from {made_from}: latentdiff {command} --recipe")
    made_by = ", ".join(f"{name}: {value}" for name, value in others.items())
    print(f"latentdiff: recipe of {path}{f' ({made_by})' if made_by else ''}", file=sys.stderr)
    return recipe, others


def tell_of_others(marks: dict[str, str], image: Any) -> None:
    """Where a recipe is of another model, picture or mask than `image` is: it may then be another picture."""
    from latentdiff.images import PHOTO, parse_parameters

    made = parse_parameters(image.info["parameters"])[1]
    for name in ("Model", "Precision", "Refiner", PHOTO, "Mask"):
        if marks and marks.get(name) != made.get(name) and (name in marks or name != "Precision"):  # older ones do not tell it
            was, now = (found.get(name, "none") for found in (marks, made))
            print(f"latentdiff: the recipe's {name} is {was}, here it is {now}: maybe another picture", file=sys.stderr)


def recipe_of(image: Any) -> dict[str, Any]:
    from latentdiff.images import parse_parameters

    return parse_parameters(image.info["parameters"])[0]


def check_grid(out: str, grid: bool, labels: bool, columns: int | None) -> None:
    """Before the work, not after it: what no grid can be made of."""
    from latentdiff.images import check_columns, is_folder

    check_columns(columns)
    if not grid and (labels or columns is not None):
        raise ValueError(f"{'labels' if labels else 'columns'} needs --grid, which makes one picture of all, got none")
    if grid and is_folder(out):
        raise ValueError(f"out must be a file, such as grid.png, where --grid makes one picture, got {out!r}")


def check_out(out: str, n: int, inputs: Iterable[Path | None], sheet: Path | None = None) -> None:
    """Before the work, not after it: names that the n pictures cannot be written to, or where they would replace what is read."""
    from latentdiff.images import check_files, check_folder, file_names, is_folder
    from latentdiff.request import MAX_PICTURES

    if is_folder(out):
        check_folder(Path(out))
    targets = [] if is_folder(out) else file_names(Path(out), min(n, MAX_PICTURES))  # more are refused with the other arguments
    if sheet is not None:
        if sheet.resolve() in map(Path.resolve, targets):
            raise ValueError(f"sheet must be another file than out, got {str(sheet)!r}")
        targets.append(sheet)
    check_files(targets, [path for path in inputs if path is not None])


def write_grid(images: Any, out: str, columns: int | None, labels: bool) -> None:
    from latentdiff.images import save_image

    recipes = [recipe_of(image) for image in images]
    save_image(images.tile(columns, [recipe["prompt"] for recipe in recipes] if labels else None), Path(out))
    print(f"{out}  {len(images)} pictures, seeds {recipes[0]['seed']} to {recipes[-1]['seed']}")


if __name__ == "__main__":
    main()
