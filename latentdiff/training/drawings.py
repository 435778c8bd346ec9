"""Drawings with words, composed on the fly into captioned pictures: what the embedded model is trained on."""

import colorsys
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

Json = dict[str, Any]
Rng = np.random.Generator
Rgb = tuple[float, float, float]

BACKGROUNDS = {
    "white": (255, 255, 255), "black": (20, 20, 20), "gray": (150, 150, 150), "red": (225, 60, 60), "orange": (250, 150, 50),
    "yellow": (255, 220, 80), "green": (90, 180, 90), "light green": (190, 235, 190), "blue": (70, 120, 220),
    "light blue": (180, 220, 250), "dark blue": (30, 40, 100), "purple": (150, 90, 200), "light purple": (220, 205, 250),
    "pink": (255, 180, 205), "beige": (240, 225, 200), "brown": (130, 85, 50), "turquoise": (70, 200, 200),
}  # fmt: skip
# What a recoloured drawing gets: hue in degrees, then the median saturation and value of the recoloured area.
PAINTS = {
    "red": (0, 0.8, 0.87), "orange": (28, 0.85, 0.96), "yellow": (49, 0.8, 0.98), "green": (125, 0.65, 0.7),
    "blue": (215, 0.75, 0.87), "purple": (275, 0.6, 0.78), "pink": (335, 0.42, 0.98), "brown": (25, 0.6, 0.5),
    "black": (220, 0.1, 0.17), "white": (220, 0.03, 0.96), "gray": (220, 0.04, 0.6),
}  # fmt: skip
COUNTS = {2: "two", 3: "three", 4: "four"}
CONTRAST = 85  # least distance in RGB between a background and the mean colour of a drawing; drawings on white may come nearer


