"""Build the drawings that the embedded model is trained on: icon packages -> rendered pictures with words and licences.

    python scripts/build_dataset.py DATA                                  # the drawings, for `latentdiff train`
    python scripts/build_dataset.py DATA --pictures 5000 --to pictures/   # captioned pictures in a folder (or --to pictures.tar)

Needs the `npm` client (or the tarballs, with --packages) and `resvg-py`. What is written:

    DATA/drawings.npy     uint8 [n, size, size, 4], RGBA with colour premultiplied by alpha, transparent background
    DATA/index.json       {"size", "styles", "concepts": {name: words}, "drawings": [one record each, in the array's order]}
    DATA/licences.json    package, version, licence, source, number of drawings;   DATA/ATTRIBUTION.md says the same in prose

Drawings of one idea by several hands share a *concept*: the emoji's CLDR label. The curated words are in `dataset_words.json`.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Package:
    """An npm package at a pinned version; `sha256` is of the packed tarball."""

    name: str
    version: str
    sha256: str
    licence: str = "MIT"
    author: str = ""
    source: str = ""

    @property
    def style(self) -> str:
        return self.name.removeprefix("@iconify-json/")

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(name="@iconify-json/noto", version="1.2.9", licence="Apache-2.0", author="Google Inc.",
            source="googlefonts/noto-emoji", sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    Package(name="@iconify-json/noto-v1", version="1.2.5", licence="Apache-2.0", author="Google Inc.",
            source="googlefonts/noto-emoji", sha256="2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    Package(name="@iconify-json/twemoji", version="1.2.5", licence="CC-BY-4.0", author="Twitter",
            source="twitter/twemoji", sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    Package(name="@iconify-json/fluent-emoji", version="1.2.7", licence="MIT", author="Microsoft Corporation",
            source="microsoft/fluentui-emoji", sha256="8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b"),
    Package(name="@iconify-json/fluent-emoji-flat", version="1.2.6", licence="MIT", author="Microsoft Corporation",
            source="microsoft/fluentui-emoji", sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
    Package(name="@iconify-json/emojione", version="1.2.3", licence="CC-BY-4.0", author="Emoji One (version 2)",
            source="EmojiTwo/emojitwo", sha256="26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    Package(name="@iconify-json/fxemoji", version="1.2.2", licence="Apache-2.0", author="Mozilla",
            source="mozilla/fxemoji", sha256="f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
)  # fmt: skip
EMOJIBASE = Package(
    name="emojibase-data", version="17.0.0", author="Miles Johnson", source="milesj/emojibase",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
)  # fmt: skip
WORDS_FILE = Path(__file__).with_name("dataset_words.json")

# Pictures that are writing, or that nobody would ask a model for.
JUNK_GROUPS = {"flags", "component"}
JUNK_SUBGROUPS = {"keycap", "alphanum"}
JUNK_LABEL = re.compile(r"thirty$|^(family|kiss|couple with heart):|^ZZZ$|(medium|medium-small) square$|^hundred points$")
# Pictures that a mirror makes false: writing, directions, dials, the moon's phases.
UNMIRRORED_GROUPS = {"symbols"}
UNMIRRORED_SUBGROUPS = {"time", "money", "hand-single-finger", "award-medal", "music", "book-paper", "computer", "phone", "office",
                        "place-map", "place-building", "mail", "science", "writing"}  # fmt: skip
UNMIRRORED_LABEL = re.compile(
    r"left|right|moon|facing|tilted|police|fire engine|ambulance|taxi|bus|stop sign|ticket|soon|8 ball|keyboard|envelope|magnifying"
    r"|piano|musical|joker|mahjong|cards|newspaper|label|bellhop|receipt|television|slot machine|globe|pie chart|clinking"
)


COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray", "grey"}


# ------------------------------------------------------------------------------------------------ packages


def fetch(package: Package, folder: Path) -> Path:
    """The package's tarball in `folder`, packed by npm unless it lies there already; its checksum is verified."""
    path = folder / package.tarball
    if not path.exists():
        if not shutil.which("npm"):
            raise SystemExit(
                f"npm is not installed, and {path} does not exist: install Node.js, or give --packages a folder with it"
            )
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.exists():
            raise SystemExit(f"npm could not pack {package.name}@{package.version}:\n{done.stderr.strip()}")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != package.sha256:
        raise SystemExit(f"{path} has sha256 {found}, expected {package.sha256}: remove it and try again")
    return path


def read_json(tarball: Path, member: str) -> Any:
    """One JSON file of an npm tarball, read in place."""
    with tarfile.open(tarball) as tar:
        file = tar.extractfile(f"package/{member}")
        assert file is not None
        return json.load(file)


