"""The Triton kernels of linear_distillation_loss: tiles, chunks, precision, bad ids."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels._core import linear_head, triton_launch
from mbm_kernels._core.op import OPS
from mbm_kernels.bench import static_cases
from mbm_kernels.testing import Case
from mbm_kernels.testing.poison import poison

from .test_linear_distillation_loss import IGNORED, STUDENT, sizes
from .test_linear_distillation_loss import TestLinearDistillationLoss as Suite

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
    loss_alone = run(inputs)  # by what the forward made
    for a, b in zip(loss_alone[3:], run(inputs, backend="torch")[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


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
    shape = (11,) if reduction == "none" else ()
    for grads in (None, [torch.randn(shape).to(dtype) for _ in range(3)]):
        if grads is None and reduction == "none":
            continue
        whole = run(inputs, grads)
        with monkeypatch.context() as patch, poison():
            patch.setattr(linear_head, "CHUNK_BYTES", 8 * 130 * 4)
            patch.setattr(linear_head, "FEWEST_ROWS", 3)
            parts = run(inputs, grads)
        for a, b in zip(parts, whole, strict=True):
            torch.testing.assert_close(a, b)


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


@pytest.mark.parametrize("teacher", ["hidden", "topk"])
def test_ids_out_of_range_are_a_nan_of_their_row(teacher):
    # Nobody checks targets and ids on a GPU; they must not be addresses.
    inputs = make(4, 3, 2, 9, k=3, teacher=teacher, ignored=False, reduction="none")
    inputs["target"][1], inputs["target"][2] = 2**40, -7
    if teacher == "topk":
        inputs["teacher_topk"][0][3, 1] = 2**40
    args = [
        False if n == "save" else x
        for n, x in zip(OP.inputs, Suite().schema_args(inputs), strict=True)
    ]
    args[OP.inputs.index("save")] = [False] * 3
    _, hard, soft, *_ = OP.registered(*args, "triton")
    last = teacher == "topk"
    assert hard.isnan().tolist() == [False, True, True, last]
    assert soft.isnan().tolist() == [False, False, False, last]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_term_of_weight_0_may_be_infinite(weight):
    inputs = make(3, 4, 2, 6, ignored=False, hard_weight=weight)
    inputs["student_hidden"][:] *= 1e20 if weight else 1.0
    for a, b in zip(run(inputs), run(inputs, backend="torch"), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


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
        student = F.linear(*(inputs[n].double() for n in STUDENT))
        expected = F.cross_entropy(student, inputs["target"]).float()
        torch.testing.assert_close(run(inputs)[1], expected)
        for a, b in zip(run(inputs), run(inputs, backend="torch"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "case", list(static_cases.of("linear_distillation_loss")), ids=lambda c: c.name
)
def test_one_launch_a_chunk_without_reading_a_value(case):
    # Meta tensors have no values: a host synchronisation would raise.
    launches = case.record(torch.bfloat16)
    assert [launch.kernel.name for launch in launches] in (["rows"] * 2, ["bins"] * 2)
    with triton_launch.record() as launches:
        inputs = {**case.inputs(torch.bfloat16)}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.size(0) == 1280:
                inputs[name] = value.new_empty(8192, *value.shape[1:])
        OP._run_fwd("triton", [inputs[name] for name in OP.inputs])
    chunks = 5 if inputs["teacher_hidden"] is not None else 3
    assert len(launches) == chunks
