"""What several test files need: the dataset script as a module, and a tiny data set of drawings built by it."""

import hashlib
import importlib
import io
import json
import os
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # its neighbours, and what it starts, share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SCRIPT = Path(__file__).parents[1] / "scripts" / "build_dataset.py"


@pytest.fixture(scope="session")
def builder() -> ModuleType:
    """scripts/build_dataset.py, by a path that the processes it starts can import it from."""
    sys.path.insert(0, str(SCRIPT.parent))
    return importlib.import_module(SCRIPT.stem)


def write_package(folder: Path, package: Any, files: dict[str, Any]) -> str:
    """A tarball as `npm pack` makes it; returns its sha256."""
    path = folder / package.tarball
    with tarfile.open(path, "w:gz") as tar:
        for name, value in files.items():
            content = json.dumps(value).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def disc(fill: str, opacity: float = 1) -> dict[str, str]:
    return {"body": f'<circle cx="16" cy="16" r="14" fill="{fill}" opacity="{opacity}"/>'}


def emojibase() -> dict[str, Any]:
    """Eleven emoji in emojibase's form."""
    groups = ["animals-nature", "food-drink", "travel-places", "symbols", "flags", "people-body"]
    subgroups = ["animal-mammal", "food-fruit", "transport-ground", "arrow", "keycap", "country-flag", "person", "heart", "time"]
    rows = [  # hexcode, label, group, subgroup, tags
        ("1F431", "cat face", 0, 0, ["cat", "pet"]), ("1F408", "cat", 0, 0, ["pet"]), ("1F436", "dog face", 0, 0, ["dog", "pet"]),
        ("1F34E", "red apple", 1, 1, ["fruit"]), ("1F697", "automobile", 2, 2, ["car"]), ("27A1-FE0F", "right arrow", 3, 3, []),
        ("31-FE0F-20E3", "keycap: 1", 3, 4, []), ("1F1E8-1F1ED", "flag: Switzerland", 4, 5, []), ("1F476", "baby", 5, 6, []),
        ("1F499", "blue heart", 3, 7, ["love"]), ("1F550", "one o’clock", 2, 8, []),
    ]  # fmt: skip
    columns = ("hexcode", "label", "group", "subgroup", "tags")
    data = [dict(zip(columns, row, strict=True)) | {"emoji": chr(int(row[0].split("-")[0], 16))} for row in rows]
    tables = [[{"key": key, "order": i} for i, key in enumerate(keys)] for keys in (groups, subgroups)]
    shortcodes = ("cldr", "emojibase", "emojibase-legacy", "github", "iamcal", "joypixels")
    return {
        "en/data.json": data,
        "en/messages.json": {"groups": tables[0], "subgroups": tables[1]},
        **{f"en/shortcodes/{name}.json": {"1F697": ["car", "red_car"]} if name == "github" else {} for name in shortcodes},
    }


ARROW = {"body": '<path d="M4 12h14v-6l12 10l-12 10v-6h-14z" fill="#2060c0"/>'}


def hands() -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """(icons, chars) of three packages."""
    noto = {
        "cat-face": disc("#f0a020"), "cat": disc("#e09010"), "dog-face": disc("#a06030"), "red-apple": disc("#e02020"),
        "automobile": disc("#e01818"), "right-arrow": ARROW, "keycap-1": disc("#000"), "flag-switzerland": disc("#f00"),
        "baby": disc("#fc8"), "baby-dark-skin-tone": disc("#642"), "blue-heart": disc("#3060e0"), "one-oclock": disc("#ccc"),
        "no-such-emoji": disc("#123456"),
    }  # fmt: skip
    flat = {name: disc(fill) for name, fill in (
        ("cat-face", "#f8b040"), ("dog-face", "#a86838"), ("red-apple", "#e83030"), ("automobile", "#2050e0"),
        ("blue-heart", "#2858d8"),
    )} | {"catface": disc("#f8b040")  # the same drawing under a second name
    }  # fmt: skip
    fxemoji = {"cat": disc("#ffc050"), "catside": disc("#ffd070"), "dog": disc("#b07040"), "redapple": disc("#f02030", 0.5)}
    table = {"width": 32, "height": 32}
    return {
        "noto": ({**table, "icons": noto}, {"1f431": "cat-face", "1f408": "cat"}),
        "fluent-emoji-flat": ({**table, "icons": flat, "aliases": {"kitten": {"parent": "cat-face"}}}, {}),
        "fxemoji": ({**table, "icons": fxemoji}, {}),
    }


