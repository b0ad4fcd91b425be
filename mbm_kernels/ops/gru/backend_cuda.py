"""csrc/gru over thread-block clusters or groups of blocks, in one direction."""

from mbm_kernels.ops.gru.layer_cuda import bwd as bwd
from mbm_kernels.ops.gru.layer_cuda import fwd as fwd
from mbm_kernels.ops.gru.layer_cuda import why_not as why_not
