"""When memory runs out: what comes out is the same, or said to be different, and no other error is swallowed."""

from weakref import WeakSet

import pytest
import torch

from latentdiff import memory
from latentdiff.memory import in_tiles, sliced, starts, within_memory
from latentdiff.models import graphs
from latentdiff.models.attention import Site, sdpa

SIGMA = torch.tensor(1.0)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """What other tests recorded holds no memory here."""
    monkeypatch.setattr(graphs, "everywhere", WeakSet())


def room_for(most: int, error=torch.OutOfMemoryError("CUDA out of memory")):  # noqa: B008
    """make(rows, sparing) of denoisers that bear so many pictures, and the batches they were asked for."""
    asked = []

    def make(rows, sparing):
        def denoise(x, sigma):
            asked.append((rows.start, len(x), sparing))
            if len(x) > most and not (sparing and most == 0):
                raise error
            assert len(x) == rows.stop - rows.start
            return x * sigma + torch.arange(rows.start, rows.stop).view(-1, 1, 1, 1)

        return denoise

    return make, asked


def test_a_batch_is_halved_until_it_fits_and_stays_so():
    make, asked = room_for(2)
    denoise, x = within_memory(make, slice(3, 10)), torch.randn(7, 1, 2, 2)
    with pytest.warns(UserWarning, match="memory ran out: going on with 4 pictures at a time in the place of 7"):
        first = denoise(x, SIGMA)
    assert torch.equal(first, x + torch.arange(3, 10).view(-1, 1, 1, 1))
    asked.clear()
    assert torch.equal(denoise(x, SIGMA), first)
    assert asked == [(3, 2, False), (5, 2, False), (7, 2, False), (9, 1, False)]


def test_one_picture_is_tried_again_with_sliced_attention_and_then_given_up():
    make, asked = room_for(0)
    with pytest.warns(UserWarning, match="attention goes on in slices"):
        within_memory(make, slice(0, 1))(torch.ones(1, 1, 2, 2), SIGMA)
    assert [sparing for *_, sparing in asked] == [False, True]
    make, _ = room_for(-1)
    with pytest.warns(UserWarning, match="slices"), pytest.raises(MemoryError, match="one picture of 2 × 2 latents"):
        within_memory(make, slice(0, 1))(torch.ones(1, 1, 2, 2), SIGMA)


