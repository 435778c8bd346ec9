"""A network whose operations are written down gives what it gives module by module, to the last bit, and hears of every change."""

import copy
import threading
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff import loading
from latentdiff.loading import ready
from latentdiff.models import onednn, recorded
from latentdiff.models.attention import Attention, sdpa
from latentdiff.models.convolution import Conv2d
from latentdiff.models.graphs import GraphedDecoder
from latentdiff.models.narrow import narrow
from latentdiff.models.recorded import Calls, Changed, Recorded, RecordedDecoder
from latentdiff.models.unet import UNet, UNetConfig
from latentdiff.models.vae import VAE

CPU = torch.device("cpu")
CONFIG = UNetConfig(
    block_out_channels=(8, 16), layers_per_block=1, attention=(True, True), transformer_layers=(1, 1), heads=(2, 2), context_dim=12,
    norm_groups=4, vector_dim=6,
)  # fmt: skip


def network(dtype: torch.dtype = torch.float32) -> UNet:
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval().requires_grad_(False)
    return unet.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.fixture
def unet() -> UNet:
    return network()


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """One entry for each call of a U-Net module by module."""
    calls, forward = [], UNet.forward
    monkeypatch.setattr(
        UNet, "forward", lambda unet, x, *args, **kwargs: (calls.append(len(x)), forward(unet, x, *args, **kwargs))[1]
    )
    return calls


def inputs(unet: UNet, seed: int = 0, batch: int = 2, size: int = 8, prompts: int = 1):
    generator, dtype = torch.Generator().manual_seed(seed), next(unet.parameters()).dtype
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    prompt = unet.project_context(draw(batch * prompts, 5, 12))
    return draw(batch, 4, size, size), torch.full((batch,), 500.0 + seed), prompt, draw(batch * prompts, 6)


def same(net: Recorded, *given, **seams) -> None:
    assert torch.equal(net(*given, **seams), net.unet(*given, **seams))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_gives_the_same_for_other_numbers(dtype, mode, forwards):
    unet = network(dtype)
    net = Recorded(unet)
    with mode():
        calls = [inputs(unet, seed) for seed in range(3)]
        expected = [unet(*call) for call in calls]
        before = len(forwards)
        found = [net(*call) for call in [*calls, *calls]]
    assert len(forwards) == before + 1
    assert len(net.book.known) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, [*expected, *expected], strict=True))


@torch.no_grad()
@pytest.mark.skipif(not onednn.has_operators(torch.bfloat16), reason="no oneDNN, or none in bfloat16")
def test_weights_of_products_lie_in_their_kernels_order(monkeypatch):
    ordered, order = [], onednn.ordered_linear
    monkeypatch.setattr(onednn, "ordered_linear", lambda *given: (ordered.append(order(*given)), ordered[-1])[1])
    unet = network(torch.bfloat16)
    x, t, prompt, vector = inputs(unet)
    with Calls([x, t, *[part for pair in prompt for part in pair], vector]) as calls:
        unet(x, t, prompt, vector)
    pointwise = [m for m in unet.modules() if isinstance(m, Conv2d) and m.is_linear()]
    # Of each block: queries, keys, values and what they find; queries and what they find in the prompt; values, gates, their end.
    assert len(ordered) == 9 * unet.cross_attentions + len(pointwise)
    constants = [*map(id, calls.constants.values())]
    assert all(weight.is_mkldnn and id(weight) in constants for weight in ordered)
    for layer in [m for m in unet.modules() if isinstance(m, Attention) and not m.cross]:
        layer.join()  # one product in the place of three
    for mode in (torch.no_grad, torch.inference_mode):
        ordered.clear()
        with mode(), Calls([x, t, *[part for pair in prompt for part in pair], vector]):
            unet(x, t, prompt, vector)
        assert len(ordered) >= 7 * unet.cross_attentions
    ordered.clear()
    monkeypatch.setattr(Conv2d, "light", 0)
    with Calls([x, t, *[part for pair in prompt for part in pair], vector]):
        unet(x, t, prompt, vector)
    assert not ordered


@torch.no_grad()
def test_every_shape_has_its_own_and_few_are_kept(unet, forwards):
    net = Recorded(unet)
    shapes = [{"batch": b, "size": s, "prompts": n} for b, s in ((1, 8), (2, 8), (3, 8), (2, 6)) for n in (2, 1)]
    for shape in shapes:
        same(net, *inputs(unet, **shape))
    assert len(net.book.known) == recorded.KEPT
    before = len(forwards)
    net(*inputs(unet, seed=3, **shapes[-1]))
    assert len(forwards) == before
    times = unet.embed_grid([500.0], torch.randn(2, 6), 2, next(unet.parameters()))[500.0]
    x, _, prompt, vector = inputs(unet)
    same(net, x, times, prompt, vector)


