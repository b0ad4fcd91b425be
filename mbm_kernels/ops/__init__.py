"""The operations; one folder each. What is not internal is a public function of the library."""

from typing import TYPE_CHECKING

from mbm_kernels._core.op import OPS
from mbm_kernels.ops.additive_attention import AdditiveAttentionKeys as AdditiveAttentionKeys
from mbm_kernels.ops.additive_attention import additive_attention as additive_attention
from mbm_kernels.ops.additive_attention import additive_attention_keys as additive_attention_keys
from mbm_kernels.ops.concat_linear import concat_linear as concat_linear
from mbm_kernels.ops.contrastive_loss import contrastive_loss as contrastive_loss
from mbm_kernels.ops.conv_bias_act import conv_bias_act as conv_bias_act
from mbm_kernels.ops.cross_attention import cross_attention as cross_attention
from mbm_kernels.ops.gru import gru as gru
from mbm_kernels.ops.gru.bidirectional import gru_bidirectional as gru_bidirectional
from mbm_kernels.ops.gru_cell import gru_cell as gru_cell
from mbm_kernels.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from mbm_kernels.ops.linear_distillation_loss import (
    linear_distillation_loss as linear_distillation_loss,
)
from mbm_kernels.ops.linear_topk import linear_topk as linear_topk

INTERNAL = ("gru_bidirectional", "linear_topk")  # what modules and models call, not users
PUBLIC = sorted(name for name in OPS if name not in INTERNAL)
if not TYPE_CHECKING:  # to a type checker, what is imported as itself is public
    __all__ = PUBLIC
