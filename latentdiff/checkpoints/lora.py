"""LoRA and its relatives: read from any of the field's spellings, put on a model that stays as it was.

A LoRA is a set of changes to weights: W' = W + scale · delta (Hu et al. 2021, arXiv 2106.09685, eq. 3). `with_loras` makes new
networks that share every untouched tensor with the old ones. So nothing is ever taken back out of rounded weights: the model
without the LoRA is the old one, bit for bit, and other scales start from it again.

Kinds: low-rank pairs, also with a middle (Tucker); LoHa and LoKr (LyCORIS, arXiv 2309.14859, eq. 8 and sec. 3.2); whole
differences; each with DoRA's magnitude (Liu et al. 2024, arXiv 2402.09353, eq. 5) where the file has one.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.checkpoints import keymap
from latentdiff.checkpoints.files import CheckpointError, TensorFile, open_tensors, read_json, some_names
from latentdiff.checkpoints.fill import on_meta
from latentdiff.models.attention import Attention
from latentdiff.models.narrow import is_narrowed
from latentdiff.models.text import TextTower
from latentdiff.models.unet import UNet

Networks = Mapping[str, UNet | TextTower]  # "unet", "text 0" and, with two towers, "text 1"
Target = tuple[str, str]  # network, name of a weight without ".weight"

ROLES: Mapping[str, str] = {  # end of a key -> what the tensor is; the longest end that fits counts
    # kohya              # diffusers                                                     # peft
    ".lora_down.weight": "down", ".lora.down.weight": "down", "_lora.down.weight": "down", ".lora_A.weight": "down",
    ".lora_up.weight": "up", ".lora.up.weight": "up", "_lora.up.weight": "up", ".lora_B.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_linear_layer.down.weight": "down", ".lora_A.default.weight": "down",
    ".lora_linear_layer.up.weight": "up", ".lora_B.default.weight": "up",
    ".alpha": "alpha", ".lora.alpha": "alpha", "_lora.alpha": "alpha",
    ".dora_scale": "dora", ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".diff": "diff", ".w_norm": "diff", ".diff_b": "bias", ".b_norm": "bias",
    **{f".{role}": role for role in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    )},
}  # fmt: skip
KINDS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "down up",
        "down up mid",
        "diff",
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
        *(
            f"{first} {second}"
            for first in ("lokr_w1", "lokr_w1_a lokr_w1_b")
            for second in ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2")
        ),
    )
)
BESIDE = {"bias", "dora", "magnitude"}  # roles that come with a change of a weight, or alone
UNDERSCORED: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet_", "lycoris_"),
    "text 0": ("lora_te_", "lora_te1_"),
    "text 1": ("lora_te2_",),
}
DOTTED: Mapping[str, tuple[str, ...]] = {
    "unet": ("unet.", "", "base_model.model.", "diffusion_model."),
    "text 0": ("text_encoder.", "base_model.model.", "text_encoders.clip_l.transformer.", "text_encoders.clip_h.transformer."),
    "text 1": ("text_encoder_2.", "text_encoders.clip_g.transformer."),
}
OLD_NAMES: Mapping[str, str] = {  # diffusers before 2023-09
    r"\.processor\.": ".",
    r"\.self_attn\.to_([qkv])$": r".self_attn.\1_proj",
    r"\.self_attn\.to_out$": ".self_attn.out_proj",
    r"\.to_out$": ".to_out.0",
}


@dataclass(frozen=True, eq=False)
class Change:
    """What a file says of one weight. `alpha / rank` scales it; without an alpha that is 1.

    said: the rank for changes that have none of their own, where a file tells it.
    """

    tensors: Mapping[str, Tensor]
    alpha: float | None = None
    said: int | None = None

    @property
    def rank(self) -> int | None:
        """The inner size; None where there is none (whole differences, LoKr of two whole matrices)."""
        for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if role in self.tensors:
                return self.tensors[role].shape[0]
        return self.said

    @property
    def strength(self) -> float:
        return self.alpha / self.rank if self.alpha and self.rank else 1.0

    def delta(self, shape: tuple[int, ...]) -> Tensor:
        """The change of a weight of this shape, without DoRA's magnitude; float32."""
        t = {role: tensor.float() for role, tensor in self.tensors.items()}
        if "diff" in t:
            return _laid(t["diff"], shape)
        if "down" in t:
            change = _product(t["up"], t["down"], t.get("mid"))
        elif "hada_w1_a" in t:
            change = _factor(t, "hada_w1", "hada_t1") * _factor(t, "hada_w2", "hada_t2")
        else:
            change = _kronecker(_factor(t, "lokr_w1", ""), _factor(t, "lokr_w2", "lokr_t2"))
        return _laid(self.strength * change, shape)


