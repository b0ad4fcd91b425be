"""Fused convolution, GRU, attention and distillation-loss kernels for multimodal models."""

from mbm_kernels import nn as nn
from mbm_kernels import onnx as onnx
from mbm_kernels._core.dispatch import backends as backends
from mbm_kernels._core.dispatch import disabled as disabled
from mbm_kernels._core.dispatch import set_backend as set_backend
from mbm_kernels._core.errors import BackendUnavailableError as BackendUnavailableError
from mbm_kernels._core.heap import warm_heap as warm_heap
from mbm_kernels._core.heap import warm_if_asked as _warm_if_asked
from mbm_kernels._core.packing import forget as forget
from mbm_kernels.explaining import Explanation as Explanation
from mbm_kernels.explaining import explain as explain
from mbm_kernels.ops import *  # noqa: F403
from mbm_kernels.ops import PUBLIC as _ops
from mbm_kernels.ops import AdditiveAttentionKeys as AdditiveAttentionKeys
from mbm_kernels.ops import additive_attention_keys as additive_attention_keys
from mbm_kernels.optimize import Parity as Parity
from mbm_kernels.optimize import Report as Report
from mbm_kernels.optimize import check_parity as check_parity
from mbm_kernels.optimize import optimize as optimize
from mbm_kernels.optimize import optimized as optimized

__version__ = "0.1.0"
__all__ = [
    "AdditiveAttentionKeys",
    "BackendUnavailableError",
    "Explanation",
    "Parity",
    "Report",
    "additive_attention_keys",
    "backends",
    "check_parity",
    "disabled",
    "explain",
    "forget",
    "nn",
    "onnx",
    "optimize",
    "optimized",
    "set_backend",
    "warm_heap",
    *_ops,
]
_warm_if_asked()
