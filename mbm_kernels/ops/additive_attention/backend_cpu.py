"""The C++ kernels of csrc/additive_attention: float32 inside, 16-bit floats cast around them."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.additive_attention.problem import Problem


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


SNAPSHOT_DTYPE = torch.float32  # of a key beside what is prepared of it


class PreparedKey(NamedTuple):
    """A key's exponentials and magnitudes, float32, in the layout of one ISA."""

    packed: Tensor
    isa: str | None


def prepare_key(key: Tensor) -> PreparedKey:
    """key [B, S, D], which `fwd_prepared` is given beside it: it reads both."""
    _converted, rows = native.rows(key, torch.float32)  # alive until the call is over
    packed = native.empty((native.cpu().additive_attention_packed_key_size(*key.shape),))
    native.cpu().additive_attention_pack_key(
        *key.shape, rows, packed.data_ptr(), torch.get_num_threads()
    )
    return PreparedKey(packed, native.isa())


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(native.cpu().additive_attention_problem_fields())


class _Native:
    """What the kernels are told about a problem, and which inputs they read as they are."""

    __slots__ = ("all_as_is", "as_is", "block", "plain", "shapes")

    def __init__(self, p: Problem):
        rows = ((p.T, p.D), (p.S, p.D), (p.S, p.E))
        self.shapes = (*((p.B, *shape) for shape in rows), (p.D,))
        described = zip(p.dtypes, p.strides, strict=True)
        self.as_is = [d is torch.float32 and s[-1] == 1 for d, s in described]
        self.all_as_is = all(self.as_is) and not p.hiding.lengths
        self.plain = p.dtype is torch.float32  # results are as written
        values = {letter: getattr(p, letter) for letter in "BTSDE"}
        for i, (name, row) in enumerate((("query", "t"), ("key", "s"), ("value", "s"))):
            count, columns = rows[i]
            strides = p.strides[i] if self.as_is[i] else (count * columns, columns, 1)
            values |= {f"{name}_b": strides[0], f"{name}_{row}": strides[1]}
        strides = p.hiding.expanded_strides(3)
        values |= {f"mask_{axis}": stride for axis, stride in zip("bts", strides, strict=True)}
        self.block = native.block(_fields(), values)

    def read(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """The inputs as the kernels read them."""
        if self.all_as_is:
            return tensors
        *floating, key_lengths, mask = tensors
        if key_lengths is not None:
            key_lengths = key_lengths.cpu().contiguous()
        described = zip(floating, self.as_is, self.shapes, strict=True)
        read = [x if as_is else native.empty(s).copy_(x) for x, as_is, s in described]
        return (*read, key_lengths, mask)


def fwd(p: Problem, *given: Any) -> tuple[Tensor, Tensor]:
    return fwd_prepared(p, given[:-1], None)


def fwd_prepared(
    p: Problem, tensors: Sequence[Any], prepared: PreparedKey | None
) -> tuple[Tensor, Tensor]:
    """`prepared` is what `prepare_key` made of the key; of another ISA it is left alone."""
    plan = derived(p, "cpu", _Native)
    read = plan.read(tensors)  # alive until the call is over
    packed = prepared.packed if prepared is not None and prepared.isa == native.isa() else None
    context, weights = native.empty(p.context_shape), native.empty(p.weights_shape)
    native.cpu().additive_attention_fwd(
        plan.block,
        native.addresses(read),
        0 if packed is None else packed.data_ptr(),
        (context.data_ptr(), weights.data_ptr()),
        torch.get_num_threads(),
    )
    if plan.plain:
        return context, weights
    return context.to(p.dtype), weights.to(p.dtype)


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    plan = derived(p, "cpu", _Native)
    read = plan.read(tensors)
    (_context, context_rows), (_weights, weights_rows) = (  # alive, as above
        native.rows(grad, torch.float32) for grad in grads
    )
    weights = native.dense(saved[0])
    found = native.empty_where(plan.shapes, needs)
    native.cpu().additive_attention_bwd(
        plan.block,
        native.addresses(read),
        weights.data_ptr(),
        context_rows,
        weights_rows,
        native.addresses(found),
        torch.get_num_threads(),
    )
    if plan.plain:
        return tuple(found)
    return tuple(None if grad is None else grad.to(p.dtype) for grad in found)
