from mbm_kernels.ops.contrastive_loss.op import contrastive_loss as contrastive_loss
