"""latentdiff: latent text-to-image diffusion."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.adapting import adapt
    from latentdiff.checkpoints.report import inspect
    from latentdiff.checkpoints.save import convert
    from latentdiff.diffusion.samplers import SAMPLERS, Step
    from latentdiff.diffusion.schedules import SPACINGS
    from latentdiff.images import Images, read_recipe
    from latentdiff.loading import load
    from latentdiff.pipeline import Pipeline, Progress
    from latentdiff.refining import refine
    from latentdiff.sound import NonFiniteError

__version__ = "0.1.0"
__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Images",
    "NonFiniteError",
    "Pipeline",
    "Progress",
    "Step",
    "adapt",
    "convert",
    "inspect",
    "load",
    "read_recipe",
    "refine",
]

_HOMES = {
    "SAMPLERS": "diffusion.samplers",
    "Step": "diffusion.samplers",
    "SPACINGS": "diffusion.schedules",
    "Images": "images",
    "read_recipe": "images",
    "load": "loading",
    "NonFiniteError": "sound",
    "adapt": "adapting",
    "refine": "refining",
    "inspect": "checkpoints.report",
    "convert": "checkpoints.save",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import latentdiff` alone, and its command line's help, load no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'pipeline')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
