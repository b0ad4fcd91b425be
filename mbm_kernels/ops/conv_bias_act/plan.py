"""What a call of the Triton backend consists of: its sizes, and which way each part of it goes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels.ops.conv_bias_act import geometry

NO_POOL = (1, 1, 1, 1, 0, 0)
POOL_2 = (2, 2, 2, 2, 0, 0)


def tf32_allowed() -> bool:
    """Whether stock would round a float32 convolution's factors to tf32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined,no-any-return]


class Plan:
    """Sizes and choices that forward and backward share; x is [B, C, Y, X] here."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str | None,
        max_pool: Sequence[int] | None,
    ):
        self.x, self.weight = x, weight
        self.stride, self.padding, self.dilation = list(stride), list(padding), list(dilation)
        self.groups = groups
        kernel = (weight.size(2), weight.size(3))
        self.conv = geometry.convolved((x.size(2), x.size(3)), kernel, stride, padding, dilation)
        self.out = self.conv if max_pool is None else geometry.pooled(self.conv, max_pool)
        self.B, self.K = x.size(0), weight.size(0)
        self.pool = tuple(max_pool or NO_POOL)
        self.act = activation or "none"
        self.channels_last = geometry.is_channels_last(x) or geometry.is_channels_last(weight)
        self.sizes = {
            "B": self.B,
            "C": x.size(1),
            "K": self.K,
            "R": kernel[0],
            "S": kernel[1],
            "pixels": self.B * self.out[0] * self.out[1],
            "pool_area": self.pool[0] * self.pool[1],
            "channels_last": int(self.channels_last),
            # Whether a pixel's channels are vectors of 16 bytes.
            "vectors": int(x.stride(1) == 1 and x.size(1) % 8 == 0 and self.K % 8 == 0),
        }
        self.tf32 = x.dtype == torch.float32 and tf32_allowed()

    def way(self, what: str) -> str:
        """How "forward", "grad_x" or "grad_weight" goes: the first of its choices that can."""
        for choice in triton_launch.read_choices("conv_bias_act")[what]:
            if self.covered(choice.use, what) and choice.holds(self.x.dtype, self.sizes):
                return choice.use
        raise RuntimeError(f"conv_bias_act: launch.json: no way for {what}; end it with aten")

    def covered(self, way: str, what: str) -> bool:
        """Whether the kernels of this way compute it."""
        if way == "aten":
            return True
        if 0 in (*self.x.shape, *self.out) or self.dilation != [1, 1]:
            return False
        if what == "forward" and self.pool not in (NO_POOL, POOL_2):
            return False
        if what == "grad_x" and self.stride != [1, 1]:
            return False
        if way == "depthwise":
            return self.groups == self.x.size(1) == self.K
        # In full float32 there are no matrix instructions to use.
        return self.groups == 1 and (self.x.dtype != torch.float32 or self.tf32)

    def empty(self, channels: int, size: Sequence[int]) -> Tensor:
        """[B, channels, *size] in the layout of the result."""
        return torch.empty(
            (self.B, channels, *size),
            dtype=self.x.dtype,
            device=self.x.device,
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format,
        )

    def launch(
        self,
        name: str,
        grid: triton_launch.Grid,
        *args: Any,
        sizes: dict[str, int] | None = None,
        **constexprs: Any,
    ) -> None:
        kernel = triton_launch.kernel("conv_bias_act", name)
        kernel(grid, *args, dtype=self.x.dtype, sizes=sizes or self.sizes, **constexprs)

    def kernel_constants(self, turned: bool = False) -> dict[str, Any]:
        stride = [1, 1] if turned else self.stride
        sizes = (self.weight.size(2), self.weight.size(3), *stride)
        return dict(zip(("R", "S", "STRIDE_Y", "STRIDE_X"), sizes, strict=True))

    @property
    def pool_constants(self) -> dict[str, Any]:
        names = ("POOL_Y", "POOL_X", "STEP_Y", "STEP_X", "PAD_Y", "PAD_X")
        return dict(zip(names, self.pool, strict=True))
