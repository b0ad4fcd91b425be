"""csrc/gru over a thread-block cluster, in one direction."""

from mbm_kernels.ops.gru.layer_cuda import bwd as bwd
from mbm_kernels.ops.gru.layer_cuda import fwd as fwd
from mbm_kernels.ops.gru.layer_cuda import why_not as why_not
