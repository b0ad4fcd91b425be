"""The tests that every operation passes, under the same names and in the same order.

A test file subclasses `OpSuite` as Test<Op>, fills in what an operation is (its cases and how to
make inputs) and adds the operation's own properties. `grid.generate`, called from conftest's
pytest_generate_tests, spreads the tests over cases, dtypes and the backends that run here. 16-bit
floats, which kernels compute in float32 and round on store, take the first cases alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import mbm_kernels
from mbm_kernels._core.op import OPS, as_tuple
from mbm_kernels.testing.errors import assert_matches, float64_yardstick
from mbm_kernels.testing.inputs import (
    Inputs,
    flat_tensors,
    map_floating,
    map_tensors,
    with_leaves,
)
from mbm_kernels.testing.layouts import LAYOUTS, relayout
from mbm_kernels.testing.poison import poison
from mbm_kernels.testing.tools import ToolTests

Named = dict[str, Tensor]
Run = Callable[[Inputs], tuple[Tensor, ...]]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LENGTHS = ("lengths", "key_lengths")


@dataclass(frozen=True)
class Case:
    """One row of a test grid: what it is there for, sizes by their letters, other options."""

    why: str
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0  # magnitude of the floating inputs

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


class OpSuite(ToolTests):
    """Subclass as Test<Op>; every class attribute without a value must be given one."""

    op: ClassVar[str]
    function: ClassVar[Callable[..., Any]]  # the public function, as staticmethod
    reference: ClassVar[Callable[..., Any]]  # the definition, as staticmethod
    diff: ClassVar[tuple[str, ...]]  # arguments with gradients, where given
    cases: ClassVar[list[Case]]  # the grid of forward and backward; the first is the usual one
    edge_cases: ClassVar[list[Case]]  # sizes of 0 and 1, empty rows, ...
    dtypes: ClassVar[tuple[torch.dtype, ...]] = DTYPES
    rounded_cases: ClassVar[int] = 3  # the first of `cases` that are run in 16-bit floats too
    autocast_output: ClassVar[torch.dtype] = torch.bfloat16
    extra: ClassVar[float] = 0.0  # the operation's named constant, see assert_matches
    emulated: ClassVar[bool] = False  # `Emulated` says what of

    def takes(self, case: Case, backend: str) -> bool:
        """Whether the sizes of a case are among those of a backend that takes some alone."""
        return True

    def make(self, case: Case, generator: torch.Generator) -> Inputs:
        """The public function's arguments by name; floating tensors in float64."""
        raise NotImplementedError

    def schema_args(self, inputs: Inputs) -> list[Any]:
        """The registered op's arguments without the backend; `inputs` name all that differ from
        the schema's defaults of None."""
        op = OPS[self.op]
        save = [True] * len(op.diff) if op.saves_each else True
        return [save if n == "save" else inputs.get(n) for n in op.inputs]

    def inputs(self, case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return map_floating(self.make(case, generator), lambda x: (x * case.scale).to(dtype))

    def run(self, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        return self.run_on(inputs, backend, device_of(backend))

    def run_on(self, inputs: Inputs, backend: str, device: torch.device) -> tuple[Tensor, ...]:
        """Outputs where the inputs are; in between both are on `device`."""
        if device.type == "cpu":
            return as_tuple(type(self).function(**inputs, backend=backend))
        before = next(x.device for x in flat_tensors(inputs))
        outputs = as_tuple(type(self).function(**placed(inputs, device), backend=backend))
        return tuple(output.to(before) for output in outputs)

    def define(self, inputs: Inputs) -> tuple[Tensor, ...]:
        return as_tuple(type(self).reference(**inputs))

    def stock(self, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
        """The yardstick: the torch backend; for that one, the definition in the tested dtype."""
        if backend == "torch":
            return self.define(inputs)
        return self.run_on(inputs, "torch", device_of(backend))

    def check_forward(self, inputs: Inputs, backend: str) -> None:
        def forward(run: Run, given: Inputs, positive: bool = False) -> Named:
            with torch.no_grad():
                return {f"output {i}": output for i, output in enumerate(run(given))}

        self.compare(forward, inputs, backend, gradient=False)

    def check_backward(self, inputs: Inputs, backend: str) -> None:
        with torch.no_grad():
            outputs = self.define(map_floating(inputs, Tensor.double))
        generator = torch.Generator().manual_seed(1)
        dtype = next(x.dtype for x in flat_tensors(inputs) if x.is_floating_point())
        grads = [torch.randn(o.shape, generator=generator).to(dtype).double() for o in outputs]

        def backward(run: Run, given: Inputs, positive: bool = False) -> Named:
            return self.gradients(run, given, [g.abs() for g in grads] if positive else grads)

        self.compare(backward, inputs, backend, gradient=True)

    def compare(
        self,
        evaluate: Callable[..., Named],
        inputs: Inputs,
        backend: str,
        *,
        gradient: bool,
    ) -> None:
        """Asserts the error rule for evaluate(run, inputs), run being the op by some backend;
        `positive` makes whatever else it multiplies by positive, for the floor of the rule."""

        def stock(given: Inputs) -> tuple[Tensor, ...]:
            return self.stock(given, backend)

        with poison():
            actual = evaluate(lambda given: self.run(given, backend), inputs)
            yardstick = evaluate(stock, inputs)
        truth = evaluate(self.define, map_floating(inputs, Tensor.double))
        positive = map_floating(inputs, lambda x: x.double().abs())
        absolute = evaluate(self.define, positive, positive=True)
        errors: dict[str, float] = {}
        if any(x.dtype == torch.float64 for x in flat_tensors(inputs)):
            single = map_floating(inputs, Tensor.float)
            rounded = evaluate(self.define, map_floating(single, Tensor.double))
            errors = {
                name: float64_yardstick(result, rounded[name])
                for name, result in evaluate(stock, single).items()
            }
        assert actual.keys() == truth.keys()
        for name in truth:
            assert_matches(
                *(results[name] for results in (actual, truth, yardstick, absolute)),
                gradient=gradient,
                extra=self.extra,
                yardstick_error=errors.get(name),
                what=f"gradient of {name}" if gradient else name,
            )

    def gradients(self, run: Run, inputs: Inputs, grads: list[Tensor]) -> Named:
        """Gradients of sum(output * grad) by the names in `diff`; lists become name[i]."""
        inputs, leaves = with_leaves(inputs, self.diff)
        outputs = run(inputs)
        pairs = [(o, g.to(o)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            list(leaves.values()),
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        return dict(zip(leaves, found, strict=True))

    def test_forward(self, case: Case, backend: str, dtype: torch.dtype) -> None:
        self.check_forward(self.inputs(case, dtype), backend)

    def test_backward(self, case: Case, backend: str, dtype: torch.dtype) -> None:
        self.check_backward(self.inputs(case, dtype), backend)

    def test_edge_shapes(self, edge_case: Case, backend: str) -> None:
        inputs = self.inputs(edge_case, torch.float32)
        self.check_forward(inputs, backend)
        self.check_backward(inputs, backend)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, layout: str, backend: str) -> None:
        inputs = self.inputs(self.cases[0], torch.float32)
        inputs = map_tensors(inputs, lambda x: relayout(x, layout))
        self.check_forward(inputs, backend)
        self.check_backward(inputs, backend)

    def test_default_dtype_and_device_do_not_matter(self, backend: str) -> None:
        inputs = self.inputs(self.cases[0], torch.float32)

        def results() -> list[Tensor]:
            given, leaves = with_leaves(inputs, self.diff)
            outputs = self.run(given, backend)
            ones = [torch.ones_like(o) for o in outputs]
            found = torch.autograd.grad(outputs, list(leaves.values()), ones, allow_unused=True)
            return [*outputs, *(g for g in found if g is not None)]

        expected = results()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                actual = results()
        finally:
            torch.set_default_dtype(before)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)

    def test_backward_twice(self, backend: str) -> None:
        inputs = self.inputs(self.cases[0], torch.float32)

        def second(run: Run, given: Inputs) -> Named:
            given, leaves = with_leaves(given, self.diff)
            total = sum((o.sin().sum() for o in run(given)), torch.zeros(()))
            first = torch.autograd.grad(
                total, list(leaves.values()), create_graph=True, materialize_grads=True
            )
            energy = sum((g.pow(2).sum() for g in first), torch.zeros(()))
            found = torch.autograd.grad(energy, list(leaves.values()), materialize_grads=True)
            return dict(zip(leaves, found, strict=True))

        actual = second(lambda i: self.run(i, backend), inputs)
        yardstick = second(self.define, inputs)
        truth = second(self.define, map_floating(inputs, Tensor.double))
        absolute = second(self.define, map_floating(inputs, lambda x: x.double().abs()))
        assert any(t.abs().max() > 0 for t in truth.values()), "choose a case with curvature"
        for name in truth:
            results = (actual[name], truth[name], yardstick[name], absolute[name])
            assert_matches(*results, gradient=True, what=f"second derivative by {name}")

    def test_forward_mode_is_plain_torchs(self, backend: str) -> None:
        inputs, leaves = with_leaves(self.inputs(self.cases[0], torch.float32), self.diff)
        with forward_ad.dual_level():
            tangents = {
                id(x): torch.linspace(-1, 1, x.numel()).view(x.shape) for x in leaves.values()
            }
            dual = map_tensors(
                inputs,
                lambda x: forward_ad.make_dual(x, tangents[id(x)]) if id(x) in tangents else x,
            )
            if backend != "torch":
                with pytest.raises(mbm_kernels.BackendUnavailableError, match="forward-mode"):
                    self.run(dual, backend)
            outputs = [forward_ad.unpack_dual(o) for o in self.run(dual, "torch")]
        smooth = [o for o in outputs if o.tangent is not None]
        total = sum((o.primal.sum() for o in smooth), torch.zeros(()))
        grads = torch.autograd.grad(total, list(leaves.values()))
        pairs = zip(grads, tangents.values(), strict=True)
        expected = sum(((g * t).sum() for g, t in pairs), torch.zeros(()))
        actual = sum((o.tangent.sum() for o in smooth), torch.zeros(()))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_jit_trace(self, backend: str) -> None:
        inputs = self.inputs(self.cases[0], torch.float32)
        moving = [x for x in flat_tensors(inputs) if x.is_floating_point()]

        def call(*values: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(map(id, moving), values, strict=True))
            return self.run(map_tensors(inputs, lambda x: given.get(id(x), x)), backend)

        if backend != "torch" and OPS[self.op].saves_each:
            with pytest.raises(mbm_kernels.BackendUnavailableError, match=r"jit\.trace"):
                torch.jit.trace(call, moving)
            return
        traced = torch.jit.trace(call, moving)  # and once more without gradients, to compare
        others = [x.roll(1, 0) if x.dim() else x / 2 for x in moving]
        for a, e in zip(as_tuple(traced(*others)), call(*others), strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)

    def test_negative_views(self, backend: str) -> None:
        """What `z.conj().imag` is: memory that holds the negative of the values."""
        inputs = self.inputs(self.cases[0], torch.float32)
        views = map_floating(inputs, lambda x: torch._neg_view(-x))
        assert all(x.is_neg() for x in flat_tensors(views) if x.is_floating_point())
        outputs = self.run(inputs, backend)
        grads = [torch.randn(o.shape) for o in outputs]
        expected = self.gradients(lambda given: self.run(given, backend), inputs, grads)
        actual = self.gradients(
            lambda given: self.run(given, backend), views, [torch._neg_view(-g) for g in grads]
        )
        pairs = zip(
            (*self.run(views, backend), *actual.values()),
            (*outputs, *expected.values()),
            strict=True,
        )
        for a, e in pairs:
            torch.testing.assert_close(a, e, equal_nan=True)

    def test_autocast(self, backend: str) -> None:
        inputs, leaves = with_leaves(self.inputs(self.cases[0], torch.float32), self.diff)
        with torch.autocast(device_of(backend).type, torch.bfloat16):
            outputs = self.run(inputs, backend)
        cast = map_floating(inputs, lambda x: x.detach().bfloat16())
        for output, expected in zip(outputs, self.run(cast, backend), strict=True):
            assert output.dtype == self.autocast_output
            torch.testing.assert_close(output, expected.to(output.dtype), equal_nan=True)
        total = sum((o.float().sum() for o in outputs), torch.zeros(()))
        for name, grad in zip(
            leaves, torch.autograd.grad(total, list(leaves.values())), strict=True
        ):
            assert grad.dtype == torch.float32, name
            assert torch.isfinite(grad).all(), name

    def short_case(self, backend: str) -> Case:
        """The usual case, or where an interpreter runs it the one with the fewest elements."""
        if not interpreted(backend):
            return self.cases[0]
        return min(self.cases, key=lambda case: math.prod(n or 1 for n in case.sizes.values()))

    def test_opcheck(self, backend: str) -> None:
        case = self.short_case(backend)
        usual = placed(self.inputs(case, torch.float32), device_of(backend))
        inputs, _ = with_leaves(usual, self.diff)
        args = (*self.schema_args(inputs), backend)
        results = torch.library.opcheck(OPS[self.op].registered, args)
        assert set(results.values()) == {"SUCCESS"}

    def test_compile(self, backend: str) -> None:
        torch._dynamo.reset()
        case = self.short_case(backend)
        inputs, leaves = with_leaves(self.inputs(case, torch.float32), self.diff)
        names = list(inputs)

        def call(*values: Any) -> tuple[Tensor, ...]:
            return self.run(dict(zip(names, values, strict=True)), backend)

        eager = call(*inputs.values())
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs.values())
        ones = [torch.ones_like(o) for o in eager]
        expected = torch.autograd.grad(eager, list(leaves.values()), ones)
        actual = torch.autograd.grad(compiled, list(leaves.values()), ones)
        for a, e in zip((*compiled, *actual), (*eager, *expected), strict=True):
            torch.testing.assert_close(a, e)

    def test_fake(self, backend: str) -> None:
        inputs = self.inputs(self.cases[0], torch.float32)
        real = self.run(inputs, backend)
        with FakeTensorMode() as mode:
            fake = self.run(map_tensors(inputs, mode.from_tensor), backend)
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.dtype, r.device) == (f.shape, f.dtype, f.device)
            assert r.stride() == f.stride()

    def test_backend_errors(self) -> None:
        inputs = self.inputs(self.cases[0], torch.float32)
        with pytest.raises(ValueError, match=r"backend: got 'fast'; expected one of auto, cpu"):
            self.run(inputs, "fast")
        reasons = mbm_kernels.backends(self.op)
        assert set(reasons) == {"cpu", "triton", "cuda", "torch"}
        assert reasons["torch"] is None
        for name, reason in reasons.items():
            expected = self.run_on(inputs, "torch", device_of(name))
            if reason is not None:
                with pytest.raises(mbm_kernels.BackendUnavailableError, match="cannot run"):
                    self.run(inputs, name)
            with mbm_kernels.disabled():
                for a, e in zip(self.run(inputs, name), expected, strict=True):
                    assert torch.equal(a.nan_to_num(), e.nan_to_num())


def interpreted(backend: str) -> bool:
    """Whether a case takes seconds, and 16-bit floats are computed in float32."""
    return backend == "triton" and not torch.cuda.is_available()


def device_of(backend: str) -> torch.device:
    """Where the tests run a backend: on the GPU, if there is one, what is made for it."""
    on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def placed(inputs: Inputs, device: torch.device) -> Inputs:
    """`inputs` on the device, strides and all; lengths, which may be anywhere, stay."""
    return {
        name: value
        if name in LENGTHS
        else map_tensors({name: value}, lambda x: _move(x, device))[name]
        for name, value in inputs.items()
    }


def _move(x: Tensor, device: torch.device) -> Tensor:
    if x.device == device or isinstance(x, FakeTensor):
        return x.to(device)
    storage = x.untyped_storage().nbytes() // x.element_size()
    return (
        x.as_strided((storage,), (1,), 0)
        .to(device)
        .as_strided(x.shape, x.stride(), x.storage_offset())
    )


def available_backends(op: str) -> Iterator[str]:
    return (name for name, reason in mbm_kernels.backends(op).items() if reason is None)
