"""Pictures: tensors and PIL, grids, files. They carry their recipes where other programs look for them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import struct
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 50_000_000  # of a picture that we open; a header that claims more is refused before anything is decoded
OPENS = ("PNG", "JPEG", "WEBP", "BMP")
SAVES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
UTF16 = b"UNICODE\0"  # what EXIF's comments begin with where UTF-16 follows
MAX_COMMENT = 65_000  # bytes: a JPEG's EXIF has 65,533 in all
Picture = str | Path | Image.Image


def to_pil(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Pictures in [-1, 1], clamped and rounded to 8 bits."""
    pixels = (images.detach().float().cpu() / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
    return [Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()) for p in pixels]


def to_tensor(images: Iterable[Image.Image]) -> Float[Tensor, "b 3 h w"]:
    """RGB pictures of one size as float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


class Images(list[Image.Image]):
    """A list of PIL pictures that also saves, tiles and shows itself in a notebook."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Image.Image | Images:
        return Images(super().__getitem__(index)) if isinstance(index, slice) else super().__getitem__(index)

    def __add__(self, other: list[Image.Image]) -> Images:  # type: ignore[override]
        return Images([*self, *other])

    def save(self, path: str | Path) -> list[Path]:
        """Write one file a picture with its recipe, and return the paths.

        One picture takes `path` itself; of several, number k takes `<stem>-k<suffix>`; files of these names are replaced. A folder
        (that exists, or with a slash at the end) gets `<prompt>-<seed>.png`, or the next free number behind it.
        Errors: ValueError for a suffix that is none of SAVES.
        """
        if not is_folder(path):
            paths = file_names(Path(path), len(self))
            for image, target in zip(self, paths, strict=True):
                save_image(image, target)
            return paths
        return [save_beside(image, Path(path) / f"{slug(image)}.png") for image in self]

    def tile(self, columns: int | None = None, labels: Sequence[str] | None = None) -> Image.Image:
        return tile(self, columns, labels)

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows: the picture, or all of them side by side."""
        if not self:
            return None
        buffer = io.BytesIO()
        (self[0] if len(self) == 1 else self.tile()).save(buffer, "PNG")
        return buffer.getvalue()


def tile(images: Sequence[Image.Image], columns: int | None = None, labels: Sequence[str] | None = None) -> Image.Image:
    """All pictures in rows, on white; as square as can be, or in `columns` at most. A label stands under its picture."""
    if not images:
        raise ValueError("images must hold at least one picture, got none")
    check_columns(columns)
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"labels must be one a picture ({len(images)}), got {len(labels)}")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    width, height = max(i.width for i in images), max(i.height for i in images)
    size = max(10, width // 12)
    font, text = ImageFont.load_default(size), 0 if labels is None else math.ceil(size * 1.4)
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * (height + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, image in enumerate(images):
        x, y = k % columns * width, k // columns * (height + text)
        sheet.paste(image, (x, y))
        if labels is not None:
            draw.text((x + width / 2, y + height + text / 2), fitted(labels[k], font, 0.95 * width), "black", font, anchor="mm")
    return sheet


def check_columns(columns: int | None) -> None:
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns!r}")


def fitted(label: str, font: Any, width: float) -> str:
    """The label on one line, shortened with an ellipsis where it is wider than `width` pixels."""
    label = " ".join(label.split())
    if font.getlength(label) <= width:
        return label
    kept = bisect_left(range(1, len(label)), True, key=lambda n: font.getlength(label[:n] + "…") > width)
    return label[:kept] + "…"


def save_grid(images: Float[Tensor, "b 3 h w"], path: str | Path, columns: int | None = None) -> None:
    """Pictures in [-1, 1] as one file."""
    save_image(tile(to_pil(images), columns), Path(path))


def file_names(target: Path, n: int) -> list[Path]:
    """Those of n pictures where the user named a file."""
    check_suffix(target)
    if n == 1:
        return [target]
    digits = len(str(n))
    return [target.with_name(f"{target.stem}-{k:0{digits}}{target.suffix}") for k in range(1, n + 1)]


def is_folder(path: str | Path) -> bool:
    return Path(path).is_dir() or str(path).endswith(("/", "\\"))


def check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SAVES:
        raise ValueError(f"path must end in {', '.join(SAVES)}, or be a folder, got {str(path)!r}")


def check_files(targets: Iterable[Path], inputs: Iterable[Path] = ()) -> None:
    """Errors: ValueError where no picture can be written to a target, or where it is one of the files that are read."""
    there = [path for path in inputs if path.exists()]
    for target in targets:
        check_suffix(target)
        if target.is_dir():
            raise ValueError(f"path must be a file, got {str(target)!r}, which is a folder")
        if not target.exists():
            check_folder(target.parent)
        elif not os.access(target, os.W_OK):
            raise ValueError(f"path must be a file that can be written to, got {str(target)!r}")
        if target.exists() and any(target.samefile(path) for path in there):
            raise ValueError(f"path must be another file than those that are read, got {str(target)!r}")


def check_folder(folder: Path) -> None:
    """Errors: ValueError for a folder that can neither be written to nor, where it is not there, be made."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)  # None: on a drive that is not there
    if there is None or not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ValueError(f"path must be in a folder that can be written to, got {str(folder)!r}")


