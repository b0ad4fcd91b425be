"""additive_attention: the common suite, then its own properties."""

import pytest
import torch

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels.ops.additive_attention import reference
from mbm_kernels.testing import Case, Hiding
from mbm_kernels.testing.hiding import partly_read_by_attention, unread_by_attention
from mbm_kernels.testing.suite import interpreted
from tests.conftest import raises


def sizes(b, t, s, d, e):
    return {"B": b, "T": t, "S": s, "D": d, "E": e}


class TestAdditiveAttention(Hiding):
    op = "additive_attention"
    function = staticmethod(mbm_kernels.additive_attention)
    reference = staticmethod(reference.additive_attention)
    diff = ("query", "key", "value", "v")
    cases = [
        Case("primes below one vector", sizes(2, 3, 5, 7, 3), {"mask": "full", "lengths": True}),
        Case("more than one tile in each dimension", sizes(2, 11, 19, 37, 21)),
        Case("captioner", sizes(2, 6, 16, 32, 24), {"lengths": True}),
        Case("mask broadcast over queries", sizes(3, 4, 9, 16, 8), {"mask": "keys"}),
        Case("mask of a single batch", sizes(2, 4, 9, 17, 8), {"mask": "shared"}),
        Case("tiny magnitudes need the numerator form", sizes(2, 3, 9, 33, 5), scale=1e-3),
        Case("small magnitudes", sizes(2, 3, 9, 33, 5), scale=1e-2),
        Case("medium magnitudes", sizes(2, 3, 9, 33, 5), scale=0.1),
        Case("large magnitudes saturate", sizes(2, 11, 19, 37, 5), scale=3.0),
        Case("largest magnitudes need tanh itself", sizes(2, 3, 9, 33, 5), scale=10.0),
        Case("every tanh near -1", sizes(2, 12, 49, 64, 5), {"shift": -2.5}),
        Case("every tanh near 1", sizes(2, 12, 49, 64, 5), {"shift": 2.5}),
        Case("tanh about -0.96, little spread", sizes(2, 9, 50, 64, 5), {"narrow": -1.0}),
        Case("tanh about -0.8, long v", sizes(1, 5, 33, 96, 5), {"narrow": -0.55}),
        Case("opposite large terms", sizes(2, 4, 6, 20, 5), {"opposite": True}),
    ]
    edge_cases = [
        Case("all ones", sizes(1, 1, 1, 1, 1)),
        Case("no batch", sizes(0, 3, 4, 5, 6)),
        Case("no queries", sizes(2, 0, 4, 5, 6)),
        Case("no positions", sizes(2, 3, 0, 5, 6)),
        Case("no features", sizes(2, 3, 4, 0, 6)),
        Case("no value features", sizes(2, 3, 4, 5, 0)),
        Case("rows with nothing to attend to", sizes(3, 2, 5, 8, 4), {"lengths": "zero"}),
        Case("mask that hides all", sizes(2, 2, 5, 8, 4), {"mask": "none"}),
    ]

    def make(self, case, generator):
        b, t, s, d, e = (case.sizes[letter] for letter in "BTSDE")

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        inputs = {
            "query": randn(b, t, d),
            "key": randn(b, s, d),
            "value": randn(b, s, e),
            "v": randn(d),
        }
        if (shift := case.options.get("shift")) is not None:
            inputs["query"] = inputs["query"] * 0.3 + shift
            inputs["key"] = inputs["key"] * 0.3 + shift
        if (narrow := case.options.get("narrow")) is not None:
            inputs["query"] = inputs["query"] * 0.1 + narrow
            inputs["key"] = inputs["key"] * 0.1 + narrow
        if case.options.get("opposite"):
            inputs["query"] = inputs["query"] * 0.3 + 20
            inputs["key"] = inputs["key"] * 0.3 - torch.tensor([15.0, 20.0]).repeat(s)[:s, None]
        match case.options.get("lengths"):
            case True:
                inputs["key_lengths"] = torch.randint(1, s + 1, (b,), generator=generator)
            case "zero":
                inputs["key_lengths"] = torch.arange(b) % 2 * s
        shapes = {"full": (b, t, s), "keys": (b, 1, s), "shared": (t, s), "none": (b, t, s)}
        if (kind := case.options.get("mask")) is not None:
            inputs["mask"] = torch.rand(shapes[kind], generator=generator) < 0.7
            if kind == "none":
                inputs["mask"][:] = False
            if case.options.get("hide_keys"):
                inputs["mask"][..., 2] = False
            if case.options.get("hide_rows"):
                inputs["mask"][..., 1, :] = False
        return inputs

    hiding_cases = [
        Case("lengths", sizes(3, 3, 5, 7, 4), {"lengths": True}),
        Case("lengths of zero", sizes(3, 2, 5, 8, 4), {"lengths": "zero"}),
        Case("mask over keys", sizes(2, 3, 9, 17, 8), {"mask": "keys", "hide_keys": True}),
        Case("keys hidden from all", sizes(1, 9, 5, 7, 4), {"mask": "full", "hide_keys": True}),
        Case("rows with nothing", sizes(2, 3, 9, 17, 8), {"mask": "full", "hide_rows": True}),
        Case(
            "mask over steps and lengths",
            sizes(2, 9, 70, 130, 8),
            {"mask": "shared", "hide_rows": True, "lengths": True},
        ),
        Case("mask that hides all", sizes(2, 2, 5, 8, 4), {"mask": "none"}),
        Case("tiny magnitudes", sizes(2, 3, 9, 33, 5), {"mask": "full", "hide_keys": True}, 1e-3),
    ]

    def attend(self, inputs):
        b, t, s = inputs["query"].size(0), inputs["query"].size(1), inputs["key"].size(1)
        attend = torch.ones(b, t, s, dtype=torch.bool)
        if "mask" in inputs:
            attend &= inputs["mask"]
        if "key_lengths" in inputs:
            attend &= (torch.arange(s) < inputs["key_lengths"][:, None])[:, None]
        return attend

    def unread(self, inputs):
        attend = self.attend(inputs)
        return unread_by_attention(attend, ~attend)

    def partly_read(self, inputs):
        return partly_read_by_attention(self.attend(inputs), inputs)

    def test_module_is_drop_in(self, backend):
        module = nn.AdditiveAttention(6, 7, 8, backend=backend)
        assert {n: tuple(p.shape) for n, p in module.named_parameters()} == {
            "v": (8,),
            "query_proj.weight": (8, 6),
            "query_proj.bias": (8,),
            "key_proj.weight": (8, 7),
            "key_proj.bias": (8,),
        }
        query, key = torch.randn(2, 3, 6), torch.randn(2, 5, 7)
        context, weights = module(query, key)
        scores = torch.tanh(module.query_proj(query)[:, :, None] + module.key_proj(key)[:, None])
        expected = (scores @ module.v).softmax(-1)
        torch.testing.assert_close(weights, expected)
        torch.testing.assert_close(context, expected @ key)
        copy = nn.AdditiveAttention(6, 7, 8, backend="torch")
        copy.load_state_dict(module.state_dict())
        torch.testing.assert_close(copy(query, key), (context, weights))

    def test_no_attention_gives_zeros(self, backend):
        inputs = self.inputs(self.edge_cases[-2], torch.float32)
        inputs["query"].requires_grad_()
        context, weights = self.run(inputs, backend)
        empty = inputs["key_lengths"] == 0
        assert empty.any()
        assert (context[empty] == 0).all()
        assert (weights[empty] == 0).all()
        (grad,) = torch.autograd.grad(context.sum() + weights.sin().sum(), inputs["query"])
        assert (grad[empty] == 0).all()
        assert torch.isfinite(grad).all()

    def test_row_does_not_depend_on_its_batch(self, backend):
        inputs = self.inputs(Case("", sizes(5, 7, 33, 40, 20)), torch.float32)
        whole, _ = self.run(inputs, backend)
        single = {n: x[3:4] if x.dim() == 3 else x for n, x in inputs.items()}
        torch.testing.assert_close(self.run(single, backend)[0], whole[3:4], rtol=1e-6, atol=1e-6)

    def test_masked_position_has_no_influence(self, backend):
        inputs = self.inputs(self.cases[2], torch.float32)
        lengths = inputs["key_lengths"] = torch.tensor([3, 9])
        context, weights = self.run(inputs, backend)
        beyond = torch.arange(inputs["key"].size(1)) >= lengths[:, None]
        assert (weights.transpose(1, 2)[beyond] == 0).all()
        inputs["key"][beyond] = 77.0
        inputs["value"][beyond] = -1e4
        assert torch.equal(self.run(inputs, backend)[0], context)

    def test_saturated_scores_are_finite(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        inputs["query"][:, 0] = float("inf")
        inputs["key"][:, 1] = 200.0
        self.check_forward(inputs, backend)
        inputs["query"][:, 1] = float("nan")
        self.check_forward(inputs, backend)

    def test_threads_do_not_change_a_bit(self, backend):
        shape = (2, 3, 9, 20, 5) if interpreted(backend) else (3, 9, 50, 64, 33)
        inputs = self.inputs(Case("", sizes(*shape)), torch.float32)
        before = torch.get_num_threads()
        results = []
        try:
            # ATen, whose products triton takes, promises nothing across thread counts.
            for threads in (1, 2, 3, 1) if backend == "cpu" else (1, 1):
                torch.set_num_threads(threads)
                grads = [torch.ones_like(o) for o in self.run(inputs, backend)]
                found = self.gradients(lambda i: self.run(i, backend), inputs, grads)
                results.append((*self.run(inputs, backend), *found.values()))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_bad_input(self):
        good = self.inputs(self.cases[0], torch.float32)
        call = mbm_kernels.additive_attention

        def bad(**changes):
            return {**good, **changes}

        with raises(ValueError, "query", "2 dimensions|3 dimensions"):
            call(**bad(query=torch.randn(3, 7)))
        with raises(ValueError, "key", r"\[B, S, D\]"):
            call(**bad(key=torch.randn(2, 5, 8)))
        with raises(ValueError, "v", r"\[D\] = \[7\]"):
            call(**bad(v=torch.randn(8)))
        with raises(TypeError, "value", "float32 as query"):
            call(**bad(value=good["value"].double()))
        with raises(TypeError, "query", "torch.Tensor"):
            call(**bad(query=[1.0]))
        with raises(TypeError, "mask", "True = attend"):
            call(**bad(mask=torch.ones(2, 3, 5)))
        with raises(ValueError, "mask", "broadcastable"):
            call(**bad(mask=torch.ones(2, 4, 5, dtype=torch.bool)))
        with raises(TypeError, "key_lengths", "int64"):
            call(**bad(key_lengths=torch.tensor([1.0, 2.0])))
        with raises(ValueError, "key_lengths", "0 <= length <= S = 5"):
            call(**bad(key_lengths=torch.tensor([-1, 2])))
        with raises(ValueError, "key_lengths", "0 <= length <= S = 5"):
            call(**bad(key_lengths=torch.tensor([1, 6])))
        with raises(ValueError, "key", "device|cpu"):
            call(**bad(key=good["key"].to("meta")))


def test_pattern_of_the_message():
    with pytest.raises(ValueError, match=r"additive_attention: v: got .*; expected .*; .+"):
        mbm_kernels.additive_attention(
            torch.randn(1, 1, 2), torch.randn(1, 1, 2), torch.randn(1, 1, 2), torch.randn(3)
        )
