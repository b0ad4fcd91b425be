"""The CUDA C++ kernels of csrc/gru_cell: a step in one launch, and the gradients of its gates.

One product for each gradient follows, as after the Triton kernels.
"""

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mbm_kernels._core import cuda_launch, native
from mbm_kernels.ops.gru_cell import gate_gradients
from mbm_kernels.ops.gru_cell.problem import Problem


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return cuda_launch.why_not(device, dtype)


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(cuda_launch.module().gru_cell_cuda_problem_fields())


def _rows(x: Tensor) -> Tensor:
    """With contiguous rows; the other stride may be anything."""
    return x if x.stride(1) == 1 else x.contiguous()


def _block(p: Problem, x: Tensor, h: Tensor) -> bytes:
    values = {"B": p.x_shape[0], "C": p.x_shape[1], "H": p.hidden}
    values |= {"x_b": x.stride(0), "h_b": h.stride(0), "dtype": native.DTYPES.index(p.dtype)}
    return native.block(_fields(), values)


def fwd(p: Problem, x: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *weights, save = rest
    h_new = x.new_empty(p.state_shape)
    reserve = x.new_empty(p.saved_shape if save else (0,))
    if 0 in p.state_shape:
        return h_new, reserve
    x, h = _rows(x), _rows(h)
    read = [None if w is None else w.contiguous() for w in weights]  # alive until the launch
    cuda_launch.module().gru_cell_cuda_fwd(
        _block(p, x, h),
        native.addresses((x, h, *read)),
        native.addresses((h_new, reserve if save else None)),
        cuda_launch.place(p.device),
    )
    return h_new, reserve


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    x, h = _rows(tensors[0]), _rows(tensors[1])
    grad_h_new, reserve = grads[0], saved[0].contiguous()
    gates = x.new_empty(p.saved_shape)
    direct = x.new_empty(p.state_shape) if needs[1] else None
    if grad_h_new is None or 0 in p.state_shape:
        gates.zero_()
        if direct is not None:
            direct.zero_()
    else:
        grad_h_new = _rows(grad_h_new)
        cuda_launch.module().gru_cell_cuda_bwd(
            _block(p, x, h),
            native.addresses((grad_h_new, h, reserve)),
            grad_h_new.stride(0),
            native.addresses((gates, direct)),
            cuda_launch.place(p.device),
        )
    return gate_gradients.of_step(gates, direct, tensors, needs)
