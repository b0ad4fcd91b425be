"""What is compared with what: a `Benchmark` is an operation, its cases and its stock forms."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mbm_kernels import engines
from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS
from mbm_kernels.bench.limits import Work

Inputs = dict[str, Any]
Function = Callable[..., Any]
Build = Callable[[Inputs], tuple[Function, Inputs]]
FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)
NO_ENGINE = "no engine has this operation"


@dataclass(frozen=True)
class Case:
    """One row's shape: sizes by letter, options of the call, and the reason in a word or two."""

    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    quick: bool = False  # part of --quick and of pytest benchmarks
    passes: tuple[str, ...] = PASSES
    check: dict[str, int] = field(default_factory=dict)  # sizes at which correctness is checked
    check_gradients: dict[str, int] = field(default_factory=dict)  # beside `check`, for gradients

    @property
    def label(self) -> str:
        sizes = " ".join(f"{letter}{size}" for letter, size in self.sizes.items())
        return f"{sizes} {self.note}".strip()

    def __str__(self) -> str:
        return self.label.replace(" ", "-")

    def for_check(self, which: str) -> "Case":
        sizes = {**self.sizes, **self.check, **(self.check_gradients if which == BOTH else {})}
        return replace(self, sizes=sizes, passes=(which,))


def as_called(function: Function) -> Build:
    """The `build` of a form that is a function of the inputs by their names."""
    return lambda inputs: (function, inputs)


def compile_whole(function: Function) -> Function:
    # One shape at a time: dynamic shapes would only slow the stock form.
    compiled: Function = torch.compile(function, dynamic=False)
    return compiled


class Held(nn.Module):
    """A function of inputs by name as a module that holds some of them as its parameters."""

    def __init__(self, function: Function, held: Mapping[str, Tensor]):
        super().__init__()
        self.function, self.held = function, tuple(held)
        for name, value in held.items():
            setattr(self, name, value)

    def forward(self, **inputs: Any) -> Any:
        return self.function(**inputs, **{name: getattr(self, name) for name in self.held})


def holding(function: Function, names: Sequence[str]) -> Build:
    """The `build` of a form that holds these inputs, where a case has them, as parameters."""

    def build(inputs: Inputs) -> tuple[Function, Inputs]:
        held = {name: inputs[name] for name in names if isinstance(inputs.get(name), Tensor)}
        rest = {name: value for name, value in inputs.items() if name not in held}
        return Held(function, held), rest

    return build


@dataclass(frozen=True)
class Form:
    """One way to compute the operation.

    Args:
        build: from the inputs, whose differentiable tensors are Parameters, to a function or
            module and its keyword arguments; a module must use those Parameters as its own.
        layout: applied to each floating input of four dimensions first.
        compile: time it through `compiler`, recompiled for each case and thread count.
        compiler: torch.compile of the whole function, unless a model compiles its parts better.
        passes: where the form exists.
        backward_from: how many of the outputs, the first ones, get a gradient; None: all that can.
    """

    build: Build
    layout: torch.memory_format | None = None
    compile: bool = False
    compiler: Callable[[Function], Function] = compile_whole
    passes: tuple[str, ...] = PASSES
    backward_from: int | None = None


def eager_and_compiled(build: Build) -> dict[str, Form]:
    return {"eager": Form(build), "compile": Form(build, compile=True)}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value.detach() if isinstance(value, Tensor) else value


def frozen(build: Build, layout: torch.memory_format | None = None) -> dict[str, Form]:
    """The forward pass of a build whose weights are parameters of its module, folded in."""

    def with_plain_arguments(inputs: Inputs) -> tuple[Function, Inputs]:
        # Freezing takes any Parameter for a constant, and with all of them the whole result.
        function, arguments = build(inputs)
        return function, {name: _plain(value) for name, value in arguments.items()}

    form = Form(
        with_plain_arguments, layout, compile=True, compiler=engines.frozen, passes=(FORWARD,)
    )
    return {"compile freezing": form}


