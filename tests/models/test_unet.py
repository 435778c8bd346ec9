"""The U-Net against diffusers' on the same weights, and what it promises beyond that."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from latentdiff.models.attention import Site, sdpa
from latentdiff.models.initialise import init_for_training
from latentdiff.models.unet import UNet, UNetConfig, sinusoids

SD1 = UNetConfig()
SD2 = UNetConfig(heads=(5, 10, 20, 20), context_dim=1024, linear_projection=True)
SDXL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    attention=(False, True, True),
    transformer_layers=(1, 2, 10),
    heads=(5, 10, 20),
    context_dim=2048,
    linear_projection=True,
    vector_dim=2816,
)
REFINER = UNetConfig(
    block_out_channels=(384, 768, 1536, 1536),
    attention=(False, True, True, False),
    transformer_layers=(4, 4, 4, 4),
    heads=(6, 12, 24, 24),
    context_dim=1280,
    linear_projection=True,
    vector_dim=2560,
)
TRUE = {
    "sd1": SD1,
    "sd2": SD2,
    "sdxl": SDXL,
    "refiner": REFINER,
    "inpaint": replace(SD1, in_channels=9),
    "instruct": replace(SD1, in_channels=8),
    "lcm": replace(SD1, time_cond_dim=256),
}
EMBEDDED = UNetConfig(
    block_out_channels=(96, 192, 256),
    layers_per_block=1,
    attention=(True, True, True),
    transformer_layers=(1, 1, 1),
    heads=(3, 6, 8),
    context_dim=256,
)


def small(config: UNetConfig) -> UNetConfig:
    """The same topology and depths with 32 channels at the top."""
    width, heads = config.block_out_channels[0], config.heads[0]
    return replace(
        config,
        block_out_channels=tuple(32 * w // width for w in config.block_out_channels),
        heads=tuple(2 * h // heads for h in config.heads),
        context_dim=24,
        vector_dim=config.vector_dim and 64,
        time_cond_dim=config.time_cond_dim and 10,
    )


SMALL = {name: small(config) for name, config in TRUE.items()} | {"embedded": EMBEDDED}


def build_diffusers(config: UNetConfig) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    kinds = [("CrossAttn" if attention else "") for attention in config.attention]
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        transformer_layers_per_block=config.transformer_layers,
        attention_head_dim=config.heads,
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.linear_projection,
        addition_embed_type="text_time" if config.vector_dim else None,
        addition_time_embed_dim=8 if config.vector_dim else None,
        projection_class_embeddings_input_dim=config.vector_dim,
        time_cond_proj_dim=config.time_cond_dim,
        norm_num_groups=config.norm_groups,
        norm_eps=config.norm_eps,
        sample_size=config.sample_size,
    ).eval()


def perturb(module: nn.Module) -> nn.Module:
    """Move every weight, so that no norm is the identity and no bias is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module


def make(config: UNetConfig) -> UNet:
    torch.manual_seed(0)
    unet = UNet(config).eval()
    perturb(unet)
    return unet


def inputs(config: UNetConfig, batch: int = 2, size: tuple[int, int] = (16, 16)) -> dict:
    torch.manual_seed(1)
    return {
        "x": torch.randn(batch, config.in_channels, *size),
        "t": torch.tensor([981.0, 3.25])[:batch],
        "context": torch.randn(batch, 7, config.context_dim),
        "vector": torch.randn(batch, config.vector_dim) if config.vector_dim else None,
        "guidance_embedding": torch.randn(batch, config.time_cond_dim) if config.time_cond_dim else None,
    }


def epsilons(module: nn.Module) -> dict[str, float]:
    return {name: m.eps for name, m in module.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}


@pytest.fixture
def config() -> UNetConfig:
    return SMALL["sdxl"]


