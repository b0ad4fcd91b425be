"""The Triton kernels of linear_distillation_loss: tiles, chunks, precision, bad ids."""

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import triton_launch
from mbm_kernels._core.op import OPS
from mbm_kernels.gate import cases
from mbm_kernels.ops.linear_head import linear_head
from mbm_kernels.testing import Case

from .test_linear_distillation_loss import IGNORED, STUDENT, sizes
from .test_linear_distillation_loss import TestLinearDistillationLoss as Suite
from .test_linear_distillation_loss_native import check

OP = OPS["linear_distillation_loss"]


def make(n, h, g, v, k=0, dtype=torch.float32, **options):
    options = {"bias": True, "ignored": True, **options}
    return Suite().inputs(Case("", sizes(n, h, g, v, k=k), options), dtype)


def run(inputs, grads=None, backend="triton"):
    leaves = [inputs[name].detach().requires_grad_() for name in STUDENT]
    named = {**inputs, **dict(zip(STUDENT, leaves, strict=True))}
    outputs = mbm_kernels.linear_distillation_loss(**named, backend=backend)
    chosen = outputs if grads is not None else outputs[:1]
    return (*(o.detach() for o in outputs), *torch.autograd.grad(chosen, leaves, grads))


# Past one tile of classes and of two (1024, 2048); half precision is half as wide in place.
@pytest.mark.parametrize(
    ("classes", "divergence", "temperature"),
    [(1025, "forward_kl", 1.0), (2049, "reverse_kl", 4.0), (4103, "jsd", 1.5)],
)
@pytest.mark.parametrize(
    ("dtype", "teacher"), [(torch.float32, "hidden"), (torch.bfloat16, "logits")]
)
def test_past_a_tile(classes, divergence, temperature, dtype, teacher):
    options = {"divergence": divergence, "temperature": temperature, "teacher": teacher}
    inputs = make(3, 5, 3, classes, dtype=dtype, **options)
    Suite().check_forward(inputs, "triton")
    Suite().check_backward(inputs, "triton")
    check(inputs, backend="triton")  # of the loss alone, by what the forward made


@pytest.mark.parametrize("k", [65, 130])
@pytest.mark.parametrize(
    ("divergence", "temperature", "dtype"),
    [("forward_kl", 2.0, torch.float32), ("jsd", 0.7, torch.float16)],
)
def test_more_ids_than_a_tile(k, divergence, temperature, dtype):
    options = {"teacher": "topk", "divergence": divergence, "temperature": temperature}
    inputs = make(4, 5, 3, 130, k=k, dtype=dtype, **options)
    Suite().check_forward(inputs, "triton")
    Suite().check_backward(inputs, "triton")


@pytest.mark.parametrize("teacher", ["hidden", "logits", "topk"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_chunks(monkeypatch, teacher, reduction, dtype):
    options = {"teacher": teacher, "reduction": reduction, "divergence": "jsd"}
    inputs = make(11, 7, 3, 130, k=4, dtype=dtype, **options)
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 8 * 130 * 4)
    monkeypatch.setattr(linear_head, "FEWEST_ROWS", 3)
    Suite().check_backward(inputs, "triton")
    check(inputs, backend="triton")


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_differences_of_near_equal_distributions(divergence, dtype):
    # Logits of a spread of 30, a teacher near the student: rounded to bfloat16 they would cost
    # more than the difference.
    inputs = make(40, 64, 64, 300, dtype=dtype, divergence=divergence, temperature=2.0)
    generator = torch.Generator().manual_seed(3)
    inputs["student_weight"] *= 30
    noise = torch.randn(inputs["student_weight"].shape, generator=generator)
    inputs["teacher_hidden"] = inputs["student_hidden"]
    inputs["teacher_weight"] = inputs["student_weight"] + (0.05 * noise).to(dtype)
    inputs["hard_weight"] = 0.0
    double = {n: x.double() for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    double["target"] = inputs["target"]
    exact = run({**inputs, **double}, backend="torch")
    for found, truth in zip(run(inputs)[3:], exact[3:], strict=True):
        assert (found.double() - truth).norm() <= 0.01 * truth.norm()


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_term_of_weight_0_may_be_infinite(weight):
    inputs = make(3, 4, 2, 6, ignored=False, hard_weight=weight)
    inputs["student_hidden"][:] *= 1e20 if weight else 1.0
    check(inputs, backend="triton")


def test_near_equal_distributions_never_diverge_below_0():
    inputs = make(30, 16, 16, 33, ignored=False, reduction="none", divergence="jsd")
    for name in STUDENT:
        inputs[name.replace("student", "teacher")] = inputs[name] * (1 + 2**-20)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        soft = mbm_kernels.linear_distillation_loss(
            **{**inputs, "divergence": divergence}, backend="triton"
        )[2]
        assert (soft >= 0).all()


def test_a_temperature_of_each_form_equals_its_formula():
    for temperature in (1.0, 2.0, 4.0, 3.0, 1e-3):
        inputs = make(5, 4, 3, 7, ignored=False, temperature=temperature, hard_weight=0.3)
        inputs["target"][2] = IGNORED
        check(inputs, backend="triton")


@pytest.mark.parametrize("case", list(cases.of("linear_distillation_loss")), ids=lambda c: c.name)
def test_one_launch_a_chunk_without_reading_a_value(case):
    # Meta tensors have no values: a host synchronisation would raise.
    launches = case.record(torch.bfloat16)
    assert [launch.kernel.name for launch in launches] in (["rows"] * 2, ["bins"] * 2)
    with triton_launch.record() as launches:
        inputs = {**case.inputs(torch.bfloat16)}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.size(0) == 1280:
                inputs[name] = value.new_empty(8192, *value.shape[1:])
        OP.backend_fwd("triton", [inputs[name] for name in OP.inputs])
    chunks = 5 if inputs["teacher_hidden"] is not None else 3
    assert len(launches) == chunks
