"""Problem descriptors of the linear heads, their losses, contrastive_loss and concat_linear: what a
call like an earlier one may not let pass."""

import importlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mbm_kernels import ops
from mbm_kernels._core import native, problem
from mbm_kernels._core.op import OPS
from mbm_kernels.ops.contrastive_loss import problem as contrastive_problem
from mbm_kernels.ops.linear_cross_entropy import problem as cross_entropy_problem

N, H, V = 6, 5, 9
BACKENDS = [
    "torch",
    pytest.param(
        "cpu", marks=pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
    ),
]
needs_cpu = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")


def cross_entropy():
    target = torch.arange(N) % V
    return {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "target": target}


def topk():
    return {
        "hidden": torch.randn(N, H),
        "weight": torch.randn(V, H),
        "bias": torch.randn(V),
        "k": 3,
    }


def distillation(source: str = "teacher_logits"):
    student = {f"student_{name}": x for name, x in cross_entropy().items() if name != "target"}
    log_probs, ids = torch.randn(N, V).log_softmax(-1).topk(4)
    teachers = {
        "teacher_logits": {"teacher_logits": torch.randn(N, V)},
        "teacher_topk": {"teacher_topk": (ids, log_probs)},
        "teacher_hidden": {
            "teacher_hidden": torch.randn(N, 4),
            "teacher_weight": torch.randn(V, 4),
        },
    }
    return {**student, "target": torch.arange(N) % V, **teachers[source]}


def contrastive():
    scale, bias = torch.tensor(2.0), torch.tensor(-1.0)
    return {"image": torch.randn(N, H), "text": torch.randn(N, H), "scale": scale, "bias": bias}


def concat():
    parts = [torch.randn(2, 3, H), torch.randn(2, 1, 4)]
    return {"inputs": parts, "weight": torch.randn(V, H + 4), "bias": torch.randn(V)}


LEGAL = {
    "linear_cross_entropy": cross_entropy,
    "linear_topk": topk,
    "linear_distillation_loss": distillation,
    "contrastive_loss": contrastive,
    "concat_linear": concat,
}
WRONG = [
    ("linear_cross_entropy", {"target": torch.full((N,), V)}, ValueError, "target"),
    ("linear_cross_entropy", {"target": torch.arange(N).int()}, TypeError, "target"),
    ("linear_cross_entropy", {"hidden": torch.randn(N, H).double()}, TypeError, "weight"),
    ("linear_cross_entropy", {"weight": torch.randn(V, H + 1)}, ValueError, "weight"),
    ("linear_cross_entropy", {"bias": torch.randn(V + 1)}, ValueError, "bias"),
    ("linear_cross_entropy", {"z_loss": False}, TypeError, "z_loss"),
    ("linear_cross_entropy", {"label_smoothing": False}, TypeError, "label_smoothing"),
    ("linear_cross_entropy", {"ignore_index": -100.0}, TypeError, "ignore_index"),
    ("linear_cross_entropy", {"reduction": "max"}, ValueError, "reduction"),
    ("linear_topk", {"k": 3.0}, ValueError, "k"),
    ("linear_topk", {"k": V + 1}, ValueError, "k"),
    ("linear_topk", {"bias": [0.0] * V}, TypeError, "bias"),
    ("linear_topk", {"weight": torch.randn(V, H).half()}, TypeError, "weight"),
    ("linear_distillation_loss", {"target": torch.full((N,), -1)}, ValueError, "target"),
    ("linear_distillation_loss", {"teacher_logits": None}, ValueError, "teacher"),
    ("linear_distillation_loss", {"teacher_hidden": torch.randn(N, 4)}, ValueError, "teacher"),
    ("linear_distillation_loss", {"teacher_bias": torch.randn(V)}, ValueError, "teacher_bias"),
    ("linear_distillation_loss", {"teacher_topk": torch.randn(N, V)}, ValueError, "teacher"),
    ("linear_distillation_loss", {"temperature": True}, TypeError, "temperature"),
    ("linear_distillation_loss", {"divergence": "kl"}, ValueError, "divergence"),
    ("contrastive_loss", {"scale": float("inf")}, ValueError, "scale"),
    ("contrastive_loss", {"scale": True}, TypeError, "scale"),
    ("contrastive_loss", {"bias": [0.0]}, TypeError, "bias"),
    ("contrastive_loss", {"kind": "clip"}, ValueError, "kind"),
    ("contrastive_loss", {"text": torch.randn(N, H + 1)}, ValueError, "text"),
    ("contrastive_loss", {"text": torch.randn(N, H).double()}, TypeError, "text"),
    ("concat_linear", {"weight": torch.randn(V, H)}, ValueError, "weight"),
    ("concat_linear", {"inputs": [torch.randn(2, 3, H)]}, ValueError, "weight"),
]