def with_channels_last(build: Build) -> dict[str, Form]:
    """NCHW and channels_last, each eager and compiled."""
    last = torch.channels_last
    return {
        "eager": Form(build, layout=torch.contiguous_format),
        "eager channels_last": Form(build, layout=last),
        "compile": Form(build, layout=torch.contiguous_format, compile=True),
        "compile channels_last": Form(build, layout=last, compile=True),
    }


@dataclass(frozen=True)
class Benchmark:
    """An operation beside its stock forms.

    Args:
        op: its name; `function`, `reference` and `diff` are found by it unless given.
        cases: the table's shapes on a CPU.
        gpu_cases: those on a GPU.
        make: a case's inputs by the names of the public function, floats in float32.
        stock: forms by name for a case; the first is eager and the yardstick of the error rule.
        work: (case, pass) -> least operations and bytes, where known.
        engine: the build of what inference engines are given, in stock PyTorch with the weights as
            parameters of its module, or why a case has none.
        layout: of the images that `mbm` is given.
        extra: what the error rule allows more, times max|truth|: an operation's named constant.
        kinks: the gradient jumps where two values of a pooling window, or a value and 0, are equal;
            right forms then differ, so that it is checked away from such inputs.
        takes: (case, backend) -> whether the sizes are among those of a backend that takes some
            alone; by default each takes every case.
        backward_from: as a form's, for `mbm` and the reference: results that training only logs
            get no gradient.
        positive: whether the reference on absolute values of the inputs bounds its rounding, as it
            does for a single operation; a model's floor is taken from its largest result.
    """

    op: str
    cases: Sequence[Case]
    make: Callable[[Case, torch.Generator], Inputs]
    stock: Callable[[Case], Mapping[str, Form]]
    work: Callable[[Case, str], Work] | None = None
    engine: Callable[[Case], Build | str] | None = None
    function: Build | None = None
    reference: Function | None = None
    diff: Sequence[str] | Callable[[Inputs], Sequence[str]] | None = None
    layout: torch.memory_format | None = None
    extra: float = 0.0
    positive: bool = True
    kinks: bool = False
    gpu_cases: Sequence[Case] = ()
    backward_from: int | None = None
    takes: Callable[[Case, str], bool] = lambda case, backend: True

    def mbm(self, backend: str = "auto") -> Form:
        if self.function is not None:
            return Form(self.function, layout=self.layout)
        public = getattr(importlib.import_module(dispatch.package_of(self.op)), self.op)
        return Form(
            lambda inputs: (public, {**inputs, "backend": backend}),
            layout=self.layout,
            backward_from=self.backward_from,
        )

    def definition(self) -> Function:
        if self.reference is not None:
            return self.reference
        module = importlib.import_module(f"{dispatch.package_of(self.op)}.reference")
        found: Function = getattr(module, self.op)
        return found

    def differentiable(self, inputs: Inputs) -> list[str]:
        if callable(self.diff):
            return list(self.diff(inputs))
        names = OPS[self.op].diff if self.diff is None else self.diff
        return [name for name in names if _is_floating(inputs.get(name))]

    def engine_model(self, case: Case) -> engines.Model | str:
        """What engines run of a case, on the harness's inputs, or why they do not."""
        build = NO_ENGINE if self.engine is None else self.engine(case)
        if isinstance(build, str):
            return build
        inputs = self.inputs(case)
        prepared = prepare(Form(build), inputs, self.differentiable(inputs))
        return engines.Model.of(prepared.function, prepared.arguments)

    def inputs(self, case: Case, seed: int = 0) -> Inputs:
        return self.make(case, torch.Generator().manual_seed(seed))

    def choose(self, pattern: str | None, quick: bool) -> list[Case]:
        """The cases whose label holds `pattern` (without regard to case), or the quick ones."""
        chosen = [case for case in self.cases if case.quick or not quick]
        if pattern:
            chosen = [case for case in chosen if pattern.lower() in case.label.lower()]
        return chosen


