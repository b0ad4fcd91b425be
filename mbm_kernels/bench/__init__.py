"""Timing beside the fastest PyTorch baseline: ratios, intervals, memory, % of the roofline."""

from mbm_kernels.bench.benchmark import BOTH as BOTH
from mbm_kernels.bench.benchmark import FORWARD as FORWARD
from mbm_kernels.bench.benchmark import PASSES as PASSES
from mbm_kernels.bench.benchmark import Benchmark as Benchmark
from mbm_kernels.bench.benchmark import Case as Case
from mbm_kernels.bench.benchmark import Form as Form
from mbm_kernels.bench.benchmark import as_called as as_called
from mbm_kernels.bench.benchmark import eager_and_compiled as eager_and_compiled
from mbm_kernels.bench.benchmark import frozen as frozen
from mbm_kernels.bench.benchmark import holding as holding
from mbm_kernels.bench.benchmark import with_channels_last as with_channels_last
from mbm_kernels.bench.limits import Work as Work
