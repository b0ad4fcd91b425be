"""The torch.library side of an operation: schemas, kernels, fakes and the vmap rule.

What compilers, exporters, tracers and dispatch modes see is `torch.ops.mbm_kernels.<op>` and
`<op>_backward`, whose arguments are explicit; the last one names the backend.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import arguments, by_autograd
from mbm_kernels._core.arguments import as_tuple
from mbm_kernels._core.spec import Operation

NAMESPACE = "mbm_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
Outputs = tuple[Tensor, ...]


def label(name: str) -> str:
    return f"{NAMESPACE}::{name}"


class Registration:
    """Defines both operations of `op` and holds them as `forward` and `backward`."""

    def __init__(self, op: Operation):
        self.op, self.spec = op, op.spec
        name = self.spec.name
        self._define(name, self.spec.forward_schema, self._fwd, self._fake_fwd)
        self._define(
            f"{name}_backward",
            f"{self.spec.backward_schema} -> Tensor[]",
            self._bwd,
            self._fake_bwd,
        )
        packet = getattr(torch.ops, NAMESPACE)
        self.forward = getattr(packet, name).default
        self.backward = getattr(packet, f"{name}_backward").default
        for registered in (self.forward, self.backward):
            # torch's own loop over a batch takes no lists, and warns
            torch.library.register_vmap(registered, arguments.looped(registered))

    def _define(self, name: str, schema: str, kernel: Any, fake: Any) -> None:
        declared, returned = schema.split(" -> ")
        _library.define(
            f"{name}{declared.removesuffix(')')}, str backend) -> {returned}",
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(label(name), fake)

    def _returned(self, outputs: Outputs) -> Any:
        return outputs if len(self.spec.results) > 1 else outputs[0]

    def _fwd(self, *args: Any) -> Any:
        with torch.no_grad():
            outputs = self.run_forward(args[-1], args[:-1])
        return self._returned(tuple(arguments.fresh(o, args) for o in outputs))

    def run_forward(self, backend: str, args: Sequence[Any]) -> Outputs:
        """All results, of which a backend may leave out what nobody asked for: a registered
        operation returns the same each time."""
        outputs = self.op.backend_fwd(backend, args)
        if backend == "torch" or len(outputs) < len(self.spec.results):
            outputs = self._without_made(outputs)
        if all(output is not None for output in outputs):
            return outputs
        empty = as_tuple(self.op.fake(*args))
        return tuple(
            torch.zeros_like(e) if o is None else o for o, e in zip(outputs, empty, strict=False)
        )

    def _without_made(self, outputs: Sequence[Any]) -> tuple[Any, ...]:
        kept = outputs[: len(self.spec.results) - len(self.spec.precomputed)]
        made = (outputs[0].new_empty(0, dtype=torch.float32) for _ in self.spec.precomputed)
        return (*kept, *made)

    def _fake_fwd(self, *args: Any) -> Any:
        outputs = as_tuple(self.op.fake(*args[:-1]))
        return self._returned(self._without_made(outputs) if args[-1] == "torch" else outputs)

    def _bwd(self, *args: Any) -> list[Tensor]:
        with torch.no_grad():
            found = self.run_backward(args[-1], args[:-1])
        return [grad.contiguous() for grad in found if grad is not None]

    def run_backward(self, backend: str, args: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """Gradients of the differentiable inputs, None where not needed."""
        if backend != "torch":
            return self.op.backend_bwd(backend, args)
        named = dict(zip(self.spec.backward_names, args, strict=True))
        inputs = [True if n == "save" else named[n] for n in self.spec.forward_names]
        positions = [self.spec.forward_names.index(n) for n in self.spec.differentiable]
        grads = [named[name] for name in self.spec.grad_names]
        call, needs = self.op.torch_fwd_explicit, named["needs"]
        flat = by_autograd.gradients(call, inputs, positions, grads, needs, False)
        return tuple(arguments.spread([inputs[i] for i in positions], needs, iter(flat)))

    def _fake_bwd(self, *args: Any) -> list[Tensor]:
        named = dict(zip(self.spec.backward_names, args, strict=False))
        shapes: list[Tensor] = []
        for name, needed in zip(self.spec.differentiable, named["needs"], strict=True):
            if needed and named[name] is not None:
                shapes.extend(arguments.flat((named[name],)))
        return [torch.empty_like(s, memory_format=torch.contiguous_format) for s in shapes]
