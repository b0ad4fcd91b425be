"""A model made faster in place: `optimize`, its report, and the proof that results stay right."""

from mbm_kernels.optimize.errors import Parity as Parity
from mbm_kernels.optimize.optimizing import optimize as optimize
from mbm_kernels.optimize.optimizing import optimized as optimized
from mbm_kernels.optimize.parity import check_parity as check_parity
from mbm_kernels.optimize.report import Report as Report
