"""The best stock form: the product, then one class without a sort, or a stable one for more."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(device: Any = None, dtype: Any = None, **sizes: int) -> str | None:
    return None


def fwd(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight, bias)
    if k == 1:
        ids = logits.argmax(-1, keepdim=True)
    else:
        # topk leaves the order of equal logits open.
        ids = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    return torch.log_softmax(logits, -1).gather(-1, ids), ids
