"""The GRU's weights in the layouts of csrc/gru/gru.h, cached."""

import torch
from torch import Tensor

from mbm_kernels._core import native, packing


def lengths_on_cpu(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to("cpu", torch.int64).contiguous()


def _forward_size(w_hh: Tensor, w_ih: Tensor, *biases: Tensor | None) -> int:
    return int(native.cpu().gru_packed_sizes(w_ih.size(1), w_hh.size(1))[0])


def _pack_forward(
    out: Tensor, w_hh: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> None:
    sources = (
        native.dense(w_ih),
        native.dense(w_hh),
        native.dense(b_ih),
        native.dense(b_hh),
    )
    native.cpu().gru_pack_forward(
        w_ih.size(1),
        w_hh.size(1),
        *map(native.address, sources),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def _recurrent_size(w_hh: Tensor) -> int:
    return int(native.cpu().gru_packed_sizes(0, w_hh.size(1))[1])


def _pack_recurrent(out: Tensor, w_hh: Tensor) -> None:
    source = native.dense(w_hh)
    native.cpu().gru_pack_recurrent(
        w_hh.size(1), source.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )


def _input_size(w_ih: Tensor) -> int:
    return int(native.cpu().gru_packed_sizes(w_ih.size(1), w_ih.size(0) // 3)[2])


def _pack_input(out: Tensor, w_ih: Tensor) -> None:
    source = native.dense(w_ih)
    native.cpu().gru_pack_input(
        w_ih.size(1),
        w_ih.size(0) // 3,
        source.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )


def forward(w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    return packing.packed(_forward_size, _pack_forward, w_hh, w_ih, b_ih, b_hh)


def recurrent(w_hh: Tensor) -> Tensor:
    return packing.packed(_recurrent_size, _pack_recurrent, w_hh)


def inputs(w_ih: Tensor) -> Tensor:
    return packing.packed(_input_size, _pack_input, w_ih)


def backward(
    sizes: tuple[int, int, int, int],
    x: Tensor,
    h0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    lengths: Tensor | None,
    y: Tensor | None,
    reserve: Tensor,
    reverse: bool,
    grad_y: Tensor | None,
    grad_h_n: Tensor | None,
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients for x [T, B, C], h0, w_ih, w_hh, b_ih, b_hh, in the dtype of x, None if unwanted.

    sizes are T, B, C, H; x and grad_y as `precision.rows` makes them, the other tensors dense,
    lengths int64.
    """
    steps, batch, features, hidden = sizes
    gates = 3 * hidden
    shapes = (
        (steps, batch, features),
        (batch, hidden),
        (gates, features),
        (gates, hidden),
        (gates,),
        (gates,),
    )
    grads = [x.new_empty(s) if w else None for s, w in zip(shapes, wanted, strict=True)]
    strides = (0, 0) if grad_y is None else (grad_y.stride(0), grad_y.stride(1))
    packed_input = inputs(w_ih) if wanted[0] else None
    packed_recurrent = recurrent(w_hh)
    native.cpu().gru_backward(
        *sizes,
        x.data_ptr(),
        x.stride(0),
        x.stride(1),
        native.address(h0),
        packed_recurrent.data_ptr(),
        native.address(packed_input),
        native.address(lengths),
        reverse,
        native.address(y),
        reserve.data_ptr(),
        native.address(grad_y),
        *strides,
        native.address(grad_h_n),
        *map(native.address, grads),
        torch.get_num_threads(),
    )
    return tuple(grads)
