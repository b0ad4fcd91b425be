"""ONNX models of what our operations compute.

`torch.onnx.export(module, ..., dynamo=True)` needs nothing of this: while it traces, operations
record what ONNX has, PyTorch's own operations or a GRU, whatever their backend. A program that
torch.export made before holds our operations, which no ONNX runtime has:

    program = torch.export.export(module, args)
    program = program.run_decompositions(mbm_kernels.onnx.decompositions())
    torch.onnx.export(program, dynamo=True)
"""

from collections.abc import Callable
from typing import Any

from mbm_kernels._core.op import OPS


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For each of our registered operations a function that does the same by operations of ONNX.

    Returns:
        A table for `torch.export.ExportedProgram.run_decompositions`.
    """
    return {op.registered: op.decomposed for op in OPS.values()}
