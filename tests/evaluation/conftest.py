"""A tiny random model with a CLIP of its own."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def judged_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a random CLIP, whose text tower takes the place of the model's."""
    from latentdiff.checkpoints import tokenizer
    from latentdiff.training.clip import CLIPTraining, build_clip, save_clip

    folder = tmp_path_factory.mktemp("judged") / "tiny"
    shutil.copytree(tiny_folder, folder)
    words = tokenizer.read(folder / "tokenizer")[0]
    sizes: dict[str, Any] = {"width": 32, "heads": 4, "text_layers": 2, "image_layers": 2, "length": 16}
    clip = build_clip(CLIPTraining(out=folder, data=folder, size=32, patch=8, **sizes), words)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in clip.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    save_clip(clip, words, folder)
    return folder
