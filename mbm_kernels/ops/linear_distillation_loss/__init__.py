from mbm_kernels.ops.linear_distillation_loss.op import (
    linear_distillation_loss as linear_distillation_loss,
)