# ------------------------------------------------------------------------------------------------ names -> emoji


def plain_code(hexcode: str) -> str:
    """Without the variation selectors, which the packages set as they like."""
    return hexcode.upper().replace("-FE0F", "").replace("-FE0E", "")


def squash(name: str) -> str:
    """`Red apple`, `red-apple`, `redapple` -> `redapple`."""
    return re.sub("[^a-z0-9]", "", name.lower().replace("ñ", "n"))


@dataclass
class Emoji:
    """Emojibase's table, and the names by which packages may call its rows (best source first)."""

    rows: dict[str, Json]  # by hexcode
    names: dict[str, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))  # squashed name -> {hexcode: rank}
    labels: dict[str, str] = field(default_factory=dict)  # label -> hexcode

    @classmethod
    def read(cls, tarball: Path) -> "Emoji":
        messages = read_json(tarball, "en/messages.json")
        group = {g["order"]: g["key"] for g in messages["groups"]}
        subgroup = {g["order"]: g["key"] for g in messages["subgroups"]}
        rows = [row for row in read_json(tarball, "en/data.json") if "group" in row]
        for row in rows:
            row["group"], row["subgroup"] = group[row["group"]], subgroup[row["subgroup"]]
            row["label"] = row["label"].replace("’", "'")
        emoji = cls({plain_code(row["hexcode"]): row for row in rows})
        for code, row in emoji.rows.items():
            emoji.labels[row["label"]] = code
            emoji.learn(row["label"], code, rank=0)
        for source in ("cldr", "emojibase", "emojibase-legacy", "github", "iamcal", "joypixels"):
            for code, short in read_json(tarball, f"en/shortcodes/{source}.json").items():
                for name in [short] if isinstance(short, str) else short:
                    emoji.learn(name, plain_code(code), rank=2)
        return emoji

    def learn(self, name: str, code: str, rank: int) -> None:
        if code in self.rows and len(name) > 2:
            self.names[squash(name)].setdefault(code, rank)

    def find(self, names: list[str]) -> str | None:
        """The one emoji that the first telling name means; None if none does or two do equally."""
        for name in names:
            found = self.names.get(squash(name), {})
            best = [code for code, rank in found.items() if rank == min(found.values())]
            if len(best) == 1:
                return best[0]
        return None


@dataclass(frozen=True, kw_only=True)
class Icon:
    package: Package
    name: str
    code: str  # emoji
    svg: str


def icons(package: Package, table: Json, chars: dict[str, str], emoji: Emoji, words: Json) -> Iterator[Icon]:
    """The drawings of a package that have a known meaning; one body is given once."""
    own_names, left_out = words["icon_names"].get(package.style, {}), words["left_out"]
    by_char = {name: plain_code(code) for code, name in chars.items()}
    aliases = defaultdict(list)
    for alias, to in table.get("aliases", {}).items():
        aliases[to["parent"]].append(alias)
    seen = set()
    for name, icon in sorted(table["icons"].items(), key=lambda item: (item[1].get("hidden", False), item[0])):
        if name in own_names:
            code = emoji.labels.get(own_names[name].replace("’", "'"))
        else:
            code = by_char.get(name) or (None if "skin-tone" in name else emoji.find([name, *aliases[name]]))
        if f"{package.style}:{name}" in left_out or code not in emoji.rows or junk(emoji.rows[code]) or icon["body"] in seen:
            continue
        seen.add(icon["body"])
        width, height = (icon.get(side, table.get(side, 16)) for side in ("width", "height"))
        yield Icon(package=package, name=name, code=code, svg=svg(icon["body"], width, height))


def junk(row: Json) -> bool:
    return row["group"] in JUNK_GROUPS or row["subgroup"] in JUNK_SUBGROUPS or bool(JUNK_LABEL.search(row["label"]))


# ------------------------------------------------------------------------------------------------ rendering


def svg(body: str, width: float, height: float) -> str:
    """A square document around an icon's body, the icon in its middle."""
    side = max(width, height)
    box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
    return f"{head}{body}</svg>"


