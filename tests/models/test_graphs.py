"""Recording and replaying: on a CPU with a stand-in that computes again on the same memory, as a CUDA graph does."""

import copy
import gc
import threading
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from latentdiff.models import graphs
from latentdiff.models.attention import sdpa
from latentdiff.models.graphs import Graphed, GraphedDecoder
from latentdiff.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    block_out_channels=(8, 16), layers_per_block=1, attention=(True, True), transformer_layers=(1, 1), heads=(2, 2), context_dim=12,
    norm_groups=4, vector_dim=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(CONFIG).eval()


class Decoder(torch.nn.Module):
    """Stands for a VAE."""

    def __init__(self, made=lambda z: 2 * z):
        super().__init__()
        self.decode = made


class Recorder:
    """It counts, and replays on the recorded memory: what is not copied there is not seen."""

    def __init__(self):
        self.made = []

    def __call__(self, run):
        self.made.append(run)
        out = run()
        return (lambda: out.copy_(run())), out


@pytest.fixture
def graphed(unet):
    recorder = Recorder()
    graphed = Graphed(unet, recorder)
    graphed.made = recorder.made
    return graphed


def inputs(unet: UNet, seed: int, batch: int = 2, size: int = 8):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    prompt = unet.project_context(draw(batch, 5, 12))
    return draw(batch, 4, size, size), 999 * torch.rand(batch, generator=generator), prompt, draw(batch, 6)


@torch.no_grad()
def test_replays_give_what_the_network_gives_and_keep_it(unet, graphed):
    calls = [inputs(unet, seed) for seed in range(3)]
    order = [calls[0], calls[0], calls[1], (calls[2][0], calls[2][1], calls[1][2], calls[1][3]), calls[0]]
    results = [graphed(*call) for call in order]
    assert len(graphed.made) == 1
    for call, result in zip(order, results, strict=True):  # checked at the end: no call writes over another's result
        assert torch.equal(result, unet(*call))


@torch.no_grad()
def test_a_prompt_is_copied_once(unet, graphed, monkeypatch):
    copies = []
    x, t, prompt, vector = inputs(unet, 0)
    graphed(x, t, prompt, vector)
    recording = next(iter(graphed.known.known.values()))
    places = {place.data_ptr() for place in recording.prompt}
    original = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda a, b, *c: (copies.append(a.data_ptr()), original(a, b, *c))[1])
    for _ in range(3):
        graphed(x, t, prompt, vector)
    assert not places & set(copies)
    graphed(x, t, inputs(unet, 1)[2], vector)
    assert places <= set(copies)


@torch.no_grad()
def test_each_shape_has_its_recording_and_few_are_kept(unet, graphed):
    for batch in (1, 2, 3, 4, 5, 5):
        call = inputs(unet, batch, batch)
        assert torch.equal(graphed(*call), unet(*call))
    assert len(graphed.made) == 5
    assert len(graphed.known.known) == graphs.KEPT
    graphed(*inputs(unet, 0, 1))
    assert len(graphed.made) == 6


def test_what_cannot_be_recorded_runs_as_ever(unet, graphed):
    x, t, prompt, vector = inputs(unet, 0)
    context = torch.randn(2, 5, 12)
    with torch.no_grad():
        seen = []
        attend = lambda q, k, v, site: (seen.append(site), sdpa(q, k, v, site))[1]  # noqa: E731
        assert torch.equal(graphed(x, t, prompt, vector, attend=attend), unet(x, t, prompt, vector))
        assert seen
        assert torch.equal(graphed(x, t, context, vector), unet(x, t, context, vector))
    assert graphed(x, t, prompt, vector).requires_grad
    assert graphed.made == []


@torch.no_grad()
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: out of memory")])
def test_where_memory_does_not_suffice_it_runs_unrecorded(unet, error):
    def record(run):
        raise error

    graphed, call = Graphed(unet, record), inputs(unet, 0)
    with pytest.warns(UserWarning, match="too little memory to record"):
        assert torch.equal(graphed(*call), unet(*call))
    assert torch.equal(graphed(*call), unet(*call))


