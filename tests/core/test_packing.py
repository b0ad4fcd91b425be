"""The cache of packed weights: redone when a weight changes, freed with it."""

import gc
import threading

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import native, packing, problem
from tests.conftest import raises

pytestmark = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")


calls = []


def size(weight, bias=None):
    return weight.numel()


def pack(out, weight, bias=None):
    calls.append(weight.shape)
    out.copy_(weight if bias is None else weight + bias)


def packed(weight, *others):
    return packing.packed(size, pack, weight, *others)


@pytest.fixture
def weight():
    calls.clear()
    return torch.ones(6)


def test_packed_once_while_unchanged(weight):
    first = packed(weight)
    assert packed(weight) is first
    assert len(calls) == 1


def test_redone_into_the_same_memory_after_an_in_place_write(weight):
    address = packed(weight).data_ptr()
    with torch.no_grad():
        weight.mul_(3)
    again = packed(weight)
    assert again.tolist() == [3] * 6
    assert again.data_ptr() == address


def test_redone_when_another_tensor_changes_or_comes(weight):
    bias = torch.ones(6)
    assert packed(weight).tolist() == [1] * 6
    assert packed(weight, bias).tolist() == [2] * 6
    bias.add_(4)
    assert packed(weight, bias).tolist() == [6] * 6


def test_a_sealed_weight_is_not_hashed_and_ends_with_its_id(weight, monkeypatch):
    weight = weight.clone()  # whose only name is this
    packing.seal(weight)
    first = packed(weight)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "state_of", None)
        assert packed(weight) is first
    assert packed(weight, torch.ones(6)).tolist() == [2] * 6  # which others may write
    others = [name for name in native.isas() if name != native.cpu().isa()]
    before = native.cpu().isa()
    try:
        for name in others:
            native.cpu().set_isa(name)
            assert packed(weight).tolist() == [1] * 6
    finally:
        native.cpu().set_isa(before)
    assert len(calls) == 2 + len(others)
    key = id(weight)
    del weight
    assert key not in packing._sealed


def test_what_is_held_is_not_written_again(weight):
    """A kernel of another thread, or of the other direction of a GRU, may be about to read it."""
    first = packed(weight, torch.ones(6))
    assert packed(weight, torch.zeros(6)).tolist() == [1] * 6
    assert first.tolist() == [2] * 6


def test_freed_with_the_weight():
    weight = torch.ones(6)
    key = (id(weight), pack)
    packed(weight)
    assert key in packing._entries
    del weight
    gc.collect()
    assert key not in packing._entries


def test_an_id_used_again_is_another_weight():
    for value in range(50):
        assert packed(torch.full((6,), float(value))).tolist() == [value] * 6


@pytest.fixture(params=[True, False], ids=["guards", "kinds"])
def guarded(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(problem, "_guards_hold", lambda: False)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "rows apart", "expanded"])
def test_a_weight_written_through_data_is_seen(layout, guarded):
    """As averages of weights are: torch counts no version."""
    weight = {
        "contiguous": lambda: torch.rand(40, 9),
        "channels last": lambda: torch.rand(4, 6, 3, 3).contiguous(
            memory_format=torch.channels_last
        ),
        "rows apart": lambda: torch.rand(8, 9)[:, :5],
        "expanded": lambda: torch.rand(1, 1).expand(40, 30),
    }[layout]()

    def flat(out, weight):
        out.copy_(weight.flatten())

    def packed():
        return packing.packed(size, flat, weight)

    first = packed()
    assert packed() is first
    changed = weight.data if layout != "expanded" else weight.data[:1, :1]
    for write in (lambda x: x.mul_(0.999), lambda x: x.numpy().fill(7)):
        version = weight._version
        write(changed)
        assert weight._version == version
        assert torch.equal(packed(), weight.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 255, 256, 257, 65536 + 3, 3 * 65536 + 1])
