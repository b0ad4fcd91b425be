"""OpSuite's tests of torch's tools: compilers, dispatch modes, checkpoints, FLOP counters."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import mbm_kernels
from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS
from mbm_kernels.testing.inputs import Inputs, with_leaves

Call = Callable[..., tuple[Tensor, ...]]


def compiled(call: Call, op: str) -> Call:
    torch._dynamo.reset()
    run: Call = torch.compile(call, fullgraph=True, backend="aot_eager")
    return run


def counted(call: Call, op: str) -> Call:
    def run(*values: Any) -> tuple[Tensor, ...]:
        with FlopCounterMode(display=False):
            return call(*values)

    return run


def _checkpointed(keep: bool) -> Callable[[Call, str], Call]:
    """`keep`: the operation's results are kept and all else is computed again; else the reverse."""

    def wrap(call: Call, op: str) -> Call:
        def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            saved = (func is OPS[op].registered) == keep
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        def run(*values: Any) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = checkpoint(
                call,
                *values,
                use_reentrant=False,
                context_fn=lambda: create_selective_checkpoint_contexts(policy),
            )
            return found

        return run

    return wrap


TOOLS: dict[str, Callable[[Call, str], Call]] = {
    "compile": compiled,
    "counter": counted,
    "kept": _checkpointed(True),
    "recomputed": _checkpointed(False),
}


class ToolTests:
    """A part of OpSuite, which gives `op`, `cases`, `inputs`, `run` and `diff`."""

    op: ClassVar[str]
    diff: ClassVar[tuple[str, ...]]
    cases: ClassVar[list[Any]]
    inputs: Callable[..., Inputs]
    run: Callable[..., tuple[Tensor, ...]]

    def test_a_checkpoint_runs_a_first_call_again(self, backend: str) -> None:
        """Whatever the first call of its kind saves, it saves again as one of those after it."""
        try:
            problem = importlib.import_module(f"{dispatch.package_of(self.op)}.problem")
        except ModuleNotFoundError:
            pytest.skip("an operation without a problem descriptor knows no calls")
        problem.PROBLEMS.clear()
        inputs, leaves = with_leaves(self.inputs(self.cases[0], torch.float32), self.diff)

        def call(*values: Any) -> tuple[Tensor, ...]:
            return self.run(dict(zip(inputs, values, strict=True)), backend)

        def gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
            found = [o for o in outputs if o.requires_grad]
            ones = [torch.ones_like(o) for o in found]
            return torch.autograd.grad(found, list(leaves.values()), ones, allow_unused=True)

        actual = gradients(checkpoint(call, *inputs.values(), use_reentrant=False))
        for a, e in zip(actual, gradients(call(*inputs.values())), strict=True):
            assert (a is None) == (e is None)
            assert a is None or torch.equal(a.nan_to_num(), e.nan_to_num())  # type: ignore[union-attr]

    def _each_alone(self) -> Iterator[tuple[Inputs, dict[str, Tensor]]]:
        """The usual inputs with one leaf each time that requires a gradient."""
        _, leaves = with_leaves(self.inputs(self.cases[0], torch.float32), self.diff)
        for name in leaves:
            inputs, all_leaves = with_leaves(self.inputs(self.cases[0], torch.float32), self.diff)
            for other, leaf in all_leaves.items():
                leaf.requires_grad_(other == name)
            yield inputs, {name: all_leaves[name]}

    @pytest.mark.parametrize("tool", TOOLS)
    def test_each_gradient_alone(self, tool: str) -> None:
        backend = _with_kernels(self.op)
        inputs, leaves = with_leaves(self.inputs(self.cases[0], torch.float32), self.diff)
        expected = dict(zip(leaves, _gradients(self.run(inputs, backend), leaves), strict=True))
        for alone, leaf in self._each_alone():

            def call(*values: Any, names: Any = tuple(alone)) -> tuple[Tensor, ...]:
                return self.run(dict(zip(names, values, strict=True)), backend)

            found = TOOLS[tool](call, self.op)(*alone.values())
            for name, grad in zip(leaf, _gradients(found, leaf), strict=True):
                torch.testing.assert_close(grad, expected[name], equal_nan=True)

    def test_flops_are_the_stock_forms(self) -> None:
        backend = _with_kernels(self.op)

        def count(inputs: Inputs, leaves: dict[str, Tensor], backend: str) -> int:
            with FlopCounterMode(display=False) as counter:
                outputs = self.run(inputs, backend)
                if leaves:  # what a forward makes is the gradient of its first output
                    _gradients(outputs[:1] if OPS[self.op].made else outputs, leaves)
            return counter.get_total_flops()

        inputs = self.inputs(self.cases[0], torch.float32)
        nothing: dict[str, Tensor] = {}
        for given, leaves in (
            (inputs, nothing),
            with_leaves(inputs, self.diff),
            *self._each_alone(),
        ):
            assert count(given, leaves, backend) == count(given, leaves, "torch"), list(leaves)


def _with_kernels(op: str) -> str:
    """What these tests depend on is one code for all backends: one that is fast will do."""
    return "cpu" if mbm_kernels.backends(op)["cpu"] is None else "torch"


def _gradients(outputs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    smooth = [o for o in outputs if o.requires_grad]
    return torch.autograd.grad(
        smooth,
        list(leaves.values()),
        [torch.ones_like(o) for o in smooth],
        allow_unused=True,
        materialize_grads=True,
    )
