"""torch.nn.GRUCell with a choice of backends."""

from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, dispatch, tracing
from mbm_kernels._core.drop_in import DropIn
from mbm_kernels._core.stock import ServedByStock
from mbm_kernels.ops.gru_cell.op import gru_cell

NAME = "gru_cell"


class GRUCell(DropIn, ServedByStock, torch.nn.GRUCell):
    """torch.nn.GRUCell, the same constructor, parameters and errors, run by `mbm_kernels.gru_cell`.

    Where that would run the torch backend, the call is torch.nn.GRUCell's own. Under autocast on a
    CPU its result has the weights' dtype, as torch.nn.GRUCell's.

    Args:
        *args: of torch.nn.GRUCell: input_size, hidden_size, bias, device, dtype.
        backend: as for `mbm_kernels.gru_cell`.
        **kwargs: of torch.nn.GRUCell.

    Raises:
        ValueError: for an unknown backend, and what torch.nn.GRUCell raises.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any):
        dispatch.check_backend("nn.GRUCell", backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input [B, C] or [C]; hx [B, H], [H] or None for zeros -> [B, H] or [H]."""
        known = None if torch.compiler.is_compiling() else self._stock_calls
        served = None if known is None else known.find(*self._known_by(input, hx))
        if served:
            return super().forward(input, hx)
        return self._first(input, hx) if served is None else self._step(input, hx)

    @tracing.leaf
    def _first(self, input: Tensor, hx: Tensor | None) -> Tensor:
        """A call unlike those that are known."""
        if autocast.spares_stock(input.device):
            input, hx = self._converted(input), None if hx is None else self._converted(hx)
            if self._is_stock(input, hx):
                return super().forward(input, hx)
            with torch.autocast("cpu", enabled=False):
                return GRUCell.forward(self, input, hx)
        stock = self._is_stock(input, hx)
        self._remember(*self._known_by(input, hx), stock)
        return super().forward(input, hx) if stock else self._step(input, hx)

    def _known_by(
        self, input: Tensor, hx: Tensor | None
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The tensors and options that a call is known by; of the weights one stands for all."""
        weight = self._parameters.get("weight_ih")
        trains = torch.is_grad_enabled() and (weight is None or weight.requires_grad)
        given = (input,) if hx is None else (input, hx)
        return given, (self.backend, hx is None, trains)

    def _step(self, input: Tensor, hx: Tensor | None) -> Tensor:
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            h = x.new_zeros(x.size(0), self.hidden_size)
        else:
            h = hx if batched else hx.unsqueeze(0)
        h = gru_cell(
            x, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, backend=self.backend
        )
        return h if batched else h.squeeze(0)

    def _converted(self, x: Tensor) -> Tensor:
        """In the weights' dtype, in which stock answers autocast on CPUs."""
        return x.to(self.weight_ih.dtype)

    def _is_stock(self, input: Tensor, hx: Tensor | None) -> bool:
        """Whether torch.nn.GRUCell serves this call: the torch backend, or an error to raise."""
        lowered = autocast.lowers_stock(input.device)
        if self.backend == "torch" and not lowered:
            return True
        if input.dim() not in (1, 2) or input.size(-1) != self.input_size:
            return True
        if hx is not None and hx.shape != (*input.shape[:-1], self.hidden_size):
            return True
        if lowered or input.dtype != self.weight_ih.dtype:
            return not lowered
        given = (input, hx, self.weight_ih, self.weight_hh)
        training = tracing.may_need_grad([t for t in given if t is not None])
        sizes = {
            "B": input.size(0) if input.dim() == 2 else 1,
            "C": self.input_size,
            "H": self.hidden_size,
            "training": int(training),
        }
        return dispatch.select(NAME, self.backend, input.device, input.dtype, sizes) == "torch"

    def extra_repr(self) -> str:
        shown: str = super().extra_repr()
        return shown if self.backend == "auto" else f"{shown}, backend={self.backend!r}"
