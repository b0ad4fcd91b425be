"""csrc/gru_cell: one step from the weights as they are, none of them packed.

bfloat16 and float16 are computed in float32 and rounded on store.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.gru_cell import precision
from mbm_kernels.ops.gru_cell.problem import Problem, weight_shapes


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(native.cpu().gru_cell_problem_fields())


def block(batch: int, features: int, hidden: int, row_stride: int) -> bytes:
    """The argument block of a step, whose rows of x lie so far apart."""
    values = {"B": batch, "C": features, "H": hidden, "x_b": row_stride}
    return native.block(_fields(), values)


class _Native:
    """What the kernels are told about a problem, and the shapes of what they write."""

    __slots__ = ("block", "grad_shapes", "reserve_shape", "state_shape", "x")

    def __init__(self, p: Problem):
        batch, features = p.x_shape
        self.x = precision.Rows(p.x_shape, p.x_strides, p.dtype)
        self.state_shape, self.reserve_shape = p.state_shape, p.saved_shape
        self.grad_shapes = (p.x_shape, p.state_shape, *weight_shapes(features, p.hidden))
        self.block = block(batch, features, p.hidden, self.x.strides[0])


def fwd(p: Problem, x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    *weights, save = rest
    plan = derived(p, "cpu", _Native)
    given = (plan.x(x), native.dense(h), *_plain(weights[:2]), *map(native.dense, weights[2:]))
    h_new = native.empty(plan.state_shape)
    reserve = native.empty(plan.reserve_shape) if save else None
    native.cpu().gru_cell_forward(
        plan.block,
        native.addresses(given),
        (h_new.data_ptr(), native.address(reserve)),
        torch.get_num_threads(),
    )
    return precision.rounded(h_new, p.dtype), precision.optional_rounded(reserve, p.dtype)


def _plain(weights: Sequence[Tensor]) -> list[Tensor]:
    return [precision.plain(weight) for weight in weights]


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    plan = derived(p, "cpu", _Native)
    x, h = tensors[:2]
    grad_h_new = h.new_zeros(h.shape) if grads[0] is None else grads[0]
    rest = (*_plain(tensors[2:4]), native.dense(saved[0]), native.dense(grad_h_new))
    given = (plan.x(x), native.dense(h), *rest)
    wanted = [need and x is not None for need, x in zip(needs, tensors, strict=True)]
    found = native.empty_where(plan.grad_shapes, wanted)
    native.cpu().gru_cell_backward(
        plan.block,
        native.addresses(given),
        native.addresses(found),
        torch.get_num_threads(),
    )
    return tuple(precision.optional_rounded(grad, p.dtype) for grad in found)
