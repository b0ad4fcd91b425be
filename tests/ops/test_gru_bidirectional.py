"""gru_bidirectional, which nn.GRU calls: the common suite, and threads of the two directions."""

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import dispatch, native
from mbm_kernels.ops.gru.bidirectional import gru_bidirectional, reference
from mbm_kernels.testing import Case, Hiding
from mbm_kernels.testing.suite import map_floating
from tests.conftest import raises

from .test_gru import (
    HIDING,
    WEIGHTS,
    sizes,
    state_of_rows_without_steps,
    unread_past_lengths,
)
from .test_gru_native import check

pytestmark = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")

REVERSE = tuple(f"{name}_reverse" for name in WEIGHTS)


def make(sizes, options, generator):
    t, b, c, h = (sizes[letter] for letter in "TBCH")

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"x": randn(t, b, c), "h0": randn(2, b, h) if options.get("h0", True) else None}
    bound = max(h, 1) ** -0.5
    for names in (WEIGHTS, REVERSE):
        for name, shape in zip(names, ((3 * h, c), (3 * h, h), (3 * h,), (3 * h,)), strict=True):
            given = len(shape) == 2 or options.get("bias", True)
            inputs[name] = randn(*shape) * bound if given else None
    if "lengths" in options:
        inputs["lengths"] = torch.tensor(options["lengths"], dtype=torch.int64)
    return inputs


class TestGruBidirectional(Hiding):
    op = "gru_bidirectional"
    function = staticmethod(gru_bidirectional)
    reference = staticmethod(reference.gru_bidirectional)
    diff = ("x", "h0", *WEIGHTS, *REVERSE)
    cases = [
        Case("primes below one vector", sizes(5, 3, 3, 7), {"lengths": [3, 0, 5]}),
        Case("one row", sizes(4, 1, 19, 24)),
        Case("rows and units past a tile", sizes(3, 13, 33, 37)),
        Case("no initial state", sizes(4, 5, 6, 17), {"h0": False}),
        Case("no biases", sizes(4, 3, 8, 16), {"bias": False}),
    ]
    edge_cases = [
        Case("all ones", sizes(1, 1, 1, 1)),
        Case("no steps", sizes(0, 2, 3, 4)),
        Case("no batch", sizes(3, 0, 4, 5)),
        Case("no inputs", sizes(3, 2, 0, 5)),
        Case("no units", sizes(3, 2, 4, 0)),
        Case("only rows of length 0", sizes(3, 2, 4, 5), {"lengths": [0, 0]}),
    ]

    hiding_cases = [c for c in HIDING if not c.options.get("reverse")]

    def unread(self, inputs):
        return unread_past_lengths(inputs)

    def partly_read(self, inputs):
        return state_of_rows_without_steps(inputs)

    def make(self, case, generator):
        return make(case.sizes, case.options, generator)

    def test_backend_errors(self):
        """They are those of gru, whose backends answer: triton too, one direction after another."""
        inputs = single(self.cases[0].sizes)
        with pytest.raises(ValueError, match=r"backend: got 'fast'; expected one of auto, cpu"):
            self.run(inputs, "fast")
        expected = self.run(inputs, "torch")
        for name, reason in mbm_kernels.backends("gru").items():
            if reason is None:
                torch.testing.assert_close(self.run(inputs, name), expected)
                continue
            with pytest.raises(mbm_kernels.BackendUnavailableError, match="cannot run"):
                self.run(inputs, name)


def single(sizes, **options):
    inputs = make(sizes, options, torch.Generator().manual_seed(0))
    return map_floating(inputs, torch.Tensor.float)


# 13 rows and 70 units: with 2 threads each direction has its own, with 3 both have all.
@pytest.mark.parametrize("given", [{}, {"lengths": [9, 0, 3] * 4 + [7]}], ids=["whole", "lengths"])
def test_bits_for_any_threads(isa, given):
    check(gru_bidirectional, reference.gru_bidirectional, single(sizes(9, 13, 40, 70), **given))


def test_directions_equal_two_calls_to_the_bit():
    """At one thread, and at four, two to a direction."""
    inputs = single(sizes(6, 2, 64, 200))
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            y, h_n = gru_bidirectional(**inputs, backend="cpu")
            for direction, names in enumerate((WEIGHTS, REVERSE)):
                expected = mbm_kernels.gru(
                    inputs["x"],
                    inputs["h0"][direction],
                    *(inputs[n] for n in names),
                    reverse=direction == 1,
                    backend="cpu",
                )
                assert torch.equal(y.chunk(2, -1)[direction], expected[0])
                assert torch.equal(h_n[direction], expected[1])
    finally:
        torch.set_num_threads(before)


def test_backend_is_the_one_of_gru(monkeypatch):
    inputs = single(sizes(3, 2, 4, 5))
    calls = []
    kernel = dispatch.load_backend("gru_bidirectional", "cpu")
    run = kernel.fwd
    monkeypatch.setattr(kernel, "fwd", lambda *args: calls.append(1) or run(*args))
    by_kernel = gru_bidirectional(**inputs, backend="cpu")
    assert calls == [1]
    try:
        mbm_kernels.set_backend("torch", "gru")
        torch.testing.assert_close(gru_bidirectional(**inputs), by_kernel)
    finally:
        mbm_kernels.set_backend("auto")
    with mbm_kernels.disabled():
        torch.testing.assert_close(gru_bidirectional(**inputs), by_kernel)
    assert calls == [1]


def test_bad_shapes():
    inputs = single(sizes(3, 2, 4, 5))
    with raises(ValueError, "gru_bidirectional: h0: got shape .1, 2, 5.; expected .2, B, H. ="):
        gru_bidirectional(**{**inputs, "h0": inputs["h0"][:1]})
    with raises(ValueError, "gru_bidirectional: w_hh: got shape .15, 4."):
        gru_bidirectional(**{**inputs, "w_hh_reverse": torch.randn(15, 4)})


def test_directions_may_share_recurrent_weights():
    inputs = single(sizes(5, 3, 6, 20))
    inputs["w_hh_reverse"] = inputs["w_hh"]
    actual = gru_bidirectional(**inputs, backend="cpu")
    expected = gru_bidirectional(**inputs, backend="torch")
    torch.testing.assert_close(actual, expected)
