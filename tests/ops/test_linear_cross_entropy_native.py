"""The C++ kernel of linear_cross_entropy: chunks, blocks, threads, special values."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels._core.op import OPS
from mbm_kernels.testing import assert_matches

from .test_linear_cross_entropy import IGNORED
from .test_linear_cross_entropy import TestLinearCrossEntropy as Suite

OP = OPS["linear_cross_entropy"]


def make(n, h, v, ignored=0.3, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < ignored] = IGNORED
    return {
        "hidden": torch.randn(n, h, generator=generator),
        "weight": torch.randn(v, h, generator=generator),
        "bias": torch.randn(v, generator=generator),
        "target": target,
        **options,
    }


def gradients(inputs, grad=None, backend="cpu"):
    leaves = [inputs[n].detach().requires_grad_() for n in ("hidden", "weight", "bias")]
    named = {**inputs, **dict(zip(("hidden", "weight", "bias"), leaves, strict=True))}
    loss = mbm_kernels.linear_cross_entropy(**named, backend=backend)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, grad))


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def check(inputs):
    Suite().check_forward(inputs, "cpu")
    Suite().check_backward(inputs, "cpu")


# Beyond a block of classes (112), a panel of rows (32), a slice of depth (256) and a chunk (10 MB).
@pytest.mark.parametrize("sizes", [(33, 3, 113), (70, 300, 250), (300, 5, 20011), (1, 1, 225)])
def test_every_build(isa, sizes):
    check(make(*sizes, label_smoothing=0.1, z_loss=0.01))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_bits_for_any_threads_and_again(reduction):
    # Three chunks; pieces of the vocabulary and of H that no thread count divides.
    inputs = make(300, 37, 20011, reduction=reduction, label_smoothing=0.1)
    grad = torch.randn(300) if reduction == "none" else torch.tensor(1.0)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(gradients(inputs, grad))
    finally:
        torch.set_num_threads(before)
    assert all(equal(result, results[0]) for result in results[1:])


def test_a_row_depends_on_no_other():
    inputs = make(70, 30, 200, ignored=0, reduction="none")
    whole = mbm_kernels.linear_cross_entropy(**inputs, backend="cpu")
    for row in (0, 31, 32, 69):
        alone = {**inputs, "hidden": inputs["hidden"][row], "target": inputs["target"][row]}
        assert torch.equal(mbm_kernels.linear_cross_entropy(**alone, backend="cpu"), whole[row])


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
    check(inputs)


def test_large_logits():
    inputs = make(40, 6, 130, label_smoothing=0.1)
    inputs["hidden"] *= 1e4
    check(inputs)


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_makes_the_gradients_that_are_wanted(wanted):
    inputs = make(9, 4, 11)
    names = ("hidden", "weight", "bias")
    args = [*(inputs[n] for n in ("hidden", "weight", "target", "bias")), IGNORED, 0.0, None, 0.0]
    outputs = OP.registered(*args, "mean", [bool(w) for w in wanted], "cpu")
    expected = dict(zip(names, gradients(inputs)[1:], strict=True))
    for name, want, made in zip(names, wanted, outputs[1:], strict=True):
        assert torch.equal(made, expected[name]) if want else made.shape == (0,)
    rows = OP.registered(*args, "none", [True] * 3, "cpu")
    assert [x.numel() for x in rows] == [9, 0, 0, 0]


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scaled_by_what_comes_from_above(scale):
    inputs = make(40, 6, 130)
    expected = [scale * g for g in gradients(inputs)[1:]]
    leaves = {n: inputs[n].requires_grad_() for n in ("hidden", "weight", "bias")}
    loss = scale * mbm_kernels.linear_cross_entropy(**inputs, backend="cpu")
    for keep in (True, True, False):  # a kept graph must give the same again
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=keep)
        assert equal(found, expected)  # a power of 2 rounds nothing
        if keep:
            again = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
            assert equal(found, again)
            assert all(a.data_ptr() != b.data_ptr() for a, b in zip(found, again, strict=True))


def test_a_weight_used_twice():
    inputs = make(20, 8, 30)
    weight = inputs["weight"].clone().requires_grad_()
    call = mbm_kernels.linear_cross_entropy
    single = torch.autograd.grad(call(**{**inputs, "weight": weight}, backend="cpu"), weight)[0]
    both = call(**{**inputs, "weight": weight}, backend="cpu")
    (both + call(**{**inputs, "weight": weight}, backend="cpu")).backward()
    assert torch.equal(weight.grad, 2 * single)


def test_half_precision_gradients_keep_a_loss_scale():
    # Unscaled they would be below what float16 holds; made in float32, they are not lost.
    inputs = make(64, 6, 2000, ignored=0)
    for name in ("hidden", "weight", "bias"):
        inputs[name] = inputs[name].half() * 0.01
    scale = torch.tensor(6e4, dtype=torch.float16)
    found, stock = (gradients(inputs, scale, backend)[2] for backend in ("cpu", "torch"))
    double = {n: inputs[n].double().requires_grad_() for n in ("hidden", "weight", "bias")}
    loss = F.cross_entropy(F.linear(*double.values()), inputs["target"])
    truth = torch.autograd.grad(loss, double["weight"], scale.double())[0]
    others = torch.ones(2000, dtype=torch.bool)
    others[inputs["target"]] = False
    results = (x[others] for x in (found, truth, stock, truth))
    assert_matches(*results, gradient=True)
