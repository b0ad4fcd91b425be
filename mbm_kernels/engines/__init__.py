"""Inference engines beside PyTorch, run on the same numbers: for measurement alone.

Each is given a `Model`, an nn.Module with its inputs, and answers with a `Session`, whose `run` may
be timed. `sessions` builds all that can run a model, and says of the others why they cannot.
"""

from mbm_kernels.engines.engine import Engine as Engine
from mbm_kernels.engines.engine import Session as Session
from mbm_kernels.engines.errors import MOST_ERROR as MOST_ERROR
from mbm_kernels.engines.errors import relative_error as relative_error
from mbm_kernels.engines.errors import remark as remark
from mbm_kernels.engines.inductor import frozen as frozen
from mbm_kernels.engines.model import Model as Model
from mbm_kernels.engines.model import flat as flat
from mbm_kernels.engines.running import ENGINES as ENGINES
from mbm_kernels.engines.running import Measured as Measured
from mbm_kernels.engines.running import Sessions as Sessions
from mbm_kernels.engines.running import sessions as sessions