def slug(image: Image.Image) -> str:
    """A file name from the picture's recipe: its prompt's words and its seed."""
    recipe = parse_parameters(image.info.get("parameters", ""))[0]
    words = "-".join(re.findall(r"\w+", str(recipe["prompt"]).lower()))[:50].strip("-")  # at most 200 bytes of 255
    return "-".join(filter(None, [words or "picture", str(recipe.get("seed", ""))]))


def save_beside(image: Image.Image, path: Path) -> Path:
    """Write one picture under this name, or with -2, -3, … where there is such a file, which another thread may make just now."""
    content, free, k = encoded(image, path), path, 1
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            file = free.open("xb")
        except FileExistsError:
            free, k = path.with_name(f"{path.stem}-{k + 1}{path.suffix}"), k + 1
            continue
        try:
            with file:
                file.write(content)
            return free
        except OSError:  # a full disk
            free.unlink()
            raise


def save_image(image: Image.Image, path: Path) -> None:
    """Write one picture with the colour profile and the `parameters` of its info. Folders on the way are made."""
    content = encoded(image, path)  # what has the name stays where a format cannot hold the picture
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def encoded(image: Image.Image, path: Path) -> bytes:
    """A picture as the file of that name is to hold it."""
    check_suffix(path)
    kind, file = SAVES[path.suffix.lower()], io.BytesIO()
    options = options_of(kind, image.info.get("parameters"))
    if kind != "PNG" and image.info.get("parameters") and "exif" not in options:
        warnings.warn(f"{path}: the recipe is too long for a {kind} and is left out; a PNG holds it", stacklevel=3)
    image.save(file, kind, icc_profile=image.info.get("icc_profile"), **options)
    return file.getvalue()


def options_of(kind: str, parameters: str | None) -> dict[str, Any]:
    """How to save: a PNG has the `parameters` as a text, the other two in EXIF's comment of the user, as other programs write them;
    more than 32,000 letters do not fit there."""
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        if parameters:
            text.add_text("parameters", parameters)
        return {"pnginfo": text}
    comment = UTF16 + (parameters or "").encode("utf-16-be", "surrogatepass")
    if not parameters or len(comment) > MAX_COMMENT:
        return {"quality": 95}
    return {"quality": 95, "exif": exif_of(comment)}


def exif_of(comment: bytes) -> bytes:
    """EXIF of the user's comment alone, of the type that it is to have, undefined (7): Pillow would write bytes (1), at which other
    programs' readers fail."""
    end, pointer = 0, (ExifTags.IFD.Exif, 4, 1, 26)  # a directory of one entry, which says where the next one begins
    entry = ExifTags.Base.UserComment, 7, len(comment), 44
    return b"Exif\0\0MM\0*" + struct.pack(">IHHHIIIHHHIII", 8, 1, *pointer, end, 1, *entry, end) + comment


def parameters_of(image: Image.Image) -> str | None:
    """What `options_of` wrote, if it is there and can be read."""
    text = image.info.get("parameters")
    if text is None and "exif" in image.info:  # or a PNG would be decoded, to look behind its pixels
        try:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        except Exception:  # whatever PIL's parser raises on damaged EXIF
            return None
        if isinstance(comment, bytes) and comment.startswith(UTF16):
            ways = [comment.removeprefix(UTF16).decode(code, "replace") for code in ("utf-16-be", "utf-16-le")]
            text = next((way for way in ways if "Steps: " in way), ways[0])  # nothing says which order of bytes a program took
    return text if isinstance(text, str) else None