def _laid(change: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same numbers as a weight, whose kernel may be flat or of 1×1. Errors: RuntimeError for other outputs or inputs."""
    return change.reshape(change.shape[:1] + shape[1:]).reshape(shape)


def _product(up: Tensor, down: Tensor, mid: Tensor | None) -> Tensor:
    """One weight that does what down, mid and up do one after the other; down or mid may be a k×k convolution."""
    if mid is not None:
        return torch.einsum("op,pqhw,qi->oihw", up.flatten(1), mid, down.flatten(1))
    return up.flatten(1) @ down.flatten(1)


def _factor(t: Mapping[str, Tensor], name: str, core: str) -> Tensor:
    """A matrix of LoHa or LoKr: whole, or a product, or a product around a k×k core."""
    if name in t:
        return t[name]
    a, b = t[f"{name}_a"], t[f"{name}_b"]
    return torch.einsum("ijhw,io,jr->orhw", t[core], a, b) if core in t else a @ b.flatten(1)


def _kronecker(first: Tensor, second: Tensor) -> Tensor:
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


Lora = Mapping[Target, Change]
"""The changes of one file, by network and weight."""


def read_lora(path: str | os.PathLike, networks: Networks, *, allow_pickle: bool = False) -> Lora:
    """Read a LoRA for a model's networks: kohya's, diffusers' and peft's names, SDXL's reference names too.

    Errors: CheckpointError for a key that no weight of the model takes, for a kind that is incomplete, and for a change of
    another shape than its weight; each lists the keys.
    """
    file = open_tensors(Path(path), allow_pickle=allow_pickle)
    found, unknown = _sorted_keys(file, _targets(networks))
    if unknown or not found:
        raise CheckpointError(
            f"{file.path}: {len(unknown)} of {len(file.entries)} keys fit no weight of this model: "
            f"{some_names(unknown) or 'the file is empty'}. The LoRA was made for another kind of model, or is of a kind that "
            "latentdiff does not know; nothing was loaded"
        )
    said = _peft_config(file)
    changes = {target: _change(file, target, roles, said) for target, roles in found.items()}
    shapes = {network: {k: v.to("meta") for k, v in module.state_dict().items()} for network, module in networks.items()}
    for (network, name), change in changes.items():
        _check(file.path, f"{network} {name}", change, shapes[network], name)
    return changes


def _sorted_keys(file: TensorFile, targets: Mapping[str, Target]) -> tuple[dict[Target, dict[str, str]], list[str]]:
    """Target -> role -> key, and the keys that have no target or no role. Errors: CheckpointError for two keys of one place."""
    found: dict[Target, dict[str, str]] = {}
    unknown = []
    for key in file.entries:
        end = max((e for e in ROLES if key.endswith(e)), key=len, default="")
        name = key.removesuffix(end)
        for old, new in OLD_NAMES.items():
            name = re.sub(old, new, name) if "." in name else name
        if end and name in targets:
            roles, role = found.setdefault(targets[name], {}), ROLES[end]
            if role in roles:
                raise CheckpointError(f"{file.path}: {roles[role]!r} and {key!r} mean the same; which counts cannot be told")
            roles[role] = key
        else:
            unknown.append(key)
    return found, unknown


def _targets(networks: Networks) -> dict[str, Target]:
    """Every name that a file may use for a weight -> the weight."""
    targets: dict[str, Target] = {}
    unet = networks.get("unet")
    refiner = "text 1" not in networks and isinstance(unet, UNet) and unet.config.vector_dim is not None  # its tower is the second
    for network, module in networks.items():
        names = [n.removesuffix(".weight") for n in module.state_dict() if n.endswith(".weight")]
        called = ("text 0", "text 1") if network == "text 0" and refiner else (network,)
        spelled = {name: name for name in names}
        if isinstance(module, UNet):
            spelled |= {source.name: name for name, source in keymap.unet_sources(names, module.config, prefix="").items()}
        else:  # transformers from 5.0 on leaves the prefix out
            spelled |= {name.removeprefix("text_model."): name for name in names}
        for spelling, name in spelled.items():
            for each in called:
                targets |= {prefix + spelling.replace(".", "_"): (network, name) for prefix in UNDERSCORED[each]}
                targets |= {prefix + spelling: (network, name) for prefix in DOTTED[each]}
    return targets


def _change(file: TensorFile, target: Target, roles: Mapping[str, str], said: Mapping[str, Any]) -> Change:
    tensors = {role: file.get(key) for role, key in roles.items() if role != "alpha"}
    core = frozenset(tensors) - BESIDE
    if core not in KINDS and set(tensors) != {"bias"}:
        raise CheckpointError(f"{file.path}: the keys {some_names(roles.values())} are no complete change of a weight")
    if any(not t.float().isfinite().all() for t in tensors.values()):
        raise CheckpointError(f"{file.path}: {some_names(roles.values())} hold NaN or infinite numbers")
    if "alpha" in roles:
        alpha = file.get(roles["alpha"]).float()
        if alpha.numel() != 1 or not alpha.isfinite().all():
            raise CheckpointError(f"{file.path}: {roles['alpha']} must be one finite number, found {alpha}")
        return Change(tensors, float(alpha))
    try:
        return _with_alpha(Change(tensors), target, said)
    except (AttributeError, TypeError, ValueError, OverflowError, re.error) as error:
        raise CheckpointError(f"{file.path}: peft's configuration gives no alpha for {target[1]} ({error})") from None


def _peft_config(file: TensorFile) -> dict[str, Any]:
    """What diffusers writes of peft's configuration into the header; peft itself writes it beside the file."""
    beside = file.path.with_name("adapter_config.json")
    if file.path.stem == "adapter_model" and beside.is_file():
        return {f"{network}.{name}": value for name, value in read_json(beside).items() for network in ("unet", "text_encoder")}
    try:
        said = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file.path}: lora_adapter_metadata is no JSON ({error})") from None
    return said if isinstance(said, dict) else {}


