"""The GRU's CPU kernels at sizes past every block of the GEMM, in each ISA, for any threads."""

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import native

pytestmark = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")

SIZES = {
    # One row: products of up to four panels at once, cut differently by 1, 2 and 3 threads; C and H
    # end inside a panel, and K passes 256, so that partial sums go through memory.
    "few rows": (3, 1, 600, 520),
    # Rows past one register tile of 14, split over threads with no barrier.
    "rows apart": (4, 29, 40, 70),
    # Columns of dW over more than one slice of 256 (t, b) pairs.
    "long sums": (40, 13, 33, 50),
}


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    before = native.cpu().isa()
    try:
        native.cpu().set_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    native.cpu().set_isa(before)


def run(inputs, weights, lengths, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outputs = mbm_kernels.gru(*inputs, *weights, lengths=lengths, backend="cpu")
        grads = [torch.linspace(-1, 1, o.numel()).view_as(o) for o in outputs]
        return *outputs, *torch.autograd.grad(outputs, [*inputs, *weights], grads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("name", SIZES)
def test_same_bits_for_any_thread_count(isa, name, with_lengths):
    t, b, c, h = SIZES[name]
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    inputs = leaf(t, b, c), leaf(b, h)
    weights = (
        leaf(3 * h, c, scale=c**-0.5),
        leaf(3 * h, h, scale=h**-0.5),
        leaf(3 * h, scale=0.1),
        leaf(3 * h, scale=0.1),
    )
    lengths = torch.randint(0, t + 1, (b,), generator=generator) if with_lengths else None
    one = run(inputs, weights, lengths, 1)
    for threads in (2, 3):
        for expected, actual in zip(one, run(inputs, weights, lengths, threads), strict=True):
            assert torch.equal(expected, actual)


def test_a_row_does_not_depend_on_its_batch(isa):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 29, 300, generator=generator)
    weights = torch.randn(150, 300, generator=generator), torch.randn(150, 50, generator=generator)
    whole, last = mbm_kernels.gru(x, None, *weights, backend="cpu")
    for b in (0, 7, 28):
        y, h_n = mbm_kernels.gru(x[:, b : b + 1], None, *weights, backend="cpu")
        assert torch.equal(y[:, 0], whole[:, b])
        assert torch.equal(h_n[0], last[b])
