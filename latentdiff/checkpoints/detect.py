"""What a single file is, from the names and shapes of its tensors and from its metadata; nothing is built.

The family follows from the text towers' names and the U-Net's input. The prediction of SD 2.x can not be told from either: the
user's word comes first, then what the file says, then a trial run of the U-Net, with a warning.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints import configs, families, keymap
from latentdiff.checkpoints.families import ModelSpec, Prediction
from latentdiff.checkpoints.files import CheckpointError, TensorFile
from latentdiff.checkpoints.lora import ROLES
from latentdiff.models.unet import UNet

CONV_IN = keymap.UNET_PREFIX + "input_blocks.0.0.weight"
FAMILIES: Mapping[tuple[str, int], ModelSpec] = {  # (layout of the text towers, channels of the U-Net's input)
    ("sd1", 4): families.SD15,
    ("sd1", 9): families.SD15_INPAINT,
    ("sd1", 8): families.INSTRUCT_PIX2PIX,
    ("sd2", 4): families.SD21,
    ("sd2", 9): families.SD2_INPAINT,
    ("sdxl", 4): families.SDXL,
    ("sdxl", 9): families.SDXL_INPAINT,
    ("sdxl", 8): families.SDXL_INSTRUCT,
    ("refiner", 4): families.SDXL_REFINER,
}
WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "refiner"}  # of the context, where a file has no text towers


@dataclass(frozen=True)
class Kind:
    """A file that is no model: told by the start or the end of some name in it; and what to do with it."""

    name: str
    advice: str
    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()


INVERSION = Kind(
    "textual inversion", "load a model, then add it with `embeddings`", ("string_to_param", "emb_params", "clip_l", "clip_g")
)
KINDS: tuple[Kind, ...] = (
    Kind(
        "LoRA", "load the model it was made for, then add it with `lora`", ends=tuple(end for end in ROLES if ROLES[end] != "alpha")
    ),
    INVERSION,
    Kind("Stable Diffusion 3", "latentdiff does not run it", ("model.diffusion_model.joint_blocks.", "joint_blocks.")),
    Kind("Flux", "latentdiff does not run it", ("model.diffusion_model.double_blocks.", "double_blocks.")),
    Kind("ControlNet", "latentdiff does not run it", ("control_model.", "controlnet_cond_embedding.")),
    Kind("autoencoder", "load a model and give this file as `vae`", ("first_stage_model.", "decoder.conv_in", "encoder.conv_in")),
    Kind("U-Net of a folder", "load the folder that holds unet/, vae/ and the text tower", ("down_blocks.",)),
    Kind("CLIP", "what pictures are scored with; load the model's folder", ("vision_model.", "visual.")),
    Kind("text tower of a folder", "load the folder that holds it, unet/ and vae/", ("text_model.", "embeddings.token_embedding.")),
)
UNKNOWN = Kind("unknown", "it is no Stable Diffusion 1.x, 2.x or XL, nor anything else that latentdiff knows")
PREDICTIONS = {"v": "v", **configs.PREDICTIONS, "eps": "eps"}  # of each the first is ModelSpec's, which we write
BASE_STEP = 875000  # `global_step` of the SD 2.0 base release, which predicts eps


@dataclass(frozen=True)
class Found:
    """A file's family, where its text towers lie, and how the prediction is known; None if only a trial run can tell."""

    spec: ModelSpec
    layout: str
    evidence: str | None
    tokenizer: Mapping[str, Any] | None = None  # only files that we wrote have one


def detect(file: TensorFile) -> Found:
    """The family of a single file in the original naming. Errors: CheckpointError that says what the file is instead."""
    layout, channels = text_layout(file), unet_channels(file)
    own = file.metadata.get("latentdiff")
    if own is not None:
        return _ours(file.path, own, layout)
    if (layout, channels) not in FAMILIES:
        known = ", ".join(f"{c}" for name, c in FAMILIES if name == layout)
        raise CheckpointError(
            f"{file.path}: the U-Net takes {channels} channels; known for this kind of model ({layout}) are {known}"
        )
    spec = FAMILIES[layout, channels]
    evidence, prediction = _prediction_of(file)
    if evidence is None and spec is not families.SD21:
        evidence = "family"
    if prediction is not None:
        spec = predicting(spec, prediction)
    if "ztsnr" in file.entries:
        spec = with_zero_snr(spec)
    return Found(spec, layout, evidence)