@pytest.fixture(scope="session")
def packages(builder: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Any, ...], Any]:
    """(folder of tarballs, the icon packages, emojibase), tiny ones of our own in the form of the real ones."""
    folder = tmp_path_factory.mktemp("packages")
    made = []
    for style, (icons, chars) in hands().items():
        package = builder.Package(
            name=f"@iconify-json/{style}", version="9.9.9", sha256="", licence="MIT", author="us", source="here"
        )
        sha256 = write_package(folder, package, {"icons.json": icons, "chars.json": chars})
        made.append(replace(package, sha256=sha256))
    base = builder.Package(name="emojibase-data", version="9.9.9", sha256="")
    return folder, tuple(made), replace(base, sha256=write_package(folder, base, emojibase()))


@pytest.fixture(scope="session")
def drawings_folder(
    builder: ModuleType, packages: tuple[Path, tuple[Any, ...], Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A built data set of 18 drawings at 40 pixels."""
    pytest.importorskip("resvg_py")
    folder, icon_packages, base = packages
    out = tmp_path_factory.mktemp("data") / "drawings"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "PACKAGES", icon_packages)
        patch.setattr(builder, "EMOJIBASE", base)
        builder.main([str(out), "--size", "40", "--packages", str(folder)])
    return out


# -- a tiny random model --

WORDS = "a cat, a dog, a red apple on a blue background, two stars above a house, flat style. the quick brown fox!"


def tiny_tokenizer() -> Any:
    """CLIP's byte-pair encoding with a small vocabulary of its own: every byte, and what the words above have in common."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    from latentdiff.models import text

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    split = pre_tokenizers.Split(Regex(text.WORDS), behavior="removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])  # type: ignore[assignment]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=560, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator([WORDS, " ".join(letters)] * 4, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learnt["merges"]]
    tokens = sorted(letters) + sorted(f"{letter}</w>" for letter in letters) + ["".join(m) for m in merges]
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    return text.Tokenizer(vocab, merges, length=16)  # type: ignore[arg-type]


def randomise(module: Any, seed: int = 0) -> Any:
    """Weights at which every layer matters: also biases and norms, which start as zeros and ones, are drawn."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * noise + float("norm" in name and name.endswith("weight"))
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny_parts() -> Any:
    """tiny_parts(**changes of the spec): a random model of some 100,000 parameters: 32 x 32 pictures, v prediction, cosine."""
    from dataclasses import replace

    from latentdiff.checkpoints.families import EMBEDDED, SamplingSpec
    from latentdiff.checkpoints.io import Parts
    from latentdiff.models.text import TextTower, TowerSpec
    from latentdiff.models.unet import UNet, UNetConfig
    from latentdiff.models.vae import VAE, VAEConfig

    words = tiny_tokenizer()
    ids = {"vocab": len(words), "begin": words.begin_id, "end": words.end_id, "pad": words.end_id}
    tower = TowerSpec(width=32, mlp=64, layers=2, heads=4, length=16, activation="gelu", **ids)
    unet = UNetConfig(
        block_out_channels=(16, 32), layers_per_block=1, attention=(True, True), transformer_layers=(1, 1), heads=(2, 4),
        context_dim=32, norm_groups=8, sample_size=8,
    )  # fmt: skip
    vae = VAEConfig(block_out_channels=(8, 8, 16), layers_per_block=1, norm_groups=4, scale=0.5, force_upcast=False, sample_size=32)
    sampling = SamplingSpec(spacing="trailing", steps_offset=0, final="zero")  # whatever the embedded model is sampled with
    tiny = replace(EMBEDDED, name="custom", unet=unet, vae=vae, towers=(tower,), size=32, sampling=sampling)

    def make(**changes: Any) -> Parts:
        spec = replace(tiny, **changes)
        return Parts(
            spec=spec,
            unet=randomise(UNet(spec.unet), 1),
            vae=randomise(VAE(spec.vae), 2),  # type: ignore[arg-type]
            text_encoders=tuple(randomise(TextTower(t), 3 + i) for i, t in enumerate(spec.towers)),
            tokenizers=(words,) * len(spec.towers),
            title="tiny",
        )

    return make


@pytest.fixture(scope="session")
def tiny_folder(tiny_parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the folder layout."""
    from latentdiff.checkpoints.save import save_folder

    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(tiny_parts(), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pipe(tiny_folder: Path) -> Any:
    """The tiny model, loaded on the CPU."""
    import latentdiff

    return latentdiff.load(tiny_folder, device="cpu", dtype="float32")