@torch.no_grad()
def test_numbers_that_decide_are_looked_at_again(unet):
    """As those by which a part that is not ours may decide what it does."""

    class Deciding(nn.Module):
        def forward(self, x):
            return x if x[0, 0, 0, 0] > 0 else 2 * x

    unet.conv_in = nn.Sequential(Deciding(), unet.conv_in)
    x, t, prompt, vector = inputs(unet)
    with Calls([x, t, *(flat := [part for pair in prompt for part in pair]), vector]) as calls:
        out = unet(x, t, prompt, vector)
    run = calls.function(out)
    assert torch.equal(run(x, t, *flat, vector), out)
    with pytest.raises(Changed):
        run(-x, t, *flat, vector)
    net = Recorded(unet)
    net(x, t, prompt, vector)
    same(net, -x, t, prompt, vector)
    same(net, 2 * x, t, prompt, vector)


CHANGES = {
    "in place": lambda unet: unet.conv_out.bias.add_(1),
    "of a convolution": lambda unet: unet.mid_block.resnets[0].conv1.weight.mul_(2),
    "through data": lambda unet: unet.mid_block.resnets[0].conv1.weight.data.mul_(2),
    "of a norm, through data": lambda unet: unet.mid_block.resnets[0].norm1.weight.data.mul_(2),
    "new weights": lambda unet: setattr(unet.conv_out, "bias", nn.Parameter(torch.ones(4))),
    "state": lambda unet: unet.load_state_dict({k: v + 1 for k, v in unet.state_dict().items()}),
    "state, assigned": lambda unet: unet.load_state_dict({k: v + 1 for k, v in unet.state_dict().items()}, assign=True),
    "data": lambda unet: setattr(unet.conv_out.bias, "data", torch.ones(4)),
    "module": lambda unet: setattr(unet.mid_block, "attentions", copy.deepcopy(unet.mid_block.attentions).apply(loud)),
    "foreach": lambda unet: torch._foreach_lerp_([*unet.parameters()], [torch.zeros_like(p) for p in unet.parameters()], 0.5),  # type: ignore[attr-defined]
    "hook": lambda unet: unet.mid_block.resnets[1].conv2.register_forward_hook(lambda _layer, _inputs, out: 2 * out),
    "hook before": lambda unet: unet.register_forward_pre_hook(lambda _layer, inputs: (2 * inputs[0], *inputs[1:])),
}


def loud(layer: nn.Module) -> None:
    for weight in layer._parameters.values():
        if weight is not None:
            weight.mul_(3)


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_network_is_heard(change, dtype, forwards):
    unet = network(dtype)
    net, given = Recorded(unet), inputs(unet)
    before = net(*given)
    net(*given)
    result = CHANGES[change](unet)
    unet.to(dtype)
    x, t, prompt, vector = given
    prompt = [*prompt]  # another run's
    assert not torch.equal(net(x, t, prompt, vector), before)
    same(net, x, t, prompt, vector)
    if change.startswith("hook"):
        result.remove()
        assert torch.equal(net(x, t, prompt, vector), before)
    calls = len(forwards)
    net(x, t, prompt, vector)
    assert len(forwards) == calls


@torch.no_grad()
def test_who_listens_is_called_once_a_step(unet):
    heard = []
    unet.register_forward_hook(lambda *_: heard.append(1))
    net = Recorded(unet)
    for count in range(1, 4):
        net(*inputs(unet))
        assert len(heard) == count
    assert not net.book.known


@torch.no_grad()
def test_inputs_of_all_kinds(unet, forwards):
    net, (x, t, prompt, vector) = Recorded(unet), inputs(unet)
    net(nn.Parameter(x), t, prompt, vector)
    same(net, nn.Parameter(2 * x), t, prompt, vector)
    one = [(keys, keys) for keys, _ in prompt]
    same(net, x.repeat(2, 1, 1, 1), t.repeat(2), [(k.repeat(2, 1, 1, 1),) * 2 for k, _ in prompt], vector.repeat(2, 1))
    assert len(net.book.known) == 1
    same(net, x, t, one, vector)


