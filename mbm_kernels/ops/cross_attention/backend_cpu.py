"""csrc/cross_attention: scores, softmax and context block by block, weights at hardly any cost.

bfloat16 and float16 are computed in float32 and rounded on store.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.cross_attention.problem import Problem

_CPU = torch.device("cpu")


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def _rows(x: Tensor) -> Tensor:
    """float32 with contiguous rows; the other strides may be anything."""
    if x.dtype is not torch.float32:
        x = x.to(torch.float32)
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def _heads(x: Tensor | None) -> tuple[int, ...]:
    """Address and the strides of batch, heads and rows."""
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(native.cpu().cross_attention_problem_fields())


class _Native:
    """What the kernels are told about a problem, and which inputs they read as they are."""

    __slots__ = ("all_as_is", "as_is", "block", "grad_strides", "mask_as_is", "plain", "shapes")

    def __init__(self, p: Problem):
        rows = ((p.T, p.D), (p.S, p.D), (p.S, p.E))
        self.shapes = [(p.B, p.N, *shape) for shape in rows]
        described = list(zip(self.shapes, p.strides, p.dtypes, strict=True))
        self.as_is = [
            dtype is torch.float32 and (strides[3] == 1 or shape[3] == 1)
            for shape, strides, dtype in described
        ]
        self.mask_as_is = p.hiding.dtype in (None, torch.bool, torch.float32)
        self.all_as_is = all(self.as_is) and self.mask_as_is and not p.hiding.lengths
        self.plain = p.dtype is torch.float32  # results are as written
        # In the order of the inputs' own dimensions, so that splitting heads needs no copy
        # backward.
        self.grad_strides = [_like(shape, strides) for shape, strides, _ in described]
        self.block = native.block(_fields(), self._values(p))

    def _values(self, p: Problem) -> dict[str, int]:
        values = {letter: getattr(p, letter) for letter in "BNTSDE"}
        values["scale_bits"] = native.float_bits(p.scale)
        for i, name in enumerate(("query", "key", "value")):
            read = p.strides[i] if self.as_is[i] else native.contiguous_strides(self.shapes[i])
            axes = "bnt" if name == "query" else "bns"
            for prefix, strides in ((name, read), (f"grad_{name}", self.grad_strides[i])):
                values |= {f"{prefix}_{x}": n for x, n in zip(axes, strides, strict=False)}
        own = None
        if p.hiding.shape is not None and not self.mask_as_is:
            own = native.contiguous_strides(p.hiding.shape)
        strides = p.hiding.expanded_strides(4, own)
        values |= {f"mask_{x}": n for x, n in zip("bnts", strides, strict=True)}
        values["mask_added"] = int(p.hiding.dtype not in (None, torch.bool))
        values["mean_weights"] = int(p.need_weights == "mean")
        return values

    def read(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The inputs as the kernels read them."""
        if self.all_as_is:
            return tensors
        *given, key_lengths, mask = tensors
        if key_lengths is not None:
            key_lengths = key_lengths.cpu().contiguous()
        if not self.mask_as_is:
            mask = native.empty(mask.shape).copy_(mask)
        described = zip(given, self.as_is, self.shapes, strict=True)
        read = [x if as_is else native.empty(s).copy_(x) for x, as_is, s in described]
        return (*read, key_lengths, mask)


def _like(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of a gradient: those of torch.empty_like, with contiguous rows."""
    found = torch.empty_like(torch.empty_strided(shape, strides, device="meta")).stride()
    return found if found[3] == 1 else native.contiguous_strides(tuple(shape))


def fwd(p: Problem, *given: Any) -> tuple[Tensor | None, ...]:
    *tensors, save = given
    plan = derived(p, "cpu", _Native)
    read = plan.read(tensors)  # alive until the call is over
    context, mean, heads = native.empty(p.context_shape), None, None
    if p.need_weights == "mean":
        mean = native.empty(p.weights_shape)
    if p.need_weights == "heads" or (save and p.saves_heads):
        heads = native.empty(p.heads_shape)
    native.cpu().cross_attention_fwd(
        plan.block,
        native.addresses(read),
        native.addresses((context, mean, heads)),
        torch.get_num_threads(),
    )
    weights, saved = (heads, None) if p.need_weights == "heads" else (mean, heads)
    if plan.plain:
        return context, weights, saved
    return context.to(p.dtype), None if weights is None else weights.to(p.dtype), saved


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    plan = derived(p, "cpu", _Native)
    read = plan.read(tensors)
    heads = native.dense(saved[0] if p.need_weights == "heads" else saved[1])
    grad_context, grad_weights = (None if grad is None else _rows(grad) for grad in grads)
    if p.need_weights is None:
        grad_weights = None
    if grad_weights is not None:
        if p.need_weights == "mean":
            grad_weights = grad_weights.unsqueeze(1)
        grad_weights = grad_weights.expand(p.heads_shape)
    found: list[Tensor | None] = [
        torch.empty_strided(shape, strides, dtype=torch.float32, device=_CPU) if need else None
        for shape, strides, need in zip(plan.shapes, plan.grad_strides, needs, strict=False)
    ]
    mask = tensors[4]
    grad_mask = native.empty(p.heads_shape) if needs[3] and mask is not None else None
    native.cpu().cross_attention_bwd(
        plan.block,
        native.addresses(read),
        native.address(heads),
        _heads(grad_context),
        _heads(grad_weights),
        native.addresses((*found, grad_mask)),
        torch.get_num_threads(),
    )
    found.append(None if grad_mask is None else grad_mask.sum_to_size(mask.shape))
    if plan.plain:
        return tuple(found)
    return tuple(None if grad is None else grad.to(p.dtype) for grad in found)
