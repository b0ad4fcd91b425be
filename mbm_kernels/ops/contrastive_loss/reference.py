"""The definition of the contrastive losses, without tricks."""

import torch
from torch import Tensor


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | None = None,
    kind: str = "infonce",
) -> Tensor:
    """image [B, D], text [B, D], scale and bias of one element -> scalar."""
    batch = image.size(0)
    if isinstance(scale, Tensor):
        scale = scale.reshape(()).to(image.dtype)
    logits = scale * (image @ text.t())  # [B, B]; pairs stand on the diagonal
    if kind == "infonce":
        by_image = torch.log_softmax(logits, 1).diagonal()
        by_text = torch.log_softmax(logits, 0).diagonal()
        return -(by_image + by_text).mean() / 2
    # A bias matters here only: softmax removes what is common to all its inputs.
    if bias is not None:
        logits = logits + bias.reshape(()).to(image.dtype)
    labels = 2 * torch.eye(batch, dtype=logits.dtype, device=logits.device) - 1
    return -torch.nn.functional.logsigmoid(labels * logits).sum() / batch
