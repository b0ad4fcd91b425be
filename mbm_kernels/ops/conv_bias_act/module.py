"""torch.nn.Conv2d with a backend, and with its epilogue."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mbm_kernels._core import checks, dispatch, tracing
from mbm_kernels._core.drop_in import DropIn
from mbm_kernels.ops.conv_bias_act import geometry
from mbm_kernels.ops.conv_bias_act.geometry import ACTIVATIONS
from mbm_kernels.ops.conv_bias_act.op import convolve
from mbm_kernels.ops.conv_bias_act.problem import NAME


class Conv2d(DropIn, nn.Conv2d):
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
        return self._convolve(x)

    def _convolve(
        self, x: Tensor, residual: Tensor | None = None, activation: Any = None, pool: Any = None
    ) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        weight: Any
        bias: Any
        try:  # 0.4 us less each than the attributes, which may be parametrized
            weight, bias = self._parameters["weight"], self._parameters["bias"]
        except KeyError:
            weight, bias = self.weight, self.bias
        options = (self.stride, padding, self.dilation, self.groups, activation, pool)
        return convolve((x, weight, bias, residual), options, self.backend)

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
        return self._convolve(x, residual, self.activation, self.max_pool)

    def extra_repr(self) -> str:
        epilogue = f"activation={self.activation!r}, max_pool={self.max_pool!r}"
        return f"{super().extra_repr()}, {epilogue}"
