"""A layer by the CUDA C++ kernels of csrc/gru, of one direction or of both in one launch.

Forward: one product for the inputs of all steps, then one kernel. Backward: one kernel, then one
product for each gradient. No value is read back from the device.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import cuda_launch, native
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.gru import weight_gradients
from mbm_kernels.ops.gru.problem import PER_DIRECTION, Problem, result_shapes

# Units whose W_hh the registers and shared memory of a cluster's 16 blocks hold.
MOST_UNITS = {torch.float32: 512, torch.bfloat16: 768, torch.float16: 768}


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    if reason := cuda_launch.why_not(device, dtype):
        return reason
    most, hidden = MOST_UNITS.get(dtype, max(MOST_UNITS.values())), sizes.get("H", 0)
    if hidden > most:
        return f"a cluster holds the weights of at most {most} units, not {hidden}; try triton"
    if device is not None and cuda_launch.max_cluster(torch.device(device)) < 2:
        return "it needs thread-block clusters, of compute capability 9.0 on; try triton"
    return None


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(cuda_launch.module().gru_cuda_problem_fields())


def _block(p: Problem) -> bytes:
    """What the kernels are told about a problem."""
    steps, batch, _ = p.x_shape
    values = {"T": steps, "B": batch, "H": p.hidden, "dtype": native.DTYPES.index(p.dtype)}
    values |= {"directions": p.directions, "reverse": int(p.reverse), "cluster": 0}
    device, _ = cuda_launch.place(p.device)
    undecided = native.block(_fields(), values)
    values["cluster"] = cuda_launch.module().gru_cuda_cluster(undecided, device)
    return native.block(_fields(), values)


def _by_direction(values: Sequence[Any]) -> list[Sequence[Any]]:
    return [values[i : i + PER_DIRECTION] for i in range(0, len(values), PER_DIRECTION)]


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _empty(x: Tensor, lengths: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Zeros where there are lengths: kernels write valid steps alone."""
    return x.new_empty(shape) if lengths is None else x.new_zeros(shape)


def fwd(p: Problem, x: Tensor, h0: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *weights, lengths, save = rest
    lengths = None if lengths is None else lengths.to(p.device).contiguous()
    y_shape, state_shape, reserve_shape = result_shapes(p.directions, p.x_shape, p.hidden)
    y, h_n = _empty(x, lengths, y_shape), x.new_empty(state_shape)
    reserve = _empty(x, lengths, reserve_shape) if save else x.new_empty(0)
    if y.numel() == 0:
        return y, h_n.zero_() if h0 is None else h_n.copy_(h0), reserve
    h0 = _dense(h0)
    layers = [  # alive until the launch
        (F.linear(x, w_ih, b_ih).contiguous(), w_hh.contiguous(), _dense(b_hh))
        for w_ih, w_hh, b_ih, b_hh in _by_direction(weights)
    ]
    cuda_launch.module().gru_cuda_fwd(
        derived(p, "cuda", _block),
        native.address(lengths),
        [native.addresses(layer) for layer in layers],
        native.addresses((h0, y, h_n, reserve if save else None)),
        cuda_launch.place(p.device),
    )
    return y, h_n, reserve


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Any],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    x, h0, *weights, lengths = tensors
    (grad_y, grad_h_n), (y, reserve) = grads, saved
    lengths = None if lengths is None else lengths.to(p.device).contiguous()
    y, layers = y.contiguous(), _by_direction(weights)
    _, state_shape, gates_shape = result_shapes(p.directions, p.x_shape, p.hidden)
    gates = _empty(x, lengths, gates_shape)
    carried = x.new_empty(state_shape, dtype=torch.float32)
    carried = carried.zero_() if grad_h_n is None else carried.copy_(grad_h_n)
    if y.numel() > 0:
        _rows, place = native.rows(grad_y, p.dtype)
        read = (_dense(h0), y, reserve.contiguous())  # alive, as _rows is, until the launch
        transposed = [w_hh.t().contiguous() for _, w_hh, *_ in layers]
        cuda_launch.module().gru_cuda_bwd(
            derived(p, "cuda", _block),
            native.address(lengths),
            native.addresses(transposed),
            native.addresses(read),
            place,
            native.addresses((carried, gates)),
            cuda_launch.place(p.device),
        )
    grad_x, found = None, []
    for i, layer in enumerate(layers):
        first = i * p.hidden
        wanted = needs[2 + i * PER_DIRECTION : 2 + (i + 1) * PER_DIRECTION]
        by_x, *by_weights = weight_gradients.by_gates(
            gates if p.directions == 1 else gates[i],
            x,
            y[:, :, first : first + p.hidden],
            h0 if h0 is None or p.directions == 1 else h0[i],
            layer,
            lengths,
            p.reverse if p.directions == 1 else i == 1,
            (needs[0], *wanted),
        )
        if by_x is not None:
            grad_x = by_x if grad_x is None else grad_x + by_x
        found += by_weights
    return grad_x, carried.to(p.dtype) if needs[1] and h0 is not None else None, *found
