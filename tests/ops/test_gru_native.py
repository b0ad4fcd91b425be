"""The CPU kernels of the GRU and of its cell past every block of their products: values, and the
same bits for any threads, in each ISA."""

import re
from functools import partial

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import native, packing
from mbm_kernels.ops.gru import reference
from mbm_kernels.ops.gru.bidirectional import gru_bidirectional
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

# What runs step by step from the weights as they are, where nothing is saved.
STEPS = {
    "one step": (1, 29, 40, 70),
    "one step of one row": (1, 1, 33, 300),
    "few": (3, 2, 90, 200),
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
    t, b, c, h = {**SIZES, **STEPS}[name]
    given = VARIANTS[variant]
    randn, h0, weights = draw(b, c, h, bias=given.get("bias", True))
    inputs = {"x": randn(t, b, c), "h0": h0 if given.get("h0", True) else None, **weights}
    if given.get("lengths", False):
        inputs["lengths"] = torch.randint(0, t + 1, (b,))
        inputs["lengths"][-1] = t - 1  # one row alone ends early too
    return inputs | {"reverse": given.get("reverse", False)}


def evaluate(function, inputs, *, positive=False, gradients=True):
    """Outputs by their place, and the gradients of the floating inputs by name."""
    diff = (
        ()
        if not gradients
        else tuple(n for n, v in inputs.items() if torch.is_tensor(v) and v.is_floating_point())
    )
    inputs, leaves = with_leaves(inputs, diff)
    outputs = function(**inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    values = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if not gradients:
        return values
    grads = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
    grads = [g.abs() for g in grads] if positive else grads
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return values | dict(zip(leaves, found, strict=True))


def check(function, definition, inputs, evaluate=evaluate):
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
@pytest.mark.parametrize("name", ["one step", "one step of one row"])
def test_gradients_of_one_step(isa, name, bias, monkeypatch):
    monkeypatch.setattr(packing, "packed", None)
    _, b, c, h = STEPS[name]
    randn, h0, weights = draw(b, c, h, bias=bias)
    x = randn(2, b, c)[::2]
    check(mbm_kernels.gru, reference.gru, {"x": x, "h0": h0, **weights})
    check(mbm_kernels.gru, reference.gru, {"x": x, "h0": None, **weights, "reverse": True})
    both = both_directions({"x": x, "h0": h0, **weights})
    biases = dict.fromkeys(("b_ih", "b_hh", "b_ih_reverse", "b_hh_reverse"))

    def apart(x, h0, **weights):
        """The same, by one call for each direction."""
        backwards = {n.removesuffix("_reverse"): w for n, w in weights.items() if "_rev" in n}
        forwards = {n: w for n, w in weights.items() if "_rev" not in n}
        y, h_n = mbm_kernels.gru(x, h0[0], **forwards, backend="cpu")
        after, last = mbm_kernels.gru(x, h0[1], **backwards, reverse=True, backend="cpu")
        return torch.cat([y, after], -1), torch.stack([h_n, last])

    expected = evaluate(apart, both)
    found = evaluate(partial(gru_bidirectional, backend="cpu"), {**biases, **both})
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", STEPS)
def test_few_steps_pack_nothing(isa, name, variant, monkeypatch):
    monkeypatch.setattr(packing, "packed", None)
    inputs = sequence(name, variant)
    check(mbm_kernels.gru, reference.gru, inputs, partial(evaluate, gradients=False))
    if inputs.pop("reverse"):
        return
    both = {n: w for n, w in inputs.items() if n in ("x", "lengths")}
    h0 = inputs["h0"]
    both["h0"] = None if h0 is None else torch.stack([h0, h0 + 1])
    names = ("w_ih", "w_hh", "b_ih", "b_hh")
    given = [both.pop("x"), both.pop("h0"), *[inputs.get(n) for n in names]]
    given += [None if w is None else w.flip(-1) for w in given[2:]]
    y, h_n = gru_bidirectional(*given, **both, backend="cpu")
    for d in range(2):
        state = None if h0 is None else h0 + d
        weights = given[2 + 4 * d : 6 + 4 * d]
        alone = mbm_kernels.gru(given[0], state, *weights, **both, reverse=d == 1, backend="cpu")
        assert torch.equal(y.chunk(2, -1)[d], alone[0])
        assert torch.equal(h_n[d], alone[1])


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


class TestProblemBlock:
    """The native argument blocks are filled by name and refused where they are none."""

    CALLS = {
        "gru_forward": ((0,) * 3, [0, 0], (0,) * 3),
        "gru_backward": ((0,) * 5, (0,) * 4, [(0, 0)] * 2, (0, 0), [(0,) * 4] * 2),
        "gru_cell_forward": ((0,) * 6, (0, 0)),
        "gru_cell_backward": ((0,) * 6, (0,) * 6),
    }

    def call(self, name, arguments=None, **changed):
        module = native.cpu()
        fields = getattr(module, f"{name.rpartition('_')[0]}_problem_fields")()
        values = dict.fromkeys(fields, 1) | changed
        given = self.CALLS[name] if arguments is None else arguments
        getattr(module, name)(native.block(fields, values), *given, 1)

    def test_native_calls_take_few_arguments(self):
        module = native.cpu()
        names = [name for name in dir(module) if name.startswith("gru_")]
        assert set(self.CALLS) <= set(names)
        for name in names:
            assert len(re.findall(r"arg\d+:", getattr(module, name).__doc__)) <= 8, name

    @pytest.mark.parametrize("block", [b"", bytes(8), bytes(8 * 1000)])
    @pytest.mark.parametrize("name", CALLS)
    def test_a_block_of_another_size_is_refused(self, name, block):
        with pytest.raises(ValueError, match=rf"got {len(block)} bytes; expected \d+; fill it by"):
            getattr(native.cpu(), name)(block, *self.CALLS[name], 1)

    @pytest.mark.parametrize("name", CALLS)
    def test_null_addresses_and_negative_sizes_are_refused(self, name):
        with pytest.raises(ValueError, match="got a null address"):
            self.call(name)
        with pytest.raises(ValueError, match="got a negative size"):
            self.call(name, B=-1, H=-1)

    def test_directions_are_one_or_two_with_weights_for_each(self):
        for directions in (-1, 0, 3, 2**40):
            with pytest.raises(ValueError, match=f"got {directions} directions; expected 1 or 2"):
                self.call("gru_forward", directions=directions)
        nothing = {"T": 0, "B": 0, "C": 0, "H": 0, "directions": 2}
        self.call("gru_forward", **nothing)
        self.call("gru_backward", **nothing)
        with pytest.raises(IndexError):
            self.call("gru_forward", ((0,) * 3, [0], (0,) * 3), **nothing)
        for packed, grads in (([(0, 0)], [(0,) * 4] * 2), ([(0, 0)] * 2, [(0,) * 4])):
            with pytest.raises(IndexError):
                self.call("gru_backward", ((0,) * 5, (0,) * 4, packed, (0, 0), grads), **nothing)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_lengths_are_looked_at_in_a_call_that_is_remembered(backend):
    inputs = sequence("few rows", "lengths")
    for function in (
        partial(mbm_kernels.gru, **inputs),
        partial(gru_bidirectional, **both_directions(inputs)),
    ):
        for _ in range(2):
            function(lengths=torch.tensor([2]), backend=backend)
            for wrong, error in ((torch.tensor([4]), ValueError), (torch.tensor([2.0]), TypeError)):
                with pytest.raises(error, match="lengths: got"):
                    function(lengths=wrong, backend=backend)


def both_directions(inputs):
    weights = {name: value for name, value in inputs.items() if name[:2] in ("w_", "b_")}
    reverse = {f"{name}_reverse": value for name, value in weights.items()}
    return {"x": inputs["x"], "h0": torch.stack([inputs["h0"]] * 2), **weights, **reverse}


def test_the_registered_operations_check_shapes():
    inputs = sequence("rows apart", "whole")
    x, h0, w_ih, w_hh, b_ih, b_hh, _ = inputs.values()
    ops = torch.ops.mbm_kernels
    with pytest.raises(ValueError, match="gru: w_ih: got shape"):
        ops.gru(x, h0, w_ih[:-1], w_hh, b_ih, b_hh, None, False, False, "cpu")
    with pytest.raises(ValueError, match="gru_cell: b_hh: got shape"):
        ops.gru_cell(x[0], h0, w_ih, w_hh, b_ih, b_hh[1:], False, "cpu")
    both = both_directions(inputs) | {"h0": h0}
    with pytest.raises(ValueError, match="gru_bidirectional: h0: got shape"):
        ops.gru_bidirectional(*both.values(), None, False, "cpu")
