"""What makes it fast: chosen for the machine, the same picture, and steady."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import latentdiff
from latentdiff import doctor
from latentdiff.bench.ladder import ladder
from latentdiff.bench.machine import peak_memory
from latentdiff.loading import best_dtype, multiplies_bfloat16, ready
from latentdiff.models.caching import Cached
from latentdiff.models.graphs import Graphed

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
    seen = []
    hook = lambda _, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))  # noqa: E731
    for part in (pipe.unet, pipe.vae.decoder):
        for layer in part.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(hook)
    pipe("a cat", steps=1, seed=0, progress=False)
    assert seen
    assert all(seen)  # end to end


# -- the same picture --


@pytest.fixture
def pipe(tiny_parts):
    return ready(tiny_parts(), CPU, torch.float32)


def last(pipe, **options):
    *_, step = pipe.stream("a cat", **{"steps": 4, "seed": 3, "guidance": 5.0} | options)
    return step.x


def test_compiled_it_is_the_same(tiny_parts, pipe, monkeypatch):
    """With a backend that runs what the compiler was given: whole, without a break, for all that the pipeline passes."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet, mode=None, **options: compile(unet, backend="aot_eager", **options))
    compiled = ready(tiny_parts(), CPU, torch.float32, compile=True)
    assert compiled.network is not None
    torch.testing.assert_close(last(compiled), last(pipe), rtol=1e-5, atol=1e-5)


def test_recorded_it_is_the_same(pipe):
    def record(run):
        out = run()
        return (lambda: out.copy_(run())), out

    recorded = replace(pipe, network=Graphed(pipe.unet, record))
    for options in ({}, {"n": 3, "batch": 2}, {"sampler": "heun"}, {"guidance": 1.0}, {"negative": "a dog"}):
        torch.testing.assert_close(last(recorded, **options), last(pipe, **options), rtol=1e-5, atol=1e-5)


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
