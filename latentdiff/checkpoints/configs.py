"""The JSON files of a model folder (diffusers layout), read as plain data into our configurations, and written from them.

Nothing that stands in a folder is imported or executed: class names are compared with those in these tables, `auto_map`,
`custom_pipeline` and whatever else is not read. What a file asks for and our networks do not have is an error that names it.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.families import FAMILIES, ModelSpec, SamplingSpec, ScheduleSpec, TowerSpec
from latentdiff.checkpoints.files import CheckpointError, read_json
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.diffusion.schedules import SPACINGS
from latentdiff.models.unet import UNetConfig
from latentdiff.models.vae import VAEConfig
from latentdiff.models.vae_tiny import TinyVAEConfig

Json = Mapping[str, Any]

# Fields that our networks have only one value for (the first is what an absent field means).
UNET_FIXED: Mapping[str, tuple] = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "act_fn": ("silu",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "only_cross_attention": (False,),
    "mid_block_only_cross_attention": (None, False),
    "dual_cross_attention": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}
VAE_FIXED: Mapping[str, tuple] = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
}
TINY_FIXED: Mapping[str, tuple] = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
    "latent_magnitude": (3,),
    "latent_shift": (0.5,),
    "shift_factor": (0.0, None),
}

KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

# Spacing, and whether the last step ends at the lowest level and not at zero, where a scheduler's file does not say; of all
# others they are "linspace" and False.
SCHEDULER_DEFAULTS: Mapping[str, tuple[str, bool]] = {
    "DDIMScheduler": ("leading", False),
    "DDPMScheduler": ("leading", False),
    "PNDMScheduler": ("leading", True),
}
# Whose `set_alpha_to_one` counts, beside that of files without a class; in others it is a leftover (SDXL's Euler).
ALPHA_TO_ONE = ("DDIM", "PNDM", "None")
NOT_BETAS = ("EDM", "FlowMatch")  # schedulers of models that were trained on other noise levels (CosXL, SD 3)
# Schedulers of distilled models say how they want to be sampled, whatever else stands in the file. TCD's ends at the lowest level.
FEW_STEPS = SamplingSpec(spacing="lcm", steps_offset=0, final="zero", sampler="lcm", steps=4, guidance=1.0)
DISTILLED: Mapping[str, SamplingSpec] = {
    "LCMScheduler": FEW_STEPS,
    "TCDScheduler": replace(FEW_STEPS, sampler="tcd", final="sigma_min"),
}
SCHEDULER_CLASSES = {
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
}
TIME_SPACINGS = ("leading", "trailing", "linspace")
TIMES_OF = {"lcm": "leading"}  # what is written for a spacing that is none of those
# In `_sampling` of a scheduler's file stands what its other fields have no word for; diffusers skips names that begin so.
OWN = {"sampler": str, "spacing": str, "steps": int, "guidance": (int, float)}
LCM_GUIDANCE = 8.0  # of models that take the scale as an input (Luo et al., arXiv 2310.04378, section 5)

PIPELINES: Mapping[tuple[bool, str], str] = {  # (SDXL?, task)
    (False, "text"): "StableDiffusionPipeline",
    (False, "inpaint"): "StableDiffusionInpaintPipeline",
    (False, "instruct"): "StableDiffusionInstructPix2PixPipeline",
    (True, "text"): "StableDiffusionXLPipeline",
    (True, "inpaint"): "StableDiffusionXLInpaintPipeline",
    (True, "instruct"): "StableDiffusionXLInstructPix2PixPipeline",
}
WRITTEN_FOR = "0.38.0"  # the oldest version of the layout's library that our tests open our folders with


class Config:
    """One JSON file, with errors that name it, the field, what it holds and what is allowed."""

    def __init__(self, path: Path, data: Json | None = None):
        self.path, self.data = path, read_json(path) if data is None else data

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.data.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path}: {name} is missing")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise CheckpointError(f"{self.path}: {name} must be {wanted}, found {value!r}")
        if kind is int and value < 0:
            raise CheckpointError(f"{self.path}: {name} must not be negative, found {value}")
        return value

    def levels(self, name: str, n: int, default: Any = None) -> tuple[int, ...]:
        """A number for each of `n` levels, from a list or from one number."""
        value = self.get(name, (int, list), default)
        value = [value] * n if isinstance(value, int) else value
        if len(value) != n or not all(type(v) is int and v > 0 for v in value):
            raise CheckpointError(f"{self.path}: {name} must be a whole number or {n} of them, found {value!r}")
        return tuple(value)

    def one(self, name: str, default: int | None = None) -> int:
        """A number, or a list that holds it again and again."""
        value = self.get(name, (int, list), default)
        several = value if isinstance(value, list) else [value]
        if not several or any(type(v) is not int or v < 0 or v != several[0] for v in several):
            raise CheckpointError(f"{self.path}: {name} must be one whole number, found {value!r}")
        return several[0]

    def check(self, allowed: Mapping[str, tuple]) -> None:
        for name, values in allowed.items():
            if name in self.data and self.data[name] not in values:
                what = " or ".join(repr(v) for v in values)
                raise CheckpointError(f"{self.path}: {name} is {self.data[name]!r}; latentdiff runs only {what}")


def read_unet(config: Config) -> UNetConfig:
    config.check(UNET_FIXED)
    widths = tuple(config.get("block_out_channels", list, [320, 640, 1280, 1280]))
    n = len(widths)
    attention = _attention_levels(config, n)
    heads = "num_attention_heads" if config.data.get("num_attention_heads") is not None else "attention_head_dim"
    vector, told_scale = None, config.data.get("time_cond_proj_dim") is not None
    if config.data.get("addition_embed_type") == "text_time":
        vector = config.get("projection_class_embeddings_input_dim", int)
        config.check({"addition_time_embed_dim": (256,)})
    return _built(
        config,
        UNetConfig,
        in_channels=config.get("in_channels", int, 4),
        out_channels=config.get("out_channels", int, 4),
        block_out_channels=widths,
        layers_per_block=config.one("layers_per_block", 2),
        attention=attention,
        transformer_layers=config.levels("transformer_layers_per_block", n, 1),
        heads=config.levels(heads, n, 8),
        context_dim=config.one("cross_attention_dim", 1280),
        linear_projection=config.get("use_linear_projection", bool, False),
        vector_dim=vector,
        time_cond_dim=config.get("time_cond_proj_dim", int) if told_scale else None,
        norm_groups=config.get("norm_num_groups", int, 32),
        norm_eps=config.get("norm_eps", (float, int), 1e-5),
        sample_size=config.one("sample_size", 64),
    )


def _attention_levels(config: Config, n: int) -> tuple[bool, ...]:
    usual = [True] * (n - 1) + [False]
    down = config.get("down_block_types", list, [_down(a) for a in usual])
    up = config.get("up_block_types", list, [_up(a) for a in reversed(usual)])
    found = tuple(block == _down(True) for block in down)
    if len(down) != n or down != [_down(a) for a in found] or up != [_up(a) for a in reversed(found)]:
        names = ", ".join(block(a) for block in (_down, _up) for a in (True, False))
        raise CheckpointError(
            f"{config.path}: down_block_types {down} and up_block_types {up} must be {n} each, mirrored, of {names}"
        )
    return found


def _down(attention: bool) -> str:
    return "CrossAttnDownBlock2D" if attention else "DownBlock2D"


def _up(attention: bool) -> str:
    return "CrossAttnUpBlock2D" if attention else "UpBlock2D"


def _built(config: Config, kind: Any, **values: Any) -> Any:
    try:
        return kind(**values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{config.path}: {error}") from None


def read_vae(config: Config) -> VAEConfig | TinyVAEConfig:
    if config.data.get("_class_name") == "AutoencoderTiny":
        return _read_tiny(config)
    config.check(VAE_FIXED)
    widths = tuple(config.get("block_out_channels", list, [64]))
    blocks = ["DownEncoderBlock2D"] * len(widths), ["UpDecoderBlock2D"] * len(widths)
    config.check({"down_block_types": blocks[:1], "up_block_types": blocks[1:]})
    return _built(
        config,
        VAEConfig,
        in_channels=config.get("in_channels", int, 3),
        latent_channels=config.get("latent_channels", int, 4),
        block_out_channels=widths,
        layers_per_block=config.get("layers_per_block", int, 1),
        norm_groups=config.get("norm_num_groups", int, 32),
        mid_attention=config.get("mid_block_add_attention", bool, True),
        scale=float(config.get("scaling_factor", (float, int), 0.18215)),
        shift=float(config.get("shift_factor", (float, int), 0.0)),
        quant_conv=config.get("use_quant_conv", bool, True),
        post_quant_conv=config.get("use_post_quant_conv", bool, True),
        force_upcast=config.get("force_upcast", bool, True),
        sample_size=config.one("sample_size", 32),
    )


def _read_tiny(config: Config) -> TinyVAEConfig:
    config.check(TINY_FIXED)
    widths = [config.one(f"{half}_block_out_channels", 64) for half in ("encoder", "decoder")]
    if widths[0] != widths[1]:
        raise CheckpointError(f"{config.path}: encoder and decoder need one width throughout, found {widths}")
    return _built(
        config,
        TinyVAEConfig,
        in_channels=config.get("in_channels", int, 3),
        latent_channels=config.get("latent_channels", int, 4),
        width=widths[0],
        encoder_blocks=tuple(config.get("num_encoder_blocks", list, [1, 3, 3, 3])),
        decoder_blocks=tuple(config.get("num_decoder_blocks", list, [3, 3, 3, 1])),
        scale=float(config.get("scaling_factor", (float, int), 1.0)),
    )


def read_tower(config: Config, *, pad: int, begin: int, end: int) -> TowerSpec:
    """A `text_encoder/config.json`; the token ids are the tokenizer's, since the ones in old files are wrong."""
    config.check({"hidden_act": ("quick_gelu", "gelu")})
    return _built(
        config,
        TowerSpec,
        width=config.get("hidden_size", int, 512),
        mlp=config.get("intermediate_size", int, 2048),
        layers=config.get("num_hidden_layers", int, 12),
        heads=config.get("num_attention_heads", int, 8),
        activation=config.get("hidden_act", str, "quick_gelu"),
        vocab=config.get("vocab_size", int, 49408),
        length=config.get("max_position_embeddings", int, 77),
        projection=config.get("projection_dim", int, 512),
        norm_eps=config.get("layer_norm_eps", (float, int), 1e-5),
        pad=pad,
        begin=begin,
        end=end,
    )