@torch.no_grad()
def test_under_autocast_it_runs_unrecorded(unet, graphed):
    """Weights that were cast for it are gone when it ends: what was recorded on them would read whatever lies there then."""
    call = inputs(unet, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(graphed(*call), unet(*call))
    assert graphed.made == []
    graphed(*call)
    assert len(graphed.made) == 1


@torch.no_grad()
def test_recordings_are_given_up_and_made_again(unet, graphed):
    call, decoder = inputs(unet, 0), GraphedDecoder(Decoder(), Recorder())
    graphed(*call)
    decoder(torch.ones(1, 4, 2, 2))
    assert graphs.give_up()
    assert not graphed.known.known
    assert not decoder.known.known
    assert not graphs.give_up()
    assert torch.equal(graphed(*call), unet(*call))
    assert len(graphed.made) == 2


@torch.no_grad()
@pytest.mark.parametrize("change", ["other weights", "data", "part", "setting"])
def test_a_network_that_is_another_is_recorded_anew(change):
    torch.manual_seed(0)
    unet, recorder = UNet(CONFIG).eval(), Recorder()
    graphed, call = Graphed(unet, recorder), inputs(unet, 0)
    graphed(*call)
    if change == "other weights":
        unet.load_state_dict({name: w.clone() for name, w in unet.state_dict().items()}, assign=True)
    elif change == "data":
        unet.conv_in.weight.data = 2 * unet.conv_in.weight
    elif change == "part":
        unet.conv_out = copy.deepcopy(unet.conv_out)
    else:
        unet.conv_in.padding_mode = "circular"
    again = inputs(unet, 0)
    assert torch.equal(graphed(*again), unet(*again))
    assert len(recorder.made) == 2
    graphed(*inputs(unet, 1))
    assert len(recorder.made) == 2


@torch.no_grad()
def test_a_compiled_network_is_recorded_and_watched_too():
    torch.manual_seed(0)
    unet, recorder = UNet(CONFIG).eval(), Recorder()
    graphed = Graphed(torch.compile(unet, backend="eager"), recorder)
    for made, change in ((1, False), (1, False), (2, True)):
        if change:
            unet.conv_out = copy.deepcopy(unet.conv_out)
            unet.conv_out.weight.mul_(2)
        call = inputs(unet, 0)
        torch.testing.assert_close(graphed(*call), unet(*call))
        assert len(recorder.made) == made


@torch.no_grad()
def test_who_listens_is_heard(unet, graphed):
    heard, call = [], inputs(unet, 0)
    graphed(*call)
    hook = unet.mid_block.resnets[0].register_forward_hook(lambda *_: heard.append(1))
    for _ in range(2):
        assert torch.equal(graphed(*call), unet(*call))
    assert len(heard) == 4
    assert len(graphed.made) == 1
    hook.remove()
    graphed(*call)
    assert len(heard) == 4


def test_what_was_recorded_without_counting_versions_runs_with_it(unet, graphed):
    with torch.inference_mode():
        call = inputs(unet, 0)
        graphed(*call)
    with torch.no_grad():
        call = inputs(unet, 1)
        assert torch.equal(graphed(*call), unet(*call))
    assert len(graphed.made) == 1


@torch.no_grad()
def test_a_copy_records_its_own(unet, graphed):
    call = inputs(unet, 0)
    graphed(*call)
    other = copy.deepcopy(graphed)
    other.unet.conv_out.weight.zero_()
    assert torch.equal(graphed(*call), unet(*call))
    assert not torch.equal(other(*call), graphed(*call))
    decoder = copy.deepcopy(GraphedDecoder(Decoder(), Recorder()))
    assert torch.equal(decoder(torch.ones(1, 4, 2, 2)), torch.full((1, 4, 2, 2), 2.0))


@torch.no_grad()
def test_threads_share_one(unet, graphed):
    calls = [inputs(unet, seed) for seed in range(4)]
    expected = [unet(*call) for call in calls]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(graphed(*calls[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Cuda:
    """Stands for the parts of torch.cuda by which one records: it writes down what is asked for, in order."""

    def __init__(self, monkeypatch, *, fails: bool = False):
        wait = {"wait_stream": lambda stream, other: self.log.append(f"{stream.name} waits for {other.name}")}
        self.caller, self.side = (type("Stream", (), {"name": name, **wait})() for name in ("caller", "side"))
        self.log, self.current, self.fails = [], self.caller, fails
        stand_ins = {
            "Stream": lambda: self.side,
            "graph_pool_handle": lambda: "pool",
            "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": self.stream,
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": self.graph,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        clear = lambda: self.log.append("no workspaces")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.current = stream
        self.log.append("begin")
        yield
        if self.fails:  # as torch's, it then leaves its stream
            raise RuntimeError("operation failed due to a previous error during capture")
        self.log.append("end")
        self.current = self.caller


def test_while_it_records_nothing_is_collected_and_workspaces_are_its_own(monkeypatch):
    cuda = Cuda(monkeypatch)
    run = lambda: (cuda.log.append(("run", cuda.current is cuda.side, gc.isenabled())), "out")[1]  # noqa: E731
    replay, out = graphs.Capture()(run)
    warm, recorded = ("run", True, True), ("run", True, False)
    assert cuda.log == [
        *("side waits for caller", warm, warm, warm, "caller waits for side"),
        *("begin", "no workspaces", recorded, "end", "no workspaces"),
    ]
    assert gc.isenabled()
    assert out == "out"
    replay()
    assert cuda.log[-1] == "replay"


def test_a_recording_that_fails_leaves_the_callers_stream_and_workspaces_as_they_were(monkeypatch):
    cuda = Cuda(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.Capture()(lambda: None)
    assert cuda.current is cuda.caller
    assert cuda.log[-1] == "no workspaces"
    assert gc.isenabled()
    cuda.log.clear()

    def run():
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        graphs.Capture()(run)
    assert cuda.log == ["side waits for caller", "caller waits for side"]


def on_gpu(x, t, prompt, vector):
    return x.cuda(), t.cuda(), [(k.cuda(), v.cuda()) for k, v in prompt], vector.cuda()


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_gives_what_the_network_gives(unet):
    network = copy.deepcopy(unet).cuda()
    graphed = Graphed(network)
    for seed in (0, 0, 1):
        call = on_gpu(*inputs(unet, seed))
        torch.testing.assert_close(graphed(*call), network(*call), rtol=1e-5, atol=1e-5)
    assert [recording is not None for recording in graphed.known.known.values()] == [True]


@pytest.mark.gpu
@torch.no_grad()
def test_cuda_graphs_outlive_those_that_are_given_up():
    """Large products, whose kernels need cuBLAS's workspace; what was its memory is written over."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8192, 640), torch.nn.Linear(640, 8192)]
    network = torch.nn.Sequential(*layers).cuda().bfloat16()
    network.decode = network.forward
    decoder = GraphedDecoder(network)
    calls = [torch.randn(n, 8192, device="cuda", dtype=torch.bfloat16) for n in (1, 8, 16, 64, 128, 512)]
    for _ in range(2):
        for call in calls:
            torch.testing.assert_close(decoder(call), network(call))
            rubbish = torch.full((64 << 20,), torch.nan, device="cuda")
            del rubbish
            torch.cuda.empty_cache()
            for key in list(decoder.known.known):
                kept = next(x for x in calls if x.shape == key[0][0])
                torch.testing.assert_close(decoder(kept), network(kept))
    assert len(decoder.known.known) == graphs.KEPT
    assert all(decoder.known.known.values())


@pytest.mark.gpu
@torch.no_grad()
def test_the_memory_of_cuda_graphs_is_returned(unet):
    def reserved():
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    network, call = copy.deepcopy(unet).cuda(), on_gpu(*inputs(unet, 0, 8, 64))
    graphed = Graphed(network)
    expected = graphed(*call)
    held = reserved()
    assert graphs.give_up()
    assert reserved() < held
    for _ in range(2):
        torch.testing.assert_close(graphed(*call), expected, rtol=1e-4, atol=1e-4)
    assert all(graphed.known.known.values())


@pytest.mark.gpu
@torch.no_grad()
def test_threads_with_streams_of_their_own_share_cuda_graphs(unet):
    network = copy.deepcopy(unet).cuda()
    graphed, wrong = Graphed(network), []

    def work(seed):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            call = on_gpu(*inputs(unet, seed, 1 + seed % 2))
            expected = network(*call)
            for _ in range(20):
                if not torch.allclose(graphed(*call), expected, rtol=1e-4, atol=1e-5):
                    wrong.append(seed)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(graphed.known.known) == 2


@torch.no_grad()
def test_a_decoder_is_recorded_for_each_shape_but_not_for_large_ones(monkeypatch):
    recorder = Recorder()
    decoder = GraphedDecoder(Decoder(lambda z: 2 * z.repeat_interleave(2, -1)), recorder)
    latents = [torch.randn(1, 4, size, size) for size in (8, 4, 8, 4)]
    results = [decoder(z) for z in latents]
    for z, result in zip(latents, results, strict=True):
        assert torch.equal(result, 2 * z.repeat_interleave(2, -1))
    assert len(recorder.made) == 2
    monkeypatch.setattr(GraphedDecoder, "largest", 15)
    assert torch.equal(decoder(latents[1]), results[1])
    assert len(recorder.made) == 2
    with torch.enable_grad():
        assert decoder(latents[1].requires_grad_()).requires_grad


@torch.no_grad()
def test_a_decoder_runs_unrecorded_where_memory_does_not_suffice():
    tried = []

    def record(run):
        tried.append(run)
        raise torch.OutOfMemoryError

    decoder, z = GraphedDecoder(Decoder(), record), torch.randn(1, 4, 8, 8)
    with pytest.warns(UserWarning, match="too little memory to record the decoder"):
        assert torch.equal(decoder(z), 2 * z)
    assert torch.equal(decoder(z), 2 * z)
    assert len(tried) == 1


def test_a_pipeline_decodes_with_its_own_vae(tiny_pipe):
    """The recorded decoder of another is not asked, nor that of weights that are computed again in float32."""
    z = torch.randn(1, 4, 8, 8)
    other = GraphedDecoder(Decoder(lambda z: z * torch.nan), lambda run: ((lambda: None), run()))
    assert torch.equal(replace(tiny_pipe, decoder=other).decode(z), tiny_pipe.decode(z))
    own = GraphedDecoder(tiny_pipe.vae, lambda run: ((lambda: None), torch.full_like(run(), 0.5)))
    assert torch.equal(replace(tiny_pipe, decoder=own).decode(z), torch.full_like(tiny_pipe.decode(z), 0.5))
