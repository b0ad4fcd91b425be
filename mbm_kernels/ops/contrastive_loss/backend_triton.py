"""Products by torch, a chunk of images at a time; Triton kernels for statistics and gradients.

Gradients that are wanted are made in the forward, where the products are; several chunks of infonce
are multiplied again for them, so that [B, B] never exists above linear_head.CHUNK_BYTES.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import triton_launch
from mbm_kernels._core.triton_launch import ceil_div
from mbm_kernels.ops.contrastive_loss.problem import Problem
from mbm_kernels.ops.linear_head import linear_head, matmul
from mbm_kernels.ops.linear_head.linear_head import HeadGradients


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return triton_launch.why_not(device, dtype)


class _Call:
    """One call's sums: `loss`, and what scale and bias get of it, over pairs and not their mean."""

    def __init__(self, p: Problem, tensors: Sequence[Any]):
        self.image, self.text, self.scale, self.bias = tensors
        self.dtype, self.B, self.D = p.dtype, p.sizes["B"], p.sizes["D"]
        self.rows = list(linear_head.chunks(self.B, 4 * self.B))

    def empty(self, *shape: int) -> Tensor:
        return self.image.new_empty(shape, dtype=torch.float32)

    def products(self, rows: slice) -> Tensor:
        return matmul.product(self.image[rows], self.text.t())

    def launch(
        self, name: str, grid: Callable[[dict[str, int]], tuple[int, ...]], *args: Any, **named: Any
    ) -> None:
        kernel = triton_launch.kernel("contrastive_loss", name)
        sizes = {"B": self.B, "D": self.D}
        kernel(grid, *args, dtype=self.dtype, sizes=sizes, **named)

    def infonce(self, found: HeadGradients, by_scale: bool) -> None:
        by_row, by_column = self.empty(3, self.B), self.empty(2, self.B)
        products = self.empty(0)
        for rows in self.rows:
            products = self.products(rows)
            self._statistics(rows, products, by_row[:, rows], by_column)
        top, total, diagonal = by_row
        losses = (total.log() - (diagonal - top)) + (by_column[1].log() - (diagonal - by_column[0]))
        self.loss = 0.5 * losses.sum()
        self.by_bias = torch.zeros_like(self.loss)  # softmax removes what is common
        if not (found.any or by_scale):
            return
        sums = self.empty(self.B)
        share, factor = found.in_kernel
        for rows in self.rows:
            if len(self.rows) > 1:
                products = self.products(rows)
            room, count = found.room(products), products.size(0)
            self.launch(
                "infonce_gradients",
                lambda _, count=count: (count,),  # type: ignore[misc]
                *(products, self.scale, share, by_row[0, rows], by_row[1, rows], *by_column),
                *(sums[rows], room, self.B, rows.start, factor, products.stride(0)),
                0 if room is None else room.stride(0),
            )
            if room is not None:
                found.add(rows, room, self.image[rows], self.text)
        self.by_scale = sums.sum()

    def _statistics(self, rows: slice, products: Tensor, by_row: Tensor, by_column: Tensor) -> None:
        """Of a chunk: by_row [3, M] and by_column [2, B], which the chunks before have begun."""
        kernel = triton_launch.kernel("contrastive_loss", "infonce_statistics")
        config = kernel.config(self.dtype, {"B": self.B, "D": self.D})
        count = products.size(0)
        parts = ceil_div(count, dict(config.constants)["BLOCK_R"])
        partial = self.empty(2, parts, self.B)
        self.launch(
            "infonce_statistics",
            lambda _: (parts,),
            *(products, self.scale, *by_row, *partial),
            *(count, self.B, rows.start, products.stride(0)),
            allocated_by=("BLOCK_R",),
        )
        self.launch(
            "infonce_columns",
            lambda c: (ceil_div(self.B, c["BLOCK_C"]),),
            *(*partial, *by_column, parts, self.B),
            FIRST=rows.start == 0,
        )

    def siglip(self, found: HeadGradients) -> None:
        sums = self.empty(3, self.B)
        share, factor = found.in_kernel
        for rows in self.rows:
            products = self.products(rows)
            room, count = found.room(products), products.size(0)
            self.launch(
                "siglip",
                lambda _, count=count: (count,),  # type: ignore[misc]
                *(products, self.scale, self.bias, share, *sums[:, rows], room),
                *(self.B, rows.start, factor, products.stride(0)),
                0 if room is None else room.stride(0),
            )
            if room is not None:
                found.add(rows, room, self.image[rows], self.text)
        self.loss, self.by_scale, self.by_bias = sums.sum(1)


def _run(
    p: Problem, tensors: Sequence[Any], grad: Tensor | None, wanted: Sequence[Tensor | None]
) -> Tensor:
    """The loss; the gradients `wanted`, of image, text, scale and bias, are written."""
    call = _Call(p, tensors)
    share = 1 / max(call.B, 1) if grad is None else grad / max(call.B, 1)
    found = HeadGradients((*wanted[:2], None), p.dtype, call.scale * share)
    if p.kind == "infonce":
        call.infonce(found, wanted[2] is not None)
    else:
        call.siglip(found)
    found.finish()
    if wanted[2] is not None:
        torch.mul(call.by_scale, share, out=wanted[2])
    if wanted[3] is not None:
        torch.mul(call.by_bias, share, out=wanted[3])
    return call.loss / call.B if call.B else call.loss / 0


def fwd(p: Problem, *args: Any) -> tuple[Tensor | None, ...]:
    *tensors, save = args
    made = linear_head.empty_where(tensors, save)
    return _run(p, tensors, None, made), *made


def bwd(
    p: Problem,
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    wanted = linear_head.empty_where(tensors, needs)
    _run(p, tensors, grads[0], wanted)
    return tuple(
        None if g is None else g.to(dtype) for g, dtype in zip(wanted, p.dtypes, strict=True)
    )
