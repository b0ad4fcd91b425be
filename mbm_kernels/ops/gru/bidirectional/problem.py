"""The problem descriptor of both directions is gru's, of two."""

from typing import Any

from mbm_kernels._core.problem import Calls
from mbm_kernels.ops.gru import problem
from mbm_kernels.ops.gru.problem import Problem

NAME = "gru_bidirectional"
CALLS: Calls[Problem] = Calls()


def find(*tensors: Any, checked: bool = False) -> Problem:
    """The problem of x, h0, the weights and biases of each direction, and lengths."""
    return problem.described(NAME, tensors, 2, False, checked)
