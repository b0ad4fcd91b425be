"""The operations; one folder each. This list is also the library's public functions."""

from mbm_kernels.ops.additive_attention import additive_attention
from mbm_kernels.ops.conv_bias_act import conv_bias_act
from mbm_kernels.ops.gru import gru
from mbm_kernels.ops.gru_cell import gru_cell

__all__ = [
    "additive_attention",
    "conv_bias_act",
    "gru",
    "gru_cell",
]
