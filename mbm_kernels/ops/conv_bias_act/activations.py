"""PyTorch's forms of the activations, out of place and in place."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Callable[[Tensor], Tensor]


class Activation(NamedTuple):
    """One of geometry.ACTIVATIONS.

    module: the class of torch.nn. keeps_result: autograd differentiates it by its result, so that
    it may run in place in training too; of the others it keeps the input.
    """

    module: str
    fresh: Form
    in_place: Form
    keeps_result: bool = False

    def form(self, recorded: bool) -> Form:
        """The fastest on a tensor that nobody else holds; `recorded`: it is differentiated."""
        return self.in_place if self.keeps_result or not recorded else self.fresh


TABLE = {
    "relu": Activation("ReLU", F.relu, torch.relu_, True),
    "relu6": Activation("ReLU6", F.relu6, lambda z: F.relu6(z, inplace=True), True),
    "leaky_relu": Activation(
        "LeakyReLU", F.leaky_relu, lambda z: F.leaky_relu(z, 0.01, inplace=True), True
    ),
    "silu": Activation("SiLU", F.silu, lambda z: F.silu(z, inplace=True)),
    "gelu": Activation("GELU", F.gelu, torch.ops.aten.gelu_.default),
    "gelu_tanh": Activation(
        "GELU",
        lambda z: F.gelu(z, approximate="tanh"),
        lambda z: torch.ops.aten.gelu_.default(z, approximate="tanh"),
    ),
    "hardswish": Activation("Hardswish", F.hardswish, lambda z: F.hardswish(z, inplace=True)),
    "sigmoid": Activation("Sigmoid", torch.sigmoid, torch.sigmoid_, True),
    "tanh": Activation("Tanh", torch.tanh, torch.tanh_, True),
}
