"""The operations; one folder each. This list is also the library's public functions."""

from mbm_kernels.ops.additive_attention import AdditiveAttentionKeys as AdditiveAttentionKeys
from mbm_kernels.ops.additive_attention import additive_attention
from mbm_kernels.ops.additive_attention import additive_attention_keys as additive_attention_keys
from mbm_kernels.ops.concat_linear import concat_linear
from mbm_kernels.ops.contrastive_loss import contrastive_loss
from mbm_kernels.ops.conv_bias_act import conv_bias_act
from mbm_kernels.ops.cross_attention import cross_attention
from mbm_kernels.ops.gru import gru
from mbm_kernels.ops.gru.bidirectional import gru_bidirectional as gru_bidirectional  # for nn.GRU
from mbm_kernels.ops.gru_cell import gru_cell
from mbm_kernels.ops.linear_cross_entropy import linear_cross_entropy
from mbm_kernels.ops.linear_distillation_loss import linear_distillation_loss
from mbm_kernels.ops.linear_topk import linear_topk as linear_topk  # internal: not in the list

__all__ = [
    "additive_attention",
    "concat_linear",
    "contrastive_loss",
    "conv_bias_act",
    "cross_attention",
    "gru",
    "gru_cell",
    "linear_cross_entropy",
    "linear_distillation_loss",
]
