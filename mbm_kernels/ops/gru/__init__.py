from mbm_kernels.ops.gru.op import gru as gru
