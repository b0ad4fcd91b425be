"""Fused convolution, GRU, attention and distillation-loss kernels for multimodal models."""

from mbm_kernels import nn as nn
from mbm_kernels._core.dispatch import backends as backends
from mbm_kernels._core.dispatch import disabled as disabled
from mbm_kernels._core.dispatch import set_backend as set_backend
from mbm_kernels._core.errors import BackendUnavailableError as BackendUnavailableError
from mbm_kernels._core.packing import forget as forget
from mbm_kernels.explaining import Explanation as Explanation
from mbm_kernels.explaining import explain as explain
from mbm_kernels.ops import *  # noqa: F403
from mbm_kernels.ops import PUBLIC as _ops
from mbm_kernels.ops import AdditiveAttentionKeys as AdditiveAttentionKeys
from mbm_kernels.ops import additive_attention_keys as additive_attention_keys

__version__ = "0.1.0"
__all__ = [
    "AdditiveAttentionKeys",
    "BackendUnavailableError",
    "Explanation",
    "additive_attention_keys",
    "backends",
    "disabled",
    "explain",
    "forget",
    "nn",
    "set_backend",
    *_ops,
]
