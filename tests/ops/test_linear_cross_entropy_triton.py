"""The Triton kernel of linear_cross_entropy: tiles, chunks, half precision, special values."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels._core import triton_launch
from mbm_kernels._core.op import OPS
from mbm_kernels.gate import cases
from mbm_kernels.ops.linear_head import linear_head

from .test_linear_cross_entropy import IGNORED
from .test_linear_cross_entropy import TestLinearCrossEntropy as Suite

OP = OPS["linear_cross_entropy"]
NAMES = ("hidden", "weight", "bias")


def make(n, h, v, dtype=torch.float32, ignored=0.3, **options):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < ignored] = IGNORED
    return {
        "hidden": torch.randn(n, h, generator=generator).to(dtype),
        "weight": torch.randn(v, h, generator=generator).to(dtype),
        "bias": torch.randn(v, generator=generator).to(dtype),
        "target": target,
        **options,
    }


def gradients(inputs, grad=None, backend="triton"):
    leaves = [inputs[n].detach().requires_grad_() for n in NAMES]
    named = {**inputs, **dict(zip(NAMES, leaves, strict=True))}
    loss = mbm_kernels.linear_cross_entropy(**named, backend=backend)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, grad))


# Past one tile of 1024, of 2048, and of two; half precision is half as wide in the same memory.
@pytest.mark.parametrize("classes", [1025, 2049, 4103])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_past_a_tile(classes, dtype, reduction):
    options = {"label_smoothing": 0.1, "softcap": 3.0, "z_loss": 0.01, "reduction": reduction}
    inputs = make(6, 5, classes, dtype, **options)
    Suite().check_forward(inputs, "triton")
    Suite().check_backward(inputs, "triton")


def test_chunks_are_few():
    def sizes(rows, row_bytes):
        return [s.stop - s.start for s in linear_head.chunks(rows, row_bytes)]

    assert sizes(1280, 40000) == [1280]
    assert sizes(8192, 4 * 128256) == [1024] * 8
    assert sizes(1100, 4 * 128256) == [1100]
    assert sizes(7001, 40000) == [2334, 2334, 2333]
    assert sizes(0, 40000) == []
    assert sizes(3, 0) == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_several_chunks(monkeypatch, dtype, reduction):
    inputs = make(11, 7, 130, dtype, reduction=reduction)
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 4 * 130 * 4)
    monkeypatch.setattr(linear_head, "FEWEST_ROWS", 3)
    Suite().check_forward(inputs, "triton")
    Suite().check_backward(inputs, "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_differences_of_near_equal_distributions(dtype):
    # Logits of a spread of 30: rounded to bfloat16 they would cost 4 to 23 % of the gradient.
    inputs = make(40, 64, 300, dtype, ignored=0)
    inputs["weight"] *= 30 / 8
    double = {n: inputs[n].double().requires_grad_() for n in NAMES}
    logits = F.linear(*double.values())
    exact = torch.autograd.grad(F.cross_entropy(logits, inputs["target"]), double.values())
    for found, truth in zip(gradients(inputs)[1:], exact, strict=True):
        assert (found.double() - truth).norm() <= 0.01 * truth.norm()


def test_float16_gradients_keep_a_loss_scale():
    # p / N is 8e-7 here, 13 steps of what float16 holds: it is divided by N in float32.
    inputs = make(64, 6, 20000, torch.float16, ignored=0)
    for name in NAMES:
        inputs[name] *= 0.01
    scaled = gradients(inputs, torch.tensor(6e4, dtype=torch.float16))
    double = {n: inputs[n].double().requires_grad_() for n in NAMES}
    loss = F.cross_entropy(F.linear(*double.values()), inputs["target"])
    truth = 6e4 * torch.autograd.grad(loss, double["weight"])[0]
    others = torch.ones(20000, dtype=torch.bool)
    others[inputs["target"]] = False
    assert (scaled[2].double() - truth)[others].norm() <= 1e-3 * truth[others].norm()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["hidden", "bias"])
def test_special_values_as_torch(value, where):
    inputs = make(40, 6, 130, ignored=0, reduction="none")
    if where == "hidden":
        inputs["hidden"][3] = 0.5
        inputs["hidden"][3, 2] = value
    else:
        inputs["bias"][5] = value
        inputs["target"][:] = torch.where(inputs["target"] == 5, 6, inputs["target"])
        inputs["target"][7] = 5
    Suite().check_forward(inputs, "triton")
    Suite().check_backward(inputs, "triton")


def test_a_row_depends_on_no_other():
    inputs = make(40, 30, 200, ignored=0, reduction="none")
    whole = mbm_kernels.linear_cross_entropy(**inputs, backend="triton")
    others = {**inputs, "hidden": inputs["hidden"].roll(1, 0), "target": inputs["target"].roll(1)}
    others["hidden"][0] = torch.nan
    found = mbm_kernels.linear_cross_entropy(**others, backend="triton")
    assert torch.equal(found[1:], whole[:-1])


@pytest.mark.parametrize("case", list(cases.of("linear_cross_entropy")), ids=lambda c: c.name)
def test_one_launch_a_chunk_without_reading_a_value(case):
    # Meta tensors have no values: a host synchronisation would raise.
    launches = case.record(torch.bfloat16)
    assert [launch.kernel.name for launch in launches] == ["rows", "rows"]
    assert all(launch.grid == (1280,) for launch in launches)
    with triton_launch.record() as launches, torch.device("meta"):
        shapes = (torch.empty(8192, 64), torch.empty(128256, 64), torch.empty(8192).long(), None)
        OP.backend_fwd("triton", (*shapes, IGNORED, 0.0, None, 0.0, "mean", [True, True, False]))
    assert [launch.grid for launch in launches] == [(1024,)] * 8