def render(document: str, size: int) -> np.ndarray:
    """uint8 [size, size, 4], RGBA premultiplied."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=document, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA").convert("RGBa"))


def look(rgba: np.ndarray) -> Json:
    """What captions and backgrounds need to know of a drawing: its mean colour, the one strong hue and its name, if any.

    `hue` = [degrees, saturation, value, share of the covered area within 30 degrees].
    """
    rgb = rgba[rgba[..., 3] > 200][:, :3]
    if len(rgb) < rgba.shape[0]:
        return {"mean": [128, 128, 128], "hue": None, "colour": None}
    hue, sat, val = np.asarray(Image.fromarray(rgb[None]).convert("HSV"))[0].T.astype(float)
    strong = (sat > 70) & (val > 60)
    counts = np.bincount((hue[strong] / 256 * 36).astype(int) % 36, minlength=36)
    peak = int(np.argmax(sum(np.roll(counts, s) for s in (-1, 0, 1))))
    near = strong & (np.abs((hue - (peak + 0.5) / 36 * 256 + 128) % 256 - 128) < 256 / 12)
    mean = [int(c) for c in rgb.mean(0)]
    if near.mean() < 0.3:
        return {"mean": mean, "hue": None, "colour": None}
    degrees = float(np.degrees(np.angle(np.exp(2j * np.pi * hue[near] / 256).mean())) % 360)
    s, v = (float(np.median(c[near]) / 255) for c in (sat, val))
    strong_hue = [round(degrees, 1), round(s, 3), round(v, 3), round(float(near.mean()), 3)]
    return {"mean": mean, "hue": strong_hue, "colour": colour_name(degrees, s, v) if near.mean() > 0.45 else None}


def colour_name(hue: float, sat: float, val: float) -> str | None:
    """The plain word for a colour; None where people would not agree."""
    if 8 <= hue < 50 and val < (0.8 if hue < 28 else 0.62):
        return "brown"
    if hue >= 310 or hue < 18:
        vivid = sat > 0.7 if hue >= 310 else sat > 0.5
        return "red" if vivid and (hue >= 333 or hue < 18) else "pink" if not vivid and val > 0.75 else None
    for least, most, name in ((22, 35, "orange"), (42, 62, "yellow"), (80, 165, "green"), (190, 245, "blue"), (255, 300, "purple")):
        if least <= hue < most:
            return name
    return None


# ------------------------------------------------------------------------------------------------ English


@dataclass(frozen=True, kw_only=True)
class English:
    """Articles and plurals for the names of drawings."""

    mass: frozenset[str]
    no_article: frozenset[str]
    the: frozenset[str]
    irregular: dict[str, str]

    # Where the words after the head begin: `cup| of tea`, `person| lifting weights`.
    TAIL = re.compile(
        r" (?:with|without|in|on|of|behind|from|over|at|to|and|pointed|tilted|(?:show|cover|stick|hold|savor|blow|roll|point|fac"
        r"|scream|gett|play|lift|wear|tipp|rais|row|bounc|feed|tak|gestur|pour|walk|runn|kneel|shak|curv)ing) "
    )
    AN = re.compile(r"(?i)(?!uni|use|euro|ewe|one\b|one-|UFO|ufo|u-)[aeiou]|hour|x-|SUV\b|8 |ATM\b|OK\b")

    def head(self, noun: str) -> tuple[str, str]:
        """`cup of tea` -> (`cup`, ` of tea`)."""
        cut = self.TAIL.search(noun)
        return (noun[: cut.start()], noun[cut.start() :]) if cut else (noun, "")

    def is_plural(self, noun: str) -> bool:
        first, *_, last = [*noun.split(), *self.head(noun)[0].lower().split()]
        if first in {"people", "men", "women"} or last == "skis":
            return True
        return last.endswith("s") and not last.endswith(("ss", "us", "is", "ceros"))

    def phrase(self, noun: str) -> str:
        """`a cat`, `an owl`, `grapes`, `bread`, `the sun`."""
        last = self.head(noun)[0].split()[-1].lower()
        if noun in self.the:
            return f"the {noun}"
        if noun in self.no_article or last in self.mass or self.is_plural(noun):
            return noun
        return f"{'an' if self.AN.match(noun) else 'a'} {noun}"

    def plural(self, noun: str) -> str | None:
        """`cats`, `cups of tea`; None where one does not count."""
        if not self.phrase(noun).startswith(("a ", "an ")) or re.search(r" (?!ring|wing|building)\w+ing$| its ", noun):
            return None
        head, tail = self.head(noun)
        *before, last = head.split(" ")
        return " ".join([*before, self.irregular.get(last) or plural_word(last)]) + tail


def plural_word(word: str) -> str:
    if word.endswith("man"):
        return word[:-2] + "en"
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + (
        "es" if word in {"tomato", "potato", "mango", "volcano", "tornado", "hero", "superhero", "buffalo", "mosquito"} else "s"
    )


def readable(label: str) -> str:
    """The label as one says it: `person: blond hair` -> `person with blond hair`."""
    if label.endswith("o'clock"):
        return f"clock showing {label}"
    who, colon, what = label.partition(": ")
    if not colon:
        return label
    if what == "bald":
        return f"bald {who}"
    return f"{who} {what}" if what.startswith("facing") else f"{who} with {'a beard' if what == 'beard' else what}"


def split_words(items: list[str]) -> dict[str, list[str]]:
    """`["cat face=cat face|cat", "cow"]` -> `{"cat face": ["cat face", "cat"], "cow": []}`."""
    pairs = (item.replace("’", "'").partition("=") for item in items)
    return {label: nouns.split("|") if nouns else [] for label, _, nouns in pairs}


def concept(row: Json, words: Json, english: English) -> Json:
    """The words for one idea, the best noun first. `recolour` is the noun that a colour may stand before; `sure` are the
    phrases whose colour the label itself names (the others are true only of drawings that have it).
    """
    label = row["label"]
    everyday = label in words["everyday"]
    nouns = words["everyday"].get(label) or [words["nouns"].get(label) or readable(label)]
    if all(set(noun.split()) & COLOURS - set(label.split()) for noun in nouns):
        nouns = [*nouns, readable(label)]  # for the drawings whose colour is another
    paint = (words["recolour"].get(label) or [None])[0]
    return {
        "phrases": [english.phrase(noun) for noun in nouns],
        "plurals": [english.plural(noun) if everyday else None for noun in nouns],
        "sure": [english.phrase(noun) for noun in nouns if set(noun.split()) & COLOURS & set(label.split())],
        "keywords": [tag for tag in row.get("tags", []) if tag.isascii()],
        "group": row["group"],
        "subgroup": row["subgroup"],
        "emoji": row["emoji"],
        "everyday": everyday,
        "mirror": row["group"] not in UNMIRRORED_GROUPS
        and row["subgroup"] not in UNMIRRORED_SUBGROUPS
        and not UNMIRRORED_LABEL.search(label),
        "recolour": paint and {"noun": paint, "plural": english.plural(paint), "is_plural": english.is_plural(paint)},
    }


def read_words() -> tuple[Json, English]:
    words = json.loads(WORDS_FILE.read_text(encoding="utf-8"))
    english = English(
        mass=frozenset(words["mass"]),
        no_article=frozenset(words["no_article"]),
        the=frozenset(words["the"]),
        irregular=words["irregular_plurals"],
    )
    words["everyday"] = {k: v for items in words["everyday"].values() for k, v in split_words(items).items()}
    words["recolour"] = split_words(words["recolour"])
    return words, english


# ------------------------------------------------------------------------------------------------ the data set


def gather(packages: tuple[Package, ...], folder: Path, words: Json) -> tuple[Emoji, list[Icon]]:
    """All usable icons of all packages, in a fixed order."""
    emoji = Emoji.read(fetch(EMOJIBASE, folder))
    tarballs = [fetch(package, folder) for package in tqdm(packages, desc="packages", unit="")]
    chars = [read_json(tarball, "chars.json") for tarball in tarballs]
    for table in chars:
        for code, name in table.items():
            emoji.learn(name, plain_code(code), rank=1)
    found: list[Icon] = []
    for package, tarball, table in zip(packages, tarballs, chars, strict=True):
        if package.style == "fluent-emoji":  # the shaded set has the flat set's names, and no table of its own
            table = chars[[p.style for p in packages].index("fluent-emoji-flat")]
        found += icons(package, read_json(tarball, "icons.json"), table, emoji, words)
    return emoji, found


def build(out: Path, *, size: int, emoji: Emoji, found: list[Icon], words: Json, english: English) -> None:
    """Render and write the data set; `out` appears when it is whole."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder = Path(scratch) / "data"
        folder.mkdir()
        drawings = np.lib.format.open_memmap(folder / "drawings.npy", "w+", np.uint8, (len(found), size, size, 4))
        records = []
        with ProcessPoolExecutor() as pool:  # one for each core
            rendered = pool.map(partial(render, size=size), [icon.svg for icon in found], chunksize=8)
            for i, (icon, pixels) in enumerate(zip(tqdm(found, desc="render", unit="drawing"), rendered, strict=True)):
                drawings[i] = pixels
                records.append(record(icon, emoji.rows[icon.code], look(pixels)))
        drawings.flush()
        names = {r["concept"] for r in records}
        concepts = {row["label"]: concept(row, words, english) for row in emoji.rows.values() if row["label"] in names}
        index = {"size": size, "styles": words["styles"], "concepts": concepts, "drawings": records}
        (folder / "index.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
        write_licences(folder, Counter(icon.package for icon in found))
        folder.rename(out)


def record(icon: Icon, row: Json, seen: Json) -> Json:
    package = icon.package
    return {
        "concept": row["label"],
        "name": icon.name,
        "style": package.style,
        "emoji": row["emoji"],
        "hexcode": icon.code,
        "package": package.name,
        "version": package.version,
        "licence": package.licence,
        **seen,
    }


def write_licences(folder: Path, counts: Counter[Package]) -> None:
    rows = [asdict(package) | {"drawings": n} for package, n in [*counts.items(), (EMOJIBASE, 0)]]
    (folder / "licences.json").write_text(json.dumps(rows, indent=1))
    drawn = "".join(f"- {p.name} {p.version}: {n} drawings by {p.author} ({p.source}), {p.licence}.\n" for p, n in counts.items())
    words = f"Names and keywords: {EMOJIBASE.name} {EMOJIBASE.version} by {EMOJIBASE.author}, {EMOJIBASE.licence}."
    changed = "The drawings were rasterised; in training they are scaled, recoloured, mirrored and composed."
    text = f"# Drawings\n\n{drawn}\n{words}\n{changed}\nCC-BY-4.0 asks for this attribution.\n"
    (folder / "ATTRIBUTION.md").write_text(text)


# ------------------------------------------------------------------------------------------------ captioned pictures


def write_pictures(data: Path, to: Path, *, count: int, size: int, seed: int) -> None:
    """`count` composed pictures with captions and licences: NAME.png, NAME.txt and NAME.json in a folder or a WebDataset tar."""
    from latentdiff.training.drawings import ComposeConfig, Drawings, DrawingSource

    source = DrawingSource(Drawings(data), ComposeConfig(), size)
    files = (file for i in tqdm(range(count), desc="pictures", unit="") for file in picture_files(source, i, seed))
    with tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}-") as scratch:
        partial = Path(scratch) / "pictures"
        write = write_tar if to.suffix == ".tar" else write_folder
        write(partial, files)
        partial.rename(to)


