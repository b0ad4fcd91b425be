"""Drop-in modules: the constructors and state_dict of torch.nn plus `backend="auto"`."""

from mbm_kernels.ops.additive_attention.module import AdditiveAttention as AdditiveAttention
from mbm_kernels.ops.concat_linear.module import ConcatLinear as ConcatLinear
from mbm_kernels.ops.conv_bias_act.module import Conv1d as Conv1d
from mbm_kernels.ops.conv_bias_act.module import Conv2d as Conv2d
from mbm_kernels.ops.conv_bias_act.module import ConvBiasAct as ConvBiasAct
from mbm_kernels.ops.cross_attention.module import MultiheadAttention as MultiheadAttention
from mbm_kernels.ops.gru.module import GRU as GRU
from mbm_kernels.ops.gru_cell.module import GRUCell as GRUCell
from mbm_kernels.ops.linear_distillation_loss.module import (
    LinearDistillationLoss as LinearDistillationLoss,
)
