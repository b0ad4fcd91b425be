"""The GRU's weights in the layouts of csrc/gru/gru.h, cached."""

import torch
from torch import Tensor

from mbm_kernels._core import native, packing


def lengths_on_cpu(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to("cpu", torch.int64).contiguous()


def _forward_size(w_hh: Tensor, w_ih: Tensor, *biases: Tensor) -> int:
    return int(native.cpu().gru_packed_sizes(w_ih.size(1), w_hh.size(1))[0])


def _pack_forward(
    out: Tensor,
    w_hh: Tensor,
    w_ih: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
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
    if b_ih is None or b_hh is None:
        return packing.packed(_forward_size, _pack_forward, w_hh, w_ih)
    return packing.packed(_forward_size, _pack_forward, w_hh, w_ih, b_ih, b_hh)


def recurrent(w_hh: Tensor) -> Tensor:
    return packing.packed(_recurrent_size, _pack_recurrent, w_hh)


def inputs(w_ih: Tensor) -> Tensor:
    return packing.packed(_input_size, _pack_input, w_ih)
