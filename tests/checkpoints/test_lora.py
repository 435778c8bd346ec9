"""LoRA in all spellings: merged = unmerged, scale 0 = base, and the same as diffusers and peft on the same file."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F

from latentdiff.checkpoints import keymap
from latentdiff.checkpoints.files import CheckpointError, open_tensors, write_safetensors
from latentdiff.checkpoints.io import load_parts
from latentdiff.checkpoints.lora import KINDS, ROLES, Change, difference, read_lora, with_loras
from latentdiff.models.narrow import narrow

LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "down_blocks.1.resnets.0.conv1"
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def networks(parts):
    return {"unet": parts.unet, **{f"text {i}": tower for i, tower in enumerate(parts.text_encoders)}}


@pytest.fixture(scope="module")
def sd15(folder):
    return networks(load_parts(folder("sd15")))


@pytest.fixture(scope="module")
def sdxl(folder):
    return networks(load_parts(folder("sdxl")))


def pair(weight, rank=3, seed=0):
    """Down and up of a weight."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(weight.shape)
    down = torch.randn(rank, *shape[1:], generator=generator) / 10
    return down, torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) / 10


def weight(nets, network, name):
    return nets[network].state_dict()[f"{name}.weight"]


def run(nets):
    torch.manual_seed(0)
    unet = nets["unet"]
    vector = None if unet.config.vector_dim is None else torch.randn(1, unet.config.vector_dim)
    return unet(torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 5, unet.config.context_dim), vector)


def run_text(nets):
    return nets["text 0"](torch.tensor([[49406, 320, 2368, 49407] + [49407] * 73]))[0]


SPELLINGS = {
    "kohya": "lora_unet_{unet_}.lora_{d}.weight lora_te_{text_}.lora_{d}.weight",
    "diffusers": "unet.{unet}.lora.{d}.weight text_encoder.{text}.lora_linear_layer.{d}.weight",
    "peft": "unet.{unet}.lora_{AB}.weight text_encoder.{text}.lora_{AB}.weight",
    "peft default": "base_model.model.{unet}.lora_{AB}.default.weight text_encoder.{text}.lora_{AB}.default.weight",
    "transformers 5": "unet.{unet}.lora.{d}.weight text_encoder.{short}.lora_linear_layer.{d}.weight",
    "te1": "lora_unet_{unet_}.lora_{d}.weight lora_te1_{text_}.lora_{d}.weight",
    "ComfyUI": "diffusion_model.{unet}.lora_{d}.weight text_encoders.clip_l.transformer.{text}.lora_{d}.weight",
    "SimpleTuner": "lycoris_{unet_}.lora_{d}.weight lora_te_{text_}.lora_{d}.weight",
}