@pytest.mark.oracle
@pytest.mark.parametrize("size", [(16, 16), (13, 18)], ids=["even", "odd"])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_forward_equals_diffusers(name, size):
    config = SMALL[name]
    torch.manual_seed(0)
    theirs = perturb(build_diffusers(config))
    ours = UNet(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    given = inputs(config, size=size)
    added = None
    if config.vector_dim:
        text, sizes = torch.randn(2, 16), torch.tensor([[1024.0, 768, 0, 16, 1024, 1024], [64, 64, 1, 2, 32, 48]])
        given["vector"] = torch.cat([text, sinusoids(sizes.flatten(), 8).reshape(2, 48)], dim=1)
        added = {"text_embeds": text, "time_ids": sizes}
    expected = theirs(
        given["x"], given["t"], given["context"], timestep_cond=given["guidance_embedding"], added_cond_kwargs=added
    ).sample
    actual = ours(**given)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("name", TRUE)
def test_names_and_shapes_at_true_size_equal_diffusers(name):
    with torch.device("meta"):
        ours, theirs = UNet(TRUE[name]), build_diffusers(TRUE[name])
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert epsilons(ours) == epsilons(theirs)  # too small to be seen in an output


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("sd1", 686, 859_520_964), ("sd2", 686, 865_910_724), ("sdxl", 1680, 2_567_463_684)],
)
def test_published_sizes(name, tensors, parameters):
    with torch.device("meta"):
        unet = UNet(TRUE[name])
    assert len(unet.state_dict()) == tensors
    assert sum(p.numel() for p in unet.parameters()) == parameters


def test_sinusoids_follow_their_formula():
    actual = sinusoids(torch.tensor([0.0, 1.0, 999.0]), 8)
    t = torch.tensor([[0.0], [1.0], [999.0]], dtype=torch.float64)
    angles = t * torch.tensor([[1.0, 0.1, 0.01, 0.001]], dtype=torch.float64)
    expected = torch.cat([angles.cos(), angles.sin()], dim=1)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=5e-5)  # float32 angles up to 999


@torch.no_grad()
def test_projected_context_stands_in_for_the_context(config):
    unet, given = make(config), inputs(config)
    expected = unet(**given)
    projected = unet.project_context(given["context"])
    assert torch.equal(unet(**given | {"context": projected}), expected)
    modules = dict(unet.named_modules())
    names = [name for name in modules if name.endswith("attn2")]
    assert len(names) == len(projected) == unet.cross_attentions
    for name, (k, v) in zip(names, projected, strict=True):
        attention = modules[name]
        for actual, layer in ((k, attention.to_k), (v, attention.to_v)):
            expected = layer(given["context"]).reshape(2, 7, attention.heads, -1).permute(0, 2, 1, 3)
            assert torch.equal(actual, expected)


@torch.no_grad()
def test_attend_is_called_once_a_site_with_the_keys_of_that_site(config):
    unet, given = make(config), inputs(config)
    projected = unet.project_context(given["context"])
    sites, keys = [], []

    def spy(q, k, v, site):
        sites.append(site)
        if site.cross:
            keys.append(k)
        return sdpa(q, k, v, site)

    assert torch.equal(unet(**given, attend=spy), unet(**given))
    expected = [Site(name, name.endswith("attn2")) for name, _ in unet.named_modules() if name.endswith(("attn1", "attn2"))]
    assert sites == expected
    assert all(torch.equal(actual, k) for actual, (k, _) in zip(keys, projected, strict=True))


@torch.no_grad()
def test_attend_belongs_to_one_call(config):
    """Two calls that run interleaved, one of them edited, give what each gives alone."""
    unet, given = make(config), inputs(config)
    silent = lambda q, k, v, site: torch.zeros_like(q) if site.cross else sdpa(q, k, v, site)  # noqa: E731
    edited, plain = unet(**given, attend=silent), unet(**given)
    assert not torch.allclose(edited, plain, atol=1e-3)
    inner = []

    def nested(q, k, v, site):
        if not inner:
            inner.append(None)
            inner[0] = unet(**given)
        return silent(q, k, v, site)

    assert torch.equal(unet(**given, attend=nested), edited)
    assert torch.equal(inner[0], plain)


