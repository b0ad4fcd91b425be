from mbm_kernels.ops.conv_bias_act.op import conv_bias_act as conv_bias_act
