"""The C++ kernel of linear_distillation_loss: builds, chunks, threads, which gradients it makes."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels._core.op import OPS
from mbm_kernels.testing.suite import with_leaves
from tests.conftest import precise

from .test_linear_distillation_loss import TestLinearDistillationLoss as Suite

IGNORED = -100
STUDENT = ("student_hidden", "student_weight", "student_bias")
DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3)]


def make(n, hs, ht, v, k=0, ignored=0.3, **options):
    generator = torch.Generator().manual_seed(n + v)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    target = torch.randint(v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < ignored] = IGNORED
    inputs = {
        "student_hidden": randn(n, hs),
        "student_weight": randn(v, hs),
        "student_bias": randn(v),
        "target": target,
        "temperature": 2.0,
        **options,
    }
    if k:
        log_probs, ids = randn(n, v).log_softmax(-1).topk(k)
        return {**inputs, "teacher_topk": (ids, log_probs)}
    if ht == 0:
        return {**inputs, "teacher_logits": randn(n, v)}
    return {**inputs, "teacher_hidden": randn(n, ht), "teacher_weight": randn(v, ht)}


def results(inputs, backend="cpu", weights=(1.0, 0.0, 0.0)):
    """loss, hard, soft, and the student's gradients of their sum by `weights`."""
    leaves = [inputs[name].detach().requires_grad_() for name in STUDENT]
    named = {**inputs, **dict(zip(STUDENT, leaves, strict=True))}
    outputs = mbm_kernels.linear_distillation_loss(**named, backend=backend)
    total = sum((w * o).sum() for w, o in zip(weights, outputs, strict=True) if w)
    return *(o.detach() for o in outputs), *torch.autograd.grad(total, leaves)


def check(inputs, weights=(1.0, 0.0, 0.0), backend="cpu"):
    """Results, and the gradients of their sum by `weights`, by the error rule."""

    def evaluate(run, given, positive=False):
        given, leaves = with_leaves(given, STUDENT)
        pairs = [(o, abs(w) if positive else w) for o, w in zip(run(given), weights, strict=True)]
        chosen = [(o, torch.full_like(o, w)) for o, w in pairs if w]
        outputs, grads = zip(*chosen, strict=True)
        found = torch.autograd.grad(outputs, list(leaves.values()), grads)
        return dict(zip(leaves, found, strict=True))

    Suite().check_forward(inputs, backend)
    Suite().compare(evaluate, inputs, backend, gradient=True)


# Past a block of classes (112), a panel of rows (32), a slice of depth (256) and a chunk (10 MB).
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "sizes", [(33, 3, 5, 113, 0), (40, 300, 257, 130, 0), (70, 5, 0, 250, 0), (70, 5, 0, 250, 9)]
)
def test_every_build(isa, sizes, divergence):
    kind, beta = divergence
    check(make(*sizes, divergence=kind, beta=beta, hard_weight=0.3))


@pytest.mark.parametrize(("k", "ht"), [(0, 7), (0, 0), (5, 0)])
def test_more_than_a_chunk_and_the_same_bits_for_any_threads(k, ht):
    inputs = make(160, 19, ht, 20011, k, ignored=0.1, divergence="jsd", beta=0.3)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(inputs))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
    check(inputs)


@pytest.mark.parametrize("weights", [(0.25, 0, 0), (1, 1, 1), (0, 1, 0), (0, 0, -2), (0.5, 0, 3)])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_all_three_results(weights, hard_weight, reduction):
    inputs = make(40, 6, 7, 130, hard_weight=hard_weight, reduction=reduction)
    check(inputs, weights)


@pytest.mark.parametrize("k", [1, 8, 129, 130])
def test_top_k(k):
    for kind, beta in DIVERGENCES:
        options = {"divergence": kind, "beta": beta, "reduction": "none"}
        check(make(40, 6, 0, 130, k, **options), (1, 0, 1))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_makes_the_gradients_that_are_wanted(reduction):
    inputs = make(9, 4, 5, 11)
    op = OPS["linear_distillation_loss"]
    named = {"ignore_index": IGNORED, "hard_weight": 0.5, "divergence": "forward_kl", "beta": 0.5}
    named |= {**inputs, "reduction": reduction, "save": [False, True, False]}
    outputs = op.registered(*(named.get(name) for name in op.inputs), "cpu")
    wanted = (11, 4) if reduction == "mean" else (0,)
    assert [x.shape for x in outputs[3:]] == [(0,), wanted, (0,)]
    if reduction == "mean":
        assert torch.equal(outputs[4], results(inputs)[4])


def test_a_banned_token_and_large_logits():
    inputs = make(40, 6, 0, 130, hard_weight=0.5)
    inputs["student_bias"][5] = -torch.inf
    inputs["teacher_logits"][:, 5] = -torch.inf
    inputs["target"] = torch.where(inputs["target"] == 5, 6, inputs["target"])
    inputs["student_hidden"] *= 1e3
    inputs["teacher_logits"] *= 1e3
    assert all(x.isfinite().all() for x in results(inputs))
    check(inputs)


@pytest.mark.parametrize("where", ["student_hidden", "teacher_logits"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_as_torch(where, value):
    inputs = make(40, 6, 0, 130, ignored=0, reduction="none")
    inputs[where][3, 2] = value
    for a, b in zip(results(inputs), results(inputs, "torch"), strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("k", [0, 3])
def test_second_derivatives(k):
    def second(run, given, positive=False):
        given, leaves = with_leaves(given, STUDENT)
        values = list(leaves.values())
        first = torch.autograd.grad(sum(o.sin() for o in run(given)), values, create_graph=True)
        found = torch.autograd.grad(sum(g.pow(2).sum() for g in first), values)
        return dict(zip(leaves, found, strict=True))

    Suite().compare(second, make(5, 3, 4, 9, k), "cpu", gradient=True)


def test_student_equal_to_teacher_has_no_soft_loss():
    inputs = make(40, 6, 0, 130)
    inputs["teacher_logits"] = F.linear(*(inputs[name] for name in STUDENT))
    Suite().check_forward(inputs, "cpu")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_opcheck_of_top_k(backend):
    suite = Suite()
    inputs, _ = with_leaves(suite.inputs(suite.cases[7], torch.float32), suite.diff)
    args = (*suite.schema_args(inputs), backend)
    checked = torch.library.opcheck(OPS[suite.op].registered, args)
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_reference_of_the_schema_takes_top_k(backend):
    suite = Suite()
    inputs = suite.inputs(suite.cases[7], precise(backend))
    names = OPS[suite.op].reference_inputs
    named = dict(zip(names, suite.schema_args(inputs), strict=False))  # `save` comes last
    torch.testing.assert_close(OPS[suite.op].reference(**named), suite.run(inputs, backend))