def read_schedule(config: Config) -> tuple[ScheduleSpec, SamplingSpec, str]:
    """The noise schedule, how to sample, and the prediction, of a `scheduler_config.json`."""
    config.check({"trained_betas": (None,), "beta_schedule": tuple(KINDS), "prediction_type": tuple(PREDICTIONS)})
    config.check({"timestep_spacing": TIME_SPACINGS})
    name = str(config.data.get("_class_name"))
    if name.startswith(NOT_BETAS) or ("beta_schedule" not in config.data and {"sigma_data", "shift"} & set(config.data)):
        raise CheckpointError(f"{config.path}: {name} is for models trained on other noise levels than betas; latentdiff runs none")
    spacing, to_lowest = SCHEDULER_DEFAULTS.get(name, ("linspace", False))
    spacing = config.get("timestep_spacing", str, spacing)
    if "set_alpha_to_one" in config.data and name.startswith(ALPHA_TO_ONE):
        to_lowest = not config.get("set_alpha_to_one", bool)
    to_lowest = to_lowest or config.data.get("final_sigmas_type") == "sigma_min"
    schedule = ScheduleSpec(
        kind=KINDS[config.get("beta_schedule", str, "linear")],  # type: ignore[arg-type]
        steps=config.get("num_train_timesteps", int, 1000),
        beta_start=float(config.get("beta_start", (float, int), 0.0001)),
        beta_end=float(config.get("beta_end", (float, int), 0.02)),
        zero_snr=config.get("rescale_betas_zero_snr", bool, False),
    )
    prediction = PREDICTIONS[config.get("prediction_type", str, "epsilon")]
    sampling = SamplingSpec(
        spacing=spacing,
        steps_offset=config.get("steps_offset", int, 0),
        final="sigma_min" if to_lowest else "zero",
    )
    return schedule, replace(_distilled(name, sampling, schedule, prediction), **_own(config)), prediction


