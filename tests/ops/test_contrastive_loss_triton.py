"""The Triton kernels of contrastive_loss: tiles, chunks, half precision, special values."""

from dataclasses import replace

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import triton_launch
from mbm_kernels._core.op import OPS
from mbm_kernels.gate import cases
from mbm_kernels.ops.linear_head import linear_head
from mbm_kernels.testing import Case
from mbm_kernels.testing.poison import poison

from .test_contrastive_loss import TestContrastiveLoss as Suite
from .test_contrastive_loss import sizes

OP = OPS["contrastive_loss"]
KINDS = ("infonce", "siglip")


def make(b, d, kind, dtype=torch.float32, **options):
    return Suite().inputs(Case("", sizes(b, d), {"kind": kind, "bias": True, **options}), dtype)


def gradients(inputs, backend="triton"):
    names = Suite.diff
    leaves = [inputs[n].detach().requires_grad_() for n in names]
    named = {**inputs, **dict(zip(names, leaves, strict=True))}
    loss = mbm_kernels.contrastive_loss(**named, backend=backend)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_past_a_tile(kind, dtype):
    # Tiles are 8 rows and 128 columns of infonce's statistics.
    inputs = make(137, 5, kind, dtype)
    Suite().check_forward(inputs, "triton")
    Suite().check_backward(inputs, "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_past_small_tiles(monkeypatch, kind, dtype):
    # Gradients take 1024 columns at a time, which would be slow here.
    def small(kernel, *_):
        config = kernel.configs[0]
        sizes = {name: 2 if name == "BLOCK_R" else 16 for name, _ in config.constants}
        return replace(config, constants=tuple(sizes.items()))

    monkeypatch.setattr(triton_launch.Kernel, "config", small)
    with poison():
        Suite().check_backward(make(53, 7, kind, dtype), "triton")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_several_chunks(monkeypatch, kind, dtype):
    inputs = make(53, 7, kind, dtype)
    whole = gradients(inputs)
    monkeypatch.setattr(linear_head, "CHUNK_BYTES", 4 * 53 * 15)
    monkeypatch.setattr(linear_head, "FEWEST_ROWS", 4)
    assert len(list(linear_head.chunks(53, 4 * 53))) == 4
    with poison():
        parts = gradients(inputs)
    Suite().check_forward(inputs, "triton")
    Suite().check_backward(inputs, "triton")
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_special_values_as_torch(kind, value):
    inputs = make(9, 4, kind)
    inputs["image"][3] = 0.5
    inputs["image"][3, 2] = value
    found, expected = gradients(inputs), gradients(inputs, "torch")
    # The scale's is 0 times infinity in one order of products and not in the other.
    for i in (0, 1, 2, 4):
        torch.testing.assert_close(found[i], expected[i], equal_nan=True)
    assert not found[3].isfinite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0,) * 4]
)
def test_makes_the_gradients_that_are_wanted(kind, wanted):
    inputs = make(9, 4, kind)
    expected = gradients(inputs)
    outputs = OP.registered(*inputs.values(), [bool(w) for w in wanted], "triton")
    torch.testing.assert_close(outputs[0], expected[0])
    for want, made, grad in zip(wanted, outputs[1:], expected[1:], strict=True):
        if want:
            torch.testing.assert_close(made, grad)
        else:
            assert made.shape == (0,)


def test_the_forward_makes_what_the_backward_would():
    for kind in KINDS:
        inputs = make(9, 4, kind)
        needs, args = [True] * 4, list(inputs.values())
        made = OP.registered(*args, needs, "triton")[1:]
        found = OP.registered_backward(torch.tensor(1.0), *args, needs, "triton")
        assert all(torch.equal(a, b) for a, b in zip(made, found, strict=True))


def test_float16_gradients_of_many_pairs():
    # 1 / (2 B) of a probability of 1 / B is 2e-6, 35 steps of what float16 holds.
    inputs = make(500, 4, "infonce", torch.float16)
    inputs["image"] *= 0.01
    found = gradients(inputs)[1:]
    double = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    exact = gradients(double, "torch")[1:]
    for a, b in zip(found[:2], exact[:2], strict=True):
        assert (a.double() - b).norm() <= 2e-3 * b.norm() + 500 * 2**-25


@pytest.mark.parametrize("case", list(cases.of("contrastive_loss")), ids=lambda c: c.name)
def test_launches_without_reading_a_value(case):
    # Meta tensors have no values: a host synchronisation would raise.
    names = [launch.kernel.name for launch in case.record(torch.bfloat16)]
    each = ["siglip"]
    if case.name == "infonce":
        each = ["infonce_statistics", "infonce_columns", "infonce_gradients"]
    assert names == each * 2
    inputs = case.inputs(torch.bfloat16)
    for name in ("image", "text"):
        inputs[name] = inputs[name].new_empty(16384, 64)
    with triton_launch.record() as launches:
        OP.backend_fwd("triton", [inputs[name] for name in OP.inputs])
    # 8 chunks of 2048 images.
    assert [x.kernel.name for x in launches] == each[:2] * 8 + each[2:] * 8