@torch.no_grad()
def test_of_no_pictures_it_makes_none(unet):
    net = Recorded(unet)
    for _ in range(2):
        same(net, *inputs(unet, batch=0))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4,), (4, 8), (1, 0, 8, 8)])
def test_other_shapes_are_told_of_as_ever(unet, tiny_parts, shape):
    x, vae, (_, *rest) = torch.zeros(shape), tiny_parts().vae, inputs(unet, batch=1)
    with pytest.raises(ValueError, match="x has shape"):
        Recorded(unet)(x, *rest)
    for decoder in (RecordedDecoder(vae), GraphedDecoder(vae)):
        with pytest.raises(ValueError, match="z has shape"):
            decoder(x)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        unet = network(torch.bfloat16)
        net = Recorded(unet)
        for seed in range(2):
            same(net, *inputs(unet, seed))
        unet.conv_out.weight.mul_(2)
        same(net, *inputs(unet, seed=3))


@torch.no_grad()
def test_a_copy_has_a_network_of_its_own(unet):
    net = Recorded(unet)
    net(*inputs(unet))
    twin, own = copy.deepcopy((net, unet))
    assert twin.unet is own
    own.conv_out.bias.add_(1)
    same(twin, *inputs(unet))
    same(net, *inputs(unet))
    assert not torch.equal(twin(*inputs(unet)), net(*inputs(unet)))


@torch.no_grad()
def test_who_listens_to_all_modules_hears_of_each(unet):
    net, heard = Recorded(unet), []
    net(*inputs(unet))
    hook = nn.modules.module.register_module_forward_hook(lambda layer, *_: heard.append(layer))
    try:
        net(*inputs(unet, seed=1))
    finally:
        hook.remove()
    assert {id(m) for m in unet.modules() if isinstance(m, nn.Conv2d | nn.GroupNorm)} <= {*map(id, heard)}


class Watched(torch.Tensor):
    """Of a kind that may see or do more than numbers."""


def test_what_cannot_be_written_down_runs_as_ever(unet, forwards, monkeypatch):
    net, (x, t, prompt, vector) = Recorded(unet), inputs(unet)
    x.requires_grad_()
    net(x, t, prompt, vector).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        seen = []
        net(x, t, prompt, vector, attend=lambda q, k, v, site: seen.append(site) or sdpa(q, k, v, site))
        assert len(seen) == 2 * unet.cross_attentions
        same(net, x, t, torch.randn(2, 5, 12), vector)
        with torch.autocast("cpu", torch.bfloat16):
            same(net, x, t, prompt, vector)
        net(x.detach().as_subclass(Watched), t, prompt, vector)
        compiled = torch.compile(lambda *given: net(*given), backend="eager")
        torch.testing.assert_close(compiled(x, t, prompt, vector), unet(x, t, prompt, vector))
        assert not net.book.known
        forwards[:] = forwards[:6]
        monkeypatch.setattr(recorded, "PLACES", 2 * 8 * 8 - 1)
        same(net, x, t, prompt, vector)
        assert not net.book.known
        assert len(forwards) == 8
        monkeypatch.setattr(recorded, "PLACES", 2 * 8 * 8)
        same(net, x, t, prompt, vector)
        assert net.book.known


@torch.no_grad()
@pytest.mark.parametrize("change", ["circular", "forward", "eps", "class"])
def test_what_is_set_on_a_part_is_seen(change):
    unet = network(torch.float32)
    net = Recorded(unet)
    same(net, *inputs(unet))
    if change == "circular":
        unet.conv_in.padding_mode = "circular"
    elif change == "forward":
        unet.conv_out.forward = lambda x: 2 * type(unet.conv_out).forward(unet.conv_out, x)
    elif change == "eps":
        unet.mid_block.resnets[0].norm1.eps = 0.5
    else:
        unet.conv_out.__class__ = torch.nn.Conv2d
        unet.conv_out.weight.mul_(2)
    same(net, *inputs(unet))


def test_a_network_in_fewer_bits_is_no_smaller(monkeypatch):
    """What a recording holds while it is made would be all of the weights in full."""
    unet = network(torch.float32)
    count = sum(w.numel() for w in unet.parameters())
    narrow(unet, "int8")
    assert sum(w.numel() for w in unet.parameters()) < count / 2
    monkeypatch.setattr(recorded, "SMALL", count - 1)
    assert not recorded.is_small(unet)


