"""linear_cross_entropy: the common suite, then its own properties."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels.ops.linear_cross_entropy import reference
from mbm_kernels.testing import Case, OpSuite
from mbm_kernels.testing.suite import map_floating, with_leaves
from tests.conftest import precise, raises

IGNORED = -100


def sizes(n, h, v):
    return {"N": n, "H": h, "V": v}


class ExactTanh(torch.autograd.Function):
    """Its slope in float64 is not 0 where tanh rounds to 1, above 19."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.saved_tensors[0].cosh().square()


class WithExactTanh:
    """torch, for a definition whose truth is to hold where capped logits saturate."""

    tanh = staticmethod(ExactTanh.apply)

    def __getattr__(self, name):
        return getattr(torch, name)


class TestLinearCrossEntropy(OpSuite):
    op = "linear_cross_entropy"
    function = staticmethod(mbm_kernels.linear_cross_entropy)
    reference = staticmethod(reference.linear_cross_entropy)
    diff = ("hidden", "weight", "bias")
    autocast_output = torch.float32
    cases = [
        Case("primes, some rows ignored", sizes(7, 5, 11), {"bias": True, "ignored": True}),
        Case("several tiles in each dimension", sizes(37, 67, 131), {"ignored": True}),
        Case("leading dimensions", sizes(12, 8, 19), {"bias": True, "lead": (3, 4)}),
        Case("smoothing", sizes(9, 16, 33), {"label_smoothing": 0.1, "ignored": True}),
        Case("sum", sizes(9, 16, 33), {"bias": True, "ignored": True, "reduction": "sum"}),
        Case("none", sizes(9, 16, 33), {"ignored": True, "reduction": "none", "lead": (3, 3)}),
        Case("softcap", sizes(9, 16, 33), {"bias": True, "softcap": 2.5}),
        Case("z loss", sizes(9, 16, 33), {"bias": True, "ignored": True, "z_loss": 0.1}),
        Case(
            "all options, no reduction",
            sizes(9, 16, 33),
            {
                "bias": True,
                "ignored": True,
                "label_smoothing": 0.2,
                "softcap": 3.0,
                "z_loss": 0.05,
                "reduction": "none",
            },
        ),
        Case("an ignored class", sizes(12, 8, 5), {"ignored": True, "ignore_index": 0}),
        Case("tiny magnitudes", sizes(9, 16, 33), {"bias": True}, scale=1e-3),
        Case("large magnitudes saturate", sizes(9, 16, 33), {"bias": True}, scale=5),
    ]
    edge_cases = [
        Case("all ones", sizes(1, 1, 1), {"bias": True}),
        Case("no leading dimension", sizes(1, 4, 6), {"bias": True, "lead": ()}),
        Case("no rows", sizes(0, 4, 6), {"bias": True, "z_loss": 0.1}),
        Case("no rows to sum", sizes(0, 4, 6), {"reduction": "sum"}),
        Case("no rows without reduction", sizes(0, 4, 6), {"reduction": "none", "lead": (2, 0)}),
        Case("no features", sizes(3, 0, 6), {"bias": True}),
        Case("all ignored", sizes(4, 3, 6), {"bias": True, "ignored": "all", "z_loss": 0.1}),
        Case("all ignored in a sum", sizes(4, 3, 6), {"ignored": "all", "reduction": "sum"}),
        Case("all ignored, no reduction", sizes(4, 3, 6), {"ignored": "all", "reduction": "none"}),
    ]

    def make(self, case, generator):
        n, h, v = (case.sizes[letter] for letter in "NHV")

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        options = dict(case.options)
        lead = options.pop("lead", (n,))
        ignored = options.pop("ignored", False)
        bias = options.pop("bias", False)
        inputs = {
            "hidden": randn(*lead, h),
            "weight": randn(v, h),
            "target": torch.randint(0, v, lead, generator=generator),
            "bias": randn(v) if bias else None,
            "ignore_index": IGNORED,
            "label_smoothing": 0.0,
            "softcap": None,
            "z_loss": 0.0,
            "reduction": "mean",
            **options,
        }
        if ignored == "all":
            inputs["target"][:] = inputs["ignore_index"]
        elif ignored:
            inputs["target"].view(-1)[::3] = inputs["ignore_index"]
        return inputs

    def test_autocast(self, backend):
        inputs, leaves = with_leaves(self.inputs(self.cases[0], torch.float32), self.diff)
        with torch.autocast("cpu", torch.bfloat16):
            (loss,) = self.run(inputs, backend)
        cast = map_floating(inputs, lambda x: x.detach().bfloat16())
        (expected,) = self.run(cast, backend)
        assert loss.dtype == torch.float32
        assert expected.dtype == torch.bfloat16
        assert torch.equal(loss.bfloat16(), expected)
        for name, grad in zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True):
            assert grad.dtype == torch.float32, name
            assert torch.isfinite(grad).all(), name
        # Only stock's projection is rounded to bfloat16: softmax and sums are not.
        projected = cast if backend == "torch" else map_floating(cast, torch.Tensor.double)
        logits = F.linear(projected["hidden"], projected["weight"], projected["bias"]).double()
        exact = F.cross_entropy(logits, cast["target"]).float()
        torch.testing.assert_close(loss, exact, rtol=1e-6, atol=1e-6)
        if precise(backend) == torch.float64:
            double = map_floating(inputs, lambda x: x.detach().double())
            with torch.autocast("cpu", torch.bfloat16):
                assert self.run(double, backend)[0].dtype == torch.float64

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
    def test_equals_cross_entropy(self, backend, reduction, smoothing):
        inputs = self.inputs(self.cases[0], precise(backend))
        inputs |= {"reduction": reduction, "label_smoothing": smoothing}
        logits = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
        expected = F.cross_entropy(
            logits, inputs["target"], reduction=reduction, label_smoothing=smoothing
        )
        torch.testing.assert_close(self.run(inputs, backend)[0], expected)

    def test_softcap_and_z_loss_equal_their_formulas(self, backend):
        inputs = self.inputs(self.cases[2], precise(backend))
        inputs |= {"softcap": 1.5, "z_loss": 0.25, "reduction": "none"}
        logits = 1.5 * torch.tanh((inputs["hidden"] @ inputs["weight"].T + inputs["bias"]) / 1.5)
        chosen = torch.distributions.Categorical(logits=logits).log_prob(inputs["target"])
        expected = -chosen + 0.25 * logits.exp().sum(-1).log() ** 2
        assert (logits.abs() <= 1.5).all()
        torch.testing.assert_close(self.run(inputs, backend)[0], expected)

    @pytest.mark.parametrize("magnitude", [1e-3, 0.1, 1, 2, 4, 8, 30, 100])
    def test_softcap_from_flat_to_saturated(self, backend, magnitude, monkeypatch):
        if backend != "torch":
            monkeypatch.setattr(reference, "torch", WithExactTanh())
        # All logits at `magnitude` caps, so that nothing else hides the error of their slopes.
        inputs = self.inputs(Case("", sizes(9, 3, 33), {"softcap": 2.5}), precise(backend))
        inputs["hidden"] = inputs["hidden"].sign() * (1 + inputs["hidden"].abs() / 30)
        inputs["weight"] = inputs["weight"].sign() * 2.5 * magnitude
        self.check_forward(inputs, backend)
        self.check_backward(inputs, backend)

    def test_gradient_is_probability_minus_target(self, backend):
        inputs = self.inputs(self.cases[0], precise(backend))
        keep = inputs["target"] != IGNORED
        probability = F.linear(inputs["hidden"], inputs["weight"], inputs["bias"]).softmax(-1)
        onehot = F.one_hot(inputs["target"].clamp_min(0), probability.size(-1))
        dlogits = (probability - onehot) * keep[:, None] / keep.sum()
        found = self.gradients(lambda i: self.run(i, backend), inputs, [torch.ones(())])
        torch.testing.assert_close(found["hidden"], dlogits @ inputs["weight"])
        torch.testing.assert_close(found["weight"], dlogits.T @ inputs["hidden"])
        torch.testing.assert_close(found["bias"], dlogits.sum(0))

    def test_whole_is_the_weighted_mean_of_its_parts(self, backend):
        inputs = self.inputs(Case("", sizes(20, 16, 33), {"ignored": True}), torch.float32)
        whole = self.run(inputs, backend)[0]
        total, count = torch.zeros(()), 0
        for rows in (slice(0, 5), slice(5, 6), slice(6, 20)):
            part = {**inputs, "hidden": inputs["hidden"][rows], "target": inputs["target"][rows]}
            kept = int((part["target"] != IGNORED).sum())
            total, count = total + kept * self.run(part, backend)[0], count + kept
        torch.testing.assert_close(whole, total / count)

    def test_ignored_rows_have_no_influence(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        ignored = inputs["target"] == IGNORED
        assert ignored.any()
        assert not ignored.all()
        expected = self.run(inputs, backend)[0]
        found = self.gradients(lambda i: self.run(i, backend), inputs, [torch.ones(())])
        assert (found["hidden"][ignored] == 0).all()
        inputs["hidden"][ignored] = 1e4
        other = self.gradients(lambda i: self.run(i, backend), inputs, [torch.ones(())])
        assert torch.equal(self.run(inputs, backend)[0], expected)
        assert (other["hidden"][ignored] == 0).all()
        assert torch.equal(other["weight"], found["weight"])

    def test_mean_over_no_row_is_nan_with_zero_gradients(self, backend):
        inputs = self.inputs(self.edge_cases[6], torch.float32)
        assert self.run(inputs, backend)[0].isnan()
        found = self.gradients(lambda i: self.run(i, backend), inputs, [torch.ones(())])
        assert all((grad == 0).all() for grad in found.values())

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    def test_compiled_keeps_ignored_rows_out(self, backend, reduction):
        torch._dynamo.reset()
        inputs = self.inputs(self.cases[8], torch.float32) | {"reduction": reduction}
        compiled = torch.compile(mbm_kernels.linear_cross_entropy, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs, backend=backend), *self.run(inputs, backend))

    def test_saturated_logits_are_finite(self, backend):
        hidden = torch.tensor([[400.0], [-400.0]], requires_grad=True)
        weight, target = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0])
        rows = mbm_kernels.linear_cross_entropy(
            hidden, weight, target, reduction="none", backend=backend
        )
        assert rows.tolist() == [0, 800]
        (grad,) = torch.autograd.grad(rows.sum(), hidden)
        assert grad.flatten().tolist() == [0, -2]

    def test_no_classes(self, backend):
        # As F.cross_entropy: only ignored targets can stand beside an empty vocabulary.
        hidden, weight = torch.randn(2, 3), torch.randn(0, 3)
        target = torch.full((2,), IGNORED)
        call = mbm_kernels.linear_cross_entropy
        assert call(hidden, weight, target, backend=backend).isnan()
        assert call(hidden, weight, target, reduction="sum", backend=backend) == 0
        with raises(ValueError, "target", "0 <= target < V = 0"):
            call(hidden, weight, target.clamp_min(0), backend=backend)

    def test_vmap_over_rows(self, backend):
        inputs = self.inputs(self.cases[2], torch.float32)
        weight = inputs["weight"]

        def one(hidden, target):
            return mbm_kernels.linear_cross_entropy(hidden, weight, target, backend=backend)

        rows = inputs["hidden"], inputs["target"]
        expected = torch.stack([one(h, t) for h, t in zip(*rows, strict=True)])
        actual = torch.vmap(one)(*rows)
        torch.testing.assert_close(actual, expected)

    def test_bad_input(self):
        good = self.inputs(self.cases[0], torch.float32)
        call = mbm_kernels.linear_cross_entropy

        def bad(**changes):
            return {**good, **changes}

        with raises(TypeError, "hidden", "torch.Tensor"):
            call(**bad(hidden=[1.0]))
        with raises(ValueError, "hidden", r"\[\.\.\., H\]"):
            call(**bad(hidden=torch.tensor(1.0)))
        with raises(ValueError, "weight", "2 dimensions"):
            call(**bad(weight=torch.randn(11)))
        with raises(ValueError, "weight", r"\[V, H\] = \[11, 5\]"):
            call(**bad(weight=torch.randn(11, 6)))
        with raises(ValueError, "bias", r"\[V\] = \[11\]"):
            call(**bad(bias=torch.randn(12)))
        with raises(TypeError, "weight", "float32 as hidden"):
            call(**bad(weight=good["weight"].double()))
        with raises(TypeError, "hidden", "int64", "float64, float32"):
            call(**bad(hidden=torch.ones(7, 5, dtype=torch.int64)))
        with raises(TypeError, "target", "int64", "long"):
            call(**bad(target=good["target"].int()))
        with raises(ValueError, "target", "leading dimensions"):
            call(**bad(target=good["target"][:-1]))
        with raises(ValueError, "target", "got the value 11", "0 <= target < V = 11"):
            call(**bad(target=torch.full((7,), 11)))
        with raises(ValueError, "target", "got the value -1", "ignore_index = -100"):
            call(**bad(target=torch.full((7,), -1)))
        with raises(ValueError, "target", "got the value -100", "ignore_index = 3"):
            call(**bad(ignore_index=3))
        with raises(ValueError, "weight", "meta", "cpu as hidden"):
            call(**bad(weight=good["weight"].to("meta")))
        with raises(ValueError, "target", "meta", "cpu as the hidden states"):
            call(**bad(target=good["target"].to("meta")))
        with raises(ValueError, "reduction", "'average'", "'none', 'mean', 'sum'"):
            call(**bad(reduction="average"))
        for name, values in {
            "label_smoothing": (-0.1, 1.5, float("nan")),
            "softcap": (0.0, -1.0, float("inf"), float("nan")),
            "z_loss": (-1e-4, float("inf"), float("nan")),
        }.items():
            for value in values:
                with raises(ValueError, f"{name}: got {value}", name):
                    call(**bad(**{name: value}))
        for name in ("label_smoothing", "z_loss", "softcap"):
            for value in ("0.5", True, torch.tensor(0.5)):
                with raises(TypeError, f"{name}: got", "expected a number", "float"):
                    call(**bad(**{name: value}))
        for value in (2.0, None, True):
            with raises(TypeError, "ignore_index: got", "expected an int", "int"):
                call(**bad(ignore_index=value))
        with raises(ValueError, "ignore_index", "64 bits"):
            call(**bad(ignore_index=2**63))