@dataclass
class Prepared:
    """A form on given inputs: two functions to time, and what they return."""

    function: Function
    arguments: Inputs
    leaves: dict[str, Tensor]
    grads: list[Tensor] = field(default_factory=list)
    backward_from: int | None = None

    def forward(self) -> Any:
        with torch.no_grad():
            return self.function(**self.arguments)

    def both(self) -> tuple[Tensor, ...]:
        outputs = flat_outputs(self.function(**self.arguments))
        if not self.grads:
            generator = torch.Generator().manual_seed(1)
            self.grads = [_gradient_like(o, generator) for o in outputs]
        pairs = list(zip(outputs, self.grads, strict=True))[: self.backward_from]
        pairs = [(o, g) for o, g in pairs if o.requires_grad]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            list(self.leaves.values()),
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        # As after an optimizer's step: what a backend packed from the weights is stale.
        torch.autograd.graph.increment_version(list(self.leaves.values()))
        for leaf in self.leaves.values():
            if leaf.is_cpu and leaf.numel():  # a packed form goes by the values
                leaf.detach()[(0,) * leaf.dim()].neg_()
        return found

    def call(self, which: str) -> Callable[[], Any]:
        return self.forward if which == FORWARD else self.both


def _is_floating(value: Any) -> bool:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return isinstance(first, Tensor) and first.is_floating_point()


def flat_outputs(outputs: Any) -> tuple[Tensor, ...]:
    """Indices beside results are left out: right ones select the right results."""
    every = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    return tuple(o for o in every if o.is_floating_point())


def prepare(form: Form, inputs: Inputs, diff: Sequence[str]) -> Prepared:
    """The form on its own copies of the inputs; those of `diff` become leaves with gradients."""

    def own(x: Any, leaf: bool) -> Any:
        if isinstance(x, (list, tuple)):
            return type(x)(own(item, leaf) for item in x)
        if not isinstance(x, Tensor):
            return x
        x = x.detach().clone()
        if form.layout is not None and x.dim() == 4 and x.is_floating_point():
            x = x.contiguous(memory_format=form.layout)
        return nn.Parameter(x) if leaf else x

    owned = {name: own(value, name in diff) for name, value in inputs.items()}
    leaves: dict[str, Tensor] = {}
    for name in diff:
        value = owned[name]
        if isinstance(value, Tensor):
            leaves[name] = value
        else:
            leaves |= {f"{name}[{i}]": item for i, item in enumerate(value)}
    function, arguments = form.build(owned)
    if form.compile:
        function = form.compiler(function)
    return Prepared(function, arguments, leaves, backward_from=form.backward_from)


def _gradient_like(output: Tensor, generator: torch.Generator) -> Tensor:
    """As the layer above would give it: in the output's own layout. 1 for a loss."""
    if not output.dim():
        return torch.ones_like(output)
    return torch.empty_like(output).copy_(torch.randn(output.shape, generator=generator))


@dataclass
class Watched:
    """Of each operation called: the backend that answered, and the sizes it was chosen by."""

    backends: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)


def watch(
    benchmark: Benchmark,
    case: Case,
    which: str,
    backend: str,
    place: Callable[[Inputs], Inputs] = lambda inputs: inputs,
) -> Watched:
    """Calls a case once."""
    inputs = place(benchmark.inputs(case))
    prepared = prepare(benchmark.mbm(backend), inputs, benchmark.differentiable(inputs))
    with dispatch.observed() as seen:
        prepared.call(which)()
    noted = Watched()
    for choice in seen:
        noted.backends[choice.op] = choice.chosen
        noted.sizes[choice.op] = {n: size for n, size in choice.sizes.items() if n != "training"}
    return noted
