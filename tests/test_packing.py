"""The cache of packed weights: redone when a weight changes, freed with it."""

import gc

import pytest
import torch

from mbm_kernels._core import native, packing

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
    assert packed(weight, None).tolist() == [1] * 6
    assert packed(weight, bias).tolist() == [2] * 6
    bias.add_(4)
    assert packed(weight, bias).tolist() == [6] * 6


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


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "rows apart", "expanded"])
def test_a_weight_written_through_data_is_seen(layout):
    """As averages of weights are: no version is counted."""
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


def test_a_few_numbers_written_through_data_need_forget():
    weight = torch.zeros(1000)
    packed(weight)
    weight.data[7] = 1  # between two samples
    packing.forget(weight)
    assert packed(weight)[7] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [*range(1, 10), 63, 64, 65, 1000])
def test_samples_reach_first_and_last(size, dtype):
    x = torch.ones(size, dtype=dtype)

    def sample():
        return native.cpu().sample(x.data_ptr(), x.nbytes)

    seen = {sample()}
    for place in (0, -1):
        x[place] = 2.0
        seen.add(sample())
        x[place] = 1.0
    assert len(seen) == (2 if size == 1 else 3)
    assert native.cpu().sample(0, 0) == native.cpu().sample(0, 0)


def test_inference_tensors_are_packed_each_time():
    with torch.inference_mode():
        weight = torch.ones(6)
        packed(weight)
        weight.fill_(2)
        assert packed(weight).tolist() == [2] * 6


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