def write_folder(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    path.mkdir()
    for name, content in files:
        (path / name).write_bytes(content)


def write_tar(path: Path, files: Iterator[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def picture_files(source: Any, i: int, seed: int) -> Iterator[tuple[str, bytes]]:
    picture = source.compose(np.random.default_rng((seed, i)))
    png = io.BytesIO()
    Image.fromarray(picture.image).save(png, "png")
    used = [source.drawings.records[k] for k in picture.drawings]
    licences = sorted({f"{r['licence']} ({r['package']} {r['version']})" for r in used})
    about = {"caption": picture.caption, "licences": licences, "drawings": [f"{r['package']}:{r['name']}" for r in used]}
    yield f"{i:08d}.png", png.getvalue()
    yield f"{i:08d}.txt", picture.caption.encode()
    yield f"{i:08d}.json", json.dumps(about, ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------------ command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder of the drawings: made if it does not exist")
    parser.add_argument("--size", type=int, default=160, help="side of a drawing in pixels (default 160)")
    parser.add_argument("--packages", type=Path, help="a folder that keeps the packages' tarballs; those in it are not fetched")
    parser.add_argument("--pictures", type=int, default=0, metavar="N", help="also write N captioned pictures, to --to")
    parser.add_argument("--picture-size", type=int, default=128, help="their side in pixels (default 128)")
    parser.add_argument("--to", type=Path, help="a new folder or a new .tar (WebDataset) for the captioned pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name, low, high in (("size", 16, 2048), ("picture_size", 16, 4096), ("pictures", 0, 10**8)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be from {low} to {high}")
    if bool(args.pictures) != bool(args.to):
        parser.error("--pictures and --to go together")
    if args.to and args.to.exists():
        parser.error(f"--to: {args.to} exists already")
    if args.out.exists() and not (args.out / "index.json").exists():
        parser.error(f"{args.out} exists and is no built data set (it has no index.json)")
    for path in filter(None, (args.out, args.to)):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.out.exists():
        print(f"{args.out} is built already", file=sys.stderr)
    else:
        words, english = read_words()
        with tempfile.TemporaryDirectory() as scratch:
            cache = args.packages or Path(scratch)
            cache.mkdir(parents=True, exist_ok=True)
            emoji, found = gather(PACKAGES, cache, words)
        build(args.out.absolute(), size=args.size, emoji=emoji, found=found, words=words, english=english)
    if args.pictures:
        write_pictures(args.out, args.to.absolute(), count=args.pictures, size=args.picture_size, seed=args.seed)


if __name__ == "__main__":
    main()