@torch.no_grad()
def test_threads_share_one(unet):
    net, calls = Recorded(unet), [inputs(unet, seed, batch=1 + seed % 3) for seed in range(6)]
    expected, found = [unet(*call) for call in calls], [[None] * 6 for _ in range(4)]

    @torch.no_grad()
    def work(mine):
        for _ in range(5):
            for i, call in enumerate(calls):
                mine[i] = net(*call)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for mine in found for a, b in zip(mine, expected, strict=True))


# -- what is written down --


def written(f, *given: torch.Tensor):
    with torch.no_grad(), Calls(given) as calls:
        out = f(*given)
    return calls, calls.function(out)


def test_results_are_given_up_after_their_last_use():
    class Alive(TorchDispatchMode):
        most = 0

        def __init__(self):
            super().__init__()
            self.made = []

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            self.made.append(weakref.ref(out))
            self.most = max(self.most, sum(ref() is not None for ref in self.made))
            return out

    def f(x):
        for _ in range(20):
            x = (x + 1).sin()
        return x

    x = torch.randn(100)
    _, run = written(f, x)
    with Alive() as alive:
        y = run(x)
    assert torch.equal(y, f(x))
    assert len(alive.made) == 40
    assert alive.most <= 3


def test_what_is_made_of_weights_alone_is_made_once():
    layer = nn.Linear(4, 6)
    calls, run = written(lambda x: x @ layer.weight.split(3)[0].T.contiguous() + layer.bias[:3], torch.randn(2, 4))
    names = [line.split(" = ")[1] for line, *_ in calls.lines]
    assert len(names) == 2
    layer.bias.data += 1  # a view of it is one still
    x = torch.randn(2, 4)
    torch.testing.assert_close(run(x), (x @ layer.weight[:3].T + layer.bias[:3]).detach())


def test_operations_in_place_lists_and_several_results():
    def f(x, y):
        a, b = x.chunk(2)
        c = torch.cat([a, y, b]).clone()
        c[1:].add_(torch.arange(3.0)).relu_()
        values, _ = c.sort(dim=-1, descending=True)
        return values * torch.full((1,), 2.0) if (x.sum() > 0).item() else values

    x, y = torch.rand(2, 3), torch.randn(2, 3)
    _, run = written(f, x, y)
    other = torch.rand(2, 3)
    assert torch.equal(run(x, y), f(x, y))
    assert torch.equal(run(x, other), f(x, other))
    with pytest.raises(Changed):
        run(-x, y)
    shared = torch.ones(1)
    _, run = written(lambda x: x + shared if bool(shared > 0) else x, x)
    assert torch.equal(run(x), x + 1)
    shared.neg_()
    with pytest.raises(Changed):
        run(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_view_is_one_operation_whatever_the_way_there(mode):
    class Views(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.extend([func.name()] * func.is_view)
            return func(*args, **(kwargs or {}))

    def f(x):
        y = (x[0, 1:].T + 1).unflatten(0, (2, 2)).permute(2, 0, 1)  # of what is given, and of what is made
        a, b = y.transpose(0, 2).contiguous().view(2, 2, -1).transpose(1, 2).chunk(2)
        b.squeeze(0)[1:].mul_(3)  # which is seen through the others
        return torch.cat([a, b, y.transpose(0, 2).transpose(1, 2).to(x.dtype)]).reshape(-1)[2:]

    names: list[str] = []
    with mode():
        x, larger = torch.randn(1, 4, 4), torch.randn(3, 4, 4)
        _, run = written(f, x)
        assert torch.equal(run(x), f(x))
        assert torch.equal(run(larger[1:2]), f(larger[1:2]))  # at another place of its memory
        _, from_there = written(f, larger[1:2])
        assert torch.equal(from_there(x), f(x))
        with Views():
            run(x)
    # y turned, to be copied; a and b; what is multiplied; y turned, to be joined; what is returned
    assert names.count("aten::as_strided") == 6
    of_the_given = {"aten::select.int", "aten::slice.Tensor", "aten::numpy_T", "aten::permute"}
    assert set(names) <= {"aten::as_strided", "aten::contiguous", *of_the_given}  # one that copies here is none


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x + 1).view(torch.int32) + 1,
        lambda x: torch.view_as_complex((x + 1).view(4, 2, 2)) * 2,
        lambda x: torch.fft.fft(x).conj() * 1,
        lambda x: torch.fft.ifft(torch.fft.fft(x) * 2).real,
    ],
)
def test_a_view_that_takes_the_numbers_for_others(f):
    x = torch.randn(4, 4)
    _, run = written(f, x)
    other = torch.randn(4, 4)
    assert torch.equal(run(other), f(other))