def _own(config: Config) -> dict[str, Any]:
    """Sampler, spacing, steps and guidance, those that the file's `_sampling` names."""
    own = Config(config.path, config.get("_sampling", dict, {}))
    if unknown := sorted(set(own.data) - set(OWN)):
        raise CheckpointError(f"{config.path}: _sampling may hold {', '.join(OWN)}, found {unknown[0]!r}")
    own.check({"sampler": tuple(SAMPLERS), "spacing": tuple(SPACINGS)})
    return {name: own.get(name, kind) for name, kind in OWN.items() if name in own.data}


def _distilled(name: str, sampling: SamplingSpec, schedule: ScheduleSpec, prediction: str) -> SamplingSpec:
    """Few steps and no guidance, where the scheduler is one that only distilled models come with (LCM, TCD, Turbo)."""
    if name in DISTILLED:
        return DISTILLED[name]
    turbo = name.startswith("Euler") and sampling.spacing == "trailing" and prediction == "eps" and not schedule.zero_snr
    if turbo:
        says = f"its scheduler ({name}, trailing, epsilon) is the one of models distilled for few steps"
        warnings.warn(f"{says}: unless told otherwise it takes 4 steps at guidance 1", stacklevel=2)
        return replace(sampling, sampler="euler_ancestral" if "Ancestral" in name else "euler", steps=4, guidance=1.0)
    return sampling


