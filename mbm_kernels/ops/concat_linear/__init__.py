from mbm_kernels.ops.concat_linear.op import concat_linear as concat_linear
