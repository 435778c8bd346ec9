"""LoRAs and new words on a loaded model: `adapt` makes another pipeline, and the one it started from stays as it was."""

from __future__ import annotations

from dataclasses import replace

import torch

from latentdiff.checkpoints.adapted import Files, adapted
from latentdiff.checkpoints.io import Parts
from latentdiff.loading import join_attentions, network
from latentdiff.models.caching import Cached
from latentdiff.models.int8 import Int8
from latentdiff.models.text import Tokenizer
from latentdiff.pipeline import Pipeline


@torch.inference_mode(False)  # as `load`
def adapt(
    pipe: Pipeline,
    *,
    lora: Files[float] = (),
    embeddings: Files[str | None] = (),
    merge: bool = True,
    allow_pickle: bool = False,
    compile: bool = False,
) -> Pipeline:
    """The model with LoRAs and textual inversions on; what they leave alone is shared, not copied.

    lora: files, each with its scale (1 if none is given): `{"flat.safetensors": 0.8}`; several add up.
    embeddings: files of textual inversion, each with the word that stands for it in prompts; None takes the file's own.
    merge: put LoRAs into the weights; False adds them to the layers' outputs at every step: slower, but nothing is rounded.
    allow_pickle: also read .pt and .bin, with torch's `weights_only=True`. compile: the new U-Net, as in `load`.
    Errors: FileNotFoundError; ValueError for a scale, for a LoRA on a U-Net in 8 bits or narrowed, and for `compile` with `cache`
    or `int8`; CheckpointError for a file that does not fit the model, listing the keys.
    """
    cached = pipe.network if isinstance(pipe.network, Cached) else None
    if compile and cached:
        raise ValueError("compile must be False for a model that was loaded with cache")
    if compile and any(isinstance(module, Int8) for module in pipe.unet.modules()):
        raise ValueError("compile must be False for a model that was loaded with int8")
    parts = Parts(
        spec=pipe.spec,
        unet=pipe.unet,
        vae=pipe.vae,
        text_encoders=pipe.text.towers,
        tokenizers=tuple(t for t in pipe.text.tokenizers if isinstance(t, Tokenizer)),
        title=pipe.title,
    )
    made = adapted(parts, lora=lora, embeddings=embeddings, merge=merge, allow_pickle=allow_pickle)
    if made.unet is not pipe.unet:  # that is as `load` left it, maybe in 8 bits
        join_attentions(made.unet)
    text = replace(pipe.text, towers=made.text_encoders, tokenizers=made.tokenizers, spec=made.spec)
    runs = Cached(made.unet, cached.every) if cached else network(made.unet, compile)
    return replace(pipe, unet=made.unet, text=text, spec=made.spec, network=runs, title=made.title)
