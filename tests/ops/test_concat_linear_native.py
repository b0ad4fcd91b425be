"""concat_linear's CPU kernel past every block of its GEMM, in each ISA, for any threads."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels._core import native, packing
from mbm_kernels.ops.concat_linear import backend_cpu, problem, reference
from mbm_kernels.ops.concat_linear.problem import FEW_ROWS
from mbm_kernels.testing import assert_matches

cpu = native.cpu()

# Shapes of the inputs, and K.
SIZES = {
    "rows past a block, features past a slice": ([(17, 20, 300), (17, 1, 70)], 130),
    "rows past one packing of x": ([(2100, 37), (1, 5)], 33),
    "several groups": ([(3, 1, 9), (7, 40), (3, 7, 5), (3, 1, 33), (1, 7, 2)], 67),
    "none has all rows": ([(5, 1, 40), (60, 31)], 70),
    "long sums of what repeats": ([(40,), (700, 8)], 19),
    "one row": ([(1, 600), (1, 520)], 1030),
    "few rows, long sums": ([(7, 2500), (7, 90)], 45),
    "as many as few are": ([(4, 16, 33), (4, 16, 1)], 70),
    "one more": ([(FEW_ROWS + 1, 33)], 70),
}


def draw(shapes, k, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return [randn(*s) for s in shapes], randn(k, sum(s[-1] for s in shapes)), randn(k)


def evaluate(function, inputs, weight, bias):
    """y, and the gradients of each input, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, weight, bias)]
    y = function(leaves[:-2], leaves[-2], leaves[-1])
    grad = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


def on_cpu(inputs, weight, bias):
    return mbm_kernels.concat_linear(inputs, weight, bias, backend="cpu")


@pytest.mark.parametrize("name", SIZES)
def test_error_and_bits_for_any_threads(isa, name):
    given = draw(*SIZES[name])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(evaluate(on_cpu, *given))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    inputs, weight, bias = given
    double = [x.double() for x in inputs], weight.double(), bias.double()
    positive = [x.abs() for x in double[0]], double[1].abs(), double[2].abs()
    rows = zip(
        results[0],
        evaluate(reference.concat_linear, *double),
        evaluate(reference.concat_linear, *given),
        evaluate(reference.concat_linear, *positive),
        strict=True,
    )
    for place, row in enumerate(rows):
        assert_matches(*row, gradient=place > 0, what=f"{name} {place}")


def test_a_row_does_not_depend_on_its_batch(isa):
    (words, image), weight, bias = draw([(9, 20, 40), (9, 1, 30)], 50)
    whole = on_cpu([words, image], weight, bias)
    for b in (0, 4, 8):
        assert torch.equal(on_cpu([words[b], image[b]], weight, bias), whole[b])


def test_expanded_input_is_one_that_broadcasts(isa):
    (words, image), weight, bias = draw([(9, 20, 40), (9, 1, 30)], 50)
    expanded = [words, image.expand(9, 20, 30)]
    expected = evaluate(on_cpu, [words, image], weight, bias)
    actual = evaluate(on_cpu, expanded, weight, bias)
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[2].sum(1, keepdim=True), expected[2], rtol=1e-5, atol=1e-4)
    everywhere = [x[:1].expand(9, -1, -1) for x in expanded]
    torch.testing.assert_close(
        on_cpu(everywhere, weight, bias), F.linear(torch.cat(everywhere, -1), weight, bias)
    )


def test_weight_is_packed_again_when_it_or_its_parts_change(isa):
    (a, b), weight, bias = draw([(6, 5), (6, 9)], 40)
    for step in range(3):
        for inputs in ([a, b], [b, a]):
            expected = evaluate(reference.concat_linear, inputs, weight, bias)
            leaves = [x.detach().requires_grad_() for x in inputs]
            y = on_cpu(leaves, weight, bias)
            torch.testing.assert_close(y, expected[0])
            grad = torch.linspace(-1, 2, y.numel()).view_as(y)
            grads = torch.autograd.grad(y, leaves, grad)
            for actual, wanted in zip(grads, expected[1:3], strict=True):
                torch.testing.assert_close(actual, wanted)
        weight.mul_(1.5).add_(step)


@pytest.mark.parametrize("rows", [3, FEW_ROWS, FEW_ROWS + 1])
def test_a_weight_and_inputs_that_are_slices(isa, rows):
    wide, weight, bias = draw([(rows, 200)], 40)
    a, b = wide[0][:, 3:90], wide[0][:, 100:150]
    weight = weight[:, 20:157]
    expected = evaluate(reference.concat_linear, [a, b], weight, bias)
    for given in (weight, weight.contiguous()):
        for actual, wanted in zip(evaluate(on_cpu, [a, b], given, bias), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


def test_few_rows_keep_nothing_of_a_weight():
    (x,), weight, bias = draw([(FEW_ROWS, 30)], 20)
    evaluate(on_cpu, [x], weight, bias)
    assert not [key for key in packing._entries if key[0] == id(weight)]


def test_not_finite_spreads_as_in_torch(isa):
    inputs, weight, bias = draw([(4, 3, 20), (4, 1, 17)], 37)
    inputs[0][1, 2, 3], inputs[1][2, 0, 5], weight[8, 1] = float("nan"), float("inf"), float("-inf")
    expected = reference.concat_linear(inputs, weight, bias)
    torch.testing.assert_close(on_cpu(inputs, weight, bias), expected, equal_nan=True)


def test_many_splits_are_packed_once_each():
    """The gradient's entry for a part is known again however many other parts there were."""
    weight, rows = torch.randn(3, 301), FEW_ROWS + 1
    gradient = torch.randn(rows, 3)
    needs = [True, False, False]
    for again in range(2):
        for features in range(1, 301):
            inputs = [torch.randn(rows, features), torch.randn(rows, 301 - features)]
            tensors = (inputs, weight, None)
            backend_cpu.bwd(problem.find(*tensors), [gradient], tensors, [], needs)
        entries = [key for key in packing._entries if key[0] == id(weight)]
        assert len(entries) == 600, again