def leaves_of(inputs):
    flat = [y for x in inputs.values() for y in (x if isinstance(x, (list, tuple)) else [x])]
    return [x for x in flat if isinstance(x, torch.Tensor) and x.requires_grad]


def outputs_of(found):
    return found if isinstance(found, tuple) else (found,)


def call(op, inputs, **options):
    found = getattr(ops, op)(**inputs, **options)
    return outputs_of(found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("op", "wrong", "error", "name"), WRONG)
def test_nothing_slips_by_a_call_that_is_remembered(op, wrong, error, name, backend):
    legal = LEGAL[op]()
    for _ in range(2):
        call(op, legal, backend=backend)
        call(op, legal, backend=backend)
        with pytest.raises(error, match=f"{op}: {name}"):
            call(op, {**legal, **wrong}, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_checked_at_each_call(backend):
    inputs = distillation("teacher_topk")
    ids, log_probs = inputs["teacher_topk"]
    for _ in range(2):
        call("linear_distillation_loss", inputs, backend=backend)
        for wrong in ((ids + V, log_probs), (ids, log_probs + 3)):
            with pytest.raises(ValueError, match="linear_distillation_loss: "):
                call("linear_distillation_loss", {**inputs, "teacher_topk": wrong})


def trainable(op):
    """Inputs whose floating tensors want gradients, but a teacher's."""

    def leaf(x):
        return x.requires_grad_() if x.is_floating_point() else x

    made = {}
    for name, x in LEGAL[op]().items():
        if isinstance(x, list):
            made[name] = [leaf(y) for y in x]
        else:
            made[name] = leaf(x) if isinstance(x, torch.Tensor) and "teacher" not in name else x
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", LEGAL)
@pytest.mark.parametrize("guarded", [True, False], ids=["guards", "keys"])
class TestRemembered:
    """What a call and those like it share, found by their guard or by their key."""

    @pytest.fixture(autouse=True)
    def _found_by(self, op, guarded, monkeypatch):
        importlib.import_module(f"mbm_kernels.ops.{op}.problem").PROBLEMS.clear()
        if not guarded:
            monkeypatch.setattr(problem, "_guards_hold", lambda: False)

    def test_results_and_gradients_are_those_of_the_first(self, op, backend):
        inputs = trainable(op)
        runs = []
        for _ in range(3):
            outputs = call(op, inputs, backend=backend)
            grads = torch.autograd.grad(outputs[0].sum(), leaves_of(inputs), allow_unused=True)
            with torch.no_grad():
                runs.append((*outputs, *grads, *call(op, inputs, backend=backend)))
        for again in runs[1:]:
            for a, e in zip(again, runs[0], strict=True):
                assert (a is None and e is None) or torch.equal(a, e)

    def test_backward_twice_and_of_a_few(self, op, backend):
        inputs = trainable(op)
        leaves = leaves_of(inputs)
        for _ in range(2):
            first = call(op, inputs, backend=backend)[0].sum() * 3
            full = torch.autograd.grad(first, leaves, retain_graph=True, allow_unused=True)
            again = torch.autograd.grad(first, leaves, retain_graph=True, allow_unused=True)
            (last,) = torch.autograd.grad(first, leaves[-1], allow_unused=True)
            for a, e in zip((*again, last), (*full, full[-1]), strict=True):
                assert (a is None and e is None) or torch.equal(a, e)

    def test_differentiated_twice(self, op, backend):
        found = []
        inputs = trainable(op)
        leaves = leaves_of(inputs)
        for _ in range(2):
            first = call(op, inputs, backend=backend)[0].sum()
            named = {"allow_unused": True, "materialize_grads": True}
            grads = torch.autograd.grad(first, leaves, create_graph=True, **named)
            total = sum(g.square().sum() for g in grads)
            found.append(torch.autograd.grad(total, leaves, **named))
        for a, e in zip(*found, strict=True):
            torch.testing.assert_close(a, e)

    def test_backward_within_a_mode(self, op, backend):
        inputs = trainable(op)
        leaves = leaves_of(inputs)
        for _ in range(2):
            outputs = call(op, inputs, backend=backend)
            expected = torch.autograd.grad(
                outputs[0].sum(), leaves, retain_graph=True, allow_unused=True
            )
            with FlopCounterMode(display=False):
                found = torch.autograd.grad(outputs[0].sum(), leaves, allow_unused=True)
            for a, e in zip(found, expected, strict=True):
                assert (a is None and e is None) or torch.allclose(a, e, atol=1e-6)


@needs_cpu
@pytest.mark.parametrize("op", LEGAL)
def test_a_checkpoint_runs_a_first_call_again(op):
    """Whatever it saves the first time, it saves again."""
    importlib.import_module(f"mbm_kernels.ops.{op}.problem").PROBLEMS.clear()
    for _ in range(2):
        inputs = trainable(op)
        outputs = checkpoint(call, op, inputs, backend="cpu", use_reentrant=False)
        found = torch.autograd.grad(outputs[0].sum(), leaves_of(inputs), allow_unused=True)
        expected = call(op, inputs, backend="cpu")[0].sum()
        for a, e in zip(
            found, torch.autograd.grad(expected, leaves_of(inputs), allow_unused=True), strict=True
        ):
            assert (a is None and e is None) or torch.equal(a, e)


@needs_cpu
@pytest.mark.parametrize("output", [1, 2])
def test_a_later_output_has_gradients_of_its_own(output):
    """Gradients made in the forward are those of the loss alone."""
    inputs = trainable("linear_distillation_loss")
    expected = call("linear_distillation_loss", inputs, backend="torch")[output]
    for _ in range(2):
        found = call("linear_distillation_loss", inputs, backend="cpu")[output]
        for a, e in zip(
            torch.autograd.grad(found, leaves_of(inputs)),
            torch.autograd.grad(expected, leaves_of(inputs), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, e)


@needs_cpu
def test_a_call_with_leading_dimensions_is_remembered_too():
    hidden, weight = torch.randn(2, 3, H), torch.randn(V, H)
    target = torch.arange(N).view(2, 3) % V
    for function, expected in (
        (ops.linear_cross_entropy, (2, 3)),
        (lambda *a, **o: ops.linear_topk(*a[:2], k=2, backend="cpu")[0], (2, 3, 2)),
    ):
        runs = [function(hidden, weight, target, reduction="none", backend="cpu") for _ in range(3)]
        assert all(run.shape == expected and torch.equal(run, runs[0]) for run in runs)


def test_options_have_problems_of_their_own():
    found = cross_entropy_problem
    tensors = (*cross_entropy().values(), None)
    options = (-100, 0.0, None, 0.0, "mean")
    first = found.find(*tensors, *options)
    assert found.find(*tensors, *options) is first
    for position, other in ((0, -1), (1, 0.1), (2, 30.0), (3, 0.1), (4, "none")):
        changed = (*options[:position], other, *options[position + 1 :])
        assert found.find(*tensors, *changed).options == changed
    image, text, scale, _ = contrastive().values()
    kinds = [contrastive_problem.find(image, text, scale, None, k) for k in ("infonce", "siglip")]
    assert [p.sizes["siglip"] for p in kinds] == [0, 1]


def test_each_operation_has_a_problem():
    for op in LEGAL:
        assert OPS[op].problem is not None