@torch.no_grad()
def test_a_batch_equals_its_pictures_one_by_one(config):
    unet, given = make(config), inputs(config)
    together = unet(**given)
    for i in range(2):
        alone = unet(**{name: value if value is None else value[i : i + 1] for name, value in given.items()})
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (13, 18)], ids=["even", "odd"])
@pytest.mark.parametrize("prompts", [2, 3])
def test_what_the_prompts_of_a_picture_share_is_computed_once(config, size, prompts):
    """Two pictures, several prompts each, as guidance asks: the same numbers as for each prompt by itself. What a vector, a
    guidance embedding or another attention sets apart from the beginning is not shared."""
    unet, given = make(config), inputs(config, size=size)
    for name, value in given.items():
        if value is not None and name not in ("x", "t"):
            given[name] = torch.randn(prompts * 2, *value.shape[1:])
    given["t"] = torch.tensor([981.0, 20.0])
    expected = torch.cat([
        unet(**{name: value if value is None or len(value) == 2 else value.chunk(prompts)[k] for name, value in given.items()})
        for k in range(prompts)
    ])  # fmt: skip
    rows = []
    unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda block, args: rows.append(len(args[0])))
    other = lambda q, k, v, site: (rows.append(len(q)), sdpa(q, k, v, site))[1]  # noqa: E731
    prompt = unet.project_context(given["context"])
    for change in ({}, {"context": prompt}, {"attend": other}):
        torch.testing.assert_close(unet(**given | change), expected, rtol=1e-5, atol=1e-5)
        shared = not change.get("attend") and config.vector_dim is None and config.time_cond_dim is None
        assert {*rows} == {2 if shared else 2 * prompts}
        rows.clear()
    if config.time_cond_dim is None:
        shifts = unet.embed_grid([981.0], given["vector"], 2 * prompts, given["x"])[981.0]
        at_once = unet(**given | {"t": torch.full((2,), 981.0)})
        torch.testing.assert_close(unet(**given | {"t": shifts}), at_once, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_channels_last_changes_the_memory_only(name):
    config = SMALL[name]
    unet, given = make(config), inputs(config)
    expected = unet(**given)
    unet.to(memory_format=torch.channels_last)
    actual = unet(**given | {"x": given["x"].contiguous(memory_format=torch.channels_last)})
    assert actual.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_times_embedded_as_a_grid_stand_in_for_the_times(config):
    unet, given = make(config), inputs(config)
    grid = unet.embed_grid([981.0, 500.5, 0.0], given["vector"], 2, given["x"])
    if config.time_cond_dim is not None:
        assert grid == {}  # they depend on the guidance embedding too
        return
    for t, shifts in grid.items():
        expected = unet(**given | {"t": torch.full((2,), t)})
        torch.testing.assert_close(unet(**given | {"t": shifts}), expected, rtol=1e-5, atol=1e-5)
    assert len(grid) == 3
    assert unet.embed_grid([1.0] * 5000, given["vector"], 2, given["x"]) == {}  # too many
    assert unet.embed_grid([], given["vector"], 2, given["x"]) == {}


def test_the_layers_that_tell_the_time_are_one_product_unless_somebody_listens(monkeypatch):
    unet, given = make(SMALL["sd1"]), inputs(SMALL["sd1"])
    heard, called, like, forward = [], [], given["x"], nn.Linear.forward
    with torch.no_grad():
        monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: (called.append(layer), forward(layer, x))[1])
        plain = unet.embed_grid([981.0, 3.0], None, 2, like)
        assert called == [unet.time_embedding.linear_1, unet.time_embedding.linear_2] * 2
        monkeypatch.undo()
        one = unet.embed_times(torch.tensor([3.0]), None, None, like.dtype)
        torch.testing.assert_close(plain[3.0], one.expand(2, -1), rtol=1e-5, atol=1e-6)
        layer = unet.mid_block.resnets[0].time_emb_proj
        hook = layer.register_forward_hook(lambda _layer, _inputs, out: heard.append(1) or 2 * out)
        loud = unet.embed_grid([981.0, 3.0], None, 2, like)
        hook.remove()
        assert len(heard) == 2
        place = unet.mid_block.resnets[0].place
        torch.testing.assert_close(loud[3.0][:, place], 2 * plain[3.0][:, place], rtol=1e-5, atol=1e-6)
    layer.weight.requires_grad_()
    unet.embed_grid([3.0], None, 2, like)[3.0].sum().backward()
    assert layer.weight.grad is not None


