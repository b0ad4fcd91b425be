"""The CPU kernels of the GRU and of its cell past every block of their products: values, and the
same bits for any threads, in each ISA."""

from functools import partial

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import native
from mbm_kernels.ops.gru import reference
from mbm_kernels.testing import assert_matches
from mbm_kernels.testing.suite import map_floating, with_leaves

pytestmark = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")

# T, B, C, H
SIZES = {
    # One row: products of up to four panels at once, cut differently by 1, 2 and 3 threads; C and H
    # end inside a panel, and K passes 256, so that partial sums go through memory.
    "few rows": (3, 1, 600, 520),
    # Rows past one register tile of 14, split over threads with no barrier.
    "rows apart": (4, 29, 40, 70),
    # Columns of dW over more than one slice of 256 (t, b) pairs.
    "long sums": (40, 13, 33, 50),
}

VARIANTS = {
    "whole": {},
    "lengths": {"lengths": True},
    "reverse without biases": {"reverse": True, "bias": False},
    "reverse with lengths": {"reverse": True, "lengths": True, "h0": False},
}

# B, C, H: each past the multiply-adds at which a second thread starts.
CELL_SIZES = {
    "one row": (1, 600, 520),
    # Three threads get unequal numbers of blocks of 16 units, the last block cut by the end of H.
    "rows past a tile": (29, 40, 70),
    "sums past a slice": (13, 333, 137),
}


def draw(b, c, h, *, bias):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    weights = {"w_ih": randn(3 * h, c) * c**-0.5, "w_hh": randn(3 * h, h) * h**-0.5}
    if bias:
        weights |= {"b_ih": randn(3 * h) * 0.1, "b_hh": randn(3 * h) * 0.1}
    return randn, randn(b, h), weights


def sequence(name, variant):
    t, b, c, h = SIZES[name]
    given = VARIANTS[variant]
    randn, h0, weights = draw(b, c, h, bias=given.get("bias", True))
    inputs = {"x": randn(t, b, c), "h0": h0 if given.get("h0", True) else None, **weights}
    if given.get("lengths", False):
        inputs["lengths"] = torch.randint(0, t + 1, (b,))
        inputs["lengths"][-1] = t - 1  # one row alone ends early too
    return inputs | {"reverse": given.get("reverse", False)}


def evaluate(function, inputs, *, positive=False):
    """Outputs by their place, and the gradients of the floating inputs by name."""
    diff = tuple(n for n, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point())
    inputs, leaves = with_leaves(inputs, diff)
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
    grads = [g.abs() for g in grads] if positive else grads
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    values = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return values | dict(zip(leaves, found, strict=True))


def check(function, definition, inputs):
    """The same bits for any threads and in a second run, within the error rule of float64."""
    threads_before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(evaluate(partial(function, backend="cpu"), inputs))
    finally:
        torch.set_num_threads(threads_before)
    actual = results[0]
    for other in results[1:]:
        assert other.keys() == actual.keys()
        for name, value in actual.items():
            assert torch.equal(other[name], value), name
    truth = evaluate(definition, map_floating(inputs, torch.Tensor.double))
    yardstick = evaluate(partial(function, backend="torch"), inputs)
    positive = map_floating(inputs, lambda x: x.double().abs())
    absolute = evaluate(definition, positive, positive=True)
    assert truth.keys() == actual.keys()
    for name in truth:
        row = (found[name] for found in (actual, truth, yardstick, absolute))
        assert_matches(*row, gradient=name in inputs, what=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SIZES)
def test_values_and_bits_for_any_threads(isa, name, variant):
    check(mbm_kernels.gru, reference.gru, sequence(name, variant))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CELL_SIZES)
def test_cell_values_and_bits_for_any_threads(isa, name, bias):
    b, c, h = CELL_SIZES[name]
    randn, state, weights = draw(b, c, h, bias=bias)
    inputs = {"x": randn(b, c), "h": state, **weights}
    check(mbm_kernels.gru_cell, reference.gru_cell, inputs)


def test_a_row_does_not_depend_on_its_batch(isa):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 29, 300, generator=generator)
    weights = torch.randn(150, 300, generator=generator), torch.randn(150, 50, generator=generator)
    whole, last = mbm_kernels.gru(x, None, *weights, backend="cpu")
    for b in (0, 7, 28):
        y, h_n = mbm_kernels.gru(x[:, b : b + 1], None, *weights, backend="cpu")
        assert torch.equal(y[:, 0], whole[:, b])
        assert torch.equal(h_n[0], last[b])
