"""torch.nn.Conv2d with a backend, and with its epilogue."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Parameter

from mbm_kernels._core import checks, dispatch, tracing
from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS
from mbm_kernels.ops.conv_bias_act.op import NAME, conv_bias_act

# The kinds of calls that run the torch backend, of the latest, that a module remembers: for them
# torch.nn.Conv2d's own forward saves the checks.
MOST_STOCK = 8


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d: the same constructor and state_dict, and `backend`.

    Padding modes other than "zeros" pad first, as torch does. `groups`, `dilation`, unbatched
    inputs and channels_last are covered; dtypes are the floating ones of
    `mbm_kernels.conv_bias_act`.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any):
        dispatch.check_backend(f"nn.{type(self).__name__}", backend)
        super().__init__(*args, **kwargs)
        self.backend = backend

    @tracing.leaf
    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, Y, X] or [C, Y, X] -> [B, K, Y', X'] or [K, Y', X']."""
        kind = self._kind(x)
        if kind is None:
            return self._convolve(x)
        stock = self.__dict__.get("_stock", [])
        if kind in stock:
            parameters = self._parameters
            return self._conv_forward(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
        with dispatch.watched() as backends:
            y = self._convolve(x)
        if backends == ["torch"]:
            # The list is replaced, not changed: another thread may be reading it.
            self.__dict__["_stock"] = [kind, *stock[: MOST_STOCK - 1]]
        return y

    def _kind(self, x: Tensor) -> tuple[Any, ...] | None:
        """What a call's checks and choice of a backend follow from; None where not from this."""
        if not tracing.is_eager() or type(x) is not Tensor:
            return None
        parameters = self._parameters  # self.weight takes 0.4 us
        weight, bias = parameters.get("weight"), parameters.get("bias", x)
        if type(weight) is not Parameter or not (bias is None or type(bias) is Parameter):
            return None
        training = torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        return (
            x.shape,
            x.stride(),
            x.dtype,
            x.is_cpu or x.device,
            weight.shape,
            weight.stride(),
            weight.dtype,
            weight.is_cpu or weight.device,
            None if bias is None else (bias.shape, bias.dtype, bias.is_cpu or bias.device),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.padding_mode,
            self.backend,
            training,
            torch.get_num_threads(),
            dispatch.state(NAME),
        )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()  # as copy and pickle take it, without what calls left
        state.pop("_stock", None)
        return state

    def _convolve(self, x: Tensor, **epilogue: Any) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv_bias_act(
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            backend=self.backend,
            **epilogue,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend!r}"


class ConvBiasAct(Conv2d):
    """A Conv2d with residual, activation and maximum pooling; parameters as torch.nn.Conv2d.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
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
        """x [B, C, Y, X], residual of the convolution's shape -> [B, K, Y'', X'']."""
        return self._convolve(
            x, residual=residual, activation=self.activation, max_pool=self.max_pool
        )

    def extra_repr(self) -> str:
        epilogue = f"activation={self.activation!r}, max_pool={self.max_pool!r}"
        return f"{super().extra_repr()}, {epilogue}"