@torch.no_grad()
def test_runs_in_bfloat16(config):
    unet, given = make(config), inputs(config)
    expected = unet(**given)
    half = {name: value if name == "t" or value is None else value.bfloat16() for name, value in given.items()}
    actual = unet.bfloat16()(**half)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).std() < 0.05 * expected.std()


@torch.no_grad()
def test_compiles_without_graph_breaks():
    config = replace(
        SMALL["sdxl"],
        block_out_channels=(32, 64),
        attention=(False, True),
        heads=(2, 4),
        transformer_layers=(1, 2),
        layers_per_block=1,
    )
    unet, given = make(config), inputs(config, size=(9, 12))
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    expected = unet(**given)
    assert torch.equal(compiled(**given), expected)
    assert torch.equal(compiled(**given | {"context": unet.project_context(given["context"])}), expected)


def test_checkpointing_gives_the_same_gradients():
    config = EMBEDDED
    unet, given = make(replace(config, block_out_channels=(32, 64, 64), heads=(1, 2, 2))), inputs(config, size=(9, 8))

    def gradients() -> list[torch.Tensor]:
        unet.zero_grad()
        unet(**given).square().sum().backward()
        return [parameter.grad for parameter in unet.parameters() if parameter.grad is not None]

    plain = gradients()
    unet.checkpointing = True
    recomputed = gradients()
    assert len(plain) == len(list(unet.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_init_for_training_starts_at_zero_and_learns_everywhere():
    config = replace(EMBEDDED, block_out_channels=(32, 64), attention=(True, True), transformer_layers=(1, 1), heads=(1, 2))
    with torch.device("meta"):
        unet = UNet(config)
    unet.to_empty(device="cpu")
    torch.manual_seed(0)
    init_for_training(unet)
    given = inputs(config)
    assert torch.equal(unet(**given), torch.zeros(2, 4, 16, 16))
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    before = [parameter.clone() for parameter in unet.parameters()]
    for _ in range(3):  # the zeros let gradients through one layer a step: conv_out, then branches, then their insides
        optimizer.zero_grad()
        (unet(**given) - given["x"]).square().mean().backward()
        optimizer.step()
    still = [name for (name, p), old in zip(unet.named_parameters(), before, strict=True) if torch.equal(p, old)]
    assert still == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 9, 16, 16), r"x has shape \[2, 9, 16, 16\]: needs \[batch, 4, height, width\]"),
        ("x", torch.zeros(4, 16, 16), r"x has shape \[4, 16, 16\]"),
        ("t", torch.zeros(()), r"t has shape \[\]: needs \[2\]"),
        ("t", torch.zeros(2, 7), r"t has shape \[2, 7\]: needs \[2\], one time for each of x, or \[2, 1376\]"),
        ("context", torch.zeros(2, 7, 23), r"context has shape \[2, 7, 23\]: needs \[batch, tokens, 24\]"),
        ("context", torch.zeros(1, 7, 24), "context has batch 1: needs 2"),
        ("context", torch.zeros(3, 7, 24), "context has batch 3: needs 2, as x has, or a multiple of it"),
        ("context", [], "context has 0 entries"),
        ("context", [(torch.zeros(2, 4, 7, 16),) * 2], "context has 1 entries: needs 70"),
        ("vector", None, r"vector has shape None: needs shape \[2, 64\]"),
        ("vector", torch.zeros(2, 63), r"vector has shape \[2, 63\]: needs shape \[2, 64\]"),
        ("guidance_embedding", torch.zeros(2, 10), r"guidance_embedding has shape \[2, 10\]: needs None"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_computing(config, name, value, message):
    with torch.device("meta"):
        unet = UNet(config)

    def never(q, k, v, site):
        raise AssertionError("computed")

    with pytest.raises(ValueError, match=message):
        unet(**inputs(config) | {name: value}, attend=never)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": (8, 8)}, r"heads=\(8, 8\): needs 4 entries"),
        ({"attention": (True,) * 5}, "attention=.*needs 4 entries"),
        ({"block_out_channels": (320, 650, 1280, 1280)}, "norm_groups=32"),
        ({"heads": (8, 7, 8, 8)}, "multiple of"),
    ],
)
def test_sizes_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SD1, **change)
