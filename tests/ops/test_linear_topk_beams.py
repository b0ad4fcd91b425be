"""The selection of beams: the kernel against plain torch, equal to the bit, ties included."""

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import dispatch
from mbm_kernels.models import Captioner
from mbm_kernels.ops.linear_topk import beams
from mbm_kernels.testing.suite import device_of

DEVICE = device_of("triton")
INF, NAN = float("inf"), float("nan")
EOS, CLASSES = 2, 50
SHAPES = [(1, 1, 1, 1), (3, 5, 5, 37), (2, 8, 8, 513), (4, 5, 3, 600), (2, 3, 1, 16), (0, 2, 2, 4)]
pytestmark = pytest.mark.skipif(
    dispatch.why_not("linear_topk", "triton", DEVICE, torch.float32) is not None,
    reason="triton is not installed",
)


def make(shape, dtype=torch.float32, levels=None):
    """`levels`: how many log-probabilities there are, so that many are equal."""
    pictures, beam, k, features = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def randint(high, *sizes, low=0):
        return torch.randint(low, high, sizes, generator=generator)

    values = -4 * torch.rand(pictures, beam, k, generator=generator)
    score = -9 * torch.rand(pictures, beam, generator=generator)
    if levels:
        values, score = -randint(levels, *values.shape) / 2, -randint(levels, *score.shape) / 2
    values = values.sort(-1, descending=True).values
    state = torch.randn(pictures, beam, features, generator=generator)
    given = (
        (randint(3, pictures, beam) == 0, randint(9, pictures, beam, low=1), score.float()),
        values.to(dtype),
        randint(CLASSES, pictures, beam, k),
        state.to(dtype),
    )
    return tuple(
        tuple(y.to(DEVICE) for y in x) if isinstance(x, tuple) else x.to(DEVICE) for x in given
    )


def check(given):
    assert dispatch.default("linear_topk") == "triton"
    actual = beams.select(*given, EOS, CLASSES)
    expected = beams.by_torch(*given, EOS)
    for name, a, e in zip(beams.Beams._fields, actual, expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), name
        assert torch.equal(a.nan_to_num(7.0), e.nan_to_num(7.0)), name
    return actual


@pytest.fixture(autouse=True)
def by_the_kernel():
    mbm_kernels.set_backend("triton", op="linear_topk")
    yield
    mbm_kernels.set_backend("auto")


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_selects_as_torch(shape, dtype, levels):
    check(make(shape, dtype, levels))


def test_triton_of_a_tie_the_earlier():
    """A stable sort's rule, which a maximum without an index would not keep."""
    before, values, ids, state = make((1, 4, 4, 8))
    done, length, score = (torch.zeros_like(before[0]), torch.ones_like(before[1]), before[2])
    found = check(((done, length, torch.zeros_like(score)), torch.zeros_like(values), ids, state))
    assert found.parent.tolist() == [[0, 0, 0, 0]]
    assert found.last.tolist() == [ids[0, 0].tolist()]


def test_triton_first_step_and_the_end():
    before, values, ids, state = make((2, 3, 3, 20))
    length, score = torch.zeros_like(before[1]), torch.full_like(before[2], -INF)
    score[:, 0] = 0.0
    found = check(((torch.zeros_like(before[0]), length, score), values, ids, state))
    assert not found.parent.any()
    over = torch.ones_like(before[0])
    found = check(((over, before[1], before[2]), values, ids, state))
    assert found.done.all()
    assert (found.last == EOS).all()
    assert torch.equal(found.score.sort().values, before[2].sort().values)


def test_triton_special_values():
    before, values, ids, state = make((6, 4, 4, 9))
    values[1, 2, 0], values[2, :, 1] = NAN, NAN
    values[3] = -INF
    values[4, 0, 0], values[4, 1, 0] = -0.0, 0.0
    values[5, 3, 3] = INF
    before[0][1:] = False
    check((before, values, ids, state))


def test_a_stock_model_takes_no_triton_kernel():
    """It is what is compared with, and the truth in float64, which the kernel does not take."""
    model = Captioner(20, layers="stock", image_size=16).double().eval()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert len(model.generate(images, 3, 2)) == 2


def test_triton_any_strides():
    before, values, ids, state = make((3, 4, 4, 10))
    expanded = state[:, :1].expand(-1, 4, -1)
    turned = values.transpose(1, 2).contiguous().transpose(1, 2)
    check((before, turned, ids, expanded))
