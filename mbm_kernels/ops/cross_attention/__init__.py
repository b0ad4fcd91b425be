from mbm_kernels.ops.cross_attention.op import cross_attention as cross_attention
