"""Recording and replaying: on a CPU with a stand-in that computes again on the same memory, as a CUDA graph does."""

import copy
import threading
from dataclasses import replace

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
def test_where_memory_does_not_suffice_it_runs_unrecorded(unet):
    def record(run):
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphed, call = Graphed(unet, record), inputs(unet, 0)
    with pytest.warns(UserWarning, match="too little memory to record"):
        assert torch.equal(graphed(*call), unet(*call))
    assert torch.equal(graphed(*call), unet(*call))


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


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_gives_what_the_network_gives(unet):
    on_gpu = copy.deepcopy(unet).cuda()
    graphed = Graphed(on_gpu)
    for seed in (0, 0, 1):
        x, t, prompt, vector = inputs(unet, seed)
        call = x.cuda(), t.cuda(), [(k.cuda(), v.cuda()) for k, v in prompt], vector.cuda()
        torch.testing.assert_close(graphed(*call), on_gpu(*call), rtol=1e-5, atol=1e-5)


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
