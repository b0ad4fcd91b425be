"""torch.nn.Conv2d and Conv1d with a backend, and Conv2d with its epilogue."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels._core import checks, dispatch, tracing
from mbm_kernels._core.drop_in import DropIn
from mbm_kernels._core.stock import ServedByStock
from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS
from mbm_kernels.ops.conv_bias_act.op import OP, convolve, described
from mbm_kernels.ops.conv_bias_act.problem import NAME


class _Convolution(DropIn, ServedByStock):
    """What our convolutions share: each is torch's of one or two dimensions with a backend."""

    _conv_forward: Callable[..., Tensor]  # torch's own forward, of weight and bias as well

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any):
        dispatch.check_backend(f"nn.{type(self).__name__}", backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    def _weights(self) -> tuple[Any, Any]:
        try:  # 0.4 us less each than the attributes, which may be parametrized
            return self._parameters["weight"], self._parameters["bias"]
        except KeyError:
            return self.weight, self.bias

    def _padded(self, x: Tensor) -> tuple[Tensor, Any]:
        """x and what is left to pad: modes other than "zeros" pad first, as in torch."""
        if self.padding_mode == "zeros":
            return x, self.padding
        padding: Any = self._reversed_padding_repeated_twice
        return F.pad(x, padding, mode=str(self.padding_mode)), 0

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, Y, X] or [C, Y, X] to [B, K, Y', X'] or [K, Y', X'], without Y of Conv1d."""
        weight, bias = self._weights()
        form: Any = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
        known = None if torch.compiler.is_compiling() else self._stock_calls
        if known is not None and known.find((x, weight), (self.backend, bias is None, form)):
            return self._conv_forward(x, weight, bias)
        return self._run(x)

    @tracing.leaf
    def _run(self, x: Tensor) -> Tensor:
        """A call that torch's own forward is not known to serve."""
        weight, bias = self._weights()
        # Torch's layers say why they refuse bytes.
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            return self._conv_forward(x, weight, bias)
        image, kernel, explicit = self._image(x, weight)
        call, tensors, found = described((image, kernel, bias, None), explicit, self.backend)
        if found is None:
            y = convolve((image, kernel, bias, None), explicit, self.backend)
        elif call is None:
            y = OP(self.backend, *tensors, *found.options, sizes=dict(found.sizes))
        elif OP.choose(call) == "torch":
            form: Any = (self.stride, self.padding, self.dilation, self.groups, self.padding_mode)
            self._remember((x, weight), (self.backend, bias is None, form))
            return self._conv_forward(x, weight, bias)
        else:
            y = OP.run(call, tensors)
        return self._result(y)

    def _image(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """x, weight and options of `convolve`."""
        raise NotImplementedError

    def _result(self, y: Tensor) -> Tensor:
        return y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"


class Conv2d(_Convolution, nn.Conv2d):
    """torch.nn.Conv2d: the same constructor and state_dict, and `backend`.

    `groups`, `dilation`, padding modes, unbatched inputs and channels_last are covered; dtypes are
    the floating ones of `mbm_kernels.conv_bias_act`. Where that would run the torch backend, the
    call is torch.nn.Conv2d's own.
    """

    def _image(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        x, padding = self._padded(x)
        return x, weight, (self.stride, padding, self.dilation, self.groups, None, None)


class Conv1d(_Convolution, nn.Conv1d):
    """torch.nn.Conv1d: the same constructor and state_dict, and `backend`.

    A view of its input and of its weight goes through the kernels of `mbm_kernels.conv_bias_act` as
    an image of one row. Where that would run the torch backend, the call is torch.nn.Conv1d's own.
    """

    def _image(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        checks.tensor("nn.Conv1d", "x", x, (2, 3))
        x, padding = self._padded(x)
        if isinstance(padding, tuple):
            padding = (0, *padding)
        options = ((1, *self.stride), padding, (1, *self.dilation), self.groups, None, None)
        return x.unsqueeze(-2), weight.unsqueeze(-2), options

    def _result(self, y: Tensor) -> Tensor:
        return y.squeeze(-2)


class ConvBiasAct(Conv2d):
    """A Conv2d with residual, activation and maximum pooling; parameters as torch.nn.Conv2d.

    Args:
        in_channels, out_channels, kernel_size: as for torch.nn.Conv2d.
        stride, padding, dilation, groups, bias: as for torch.nn.Conv2d.
        padding_mode, device, dtype: as for torch.nn.Conv2d.
        activation, max_pool, backend: as for `mbm_kernels.conv_bias_act`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        activation: str | None = None,
        max_pool: int | tuple[Any, Any, Any] | None = None,
        backend: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ):
        checks.choice(NAME, "activation", activation, ACTIVATIONS)
        geometry.pool_window(NAME, max_pool)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
            backend=backend,
        )
        self.activation = activation
        self.max_pool = max_pool

    @tracing.leaf
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, C, Y, X], residual of the convolution's shape -> [B, K, Y'', X''].

        x may be uint8, as of `mbm_kernels.conv_bias_act`.
        """
        weight, bias = self._weights()
        x, padding = self._padded(x)
        head = (self.stride, padding, self.dilation, self.groups)
        options = (*head, self.activation, self.max_pool)
        return convolve((x, weight, bias, residual), options, self.backend)

    def extra_repr(self) -> str:
        epilogue = f"activation={self.activation!r}, max_pool={self.max_pool!r}"
        return f"{super().extra_repr()}, {epilogue}"
