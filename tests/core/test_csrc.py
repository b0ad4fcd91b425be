"""The vector functions of csrc/common in every build that this CPU runs."""

import pytest
import torch

from mbm_kernels._core import native

cpu = native.cpu()

# Largest absolute and relative error over [-20, 20], as activations.h states it.
BOUNDS = {
    "exp": (None, 1.5e-7),
    "expm1": (None, 2.5e-7),
    "sigmoid": (1.2e-7, None),
    "slope": (None, 3.4e-7),
    "softplus": (None, 3.4e-7),
    "tanh": (2e-7, 3e-7),
    "tanh_slope": (2.4e-7, 4e-7),
    "erf": (1.2e-7, 1.2e-7),
}
# softplus(x) and its slope, relative even where they are tiny.
TRUTH = {
    "slope": torch.sigmoid,
    "softplus": lambda x: -torch.nn.functional.logsigmoid(-x),
    "tanh_slope": lambda x: x.cosh() ** -2,
}


def evaluate(name: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.full_like(x, float("nan"))
    function = getattr(cpu.VectorFunction, name)
    cpu.vector_math(function, x.data_ptr(), y.data_ptr(), x.numel())
    return y


@pytest.mark.parametrize("name", BOUNDS)
def test_accuracy(isa, name):
    x = torch.linspace(-20, 20, 400_003)  # odd: the tail lanes are used
    x = torch.cat([x, torch.logspace(-20, 0, 1001), -torch.logspace(-20, 0, 1001)])
    truth = TRUTH.get(name, getattr(torch, name, None))(x.double())
    error = (evaluate(name, x).double() - truth).abs()
    absolute, relative = BOUNDS[name]
    if absolute is not None:
        assert error.max() <= absolute
    if relative is not None:
        assert (error / truth.abs()).nan_to_num().max() <= relative


def test_log(isa):
    x = torch.cat([torch.logspace(-37.9, 38, 200_003), torch.linspace(0.5, 2, 100_001)])
    truth = x.double().log()
    error = (evaluate("log", x) - truth).abs()
    assert (error <= 1.2e-7 * truth.abs() + 1e-12).all()
    special = evaluate("log", torch.tensor([1.0, float("nan"), 2.0]))
    assert special[0] == 0
    assert special[1].isnan()


@pytest.mark.parametrize("n", [0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33])
def test_tail_touches_nothing_else(isa, n):
    x = torch.full((n + 2,), 0.5)
    y = torch.full((n + 2,), 7.0)
    cpu.vector_math(cpu.VectorFunction.tanh, x.data_ptr() + 4, y.data_ptr() + 4, n)
    assert y[0] == 7
    assert y[n + 1] == 7
    torch.testing.assert_close(y[1 : n + 1], torch.tanh(x[1 : n + 1]))


def test_special_values(isa):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([inf, -inf, nan, 0.0, -0.0, 100.0, -100.0])
    assert torch.equal(evaluate("tanh", x).nan_to_num(9), torch.tanh(x).nan_to_num(9))
    assert torch.signbit(evaluate("tanh", x)[4])
    for name in ("sigmoid", "slope"):
        torch.testing.assert_close(evaluate(name, x), torch.sigmoid(x), equal_nan=True)
    torch.testing.assert_close(evaluate("softplus", x), TRUTH["softplus"](x), equal_nan=True)


def test_null_pointer_is_refused():
    with pytest.raises(ValueError, match="null address"):
        cpu.vector_math(cpu.VectorFunction.tanh, 0, 0, 4)
    cpu.vector_math(cpu.VectorFunction.tanh, 0, 0, 0)
    with pytest.raises(ValueError, match="misaligned"):
        cpu.vector_math(cpu.VectorFunction.tanh, 2, 2, 1)
    with pytest.raises(ValueError, match="negative"):
        cpu.vector_math(cpu.VectorFunction.tanh, 4, 4, -1)


def test_unknown_isa_is_refused():
    with pytest.raises(ValueError, match="expected baseline, avx2 or avx512"):
        cpu.set_isa("neon")
