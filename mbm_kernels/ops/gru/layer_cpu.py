"""A layer by csrc/gru, of one direction or of both: what both operations' CPU backends are.

bfloat16 and float16 are computed in float32 and rounded on store.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.gru import packed, steps_cpu
from mbm_kernels.ops.gru.problem import PER_DIRECTION, Problem, result_shapes
from mbm_kernels.ops.gru_cell import backend_cpu as gru_cell
from mbm_kernels.ops.gru_cell import precision
from mbm_kernels.ops.gru_cell.problem import weight_shapes


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(native.cpu().gru_problem_fields())


class _Native:
    """What the kernels are told about a problem, and the shapes of what they write."""

    __slots__ = ("block", "by_steps", "by_steps_saved", "grad_shapes", "shapes", "step", "x")

    def __init__(self, p: Problem):
        steps, batch, features = p.x_shape
        self.x = precision.Rows(p.x_shape, p.x_strides, p.dtype)
        self.shapes = result_shapes(p.directions, p.x_shape, p.hidden)
        weights = weight_shapes(features, p.hidden)
        self.grad_shapes = (p.x_shape, p.state_shape, *weights * p.directions)
        values = {"T": steps, "B": batch, "C": features, "H": p.hidden}
        values |= {"directions": p.directions, "reverse": int(p.reverse)}
        values |= {"x_t": self.x.strides[0], "x_b": self.x.strides[1]}
        self.block = native.block(_fields(), values)
        sizes = (batch, features, p.hidden)
        self.by_steps = steps_cpu.take(steps, *sizes, saved=False)
        self.by_steps_saved = steps_cpu.take(steps, *sizes, saved=True)
        self.step = gru_cell.block(*sizes, self.x.strides[1]) if self.by_steps else b""


def _by_direction(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[i : i + PER_DIRECTION] for i in range(0, len(values), PER_DIRECTION)]


def fwd(
    p: Problem, x: Tensor, h0: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    *weights, lengths, save = rest
    plan = derived(p, "cpu", _Native)
    one = p.directions == 1
    by_direction = (weights,) if one else _by_direction(weights)  # 1 us
    x, h0, lengths = plan.x(x), native.dense(h0), packed.lengths_on_cpu(lengths)
    y_shape, state_shape, reserve_shape = plan.shapes
    reserve = native.empty(reserve_shape) if save else None
    by_steps = (plan.by_steps_saved and lengths is None) if save else plan.by_steps
    if by_steps:
        if one:
            y, h_n = steps_cpu.run(plan.step, x, h0, weights, lengths, p.reverse, reserve)
        else:
            y, h_n = steps_cpu.both(plan.step, x, h0, by_direction, lengths, reserve)
        reserve = precision.optional_rounded(reserve, p.dtype)
        return precision.rounded(y, p.dtype), precision.rounded(h_n, p.dtype), reserve
    layers = [packed.forward(*each) for each in by_direction]
    y, h_n = native.empty(y_shape), native.empty(state_shape)
    native.cpu().gru_forward(
        plan.block,
        (x.data_ptr(), native.address(h0), native.address(lengths)),
        [layer.data_ptr() for layer in layers],
        (y.data_ptr(), h_n.data_ptr(), native.address(reserve)),
        torch.get_num_threads(),
    )
    if reserve is not None and lengths is not None:
        # Rows are saved one after another, valid ones only; the same call gives the same tensor.
        steps, batch, _ = p.x_shape
        valid = int(lengths.clamp(0, steps).sum())
        reserve.view(p.directions, steps * batch, 4 * p.hidden)[:, valid:].zero_()
    if p.dtype is torch.float32:
        return y, h_n, reserve
    return y.to(p.dtype), h_n.to(p.dtype), precision.optional_rounded(reserve, p.dtype)


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    x, h0, *weights, lengths = tensors
    plan = derived(p, "cpu", _Native)
    grad_y = None if grads[0] is None else precision.rows(grads[0])
    grad_h_n = native.dense(grads[1])
    x, h0, lengths = plan.x(x), native.dense(h0), packed.lengths_on_cpu(lengths)
    y, reserve = map(native.dense, saved)
    wanted = [need and x is not None for need, x in zip(needs, tensors[:-1], strict=True)]
    found = native.empty_where(plan.grad_shapes, wanted)
    if plan.by_steps_saved and lengths is None:
        _of_one_step(p, plan, (x, h0, *weights), (reserve, grad_y, grad_h_n), found)
        return tuple(precision.optional_rounded(grad, p.dtype) for grad in found)
    # Held until the call: their addresses alone would not keep them.
    layers = [
        (packed.recurrent(w_hh), packed.inputs(w_ih) if needs[0] else None)
        for w_ih, w_hh, *_ in _by_direction(weights)
    ]
    address = native.address
    strides = (0, 0) if grad_y is None else grad_y.stride()[:2]
    addresses = native.addresses(found)
    native.cpu().gru_backward(
        plan.block,
        native.addresses((x, h0, lengths, y, reserve)),
        (address(grad_y), *strides, address(grad_h_n)),
        [tuple(map(address, layer)) for layer in layers],
        addresses[:2],
        _by_direction(addresses[2:]),
        torch.get_num_threads(),
    )
    return tuple(precision.optional_rounded(grad, p.dtype) for grad in found)


def _of_one_step(
    p: Problem,
    plan: _Native,
    inputs: Sequence[Any],
    given: Sequence[Tensor | None],
    found: Sequence[Tensor | None],
) -> None:
    """Writes the gradients of x, h0 and the weights; `given` are reserve and those of y and h_n."""
    x, h0, *weights = inputs
    reserve, grad_y, grad_h_n = given
    assert reserve is not None
    batch, hidden = p.x_shape[1], p.hidden
    each = (p.directions, batch, hidden)
    grad = native.empty(each).zero_()
    if grad_y is not None:
        grad += grad_y.view(batch, p.directions, hidden).transpose(0, 1)
    if grad_h_n is not None:
        grad += grad_h_n.view(each)
    states = [None] * p.directions if h0 is None else h0.view(each)
    kept = reserve.view(p.directions, batch, 4 * hidden)
    grad_x, grad_h0, *grad_weights = found
    grad_states = [None] * p.directions if grad_h0 is None else grad_h0.view(each)
    for d, (own, made) in enumerate(
        zip(_by_direction(weights), _by_direction(grad_weights), strict=True)
    ):
        to_x = grad_x if d == 0 or grad_x is None else native.empty(p.x_shape)
        results = (to_x, grad_states[d], *made)
        steps_cpu.gradients(plan.step, x, states[d], own, kept[d], grad[d], results)
        if d > 0 and grad_x is not None and to_x is not None:
            grad_x += to_x
