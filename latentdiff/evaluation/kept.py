"""Long measurements in parts: what each part found is written at once, so that a measurement that was stopped goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from torch import Tensor, nn

from latentdiff.checkpoints.files import CheckpointError, read_json, write_json
from latentdiff.training.checkpoint import digest


class Kept:
    """The finished parts of a measurement, in a JSON file until all are.

    asked: what they depend on, the model's weights among it; the parts of another question, or a damaged file, count for nothing.
    """

    def __init__(self, path: Path, asked: Mapping[str, Any]) -> None:
        self.path, self.asked = path, json.loads(json.dumps(asked, default=str))
        self.parts: dict[str, Any] = self._read()
        self._lock = Lock()

    def _read(self) -> dict[str, Any]:
        try:
            found = read_json(self.path)
        except (FileNotFoundError, CheckpointError):
            return {}
        return found["parts"] if found.get("asked") == self.asked else {}

    def __call__(self, name: str, compute: Callable[[], Any]) -> Any:
        """The part of that name: as it was kept, or computed now. It must be what JSON can hold. Threads may share a `Kept`."""
        if name not in self.parts:
            found = compute()
            with self._lock:
                self.parts[name] = found
                write_json(self.path, {"asked": self.asked, "parts": self.parts})
        return self.parts[name]

    def done(self) -> None:
        """All parts are finished: the next measurement begins anew."""
        self.path.unlink(missing_ok=True)


class Weighty(Protocol):
    def parameters(self) -> Iterator[Tensor]: ...


def fingerprint(*parts: Weighty) -> str:
    """16 hexadecimal digits that tell the weights of some networks from others'."""
    weights = (p for part in parts for p in (part.state_dict().values() if isinstance(part, nn.Module) else part.parameters()))
    return digest({f"{k:06}": p for k, p in enumerate(weights)})
