"""torch.nn.GRU with a choice of backends."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from mbm_kernels._core import autocast, dispatch, tracing
from mbm_kernels._core.drop_in import DropIn
from mbm_kernels._core.stock import ServedByStock
from mbm_kernels.ops.gru.bidirectional import gru_bidirectional
from mbm_kernels.ops.gru.dynamo import traceable
from mbm_kernels.ops.gru.op import gru

NAME = "gru"


class GRU(DropIn, ServedByStock, torch.nn.GRU):
    """torch.nn.GRU, the same constructor, parameters, inputs and errors, run by `mbm_kernels.gru`.

    Where every layer would run the torch backend, the call is torch.nn.GRU's own. Under autocast on
    a CPU its results have the weights' dtype, as torch.nn.GRU's.

    Args:
        *args: of torch.nn.GRU: input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional.
        backend: as for `mbm_kernels.gru`, for every layer.
        **kwargs: of torch.nn.GRU, device and dtype too.

    Raises:
        ValueError: for an unknown backend, and what torch.nn.GRU raises.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any):
        dispatch.check_backend("nn.GRU", backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        traceable(cls)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._flat_weight_refs = []  # weak, so that torch.nn.GRU's own parameters cannot be swapped
        super()._load_from_state_dict(*args, **kwargs)
        self._init_flat_weights()

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """input [T, B, C], [B, T, C] if batch_first, [T, C] unbatched, or packed.

        hx [layers * directions, B, H], without B if unbatched, or None for zeros.

        Returns:
            The output, shaped as the input with directions * H features, and h_n, shaped as hx.
        """
        known = None if torch.compiler.is_compiling() else self._stock_calls
        served = None if known is None else known.find(*self._known_by(input, hx))
        if served:
            return super().forward(input, hx)  # type: ignore[no-any-return]
        if served is None:
            return self._first(input, hx)
        if isinstance(input, PackedSequence) or input.dim() != 3:
            return self._layers(input, hx)
        # The call before had this shape and dtype, so that they need not be checked again.
        return self._batched(input, hx)

    @tracing.leaf
    def _first(
        self, input: Tensor | PackedSequence, hx: Tensor | None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """A call unlike those that are known."""
        first = input.data if isinstance(input, PackedSequence) else input
        if autocast.spares_stock(first.device):
            return self._in_autocast(input, hx)
        stock = self._is_stock(input, hx)
        self._remember(*self._known_by(input, hx), stock)
        if stock:
            return super().forward(input, hx)  # type: ignore[no-any-return]
        return self._layers(input, hx)

    def _known_by(self, input: Any, hx: Tensor | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors and options that a call is known by; of the weights one stands for all."""
        weight = self._parameters.get("weight_ih_l0")
        trains = torch.is_grad_enabled() and (weight is None or weight.requires_grad)
        given = (input,) if hx is None else (input, hx)
        dtype = None if weight is None else weight.dtype
        return given, (self.backend, self.batch_first, hx is None, trains, dtype)

    def _layers(
        self, input: Tensor | PackedSequence, hx: Tensor | None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        if not torch.compiler.is_compiling():  # only dtypes are read from that list
            self._update_flat_weights()
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"GRU: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None and hx.dim() != input.dim():
            kind = "batched 3-D" if batched else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor"
            )
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            hx = None if hx is None else hx.unsqueeze(1)
        self.check_input(input, None)
        if hx is not None:
            self.check_hidden_size(hx, self.get_expected_hidden_size(input, None))
        if input.size(1 - batch_dim) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        y, h_n = self._batched(input, hx)
        return (y, h_n) if batched else (y.squeeze(batch_dim), h_n.squeeze(1))

    def _batched(self, input: Tensor, hx: Tensor | None) -> tuple[Tensor, Tensor]:
        """input and the output [T, B, ...], or [B, T, ...] if batch_first."""
        if not self.batch_first:
            return self._run(input, hx, None)
        y, h_n = self._run(input.transpose(0, 1), hx, None)
        return y.transpose(0, 1), h_n

    def _in_autocast(
        self, input: Tensor | PackedSequence, hx: Tensor | None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """With results in the weights' dtype, as stock's on CPUs; kernels compute in it, too."""
        dtype: torch.dtype = getattr(self, self._all_weights[0][0]).dtype
        input, hx = input.to(dtype), None if hx is None else hx.to(dtype)
        if self._is_stock(input, hx):
            return super().forward(input, hx)  # type: ignore[no-any-return]
        with torch.autocast("cpu", enabled=False):
            return GRU.forward(self, input, hx)

    def _forward_packed(
        self, input: PackedSequence, hx: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        self.check_input(data, batch_sizes)
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
            self.check_hidden_size(hx, self.get_expected_hidden_size(data, batch_sizes))
        batch = int(batch_sizes[0])
        if batch == int(batch_sizes[-1]):
            y, h_n = self._run(data.view(-1, batch, data.size(1)), hx, None)
            out = y.flatten(0, 1)
        else:
            lengths = (batch_sizes.unsqueeze(1) > torch.arange(batch, device="cpu")).sum(0)
            places = _places(batch_sizes, data.size(0), batch).to(data.device)
            x = data.new_zeros(batch_sizes.size(0) * batch, data.size(1))
            x = x.index_copy(0, places, data).view(-1, batch, data.size(1))
            y, h_n = self._run(x, hx, lengths)
            out = y.flatten(0, 1).index_select(0, places)
        packed = PackedSequence(out, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(h_n, unsorted_indices)

    def _run(self, x: Tensor, hx: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [T, B, C], hx [layers * directions, B, H] -> [T, B, directions * H] and h_n."""
        states: list[Tensor] = []
        for layer in range(self.num_layers):
            if self.bidirectional:
                h0 = None if hx is None else hx[2 * layer : 2 * layer + 2]
                both = *self._weights(2 * layer), *self._weights(2 * layer + 1)
                x, h_n = gru_bidirectional(x, h0, *both, lengths=lengths, backend=self.backend)
                states.append(h_n)
            else:
                h0, weights = None if hx is None else hx[layer], self._weights(layer)
                x, h_n = gru(x, h0, *weights, lengths=lengths, backend=self.backend)
                states.append(h_n.unsqueeze(0))
            if self.dropout > 0 and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, torch.cat(states) if len(states) > 1 else states[0]

    def _weights(self, index: int) -> tuple[Any, ...]:
        """w_ih, w_hh, b_ih and b_hh, or None for each bias, of one layer and direction."""
        own = self._parameters  # without what is parametrized; half of what getattr takes
        found = tuple([own[n] if n in own else getattr(self, n) for n in self._all_weights[index]])
        return found if self.bias else (*found, None, None)

    def _is_stock(self, input: Tensor | PackedSequence, hx: Tensor | None) -> bool:
        """Whether torch.nn.GRU itself serves this call best: all layers run the torch backend."""
        if torch.compiler.is_compiling() or tracing.in_functorch():
            return False
        x = input.data if isinstance(input, PackedSequence) else input
        if autocast.lowers_stock(x.device):
            return False
        if self.backend == "torch":
            return True
        if isinstance(input, PackedSequence):
            steps, batch = input.batch_sizes.size(0), int(input.batch_sizes[0])
        elif x.dim() == 3:
            steps, batch = x.shape[1::-1] if self.batch_first else x.shape[:2]
        else:
            steps, batch = x.size(0), 1
        given = (x, hx, *self._parameters.values())
        training = tracing.may_need_grad([t for t in given if t is not None])
        hidden = self.hidden_size
        inner = hidden * (2 if self.bidirectional else 1)
        # The weights' dtype: an input of another is an error, which torch words.
        dtype: torch.dtype = getattr(self, self._all_weights[0][0]).dtype
        for features in (self.input_size, inner)[: self.num_layers]:
            sizes = {"T": steps, "B": batch, "C": features, "H": hidden, "training": int(training)}
            if dispatch.select(NAME, self.backend, x.device, dtype, sizes) != "torch":
                return False
        return True

    def extra_repr(self) -> str:
        shown: str = super().extra_repr()
        return shown if self.backend == "auto" else f"{shown}, backend={self.backend!r}"


def _places(batch_sizes: Tensor, rows: int, batch: int) -> Tensor:
    """Where each of a PackedSequence's rows lies in [T * B]; unlike ATen's padding, traceable."""
    ends = batch_sizes.cumsum(0)
    row = torch.arange(rows, device="cpu")
    time = torch.searchsorted(ends, row, right=True)
    return time * batch + row - (ends - batch_sizes)[time]


traceable(GRU)