def _with_alpha(change: Change, target: Target, said: Mapping[str, Any]) -> Change:
    """peft's alpha of a weight; with `use_rslora` (arXiv 2312.03732) it counts by the root of the rank."""
    network, name = target
    prefix = {"unet": "unet", "text 0": "text_encoder", "text 1": "text_encoder_2"}[network]

    def find(value: Any, patterns: str) -> Any:
        found = (said.get(f"{prefix}.{patterns}") or {}).items()
        return next((other for pattern, other in found if re.search(rf"(^|\.)({pattern})$", name)), value)

    alpha = find(said.get(f"{prefix}.lora_alpha", said.get(f"{prefix}.alpha")), "alpha_pattern")  # of LoRA; of LoHa and LoKr
    rank = change.rank or find(said.get(f"{prefix}.r"), "rank_pattern")
    if alpha is None or rank is None:
        return change
    root = math.sqrt(rank) if said.get(f"{prefix}.use_rslora") else 1.0
    made = replace(change, alpha=float(alpha) * root, said=rank)
    if not math.isfinite(made.strength):
        raise ValueError(f"{made.alpha} / {rank} is not finite")
    return made


def _check(path: Path, where: str, change: Change, state: Mapping[str, Tensor], name: str) -> None:
    """Compute with shapes alone (`meta`), to see that they fit."""
    shape = tuple(state[f"{name}.weight"].shape)
    try:
        shapes_only = replace(change, tensors={role: t.to("meta") for role, t in change.tensors.items()})
        difference(state[f"{name}.weight"], [(shapes_only, 1.0)])
        if "bias" in change.tensors:
            shapes_only.tensors["bias"].reshape(state[f"{name}.bias"].shape)
    except (RuntimeError, KeyError):
        shapes = ", ".join(f"{role} {list(t.shape)}" for role, t in sorted(change.tensors.items()))
        raise CheckpointError(
            f"{path}: {where} has shape {list(shape)}, which {shapes} do not give. The LoRA was made for another model"
        ) from None


# ---------------------------------------------------------------------------------------------------------- applying


def with_loras(networks: Networks, loras: Sequence[tuple[Lora, float]], *, merge: bool = True) -> dict[str, UNet | TextTower]:
    """New networks with LoRAs on; the given ones, and all tensors that no LoRA changes, stay as they are and are shared.

    loras: each with its scale; 0 is none, bit for bit. merge: put the changes into the weights (rounded once, from float32);
    False leaves the weights alone and adds the changes to the layers' outputs: slower, no rounding, little memory.
    Errors: ValueError for a network whose weights are kept in fewer bits than they are used in.
    """
    by_weight: dict[Target, list[tuple[Change, float]]] = {}
    for lora, scale in loras:
        for target, change in lora.items():
            if scale != 0:
                by_weight.setdefault(target, []).append((change, scale))
    made = {}
    for network, module in networks.items():
        changes = {name: found for (where, name), found in by_weight.items() if where == network}
        if changes and is_narrowed(module):
            raise ValueError("lora can not be added to weights that were narrowed (float8, int8, weights): give `lora` to `load`")
        made[network] = (_merged if merge else _hooked)(module, changes) if changes else module
    return made


def twin(module: Any, state: Mapping[str, Tensor], config: Any = None) -> Any:
    """A network like this one (or of another size) with these tensors, which are not copied, and with the LoRAs of its layers."""
    own = module.config if isinstance(module, UNet) else module.spec
    new = on_meta(type(module), own if config is None else config)
    new.load_state_dict(dict(state), strict=True, assign=True)
    for old, layer in zip(module.modules(), new.modules(), strict=True):
        for addition in [hook for hook in old._forward_hooks.values() if isinstance(hook, Addition)]:
            layer.register_forward_hook(copy(addition))
        if isinstance(old, Attention) and old._joined is not None and layer.lie_in(old._joined[0]):  # side by side
            layer._joined = old._joined[0], layer.to_q.weight, layer.to_k.weight, layer.to_v.weight
    return new.requires_grad_(False).train(module.training)


