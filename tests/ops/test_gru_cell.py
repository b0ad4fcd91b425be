"""gru_cell and nn.GRUCell: the common suite, then the cell's own properties."""

import copy
import pickle

import pytest
import torch

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels.ops.gru_cell import reference
from mbm_kernels.testing import Case, OpSuite
from tests.conftest import raises


def sizes(b, c, h):
    return {"B": b, "C": c, "H": h}


class TestGruCell(OpSuite):
    op = "gru_cell"
    function = staticmethod(mbm_kernels.gru_cell)
    reference = staticmethod(reference.gru_cell)
    diff = ("x", "h", "w_ih", "w_hh", "b_ih", "b_hh")
    cases = [
        Case("primes below one vector", sizes(2, 3, 5)),
        Case("one row", sizes(1, 40, 120)),
        Case("rows and units past a tile", sizes(13, 33, 37)),
        Case("no biases", sizes(7, 8, 16), {"bias": False}),
        Case("more rows than one Triton kernel takes", sizes(70, 5, 9)),
        Case("tiny magnitudes", sizes(3, 9, 17), scale=1e-3),
        Case("large inputs saturate the gates", sizes(8, 40, 65), {"x": 10.0}),
    ]
    edge_cases = [
        Case("all ones", sizes(1, 1, 1)),
        Case("no batch", sizes(0, 3, 4)),
        Case("no inputs", sizes(2, 0, 4)),
        Case("no units", sizes(2, 3, 0)),
    ]

    def make(self, case, generator):
        b, c, h = (case.sizes[letter] for letter in "BCH")

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        bound = max(h, 1) ** -0.5  # the spread of a trained layer: of torch's own start
        inputs = {"x": randn(b, c) * case.options.get("x", 1.0), "h": randn(b, h)}
        inputs |= {"w_ih": randn(3 * h, c) * bound, "w_hh": randn(3 * h, h) * bound}
        if case.options.get("bias", True):
            inputs |= {"b_ih": randn(3 * h) * bound, "b_hh": randn(3 * h) * bound}
        return inputs

    def test_module_is_drop_in(self, backend):
        for bias in (True, False):
            stock = torch.nn.GRUCell(5, 6, bias=bias)
            module = nn.GRUCell(5, 6, bias=bias, backend=backend)
            module.load_state_dict(stock.state_dict())
            stock.load_state_dict(module.state_dict())
            assert isinstance(module, torch.nn.GRUCell)
            for x, h in (
                (torch.randn(3, 5), torch.randn(3, 6)),
                (torch.randn(3, 5), None),
                (torch.randn(5), torch.randn(6)),
                (torch.randn(5), None),
                (torch.randn(0, 5), None),
            ):
                actual, expected = module(x, h), stock(x, h)
                torch.testing.assert_close(actual, expected)
                actual.sum().backward()
                expected.sum().backward()
            for ours, theirs in zip(module.parameters(), stock.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad)

    def test_module_copies_and_compiles(self, backend):
        module = nn.GRUCell(5, 6, backend=backend)
        x = torch.randn(3, 5)
        expected = module(x)
        assert repr(module) == f"GRUCell(5, 6, backend={backend!r})"
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.backend == backend
            assert torch.equal(other(x), expected)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)

    def test_row_does_not_depend_on_its_batch(self, backend):
        inputs = self.inputs(Case("", sizes(9, 20, 24)), torch.float32)
        (whole,) = self.run(inputs, backend)
        single = {**inputs, "x": inputs["x"][4:5], "h": inputs["h"][4:5]}
        exact = {"rtol": 0.0, "atol": 0.0} if backend == "cpu" else {}  # MKL's order depends on B
        torch.testing.assert_close(self.run(single, backend)[0], whole[4:5], **exact)

    def test_closed_update_gate_keeps_the_state(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        inputs["b_ih"][5:10] = 200.0  # z = 1
        (h_new,) = self.run(inputs, backend)
        torch.testing.assert_close(h_new, inputs["h"])

    def test_frozen_inputs_get_no_gradient(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        for name in self.diff:
            given = {**inputs, name: inputs[name].clone().requires_grad_()}
            (h_new,) = self.run(given, backend)
            h_new.square().sum().backward()
            expected = self.gradients(self.define, inputs, [2 * h_new.detach()])
            torch.testing.assert_close(given[name].grad, expected[name])

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_vmap(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        xs = torch.randn(4, *inputs["x"].shape)

        def call(x):
            return self.run({**inputs, "x": x}, backend)[0]

        torch.testing.assert_close(torch.func.vmap(call)(xs), torch.stack([call(x) for x in xs]))

    def test_bad_input(self):
        good = self.inputs(self.cases[0], torch.float32)

        def bad(**changes):
            return mbm_kernels.gru_cell(**{**good, **changes})

        with raises(ValueError, "gru_cell: x", "shape", "2 dimensions"):
            bad(x=torch.randn(3))
        with raises(TypeError, "x", "torch.Tensor"):
            bad(x=[[1.0]])
        with raises(ValueError, "h", r"\[B, H\] = \[2, 5\]"):
            bad(h=torch.randn(3, 5))
        with raises(ValueError, "w_ih", r"\[3H, C\] = \[15, 3\]"):
            bad(w_ih=torch.randn(15, 4))
        with raises(ValueError, "w_hh", r"\[3H, H\] = \[15, 5\]"):
            bad(w_hh=torch.randn(10, 5))
        with raises(ValueError, "b_ih", r"\[3H\] = \[15\]"):
            bad(b_ih=torch.randn(5))
        with raises(ValueError, "b_hh", "None", "both biases, or neither"):
            bad(b_hh=None)
        with raises(TypeError, "h", "float64", "float32 as x"):
            bad(h=good["h"].double())
        with raises(TypeError, "x", "int64"):
            bad(x=torch.ones(2, 3, dtype=torch.int64))
        with raises(ValueError, "w_hh", "meta", "cpu as x"):
            bad(w_hh=good["w_hh"].to("meta"))


def test_module_raises_as_torch_does():
    with pytest.raises(ValueError, match="got 'fast'; expected one of auto, cpu"):
        nn.GRUCell(3, 4, backend="fast")
    ours, stock = nn.GRUCell(3, 4), torch.nn.GRUCell(3, 4)
    for x, h in (
        (torch.randn(2, 2, 3), None),
        (torch.randn(2, 5), None),
        (torch.randn(2, 3), torch.randn(3, 4)),
        (torch.randn(2, 3), torch.randn(2, 5)),
        (torch.randn(2, 3), torch.randn(2, 2, 4)),
        (torch.randn(2, 3).double(), None),
    ):
        with pytest.raises((ValueError, RuntimeError)) as expected:
            stock(x, h)
        with pytest.raises(expected.type) as actual:
            ours(x, h)
        assert str(actual.value) == str(expected.value)
    assert repr(ours) == repr(stock)


def test_module_follows_autocast():
    ours, x = nn.GRUCell(3, 4), torch.randn(2, 3)
    stock = torch.nn.GRUCell(3, 4)
    stock.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        h = ours(x)
        assert h.dtype == stock(x).dtype == torch.float32
        with pytest.raises(RuntimeError, match="inconsistent"):
            ours(torch.randn(2, 5))
    torch.testing.assert_close(h, ours(x), rtol=0, atol=0.02)