@pytest.mark.skipif(not onednn.has_operators(torch.bfloat16), reason="no oneDNN, or none in bfloat16")
def test_what_is_no_weight_is_not_ordered():
    weight = torch.randn(16, 16).bfloat16()

    def written_into(x, y):
        into = layer.weight.new_zeros(16, 16)
        return x @ into.copy_(y)

    layer = nn.Linear(16, 16).bfloat16()
    for f in (lambda x, y: x @ y, written_into):
        _, run = written(f, torch.randn(4, 16).bfloat16(), weight)
        x, y = torch.randn(4, 16).bfloat16(), torch.randn(16, 16).bfloat16()
        assert torch.equal(run(x, y), f(x, y))


@torch.no_grad()
def test_weights_that_are_buffers(unet):
    for layer in [m for m in unet.modules() if isinstance(m, nn.Conv2d)]:
        layer.register_buffer("weight", layer._parameters.pop("weight").data)  # type: ignore[union-attr]
    same(Recorded(unet), *inputs(unet))


@torch.no_grad()
def test_a_forward_that_is_set_may_ask_for_what_changes(unet):
    layer, scale = unet.mid_block.resnets[0].conv2, [1.0]
    forward = layer.forward
    layer.forward = lambda *given: forward(*given) * scale[0]
    net, given = Recorded(unet), inputs(unet)
    same(net, *given)
    scale[0] = 3.0
    same(net, *given)


# -- in a pipeline --


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_gives_the_same_pictures(tiny_parts, dtype, monkeypatch):
    pipe = ready(tiny_parts(), CPU, dtype)
    assert isinstance(pipe.decoder, RecordedDecoder)
    plain, calls, decode = replace(pipe, decoder=None), [], VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda vae, z: (calls.append(len(z)), decode(vae, z))[1])
    for seed in range(3):
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(pipe.decode(z), plain.decode(z))
    assert len(calls) == 4
    pipe.vae.decoder.conv_out.bias.data += 1
    assert torch.equal(pipe.decode(z), plain.decode(z))
    pipe.vae.decoder.conv_out.bias.add_(1)
    assert torch.equal(pipe.decode(z), plain.decode(z))
    large = torch.randn(1, 4, 33, 32)
    assert torch.equal(pipe.decode(large), plain.decode(large))
    assert len(pipe.decoder.book.known) == 1
    z.requires_grad_()
    pipe.decoder(z.to(dtype)).sum().backward()
    assert z.grad is not None
    twin = copy.deepcopy(pipe)
    assert twin.decoder.vae is twin.vae
    assert twin.network.unet is twin.unet
    assert torch.equal(twin.decode(z), pipe.decode(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pipeline_draws_the_same(tiny_parts, dtype, forwards):
    pipe = ready(tiny_parts(), CPU, dtype)
    assert isinstance(pipe.network, Recorded)
    plain = replace(pipe, network=None)

    def last(pipe, **options):
        *_, step = pipe.stream("a cat", **{"steps": 4, "seed": 3, "guidance": 5.0} | options)
        return step.x

    cases = [{}, {"n": 2, "guidance": 1.0}, {"n": 3, "batch": 2}, {"sampler": "heun"}, {"negative": "a dog"}, {"size": (48, 32)}]
    cases += [{}, {"image": Image.new("RGB", (32, 32), "red"), "strength": 0.5}, {"guidance": "cfg(5) + pag(2)"}]
    for options in cases:
        forwards.clear()
        found = last(pipe, **options)
        count = len(forwards)
        assert torch.equal(found, last(plain, **options)), options
        if options == {}:
            assert count <= 1


def test_only_small_networks_on_a_cpu_are_written_down(tiny_parts, monkeypatch):
    assert isinstance(ready(tiny_parts(), CPU, torch.float32, weights="int8").network, Recorded)
    assert not isinstance(ready(tiny_parts(), CPU, torch.float32, cache=2).network, Recorded)
    assert not isinstance(ready(tiny_parts(), CPU, torch.float32, compile=True).network, Recorded)
    assert not isinstance(loading.network(tiny_parts().unet.to("meta"), False), Recorded)
    assert ready(tiny_parts(), CPU, torch.float32, compile=True).decoder is None
    monkeypatch.setattr(recorded, "SMALL", 1000)
    assert ready(tiny_parts(), CPU, torch.float32).decoder is None
    assert ready(tiny_parts(), CPU, torch.float32).network is None
