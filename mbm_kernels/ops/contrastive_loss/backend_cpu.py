"""csrc/contrastive_loss: a chunk of images at a time against all texts; gradients in the forward.

bfloat16 and float16 are computed in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import native
from mbm_kernels.ops.linear_head import targets

_KINDS = ("infonce", "siglip")


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return native.why_not(device, dtype)


def _run(
    grad_loss: Tensor | None,
    loss: Tensor | None,
    gradients: Sequence[Tensor | None],
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kind: str,
) -> None:
    # Named, so that what was converted lives as long as the call.
    image, text = native.dense(image), native.dense(text)
    scale, bias, grad_loss = scale.float(), native.dense(bias), native.dense(grad_loss)
    native.cpu().contrastive_loss(
        image.size(0),
        image.size(1),
        _KINDS.index(kind),
        image.data_ptr(),
        text.data_ptr(),
        scale.data_ptr(),
        native.address(bias),
        native.address(grad_loss),
        native.address(loss),
        tuple(map(native.address, gradients)),
        torch.get_num_threads(),
    )


def fwd(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kind: str,
    save: Sequence[bool],
) -> tuple[Tensor, ...]:
    loss = native.empty(())
    if not any(save):
        _run(None, loss, (None,) * 4, image, text, scale, bias, kind)
        return (loss,)
    made = targets.gradients_to_make((image, text, scale, bias), save, "mean")
    wanted = [
        g if x is not None and s else None
        for x, s, g in zip((image, text, scale, bias), save, made, strict=True)
    ]
    _run(None, loss, wanted, image, text, scale, bias, kind)
    return loss, *made


def bwd(
    grad_loss: Tensor | None,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    kind: str,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    inputs = (image, text, scale, bias)
    wanted = [
        native.empty(x.shape) if x is not None and needed else None
        for x, needed in zip(inputs, needs, strict=True)
    ]
    _run(grad_loss, None, wanted, *inputs, kind)
    return tuple(
        None if g is None or x is None else g.to(x.dtype)
        for g, x in zip(wanted, inputs, strict=True)
    )
