"""cross_attention: the common suite, then its own properties."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels.ops.cross_attention import reference
from mbm_kernels.testing import Case, Hiding
from mbm_kernels.testing.hiding import partly_read_by_attention, unread_by_attention
from tests.conftest import raises


def sizes(b, n, t, s, d, e):
    return {"B": b, "N": n, "T": t, "S": s, "D": d, "E": e}


def option(**given):
    return given


USUAL = sizes(2, 3, 4, 5, 6, 7)
# The error is that of the few rows with two nearly equal maxima: with few rows chance decides.
LARGE = sizes(2, 4, 101, 31, 8, 9)
SMALL = sizes(3, 2, 3, 5, 6, 4)


def stock(query, key, value, *, key_lengths=None, mask=None, scale=None, need_weights=None):
    """What a user of torch writes, with rows that attend to nothing set to 0."""
    hidden = torch.zeros(*query.shape[:3], key.size(2), dtype=torch.bool)
    added = 0.0
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        hidden, added = hidden | (mask == -torch.inf), mask
    if key_lengths is not None:
        hidden = hidden | (torch.arange(key.size(2)) >= key_lengths[:, None])[:, None, None]
    scale = max(query.size(-1), 1) ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-1, -2) + added
    nothing = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(hidden & ~nothing, -torch.inf).masked_fill(nothing, 0).softmax(-1)
    weights = weights.masked_fill(nothing, 0)
    context = weights @ value
    if need_weights is None:
        return (context,)
    return context, weights.mean(1) if need_weights == "mean" else weights


class CrossAttention(Hiding):
    op = "cross_attention"
    function = staticmethod(mbm_kernels.cross_attention)
    reference = staticmethod(reference.cross_attention)

    def make(self, case, generator):
        b, n, t, s, d, e = (case.sizes[letter] for letter in "BNTSDE")

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        inputs = {"query": randn(b, n, t, d), "key": randn(b, n, s, d), "value": randn(b, n, s, e)}
        inputs |= {n: v for n, v in case.options.items() if n in ("scale", "need_weights")}
        match case.options.get("lengths"):
            case True:
                inputs["key_lengths"] = torch.randint(1, s + 1, (b,), generator=generator)
            case "zero":
                inputs["key_lengths"] = torch.arange(b) % 2 * s
        shapes = {"full": (b, n, t, s), "keys": (b, 1, 1, s), "heads": (n, 1, s), "steps": (t, s)}
        mask = case.options.get("mask")
        if mask is not None:
            inputs["mask"] = torch.rand(shapes[mask], generator=generator) < 0.7
            inputs["mask"][..., 0] |= ~inputs["mask"].any(-1)
        if (added := case.options.get("added")) is not None:
            inputs["mask"] = randn(*shapes[added])
        if case.options.get("hide_rows"):
            inputs["mask"][..., 1, :] = False if added is None else -torch.inf
        if case.options.get("hide_keys"):
            inputs["mask"][..., 2] = False if added is None else -torch.inf
        if (large := case.options.get("large")) is not None:  # as libraries write left padding
            inputs["mask"][..., 0] = large
            inputs["mask"][..., -1, :] = large
        return inputs

    def attend(self, inputs):
        b, n, t, _ = inputs["query"].shape
        s, mask = inputs["key"].size(2), inputs.get("mask")
        attend = torch.ones(b, n, t, s, dtype=torch.bool)
        if mask is not None:
            attend &= mask if mask.dtype == torch.bool else mask != -torch.inf
        if (lengths := inputs.get("key_lengths")) is not None:
            attend &= (torch.arange(s) < lengths[:, None])[:, None, None]
        return attend

    def unread(self, inputs):
        attend, kind = self.attend(inputs), inputs.get("need_weights")
        weights = {None: None, "mean": ~attend.any(1), "heads": ~attend}[kind]
        unread, arriving = unread_by_attention(attend, weights)
        if "mask" in inputs and inputs["mask"].is_floating_point() and "key_lengths" in inputs:
            unread["mask"] = torch.arange(attend.size(-1)) >= inputs["key_lengths"].max()
        return unread, arriving

    def partly_read(self, inputs):
        return partly_read_by_attention(self.attend(inputs), inputs)

    def stock(self, inputs, backend):
        return stock(**inputs) if backend == "torch" else super().stock(inputs, backend)

    def schema_args(self, inputs):
        scale = inputs.get("scale", inputs["query"].size(-1) ** -0.5)
        return super().schema_args({**inputs, "scale": float(scale)})


class TestCrossAttention(CrossAttention):
    diff = ("query", "key", "value")
    cases = [
        Case("primes, weights of each head", USUAL, option(need_weights="heads", mask="full")),
        Case("context only", USUAL),
        Case("mean weights", USUAL, option(need_weights="mean")),
        Case("mean weights and lengths", USUAL, option(need_weights="mean", lengths=True)),
        Case("context and lengths", USUAL, option(lengths=True)),
        Case("lengths and a mask", USUAL, option(lengths=True, mask="full")),
        Case("mask over keys", USUAL, option(mask="keys")),
        Case("mask over heads, with lengths", USUAL, option(mask="heads", lengths=True)),
        Case("mask over steps", USUAL, option(mask="steps", need_weights="mean", lengths=True)),
        Case("own scale", USUAL, option(scale=0.7, need_weights="mean")),
        Case("negative scale, no weights", USUAL, option(scale=-1)),
        Case("captioner", sizes(2, 4, 12, 64, 32, 32), option(need_weights="mean")),
        Case("more than one tile", sizes(1, 2, 37, 67, 19, 21), option(lengths=True)),
        Case("past what registers hold", sizes(1, 1, 20, 260, 16, 18), option(mask="steps")),
        Case("tiny magnitudes", USUAL, option(need_weights="heads"), scale=1e-3),
        Case("large magnitudes", LARGE, option(need_weights="heads", scale=0.05), scale=10.0),
        Case("large magnitudes, no weights", LARGE, option(scale=0.05), scale=10.0),
    ]
    edge_cases = [
        Case("all ones", sizes(1, 1, 1, 1, 1, 1), option(need_weights="mean")),
        *(
            Case(f"{what} {kind}", given, option(need_weights=kind))
            for kind in (None, "mean", "heads")
            for what, given in (
                ("no batch", sizes(0, 2, 3, 4, 5, 6)),
                ("no queries", sizes(2, 2, 0, 4, 5, 6)),
                ("no positions", sizes(2, 2, 3, 0, 5, 6)),
                ("no features", sizes(2, 2, 3, 4, 0, 6)),
                ("no value features", sizes(2, 2, 3, 4, 5, 0)),
            )
        ),
        Case("no heads", sizes(2, 0, 3, 4, 5, 6)),
        *(
            Case(f"{what} {kind}", SMALL, option(need_weights=kind, **given))
            for kind in (None, "mean", "heads")
            for what, given in (
                ("lengths of zero", option(lengths="zero")),
                ("hidden rows", option(mask="full", hide_rows=True)),
            )
        ),
    ]

    hiding_cases = [
        Case(f"{what} {kind}", SMALL, option(need_weights=kind, **given))
        for kind in (None, "mean", "heads")
        for what, given in (
            ("lengths", option(lengths=True)),
            ("lengths of zero", option(lengths="zero")),
            ("mask over keys", option(mask="keys", hide_keys=True)),
            ("keys hidden from every query", option(mask="full", hide_keys=True)),
            ("rows with nothing", option(mask="full", hide_rows=True)),
            ("mask over steps, lengths", option(mask="steps", hide_rows=True, lengths=True)),
        )
    ]

    def test_backward_twice_without_weights(self, backend):
        dtype = torch.float64 if backend == "torch" else torch.float32
        inputs = self.inputs(Case("", sizes(2, 3, 4, 5, 6, 6)), dtype)
        query = inputs["query"].requires_grad_()

        def second(context):
            (first,) = torch.autograd.grad(context.sin().sum(), query, create_graph=True)
            return torch.autograd.grad(first.square().sum(), query)[0]

        if backend == "torch":  # SDPA's fused CPU form, which says that it cannot
            with pytest.raises(RuntimeError, match="is not implemented"):
                second(*self.run(inputs, backend))
        else:
            expected = second(*self.define(inputs))
            torch.testing.assert_close(second(*self.run(inputs, backend)), expected)

    def test_module_is_drop_in(self, backend):
        module = nn.MultiheadAttention(8, 2, batch_first=True, backend=backend)
        stock = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        stock.load_state_dict(module.state_dict())
        module.load_state_dict(stock.state_dict())
        query, key = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
        for actual, expected in zip(module(query, key, key), stock(query, key, key), strict=True):
            torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("need_weights", [None, "mean", "heads"])
    @pytest.mark.parametrize("hidden", ["lengths of zero", "hidden rows"])
    def test_no_attention_gives_zeros(self, need_weights, hidden, backend):
        case = next(c for c in self.edge_cases if c.why == f"{hidden} {need_weights}")
        inputs = self.inputs(case, torch.float32)
        inputs["query"].requires_grad_()
        context, *weights = self.run(inputs, backend)
        if hidden == "hidden rows":
            empty = ~inputs["mask"].any(-1)
        else:
            empty = (inputs["key_lengths"] == 0)[:, None, None].expand(context.shape[:3])
        assert empty.any()
        assert not empty.all()
        assert (context[empty] == 0).all()
        total = context.sin().sum() + sum(w.sin().sum() for w in weights)
        (grad,) = torch.autograd.grad(total, inputs["query"])
        assert (grad[empty] == 0).all()
        assert torch.isfinite(grad).all()
        if need_weights is not None:
            assert (weights[0][empty if need_weights == "heads" else empty.all(1)] == 0).all()

    @pytest.mark.parametrize("need_weights", [None, "mean", "heads"])
    def test_masked_position_has_no_influence(self, need_weights, backend):
        inputs = self.inputs(Case("", USUAL, option(need_weights=need_weights)), torch.float32)
        inputs["key_lengths"] = torch.tensor([3, 5])
        context = self.run(inputs, backend)[0]
        inputs["key"][0, :, 3:] = 77.0
        inputs["value"][0, :, 3:] = -1e4
        assert torch.equal(self.run(inputs, backend)[0], context)

    @pytest.mark.parametrize("case_index", [1, 5, 6, 12])
    def test_weights_belong_to_the_context(self, case_index, backend):
        inputs = self.inputs(self.cases[case_index], torch.float32)
        (alone,) = self.run(inputs, backend)
        context, heads = self.run({**inputs, "need_weights": "heads"}, backend)
        also, mean = self.run({**inputs, "need_weights": "mean"}, backend)
        torch.testing.assert_close(context, alone)
        torch.testing.assert_close(also, alone)
        torch.testing.assert_close(heads @ inputs["value"], alone)
        torch.testing.assert_close(heads.sum(-1), torch.ones(heads.shape[:3]))
        torch.testing.assert_close(heads.mean(1), mean)

    def test_is_torchs_sdpa(self, backend):
        inputs = self.inputs(self.cases[6], torch.float32)
        expected = F.scaled_dot_product_attention(
            inputs["query"], inputs["key"], inputs["value"], inputs["mask"]
        )
        torch.testing.assert_close(self.run(inputs, backend)[0], expected)

    @pytest.mark.parametrize("need_weights", [None, "heads"])
    def test_saturated_scores_choose_the_maximum(self, need_weights, backend):
        inputs = self.inputs(Case("", USUAL, option(need_weights=need_weights)), torch.float32)
        inputs["query"] *= 1e4
        best = (inputs["query"] @ inputs["key"].transpose(-1, -2)).argmax(-1)
        context, *weights = self.run(inputs, backend)
        expected = F.one_hot(best, 5).float()
        torch.testing.assert_close(context, expected @ inputs["value"])
        if weights:
            torch.testing.assert_close(weights[0], expected)

    def test_row_does_not_depend_on_its_batch(self, backend):
        inputs = self.inputs(Case("", sizes(5, 2, 7, 33, 16, 20)), torch.float32)
        (whole,) = self.run(inputs, backend)
        single = {n: x[3:4] for n, x in inputs.items()}
        torch.testing.assert_close(self.run(single, backend)[0], whole[3:4], rtol=1e-6, atol=1e-6)

    def test_bad_input(self):
        good = self.inputs(self.cases[1], torch.float32)

        def call(**changes):
            return mbm_kernels.cross_attention(**{**good, **changes})

        with raises(ValueError, "cross_attention: query", "4 dimensions"):
            call(query=torch.randn(2, 4, 6))
        with raises(TypeError, "key", "torch.Tensor"):
            call(key=None)
        with raises(ValueError, "key", r"\[B, N, S, D\] = \[2, 3, 5, 6\]"):
            call(key=torch.randn(2, 3, 5, 4))
        with raises(ValueError, "value", r"\[B, N, S, E\] = \[2, 3, 5, 7\]"):
            call(value=torch.randn(2, 1, 5, 7))
        with raises(TypeError, "value", "float64", "float32 as query"):
            call(value=good["value"].double())
        with raises(TypeError, "query", "torch.int64"):
            call(query=torch.ones(2, 3, 4, 6, dtype=torch.int64))
        with raises(ValueError, "key", "meta", "cpu as query"):
            call(key=good["key"].to("meta"))
        with raises(TypeError, "mask", "torch.int64", "True = attend", "added"):
            call(mask=torch.ones(4, 5, dtype=torch.int64))
        with raises(ValueError, "mask", r"broadcastable to \[B, N, T, S\]"):
            call(mask=torch.ones(2, 4, 5, dtype=torch.bool))
        with raises(TypeError, "mask", "float64", "float32 as query"):
            call(mask=torch.zeros(4, 5, dtype=torch.float64))
        with raises(ValueError, "mask", "meta", "cpu as query"):
            call(mask=torch.zeros(4, 5, dtype=torch.bool, device="meta"))
        with raises(TypeError, "key_lengths", "int64"):
            call(key_lengths=torch.tensor([1, 2], dtype=torch.int32))
        with raises(ValueError, "key_lengths", r"\[B\] = \[2\]"):
            call(key_lengths=torch.tensor([1, 2, 3]))
        for lengths in ([-1, 2], [1, 6]):
            with raises(ValueError, "key_lengths", "0 <= length <= S = 5"):
                call(key_lengths=torch.tensor(lengths))
        with raises(ValueError, "need_weights", "'all'", "None, 'mean', 'heads'"):
            call(need_weights="all")
        with raises(TypeError, "scale", "None or a number"):
            call(scale=torch.tensor(1.0))


class TestAddedMask(CrossAttention):
    """The floating mask, which has a gradient."""

    diff = ("query", "key", "value", "mask")
    cases = [
        Case("of each head and step", USUAL, option(need_weights="heads", added="full")),
        Case("over heads, context only", USUAL, option(added="heads")),
        Case("over keys, with lengths", USUAL, option(added="keys", lengths=True)),
        Case("over steps, mean", USUAL, option(added="steps", need_weights="mean", lengths=True)),
        Case("large magnitudes", LARGE, option(added="full", scale=0.05), scale=10.0),
        # Beside -1e30 no score is left even in float64: rows that it fills are uniform.
        *(
            Case(f"{what}, {kind}", USUAL, option(need_weights=kind, **given))
            for kind in (None, "mean", "heads")
            for what, given in (
                ("filled with -1e30", option(added="full", large=-1e30)),
                ("filled with -1e9", option(added="steps", large=-1e9)),
                ("filled with -1e30, lengths", option(added="steps", large=-1e30, lengths=True)),
                ("filled with 1e30", option(added="heads", large=1e30)),
            )
        ),
    ]
    edge_cases = [
        Case("no positions", sizes(2, 2, 3, 0, 5, 6), option(added="full")),
        *(
            Case(f"{what} {kind}", SMALL, option(need_weights=kind, **given))
            for kind in (None, "mean", "heads")
            for what, given in (
                ("hidden rows", option(added="full", hide_rows=True)),
                ("lengths of zero", option(added="heads", lengths="zero")),
            )
        ),
    ]

    hiding_cases = [
        Case(f"{what} {kind}", SMALL, option(need_weights=kind, **given))
        for kind in (None, "mean", "heads")
        for what, given in (
            ("keys hidden from every query", option(added="full", hide_keys=True)),
            ("rows with nothing, lengths", option(added="steps", hide_rows=True, lengths=True)),
            ("mask over keys", option(added="keys", hide_keys=True, lengths=True)),
        )
    ]

    def test_bool_mask_is_minus_infinity(self, backend):
        inputs = self.inputs(Case("", USUAL, option(mask="full", hide_rows=True)), torch.float32)
        added = torch.zeros(inputs["mask"].shape).masked_fill(~inputs["mask"], -torch.inf)
        for kind in (None, "mean", "heads"):
            expected = self.run({**inputs, "need_weights": kind}, backend)
            actual = self.run({**inputs, "mask": added, "need_weights": kind}, backend)
            for a, e in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, e)
