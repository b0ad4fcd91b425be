"""linear_distillation_loss: the common suite, then its own properties."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels.ops.linear_distillation_loss import reference
from mbm_kernels.testing import Case, OpSuite
from mbm_kernels.testing.suite import map_floating, with_leaves
from tests.conftest import near, precise

IGNORED = -100
DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3), ("jsd", 0.9)]
STUDENT = ("student_hidden", "student_weight", "student_bias")


def sizes(n, h, g, v, k=0):
    return {"N": n, "H": h, "G": g, "V": v, "k": k}


def jsd(log_p, log_q, beta):
    p, q = log_p.exp(), log_q.exp()
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


class TestLinearDistillationLoss(OpSuite):
    op = "linear_distillation_loss"
    function = staticmethod(mbm_kernels.linear_distillation_loss)
    reference = staticmethod(reference.linear_distillation_loss)
    diff = STUDENT
    autocast_output = torch.float32
    cases = [
        Case(
            "primes, unequal hidden sizes",
            sizes(7, 5, 3, 11),
            {"bias": True, "ignored": True, "temperature": 2.0},
        ),
        Case("several tiles in each dimension", sizes(37, 67, 35, 131), {"ignored": True}),
        Case("leading dimensions", sizes(12, 8, 9, 19), {"bias": True, "lead": (3, 4)}),
        Case(
            "reverse KL in a sum",
            sizes(9, 16, 8, 33),
            {"divergence": "reverse_kl", "temperature": 3.0, "reduction": "sum", "ignored": True},
        ),
        Case(
            "JSD without reduction",
            sizes(9, 16, 8, 33),
            {"divergence": "jsd", "beta": 0.3, "reduction": "none", "ignored": True, "bias": True},
        ),
        Case(
            "JSD, sharpened",
            sizes(9, 16, 8, 33),
            {"divergence": "jsd", "beta": 0.9, "temperature": 0.5, "hard_weight": 0.2},
        ),
        Case(
            "teacher logits",
            sizes(9, 16, 0, 33),
            {"teacher": "logits", "temperature": 4.0, "lead": (3, 3), "ignored": True},
        ),
        Case(
            "top k",
            sizes(9, 16, 8, 33, k=5),
            {"teacher": "topk", "temperature": 2.0, "bias": True, "ignored": True},
        ),
        Case(
            "top k, reverse, no reduction",
            sizes(9, 16, 8, 33, k=5),
            {"teacher": "topk", "divergence": "reverse_kl", "reduction": "none", "lead": (9, 1)},
        ),
        Case("top k of all", sizes(6, 8, 8, 7, k=7), {"teacher": "topk", "divergence": "jsd"}),
        Case("only hard", sizes(9, 16, 8, 33), {"hard_weight": 1.0, "bias": True}),
        Case("only soft", sizes(9, 16, 8, 33), {"hard_weight": 0.0, "ignored": True}),
        Case("tiny magnitudes", sizes(9, 16, 8, 33), {"bias": True}, scale=1e-3),
        Case("large magnitudes", sizes(9, 16, 8, 33), {"bias": True}, scale=4),
        Case(
            "large magnitudes, reverse",
            sizes(9, 16, 8, 33),
            {"bias": True, "divergence": "reverse_kl"},
            scale=4,
        ),
        Case(
            "large magnitudes, JSD",
            sizes(9, 16, 8, 33),
            {"bias": True, "divergence": "jsd"},
            scale=4,
        ),
    ]
    edge_cases = [
        Case("all ones", sizes(1, 1, 1, 1), {"bias": True}),
        Case("no leading dimension", sizes(1, 4, 3, 6), {"bias": True, "lead": ()}),
        Case("no rows", sizes(0, 4, 3, 6), {"bias": True}),
        Case("no rows to sum", sizes(0, 4, 3, 6), {"reduction": "sum", "divergence": "jsd"}),
        Case("no rows of top k", sizes(0, 4, 3, 6, k=2), {"teacher": "topk", "reduction": "none"}),
        Case("no student features", sizes(3, 0, 4, 6), {"bias": True}),
        Case("no teacher features", sizes(3, 4, 0, 6), {"bias": True, "temperature": 2.0}),
        Case("all ignored", sizes(4, 3, 2, 6), {"bias": True, "ignored": "all"}),
        Case("all ignored in a sum", sizes(4, 3, 2, 6), {"ignored": "all", "reduction": "sum"}),
        Case(
            "all ignored, no reduction", sizes(4, 3, 2, 6), {"ignored": "all", "reduction": "none"}
        ),
        Case("top k of one", sizes(4, 3, 2, 6, k=1), {"teacher": "topk", "divergence": "jsd"}),
    ]

    def make(self, case, generator):
        n, h, g, v, k = (case.sizes[letter] for letter in "NHGVk")

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        options = dict(case.options)
        lead = options.pop("lead", (n,))
        ignored = options.pop("ignored", False)
        bias = options.pop("bias", False)
        source = options.pop("teacher", "hidden")
        inputs = {
            "student_hidden": randn(*lead, h),
            "student_weight": randn(v, h) / max(h, 1) ** 0.5,
            "target": torch.randint(0, v, lead, generator=generator),
            "student_bias": randn(v) if bias else None,
            "temperature": 1.0,
            "hard_weight": 0.5,
            "divergence": "forward_kl",
            "beta": 0.5,
            "ignore_index": IGNORED,
            "reduction": "mean",
            **options,
        }
        if source == "hidden":
            inputs["teacher_hidden"] = randn(*lead, g)
            inputs["teacher_weight"] = randn(v, g) / max(g, 1) ** 0.5
            inputs["teacher_bias"] = randn(v) if bias else None
        elif source == "logits":
            inputs["teacher_logits"] = 2 * randn(*lead, v)
        else:
            log_probs, ids = (2 * randn(*lead, v)).log_softmax(-1).topk(k)
            inputs["teacher_topk"] = (ids, log_probs)
        if ignored == "all":
            inputs["target"][:] = IGNORED
        elif ignored:
            inputs["target"].view(-1)[::3] = IGNORED
        return inputs

    def check_forward(self, inputs, backend):
        def forward(run, given, positive=False):
            with torch.no_grad():
                outputs = run(given)
                if positive:
                    # A divergence's terms have both signs whatever the inputs' signs: what bounds
                    # another order of summation is the sum of their absolute values.
                    bounds = zip(outputs, self.magnitudes(inputs), strict=True)
                    outputs = [torch.fmax(o, bound) for o, bound in bounds]
            return {f"output {i}": output for i, output in enumerate(outputs)}

        self.compare(forward, inputs, backend, gradient=False)

    def magnitudes(self, inputs):
        """The definition with sum a (|log a| + |log b|) for KL(a || b), in float64."""

        def magnitude(log_a, log_b):
            a = log_a.exp()
            return (a * (log_a.abs() + log_b.abs()).masked_fill(a == 0, 0)).sum(-1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "_kl", magnitude)
            return self.define(map_floating(inputs, torch.Tensor.double))

    def schema_args(self, inputs):
        named = dict(inputs)
        named["teacher_topk_ids"], named["teacher_topk_log_probs"] = inputs.get(
            "teacher_topk", (None, None)
        )
        return super().schema_args(named)

    def test_autocast(self, backend):
        for case in (self.cases[0], self.cases[6], self.cases[7]):
            inputs, leaves = with_leaves(self.inputs(case, torch.float32), self.diff)
            with torch.autocast("cpu", torch.bfloat16):
                outputs = self.run(inputs, backend)
            names = [n for n in inputs if n.startswith(("student_", "teacher_"))]
            names = [n for n in names if n not in ("teacher_logits", "teacher_topk")]
            if "teacher_hidden" in inputs:
                low = map_floating({n: inputs[n] for n in names}, lambda x: x.detach().bfloat16())
                expected = self.run({**inputs, **low}, backend)
                for output, e in zip(outputs, expected, strict=True):
                    assert torch.equal(output.bfloat16(), e)
                # Only stock's projections are rounded to bfloat16: softmax and sums are not.
                rounded = low if backend == "torch" else map_floating(low, torch.Tensor.double)
                logits = F.linear(*(rounded[name] for name in STUDENT)).double()
                exact = F.cross_entropy(logits, inputs["target"]).float()
                torch.testing.assert_close(outputs[1], exact, rtol=1e-6, atol=1e-6)
            grads = torch.autograd.grad(outputs[0], leaves.values())
            assert all(o.dtype == torch.float32 for o in outputs)
            assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)

    def student_logits(self, inputs):
        double = map_floating(inputs, torch.Tensor.double)
        return F.linear(*(double.get(name) for name in STUDENT))

    def logits(self, inputs):
        """Student's and teacher's, in float64."""
        double = map_floating(inputs, torch.Tensor.double)
        student = self.student_logits(inputs)
        if double.get("teacher_logits") is not None:
            return student, double["teacher_logits"]
        names = (name.replace("student", "teacher") for name in STUDENT)
        return student, F.linear(*(double.get(name) for name in names))

    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_equals_stock_losses(self, backend, temperature):
        inputs = self.inputs(self.cases[0], precise(backend)) | {"temperature": temperature}
        inputs |= {"hard_weight": 0.3}
        student, teacher = self.logits(inputs)
        keep = inputs["target"] != IGNORED
        expected_soft = temperature**2 * F.kl_div(
            (student[keep] / temperature).log_softmax(-1),
            (teacher[keep] / temperature).softmax(-1),
            reduction="batchmean",
        )
        expected_hard = F.cross_entropy(student, inputs["target"])
        loss, hard, soft = self.run(inputs, backend)
        near(hard, expected_hard)
        near(soft, expected_soft)
        near(loss, 0.3 * expected_hard + 0.7 * expected_soft)

    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_equals_divergences_of_distributions(self, backend, temperature):
        inputs = self.inputs(self.cases[2], precise(backend))
        inputs |= {"temperature": temperature, "reduction": "none"}
        student, teacher = (x / temperature for x in self.logits(inputs))
        q, p = (torch.distributions.Categorical(logits=x) for x in (student, teacher))
        kl = torch.distributions.kl_divergence
        expected = {
            ("forward_kl", 0.5): kl(p, q),
            ("reverse_kl", 0.5): kl(q, p),
            ("jsd", 0.3): jsd(p.logits, q.logits, 0.3),
            ("jsd", 0.9): jsd(p.logits, q.logits, 0.9),
        }
        for (divergence, beta), value in expected.items():
            _, _, soft = self.run({**inputs, "divergence": divergence, "beta": beta}, backend)
            near(soft, temperature**2 * value)

    @pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
    def test_gradient_is_its_closed_form(self, backend, divergence, beta):
        inputs = self.inputs(self.cases[0], precise(backend))
        inputs |= {"divergence": divergence, "beta": beta, "hard_weight": 0.0}
        temperature = inputs["temperature"]
        log_q, log_p = ((x / temperature).log_softmax(-1) for x in self.logits(inputs))
        p, q = log_p.exp(), log_q.exp()
        log_ratio = log_q - (
            log_p if divergence == "reverse_kl" else (beta * p + (1 - beta) * q).log()
        )
        expected = q * (log_ratio - (q * log_ratio).sum(-1, keepdim=True))
        if divergence == "jsd":
            expected = (1 - beta) * expected
        elif divergence == "forward_kl":
            expected = q - p
        keep = inputs["target"] != IGNORED
        dlogits = temperature * expected * keep[:, None] / keep.sum()
        one = [torch.ones(()), torch.zeros(()), torch.zeros(())]
        found = self.gradients(lambda i: self.run(i, backend), inputs, one)
        near(found["student_hidden"], dlogits @ inputs["student_weight"].double())
        near(found["student_weight"], dlogits.T @ inputs["student_hidden"].double())
        near(found["student_bias"], dlogits.sum(0))

    @pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
    @pytest.mark.parametrize("source", ["hidden", "topk"])
    def test_second_derivatives_equal_differences(self, divergence, beta, source):
        # Every backend's second derivatives are the reference's; differences need float64.
        options = {"teacher": source, "divergence": divergence, "beta": beta, "bias": True}
        inputs = self.inputs(Case("", sizes(2, 2, 2, 4, k=2), options), torch.float64)
        inputs["temperature"] = 1.5

        def call(*values):
            return self.run({**inputs, **dict(zip(STUDENT, values, strict=True))}, "torch")

        leaves = [inputs[name].requires_grad_() for name in STUDENT]
        assert torch.autograd.gradgradcheck(call, leaves)

    @pytest.mark.parametrize("index", [0, 6, 7])
    def test_jsd_ends_are_the_two_divergences(self, backend, index):
        inputs = self.inputs(self.cases[index], torch.float32)
        for beta, divergence in ((0, "forward_kl"), (1, "reverse_kl")):
            expected = self.run({**inputs, "divergence": divergence}, backend)
            actual = self.run({**inputs, "divergence": "jsd", "beta": beta}, backend)
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    @pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
    def test_top_k_of_all_equals_logits(self, backend, divergence, beta, temperature):
        inputs = self.inputs(self.cases[6], precise(backend))
        inputs |= {"divergence": divergence, "beta": beta, "temperature": temperature}
        expected = self.run(inputs, backend)
        teacher = inputs.pop("teacher_logits")
        log_probs, ids = teacher.log_softmax(-1).topk(teacher.size(-1))
        actual = self.run({**inputs, "teacher_topk": (ids, log_probs)}, backend)
        torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
    def test_top_k_equals_logits_of_its_bins(self, backend, divergence, beta):
        inputs = self.inputs(self.cases[7], precise(backend))
        inputs |= {"divergence": divergence, "beta": beta, "reduction": "none"}
        ids, log_probs = inputs["teacher_topk"]
        q = self.student_logits(inputs).softmax(-1).gather(-1, ids)
        bins = [
            torch.cat((x, 1 - x.sum(-1, keepdim=True)), -1).log().to(precise(backend))
            for x in (q, log_probs.double().exp())
        ]
        k = bins[0].size(-1)
        expected = self.run(
            {
                **inputs,
                "student_hidden": bins[0],
                "student_weight": torch.eye(k, dtype=precise(backend)),
                "student_bias": None,
                "target": inputs["target"].clamp_max(0),
                "teacher_topk": None,
                "teacher_logits": bins[1],
            },
            backend,
        )[2]
        torch.testing.assert_close(self.run(inputs, backend)[2], expected)

    @pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
    def test_more_bins_never_lower_the_divergence(self, backend, divergence, beta):
        inputs = self.inputs(self.cases[6], precise(backend))
        inputs |= {"divergence": divergence, "beta": beta, "temperature": 1.0, "reduction": "none"}
        log_probs, ids = inputs.pop("teacher_logits").log_softmax(-1).topk(33)
        rows = [
            self.run({**inputs, "teacher_topk": (ids[..., :k], log_probs[..., :k])}, backend)[2]
            # In float32, 1 - sum p of all but one class is mostly rounding.
            for k in ((1, 4, 16, 32, 33) if precise(backend) == torch.float64 else (1, 4, 16, 33))
        ]
        kept = inputs["target"] != IGNORED
        for fewer, more in pairwise(rows):
            assert (more[kept] > fewer[kept] - 1e-12).all()
        assert (rows[-1][kept] > rows[0][kept]).all()

    @pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_equal_student_has_no_loss_and_no_gradient(
        self, backend, divergence, beta, temperature
    ):
        inputs = self.inputs(self.cases[1], torch.float32)
        for name in STUDENT:
            inputs[name.replace("student", "teacher")] = inputs[name]
        inputs |= {"divergence": divergence, "beta": beta, "temperature": temperature}
        inputs |= {"hard_weight": 0.0}
        loss, _, soft = self.run(inputs, backend)
        eps = torch.finfo(torch.float32).eps
        assert abs(float(soft)) <= 16 * eps * temperature**2
        assert torch.equal(loss, soft)
        one = [torch.ones(()), torch.zeros(()), torch.zeros(())]
        for grad in self.gradients(lambda i: self.run(i, backend), inputs, one).values():
            assert grad.abs().max() <= 16 * eps * temperature

    @pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
    @pytest.mark.parametrize("source", ["logits", "topk"])
    def test_underflow_is_finite_and_not_negative(self, backend, divergence, beta, source):
        student = torch.tensor([[0.0, 300, -300, 90], [500, 0, 0, 0], [0, 0, 0, 1e4]])
        teacher = torch.tensor([[300.0, 0, -300, 80], [0, 0, 0, 500], [0, 0, 0, 1e4]])
        inputs = {
            "student_hidden": student,
            "student_weight": torch.eye(4),
            "target": torch.zeros(3, dtype=torch.int64),
            "divergence": divergence,
            "beta": beta,
            "reduction": "none",
        }
        if source == "logits":
            inputs["teacher_logits"] = teacher
        else:
            log_probs, ids = teacher.log_softmax(-1).topk(2)
            inputs["teacher_topk"] = (ids, log_probs)
        _, _, soft = self.run(inputs, backend)
        one = [torch.zeros(3), torch.zeros(3), torch.ones(3)]
        found = self.gradients(lambda i: self.run(i, backend), inputs, one)
        assert torch.isfinite(soft).all()
        assert (soft >= 0).all()
        # A tail of 2^-23 is what top-k can know; at a gap of 1e4 it is worth 1e-3.
        assert soft[2] <= (1e-5 if source == "logits" else 1e4 * 2**-23 * 1.01)
        assert all(torch.isfinite(grad).all() for grad in found.values())
        self.check_forward(inputs, backend)
        self.check_backward(inputs, backend)

    @pytest.mark.parametrize(("divergence", "beta"), DIVERGENCES)
    def test_banned_tokens_add_nothing(self, backend, divergence, beta):
        inputs = self.inputs(self.cases[0], torch.float32)
        inputs |= {"divergence": divergence, "beta": beta, "target": torch.arange(7) % 9}
        fewer = dict(inputs)
        for name in ("student_weight", "teacher_weight", "student_bias", "teacher_bias"):
            fewer[name] = inputs[name][:9]
        for name in ("student_bias", "teacher_bias"):
            inputs[name][9:] = -float("inf")
        torch.testing.assert_close(self.run(inputs, backend), self.run(fewer, backend))
        one = [torch.ones(())] * 3
        found, expected = (
            self.gradients(lambda i: self.run(i, backend), given, one) for given in (inputs, fewer)
        )
        torch.testing.assert_close(found["student_hidden"], expected["student_hidden"])
        assert (found["student_weight"][9:] == 0).all()
        masked = {k: v for k, v in inputs.items() if not k.startswith("teacher")}
        teacher = F.linear(*(inputs[n.replace("student", "teacher")] for n in STUDENT))
        by_logits = self.run({**masked, "teacher_logits": teacher}, backend)
        torch.testing.assert_close(by_logits, self.run(fewer, backend))

    def test_whole_is_the_weighted_mean_of_its_parts(self, backend):
        inputs = self.inputs(Case("", sizes(20, 16, 8, 33), {"ignored": True}), torch.float32)
        whole = self.run(inputs, backend)
        totals, count = [torch.zeros(())] * 3, 0
        for rows in (slice(0, 5), slice(5, 6), slice(6, 20)):
            names = ("student_hidden", "teacher_hidden", "target")
            part = {**inputs, **{name: inputs[name][rows] for name in names}}
            kept = int((part["target"] != IGNORED).sum())
            found = self.run(part, backend)
            totals = [t + kept * f for t, f in zip(totals, found, strict=True)]
            count += kept
        torch.testing.assert_close(whole, tuple(t / count for t in totals))

    def test_ignored_rows_have_no_influence(self, backend):
        for case in (self.cases[0], self.cases[6], self.cases[7]):
            inputs = self.inputs(case, torch.float32)
            ignored = inputs["target"] == IGNORED
            expected = self.run(inputs, backend)
            inputs["student_hidden"][ignored] = 77.0
            for name in ("teacher_hidden", "teacher_logits"):
                if name in inputs:
                    inputs[name][ignored] = -1e4
            if "teacher_topk" in inputs:
                for x in inputs["teacher_topk"]:
                    x[ignored] = 0
            assert all(
                torch.equal(a, e) for a, e in zip(self.run(inputs, backend), expected, strict=True)
            )

    @pytest.mark.parametrize("index", [0, 4, 6, 7, 8])
    def test_compiled_equals_eager(self, backend, index):
        torch._dynamo.reset()
        inputs = self.inputs(self.cases[index], torch.float32)
        compiled = torch.compile(
            mbm_kernels.linear_distillation_loss, fullgraph=True, backend="eager"
        )
        torch.testing.assert_close(compiled(**inputs, backend=backend), self.run(inputs, backend))
