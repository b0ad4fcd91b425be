"""Drop-in modules: the constructors and state_dict of torch.nn plus `backend="auto"`."""

from mbm_kernels.ops.additive_attention.module import AdditiveAttention as AdditiveAttention
from mbm_kernels.ops.conv_bias_act.module import Conv2d as Conv2d
from mbm_kernels.ops.conv_bias_act.module import ConvBiasAct as ConvBiasAct
