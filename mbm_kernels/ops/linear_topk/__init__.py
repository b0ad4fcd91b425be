from mbm_kernels.ops.linear_topk.op import linear_topk as linear_topk