def _merged(module: nn.Module, changes: Mapping[str, list[tuple[Change, float]]]) -> nn.Module:
    state = dict(module.state_dict())
    for name, found in changes.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight.float() + difference(weight, found)).to(weight.dtype)
        if any("bias" in change.tensors for change, _ in found):
            bias = state[f"{name}.bias"]
            state[f"{name}.bias"] = (bias.float() + _bias_difference(bias, found)).to(bias.dtype)
    return twin(module, state)


def difference(weight: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    """What all LoRAs together add to a weight; float32, on its device. Each DoRA looks at the weight as it was."""
    base, total = weight.float(), torch.zeros_like(weight, dtype=torch.float32)
    for change, scale in changes:
        if not set(change.tensors) - BESIDE:
            continue
        delta = change.delta(tuple(weight.shape)).to(weight.device)
        if "magnitude" in change.tensors:
            delta = _with_magnitude(base + delta, change.tensors["magnitude"], axis=0) - base
        elif "dora" in change.tensors:
            magnitude = change.tensors["dora"]  # [out, 1, …], in older LyCORIS files [1, in, …]
            delta = _with_magnitude(base + delta, magnitude, axis=0 if magnitude.shape[0] == len(weight) else 1) - base
        total += scale * delta
    return total


def _with_magnitude(weight: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """The weight with the norms along an axis (0: of each output) set to the magnitude."""
    axes = tuple(i for i in range(weight.ndim) if i != axis)
    norm = weight.square().sum(axes, keepdim=True).sqrt()
    return weight * (magnitude.to(weight).reshape(norm.shape) / norm)


def _bias_difference(bias: Tensor, changes: Sequence[tuple[Change, float]]) -> Tensor:
    found = [(c.tensors["bias"], scale) for c, scale in changes if "bias" in c.tensors]
    return sum((scale * t.float().to(bias.device).reshape(bias.shape) for t, scale in found), torch.zeros_like(bias).float())


def _hooked(module: nn.Module, changes: Mapping[str, list[tuple[Change, float]]]) -> nn.Module:
    """A twin that shares all weights, whose layers add their changes to what they give."""
    new = twin(module, module.state_dict())
    for name, found in changes.items():
        layer = new.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"{name} is no linear or convolutional layer: its change can only be merged (merge=True)")
        layer.register_forward_hook(Addition(layer, found))
    return new


class Addition:
    """A layer's forward hook, which adds to its output what LoRAs make of its input.

    The tensors follow the layer's weight to another device or dtype, once: a copy at every call would be slow, and could not be
    recorded on a GPU.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, changes: Sequence[tuple[Change, float]]):
        pairs = [(c, s) for c, s in changes if {"down", "up"} == set(c.tensors)]
        self.factors = [scale * change.strength for change, scale in pairs]
        self.tensors: list[Tensor] = [t for change, _ in pairs for t in _two_layers(layer, change)]
        if rest := [pair for pair in changes if pair not in pairs]:
            self.tensors.append(difference(layer.weight, rest))
            self.tensors += [] if layer.bias is None else [_bias_difference(layer.bias, rest)]
        self.tensors = [t.to(layer.weight) for t in self.tensors]

    def __call__(self, layer: nn.Linear | nn.Conv2d, inputs: tuple[Tensor], out: Tensor) -> Tensor:
        x, like = inputs[0], self.tensors[0]
        if (like.device, like.dtype) != (layer.weight.device, layer.weight.dtype):
            self.tensors = [t.to(layer.weight) for t in self.tensors]
        pairs, rest = self.tensors[: 2 * len(self.factors)], self.tensors[2 * len(self.factors) :]
        for factor, down, up in zip(self.factors, pairs[::2], pairs[1::2], strict=True):
            inner = _run(layer, x, down)
            out = out + factor * (F.linear(inner, up) if isinstance(layer, nn.Linear) else F.conv2d(inner, up))
        return out + _run(layer, x, *rest) if rest else out


def _two_layers(layer: nn.Linear | nn.Conv2d, change: Change) -> tuple[Tensor, Tensor]:
    """down, of the layer's kind, and up after it, which is 1×1 (the formula of the paper)."""
    down, up = change.tensors["down"], change.tensors["up"].flatten(1)
    return down.reshape(len(down), *layer.weight.shape[1:]), up.reshape(*up.shape, *[1] * (layer.weight.ndim - 2))


def _run(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer's function with another weight and bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
