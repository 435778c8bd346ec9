"""What a run starts from where that is a picture: img2img, inpainting, outpainting and instruct-pix2pix.

A `Canvas` is one of the user's pictures with the box of it that the model works on; an `Origin` is what the canvases of a batch are
to a run: where it starts, what its denoiser knows beforehand, and how the new pictures are put back into the old ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from latentdiff import images
from latentdiff.conditioning import Cond
from latentdiff.diffusion.denoiser import Denoise, Denoiser, Network
from latentdiff.diffusion.guidance import guided
from latentdiff.diffusion.schedules import NoiseSchedule
from latentdiff.images import Picture
from latentdiff.request import MAX_SIDE, Request, checked_size, first, integer, number, shown

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline

STRENGTH = 0.6  # of img2img; where there is a mask or a model made for pictures, all noise levels are run: 1
IMAGE_GUIDANCE = 1.5  # Brooks et al. (arXiv 2211.09800), section 4
Sides = tuple[int, int, int, int]  # left, top, right, bottom


# ---------------------------------------------------------------------------------------------------- a picture to work on


@dataclass(frozen=True, kw_only=True, eq=False)
class Canvas:
    """A picture as it is brought back, and the box of it that the model works on at `size` (width, height).

    mask: 255 where the picture may change, 0 elsewhere; None: everywhere. blur: pixels, inside the mask, over which it fades in.
    marks: what tells the recipe's reader which picture, and mask, the user gave.
    """

    photo: Image.Image
    mask: Image.Image | None
    box: Sides
    size: tuple[int, int]
    blur: int = 0
    marks: dict[str, str]

    def picture(self) -> Image.Image:
        """The box at the model's size."""
        return self.photo.resize(self.size, Image.Resampling.LANCZOS, box=self.box)

    def white(self) -> Bool[Tensor, "1 1 height width"]:
        """Where any part of a pixel may change, at the model's size; in floats, since 8 bits would round a dot to nothing."""
        assert self.mask is not None
        share = self.mask.convert("F").resize(self.size, Image.Resampling.BOX, box=self.box)
        return torch.from_numpy(np.array(share) > 0)[None, None]

    def repaint(self, factor: int) -> Float[Tensor, "1 1 h w"]:
        """1 for latents of which any pixel may change, else 0."""
        return F.max_pool2d(self.white().float(), factor)

    def finish(self, new: Image.Image) -> Image.Image:
        """The photo with `new` in its box; pixels outside the mask are the photo's own, to the last bit."""
        left, top, right, bottom = self.box
        patch = new.resize((right - left, bottom - top), Image.Resampling.LANCZOS)  # a copy where that is its size
        result = self.photo.copy()
        result.paste(patch, (left, top), self.share)
        return result

    @cached_property
    def share(self) -> Image.Image | None:
        """How much of the box is new, from 0 to 255."""
        return None if self.mask is None else faded(self.mask, self.blur).crop(self.box)


def faded(mask: Image.Image, blur: int) -> Image.Image:
    """The mask with an edge that rises from 0 over `blur` pixels, all of them inside; over fewer where the mask is not as deep."""
    if not blur:
        return mask
    box = around(mask, 1)
    deep = depth(np.asarray(mask.crop(box)) > 0) - 0.5  # of the middle of a pixel
    ramp = (deep / min(blur, deep.max())).clip(0, 1) * 255
    soft = Image.new("L", mask.size)
    soft.paste(Image.fromarray(ramp.round().astype(np.uint8)), box[:2])
    return soft