def test_the_cpus_allocator_is_understood_and_other_errors_pass():
    error = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    make, _ = room_for(1, error)
    with pytest.warns(UserWarning, match="going on with 1"):
        within_memory(make, slice(0, 2))(torch.ones(2, 1, 2, 2), SIGMA)
    make, asked = room_for(1, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        within_memory(make, slice(0, 2))(torch.ones(2, 1, 2, 2), SIGMA)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "text",
    ["CUDA error: out of memory", "Triton Error [CUDA]: out of memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_drivers_and_libraries_are_understood(text):
    make, _ = room_for(1, RuntimeError(text))
    with pytest.warns(UserWarning, match="going on with 1"):
        within_memory(make, slice(0, 2))(torch.ones(2, 1, 2, 2), SIGMA)


@pytest.fixture
def recordings():
    """Of a network, in which something is recorded: they hold memory."""
    made = graphs.Recordings("network", torch.nn.Identity(), lambda run: ((lambda: None), run()))
    made.run(lambda x: x + 1, [torch.zeros(1)])
    return made


def test_recordings_are_given_up_before_pictures_are_made_one_by_one(recordings):
    made = []

    def make(rows, sparing):
        made.append(calls := [])

        def denoise(x, sigma):
            calls.append(len(x))
            if any(recordings.known.values()):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return x * sigma

        return denoise

    denoise, x = within_memory(make, slice(0, 2)), torch.randn(2, 1, 2, 2)
    with pytest.warns(UserWarning, match="memory ran out: recorded kernels are given up") as told:
        assert torch.equal(denoise(x, SIGMA), x)
    assert len(told) == 1
    assert torch.equal(denoise(x, SIGMA), x)
    assert made == [[2], [2, 2]]  # another denoiser, which kept nothing of the call that failed


def test_where_that_is_not_enough_it_goes_on_in_parts(recordings):
    make, asked = room_for(1)
    with pytest.warns(UserWarning, match="memory ran out") as told:
        within_memory(make, slice(0, 2))(torch.ones(2, 1, 2, 2), SIGMA)
    assert [str(warning.message).split()[3] for warning in told] == ["recorded", "going"]
    assert [n for _, n, _ in asked] == [2, 2, 1, 1]
    assert not recordings.known


def test_recordings_are_given_up_before_a_picture_is_decoded_in_tiles(recordings):
    def run(z):
        if any(recordings.known.values()):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * z

    z = torch.randn(1, 4, 80, 80)
    with pytest.warns(UserWarning, match="recorded kernels are given up") as told:
        assert torch.equal(memory.whole_or_tiled(run, z), 2 * z)
    assert len(told) == 1


def test_sliced_attention_is_attention(monkeypatch):
    monkeypatch.setattr(memory, "SLICE", 7)
    q, k, v = torch.randn(2, 3, 33, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    site = Site("anywhere", cross=True)
    torch.testing.assert_close(sliced(q, k, v, site), sdpa(q, k, v, site), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("side", "tile"), [(64, 64), (65, 64), (100, 64), (16, 64), (200, 32), (33, 17)])
def test_tiles_cover_the_side_and_overlap(side, tile):
    found = starts(side, tile)
    assert found[0] == 0
    assert found[-1] + tile == max(side, tile)
    assert all(b - a <= tile - memory.OVERLAP for a, b in zip(found, found[1:], strict=False))


def test_tiles_join_without_a_seam():
    """A decoder that looks nowhere else is the same in tiles; the weights of the blend sum to one everywhere."""
    z = torch.randn(2, 4, 50, 90, dtype=torch.float64)
    enlarge = lambda z: torch.nn.functional.interpolate(z[:, :3].tanh(), scale_factor=8, mode="nearest")  # noqa: E731
    torch.testing.assert_close(in_tiles(enlarge, z, 32), enlarge(z), rtol=1e-12, atol=1e-12)


def test_a_picture_is_decoded_in_tiles_that_fit():
    sides = []

    def run(z):
        sides.append(z.shape[-1])
        if z.shape[-1] > 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return z[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2)

    z = torch.randn(1, 4, 80, 80)
    with pytest.warns(UserWarning, match="decoding in tiles of 20 × 20 latents"):
        decoded = memory.whole_or_tiled(run, z)
    torch.testing.assert_close(decoded, z[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2), rtol=1e-5, atol=1e-5)
    assert sides[:3] == [80, 40, 20]
    with pytest.warns(UserWarning, match="tiles"), pytest.raises(MemoryError, match="too little memory to decode 80 × 80"):
        memory.whole_or_tiled(lambda z: run(torch.cat([z] * 9, -1)), z)


def test_a_picture_is_encoded_in_tiles_that_fit():
    """An encoder that looks nowhere else is the same in tiles, whose edges lie between latents."""
    shapes = []
    pool = lambda x: torch.nn.functional.avg_pool2d(x, 8)  # noqa: E731

    def run(x):
        shapes.append(tuple(x.shape[-2:]))
        if x.shape[-1] > 8 * 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pool(x)

    x = torch.randn(1, 3, 8 * 30, 8 * 70, dtype=torch.float64)
    with pytest.warns(UserWarning, match="encoding in tiles of 17 × 17 latents"):
        encoded = memory.whole_or_tiled(run, x, pixels=8)
    torch.testing.assert_close(encoded, pool(x), rtol=1e-12, atol=1e-12)
    assert shapes[:3] == [(240, 560), (240, 280), (136, 136)]
    with pytest.warns(UserWarning, match="tiles"), pytest.raises(MemoryError, match="too little memory to encode 70 × 30"):
        memory.whole_or_tiled(lambda x: run(torch.cat([x] * 9, -1)), x, pixels=8)