def assemble(*, unet: Config, vae: Config, scheduler: Config | None, towers: Sequence[TowerSpec], index: Json) -> ModelSpec:
    """A model's spec from the files of its parts.

    What no file says follows from the U-Net: one with an added vector is an SDXL, takes its towers' penultimate layers without the
    final norm, and the last tower's pooled text.
    """
    u, v = read_unet(unet), read_vae(vae)
    schedule, sampling, prediction = read_schedule(scheduler) if scheduler else (ScheduleSpec(), SamplingSpec(), "eps")
    if u.time_cond_dim is not None:
        sampling = replace(sampling, guidance=LCM_GUIDANCE)
    layout = "none"
    if u.vector_dim is not None:
        towers = [replace(t, layer=-2, final_norm=False, pooled=t is towers[-1]) for t in towers]
        layout = _vector_layout(unet, u.vector_dim, towers[-1].projection or 0)
    else:
        u, sampling = _first_releases(unet, u), _offset_by_one(sampling)
        if isinstance(v, VAEConfig):
            v = replace(v, force_upcast=False)  # files say true by default; only SDXL's overflows in float16
    levels = len(v.block_out_channels if isinstance(v, VAEConfig) else v.encoder_blocks)
    spec = ModelSpec(
        name="custom",
        unet=u,
        vae=v,
        towers=tuple(replace(t, projection=t.projection if t.pooled else None) for t in towers),
        schedule=schedule,
        sampling=sampling,
        prediction=prediction,  # type: ignore[arg-type]
        size=u.sample_size * 2 ** (levels - 1),
        vector=layout,  # type: ignore[arg-type]
        zero_empty_negative=bool(index.get("force_zeros_for_empty_prompt", layout == "size")),
    )
    widths = sum(t.width for t in spec.towers)
    if widths != u.context_dim:
        raise CheckpointError(
            f"{unet.path}: cross_attention_dim is {u.context_dim}, but the text towers are {widths} wide together"
        )
    _built(unet, lambda: spec.task)  # a U-Net input that means nothing is an error now, with the file's name
    return named(spec)


