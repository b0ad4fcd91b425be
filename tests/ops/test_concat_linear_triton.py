"""The Triton kernel of concat_linear: tiles, several inputs, what repeats."""

import pytest
import torch

import mbm_kernels
from mbm_kernels.gate import cases
from mbm_kernels.ops.concat_linear import backend_triton
from mbm_kernels.testing import Case
from mbm_kernels.testing.poison import poison

from .test_concat_linear import TestConcatLinear as Suite
from .test_concat_linear import shapes


def check(*leads, k, bias=True, dtype=torch.bfloat16):
    suite = Suite()
    inputs = suite.inputs(Case("", options=shapes(*leads, k=k, bias=bias)), dtype)
    suite.check_forward(inputs, "triton")
    suite.check_backward(inputs, "triton")


# Tiles are 64 rows, columns and features; every size is past one, and none is a multiple.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "leads",
    [
        ((5, 14, 67), (5, 1, 70)),
        ((5, 14, 67), (14, 70)),
        ((70, 67), (70, 3), (70, 66)),
        ((5, 14, 67), (5, 14, 5), (5, 1, 70), (14, 3)),
        ((5, 2, 7, 67), (5, 1, 7, 3), (2, 1, 4)),
    ],
)
def test_past_a_tile(leads, dtype):
    check(*leads, k=65, dtype=dtype)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_any_number_of_inputs(count):
    check(*((3, 5, 2 + i) for i in range(count)), (3, 1, 4), k=5)
    check(*((3, 5, 2 + i) for i in range(count)), k=5, bias=False)


def test_what_expand_made_is_multiplied_once(monkeypatch):
    shared, x = torch.randn(3, 1, 4).bfloat16(), torch.randn(3, 5, 6).bfloat16()
    weight = torch.randn(7, 10).bfloat16()
    rows = []
    product = backend_triton.matmul.product

    def noted(a, b, *rest):
        rows.append(a.size(0))
        return product(a, b, *rest)

    monkeypatch.setattr(backend_triton.matmul, "product", noted)
    with poison():
        y = mbm_kernels.concat_linear((shared.expand(3, 5, 4), x), weight, backend="triton")
    assert rows == [3]
    expected = mbm_kernels.concat_linear(
        (shared.float(), x.float()), weight.float(), backend="torch"
    )
    # Added up in float32 and rounded once.
    torch.testing.assert_close(y, expected.bfloat16())


@pytest.mark.parametrize(
    ("shape", "order", "inner"),
    [
        ((2, 3, 4, 5), (0, 1, 2, 3), 24),
        ((3, 4, 5), (1, 0, 2), 4),
        ((2, 3, 4, 5), (1, 0, 2, 3), 24),  # three strides: copied
        ((4, 5), (0, 1), 4),
    ],
)
def test_rows_of_any_strides_are_found(shape, order, inner):
    x = torch.randn(*(shape[i] for i in order)).permute(
        *(order.index(i) for i in range(len(shape)))
    )
    flat, count, (outer, step, last) = backend_triton._two_dimensions(x)
    rows = x.reshape(-1, 5)
    assert count == inner
    found = [
        torch.as_strided(flat, (5,), (last,), r // count * outer + r % count * step)
        for r in range(rows.size(0))
    ]
    assert torch.equal(torch.stack(found), rows)


@pytest.mark.parametrize("case", list(cases.of("concat_linear")), ids=lambda c: c.name)
def test_one_launch_forward(case):
    assert [launch.kernel.name for launch in case.record(torch.bfloat16)] == ["concat"]
    assert case.record(torch.float32) == []  # torch's products
