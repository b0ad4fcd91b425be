"""csrc/gru: packed weights, one product for the inputs, gates fused into the recurrent product."""

from mbm_kernels.ops.gru.layer_cpu import bwd as bwd
from mbm_kernels.ops.gru.layer_cpu import fwd as fwd
from mbm_kernels.ops.gru.layer_cpu import why_not as why_not