def _first_releases(config: Config, unet: UNetConfig) -> UNetConfig:
    """Folders of 2022 (SD 1.x, inpainting) may say a size of 32 and mean 64, as diffusers' pipelines know too."""
    written = re.match(r"0\.(\d+)\.", str(config.data.get("_diffusers_version")))
    early = written is not None and int(written[1]) < 9
    return replace(unet, sample_size=max(64, unet.sample_size)) if early else unet


def _offset_by_one(sampling: SamplingSpec) -> SamplingSpec:
    """What SD 1.x and 2.x need with "leading", and diffusers' pipelines set, where an old file does not say it."""
    return replace(sampling, steps_offset=1) if sampling.spacing == "leading" else sampling


def _vector_layout(config: Config, vector: int, pooled: int) -> str:
    """Six numbers of 256 sinusoids each beside the pooled text are sizes and crops, five end in the aesthetic score."""
    layouts = {pooled + 6 * 256: "size", pooled + 5 * 256: "aesthetic"}
    if vector not in layouts:
        raise CheckpointError(
            f"{config.path}: projection_class_embeddings_input_dim is {vector}; with {pooled} of pooled text it must be "
            f"{' or '.join(map(str, layouts))}"
        )
    return layouts[vector]


def named(spec: ModelSpec) -> ModelSpec:
    """With the name of the family whose U-Net it has, or "custom". SD 2.x's two are told by prediction, then by size."""

    def likeness(family: ModelSpec) -> tuple[bool, bool]:
        return family.prediction == spec.prediction, family.unet.sample_size == spec.unet.sample_size

    free = {"sample_size": spec.unet.sample_size, "time_cond_dim": spec.unet.time_cond_dim}
    same = [family for family in FAMILIES.values() if replace(family.unet, **free) == spec.unet]
    return replace(spec, name=max(same, key=likeness).name if same else "custom")


# ---------------------------------------------------------------------------------------------------------- writing


def unet_json(c: UNetConfig) -> dict[str, Any]:
    xl = c.vector_dim is not None
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": WRITTEN_FOR,
        "act_fn": "silu",
        "addition_embed_type": "text_time" if xl else None,
        "addition_time_embed_dim": 256 if xl else None,
        "attention_head_dim": list(c.heads),
        "block_out_channels": list(c.block_out_channels),
        "center_input_sample": False,
        "cross_attention_dim": c.context_dim,
        "down_block_types": [_down(a) for a in c.attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": c.in_channels,
        "layers_per_block": c.layers_per_block,
        "mid_block_scale_factor": 1,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": c.norm_eps,
        "norm_num_groups": c.norm_groups,
        "out_channels": c.out_channels,
        "projection_class_embeddings_input_dim": c.vector_dim,
        "sample_size": c.sample_size,
        "time_cond_proj_dim": c.time_cond_dim,
        "transformer_layers_per_block": list(c.transformer_layers),
        "up_block_types": [_up(a) for a in reversed(c.attention)],
        "use_linear_projection": c.linear_projection,
    }