def test_one_number_written_by_any_way_is_seen(size, dtype):
    """The block of a KiB and the piece of 256 KiB that a hash works by have edges."""
    weight = torch.rand(size).to(dtype)
    first = packing.version_of(weight)
    edges = {0, size // 2, size - 1, *range(0, size, 1021), 255, 256, 65535, 65536}
    for place in sorted(edges & set(range(size))):
        kept = weight[place].clone()
        weight.data[place] = -kept - 1
        assert packing.version_of(weight) != first
        weight.data[place] = kept
        assert packing.version_of(weight) == first


def test_numbers_exchanged_or_negated_are_seen():
    weight = torch.rand(64, 96)
    seen = {packing.version_of(weight)}
    for written in (weight.flip(0), weight.flip(1), weight.roll(1, 0), weight.roll(32, 1)):
        seen.add(packing.version_of(written.contiguous()))
    for row in range(64):
        for column in range(0, 96, 32):
            negated = weight.clone()
            negated[row, column] *= -1
            negated[(row + 1) % 64, column] *= -1
            seen.add(packing.version_of(negated))
    assert len(seen) == 1 + 4 + 64 * 3


def test_the_hash_is_the_same_in_each_build_and_for_any_threads():
    weight, seen = torch.rand(3 * 65536 + 17), set()
    before = native.cpu().isa()
    for name in native.isas():
        native.cpu().set_isa(name)
        for threads in (1, 2, 3):
            seen.add(native.cpu().fingerprint(weight.data_ptr(), weight.nbytes, threads))
    native.cpu().set_isa(before)
    assert len(seen) == 1
    assert native.cpu().fingerprint(0, 0, 1) == native.cpu().fingerprint(0, 0, 2)


def test_the_same_bytes_in_another_layout_are_another_weight():
    def flat(out, weight):
        out.copy_(weight.flatten())

    weight = torch.nn.Parameter(torch.rand(8, 8))
    packing.packed(size, flat, weight)
    weight.data = weight.data.t()
    assert torch.equal(packing.packed(size, flat, weight), weight.detach().flatten())
    weight.data = weight.data.contiguous().view(torch.int32).view(torch.float32)
    assert torch.equal(packing.packed(size, flat, weight), weight.detach().flatten())


@pytest.mark.parametrize("left", [0, 4])
def test_a_freed_storage_is_an_error(weight, left):
    packed(weight)
    weight.untyped_storage().resize_(left)
    with raises(ValueError, f"storage holds {left} bytes; expected 24"):
        packed(weight)


def test_inference_tensors_are_packed_once():
    with torch.inference_mode():
        weight = torch.ones(6)
        calls.clear()
        assert packed(weight) is packed(weight)
        assert len(calls) == 1
        weight[3] = 2
        assert packed(weight).tolist() == [1, 1, 1, 2, 1, 1]


def test_within_unchanged_a_weight_is_hashed_once(weight, monkeypatch):
    hashed = []
    alone, together = native.fingerprint, packing._hashes
    monkeypatch.setattr(native, "fingerprint", lambda x: hashed.append(x) or alone(x))
    monkeypatch.setattr(packing, "_hashes", lambda *given: hashed.append(0) or together(*given))
    with packing.unchanged():
        first = packed(weight)
        with packing.unchanged():
            assert packed(weight) is first
        assert packed(weight) is first
        assert len(hashed) == 1
        other = threading.Thread(target=packed, args=(weight,))
        other.start()
        other.join()
        assert len(hashed) == 2
    weight.data[2] = 5
    assert packed(weight)[2] == 5


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_training_by_fused_optimizers_is_stock_training(kind):
    """They raise no version counter, and here change one output and a few inputs alone."""

    def train(layer):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(48, 64) * 0.05)
        weight.register_hook(lambda grad: grad * (torch.arange(48) == 20)[:, None])
        optimizer = getattr(torch.optim, kind)([weight], lr=0.05, fused=True)
        x, target = torch.zeros(16, 64), torch.randn(16, 48)
        x[:, 10:14] = torch.randn(16, 4)
        for _ in range(10):
            loss = (layer(x, weight) - target)[:, 20].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    ours = train(lambda x, w: mbm_kernels.concat_linear([x], w, backend="cpu"))
    assert ours == pytest.approx(train(torch.nn.functional.linear), rel=1e-5)


def test_packed_in_inference_mode_and_again_outside(weight):
    with torch.inference_mode():
        packed(weight)
    weight.fill_(2)
    assert packed(weight).tolist() == [2] * 6


def test_default_dtype_and_device_do_not_matter(weight):
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            made = packed(weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert made.dtype == torch.float32
    assert made.device.type == "cpu"


def test_a_failed_pack_is_not_kept(weight):
    def broken(out, weight):
        if fail:
            raise RuntimeError("no")
        out.copy_(weight)

    fail = True
    with pytest.raises(RuntimeError):
        packing.packed(size, broken, weight)
    fail = False
    assert packing.packed(size, broken, weight).tolist() == [1] * 6


def test_views_of_a_parameter_are_packed_once_each():
    """As the thirds of an attention's weight, and a convolution's of one dimension."""
    weight = torch.nn.Parameter(torch.arange(12.0).view(6, 2))
    calls.clear()

    def flat(out, weight):
        calls.append(weight)
        out.copy_(weight.flatten())

    for _ in range(3):
        for view in weight.chunk(3):
            assert torch.equal(packing.packed(size, flat, view), view.detach().flatten())
    assert len(calls) == 3
    with torch.no_grad():
        weight[2] += 1
    assert torch.equal(packing.packed(size, flat, weight.chunk(3)[1]), weight[2:4].flatten())
    packing.forget(weight.chunk(3)[0])
    assert not [key for key in packing._entries if key[0] == id(weight)]


def test_modules_loaded_in_inference_mode_are_packed_once(monkeypatch):
    with torch.inference_mode():
        conv = mbm_kernels.nn.Conv2d(4, 4, 3, backend="cpu")
        gru = mbm_kernels.nn.GRU(4, 4, backend="cpu")
        for module, x in ((conv, torch.randn(1, 4, 5, 5)), (gru, torch.randn(2, 1, 4))):
            module(x)
            with monkeypatch.context() as patched:
                patched.setattr(packing, "_fill", None)  # what packs
                first, again = module(x), module(x)
            for a, b in zip(first, again, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("strided", [False, True])
def test_ranges_of_indices(strided):
    def of(values):
        index = torch.tensor(values, dtype=torch.int64)
        return index.repeat_interleave(2)[::2] if strided else index

    assert native.index_range(of([3, -100, 7]), -100) == (3, 7, 1)
    assert native.index_range(of([3, -1, 7])) == (-1, 7, 0)
    assert native.index_range(of([-100, -100]), -100) == (0, -1, 2)
    assert native.index_range(of([])) == (0, -1, 0)
    assert native.index_range(of([-(2**63), 5]))[:2] == (-(2**63), 5)
