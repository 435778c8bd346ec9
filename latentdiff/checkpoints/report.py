"""What a file or folder is, without building anything: for `latentdiff inspect`."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from latentdiff.checkpoints import keymap
from latentdiff.checkpoints.detect import CONV_IN, detect, kind_of
from latentdiff.checkpoints.families import ModelSpec
from latentdiff.checkpoints.files import CheckpointError, Entry, some_names
from latentdiff.checkpoints.fill import Options, on_meta
from latentdiff.checkpoints.io import (
    check_variant,
    locate,
    networks,
    open_part,
    open_single,
    read_folder,
    single_sources,
    tower_folders,
)
from latentdiff.models.vae_tiny import TinyVAE, TinyVAEConfig


@dataclass(frozen=True, kw_only=True)
class Report:
    """`parts` counts each part's parameters, `dtypes` the tensors of each dtype; `unknown` are the names that no part takes."""

    path: Path
    kind: str
    layout: str
    spec: ModelSpec | None = None
    prediction_from: str | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    bytes: int = 0
    ema: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.path.name}: {self.kind}, {self.layout}, {self.bytes / 2**20:,.1f} MiB"]
        if (spec := self.spec) is not None:
            lines += [
                f"family      {spec.name} ({spec.task}), {spec.size}x{spec.size} pixels, {len(spec.towers)} text tower(s)",
                f"prediction  {spec.prediction} (from {self.prediction_from or 'a trial run when it is loaded'})",
                f"schedule    {spec.schedule.kind}, {spec.schedule.steps} steps, zero terminal SNR: {spec.schedule.zero_snr}",
            ]
        lines += [f"{part:<11} {count / 1e6:,.2f} M parameters" for part, count in self.parts.items()]
        lines.append("dtypes      " + ", ".join(f"{d} ({n} tensors)" for d, n in self.dtypes.items()))
        lines += ["ema         the U-Net's moving average is in the file too"] if self.ema else []
        known = (("unknown", self.unknown), ("missing", self.missing)) if self.spec is not None else ()
        for what, names in known:
            lines.append(f"{what:<11} {f'{len(names)}: {some_names(names)}' if names else 'nothing'}")
        said = (f"metadata    {k} = {' '.join(v.split())[:200]}" for k, v in self.metadata.items())
        return "\n".join([*lines, *("".join(c for c in line if c.isprintable()) for line in said)])  # no commands to a terminal


def inspect(path: str | os.PathLike, *, allow_pickle: bool = False, variant: str | None = None) -> Report:
    """Family, prediction, sizes, dtypes, metadata and what is unknown, of a file, a folder or a hub id. Reads headers only."""
    where = locate(path, variant=variant, allow_pickle=allow_pickle)
    options = Options(allow_pickle=allow_pickle, variant=variant)
    return _folder(where, options) if where.is_dir() else _file(where, options)


def _folder(folder: Path, options: Options) -> Report:
    spec, _ = read_folder(folder)
    check_variant(folder, options.variant)
    modules = networks(spec) | ({"vae": on_meta(TinyVAE, spec.vae)} if isinstance(spec.vae, TinyVAEConfig) else {})
    towers = tower_folders(folder)
    synonyms = {"unet": {}, "vae": keymap.VAE_SYNONYMS, **dict.fromkeys(towers, keymap.TEXT_SYNONYMS)}
    files = {name: keymap.mended(open_part(folder / name, options), synonyms[name]) for name in ("unet", "vae", *towers)}
    ours = {name: set(modules[part].state_dict()) for name, part in zip(files, ("unet", "vae", "text 0", "text 1"), strict=False)}
    return Report(
        path=folder,
        kind="model",
        layout="folder",
        spec=spec,
        prediction_from="scheduler_config.json" if (folder / "scheduler" / "scheduler_config.json").is_file() else "default",
        parts={name: _parameters(file.entries.values()) for name, file in files.items()},
        dtypes=_dtypes(e for file in files.values() for e in file.entries.values()),
        bytes=sum(file.bytes for file in files.values()),
        metadata={k: v for file in files.values() for k, v in file.metadata.items()},
        unknown=tuple(f"{p}/{n}" for p, f in files.items() for n in f.entries if n not in ours[p] and not keymap.ignorable(n)),
        missing=tuple(f"{part}/{name}" for part, file in files.items() for name in sorted(ours[part] - set(file.entries))),
    )


def _file(path: Path, options: Options) -> Report:
    file = open_single(path, options.allow_pickle)
    common = {
        "path": path,
        "layout": "single file",
        "dtypes": _dtypes(file.entries.values()),
        "bytes": file.bytes,
        "ema": any(name.startswith(keymap.EMA_PREFIX) for name in file.entries),
        "metadata": {k: v for k, v in file.metadata.items() if k != "latentdiff"},
    }
    if CONV_IN not in file.entries:
        parts = {"all": _parameters(file.entries.values())}
        return Report(kind=kind_of(file).name, parts=parts, **common)
    try:
        found = detect(file)
    except CheckpointError as error:
        return Report(kind=f"model that latentdiff does not run ({error})", **common)
    plan = single_sources(networks(found.spec), found.layout)
    taken = {part: {s.name for s in sources.values()} for part, sources in plan.items()}
    every = set().union(*taken.values())
    return Report(
        kind="model",
        spec=found.spec,
        prediction_from=found.evidence,
        parts={part: _parameters(file.entries[n] for n in names if n in file.entries) for part, names in taken.items()},
        unknown=tuple(n for n in file.entries if n not in every and not keymap.ignorable(n)),
        missing=tuple(sorted(every - set(file.entries))),
        **common,
    )


def _parameters(entries: Iterable[Entry]) -> int:
    return sum(prod(entry.shape) for entry in entries)


def _dtypes(entries: Iterable[Entry]) -> dict[str, int]:
    return dict(Counter(str(entry.dtype).removeprefix("torch.") for entry in entries).most_common())