def vae_json(c: VAEConfig | TinyVAEConfig) -> dict[str, Any]:
    if isinstance(c, TinyVAEConfig):
        return {
            "_class_name": "AutoencoderTiny",
            "_diffusers_version": WRITTEN_FOR,
            "in_channels": c.in_channels,
            "out_channels": c.in_channels,
            "latent_channels": c.latent_channels,
            "encoder_block_out_channels": [c.width] * len(c.encoder_blocks),
            "decoder_block_out_channels": [c.width] * len(c.decoder_blocks),
            "num_encoder_blocks": list(c.encoder_blocks),
            "num_decoder_blocks": list(c.decoder_blocks),
            "scaling_factor": c.scale,
        }
    n = len(c.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": WRITTEN_FOR,
        "act_fn": "silu",
        "block_out_channels": list(c.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "force_upcast": c.force_upcast,
        "in_channels": c.in_channels,
        "latent_channels": c.latent_channels,
        "layers_per_block": c.layers_per_block,
        "mid_block_add_attention": c.mid_attention,
        "norm_num_groups": c.norm_groups,
        "out_channels": c.in_channels,
        "sample_size": c.sample_size,
        "scaling_factor": c.scale,
        "shift_factor": c.shift or None,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "use_post_quant_conv": c.post_quant_conv,
        "use_quant_conv": c.quant_conv,
    }


def tower_json(t: TowerSpec) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModelWithProjection" if t.pooled else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": t.begin,
        "eos_token_id": t.end,
        "hidden_act": t.activation,
        "hidden_size": t.width,
        "intermediate_size": t.mlp,
        "layer_norm_eps": t.norm_eps,
        "max_position_embeddings": t.length,
        "model_type": "clip_text_model",
        "num_attention_heads": t.heads,
        "num_hidden_layers": t.layers,
        "pad_token_id": t.pad,
        "projection_dim": t.projection or t.width,
        "vocab_size": t.vocab,
    }


def scheduler_json(spec: ModelSpec) -> dict[str, Any]:
    schedule, sampling = spec.schedule, spec.sampling
    name = SCHEDULER_CLASSES.get(sampling.sampler or "", "DDIMScheduler")
    json = {
        "_class_name": name,
        "_diffusers_version": WRITTEN_FOR,
        "beta_end": schedule.beta_end,
        "beta_schedule": next(k for k, v in KINDS.items() if v == schedule.kind),
        "beta_start": schedule.beta_start,
        "clip_sample": False,
        "num_train_timesteps": schedule.steps,
        "prediction_type": next(k for k, v in PREDICTIONS.items() if v == spec.prediction),
        "rescale_betas_zero_snr": schedule.zero_snr,
        "set_alpha_to_one": sampling.final == "zero",
        "steps_offset": sampling.steps_offset,
        "timestep_spacing": sampling.spacing if sampling.spacing in TIME_SPACINGS else TIMES_OF.get(sampling.spacing, "trailing"),
    }
    if name.startswith("Euler"):  # has neither of them
        del json["clip_sample"], json["set_alpha_to_one"]
        json["final_sigmas_type"] = sampling.final
    said = read_schedule(Config(Path("scheduler_config.json"), json))[1]
    own = {name: getattr(sampling, name) for name in OWN if getattr(sampling, name) not in (None, getattr(said, name))}
    return json | ({"_sampling": own} if own else {})


def index_json(spec: ModelSpec) -> dict[str, Any]:
    """`model_index.json`. SDXL's second tower is `text_encoder_2`; so is the refiner's only one."""
    xl = spec.vector != "none"
    refiner = spec.vector == "aesthetic"
    text = ["transformers", "CLIPTextModel"]
    projected = ["transformers", "CLIPTextModelWithProjection"]
    tokenizer, none = ["transformers", "CLIPTokenizer"], [None, None]
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else PIPELINES[xl, spec.task],
        "_diffusers_version": WRITTEN_FOR,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", vae_json(spec.vae)["_class_name"]],
        "scheduler": ["diffusers", scheduler_json(spec)["_class_name"]],
        "text_encoder": none if refiner else text,
        "tokenizer": none if refiner else tokenizer,
    }
    if xl:
        index |= {"text_encoder_2": projected, "tokenizer_2": tokenizer}
        index["force_zeros_for_empty_prompt"] = spec.zero_empty_negative
        index |= {"requires_aesthetics_score": True} if refiner else {}
    else:
        index |= {"safety_checker": none, "feature_extractor": none, "requires_safety_checker": False}
    return index
