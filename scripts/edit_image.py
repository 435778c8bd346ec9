"""Change a picture by words:  python scripts/edit_image.py photo.png --from "a cat" --to "a dog"

The picture's own words go in --from, what it should show in --to; the rest of it stays. It is noised along the run that rebuilds it
(edit-friendly inversion) and denoised with the new words, which at first attend where the old ones do (prompt-to-prompt).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, run

import latentdiff
from latentdiff.images import check_files

Method = Literal["img2img", "ddim", "null-text", "edit-friendly", "prompt-to-prompt"]


def main(
    photo: Path,
    *,
    source: Annotated[str, Parameter(name="--from")],
    target: Annotated[str, Parameter(name="--to")],
    out: Path = Path("edited.png"),
    model: str | None = None,
    method: Method = "prompt-to-prompt",
    strength: float | None = None,
    guidance: float | None = None,
    region: str | None = None,
    mask: Path | None = None,
    seed: int = 0,
) -> None:
    """Write the edited picture, and beside it a sheet of before, after and difference.

    Parameters
    ----------
    photo
        The picture, of any size.
    source
        What it shows.
    target
        What it should show.
    out
        Where the result goes; the sheet gets -sheet.png at the end of the same name.
    model
        A file, a folder or a hub id. Without it, the embedded model.
    method
        How the picture's run is found, and held to.
    strength
        From 0 (nothing changes) to 1.
    guidance
        How strongly the words lead.
    region
        A word: nothing may change outside of its place.
    mask
        A picture that is white where something may change.
    seed
        Another number, another try.
    """
    sheet = out.with_name(f"{out.stem}-sheet.png")
    check_files([out, sheet], filter(None, (photo, mask)))
    pipe = latentdiff.load(model)
    options: dict[str, Any] = {"strength": strength, "guidance": guidance, "region": region, "mask": mask}
    edits = pipe.edit(photo, source=source, target=target, method=method, seed=seed, **options)
    edits.save(out)
    edits.sheet().save(sheet)
    for report in filter(None, edits.reports):
        print(f"{out}: the picture was rebuilt with {report.rebuilt:.1f} dB; the autoencoder alone has {report.limit:.1f} dB")


if __name__ == "__main__":
    run(main)
