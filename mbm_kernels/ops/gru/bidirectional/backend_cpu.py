"""csrc/gru with both directions in one call, at once where the threads are even in number."""

from mbm_kernels.ops.gru.layer_cpu import bwd as bwd
from mbm_kernels.ops.gru.layer_cpu import fwd as fwd
from mbm_kernels.ops.gru.layer_cpu import why_not as why_not
