"""What repeats is multiplied once, by torch; the rest is one Triton product over several inputs.

float32 goes to torch's products part by part, which obey its setting of TF32.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div
from mbm_kernels.ops.concat_linear.problem import Problem, Shape
from mbm_kernels.ops.linear_head import matmul

MOST = 4  # inputs that the kernel takes
Pair = tuple[Tensor, Tensor]


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


def _repeats_dropped(x: Tensor) -> Tensor:
    """A view in which leading dimensions that `expand` made are 1 again."""
    for dim, (size, stride) in enumerate(zip(x.shape[:-1], x.stride()[:-1], strict=True)):
        if stride == 0 and size > 1:
            x = x.narrow(dim, 0, 1)
    return x


def _columns(inputs: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    ends = itertools.accumulate(x.size(-1) for x in inputs)
    return [weight[:, end - x.size(-1) : end] for x, end in zip(inputs, ends, strict=True)]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.size(-1))


def fwd(p: Problem, *tensors: Any) -> tuple[Tensor]:
    return (_joined(p.leading, tensors),)


def _joined(leading: Shape, tensors: Sequence[Any]) -> Tensor:
    inputs, weight, bias = tensors
    dropped = [_repeats_dropped(x) for x in inputs]
    if torch.broadcast_shapes(*(x.shape[:-1] for x in dropped)) == leading:
        inputs = dropped
    y = weight.new_empty(*leading, weight.size(0))
    if y.numel() == 0:
        return y
    whole: list[Pair] = []
    repeated: Tensor | None = None
    for x, part in zip(inputs, _columns(inputs, weight), strict=True):
        if math.prod(x.shape[:-1]) == math.prod(leading):
            whole.append((_flat(x), part))
        else:
            product = matmul.product(_flat(x), part.t()).view(*x.shape[:-1], weight.size(0))
            repeated = product if repeated is None else repeated + product
    if not whole:
        assert repeated is not None
        y.copy_(repeated if bias is None else repeated + bias.float())
        return y
    if y.dtype == torch.float32 or (len(whole) == 1 and repeated is None):
        by_parts = F.linear(*whole[0], bias)
        for x, part in whole[1:]:
            by_parts.addmm_(x, part.t())
        by_parts = by_parts.view(y.shape)
        return by_parts if repeated is None else by_parts.add_(repeated)
    _launch(whole, repeated, bias, y)
    return y


def _launch(whole: list[Pair], repeated: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    if len(whole) > MOST:
        xs, parts = zip(*whole[MOST - 1 :], strict=True)
        whole = [*whole[: MOST - 1], (torch.cat(xs, -1), torch.cat(parts, -1))]
    tensors: list[Tensor | None] = []
    numbers: list[int] = []
    for x, part in whole:
        tensors += [x, part]
        numbers += [x.size(1), *x.stride(), *part.stride()]
    missing = MOST - len(whole)
    R, K = whole[0][0].size(0), y.size(-1)
    inner, strides = 1, (0, 0, 0)
    if repeated is not None:
        repeated, inner, strides = _two_dimensions(repeated.expand(y.shape))
    triton_launch.kernel("concat_linear", "concat")(
        lambda c: (ceil_div(R, c["BLOCK_R"]), ceil_div(K, c["BLOCK_K"])),
        *(
            *tensors,
            *[None] * (2 * missing),
            repeated,
            bias,
            y,
            R,
            K,
            *numbers,
            *[0] * (5 * missing),
        ),
        *(inner, *strides, 0 if bias is None else bias.stride(0)),
        dtype=y.dtype,
        sizes={"R": R, "K": K, "inputs": len(whole)},
    )


def _two_dimensions(x: Tensor) -> tuple[Tensor, int, tuple[int, int, int]]:
    """x [..., K] so that row r begins at stride 0 * (r // inner) + stride 1 * (r % inner)."""
    merged: list[tuple[int, int]] = [(1, 0)]  # size, stride; outermost first
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        before = merged[-1]
        if before[0] == 1:
            merged[-1] = (size, stride)
        elif size != 1 and before[1] == size * stride:
            merged[-1] = (before[0] * size, stride)
        elif size != 1:
            merged.append((size, stride))
    if len(merged) > 2:
        return _two_dimensions(x.contiguous())
    outer, inner = merged if len(merged) == 2 else ((1, 0), merged[0])
    return x, inner[0], (outer[1], inner[1], x.stride(-1))


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
    need_inputs, need_weight, need_bias = needs
    found: list[Tensor | None] = []
    grad_weight = torch.empty_like(weight) if need_weight else None
    sums: dict[torch.Size, Tensor] = {}
    parts = _columns(inputs, weight)
    by_parts = [None] * len(parts) if grad_weight is None else _columns(inputs, grad_weight)
    for x, part, by_part in zip(inputs, parts, by_parts, strict=True):
        shape = x.shape[:-1]
        if shape not in sums:  # of rows that repeat, in float32
            whole = math.prod(shape) == math.prod(grad_y.shape[:-1])
            g = grad_y if whole else grad_y.float().sum_to_size(*shape, grad_y.size(-1))
            sums[shape] = _flat(g.to(grad_y.dtype))
        g = sums[shape]
        found.append(torch.mm(g, part).view(x.shape) if need_inputs else None)
        if by_part is not None:
            by_part.copy_(torch.mm(g.t(), _flat(x)))
    grad_bias = None
    if need_bias and bias is not None:
        grad_bias = _flat(grad_y).sum(0)
    return (*found, grad_weight, grad_bias)
