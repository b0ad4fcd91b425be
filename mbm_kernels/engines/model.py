"""What engines are given: a module in eval mode with the tensors that it is called with."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


class Called(nn.Module):
    """A function or module of arguments by name as a module of its tensors by position."""

    def __init__(self, function: Callable[..., Any], arguments: Mapping[str, Any]):
        super().__init__()
        self.function = function
        self.names = tuple(n for n, value in arguments.items() if isinstance(value, Tensor))
        self.rest = {n: value for n, value in arguments.items() if n not in self.names}

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(**dict(zip(self.names, tensors, strict=True)), **self.rest)


@dataclass
class Model:
    """A module in eval mode, its inputs, and what it is to engines.

    Args:
        module: of stock PyTorch; takes `inputs` by position and returns a tensor or several.
        inputs: as PyTorch is given them; engines get them contiguous.
        exported: its ONNX model of these shapes, if there is one already.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    exported: bytes | None = None

    @classmethod
    def of(cls, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Model:
        """Of a function or module and its arguments by name; what is no tensor is a constant."""
        module = Called(function, arguments).eval()
        # Parameters among them are inputs here, which a compiler must not take for constants.
        return cls(module, tuple(arguments[name].detach() for name in module.names))

    @cached_property
    def onnx(self) -> bytes:
        """The ONNX model of these shapes, exported once.

        Raises:
            ImportError: where onnx or onnxscript, which torch.onnx.export needs, is missing.
            Exception: what torch.onnx.export raises.
        """
        return self.exported or _export(self.module, self.inputs)

    @cached_property
    def _graph(self) -> Any:
        import onnx

        return onnx.load_from_string(self.onnx).graph

    @property
    def operators(self) -> set[str]:
        """The kinds of nodes in the ONNX model."""
        return {node.op_type for node in self._graph.node}

    @property
    def names(self) -> tuple[list[str], list[str]]:
        """Of the ONNX model's inputs and outputs, in order."""
        return [i.name for i in self._graph.input], [o.name for o in self._graph.output]

    @cached_property
    def contiguous(self) -> tuple[Tensor, ...]:
        """The inputs in row-major order."""
        return tuple(x.detach().contiguous() for x in self.inputs)

    def truth(self) -> list[Tensor]:
        """The module's results in float64."""
        module = copy.deepcopy(self.module).double()
        given = (x.double() if x.is_floating_point() else x for x in self.inputs)
        with torch.no_grad():
            return flat(module(*given))


def _export(module: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's about itself
            program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    finally:
        logger.setLevel(level)
    assert program is not None
    found: bytes = program.model_proto.SerializeToString()
    return found


def flat(results: Any) -> list[Tensor]:
    """The tensors of a result, in the order in which an exporter names them."""
    if isinstance(results, Tensor):
        return [results]
    values = results.values() if isinstance(results, Mapping) else results
    return [tensor for value in values if value is not None for tensor in flat(value)]
