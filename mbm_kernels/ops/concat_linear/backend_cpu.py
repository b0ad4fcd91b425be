"""csrc/concat_linear: what repeats is multiplied once, and the rest is added to it in place.

bfloat16 and float16 are computed in float32 and rounded on store.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native, packing

Shape = tuple[int, ...]


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


class _Plan:
    """Which inputs share their leading dimensions, and which of their rows y takes."""

    def __init__(self, shapes: tuple[Shape, ...]):
        self.leading: Shape = tuple(torch.broadcast_shapes(*(shape[:-1] for shape in shapes)))
        self.rows = math.prod(self.leading)
        self.columns = list(itertools.accumulate((shape[-1] for shape in shapes), initial=0))
        members: dict[Shape, list[int]] = {}
        for i, shape in enumerate(shapes):
            members.setdefault(_stripped(shape[:-1]), []).append(i)
        self.groups: list[tuple[int, Tensor | None, list[int]]] = []  # rows, index, inputs
        for shape, inputs in members.items():
            rows, index = math.prod(shape), None
            if rows != self.rows:
                index = torch.arange(rows, device="cpu").view(shape).expand(self.leading)
                index = index.reshape(-1).contiguous()
            self.groups.append((rows, index, inputs))


def _stripped(shape: Shape) -> Shape:
    """Without leading dimensions of 1, which change nothing."""
    while shape and shape[0] == 1:
        shape = shape[1:]
    return tuple(shape)


_plan = functools.lru_cache(maxsize=64)(_Plan)


def _plan_of(inputs: Sequence[Tensor]) -> _Plan:
    return _plan(tuple([x.shape for x in inputs]))


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """float32 [..., C_i] with contiguous rows, and how far these are apart."""
    if x.dtype is not torch.float32:
        x = x.to(torch.float32)
    if x.is_contiguous():
        return x, x.size(-1)
    if x.dim() != 2:
        x = x.reshape(-1, x.size(-1)) if x.numel() else x.new_empty(0, x.size(-1))
    x = x if x.stride(1) == 1 or x.size(1) == 1 else x.contiguous()
    return x, x.stride(0)


def _repeats_dropped(x: Tensor) -> Tensor:
    """A view in which leading dimensions that `expand` made are 1 again."""
    for dim, (size, stride) in enumerate(zip(x.shape[:-1], x.stride()[:-1], strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(dim, 0, 1)
    return x


@functools.cache  # its functions are keys of packing's entries
def _part(column: int, features: int) -> tuple[Callable[..., int], Callable[..., None]]:
    """What `packing` needs for the columns [column, column + features) of a weight."""

    def size(weight: Tensor) -> int:
        return int(native.cpu().concat_linear_packed_part_size(weight.size(0), features))

    def pack(out: Tensor, weight: Tensor) -> None:
        dense = native.dense(weight)
        native.cpu().concat_linear_pack_part(
            *weight.shape,
            column,
            features,
            dense.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )

    return size, pack


def _groups(
    plan: _Plan,
    inputs: Sequence[tuple[Tensor, int]],
    packed: Sequence[Tensor] | None = None,
    grads: Sequence[Tensor] | None = None,
) -> list[Any]:
    def described(i: int) -> tuple[int, ...]:
        x, stride = inputs[i]
        return (
            x.data_ptr(),
            stride,
            x.size(-1),
            plan.columns[i],
            0 if packed is None else packed[i].data_ptr(),
            0 if grads is None else grads[i].data_ptr(),
        )

    return [
        (rows, native.address(index), [described(i) for i in members])
        for rows, index, members in plan.groups
    ]


def fwd(inputs: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    plan = _plan_of(inputs)
    leading = plan.leading
    if any(0 in x.stride() for x in inputs):
        dropped = [_repeats_dropped(x) for x in inputs]
        fewer = _plan_of(dropped)
        if fewer.leading == leading:  # else all repeat along some dimension
            plan, inputs = fewer, dropped
    outputs = weight.size(0)
    y = native.empty((*leading, outputs))
    if plan.rows > 0 and outputs > 0:
        rows = [_rows(x) for x in inputs]
        packed = packing.panels(weight)
        dense_bias = native.dense(bias)
        native.cpu().concat_linear_fwd(
            plan.rows,
            outputs,
            weight.size(1),
            _groups(plan, rows),
            packed.data_ptr(),
            native.address(dense_bias),
            y.data_ptr(),
            torch.get_num_threads(),
        )
    return y if weight.dtype is torch.float32 else y.to(weight.dtype)


def bwd(
    grad_y: Tensor,
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    plan = _plan_of(inputs)
    some = grad_y.numel() > 0

    def gradient(like: Tensor) -> Tensor:
        kind = torch.empty if some else torch.zeros
        return kind(like.shape, device="cpu", dtype=torch.float32)

    grads = [gradient(x) for x in inputs] if needs[0] else None
    grad_weight = gradient(weight) if needs[1] else None
    grad_bias = gradient(bias) if needs[2] and bias is not None else None
    if some:
        rows, (g, g_stride) = [_rows(x) for x in inputs], _rows(grad_y)
        packed = None
        if grads is not None:
            parts = zip(plan.columns, rows, strict=False)
            packed = [packing.packed(*_part(c, x.size(-1)), weight) for c, (x, _) in parts]
        native.cpu().concat_linear_bwd(
            plan.rows,
            weight.size(0),
            weight.size(1),
            _groups(plan, rows, packed, grads),
            g.data_ptr(),
            g_stride,
            native.address(grad_weight),
            native.address(grad_bias),
            torch.get_num_threads(),
        )
    found = (*(grads if grads is not None else [None] * len(inputs)), grad_weight, grad_bias)
    return tuple(None if g is None else g.to(weight.dtype) for g in found)