def depth(inside: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Pixels to the nearest that is not inside, by straight and diagonal steps (Borgefors 1986, "chamfer"): up to 8 % too many.

    Two passes, down and up, each of which also looks to both sides. The picture's own borders are no edges.
    """
    found = np.where(inside, np.float32(np.inf), np.float32(0))
    along = np.arange(found.shape[1], dtype=np.float32)
    for rows in (found, found[::-1]):
        before = np.full_like(along, np.inf)
        for row in rows:
            np.minimum(row, before + 1, out=row)
            np.minimum(row[1:], before[:-1] + 2**0.5, out=row[1:])
            np.minimum(row[:-1], before[1:] + 2**0.5, out=row[:-1])
            for line in (row, row[::-1]):
                line[:] = np.minimum.accumulate(line - along) + along
            before = row
    return found


def canvas(
    photo: Picture,
    mask: Picture | None,
    *,
    native: int,
    factor: int,
    size: int | tuple[int, int] | None = None,
    blur: int = 0,
    padding: int | None = None,
    expand: int | Sides | None = None,
) -> Canvas:
    """A user's picture made ready, every argument checked. native: the side that the model was trained at; factor: pixels a latent.

    size: what the model works at; None fits the picture's shape. padding: work on the masked part alone and so many pixels around.
    expand: pixels added around the picture, to be painted.
    Errors: as `images.open_picture`; ValueError where the mask has another size or is black.
    """
    picture = images.open_picture(photo)
    region = None if mask is None else binary(images.open_picture(mask, "L"), picture.size)
    marks = {images.PHOTO: fingerprint(picture)} | ({} if region is None else {"Mask": fingerprint(region)})
    if expand is not None:
        picture, region = expanded(picture, region, checked_sides(expand))
    if region is None and (padding is not None or blur):
        raise ValueError(f"{'blur' if blur else 'padding'} needs a mask, got none")
    box = (0, 0, *picture.size) if padding is None else around(region, integer("padding", padding, 0, MAX_SIDE))
    worked = fitted((box[2] - box[0], box[3] - box[1]), native, factor) if size is None else checked_size(size, factor)
    return Canvas(photo=picture, mask=region, box=box, size=worked, blur=integer("blur", blur, 0, MAX_SIDE), marks=marks)


def binary(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """White where the mask is at least half white."""
    if mask.size != size:
        raise ValueError(f"mask must have the picture's size, {size[0]}×{size[1]} pixels, got {mask.width}×{mask.height}")
    found = mask.point([0] * 128 + [255] * 128)
    if found.getbbox() is None:
        raise ValueError("mask must be white where the picture is to change, got one that is black everywhere")
    return found


def fitted(size: tuple[int, int], native: int, factor: int) -> tuple[int, int]:
    """Near the shape of `size`, in whole latents: the shorter side is the model's own, the area at most twice the model's."""
    width, height = size
    scale = min(native / min(size), native * (2 / (width * height)) ** 0.5)
    return tuple(min(max(factor, round(side * scale / factor) * factor), MAX_SIDE) for side in size)  # type: ignore[return-value]


def around(mask: Image.Image | None, padding: int) -> Sides:
    """The box of the white part and `padding` pixels more on each side, where there are any."""
    assert mask is not None
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    return max(left - padding, 0), max(top - padding, 0), min(right + padding, mask.width), min(bottom + padding, mask.height)


def checked_sides(expand: Any) -> Sides:
    sides = expand if isinstance(expand, list | tuple) else [expand] * 4
    found = tuple(integer("expand", side, 0, MAX_SIDE) for side in sides)
    if len(found) != 4 or not any(found):
        raise ValueError(f"expand must be a number of pixels, or (left, top, right, bottom), not all 0, got {shown(expand)}")
    return found


def expanded(photo: Image.Image, mask: Image.Image | None, sides: Sides) -> tuple[Image.Image, Image.Image]:
    """A larger canvas, the picture's edges drawn out over it, and a mask of what is new (and of what was masked before)."""
    left, top, right, bottom = sides
    size = (photo.width + left + right, photo.height + top + bottom)
    if size[0] * size[1] > images.MAX_PIXELS:
        raise ValueError(f"expand must leave at most {images.MAX_PIXELS:,} pixels, got {size[0]}×{size[1]}")
    larger = Image.fromarray(np.pad(np.asarray(photo), ((top, bottom), (left, right), (0, 0)), mode="edge"))
    larger.info = photo.info.copy()
    region = Image.new("L", size, 255)
    region.paste(Image.new("L", photo.size, 0) if mask is None else mask, (left, top))
    return larger, region


# -------------------------------------------------------------------------------------------------------- what a run is told


@dataclass(frozen=True, kw_only=True, eq=False)
class Origin:
    """The pictures of a batch, one each, as a run takes them.

    z: their latents. repaint: 1 for latents that may change. hold: the rest is held at its noise level. beside: channels that the
    network sees beside the noisy latents. image_guidance: of an instruct model, else None. settings: what the recipe says of this;
    own: and of each picture.
    """

    canvases: tuple[Canvas, ...]
    z: Float[Tensor, "b c h w"]
    strength: float
    repaint: Float[Tensor, "b 1 h w"] | None = None
    hold: bool = False
    beside: Float[Tensor, "b k h w"] | None = None
    image_guidance: float | None = None
    settings: dict[str, Any]
    own: tuple[dict[str, Any], ...] = ()

    def start(self, eps: Float[Tensor, "b c h w"], sigma: Tensor) -> Float[Tensor, "b c h w"]:
        """The pictures noised to level sigma (Meng et al., arXiv 2108.01073); at strength 1 noise alone, but for what is held."""
        noised = self.z + sigma * eps
        if self.strength < 1:
            return noised
        pure = eps * (1 + sigma**2).sqrt()
        return torch.where(self.repaint > 0, pure, noised) if self.hold and self.repaint is not None else pure

    def around(self, denoise: Denoise) -> Denoise:
        """Where the picture is known, the denoiser says so: a sampler then keeps that part at exactly its noise level."""
        repaint = self.repaint
        if not self.hold or repaint is None:
            return denoise
        return lambda x, sigma: torch.where(repaint > 0, denoise(x, sigma), self.z)

    def guided(
        self, denoiser: Denoiser, cond: Cond | list[tuple[Cond, Tensor]], uncond: Cond, asked: Request, rows: slice
    ) -> Denoise:
        """`guidance.guided`, with what the network sees beside the latents."""
        if self.beside is None:
            return guided(denoiser, cond, uncond, asked.rule)
        beside = self.beside[rows]
        if self.image_guidance is not None:
            assert isinstance(cond, Cond)  # `request` refuses several joined by AND
            return instructed(denoiser, cond, uncond, beside, asked.scale, self.image_guidance)
        return guided(replace(denoiser, network=with_channels(denoiser.network, beside)), cond, uncond, asked.rule)

    def latents(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Before decoding: a run that ends above sigma = 0 leaves a little noise, which what is held does not need."""
        return torch.where(self.repaint > 0, z, self.z) if self.hold and self.repaint is not None else z

    def recipe(self, k: int) -> dict[str, Any]:
        """The keywords of `pipe` that belong to picture k's start."""
        return self.settings | (self.own[k] if self.own else {})

    def marks(self, k: int) -> dict[str, str]:
        """What tells the recipe's reader which picture, and mask, it was made from."""
        return self.canvases[k].marks

    def finish(self, new: Sequence[Image.Image]) -> list[Image.Image]:
        """The new pictures in the old ones' places and sizes; at strength 0 the old ones."""
        if self.strength == 0:
            return [c.photo.copy() for c in self.canvases]
        return [c.finish(image) for c, image in zip(self.canvases, new, strict=True)]


def with_channels(network: Network, beside: Float[Tensor, "b k h w"]) -> Network:
    """The network, seeing `beside` with its batch."""

    def joined(x: Tensor, t: Tensor, context, vector: Tensor | None = None, /, **seams: Any) -> Tensor:
        return network(torch.cat([x, beside.to(x.dtype)], dim=1), t, context, vector, **seams)

    return joined


def instructed(
    denoiser: Denoiser, cond: Cond, uncond: Cond, picture: Float[Tensor, "b c h w"], guidance: float, image_guidance: float
) -> Denoise:
    """Guidance by text and by picture (Brooks et al., arXiv 2211.09800, eq. 3), on x0; the three estimates run as one batch."""
    three = uncond.join(uncond).join(cond)
    three = denoiser.prepare(three) if denoiser.prepare else three
    beside = torch.cat([torch.zeros_like(picture), picture, picture])
    denoiser = replace(denoiser, network=with_channels(denoiser.network, beside))

    def denoise(x: Float[Tensor, "b c h w"], sigma: Tensor) -> Float[Tensor, "b c h w"]:
        nothing, seen, told = denoiser(x.repeat(3, 1, 1, 1), sigma, three).chunk(3)  # since what is beside it differs
        return nothing + image_guidance * (seen - nothing) + guidance * (told - seen)

    return denoise


def shortened(schedule: NoiseSchedule, sigmas: Float[Tensor, " n"], strength: float, exact: bool) -> Float[Tensor, " m"]:
    """The part of a grid that a run of this strength walks.

    exact: all its steps, over the times from strength · T down; two levels that float32 cannot tell apart become one. Else the
    classic rule: the last int(steps · strength) steps of the grid.
    """
    if strength == 0:
        return sigmas[-1:]
    if not exact:
        return sigmas[len(sigmas) - 1 - int((len(sigmas) - 1) * strength) :]
    if strength == 1:
        return sigmas
    scaled = torch.where(sigmas > 0, schedule.sigma(strength * schedule.t(sigmas)).float(), sigmas)
    return scaled.unique_consecutive()


# -------------------------------------------------------------------------------------------------------- arguments to origin


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """The arguments of `pipe(...)` that have to do with a picture, as the user gave them."""

    image: Picture | Sequence[Picture] | None = None
    mask: Picture | Sequence[Picture] | None = None
    strength: float | None = None
    exact: bool = True
    blur: int = 0
    padding: int | None = None
    expand: int | Sides | None = None
    image_guidance: float | None = None


def canvases(pipe: Pipeline, given: Given, size: int | tuple[int, int] | None) -> list[Canvas]:
    """The pictures made ready; none where none is given. Errors: as `canvas`, and ValueError for arguments that need a picture."""
    task = pipe.spec.task
    if given.image is None:
        for name, neutral in vars(Given()).items():
            if getattr(given, name) != neutral:
                raise ValueError(f"{name} needs image, the picture to start from, got none")
        return []
    if task == "inpaint" and given.mask is None and given.expand is None:
        raise ValueError("mask must be given: this model paints what a mask shows, got none")
    if task == "instruct" and given.strength is not None:
        raise ValueError(f"strength must be None for an instruct model, which starts from noise, got {shown(given.strength)}")
    if task != "instruct" and given.image_guidance is not None:
        raise ValueError(f"image_guidance must be None: only instruct models have it, got {shown(given.image_guidance)}")
    photos, masks = listed("image", given.image), listed("mask", given.mask)
    if len(masks) not in (0, 1, len(photos)):
        raise ValueError(f"mask must be one picture, or one an image ({len(photos)}), got {len(masks)}")
    masks = masks * len(photos) if len(masks) == 1 else masks or [None] * len(photos)
    found = [
        canvas(
            photo,
            mask,
            native=pipe.spec.size,
            factor=pipe.vae.factor,
            size=size,
            blur=given.blur,
            padding=given.padding,
            expand=given.expand,
        )
        for photo, mask in zip(photos, masks, strict=True)
    ]
    if len({c.size for c in found}) > 1:
        shapes = ", ".join(f"{w}×{h}" for w, h in dict.fromkeys(c.size for c in found))
        raise ValueError(f"image must hold pictures of one shape, or size must say at which size to work on all, got {shapes}")
    return found


def listed(name: str, value: Picture | Sequence[Picture] | None) -> list[Picture]:
    if value is None:
        return []
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not found:
        raise ValueError(f"{name} must be a picture or a list of at least one, got an empty list")
    for item in found:
        if not isinstance(item, images.Picture):
            raise ValueError(f"{name} must be a path or a PIL picture, or a list of such, got {shown(item)}")
    return found  # type: ignore[return-value]


def prompts(found: list[Canvas], prompt: str | Sequence[str]) -> str | Sequence[str]:
    """One prompt for several pictures is each one's. Errors: ValueError where there are several of both, and not as many."""
    if len(found) > 1 and isinstance(prompt, str):
        return [prompt] * len(found)
    if len(found) > 1 and len(prompt) != len(found):
        raise ValueError(f"image must be one picture, or one a prompt ({len(prompt)}), got {len(found)}")
    return prompt


def begun(pipe: Pipeline, asked: Request, given: Given, found: list[Canvas]) -> Request:
    """The request with its grid cut to the strength, and with its pictures encoded. Errors: ValueError; NonFiniteError."""
    if not found:
        return asked
    task, masked = pipe.spec.task, found[0].mask is not None
    usual = STRENGTH if task == "text" and not masked else 1.0
    strength = number("strength", first(given.strength, usual), 0, 1)
    image_guidance = number("image_guidance", first(given.image_guidance, IMAGE_GUIDANCE)) if task == "instruct" else None
    sigmas = shortened(pipe.schedule, asked.sigmas, strength, given.exact)
    if len(sigmas) == 1:
        strength = 0.0
    made = origin(pipe, found, len(asked) // len(found), strength, image_guidance)
    return replace(asked, sigmas=sigmas, origin=replace(made, settings=settings(given, strength, image_guidance)))


def settings(given: Given, strength: float, image_guidance: float | None) -> dict[str, Any]:
    """The recipe's part that only runs from a picture have; what is as usual is left out."""
    found = {
        "strength": strength if image_guidance is None else None,
        "exact": None if given.exact else False,
        "blur": given.blur or None,
        "padding": given.padding,
        "expand": list(given.expand) if isinstance(given.expand, tuple) else given.expand,
        "image_guidance": image_guidance,
    }
    return {key: value for key, value in found.items() if value is not None}


def origin(pipe: Pipeline, found: Sequence[Canvas], each: int, strength: float, image_guidance: float | None) -> Origin:
    """The canvases encoded, and what the model's kind needs of them; each of them for `each` pictures in a row."""
    task, factor = pipe.spec.task, pipe.vae.factor
    pictures = [c.picture() for c in found]
    z = pipe.encode(images.to_tensor(pictures))
    repaint = torch.cat([c.repaint(factor) for c in found]).to(z.device) if found[0].mask is not None else None
    beside = None
    if task == "instruct":
        beside = z / pipe.spec.vae.scale  # the VAE's mode, not scaled
    elif task == "inpaint":
        assert repaint is not None
        beside = torch.cat([repaint, pipe.encode(without_masked(found, pictures))], dim=1)
    repaint, beside = (None if part is None else part.repeat_interleave(each, 0) for part in (repaint, beside))
    return Origin(
        canvases=tuple(c for c in found for _ in range(each)),
        z=z.repeat_interleave(each, 0),
        strength=strength,
        repaint=repaint,
        hold=repaint is not None and task == "text",
        beside=beside,
        image_guidance=image_guidance,
        settings={},
    )


def without_masked(found: Sequence[Canvas], pictures: Sequence[Image.Image]) -> Float[Tensor, "b 3 h w"]:
    """The pictures with grey (0) where the mask is white: what an inpainting model may see of them."""
    return images.to_tensor(pictures) * ~torch.cat([c.white() for c in found])


def fingerprint(image: Image.Image) -> str:
    """16 hexadecimal digits that tell one picture's pixels from another's."""
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()[:16]
