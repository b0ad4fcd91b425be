"""Ignored rows of the losses: what they hold is not read, and whatever arrives they get 0."""

import torch

import mbm_kernels

from .test_indices import IGNORED, LOSSES, MODES, N, evaluate, every, op_of

PLAIN_AND_MODES = ("plain", *MODES)
ROWS = [0, 4, N - 1]
SPOILT = (float("nan"), float("inf"))
READ_BY_ROW = ("hidden", "student_hidden", "teacher_hidden", "teacher_logits")


def with_rows_of(value, inputs):
    """`inputs` whose ignored rows hold `value`, and ids that are no classes where that is NaN."""
    inputs = dict(inputs)
    for name in READ_BY_ROW:
        if name in inputs:
            inputs[name] = inputs[name].clone()
            inputs[name][ROWS] = value
    if "teacher_topk" in inputs:
        ids, log_probs = (x.clone() for x in inputs["teacher_topk"])
        log_probs[ROWS] = value
        if value != value:
            ids[ROWS] = torch.tensor([[2**40], [-1], [2**63 - 1]])
        inputs["teacher_topk"] = (ids, log_probs)
    return inputs


def make(name, reduction):
    maker, diff = LOSSES[name]
    inputs = maker(reduction=reduction)
    inputs["target"][ROWS] = IGNORED
    return inputs, diff


@every(LOSSES, PLAIN_AND_MODES, ["reference"], reduction=("none", "mean", "sum"))
def test_what_they_hold_is_not_read(name, backend, mode, reduction):
    inputs, diff = make(name, reduction)
    expected = evaluate(op_of(name), with_rows_of(0.0, inputs), diff, backend, mode)
    found = evaluate(op_of(name), with_rows_of(torch.nan, inputs), diff, backend, mode)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(x.isfinite().all() for x in found[1].values())


@every(LOSSES, PLAIN_AND_MODES, ["reference"], value=SPOILT)
def test_what_arrives_without_reduction_is_not_read(name, backend, mode, value):
    inputs, diff = make(name, "none")
    grad = torch.randn(N)
    grad[ROWS] = 0
    expected = evaluate(op_of(name), inputs, diff, backend, mode, grad)
    grad[ROWS] = value
    found = evaluate(op_of(name), inputs, diff, backend, mode, grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert (found[1][diff[0]][ROWS] == 0).all()


@every(LOSSES, PLAIN_AND_MODES, ["reference"], reduction=("mean", "sum"), value=SPOILT)
def test_a_reduced_loss_spoils_the_other_rows_alone(name, backend, mode, reduction, value):
    inputs, diff = make(name, reduction)
    hidden, *others = evaluate(op_of(name), inputs, diff, backend, mode, value)[1].values()
    kept = torch.ones(N, dtype=torch.bool)
    kept[ROWS] = False
    assert (hidden[ROWS] == 0).all()
    assert not hidden[kept].isfinite().any()
    assert not any(grad.isfinite().any() for grad in others)


@every(LOSSES, value=(*SPOILT, 2.0))
def test_the_gradients_of_the_first_result_alone(name, backend, mode, value):
    """Which a forward makes, for a gradient of 1."""
    inputs, diff = make(name, "mean")
    leaves = [inputs[n].requires_grad_() for n in diff]
    outputs = getattr(mbm_kernels, op_of(name))(**inputs, backend=backend)
    loss = outputs[0] if isinstance(outputs, tuple) else outputs
    for keep in (True, False):
        (hidden, *_) = torch.autograd.grad(loss, leaves, torch.tensor(value), retain_graph=keep)
        assert (hidden[ROWS] == 0).all()
        assert hidden[1].isfinite().all() == (value == 2)