def spelled(spelling, network, name, role):
    template = SPELLINGS[spelling].split()[network != "unet"]
    fields = {"unet": name, "text": name, "short": name.removeprefix("text_model.")}
    fields |= {f"{network}_": name.replace(".", "_") for network in ("unet", "text")}
    return template.format(**fields, d=role, AB="A" if role == "down" else "B")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_name_the_same_weights(sd15, tmp_path, spelling):
    tensors = {}
    for network, name in (("unet", LINEAR), ("unet", CONV), ("text 0", TEXT)):
        down, up = pair(weight(sd15, network, name))
        tensors |= {spelled(spelling, network, name, "down"): down, spelled(spelling, network, name, "up"): up}
    write_safetensors(tmp_path / "l.safetensors", tensors)
    made = with_loras(sd15, [(read_lora(tmp_path / "l.safetensors", sd15), 0.7)])
    changed = {(n, k) for n in sd15 for k, v in made[n].state_dict().items() if not torch.equal(v, sd15[n].state_dict()[k])}
    assert changed == {("unet", f"{LINEAR}.weight"), ("unet", f"{CONV}.weight"), ("text 0", f"{TEXT}.weight")}
    down, up = pair(weight(sd15, "unet", CONV))
    expected = weight(sd15, "unet", CONV) + 0.7 * torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
    assert torch.allclose(weight(made, "unet", CONV), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_changes_in_few_bits(sd15, tmp_path, dtype):
    down, up = (t.to(dtype) for t in pair(weight(sd15, "unet", LINEAR)))
    name = f"lora_unet_{LINEAR.replace('.', '_')}"
    write_safetensors(tmp_path / "l.safetensors", kohya(name, down, up) | {f"{name}.alpha": torch.tensor(3.0, dtype=dtype)})
    made = with_loras(sd15, [(read_lora(tmp_path / "l.safetensors", sd15), 1.0)])
    assert torch.allclose(weight(made, "unet", LINEAR), weight(sd15, "unet", LINEAR) + up.float() @ down.float(), atol=1e-6)


def test_pickled_parameters_are_not_trained(sd15, tmp_path):
    """Parameters that `torch.save` wrote have no part in gradients here, and the network can be copied."""
    pairs = zip(("lora_A", "lora_B"), pair(weight(sd15, "unet", LINEAR)), strict=True)
    torch.save({f"unet.{LINEAR}.{role}.weight": torch.nn.Parameter(tensor) for role, tensor in pairs}, tmp_path / "l.pt")
    made = with_loras(sd15, [(read_lora(tmp_path / "l.pt", sd15, allow_pickle=True), 1.0)], merge=False)
    assert not run(made).requires_grad
    assert torch.equal(run({"unet": copy.deepcopy(made["unet"])}), run(made))


def test_old_diffusers_names(sd15, tmp_path):
    names = {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora": LINEAR,
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora": LINEAR.replace("to_q", "to_out.0"),
        "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out_lora": LINEAR.replace("attn1.to_q", "attn2.to_out.0"),
        "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora": TEXT,
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora": TEXT.replace("q_proj", "out_proj"),
    }
    tensors = {}
    for theirs, ours in names.items():
        network = "text 0" if ours.startswith("text") else "unet"
        down, up = pair(weight(sd15, network, ours))
        tensors |= {f"{theirs}.down.weight": down, f"{theirs}.up.weight": up}
    write_safetensors(tmp_path / "l.safetensors", tensors)
    lora = read_lora(tmp_path / "l.safetensors", sd15)
    assert {name for _, name in lora} == set(names.values())


def test_sdxl_in_both_of_its_spellings_and_all_of_its_networks(sdxl, tmp_path):
    """A LoRA on every layer of the U-Net: folder names and reference names give the same changes."""
    unet = sdxl["unet"]
    names = [n.removesuffix(".weight") for n, w in unet.state_dict().items() if n.endswith(".weight") and w.ndim > 1]
    original = keymap.unet_sources(names, unet.config, prefix="")
    files = {"ours": {}, "reference": {}, "dotted": {}}
    for name in names:
        for role, tensor in zip(("down", "up"), pair(weight(sdxl, "unet", name), rank=1), strict=True):
            files["ours"][f"lora_unet_{name.replace('.', '_')}.lora_{role}.weight"] = tensor
            files["reference"][f"lora_unet_{original[name].name.replace('.', '_')}.lora_{role}.weight"] = tensor
            letter = "A" if role == "down" else "B"
            files["dotted"][f"diffusion_model.{original[name].name}.lora_{letter}.weight"] = tensor
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in files["reference"]
    for i, prefix in enumerate(("lora_te1", "lora_te2")):
        down, up = pair(weight(sdxl, f"text {i}", TEXT))
        for tensors in files.values():
            tensors[f"{prefix}_{TEXT.replace('.', '_')}.lora_down.weight"] = down
            tensors[f"{prefix}_{TEXT.replace('.', '_')}.lora_up.weight"] = up
    read = []
    for name, tensors in files.items():
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
        read.append(read_lora(tmp_path / f"{name}.safetensors", sdxl))
    assert len(read[0]) == len(names) + 2
    for other in read[1:]:
        assert set(other) == set(read[0])
        for target, change in other.items():
            assert all(torch.equal(t, read[0][target].tensors[role]) for role, t in change.tensors.items())


@pytest.mark.parametrize(
    "prefix", ["text_encoder.", "text_encoder_2.", "lora_te1_", "lora_te2_", "text_encoders.clip_g.transformer."]
)
def test_the_refiners_only_tower_is_also_called_the_second(folder, tmp_path, prefix):
    nets = networks(load_parts(folder("sdxl-refiner")))
    name = prefix + (TEXT if prefix.endswith(".") else TEXT.replace(".", "_"))
    write_safetensors(tmp_path / "l.safetensors", kohya(name, *pair(weight(nets, "text 0", TEXT))))
    assert set(read_lora(tmp_path / "l.safetensors", nets)) == {("text 0", TEXT)}


@pytest.fixture
def everywhere(sd15, tmp_path):
    """A kohya file on all linear and convolutional layers of U-Net and tower, with alphas."""

    def make(seed: int = 0, alpha: float | None = 1.5):
        tensors = {}
        for network, prefix in (("unet", "lora_unet_"), ("text 0", "lora_te_")):
            for key, w in sd15[network].state_dict().items():
                if w.ndim < 2 or "embedding.weight" in key:
                    continue
                name = prefix + key.removesuffix(".weight").replace(".", "_")
                down, up = pair(w, seed=seed + len(tensors))
                tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                tensors |= {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
        write_safetensors(tmp_path / f"lora{seed}.safetensors", tensors)
        return tmp_path / f"lora{seed}.safetensors"

    return make


def close(a, b, rtol=1e-5):
    assert (a - b).abs().max() <= rtol * b.abs().max(), float((a - b).abs().max() / b.abs().max())


def test_merged_equals_the_formula(sd15, everywhere):
    """Every layer's output plus scale · alpha / rank · up(down(x)), written here with hooks, is what merged weights give."""
    lora = read_lora(everywhere(), sd15)
    merged = with_loras(sd15, [(lora, 0.6)])
    hooks = []
    for (network, name), change in lora.items():
        layer = sd15[network].get_submodule(name)
        down, up = change.tensors["down"], change.tensors["up"]

        def add(layer, inputs, out, down=down, up=up):
            factor = 0.6 * 1.5 / 3
            if down.ndim == 2:
                return out + factor * F.linear(F.linear(inputs[0], down), up)
            return out + factor * F.conv2d(F.conv2d(inputs[0], down, stride=layer.stride, padding=layer.padding), up)

        hooks.append(layer.register_forward_hook(add))
    expected, expected_text = run(sd15), run_text(sd15)
    for hook in hooks:
        hook.remove()
    assert (expected - run(sd15)).abs().max() > 0.1  # the LoRA does something
    close(run(merged), expected)
    close(run_text(merged), expected_text)
    unmerged = with_loras(sd15, [(lora, 0.6)], merge=False)
    close(run(unmerged), expected)
    close(run_text(unmerged), expected_text)


def few(nets, folder, seed=0):
    """A LoRA of a layer of each kind."""
    tensors = {}
    for network, prefix, name in (("unet", "lora_unet", LINEAR), ("unet", "lora_unet", CONV), ("text 0", "lora_te", TEXT)):
        tensors |= kohya(f"{prefix}_{name.replace('.', '_')}", *pair(weight(nets, network, name), seed=seed))
    write_safetensors(folder / f"few{seed}.safetensors", tensors)
    return read_lora(folder / f"few{seed}.safetensors", nets)


@pytest.mark.parametrize("merge", [True, False])
def test_a_second_lora_leaves_the_first_on(sd15, tmp_path, merge):
    first, second = (few(sd15, tmp_path, seed) for seed in (1, 2))
    both = with_loras(with_loras(sd15, [(first, 0.5)], merge=False), [(second, -0.3)], merge=merge)
    expected = with_loras(sd15, [(first, 0.5), (second, -0.3)])
    close(run(both), run(expected))
    close(run_text(both), run_text(expected))


@pytest.mark.parametrize("width", ["float32", "bfloat16"])
def test_unmerged_changes_follow_their_layer(sd15, tmp_path, width):
    """To another dtype, in a copy, for every kind of change; and once: a copy at each call could not be recorded on a GPU."""
    dtype, state = getattr(torch, width), sd15["unet"].state_dict()
    down, up = pair(state[f"{LINEAR}.weight"])
    tensors = kohya(f"lora_unet_{LINEAR.replace('.', '_')}", down, up)
    tensors |= {f"lora_unet_{CONV.replace('.', '_')}.diff": torch.ones_like(state[f"{CONV}.weight"])}
    tensors |= {f"lora_unet_{CONV.replace('.', '_')}.diff_b": torch.ones_like(state[f"{CONV}.bias"])}
    write_safetensors(tmp_path / "l.safetensors", tensors)
    on = with_loras(sd15, [(read_lora(tmp_path / "l.safetensors", sd15), 0.5)], merge=False)["unet"]
    other = copy.deepcopy(on).to(dtype)
    x, context = torch.randn(1, 4, 8, 8, dtype=dtype), torch.randn(1, 5, 32, dtype=dtype)
    for _ in range(2):
        y = other(x, torch.tensor([500.0]), context)
        kept = [t for layer in (LINEAR, CONV) for t in added(other, layer).tensors]
        assert {t.dtype for t in kept} == {y.dtype} == {dtype}
        assert [id(t) for t in kept] == [id(t) for layer in (LINEAR, CONV) for t in added(other, layer).tensors]
    close(y.float(), on(x.float(), torch.tensor([500.0]), context.float()), rtol=0.1)
    assert added(on, LINEAR).tensors[0].dtype == torch.float32


def added(network, layer):
    (hook,) = network.get_submodule(layer)._forward_hooks.values()
    return hook


@pytest.mark.parametrize("width", ["int8", "bfloat16"])
def test_narrowed_weights_are_refused(sd15, tmp_path, width):
    nets = {**sd15, "unet": copy.deepcopy(sd15["unet"])}
    narrow(nets["unet"], width)
    with pytest.raises(ValueError, match=r"lora can not be added to weights that were narrowed .* give `lora` to `load`"):
        with_loras(nets, [(few(nets, tmp_path), 1.0)])


def test_scale_0_is_the_base_bit_for_bit(sd15, everywhere):
    lora = read_lora(everywhere(), sd15)
    base = run(sd15)
    for merge in (True, False):
        none = with_loras(sd15, [(lora, 0.0)], merge=merge)
        assert torch.equal(run(none), base)
        assert torch.equal(run_text(none), run_text(sd15))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_drift(folder, everywhere, dtype):
    """On and off and on again: the base is never touched, and the result never differs."""
    nets = networks(load_parts(folder("sd15"), dtype=dtype))
    before = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in nets.items()}
    lora = read_lora(everywhere(), nets)
    first = with_loras(nets, [(lora, 0.8)])
    for i in range(3):
        again = with_loras(nets, [(lora, 0.8 - i)])
    again = with_loras(nets, [(lora, 0.8)])
    for n in nets:
        assert all(torch.equal(v, before[n][k]) for k, v in nets[n].state_dict().items())
        assert all(torch.equal(v, first[n].state_dict()[k]) for k, v in again[n].state_dict().items())
        assert {v.dtype for v in again[n].state_dict().values()} == {dtype}


def test_several_at_once(sd15, everywhere):
    a, b = read_lora(everywhere(1), sd15), read_lora(everywhere(1000), sd15)
    both = with_loras(sd15, [(a, 0.5), (b, -0.3)])
    w = weight(sd15, "unet", LINEAR)
    changes = [0.5 * a["unet", LINEAR].delta(w.shape), -0.3 * b["unet", LINEAR].delta(w.shape)]
    assert torch.allclose(weight(both, "unet", LINEAR), w + changes[0] + changes[1], atol=1e-7)
    swapped = with_loras(sd15, [(b, -0.3), (a, 0.5)])
    close(run(swapped), run(both))
    close(run(with_loras(sd15, [(a, 0.5), (b, -0.3)], merge=False)), run(both))


def test_untouched_tensors_are_shared(sd15, tmp_path):
    down, up = pair(weight(sd15, "unet", LINEAR))
    key = f"lora_unet_{LINEAR.replace('.', '_')}"
    write_safetensors(tmp_path / "l.safetensors", {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
    made = with_loras(sd15, [(read_lora(tmp_path / "l.safetensors", sd15), 1.0)])
    assert made["text 0"] is sd15["text 0"]
    for name, tensor in made["unet"].state_dict().items():
        same = tensor.data_ptr() == sd15["unet"].state_dict()[name].data_ptr()
        assert same == (name != f"{LINEAR}.weight")


@pytest.mark.parametrize(("alpha", "strength"), [(None, 1.0), (0.0, 1.0), (3.0, 1.0), (6.0, 2.0)])
def test_alpha(alpha, strength):
    change = Change({"down": torch.ones(3, 5), "up": torch.ones(4, 3)}, alpha)
    assert torch.equal(change.delta((4, 5)), torch.full((4, 5), 3.0 * strength))


def test_peft_alphas_from_the_header(sd15, tmp_path):
    said = {
        "unet.r": 3,
        "unet.lora_alpha": 6,
        "unet.alpha_pattern": {"attn1.to_q": 12},
        "text_encoder.r": 3,
        "text_encoder.lora_alpha": 9,
        "text_encoder.use_rslora": True,
    }
    tensors = {}
    for network, prefix, name in (("unet", "unet", LINEAR), ("unet", "unet", CONV), ("text 0", "text_encoder", TEXT)):
        down, up = pair(weight(sd15, network, name))
        tensors |= {f"{prefix}.{name}.lora_A.weight": down, f"{prefix}.{name}.lora_B.weight": up}
    write_safetensors(tmp_path / "l.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    changes = read_lora(tmp_path / "l.safetensors", sd15)
    assert changes["unet", LINEAR].strength == 4
    assert changes["unet", CONV].strength == 2
    assert changes["text 0", TEXT].strength == pytest.approx(9 / 3**0.5)


# ------------------------------------------------------------------------------------------------- LyCORIS and DoRA


def test_loha_is_a_product_of_products():
    torch.manual_seed(0)
    t = {"hada_w1_a": torch.randn(6, 2), "hada_w1_b": torch.randn(2, 12), "hada_w2_a": torch.randn(6, 2)}
    t["hada_w2_b"] = torch.randn(2, 12)
    delta = Change(t, 4.0).delta((6, 3, 2, 2))
    expected = torch.empty(6, 12)
    for o in range(6):
        for i in range(12):
            first = sum(t["hada_w1_a"][o, r] * t["hada_w1_b"][r, i] for r in range(2))
            expected[o, i] = 2.0 * first * sum(t["hada_w2_a"][o, r] * t["hada_w2_b"][r, i] for r in range(2))
    assert torch.allclose(delta, expected.reshape(6, 3, 2, 2), atol=1e-6)


def test_tucker_cores_are_convolutions_between_two_1x1():
    """down 1×1, a k×k core, up 1×1, run one after the other, are the one convolution of the delta."""
    torch.manual_seed(0)
    down, mid, up = torch.randn(2, 5, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(7, 2, 1, 1)
    delta = Change({"down": down, "mid": mid, "up": up}).delta((7, 5, 3, 3))
    x = torch.randn(1, 5, 8, 8)
    assert torch.allclose(F.conv2d(x, delta), F.conv2d(F.conv2d(F.conv2d(x, down), mid), up), atol=1e-4)
    # LoHa's cores: a [rank, out], b [rank, in], t [rank, rank, k, k]
    a, b, core = torch.randn(2, 7), torch.randn(2, 5), torch.randn(2, 2, 3, 3)
    one = {"hada_w1_a": a, "hada_w1_b": b, "hada_t1": core}
    two = {"hada_w2_a": torch.ones(1, 7), "hada_w2_b": torch.ones(1, 5), "hada_t2": torch.ones(1, 1, 3, 3)}
    as_convs = F.conv2d(F.conv2d(F.conv2d(x, b[..., None, None]), core), a.T[..., None, None])
    assert torch.allclose(F.conv2d(x, Change(one | two).delta((7, 5, 3, 3))), as_convs, atol=1e-4)


@pytest.mark.parametrize("second", ["whole", "pair"])
@pytest.mark.parametrize("shape", [(6, 10), (6, 10, 3, 3)])
def test_lokr_is_a_kronecker_product(second, shape):
    torch.manual_seed(0)
    k = tuple(shape[2:])
    w1 = torch.randn(2, 5)
    if second == "whole":
        w2 = torch.randn(3, 2, *k)
        t, scale = {"lokr_w1": w1, "lokr_w2": w2}, 1.0  # alpha counts by a rank, and there is none
    else:
        a, b = torch.randn(3, 4), torch.randn(4, 2, *k)
        w2, scale = torch.einsum("or,r...->o...", a, b), 2.0 / 4
        t = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b.flatten(1)}
    delta = Change(t, 2.0).delta(shape)
    for o in range(6):
        for i in range(10):
            assert torch.allclose(delta[o, i], scale * w1[o // 3, i // 2] * w2[o % 3, i % 2], atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["LoRA", "LoRA conv", "LoHa", "LoKr", "LoKr pair", "LoHa conv", "LoKr conv"])
def test_peft_agrees_on_the_folders_that_it_saves(sd15, tmp_path, kind):
    """adapter_model.safetensors, whose alpha stands in the adapter_config.json beside it."""
    peft = pytest.importorskip("peft")
    conv = "conv" in kind
    target = CONV if conv else LINEAR
    if kind.startswith("LoRA"):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[target], init_lora_weights=False)
    elif kind.startswith("LoHa"):
        config = peft.LoHaConfig(r=4, alpha=6, target_modules=[target], use_effective_conv2d=True, init_weights=False)
    else:
        config = peft.LoKrConfig(
            r=4, alpha=6, target_modules=[target], use_effective_conv2d=True, init_weights=False,
            decompose_both="pair" in kind, decompose_factor=2 if "pair" in kind else 8,
        )  # fmt: skip
    model = peft.get_peft_model(copy.deepcopy(sd15["unet"]), config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "hada" in n or "lokr" in n:
                p.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors", sd15)
    made = with_loras(sd15, [(lora, 1.0)])
    merged = model.merge_and_unload().get_submodule(target).weight
    assert (merged - weight(sd15, "unet", target)).abs().max() > 0.01
    close(weight(made, "unet", target), merged)


@pytest.mark.oracle
def test_peft_agrees_on_alphas_by_pattern(sd15, tmp_path):
    """Patterns with alternatives, and more than one that fits: the first counts."""
    peft = pytest.importorskip("peft")
    patterns = {"attn1.to_q|attn1.to_k": 12, "to_q": 20, "attn2.to_v": 3}
    targets = [LINEAR, LINEAR.replace("to_q", "to_k"), LINEAR.replace("attn1.to_q", "attn2.to_v"), CONV]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, alpha_pattern=patterns, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(sd15["unet"]), config)
    model.save_pretrained(tmp_path)
    changes = read_lora(tmp_path / "adapter_model.safetensors", sd15)
    scalings = {target: model.get_submodule(f"base_model.model.{target}").scaling["default"] for target in targets}
    assert {target: changes["unet", target].strength for target in targets} == scalings


@pytest.mark.oracle
def test_peft_agrees_on_a_text_towers_folder(folder, sd15, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    tower = transformers.CLIPTextModel.from_pretrained(folder("sd15") / "text_encoder", local_files_only=True)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    model = peft.get_peft_model(tower, config)
    model.save_pretrained(tmp_path)
    made = with_loras(sd15, [(read_lora(tmp_path / "adapter_model.safetensors", sd15), 1.0)])
    tokens = torch.tensor([[49406, 320, 2368, 49407] + [49407] * 73])
    with torch.no_grad():
        close(run_text(made), model.merge_and_unload()(tokens).last_hidden_state)


@pytest.mark.oracle
@pytest.mark.parametrize("target", [LINEAR, CONV])
def test_peft_agrees_on_dora(sd15, tmp_path, target):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=[target], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(sd15["unet"]), config)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "magnitude" in n:
                p.mul_(torch.rand_like(p) + 0.5)
    write_safetensors(tmp_path / "l.safetensors", peft.get_peft_model_state_dict(model))
    lora = read_lora(tmp_path / "l.safetensors", sd15)
    made = with_loras(sd15, [(lora, 1.0)])
    merged = model.merge_and_unload().get_submodule(target).weight
    close(weight(made, "unet", target), merged)
    half = with_loras(sd15, [(lora, 0.5)])
    w = weight(sd15, "unet", target)
    close(weight(half, "unet", target), w + 0.5 * (weight(made, "unet", target) - w))
    close(run(with_loras(sd15, [(lora, 0.5)], merge=False)), run(half))


@pytest.mark.parametrize("axis", [0, 1])
def test_magnitudes_of_lycoris_lie_along_outputs_or_inputs(axis):
    torch.manual_seed(0)
    w, down, up = torch.randn(4, 6, 3, 3), torch.randn(2, 6, 3, 3), torch.randn(4, 2, 1, 1)
    magnitude = torch.rand(4, 1, 1, 1) if axis == 0 else torch.rand(1, 6, 1, 1)
    changed = w + difference(w, [(Change({"down": down, "up": up, "dora": magnitude}), 1.0)])
    norms = changed.transpose(0, axis).flatten(1).norm(dim=1)
    assert torch.allclose(norms, magnitude.flatten(), atol=1e-5)


def test_whole_differences_of_weights_and_biases(sd15, tmp_path):
    state = sd15["unet"].state_dict()
    norm = "down_blocks.0.resnets.0.norm1"
    tensors = {
        f"lora_unet_{CONV.replace('.', '_')}.diff": torch.ones_like(state[f"{CONV}.weight"]),
        f"lora_unet_{CONV.replace('.', '_')}.diff_b": torch.ones_like(state[f"{CONV}.bias"]),
        f"lora_unet_{norm.replace('.', '_')}.w_norm": torch.ones_like(state[f"{norm}.weight"]),
        f"lora_unet_{norm.replace('.', '_')}.b_norm": torch.ones_like(state[f"{norm}.bias"]),
    }
    write_safetensors(tmp_path / "l.safetensors", tensors)
    lora = read_lora(tmp_path / "l.safetensors", sd15)
    made = with_loras(sd15, [(lora, 0.5)])["unet"].state_dict()
    for name in (f"{CONV}.weight", f"{CONV}.bias", f"{norm}.weight", f"{norm}.bias"):
        assert torch.allclose(made[name], state[name] + 0.5)
    with pytest.raises(ValueError, match=f"{norm} is no linear or convolutional layer"):
        with_loras(sd15, [(lora, 0.5)], merge=False)
    del tensors[f"lora_unet_{norm.replace('.', '_')}.w_norm"], tensors[f"lora_unet_{norm.replace('.', '_')}.b_norm"]
    write_safetensors(tmp_path / "l.safetensors", tensors)
    lora = read_lora(tmp_path / "l.safetensors", sd15)
    close(run(with_loras(sd15, [(lora, 0.5)], merge=False)), run(with_loras(sd15, [(lora, 0.5)])))


def test_every_role_belongs_to_a_kind():
    assert set(ROLES.values()) == set().union(*KINDS) | {"alpha", "dora", "magnitude", "bias"}


# ---------------------------------------------------------------------------------------------------------- faults


def kohya(name, down, up):
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


FAULTS = {
    "unknown layer": (
        kohya("lora_unet_nothing", torch.ones(1, 2), torch.ones(2, 1)),
        "2 of 4 keys fit no weight of this model: 'lora_unet_nothing.lora_down.weight', 'lora_unet_nothing.lora_up.weight'",
    ),
    "second tower": (
        kohya(f"lora_te2_{TEXT.replace('.', '_')}", torch.ones(1, 32), torch.ones(32, 1)),
        "2 of 4 keys fit no weight of this model: 'lora_te2_",
    ),
    "unknown role": ({f"lora_unet_{LINEAR.replace('.', '_')}.oft_blocks": torch.ones(1)}, "1 of 3 keys .*oft_blocks"),
    "half": ({f"lora_unet_{CONV.replace('.', '_')}.lora_up.weight": torch.ones(1)}, "the keys .* are no complete change"),
    "shape": (
        kohya(f"lora_unet_{CONV.replace('.', '_')}", torch.ones(1, 7), torch.ones(64, 1)),
        r"unet down_blocks.1.resnets.0.conv1 has shape \[64, 32, 3, 3\], which down \[1, 7\], up \[64, 1\] do not give",
    ),
    "turned": (
        kohya(f"lora_unet_{FF.replace('.', '_')}", torch.ones(1, 128), torch.ones(512, 1)),
        r"ff.net.2 has shape \[128, 512\], which down \[1, 128\], up \[512, 1\] do not give",
    ),
    "difference turned": (
        {f"lora_unet_{FF.replace('.', '_')}.diff": torch.ones(512, 128)},
        r"ff.net.2 has shape \[128, 512\], which diff \[512, 128\] do not give",
    ),
    "nan": (
        kohya(f"lora_unet_{CONV.replace('.', '_')}", torch.full((1, 32, 3, 3), float("nan")), torch.ones(64, 1, 1, 1)),
        "hold NaN or infinite numbers",
    ),
    "alpha of NaN": (
        {f"lora_unet_{LINEAR.replace('.', '_')}.alpha": torch.tensor(float("nan"))}, "alpha must be one finite number, found nan",
    ),
    "two alphas": (
        {f"lora_unet_{LINEAR.replace('.', '_')}.alpha": torch.ones(2)},
        r"alpha must be one finite number, found tensor\(\[1\., 1\.\]",
    ),
    "two spellings": (
        {f"unet.{LINEAR}.lora_A.weight": torch.ones(1)},
        r"'lora_unet_.*lora_down\.weight' and 'unet\..*lora_A\.weight' mean the same",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_nothing_takes_is_an_error_that_lists_it(sd15, tmp_path, fault):
    down, up = pair(weight(sd15, "unet", LINEAR))
    tensors, message = FAULTS[fault]
    write_safetensors(tmp_path / "l.safetensors", {**kohya(f"lora_unet_{LINEAR.replace('.', '_')}", down, up), **tensors})
    with pytest.raises(CheckpointError, match=message) as error:
        read_lora(tmp_path / "l.safetensors", sd15)
    assert str(tmp_path / "l.safetensors") in str(error.value)


@pytest.mark.parametrize(
    "said",
    [
        {"unet.lora_alpha": "high"},
        {"unet.lora_alpha": float("nan")},
        {"unet.lora_alpha": 10**400},
        {"unet.lora_alpha": 1, "unet.alpha_pattern": ["to_q"]},
        {"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}},
    ],
)
def test_a_header_without_a_number_for_alpha(sd15, tmp_path, said):
    down, up = pair(weight(sd15, "unet", LINEAR))
    tensors = {f"unet.{LINEAR}.lora_A.weight": down, f"unet.{LINEAR}.lora_B.weight": up}
    write_safetensors(tmp_path / "l.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    with pytest.raises(CheckpointError, match=rf"l\.safetensors: peft's configuration gives no alpha for {LINEAR}"):
        read_lora(tmp_path / "l.safetensors", sd15)


@pytest.mark.parametrize("rank", [float("nan"), 1e-320, "4", [4]])
def test_a_header_without_a_number_for_the_rank(sd15, tmp_path, rank):
    w = weight(sd15, "unet", LINEAR)
    tensors = {f"unet.{LINEAR}.lokr_w1": torch.ones(2, 2), f"unet.{LINEAR}.lokr_w2": torch.ones(w.shape[0] // 2, w.shape[1] // 2)}
    said = {"unet.alpha": 2, "unet.r": rank}  # whole matrices, which have none of their own
    write_safetensors(tmp_path / "l.safetensors", tensors, {"lora_adapter_metadata": json.dumps(said)})
    with pytest.raises(CheckpointError, match=rf"l\.safetensors: peft's configuration gives no alpha for {LINEAR}"):
        read_lora(tmp_path / "l.safetensors", sd15)


def test_a_lora_of_another_family_is_refused(sd15, sdxl, tmp_path, everywhere):
    with pytest.raises(CheckpointError, match=r"made for another"):
        read_lora(everywhere(), sdxl)


# ---------------------------------------------------------------------------------------------------------- oracles


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.no_grad()
def test_diffusers_reads_the_same_kohya_file_the_same_way(folder, tmp_path, name):
    """A kohya file on attentions, feed-forwards and projections of all networks, at scale 0.7, in both libraries."""
    import diffusers

    parts = load_parts(folder(name))
    nets, tensors = networks(parts), {}
    prefixes = {"unet": "lora_unet_", "text 0": "lora_te1_" if name == "sdxl" else "lora_te_", "text 1": "lora_te2_"}
    for network, module in nets.items():
        for key, w in module.state_dict().items():
            if re.search(r"attn\d?\.(to_|q_|k_|v_|out_)|ff\.net|proj_in|proj_out|mlp", key) and w.ndim > 1:
                base = prefixes[network] + key.removesuffix(".weight").replace(".", "_")
                tensors |= kohya(base, *pair(w, seed=len(tensors))) | {f"{base}.alpha": torch.tensor(2.0)}
    write_safetensors(tmp_path / "l.safetensors", tensors)
    ours = with_loras(nets, [(read_lora(tmp_path / "l.safetensors", nets), 0.7)])

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder(name), local_files_only=True)
    pipe.load_lora_weights(tmp_path / "l.safetensors", adapter_name="x")
    pipe.set_adapters(["x"], [0.7])
    torch.manual_seed(0)
    config = parts.spec.unet
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 5, config.context_dim)
    vector, added = None, {}
    if config.vector_dim is not None:
        pooled, ids = torch.randn(1, 64), torch.rand(1, 6) * 1000
        added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        vector = torch.cat([pooled, pipe.unet.add_time_proj(ids.flatten()).reshape(1, -1)], dim=-1)
    close(ours["unet"](x, t, context, vector), pipe.unet(x, t, context, **added).sample)
    tokens = torch.tensor([[49406, 320, 2368, 49407] + [49407] * 73])
    theirs = [pipe.text_encoder] + ([pipe.text_encoder_2] if name == "sdxl" else [])
    for i, tower in enumerate(theirs):
        out = tower(tokens, output_hidden_states=True)
        hidden = ours[f"text {i}"](tokens)[0]
        close(hidden, out.hidden_states[-2] if name == "sdxl" else out.last_hidden_state)


@pytest.mark.oracle
@torch.no_grad()
def test_a_file_that_peft_trained_and_diffusers_saved(folder, tmp_path):
    """pytorch_lora_weights.safetensors with peft's names and its configuration in the header."""
    import diffusers
    import peft
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(folder("sd15"), local_files_only=True)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["to_k", "to_q", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    pipe.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet)),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    assert "lora_adapter_metadata" in open_tensors(path).metadata
    nets = networks(load_parts(folder("sd15")))
    lora = read_lora(path, nets)
    assert {change.strength for change in lora.values()} == {4.0}
    torch.manual_seed(0)
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 5, 32)
    close(with_loras(nets, [(lora, 1.0)])["unet"](x, t, context), pipe.unet(x, t, context).sample)
