"""What makes it fast: chosen for the machine, the same picture, and steady."""

import copy
import gc
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import latentdiff
from latentdiff import doctor
from latentdiff.bench.ladder import ladder
from latentdiff.bench.machine import peak_memory
from latentdiff.conditioning import Cond
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.guidance import guided
from latentdiff.diffusion.rules import cfg, rescale
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.loading import best_dtype, compile_options, ready
from latentdiff.models.caching import Cached
from latentdiff.models.fused import norm_silu
from latentdiff.models.graphs import Graphed
from latentdiff.models.onednn import multiplies_bfloat16
from latentdiff.models.unet import UNet
from latentdiff.sound import in_float32

CPU = torch.device("cpu")


# -- chosen for the machine --


@pytest.mark.parametrize(
    ("abilities", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_a_cpu_gets_bfloat16_where_it_multiplies_in_it(abilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    assert best_dtype(CPU) == dtype


@pytest.mark.parametrize("has", [True, False])
def test_an_older_torch_tells_of_bfloat16_by_another_name(has, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has, raising=False)
    assert best_dtype(CPU) == (torch.bfloat16 if has else torch.float32)


def test_a_gpu_gets_16_bits(monkeypatch):
    for recent, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, recent=recent: recent)
        assert best_dtype(torch.device("cuda")) == dtype
    assert best_dtype(torch.device("mps")) == torch.float16


def test_what_this_cpu_says_agrees_with_its_flags():
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[1].splitlines()[0].split()
    except (OSError, IndexError):
        pytest.skip("no flags in /proc/cpuinfo")
    assert multiplies_bfloat16() == bool({"avx512_bf16", "amx_bf16"} & set(flags))


def test_doctor_says_the_dtype_and_why(monkeypatch):
    for device, dtype in (("cpu", "float32"), ("cpu", "bfloat16"), ("cuda", "bfloat16"), ("cuda", "float16"), ("mps", "float16")):
        monkeypatch.setattr(doctor, "best_device", lambda device=device: torch.device(device))
        monkeypatch.setattr(doctor, "best_dtype", lambda _, dtype=dtype: getattr(torch, dtype))
        assert doctor.choice().text.startswith(f"{device} in {dtype}: ")


def test_models_are_laid_out_channels_last(tiny_parts):
    pipe = ready(tiny_parts(), CPU, torch.float32)
    for part in (pipe.unet, pipe.vae):
        weights = [p for p in part.parameters() if p.ndim == 4]
        assert weights
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    wrong, seen = [], []

    def look(name, args, out):
        seen.append(name)
        if not all(x.is_contiguous(memory_format=torch.channels_last) for x in (args[0], out)):
            wrong.append(name)

    for part in (pipe.unet, pipe.vae):
        for name, layer in part.named_modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.GroupNorm):
                layer.register_forward_hook(lambda _, args, out, name=name: look(name, args, out))
    pipe.decode(pipe.encode(torch.zeros(1, 3, 32, 32)))
    pipe("a cat", steps=1, seed=0, progress=False)  # both halves of guidance are the same to begin with
    assert len(set(seen)) > 60
    assert set(wrong) <= {"conv_in", "encoder.conv_in", "post_quant_conv"}  # which take what comes from outside


# -- the same picture --


@pytest.fixture
def pipe(tiny_parts):
    return ready(tiny_parts(), CPU, torch.float32)


def last(pipe, **options):
    *_, step = pipe.stream("a cat", **{"steps": 4, "seed": 3, "guidance": 5.0} | options)
    return step.x


def test_compiled_it_is_the_same(tiny_parts, pipe, monkeypatch):
    """With a backend that runs what the compiler was given: whole, without a break, for all that the pipeline passes."""
    compile, made = torch.compile, []

    def with_another_backend(part, mode=None, **options):
        made.append(part)
        return compile(part, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", with_another_backend)
    compiled = ready(tiny_parts(), CPU, torch.float32, compile=True)
    assert compiled.network is not None
    x = last(compiled)
    torch.testing.assert_close(x, last(pipe), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled.decode(x), pipe.decode(x), rtol=1e-5, atol=1e-5)
    assert len(made) == 2  # the U-Net and the decoder
    assert compiled.vae.state_dict().keys() == pipe.vae.state_dict().keys()
    torch.testing.assert_close(in_float32("VAE", compiled.vae.bfloat16()).decode(x), pipe.decode(x), rtol=0.1, atol=0.1)


@torch.no_grad()
def test_it_is_compiled_for_more_shapes_than_torch_would():
    layer = torch.compile(torch.nn.Conv2d(1, 1, 1), backend="eager", **compile_options(CPU))
    for side in range(2, 12):
        assert layer(torch.zeros(1, 1, side, side)).shape[-1] == side


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a compiler")
def test_compiled_by_inductor_it_is_the_same(tiny_parts, pipe):
    compiled = ready(tiny_parts(), CPU, torch.float32, compile=True)
    x = last(compiled)
    torch.testing.assert_close(x, last(pipe), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled.decode(x), pipe.decode(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpm2"])
def test_the_times_of_a_grid_are_embedded_once(pipe, sampler, monkeypatch):
    """Levels between those of the grid, as dpm2 takes, are embedded as they come."""
    given, embed = [], UNet.embed_times
    monkeypatch.setattr(UNet, "embed_times", lambda unet, t, *rest: (given.append(t.shape), embed(unet, t, *rest))[1])
    pipe = replace(pipe, network=None)  # a recording would not call it
    found = last(pipe, sampler=sampler)
    assert given[:4] == [(1,)] * 4
    between = [shape for shape in given[4:] if len(shape) == 1]
    assert len(between) == (3 if sampler == "dpm2" else 0)
    assert any(len(shape) == 2 for shape in given)
    monkeypatch.setattr(UNet, "embed_grid", lambda *_: {})
    torch.testing.assert_close(found, last(pipe, sampler=sampler), rtol=1e-5, atol=1e-5)


def test_recorded_it_is_the_same(pipe):
    def record(run):
        out = run()
        return (lambda: out.copy_(run())), out

    recorded = replace(pipe, network=Graphed(pipe.unet, record))
    for options in ({}, {"n": 3, "batch": 2}, {"sampler": "heun"}, {"guidance": 1.0}, {"negative": "a dog"}):
        torch.testing.assert_close(last(recorded, **options), last(pipe, **options), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_never_waits_for_a_device(pipe, sampler):
    """On `meta`, whatever asks a tensor for its numbers, as only waiting for a GPU could, is an error."""
    unet = copy.deepcopy(pipe.unet).to("meta", torch.bfloat16)
    prompt, negative = (Cond(torch.empty(2, 5, 32, device="meta", dtype=torch.bfloat16)) for _ in range(2))
    denoiser = Denoiser(unet, pipe.schedule, "v", torch.bfloat16, prepare=lambda a, b: a.join(b).project(unet, {10.0: 900.0}))
    denoise = guided(denoiser, prompt, negative, cfg(7.5) + rescale(0.5))
    sigmas = torch.tensor([10.0, 3.0, 1.0, 0.3, 0.1, 0.0])
    *_, last = SAMPLERS[sampler](denoise, torch.empty(2, 4, 8, 8, device="meta"), sigmas, randn=torch.randn_like)
    assert last.x.is_meta
    assert last.x.dtype == torch.float32
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        last.x.isfinite().all().item()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 96, 16, 16), (1, 160, 8, 8), (2, 192, 4, 4), (1, 64, 32, 32), (2, 256, 8, 8)])
def test_norms_in_bfloat16_are_no_further_from_exact_ones_than_torchs(shape):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(16, shape[1]).bfloat16()
    norm.weight.normal_()
    norm.bias.normal_()
    x = (2 * torch.randn(shape) + torch.randn(shape[1], 1, 1)).bfloat16().contiguous(memory_format=torch.channels_last)
    exact = F.silu(F.group_norm(x.double(), 16, norm.weight.double(), norm.bias.double()))
    y = norm_silu(norm, x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (y - exact).square().mean() <= 1.02 * (F.silu(norm(x)) - exact).square().mean()


def test_bfloat16_with_all_its_speed_is_no_further_from_float32_than_without(tiny_parts):
    """The fast paths (shared halves, keys and values once, blocked attention) against the plain network, both in bfloat16."""
    parts = tiny_parts(unet=replace(tiny_parts().spec.unet, sample_size=32))  # 1024 places: enough for blocked attention
    found = {
        rung.name: rung.difference for rung in ladder(parts.spec, parts.unet, CPU, torch.bfloat16, seconds=0.0, compiled=False)
    }
    assert found["shared halves"] < 1.05 * found["bfloat16"]
    assert found["best attention"] < 1.05 * found["bfloat16"]


# -- another picture, if asked for --


def test_cached_features_change_the_picture_a_little_and_each_run_alike(tiny_parts, pipe):
    cached = ready(tiny_parts(), CPU, torch.float32, cache=2)
    assert isinstance(cached.network, Cached)
    exact, near = last(pipe, steps=20), last(cached, steps=20)
    assert 0 < (near - exact).std() < 0.5 * exact.std()
    assert torch.equal(last(cached, steps=20), near)
    several = last(cached, steps=20, n=3, seed=2)
    assert torch.equal(several[1:2], near)  # each group of pictures has a cache of its own


def test_float8_is_refused_where_it_does_not_fit(tiny_parts):
    with pytest.raises(ValueError, match="float8 needs a bfloat16 model"):
        ready(tiny_parts(), CPU, torch.float32, float8=True)


@pytest.mark.parametrize("width", ["int8", "bfloat16"])
def test_narrow_weights_change_the_picture_a_little(tiny_parts, pipe, width):
    narrow = ready(tiny_parts(), CPU, torch.float32, weights=width)
    exact, near = last(pipe), last(narrow)
    assert 0 < (near - exact).std() < 0.1 * exact.std()


@pytest.mark.parametrize("options", [{"cache": 0}, {"cache": 2, "compile": True}])
def test_bad_caches_are_named(tiny_parts, options):
    with pytest.raises(ValueError, match="cache must be at least 1, and 1 with compile=True"):
        ready(tiny_parts(), CPU, torch.float32, **options)


# -- steady --


@pytest.mark.slow
def test_memory_does_not_grow_over_200_calls(tiny_folder):
    pipe = latentdiff.load(tiny_folder, device="cpu")

    def call(seed):
        return pipe("a cat", steps=2, seed=seed, n=1 + seed % 3, progress=False)

    def held() -> int:
        gc.collect()
        return sum(t.numel() * t.element_size() for t in gc.get_objects() if isinstance(t, torch.Tensor))

    for seed in range(20):
        call(seed)
    tensors, memory = held(), peak_memory(lambda: call(0), CPU)
    for seed in range(200):
        call(seed)
    assert held() == tensors
    after = peak_memory(lambda: call(0), CPU)
    if memory is not None and after is not None:
        assert after - memory < 8 << 20


def test_a_call_leaves_nothing_behind(pipe):
    """The fast form of the test above: no tensor outlives a call, whatever its size or batch."""

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    last(pipe)
    before = tensors()
    for seed in range(5):
        last(pipe, seed=seed, n=1 + seed % 2)
    assert tensors() == before
