"""The names of weights in original single files, as one table, used in both directions.

Our modules carry the folder layout's names (diffusers). The table says how each is called in the files of CompVis and
Stability-AI. Going there is a lookup, name by name; coming back is the same map of a model's own names, inverted. So the
two directions cannot disagree, and a name that nothing maps to is found.

In a rule, {b} is a block (level), {l} a layer in it, and the other braces are computed from these (`numbers`):

    {down}   place of a layer in the flat list of the way down: 1 + b·(n + 1) + l, with n res blocks a level
    {up}     the same of the way up: b·(n + 1) + l
    {slot}   where an upsampler sits in its entry: after a res block (1), or after a res block and a transformer (2)
    {back}   the VAE's decoder counts its levels from the full resolution up: levels - 1 - b
    {one}    l + 1
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from latentdiff.checkpoints.families import ModelSpec
from latentdiff.checkpoints.files import CheckpointError, TensorFile, some_names
from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig

Op = Literal[
    "", "conv", "T", "0/3", "1/3", "2/3"
]  # ours from the file's: as is, 1x1 conv -> linear, transposed, a third of the rows
Rule = tuple[str, str] | tuple[str, str, Op]

RES_BLOCK: tuple[Rule, ...] = (
    # ours                                      original
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
VAE_RES_BLOCK: tuple[Rule, ...] = (("conv_shortcut", "nin_shortcut"),)
UNET: tuple[Rule, ...] = (
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("down_blocks.{b}.resnets.{l}", "input_blocks.{down}.0"),
    ("down_blocks.{b}.attentions.{l}", "input_blocks.{down}.1"),
    ("down_blocks.{b}.downsamplers.0.conv", "input_blocks.{down}.0.op"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("up_blocks.{b}.resnets.{l}", "output_blocks.{up}.0"),
    ("up_blocks.{b}.attentions.{l}", "output_blocks.{up}.1"),
    ("up_blocks.{b}.upsamplers.0.conv", "output_blocks.{up}.{slot}.conv"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
)
VAE: tuple[Rule, ...] = (
    ("encoder.down_blocks.{b}.resnets.{l}", "encoder.down.{b}.block.{l}"),
    ("encoder.down_blocks.{b}.downsamplers.0.conv", "encoder.down.{b}.downsample.conv"),
    ("{part}.mid_block.resnets.{l}", "{part}.mid.block_{one}"),
    ("{part}.mid_block.attentions.0.group_norm", "{part}.mid.attn_1.norm"),
    ("{part}.mid_block.attentions.0.to_q", "{part}.mid.attn_1.q", "conv"),
    ("{part}.mid_block.attentions.0.to_k", "{part}.mid.attn_1.k", "conv"),
    ("{part}.mid_block.attentions.0.to_v", "{part}.mid.attn_1.v", "conv"),
    ("{part}.mid_block.attentions.0.to_out.0", "{part}.mid.attn_1.proj_out", "conv"),
    ("decoder.up_blocks.{b}.resnets.{l}", "decoder.up.{back}.block.{l}"),
    ("decoder.up_blocks.{b}.upsamplers.0.conv", "decoder.up.{back}.upsample.conv"),
    ("{part}.conv_norm_out", "{part}.norm_out"),
    ("{part}.conv_in", "{part}.conv_in"),
    ("{part}.conv_out", "{part}.conv_out"),
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
)
OPEN_CLIP: tuple[Rule, ...] = (
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.encoder.layers.{l}.layer_norm1", "transformer.resblocks.{l}.ln_1"),
    ("text_model.encoder.layers.{l}.layer_norm2", "transformer.resblocks.{l}.ln_2"),
    ("text_model.encoder.layers.{l}.mlp.fc1", "transformer.resblocks.{l}.mlp.c_fc"),
    ("text_model.encoder.layers.{l}.mlp.fc2", "transformer.resblocks.{l}.mlp.c_proj"),
    ("text_model.encoder.layers.{l}.self_attn.q_proj.", "transformer.resblocks.{l}.attn.in_proj_", "0/3"),
    ("text_model.encoder.layers.{l}.self_attn.k_proj.", "transformer.resblocks.{l}.attn.in_proj_", "1/3"),
    ("text_model.encoder.layers.{l}.self_attn.v_proj.", "transformer.resblocks.{l}.attn.in_proj_", "2/3"),
    ("text_model.encoder.layers.{l}.self_attn.out_proj", "transformer.resblocks.{l}.attn.out_proj"),
    ("text_projection.weight", "text_projection", "T"),
)
TRANSFORMERS: tuple[Rule, ...] = (("text_model", "text_model"),)  # SD 1.x and CLIP-L are stored under transformers' names

# Where the parts lie in a file: (prefix of the text towers and their names, first tower first).
TextLayout = tuple[tuple[str, tuple[Rule, ...]], ...]
UNET_PREFIX, VAE_PREFIX, EMA_PREFIX = "model.diffusion_model.", "first_stage_model.", "model_ema."
TEXT_LAYOUTS: Mapping[str, TextLayout] = {
    "sd1": (("cond_stage_model.transformer.", TRANSFORMERS),),
    "sd2": (("cond_stage_model.model.", OPEN_CLIP),),
    "sdxl": (("conditioner.embedders.0.transformer.", TRANSFORMERS), ("conditioner.embedders.1.model.", OPEN_CLIP)),
    "refiner": (("conditioner.embedders.0.model.", OPEN_CLIP),),
}

# Keys of real files that carry nothing we use. Whatever else is left over is an error.
IGNORABLE: tuple[str, ...] = (
    r"model_ema\..*",
    r"(.*\.)?position_ids",
    r"(.*\.)?logit_scale",
    r"(alphas_cumprod|sqrt_|posterior_|log_one_minus_).*",
    r"betas|v_pred|ztsnr|global_step|logvar|lvlb_weights",
    r"cond_stage_model\.model\.(visual\..*|attn_mask)",
    r"cond_stage_model\.model\.(text_projection|transformer\.resblocks\.23\..*)",  # SD 2.x takes the layer before it
    r"conditioner\.embedders\.\d\.model\.(visual\..*|attn_mask)",
    r"(first_stage_model\.)?(loss|model_ema)\..*",
    r"denoiser\.sigmas|scale_factor|embedding_manager\..*",
    r"cond_stage_model\.transformer\.(vision_model|visual_projection|text_projection)(\..*)?",
    r"(conditioner\.embedders\.0\.transformer\.)?text_projection\.weight",  # of towers whose pooled state is not asked for
)

# Older spellings, mended before anything else looks at the names.
SINGLE_SYNONYMS: Mapping[str, str] = {
    r"^(cond_stage_model\.transformer)\.(embeddings|encoder|final_layer_norm)\.": r"\1.text_model.\2.",
    r"^(conditioner\.embedders\.\d\.model\.text_projection)\.weight$": r"\1",  # and turned round, as folders have it
}
VAE_SYNONYMS: Mapping[str, str] = {  # folders: the attention before 2023
    r"(mid_block\.attentions\.0)\.query\.": r"\1.to_q.",
    r"(mid_block\.attentions\.0)\.key\.": r"\1.to_k.",
    r"(mid_block\.attentions\.0)\.value\.": r"\1.to_v.",
    r"(mid_block\.attentions\.0)\.proj_attn\.": r"\1.to_out.0.",
}
TEXT_SYNONYMS: Mapping[str, str] = {  # folders: newer transformers leave the prefix out
    r"^(embeddings|encoder|final_layer_norm)\.": r"text_model.\1.",
}


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours lies in an original file, and what makes it ours."""

    name: str
    op: Op = ""

    def ours(self, t: Tensor) -> Tensor:
        if self.op == "conv":
            return t.flatten(1) if t.ndim == 4 and t.shape[2:] == (1, 1) else t
        if self.op == "T":
            return t.T.contiguous()
        if self.op.endswith("/3"):
            return t.chunk(3)[int(self.op[0])]
        return t

    def shapes(self, ours: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """The shapes that the file's tensor may have, for a tensor of ours."""
        if self.op == "conv" and len(ours) == 2:
            return (*ours, 1, 1), ours
        if self.op == "T":
            return (ours[::-1],)
        if self.op.endswith("/3"):
            return ((3 * ours[0], *ours[1:]),)
        return (ours,)

    def original(self, parts: list[Tensor]) -> Tensor:
        """The file's tensor, from those of ours that lie in it."""
        if self.op == "conv":
            return parts[0][..., None, None] if parts[0].ndim == 2 else parts[0]
        if self.op == "T":
            return parts[0].T.contiguous()
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def unet_sources(names: Iterable[str], config: UNetConfig, prefix: str = UNET_PREFIX) -> dict[str, Source]:
    """Our names of a U-Net -> where they lie in an original file."""
    return _sources(names, prefix, UNET, inner=RES_BLOCK, n=config.layers_per_block, levels=config.attention)


def vae_sources(names: Iterable[str], config: VAEConfig, prefix: str = VAE_PREFIX) -> dict[str, Source]:
    return _sources(names, prefix, VAE, inner=VAE_RES_BLOCK, n=config.layers_per_block, levels=config.block_out_channels)


def text_sources(names: Iterable[str], prefix: str, rules: tuple[Rule, ...]) -> dict[str, Source]:
    return _sources(names, prefix, rules)


def _sources(
    names: Iterable[str], prefix: str, rules: tuple[Rule, ...], *, inner: tuple[Rule, ...] = (), n: int = 0, levels: tuple = ()
) -> dict[str, Source]:
    found = {name: _source(name, rules, inner, n, levels) for name in names}
    if unknown := [name for name, source in found.items() if source is None]:
        raise ValueError(f"the original single-file layout has no names for {some_names(unknown)}; save a folder instead")
    return {name: Source(prefix + source.name, source.op) for name, source in found.items() if source is not None}


def _source(name: str, rules: tuple[Rule, ...], inner: tuple[Rule, ...], n: int, levels: tuple) -> Source | None:
    """The first rule that fits the start of the name gives the place; a second look renames what a res block holds."""
    for rule in rules:
        pattern, template, op = rule if len(rule) == 3 else (*rule, "")
        if match := _pattern(pattern).match(name):
            place = template.format(**match.groupdict(), **numbers(match.groupdict(), n, levels))
            rest = name[match.end() :]
            return Source(place + (_rename(rest, inner) if "resnets" in pattern else rest), op)
    return None


@cache
def _pattern(rule: str) -> re.Pattern[str]:
    """{b} and {l} stand for numbers, {part} for a word; a rule ends where a name ends, unless it says so itself."""
    text = (
        re.escape(rule).replace(r"\{b\}", r"(?P<b>\d+)").replace(r"\{l\}", r"(?P<l>\d+)").replace(r"\{part\}", r"(?P<part>[a-z]+)")
    )
    return re.compile(text if rule.endswith(".") else text + r"(?=\.|$)")


def numbers(found: Mapping[str, str], n: int, levels: tuple) -> dict[str, int]:
    """The derived numbers of a rule; where a block's rule names no layer, it comes after the block's last.

    levels: one entry a level; of a U-Net, whether it has transformers.
    """
    b = int(found.get("b", 0))
    l = int(found["l"]) if "l" in found else n  # noqa: E741
    return {
        "down": 1 + b * (n + 1) + l,
        "up": b * (n + 1) + l,
        "back": len(levels) - 1 - b,
        "slot": 2 if levels and levels[::-1][b % len(levels)] else 1,
        "one": l + 1,
    }


def _rename(rest: str, rules: tuple[Rule, ...]) -> str:
    for ours, theirs, *_ in rules:
        if rest.startswith(f".{ours}.") or rest == f".{ours}":
            return f".{theirs}{rest[len(ours) + 1 :]}"
    return rest


def text_layout(spec: ModelSpec) -> str:
    """Which of TEXT_LAYOUTS a model is stored in: SDXL's two are told by their vectors, 2.x by its linear projections."""
    if spec.vector != "none":
        return "refiner" if spec.vector == "aesthetic" else "sdxl"
    return "sd2" if spec.unet.linear_projection else "sd1"


def ignorable(name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in IGNORABLE)


def mended(file: TensorFile, synonyms: Mapping[str, str]) -> TensorFile:
    """The same file under today's names. Errors: CheckpointError where two become one, unless their numbers are the same."""

    def mend(name: str) -> str:
        for old, new in synonyms.items():
            name = re.sub(old, new, name)
        return name

    there: dict[str, str] = {}
    for name, entry in file.entries.items():
        first = there.setdefault(mend(name), name)
        if first != name and not (file.entries[first] == entry and torch.equal(file.get(first), file.get(name))):
            raise CheckpointError(f"{file.path}: {first!r} and {name!r} mean the same and differ; which counts cannot be told")
    entries = {name: file.entries[old] for name, old in there.items()}
    turned = {name for name, old in there.items() if old == f"{name}.weight"}
    entries |= {name: replace(entries[name], shape=entries[name].shape[::-1]) for name in turned}
    return replace(file, entries=entries, get=lambda name: file.get(there[name]).T if name in turned else file.get(there[name]))


def ema_name(name: str) -> str:
    """The name of a U-Net weight's moving average: `model_ema.` and the name with all dots removed."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")