def predicting(spec: ModelSpec, prediction: Prediction) -> ModelSpec:
    """The same model with another prediction; SD 2.x's two releases differ in their size too."""
    if spec in (families.SD21, families.SD21_BASE) and prediction != "x0":
        return families.SD21 if prediction == "v" else families.SD21_BASE
    return configs.named(replace(spec, prediction=prediction))


def with_zero_snr(spec: ModelSpec) -> ModelSpec:
    """Noise alone at the last step, and a grid that begins there (Lin et al. 2023, arXiv 2305.08891, sections 3.1 and 3.3)."""
    sampling = replace(spec.sampling, spacing="trailing")
    return replace(spec, schedule=replace(spec.schedule, zero_snr=True), sampling=sampling)


def unet_channels(file: TensorFile) -> int:
    entry = file.entries.get(CONV_IN)
    if entry is None or len(entry.shape) != 4:
        kind = kind_of(file)
        raise CheckpointError(
            f"{file.path}: expected a U-Net with {CONV_IN} (4 axes), found another kind of file: {kind.name}; {kind.advice}"
        )
    return entry.shape[1]


def kind_of(file: TensorFile) -> Kind:
    """What a file without a U-Net is."""
    for kind in KINDS:
        if any(name.startswith(kind.starts) or name.endswith(kind.ends) for name in file.entries):
            return kind
    shapes = [entry.shape[-1:] for entry in file.entries.values()]
    return INVERSION if shapes in ([(768,)], [(1024,)], [(1280,)]) else UNKNOWN  # a word alone, as wide as a text tower


def text_layout(file: TensorFile) -> str:
    """Which of `keymap.TEXT_LAYOUTS` a file has; told by the width of the context where it has no text tower."""
    for layout in ("sdxl", "refiner", "sd2", "sd1"):
        prefixes = [prefix for prefix, _ in keymap.TEXT_LAYOUTS[layout]]
        if all(any(name.startswith(prefix) for name in file.entries) for prefix in prefixes):
            return layout
    widths = {e.shape[1] for n, e in file.entries.items() if n.endswith("attn2.to_k.weight") and len(e.shape) == 2}
    return WIDTHS.get(widths.pop(), "sd1") if len(widths) == 1 else "sd1"


def _prediction_of(file: TensorFile) -> tuple[str | None, Prediction | None]:
    """What the file itself says of its prediction, and where."""
    said = file.metadata.get("modelspec.prediction_type", "").lower()
    if said in PREDICTIONS:
        return "modelspec.prediction_type", PREDICTIONS[said]  # type: ignore[return-value]
    if "v_pred" in file.entries:
        return "v_pred", "v"
    if "global_step" in file.entries and int(file.get("global_step")) == BASE_STEP:
        return f"global_step {BASE_STEP}", "eps"
    return None, None


def _ours(path: Path, text: str, layout: str) -> Found:
    """A file that `save_single` wrote from a model of no family: its configurations are in the metadata."""
    try:
        data = json.loads(text)
        towers = [
            configs.read_tower(configs.Config(path, t), pad=t["pad_token_id"], begin=t["bos_token_id"], end=t["eos_token_id"])
            for t in data["text"]
        ]
        parts = {name: configs.Config(path, data[name]) for name in ("unet", "vae", "scheduler")}
        spec = configs.assemble(**parts, towers=towers, index=data["index"])
        return Found(spec, layout, "metadata", data.get("tokenizer"))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the metadata `latentdiff` is not what save_single writes ({error!r})") from None


@torch.no_grad()
def try_prediction(unet: UNet) -> Prediction:
    """Run the U-Net once on constants at t = 999: eps comes back as eps, v comes back turned round.

    At the noisiest level eps ≈ x, so that the mean of F - x is near 0, while v ≈ -x0 (stable-diffusion-webui found the threshold).
    """
    weight = unet.conv_in.weight
    x = torch.full((1, unet.config.in_channels, 8, 8), 0.5, dtype=weight.dtype, device=weight.device)
    context = torch.full((1, 2, unet.config.context_dim), 0.5, dtype=weight.dtype, device=weight.device)
    out = unet(x, torch.full((1,), 999.0, device=weight.device), context)
    return "v" if (out - x[:, : out.shape[1]]).float().mean() < -1 else "eps"
