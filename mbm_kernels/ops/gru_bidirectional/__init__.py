from mbm_kernels.ops.gru_bidirectional.op import gru_bidirectional as gru_bidirectional
