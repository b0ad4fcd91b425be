from mbm_kernels.ops.gru.bidirectional.op import gru_bidirectional as gru_bidirectional