# -------------------------------------------------------------------------------------------------------- user's pictures


def open_picture(source: Picture, mode: str = "RGB") -> Image.Image:
    """A picture that a user gives (a path, or a PIL picture), right side up, in 8 bits of `mode` ("RGB", or "L" for masks).

    Transparent parts become white, those of masks black. RGB stays in its own colour profile, which the info keeps; other colours
    that have a profile become sRGB.
    Errors: FileNotFoundError; ValueError for a format not in OPENS, more than MAX_PIXELS, an animation or a damaged file, all but
    the last before decoding.
    """
    image = source if isinstance(source, Image.Image) else _open(Path(source))
    if not image.width * image.height:
        raise ValueError(f"{_name(source)}: has {image.width}×{image.height} pixels; at least one is needed")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{_name(source)}: has {image.width}×{image.height} pixels; at most {MAX_PIXELS:,} are allowed")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # an MPO is a camera's JPEG with a preview behind
        raise ValueError(f"{_name(source)}: is an animation; a still picture is needed")
    try:
        image.load()
        return flat(upright(image), "black").convert("L") if mode == "L" else in_rgb(upright(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{_name(source)}: the picture is damaged and cannot be read ({error})") from None


def _open(path: Path) -> Image.Image:
    """The header of a picture file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        return Image.open(path, formats=OPENS)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: is no picture in one of the formats {', '.join(OPENS)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too many pixels, at most {MAX_PIXELS:,} are allowed ({error})") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: the picture's header is damaged or too large ({error})") from None


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, where that can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # whatever PIL's parser raises on damaged EXIF; the pixels are there already
        return image


def in_rgb(image: Image.Image) -> Image.Image:
    """On white, in RGB, with its profile. One of greys or CMYK fits no RGB: by it, where it can be read, they become sRGB."""
    found, profile = flat(image), image.info.get("icc_profile")
    grey = Image.getmodebase(image.mode) == "L"
    if profile and (grey or image.mode == "CMYK"):
        found, profile = in_srgb(found.convert("L") if grey else image, profile) or found, None
    found.info = {"icc_profile": profile}  # and no comment, recipe or other text of the user's, which some formats would save
    return found


def in_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The colours that the numbers mean by this profile, where it can be read."""
    with suppress(ImageCms.PyCMSError):
        return ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), image.mode, "RGB").apply(image)
    return None


def flat(image: Image.Image, ground: str = "white") -> Image.Image:
    """RGB in 8 bits: greys of 16 bits ("I") and from 0 to 1 ("F") scaled (PIL would clip them), transparency laid on `ground`."""
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image, dtype=np.float64) / (257 if image.mode.startswith("I") else 1 / 255)
        if image.mode == "F" and not bool(((grey >= 0) & (grey <= 255)).all()):
            raise ValueError("numbers of mode F must lie from 0 to 1")
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba).convert("RGB")
    return image.convert("RGB")


def _name(source: Picture) -> str:
    return "picture" if isinstance(source, Image.Image) else str(source)


# ---------------------------------------------------------------------------------------------------------------- recipes

KEYS = {  # name in the text -> keyword of `pipe(...)`
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "spacing",
    "Eta": "eta",
    "CFG scale": "guidance",
    "CFG rescale": "rescale",
    "Syntax": "syntax",
    "Seed": "seed",
    "Size": "size",
}
PICTURED = {  # the same where the run starts from a picture
    "Denoising strength": "strength",
    "Exact steps": "exact",
    "Mask blur": "blur",
    "Masked padding": "padding",
    "Expand": "expand",
    "Image CFG scale": "image_guidance",
    "Edit method": "method",
    "Edit inversion": "inversion",
    "Source prompt": "source",
    "Cross control": "cross",
    "Self control": "self_attention",
    "Words": "words",
    "Region": "region",
    "Region threshold": "threshold",
    "Weights": "weights",
}
PHOTO = "Photo"  # fingerprint of the picture; other programs' "Denoising strength" without it means something else
# A name and its value; or a name alone, which is no pair: a long text without colons is read once, not from every letter on.
PAIR = re.compile(r'(\w[\w \-/]++)(?::\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$))?')
NEGATIVE = "Negative prompt: "
EXACT = ("Exact prompt", "Exact negative prompt")  # written only where the plain text could be read in two ways