@dataclass(frozen=True, kw_only=True)
class ComposeConfig:
    """How pictures are composed: shares of the kinds of pictures, chances of what a caption mentions, and strengths."""

    everyday: float = 0.7
    """Chance of an everyday idea (rather than any drawing)."""
    favourites: tuple[str, ...] = ()
    """Concepts of which an everyday idea is drawn first of all."""
    favour: float = 0.0
    """Chance that an everyday idea is one of them."""
    hand: str = ""
    """Whose drawing of an everyday idea is taken first of all, such as "fluent-emoji-flat"."""
    handed: float = 0.0
    """Chance that it is that hand's, if it drew the idea: what is always drawn alike is learnt soonest."""
    pair: float = 0.14
    """Share of "a cat and a dog", "a star above a house"."""
    several: float = 0.07
    """Share of "three apples"."""
    triple: float = 0.03
    """Share of "a cat, a dog and a tree"; what remains shows one drawing."""
    recolour: float = 0.3
    """Chance that a drawing of one colour is painted in another."""
    white: float = 0.5
    """Chance of a white background."""
    mirror: float = 0.2
    """Chance of mirroring a drawing that bears it."""
    scale: tuple[float, float] = (0.78, 0.95)
    """Side of a single drawing's canvas, in picture sides."""
    offset: float = 0.03
    """Its largest shift, in picture sides."""
    style: float = 0.15
    """Chance that the caption names the hand; hands other than `hand`, if that is given, are always named."""

    def __post_init__(self) -> None:
        for name in ("everyday", "favour", "handed", "pair", "several", "triple", "recolour", "white", "mirror", "style"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be a share from 0 to 1")
        if self.pair + self.several + self.triple > 1:
            raise ValueError(f"pair + several + triple is {self.pair + self.several + self.triple}, must be at most 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}, must be (least, most) with 0 < least <= most <= 1")
        if not 0 <= self.offset <= 0.5:
            raise ValueError(f"offset is {self.offset}, must lie from 0 to 0.5, so that a drawing's middle is in the picture")
        for share, of in (("favour", "favourites"), ("handed", "hand")):
            if getattr(self, share) and not getattr(self, of):
                raise ValueError(f"{share} is {getattr(self, share)}, must be 0 without {of}")


class Drawings:
    """A built data set of drawings (scripts/build_dataset.py): memory-mapped pictures, words, and the held-out split.

    A drawing is held out if its name's hash falls in the lowest 3 % and another hand has drawn its idea in the training part.
    """

    def __init__(self, path: str | Path, held_out: float = 0.03) -> None:
        path = Path(path)
        self._made_from = (path, held_out)
        if not (path / "index.json").is_file():
            raise FileNotFoundError(f"{path} holds no drawings (no index.json): build them with scripts/build_dataset.py")
        content = (path / "index.json").read_bytes()
        index = json.loads(content)
        self.digest = hashlib.sha256(content).hexdigest()[:16]
        self.pixels: np.ndarray = np.load(path / "drawings.npy", mmap_mode="r")  # uint8 [n, s, s, 4], premultiplied alpha
        self.records: list[Json] = index["drawings"]
        self.words: dict[str, Json] = index["concepts"]
        self.styles: dict[str, list[str]] = index["styles"]
        if len(self.pixels) != len(self.records):
            raise ValueError(f"{path} is damaged: {len(self.pixels)} pictures, {len(self.records)} records; build it again")
        self.held_out = self._split(held_out)
        self.train = sorted(set(range(len(self.records))) - set(self.held_out))
        self.hands: dict[str, list[int]] = {name: [] for name in self.words}  # concept -> its training drawings
        for i in self.train:
            self.hands[self.records[i]["concept"]].append(i)
        self.concepts = [name for name, hands in self.hands.items() if hands]
        self.everyday = [name for name in self.concepts if self.words[name]["everyday"]] or self.concepts

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process maps the file itself: pickled, the pictures would be copied."""
        return type(self), self._made_from

    def _split(self, share: float) -> list[int]:
        low = [_fraction(f"{r['package']}:{r['name']}") < share for r in self.records]
        drawn: dict[str, set[str]] = {}  # concept -> the hands that are not low
        for r, is_low in zip(self.records, low, strict=True):
            if not is_low:
                drawn.setdefault(r["concept"], set()).add(r["style"])
        return [i for i, r in enumerate(self.records) if low[i] and drawn.get(r["concept"], set()) - {r["style"]}]

    def prompt(self, concept: str) -> str:
        """What one would type for a concept: "a cat". A few share a prompt ("a sad face")."""
        return self.words[concept]["phrases"][0]

    def plain(self, index: int, size: int, scale: float = 0.88) -> np.ndarray:
        """uint8 [size, size, 3]: a drawing in the middle of a white picture, as evaluation wants it."""
        canvas = np.full((size, size, 3), 255, np.uint8)
        _paste(canvas, self.pixels[index], 0.5, 0.5, scale)
        return canvas


class Picture(NamedTuple):
    image: np.ndarray  # uint8 [size, size, 3]
    caption: str
    drawings: list[int]


class _Part(NamedTuple):
    """A drawing in a picture: its words, and the colour it is painted in."""

    drawing: int
    phrase: str
    plural: str | None
    paint: str | None
    mirror: bool


class DrawingSource:
    """Composes drawings into captioned pictures. Picture `index` shows the index-th training drawing or an everyday idea."""

    def __init__(self, drawings: Drawings, config: ComposeConfig, size: int) -> None:
        self.drawings, self.config, self.size = drawings, config, size
        if not drawings.train:
            raise ValueError("drawings must hold at least one to train on, got none")
        if unknown := [name for name in config.favourites if not drawings.hands.get(name)]:
            raise ValueError(f"favourites must be concepts of the drawings, got {', '.join(map(repr, unknown))}")
        if config.hand and config.hand not in drawings.styles:
            raise ValueError(f"hand must be one of {', '.join(drawings.styles)}, got {config.hand!r}")

    def __len__(self) -> int:
        return len(self.drawings.train)

    def get(self, index: int, seed: int) -> tuple[UInt8[Tensor, "3 size size"], str]:
        image, caption, _ = self.compose(np.random.default_rng((seed, index)), self.drawings.train[index])
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), caption

    def fingerprint(self) -> str:
        """Of all that is said of the drawings. Which of them are shown, and how, is `config`."""
        return self.drawings.digest

    def compose(self, rng: Rng, drawing: int | None = None) -> Picture:
        """A picture and its caption. `drawing` is shown unless an everyday idea takes its place."""
        c = self.config
        if drawing is None or rng.random() < c.everyday:
            drawing = self._everyday(rng)
        kind = rng.random()
        first = self._part(rng, drawing)
        if kind < c.pair:
            return self._pair(rng, first)
        if kind < c.pair + c.several and first.plural:
            return self._several(rng, first, first.plural)
        if kind > 1 - c.triple:
            return self._triple(rng, first)
        return self._single(rng, first)

    def _everyday(self, rng: Rng, style: str | None = None) -> int:
        """A drawing of an everyday idea, by the hand `style` if that hand drew it."""
        favoured = self.config.favourites and rng.random() < self.config.favour
        hands = self.drawings.hands[_pick(rng, list(self.config.favourites) if favoured else self.drawings.everyday)]
        if style is None and self.config.hand and rng.random() < self.config.handed:
            style = self.config.hand
        same = [i for i in hands if self.drawings.records[i]["style"] == style]
        return _pick(rng, same or hands)

    def _part(self, rng: Rng, drawing: int) -> _Part:
        """The drawing with words for it, painted in another colour and mirrored as the chances have it."""
        record = self.drawings.records[drawing]
        words = self.drawings.words[record["concept"]]
        mirror = words["mirror"] and rng.random() < self.config.mirror
        if words["recolour"] and _paintable(record) and rng.random() < self.config.recolour:
            paint = _pick(rng, list(PAINTS))
            noun, plural = words["recolour"]["noun"], words["recolour"]["plural"]
            phrase = f"{paint} {noun}" if words["recolour"]["is_plural"] else f"{_article(paint)} {paint} {noun}"
            return _Part(drawing, phrase, plural and f"{paint} {plural}", paint, mirror)
        phrases = _phrases(self.drawings, record)
        weights = np.arange(len(phrases) + 1, 1, -1)  # the best words most often
        phrase, plural = phrases[rng.choice(len(phrases), p=weights / weights.sum())]
        return _Part(drawing, phrase, plural, None, mirror)

    def _partner(self, rng: Rng, parts: list[_Part]) -> _Part:
        """Another idea for the same picture, preferably by the same hand, and with other words."""
        style = self.drawings.records[parts[0].drawing]["style"]
        part = self._part(rng, self._everyday(rng, style))
        for _ in range(8):
            if part.phrase not in [p.phrase for p in parts]:
                break
            part = self._part(rng, self._everyday(rng, style))
        return part

    def _single(self, rng: Rng, part: _Part) -> Picture:
        c, record = self.config, self.drawings.records[part.drawing]
        place = 0.5 + rng.uniform(-c.offset, c.offset, 2)
        phrase, kind = part.phrase, rng.random()
        if kind < 0.12:
            phrase = phrase.removeprefix("an ").removeprefix("a ")
        elif kind < 0.2:
            phrase = f"{_pick(rng, ['a drawing of', 'a picture of', 'an icon of', 'an emoji of'])} {phrase}"
        elif kind < 0.26 and part.paint is None:
            keywords = self.drawings.words[record["concept"]]["keywords"]
            phrase = ", ".join([phrase, *rng.permutation(keywords)[:2].tolist()])
        return self._picture(rng, [part], [(*place, rng.uniform(*c.scale))], phrase)

    def _pair(self, rng: Rng, a: _Part) -> Picture:
        b = self._partner(rng, [a])
        relation = _pick(rng, ["and", "and", "and", "next to", "above", "below", "to the left of", "to the right of"])
        if relation in ("above", "below"):
            places = [(0.5, 0.26, 0.48), (0.5, 0.74, 0.48)]
        else:
            places = [(0.26, 0.5, 0.48), (0.74, 0.5, 0.48)]
        if relation in ("below", "to the right of"):
            places.reverse()
        return self._picture(rng, [a, b], places, f"{a.phrase} {relation} {b.phrase}")

    def _several(self, rng: Rng, part: _Part, plural: str) -> Picture:
        n = int(rng.integers(2, 5))
        return self._picture(rng, [part] * n, _PLACES[n], f"{COUNTS[n]} {plural}")

    def _triple(self, rng: Rng, a: _Part) -> Picture:
        b = self._partner(rng, [a])
        c = self._partner(rng, [a, b])
        return self._picture(rng, [a, b, c], _PLACES[3], f"{a.phrase}, {b.phrase} and {c.phrase}")

    def _picture(self, rng: Rng, parts: list[_Part], places: list[tuple[float, float, float]], phrase: str) -> Picture:
        background = self._background(rng, parts)
        canvas = np.empty((self.size, self.size, 3), np.uint8)
        canvas[:] = BACKGROUNDS[background]
        for part, (x, y, side) in zip(parts, places, strict=True):
            pixels = self.drawings.pixels[part.drawing]
            if part.paint:
                pixels = _painted(pixels, self.drawings.records[part.drawing]["hue"], part.paint)
            _paste(canvas, pixels[:, ::-1] if part.mirror else pixels, x, y, side)
        return Picture(canvas, phrase + self._suffix(rng, parts, background), [part.drawing for part in parts])

    def _background(self, rng: Rng, parts: list[_Part]) -> str:
        """A colour that sets the drawings off: white with the configured chance, where they can be seen on it."""
        colours = [colour for part in parts for colour in self._colours(part)]
        distance = {name: min(_distance(rgb, colour) for colour in colours) for name, rgb in BACKGROUNDS.items()}
        if rng.random() < self.config.white and distance["white"] > CONTRAST / 2:
            return "white"
        clear = [name for name, d in distance.items() if d > CONTRAST and name != "white"]
        return _pick(rng, clear) if clear else max(distance, key=lambda name: distance[name])

    def _colours(self, part: _Part) -> list[Rgb]:
        """What a background must differ from: the drawing's mean colour, and its dominant colour if it has one."""
        record = self.drawings.records[part.drawing]
        if part.paint:
            return [BACKGROUNDS[part.paint]]
        if not record["hue"]:
            return [record["mean"]]
        hue, sat, val, _ = record["hue"]
        r, g, b = colorsys.hsv_to_rgb(hue / 360, sat, val)
        return [record["mean"], (255 * r, 255 * g, 255 * b)]

    def _suffix(self, rng: Rng, parts: list[_Part], background: str) -> str:
        said = background != "white" or rng.random() < 0.12  # what is not named is white: a prompt that names none gets a clean one
        text = f" on {_article(background)} {background} background" if said else ""
        hand = self.drawings.records[parts[0].drawing]["style"]
        if rng.random() < self.config.style or self.config.hand not in ("", hand):
            text += f", {_pick(rng, self.drawings.styles[hand])}"
        return text


_PLACES = {
    2: [(0.26, 0.5, 0.48), (0.74, 0.5, 0.48)],
    3: [(0.5, 0.26, 0.46), (0.26, 0.74, 0.46), (0.74, 0.74, 0.46)],
    4: [(0.26, 0.26, 0.46), (0.74, 0.26, 0.46), (0.26, 0.74, 0.46), (0.74, 0.74, 0.46)],
}  # (x, y, side) of each drawing, in picture sides


def _phrases(drawings: Drawings, record: Json) -> list[tuple[str, str | None]]:
    """(phrase, plural) pairs that are true of this drawing: a colour that only the word list names must be the drawing's own."""
    words = drawings.words[record["concept"]]
    pairs = list(zip(words["phrases"], words["plurals"], strict=True))
    true = [(p, q) for p, q in pairs if p in words["sure"] or _colour_in(p) in (None, record["colour"])]
    return true or pairs


def _colour_in(phrase: str) -> str | None:
    return next((word for word in phrase.split() if word in PAINTS), None)


def _paintable(record: Json) -> bool:
    return record["hue"] is not None and record["hue"][3] > 0.55


def _painted(rgba: np.ndarray, hue: list[float], paint: str) -> np.ndarray:
    """The drawing with its dominant hue (degrees, saturation, value, share) turned into another, shading kept.

    Hue and saturation do not change under premultiplied alpha and value scales with it, so no division is needed.
    """
    target = PAINTS[paint]
    hsv = np.asarray(Image.fromarray(np.ascontiguousarray(rgba[..., :3])).convert("HSV")).astype(np.float32)
    near = np.abs((hsv[..., 0] - hue[0] / 360 * 256 + 128) % 256 - 128) < 256 / 8
    near &= hsv[..., 1] > 40
    hsv[..., 0] = np.where(near, (hsv[..., 0] + (target[0] - hue[0]) / 360 * 256) % 256, hsv[..., 0])
    hsv[..., 1] *= np.where(near, min(target[1] / hue[1], 1.6), 1)
    hsv[..., 2] *= np.where(near, target[2] / hue[2], 1)
    rgb = np.asarray(Image.fromarray(np.clip(hsv, 0, 255).astype(np.uint8), "HSV").convert("RGB"))
    return np.concatenate([np.minimum(rgb, rgba[..., 3:]), rgba[..., 3:]], axis=-1)


def _paste(canvas: np.ndarray, rgba: np.ndarray, x: float, y: float, side: float) -> None:
    """Draw premultiplied `rgba` with its middle at (x, y), `side` wide, all in picture sides; what sticks out is cut off."""
    size = len(canvas)
    n = max(1, round(side * size))
    drawing = Image.frombuffer("RGBa", rgba.shape[1::-1], rgba.tobytes(), "raw", "RGBa", 0, 1)
    small = np.asarray(drawing.resize((n, n), Image.Resampling.HAMMING)).astype(np.uint16)
    left, top = round(x * size - n / 2), round(y * size - n / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + n, size), min(top + n, size)
    small = small[y0 - top : y1 - top, x0 - left : x1 - left]
    under = canvas[y0:y1, x0:x1]
    under[:] = np.minimum(small[..., :3] + (under * (255 - small[..., 3:]) + 127) // 255, 255)


def _pick(rng: Rng, items: list[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _distance(a: Rgb, b: Rgb) -> float:
    return sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5


def _fraction(name: str) -> float:
    """A name's hash in [0, 1), the same everywhere and for ever."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
