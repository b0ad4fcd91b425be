"""The problem descriptor of both directions is gru's, of two."""

from typing import Any

from mbm_kernels._core.problem import Problems
from mbm_kernels.ops.gru import problem
from mbm_kernels.ops.gru.problem import Problem

NAME = "gru_bidirectional"


def build(*tensors: Any) -> Problem:
    """The problem of x, h0, the weights and biases of each direction, and lengths."""
    return problem.describe(NAME, tensors, 2, False)


PROBLEMS: Problems[Problem] = Problems(build, inputs=11)
find = PROBLEMS.find
