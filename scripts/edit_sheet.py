"""A sheet of edits, one of each kind:  python scripts/edit_sheet.py --out docs/edits.png

Each row is a picture that the model made of the first words, what `pipe.edit` (for the masked ones, `pipe` with `mask=`) made of it
with the second, and the difference. The pictures before are files like any other: nothing of how they were made is used.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, run
from PIL import Image, ImageChops, ImageDraw
from tqdm import tqdm

import latentdiff
from latentdiff.images import check_files, save_image, tile
from latentdiff.request import integer

Box = tuple[float, float, float, float]  # left, top, right, bottom, in picture sides


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What is asked. box: the part to paint anew, in inpainting. options: further keywords of `pipe.edit`, or of `pipe`."""

    kind: str
    source: str
    target: str
    box: Box | None = None
    options: dict[str, Any] = field(default_factory=dict)


EDITS = (
    Edit(kind="animal", source="a cat", target="a dog"),
    Edit(kind="animal", source="a dog", target="a bear"),
    Edit(kind="animal", source="a cow", target="a horse"),
    Edit(kind="colour", source="a red heart", target="a green heart"),
    Edit(kind="colour", source="a red apple", target="a green apple"),
    Edit(kind="style", source="a red apple", target="a red apple, 3d style", options={"words": "refine", "strength": 0.8}),
    Edit(kind="style", source="a house", target="a house, cartoon style", options={"words": "refine", "strength": 0.9}),
    Edit(kind="expression", source="a smiling face", target="an angry face"),
    Edit(kind="adding", source="a smiling face", target="a smiling face with sunglasses", options={"words": "refine"}),
    Edit(kind="removing", source="a smiling face with sunglasses", target="a smiling face"),
    Edit(
        kind="background", source="a tree", target="a tree on a light blue background",
        options={"words": "refine", "strength": 1.0},
    ),
    Edit(
        kind="inpainting", source="a smiling face", target="a smiling face with sunglasses", box=(0.0, 0.1, 1.0, 0.55),
        options={"blur": 4},
    ),
)  # fmt: skip


def main(
    *, out: Path = Path("edits.png"), model: str | None = None, seed: int = 0, strength: float | None = None,
    guidance: float | None = None, steps: int = 50,
    only: Annotated[list[int] | None, Parameter(consume_multiple=True)] = None,
) -> None:  # fmt: skip
    """Write the sheet.

    Parameters
    ----------
    out
        Where it goes.
    model
        A file, a folder or a hub id. Without it, the embedded model.
    seed
        Of the pictures and of the edits: another number, other pictures.
    strength
        From 0 (nothing changes) to 1, of the edits without a mask; three of them have their own.
    guidance
        How strongly the words lead.
    steps
        Of each run.
    only
        Numbers of rows, from 1; without them, all.
    """
    check_files([out])
    chosen = EDITS if only is None else [EDITS[integer("only", k, 1, len(EDITS)) - 1] for k in only]
    pipe = latentdiff.load(model)
    common: dict[str, Any] = {"seed": seed, "guidance": guidance, "steps": steps, "progress": False}
    pictures, labels = [], []
    for asked in tqdm(chosen, desc="edits"):
        before = pipe(asked.source, **common)[0]
        after = changed(pipe, asked, before, common, strength)
        pictures += [before, after, ImageChops.difference(before, after)]
        labels += [asked.source, asked.target, f"{asked.kind}: difference"]
    save_image(tile(pictures, 3, labels), out)
    print(out)


def changed(
    pipe: latentdiff.Pipeline, asked: Edit, before: Image.Image, common: dict[str, Any], strength: float | None
) -> Image.Image:
    if asked.box is None:
        common = common | {"strength": strength} | asked.options
        return pipe.edit(before, source=asked.source, target=asked.target, **common)[0]
    mask = Image.new("L", before.size)
    left, top, right, bottom = (round(share * side) for share, side in zip(asked.box, before.size * 2, strict=True))
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return pipe(asked.target, image=before, mask=mask, **common, **asked.options)[0]


if __name__ == "__main__":
    run(main)