def write_parameters(recipe: Mapping[str, Any], extra: Mapping[str, str] | None = None) -> str:
    """A recipe (keywords of `pipe`) as A1111's text, with more pairs behind; read back, it is the same, whatever the prompt."""
    pairs = {name: _text(recipe[key]) for name, key in (KEYS | PICTURED).items() if recipe.get(key) is not None}
    pairs |= dict(extra or {})
    prompt, negative = recipe["prompt"], recipe.get("negative") or ""
    head = f"{prompt}\n{NEGATIVE}{negative}\n" if negative else f"{prompt}\n"
    text = head + _line(pairs)
    found = parse_parameters(text)[0]
    if (found["prompt"], found.get("negative", "")) == (prompt, negative):
        return text
    return head + _line(pairs | dict(zip(EXACT, (prompt, negative), strict=True)))


def _line(pairs: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items())


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]|^\s|\s$|^$', value) else value


def _text(value: Any) -> str:
    """Numbers as short as they stay exact, a size as 512x768, a grid of noise levels as JSON."""
    match value:
        case tuple():
            return "x".join(map(str, value))
        case list() | dict():
            return json.dumps(value)
        case float() if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        case _:
            return str(value)


def parse_parameters(text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A `parameters` text as keywords of `pipe`, and the pairs that are none of ours. What the values are worth, `pipe` checks.

    The last line counts as parameters only if it holds at least three pairs, as other readers have it.
    """
    body, _, last = text.rpartition("\n")
    pairs = {m[1]: _unquoted(m[2]) for m in PAIR.finditer(last) if m[2] is not None}
    if len(pairs) < 3:
        body, pairs = text, {}
    prompt, negative = _split(body)
    if EXACT[0] in pairs:
        prompt, negative = pairs.pop(EXACT[0]), pairs.pop(EXACT[1], "")
    recipe: dict[str, Any] = {"prompt": prompt} | ({"negative": negative} if negative else {})
    keys = KEYS | PICTURED if PHOTO in pairs else KEYS
    recipe |= {key: _value(key, pairs.pop(name)) for name, key in keys.items() if name in pairs}
    return recipe, pairs


def _split(body: str) -> tuple[str, str]:
    prompt, found, negative = f"\n{body}".partition(f"\n{NEGATIVE}")
    return (prompt[1:], negative) if found else (body, "")


def _unquoted(value: str) -> str:
    if not (value.startswith('"') and value.endswith('"')):
        return value
    try:
        return str(json.loads(value))
    except ValueError:
        return value


def _value(key: str, text: str) -> Any:
    """A value as `pipe` takes it; what cannot be read stays text, for `pipe` to refuse by name."""
    try:
        match key:
            case "steps" | "seed" | "blur" | "padding":
                return int(text)
            case "eta" | "guidance" | "rescale" | "strength" | "image_guidance" | "threshold" | "cross" | "self_attention":
                return float(text)
            case "size":
                width, height = text.split("x")
                return int(width), int(height)
            case "exact" if text in ("True", "False"):
                return text == "True"
            case "expand" | "region" | "weights":
                return json.loads(text)
            case "spacing" if text.startswith("["):
                return json.loads(text)
    except ValueError:
        pass
    return text


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe of a picture's file, as keywords for `pipe(**recipe)`. Nothing is trusted: `pipe` checks every value.

    That of a picture made from another wants it beside: `pipe(image=photo, **recipe)`, or `pipe.edit(photo, **recipe)` if it has a
    "method".

    Errors: FileNotFoundError; ValueError where the file is no picture or carries no recipe.
    """
    recipe, others = read_parameters(path)
    if "Refiner" in others:
        warnings.warn(f"{path}: the refiner, {others['Refiner']}, is no part of the recipe: see `latentdiff.refine`", stacklevel=2)
    if "method" in recipe:
        recipe["target"] = recipe.pop("prompt")
    return recipe


def read_parameters(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe of a picture's file, and what else it says (model, version, other programs' settings)."""
    with _open(Path(path)) as image:
        text = parameters_of(image)
    if text is None:
        raise ValueError(f"{path}: carries no recipe (a PNG text named `parameters`, or EXIF's UserComment)")
    return parse_parameters(text)
