from mbm_kernels.ops.additive_attention.keys import (
    AdditiveAttentionKeys as AdditiveAttentionKeys,
)
from mbm_kernels.ops.additive_attention.keys import (
    additive_attention_keys as additive_attention_keys,
)
from mbm_kernels.ops.additive_attention.op import additive_attention as additive_attention
