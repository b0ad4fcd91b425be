"""How an operation becomes a differentiable torch operation.

An `Op` is a `Spec`, which names the roles of its arguments and results, with a fake kernel, a
reference and backends. Three ways lead into a backend:

- Eager code with plain tensors, like a call before it (`_core/problem.py`): `run` calls the backend
  with the problem found, under a lean autograd.Function where a gradient is wanted. A first call
  whose arguments were checked goes the same way (`run_first`).
- Eager code with plain tensors otherwise, and functorch: an autograd.Function of the explicit
  arguments, 3 to 5 times less overhead than a registered operation.
- Everything else (compile, export, jit.trace, fake and meta tensors, dispatch modes):
  `torch.ops.mbm_kernels.<op>`, which has a fake kernel and a formula made of the same functions.

A backend has `fwd(problem, *inputs, save)`, which returns all results of the spec, and
`bwd(problem, grads, inputs, saved, needs)`, which returns one gradient for each differentiable
input. Without a problem descriptor they take the arguments of the two schemas instead. A backend
may return None for state that nobody asked to save, and leave out all precomputed gradients:
making an empty tensor takes 0.5 us.

The `torch` backend is plain differentiable torch code: autograd sees through it, so it needs
neither way and may return None for what is not public, unless `opaque_torch` says that compilers
cannot trace it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import (
    arguments,
    autocast,
    autograd,
    dispatch,
    flops,
    profiling,
    registration,
    tracing,
)
from mbm_kernels._core.arguments import as_tuple as as_tuple
from mbm_kernels._core.problem import Call, Problem, Problems
from mbm_kernels._core.spec import Spec
from mbm_kernels._core.torch_private import functionalized, profiling_state
from mbm_kernels._core.tracing import in_functorch, is_plain, may_need_grad, no_kernel

OPS: dict[str, "Op"] = {}


class Op:
    """One operation: its spec, its reference and its backends.

    Args:
        spec: the roles of its arguments and results.
        fake: shapes of the forward's results: called like the forward. The torch backend
            precomputes no gradients; what stands for them there is empty.
        reference: the definition, called with inputs and options by name; it answers where the
            backward itself is differentiated.
        torch_fwd: `fwd` of backend_torch: plain torch.
        opaque_torch: compilers cannot trace `torch_fwd`, so that it too is registered.
        ignored: of the inputs by name, bool [N]: rows of the first differentiable input whose
            precomputed gradient is 0 and stays so whatever it is scaled by, NaN included.
        products: the definition's matrix products, for FLOP counters: called with the inputs by
            name; None where there are none.
        problem: the problem descriptor of explicit inputs and options, for an operation whose
            backends take one.
        onnx: what torch.onnx.export records, of inputs and options, if not `torch_fwd`: where ONNX
            has an operator of its own, or its exporter gets `torch_fwd` wrong.
        package: where its modules are, if not in `mbm_kernels.ops.<name>`.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        torch_fwd: Callable[..., Any],
        opaque_torch: bool = False,
        ignored: Callable[[dict[str, Any]], Tensor] | None = None,
        products: Callable[..., list[flops.Product]] | None = None,
        problem: Callable[..., Problem] | None = None,
        onnx: Callable[..., Any] | None = None,
        package: str | None = None,
    ):
        self.spec, self.name = spec, spec.name
        self.fake = fake
        self.reference = reference
        self.torch_fwd = torch_fwd
        self.opaque_torch = opaque_torch
        self.ignored = ignored
        self.products = products
        self.problem = problem
        self.onnx = onnx
        self.label = registration.label(spec.name)
        self.inputs, self.outputs = list(spec.forward_names), list(spec.results)
        self.public, self.diff = list(spec.outputs), list(spec.differentiable)
        self.made, self.bwd_names = list(spec.made_names), list(spec.backward_names)
        self.reference_inputs = [*spec.input_names, *spec.option_names]
        self.saves_each = spec.save == "each"
        self.nothing_saved, self.all_saved = spec.save_arguments(False), spec.save_arguments(True)
        self.returns_one = len(spec.outputs) == 1
        self.has_lists = spec.has_lists  # here, as no compiler traces a cached_property's first use
        self.registration = registration.Registration(self)
        self.registered = self.registration.forward
        self.registered_backward = self.registration.backward
        self.autograd = autograd.Autograd(self)
        dispatch.register(spec.name, package)
        OPS[spec.name] = self
        flops.count(self)

    def choose(self, call: Call[Any]) -> str:
        """The backend that `run` takes now."""
        return call.choose(self.name, call.differentiable and torch.is_grad_enabled())

    def run(self, call: Call[Any], tensors: Sequence[Any]) -> Any:
        """Runs a call whose problem is known; `tensors` are the inputs, None where there is none.

        Returns as `__call__`.
        """
        training = call.differentiable and torch.is_grad_enabled()
        chosen = call.choose(self.name, training)
        if dispatch._watching > 0:
            dispatch.note(chosen)
        if training and chosen != "torch":
            function = self.autograd.problem_function
            if self.has_lists:
                function = self.autograd.problem_function_for(tensors)
                tensors = arguments.flat(tensors)
            return autograd.apply(function, (call.problem, chosen, *tensors))
        save = self.all_saved if training else self.nothing_saved
        if profiling_state._is_profiler_enabled:  # as profiling.active(), without a frame
            with profiling.event(self.label, tensors):
                outputs = self.problem_fwd(chosen, call.problem, tensors, save)
        elif chosen == "torch":
            outputs = self.torch_fwd(call.problem, *tensors, *save)
        else:
            outputs = dispatch.load_backend(self.name, chosen).fwd(call.problem, *tensors, *save)
        return outputs[0] if self.returns_one else outputs[: len(self.public)]

    def run_first(
        self,
        problems: Problems[Any],
        problem: Problem,
        given: tuple[str, Sequence[Tensor], tuple[Any, ...]],
        tensors: Sequence[Any],
    ) -> Any:
        """Runs a call that `problems` does not know, its arguments checked, and keeps it if it can.

        It takes the way of those after it, that checkpoints may run it again by either. `given` are
        the backend, tensors and options by which `problems` knows it; `tensors` are the operation's
        inputs, whose problem is `problem`.
        """
        call = problems.remember(problem, *given)
        if call is not None:
            return self.run(call, tensors)
        return self(given[0], *tensors, *problem.options, sizes=dict(problem.sizes))

    def problem_fwd(
        self, backend: str, problem: Problem, tensors: Sequence[Any], save: Sequence[Any]
    ) -> tuple[Any, ...]:
        """All results of the forward; None for the state where nothing is to be saved.

        `save` is the last argument of the backend's `fwd`, or empty where it takes none.
        """
        fwd = self.torch_fwd
        if backend != "torch":
            fwd = dispatch.load_backend(self.name, backend).fwd
        if not profiling.active():
            return fwd(problem, *tensors, *save)  # type: ignore[no-any-return]
        with profiling.event(f"{self.label}.{backend}", tensors):
            return fwd(problem, *tensors, *save)  # type: ignore[no-any-return]

    def problem_bwd(
        self,
        backend: str,
        problem: Problem,
        grads: Sequence[Tensor | None],
        tensors: Sequence[Any],
        saved: Sequence[Any],
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        bwd = dispatch.load_backend(self.name, backend).bwd
        if not profiling.active():
            return bwd(problem, grads, tensors, saved, needs)  # type: ignore[no-any-return]
        with profiling.event(f"{self.label}_backward.{backend}", (*grads, *tensors, *saved)):
            return bwd(problem, grads, tensors, saved, needs)  # type: ignore[no-any-return]

    def present(
        self, problem: Problem, tensors: Sequence[Any], saved: Sequence[Any]
    ) -> list[Tensor]:
        """`saved` as the registered backward takes it: empty where there is nothing."""
        if all(kept is not None for kept in saved):
            return list(saved)
        results = as_tuple(self.fake(*tensors, *problem.options, *self.nothing_saved))
        named = dict(zip(self.spec.results, results, strict=True))
        pairs = zip(self.spec.saved, saved, strict=True)
        return [named[name] if kept is None else kept for name, kept in pairs]

    def __call__(self, backend: str, *args: Any, sizes: dict[str, int]) -> Any:
        """Runs the operation; `args` are its inputs and options, already checked.

        `sizes` are what backends and dispatch judge by. Returns the public outputs: a tensor where
        there is one, else a tuple.
        """
        spec = self.spec
        tensors = [
            a for a in (arguments.flat(args) if self.has_lists else args) if isinstance(a, Tensor)
        ]
        device = tensors[0].device
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), tensors[0].dtype)
        needs_grad = may_need_grad(tensors)
        sizes["training"] = int(needs_grad)
        if reason := no_kernel(tensors, self.saves_each):
            backend = dispatch.without_kernels(self.name, backend, reason)
        if tracing.in_onnx_export():
            dispatch.check_backend(self.name, backend)
            chosen = "torch"
        else:
            chosen = dispatch.select(self.name, backend, device, dtype, sizes)
        if not torch.compiler.is_compiling():
            dispatch.note(chosen)
        if spec.save == "each":
            wanted = [args[i] for i in self.autograd.diff_positions]
            args = (*args, [needs_grad and w is not None and w.requires_grad for w in wanted])
        elif spec.save == "any":
            args = (*args, needs_grad)
        if autocast.enabled(device):
            with torch.autocast(device.type, enabled=False):
                outputs = self._call(chosen, args, tensors, needs_grad)
        else:
            outputs = self._call(chosen, args, tensors, needs_grad)
        public = len(spec.outputs)
        return outputs[:public] if public > 1 else outputs[0]

    def _call(
        self, backend: str, args: Sequence[Any], tensors: Sequence[Tensor], needs_grad: bool
    ) -> tuple[Any, ...]:
        if tracing.in_onnx_export():
            return self._onnx_form(args)
        if backend == "torch" and not (self.opaque_torch and torch.compiler.is_compiling()):
            return self._alone(backend, args)
        plain = is_plain(tensors)
        if plain and not needs_grad:
            return self._alone(backend, args)
        if plain or in_functorch():
            function = self.autograd.function
            if self.has_lists:
                function, args = self.autograd.for_lists(args), arguments.flat(args)
            if not plain:
                return as_tuple(function.apply(*args, backend))
            return as_tuple(autograd.apply(function, (*args, backend)))
        return as_tuple(self.registered(*args, backend))

    def _alone(self, backend: str, args: Sequence[Any]) -> tuple[Any, ...]:
        """A call that neither autograd's node nor the dispatcher names for the profiler."""
        if torch.compiler.is_compiling():
            return as_tuple(self.torch_fwd_explicit(*args))
        if not profiling.active():
            return self.backend_fwd(backend, args)
        with profiling.event(self.label, args):
            return self.backend_fwd(backend, args)

    def _onnx_form(self, args: Sequence[Any]) -> tuple[Any, ...]:
        if self.onnx is None:
            return as_tuple(self.torch_fwd_explicit(*args))
        count = len(self.spec.input_names) + len(self.spec.option_names)
        return as_tuple(self.onnx(*args[:count]))

    def decomposed(self, *args: Any) -> Any:
        """All results of the registered forward's arguments, by what ONNX has."""
        # Programs hold nothing in place, as the torch backend does.
        public = functionalized(self._onnx_form)(args[:-1])[: len(self.public)]
        results = (*public, *as_tuple(self.fake(*args[:-1]))[len(public) :])
        return results if len(results) > 1 else results[0]

    def torch_fwd_explicit(self, *args: Any) -> Any:
        """`torch_fwd` of the forward's explicit arguments."""
        if self.problem is None:
            return self.torch_fwd(*args)
        problem, tensors, save = self._described(args)
        return self.torch_fwd(problem, *tensors, *save)

    def backend_fwd(self, backend: str, args: Sequence[Any]) -> tuple[Any, ...]:
        """A backend's `fwd` of the forward's explicit arguments."""
        if self.problem is not None:
            problem, tensors, save = self._described(args)
            return self.problem_fwd(backend, problem, tensors, save)
        fwd = self.torch_fwd
        if backend != "torch":
            fwd = dispatch.load_backend(self.name, backend).fwd
        if not profiling.active():
            return as_tuple(fwd(*args))
        with profiling.event(f"{self.label}.{backend}", args):
            return as_tuple(fwd(*args))

    def _described(self, args: Sequence[Any]) -> tuple[Problem, Sequence[Any], Sequence[Any]]:
        """The problem, the inputs and what there is of `save`, of the forward's arguments."""
        assert self.problem is not None
        count = len(self.spec.input_names)
        given = count + len(self.spec.option_names)
        return self.problem(*args[:given]), args[:count], args[given:]

    def backend_bwd(self, backend: str, args: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """A backend's `bwd` of the backward's explicit arguments."""
        if self.problem is not None:
            rest = iter(args)
            spec = self.spec
            roles = (spec.grad_names, spec.input_names, spec.saved, spec.option_names)
            grads, tensors, saved, options = (tuple(next(rest) for _ in names) for names in roles)
            problem, needs = self.problem(*tensors, *options), next(rest)
            return self.problem_bwd(backend, problem, grads, tensors, saved, needs)
        bwd = dispatch.load_backend(self.name, backend).bwd
        if not profiling.active():
            return tuple(bwd(*args))
        with profiling.event(f"{self.label}_backward.{backend}", args):
            return tuple(bwd(*args))
