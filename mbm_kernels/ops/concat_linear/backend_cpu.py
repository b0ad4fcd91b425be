"""csrc/concat_linear: what repeats is multiplied once, and the rest is added to it in place.

Where rows are few and none is repeated, the weight is read as it is: nothing is packed or kept.
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
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.concat_linear.problem import FEW_ROWS, Problem, Shape


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


class _Native:
    """Which inputs share their leading dimensions, and what the kernels are told about them."""

    def __init__(self, p: Problem, examples: Sequence[Tensor]):
        """`examples` are like the inputs, on the meta device."""
        shapes = [tuple(x.shape) for x in examples]
        self.columns = list(itertools.accumulate((shape[-1] for shape in shapes), initial=0))
        members: dict[Shape, list[int]] = {}
        for i, shape in enumerate(shapes):
            members.setdefault(_stripped(shape[:-1]), []).append(i)
        self.order = [i for inputs in members.values() for i in inputs]
        self.leading = p.leading
        self.repeated = [shape if math.prod(shape) != p.rows else None for shape in members]
        self.few = p.rows <= FEW_ROWS and all(s is None for s in self.repeated)
        extension = native.cpu()
        out_features, features = p.weight_shape
        sizes = {"R": p.rows, "K": out_features, "C": features}
        sizes |= {"inputs": len(shapes), "groups": len(members)}
        blocks = [native.block(extension.concat_linear_problem_fields(), sizes)]
        for group, (shape, inputs) in enumerate(members.items()):
            for i in inputs:
                values = {
                    "group": group,
                    "rows": math.prod(shape),
                    "features": shapes[i][-1],
                    "column": self.columns[i],
                    "stride": _rows(examples[i])[1],
                }
                blocks.append(native.block(extension.concat_linear_input_fields(), values))
        self.block = b"".join(blocks)

    def addresses(self, tensors: Sequence[Tensor] | None) -> list[int]:
        """In the kernels' order; none where there are no tensors."""
        return [] if tensors is None else [tensors[i].data_ptr() for i in self.order]

    def indices(self) -> list[Tensor | None]:
        """For each group which of its rows each row of y takes; None where it has as many."""
        return [None if s is None else _index(s, self.leading) for s in self.repeated]


def _as_it_is(plan: _Native, weight: Tensor) -> int:
    """The address of a weight that need not be packed; 0 for others."""
    few = plan.few and weight.dtype is torch.float32 and weight.is_contiguous()
    return weight.data_ptr() if few else 0


def _examples(p: Problem) -> list[Tensor]:
    pairs = zip(p.shapes, p.strides, strict=True)
    return [torch.empty_strided(*pair, dtype=p.dtype, device="meta") for pair in pairs]


def _as_given(p: Problem) -> _Native:
    return _Native(p, _examples(p))


def _forward_plan(p: Problem) -> tuple[_Native, bool]:
    """The plan, and whether it is of inputs without what `expand` repeats in them: not where all
    repeat along some dimension."""
    dropped = [_repeats_dropped(x) for x in _examples(p)]
    leading = torch.broadcast_shapes(*(x.shape[:-1] for x in dropped))
    if leading == p.leading and [tuple(x.shape) for x in dropped] != [*p.shapes]:
        return _Native(p, dropped), True
    return derived(p, "cpu", _as_given), False


@functools.lru_cache(maxsize=64)
def _index(shape: Shape, leading: Shape) -> Tensor:
    """int64 [R], the rows of `shape` as they are broadcast to `leading`."""
    index = torch.arange(math.prod(shape), device="cpu").view(shape).expand(leading)
    return index.reshape(-1).contiguous()


def _stripped(shape: Shape) -> Shape:
    """Without leading dimensions of 1, which change nothing."""
    while shape and shape[0] == 1:
        shape = shape[1:]
    return tuple(shape)


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


def fwd(p: Problem, *tensors: Any) -> tuple[Tensor]:
    inputs, weight, bias = tensors
    plan, fewer = derived(p, "cpu forward", _forward_plan)
    if fewer:
        inputs = [_repeats_dropped(x) for x in inputs]
    y = native.empty((*p.leading, p.weight_shape[0]))
    if y.numel() > 0:
        rows = [_rows(x)[0] for x in inputs]
        few = _as_it_is(plan, weight)
        packed = None if few else packing.panels(weight)
        dense_bias = native.dense(bias)
        indices = plan.indices()
        native.cpu().concat_linear_fwd(
            plan.block,
            plan.addresses(rows),
            [native.address(index) for index in indices],
            (native.address(packed), few, native.address(dense_bias)),
            y.data_ptr(),
            torch.get_num_threads(),
        )
    return (y if p.dtype is torch.float32 else y.to(p.dtype),)


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    inputs, weight, bias = tensors
    grad_y = grads[0]
    assert grad_y is not None
    plan = derived(p, "cpu", _as_given)
    some = grad_y.numel() > 0

    def gradient(like: Tensor) -> Tensor:
        kind = torch.empty if some else torch.zeros
        return kind(like.shape, device="cpu", dtype=torch.float32)

    grad_inputs = [gradient(x) for x in inputs] if needs[0] else None
    grad_weight = gradient(weight) if needs[1] else None
    grad_bias = gradient(bias) if needs[2] and bias is not None else None
    if some:
        rows, (g, g_stride) = [_rows(x)[0] for x in inputs], _rows(grad_y)
        packed, few = None, 0
        if grad_inputs is not None:
            few = _as_it_is(plan, weight)
        if grad_inputs is not None and not few:
            parts = zip(plan.columns, rows, strict=False)
            packed = [packing.packed(*_part(c, x.size(-1)), weight) for c, x in parts]
        indices = plan.indices()
        native.cpu().concat_linear_bwd(
            plan.block,
            plan.addresses(rows),
            [native.address(index) for index in indices],
            (plan.addresses(packed), few),
            (g.data_ptr(), g_stride),
            plan.addresses(grad_inputs),
            (native.address(grad_weight), native.address(grad_bias)),
            torch.get_num_threads(),
        )
    by_input = [None] * len(inputs) if grad_inputs is None else grad_inputs
    found = (*by_input, grad_weight, grad_bias)
    return tuple(None if g is None else g.to(p.dtype) for g in found)
