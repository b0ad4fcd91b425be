"""What a call of the Triton backend consists of: its sizes, and which way each part of it goes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels.ops.conv_bias_act.problem import NO_POOL, Problem

POOL_2 = (2, 2, 2, 2, 0, 0)


def tf32_allowed() -> bool:
    """Whether stock would round a float32 convolution's factors to tf32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined,no-any-return]


class Plan:
    """Sizes and choices that forward and backward share; x is [B, C, Y, X] here, of no bytes."""

    def __init__(self, p: Problem, x: Tensor, weight: Tensor):
        self.x, self.weight = x.to(p.dtype), weight
        self.stride, self.padding, self.dilation = list(p.stride), list(p.padding), list(p.dilation)
        self.groups, self.conv, self.out, self.pool = p.groups, p.conv, p.out, p.pool
        self.B, self.K = p.x_shape[0], p.weight_shape[0]
        self.act = p.activation or "none"
        self.channels_last = p.channels_last
        self.sizes = {
            "B": self.B,
            "C": x.size(1),
            "K": self.K,
            "R": weight.size(2),
            "S": weight.size(3),
            "pixels": self.B * self.out[0] * self.out[1],
            "pool_area": self.pool[0] * self.pool[1],
            "channels_last": int(self.channels_last),
            # Whether a pixel's channels are vectors of 16 bytes.
            "vectors": int(self.x.stride(1) == 1 and x.size(1) % 8 == 0 and self.K % 8 == 0),
        }
        self.tf32 = p.dtype == torch.float32 and tf32_allowed()

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
