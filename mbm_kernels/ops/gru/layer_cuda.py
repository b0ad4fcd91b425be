"""A layer by the CUDA C++ kernels of csrc/gru, of one direction or of both in one launch.

Forward: one product for the inputs of all steps, then one kernel. Backward: one kernel, then one
product for each gradient. No value is read back from the device.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbm_kernels._core import cuda_launch, native
from mbm_kernels._core.errors import BackendUnavailableError
from mbm_kernels._core.problem import derived
from mbm_kernels.ops.gru import weight_gradients
from mbm_kernels.ops.gru.problem import PER_DIRECTION, Problem, result_shapes

# Units whose W_hh the registers and shared memory of a group of blocks hold.
MOST_UNITS = {torch.float32: 1024, torch.bfloat16: 2048, torch.float16: 2048}


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    if reason := cuda_launch.why_not(device, dtype):
        return reason
    most, hidden = MOST_UNITS.get(dtype, max(MOST_UNITS.values())), sizes.get("H", 0)
    if hidden > most:
        return f"its blocks hold the weights of at most {most} units, not {hidden}; try triton"
    if device is None or dtype is None:
        return None
    found = _plan(torch.device(device), _values(dtype, 1, 1, hidden))
    if found["cluster"] == 0 and found["resident"] < found["needed"]:
        return (
            f"{hidden} units need {found['needed']} blocks that run at once, this device runs "
            f"{found['resident']}; try triton"
        )
    return None


@functools.cache
def _fields() -> tuple[str, ...]:
    return tuple(cuda_launch.module().gru_cuda_problem_fields())


def _values(dtype: torch.dtype, steps: int, batch: int, hidden: int) -> dict[str, int]:
    """The fields of one direction whose plan is not known."""
    undecided = dict.fromkeys(_fields(), 0)
    sizes = {"T": steps, "B": batch, "H": hidden, "dtype": native.DTYPES.index(dtype)}
    return {**undecided, **sizes, "directions": 1}


def _plan(device: torch.device, values: dict[str, int]) -> dict[str, int]:
    """What csrc's GruCudaPlan says of the fields."""
    index, _ = cuda_launch.place(device)
    found: dict[str, int] = cuda_launch.module().gru_cuda_plan(
        native.block(_fields(), values), index
    )
    return found


@dataclass(frozen=True)
class _Launch:
    """What the kernels are told about a problem, and the elements that they pass to one another."""

    block: bytes
    by_groups: bool
    flags: int
    states: int
    backward_states: int

    @classmethod
    def of(cls, p: Problem, tf32: bool) -> "_Launch":
        steps, batch, _ = p.x_shape
        if reason := why_not(p.device, p.dtype, H=p.hidden):  # traced, sizes were not known
            raise BackendUnavailableError(f"gru: backend 'cuda' cannot run: {reason}")
        values = _values(p.dtype, steps, batch, p.hidden)
        values |= {"directions": p.directions, "reverse": int(p.reverse), "tf32": int(tf32)}
        found = _plan(p.device, values)
        values |= {name: found[name] for name in ("cluster", "groups", "at_once")}
        return cls(
            native.block(_fields(), values),
            found["cluster"] == 0,
            *(found[name] for name in ("flags", "states", "backward_states")),
        )

    def through(self, like: Tensor, states: int) -> tuple[Tensor | None, Tensor | None]:
        """Flags, at 0, and states of groups."""
        if not self.by_groups:
            return None, None
        return like.new_zeros(self.flags, dtype=torch.int32), like.new_empty(states)


def _launch(p: Problem) -> _Launch:
    """By tf32 where PyTorch lets cuDNN's recurrences use it, as this call finds it."""
    tf32 = p.dtype is torch.float32 and cuda_launch.rnn_tf32()
    return derived(p, ("cuda", tf32), functools.partial(_Launch.of, tf32=tf32))


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
    launch = _launch(p)
    through = launch.through(x, launch.states)
    carried = x.new_empty(state_shape, dtype=torch.float32) if launch.by_groups else None
    cuda_launch.module().gru_cuda_fwd(
        launch.block,
        native.address(lengths),
        [native.addresses(layer) for layer in layers],
        native.addresses((h0, y, h_n, reserve if save else None, carried)),
        native.addresses(through),
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
        launch = _launch(p)
        through = launch.through(x, launch.backward_states)
        cuda_launch.module().gru_cuda_bwd(
            launch.block,
            native.address(lengths),
            native.addresses(transposed),
            native.addresses(read),
            place,
            native.addresses((carried, gates)),
            native.addresses(through),
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
