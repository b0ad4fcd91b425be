"""concat_linear: the common suite, then its own properties."""

import re

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels._core import native
from mbm_kernels.ops.concat_linear import backend_cpu, reference
from mbm_kernels.ops.concat_linear.module import Linear
from mbm_kernels.testing import Case, OpSuite
from tests.conftest import raises


def stock(inputs, weight, bias=None):
    """What a user of torch writes."""
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    return F.linear(torch.cat([x.expand(*leading, -1) for x in inputs], -1), weight, bias)


def shapes(*inputs, k=5, bias=True):
    return {"shapes": inputs, "k": k, "bias": bias}


class TestConcatLinear(OpSuite):
    op = "concat_linear"
    function = staticmethod(mbm_kernels.concat_linear)
    reference = staticmethod(reference.concat_linear)
    diff = ("inputs", "weight", "bias")
    cases = [
        Case("image vector beside words", options=shapes((2, 5, 3), (2, 1, 7))),
        Case("equal leading dimensions", options=shapes((2, 5, 3), (2, 5, 4))),
        Case("no bias", options=shapes((2, 5, 3), (2, 1, 4), bias=False)),
        Case("single input", options=shapes((4, 5, 7))),
        Case("positions shared by the batch", options=shapes((3, 4, 6), (4, 2))),
        Case("shared first", options=shapes((2, 1, 4), (2, 5, 3))),
        Case("full, shared, full", options=shapes((2, 3, 4), (1, 3, 2), (2, 3, 3))),
        Case("none has the full shape", options=shapes((2, 1, 4), (3, 2), (1, 3, 3))),
        Case("no leading dimensions", options=shapes((3,), (4,))),
        Case("a vector for all", options=shapes((3,), (2, 3, 4))),
        Case("more than one tile", options=shapes((3, 17, 37), (3, 1, 29), k=67)),
        Case("four dimensions", options=shapes((2, 3, 1, 4), (2, 1, 5, 3), k=4)),
        Case("tiny magnitudes", options=shapes((2, 5, 3), (2, 1, 7)), scale=1e-3),
        Case("large magnitudes", options=shapes((2, 5, 3), (2, 1, 7)), scale=10.0),
    ]
    edge_cases = [
        Case("all ones", options=shapes((1, 1), (1, 1), k=1)),
        Case("no rows", options=shapes((0, 5, 3), (0, 1, 4))),
        Case("no steps", options=shapes((2, 0, 3), (2, 1, 4))),
        Case("an input without features", options=shapes((2, 5, 3), (2, 1, 0))),
        Case("no features at all", options=shapes((2, 5, 0), (2, 1, 0))),
        Case("no outputs", options=shapes((2, 5, 3), (2, 1, 4), k=0)),
    ]

    def make(self, case, generator):
        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        k = case.options["k"]
        given = case.options["shapes"]
        inputs = {
            "inputs": [randn(*s) for s in given],
            "weight": randn(k, sum(s[-1] for s in given)),
        }
        if case.options["bias"]:
            inputs["bias"] = randn(k)
        return inputs

    def stock(self, inputs, backend):
        return (stock(**inputs),)

    def test_module_is_drop_in(self, backend):
        torch.manual_seed(5)
        plain = torch.nn.Linear(7, 4)
        torch.manual_seed(5)
        module = nn.ConcatLinear((3, 4), 4, backend=backend)
        assert all(torch.equal(v, plain.state_dict()[n]) for n, v in module.state_dict().items())
        module.load_state_dict(plain.state_dict())
        a, b = torch.randn(2, 5, 3), torch.randn(2, 1, 4)
        expected = plain(torch.cat([a, b.expand(2, 5, 4)], -1))
        torch.testing.assert_close(module(a, b), expected)
        assert nn.ConcatLinear([3, 4], 4, bias=False).bias is None
        assert "in_features=(3, 4), out_features=4" in repr(module)
        with raises(ValueError, "inputs", r"\[4, 3\]", r"\[3, 4\] features"):
            module(b, a)
        with raises(TypeError, "in_features", "sequence of ints"):
            nn.ConcatLinear(7, 4)

    def test_one_tensor_twice(self, backend):
        x = torch.randn(3, 4, requires_grad=True)
        weight = torch.randn(5, 8)
        y = mbm_kernels.concat_linear((x, x), weight, backend=backend)
        (actual,) = torch.autograd.grad(y.sin().sum(), x)
        expected = F.linear(torch.cat([x, x], -1), weight)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(actual, torch.autograd.grad(expected.sin().sum(), x)[0])

    def test_inputs_are_left_alone(self, backend):
        inputs = self.inputs(self.cases[6], torch.float32)
        before = [x.clone() for x in inputs["inputs"]]
        self.run(inputs, backend)
        assert all(torch.equal(a, b) for a, b in zip(inputs["inputs"], before, strict=True))

    def test_vmap_over_one_input(self, backend):
        a, b, weight = torch.randn(2, 5, 3), torch.randn(6, 2, 1, 4), torch.randn(5, 7)

        def call(x):
            return mbm_kernels.concat_linear((a, x), weight, backend=backend)

        expected = torch.stack([call(x) for x in b])
        torch.testing.assert_close(torch.vmap(call)(b), expected)

    def test_broadcast_is_the_repeated_input(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        (y,) = self.run(inputs, backend)
        a, b = inputs["inputs"]
        inputs["inputs"] = [a, b.repeat(1, 5, 1)]
        torch.testing.assert_close(y, self.run(inputs, backend)[0])

    def test_bad_input(self):
        a, b, weight = torch.randn(2, 5, 3), torch.randn(2, 1, 4), torch.randn(6, 7)
        call = mbm_kernels.concat_linear
        with raises(TypeError, "concat_linear: inputs", "a list or tuple"):
            call(a, weight)
        with raises(ValueError, "inputs", "at least one tensor"):
            call([], weight)
        with raises(TypeError, r"inputs\[1\]", "torch.Tensor"):
            call([a, 1.0], weight)
        with raises(ValueError, r"inputs\[0\]", r"\[\.\.\., C_i\]"):
            call([torch.tensor(1.0), b], weight)
        with raises(ValueError, "inputs", r"\[2, 5, 3\], \[3, 1, 4\]", "broadcast"):
            call([a, torch.randn(3, 1, 4)], weight)
        with raises(ValueError, "weight", r"\[6, 7\]", r"\[K, sum of C_i\] = \[6, 6\]"):
            call([a, torch.randn(2, 1, 3)], weight)
        with raises(ValueError, "weight", "2 dimensions"):
            call([a, b], torch.randn(7))
        with raises(ValueError, "bias", r"\[K\] = \[6\]"):
            call([a, b], weight, torch.randn(7))
        with raises(TypeError, r"inputs\[1\]", "float64", r"float32 as inputs\[0\]"):
            call([a, b.double()], weight)
        with raises(ValueError, "weight", r"meta", r"cpu as inputs\[0\]"):
            call([a, b], weight.to("meta"))


def test_a_shape_seen_before_is_still_checked():
    a, b, weight = torch.randn(2, 5, 3), torch.randn(2, 1, 4), torch.randn(6, 7)
    call = mbm_kernels.concat_linear
    call([a, b], weight)
    with raises(TypeError, r"inputs\[1\]", "float64"):
        call([a, b.double()], weight)
    with raises(TypeError, r"inputs\[1\]", "torch.Tensor"):
        call([a, b.numpy()], weight)
    with raises(TypeError, "int64"):
        call([a.long(), b.long()], weight.long())
    with raises(ValueError, "meta"):
        call([a, b], weight.to("meta"))
    with raises(ValueError, "weight", "2 dimensions"):
        call([a], b, weight)


@pytest.mark.parametrize("dynamic", [False, True])
def test_module_compiles(dynamic):
    torch._dynamo.reset()
    module = nn.ConcatLinear((3, 4), 4)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        a, b = torch.randn(batch, 5, 3), torch.randn(batch, 1, 4)
        torch.testing.assert_close(compiled(a, b), module(a, b))


class TestProjections:
    """What other modules project with: torch.nn.Linear, by the kernel where the table says so."""

    @pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
    def test_by_the_kernel(self, monkeypatch):
        calls, fwd = [], backend_cpu.fwd
        monkeypatch.setattr(backend_cpu, "fwd", lambda *args: calls.append(1) or fwd(*args))
        torch.manual_seed(0)
        ours = nn.AdditiveAttention(6, 7, 8)
        stock = nn.AdditiveAttention(6, 7, 8, backend="torch")
        stock.load_state_dict(ours.state_dict())
        query, key = torch.randn(2, 3, 6), torch.randn(2, 5, 7)
        assert type(stock.query_proj) is type(stock.key_proj) is torch.nn.Linear
        expected = stock(query, key)
        torch.testing.assert_close(ours(query, key), expected)
        assert not calls  # too small for the table
        mbm_kernels.set_backend("cpu", op="concat_linear")
        try:
            torch.testing.assert_close(ours(query, key), expected)
            assert len(calls) == 2
        finally:
            mbm_kernels.set_backend("auto", op="concat_linear")

    def test_errors_are_those_of_linear(self):
        ours, stock = Linear(6, 8), torch.nn.Linear(6, 8)
        for x in (torch.randn(2, 7), torch.randn(2, 6, dtype=torch.float64)):
            with pytest.raises(RuntimeError) as expected:
                stock(x)
            with pytest.raises(RuntimeError, match=re.escape(str(expected.value))):
                ours(x)
