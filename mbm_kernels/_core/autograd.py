"""How an operation is differentiated: by one autograd.Function for explicit arguments, which
functorch and lists of tensors need, and by a leaner one for problem descriptors.

Both, and the formula of the registered operation, call the same two functions of a backend. Where
the backward itself is differentiated the reference answers, by torch's own autograd.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mbm_kernels._core import arguments, by_autograd, made, profiling, torch_private
from mbm_kernels._core.arguments import as_tuple
from mbm_kernels._core.spec import Operation
from mbm_kernels._core.tracing import is_plain

if TYPE_CHECKING:
    from mbm_kernels._core.problem import Problem

_unwrap_if_dead = torch_private.unwrap_if_dead


def apply(function: type[torch.autograd.Function], args: Sequence[Any]) -> Any:
    """`function.apply` for plain tensors, without its inspection of `forward`: 12 us of a call."""
    alive = [_unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args]
    direct: Any = super(torch.autograd.Function, function)
    return direct.apply(*alive)


class Autograd:
    """The Functions of `op`, and what they share with its registered operation's formula."""

    def __init__(self, op: Operation):
        self.op, self.spec = op, op.spec
        names = self.spec.forward_names
        self.diff_positions = [names.index(n) for n in self.spec.differentiable]
        self._kept = [self.spec.results.index(n) for n in (*self.spec.saved, *self.spec.made_names)]
        inputs = self.spec.input_names
        self._diff_inputs = [inputs.index(n) for n in self.spec.differentiable]
        self._private = range(len(self.spec.outputs), len(self.spec.results))
        self._functions: dict[arguments.Layout, type[torch.autograd.Function]] = {}
        self.function = self._make_function(None)
        self._problem_functions: dict[arguments.Layout, type[torch.autograd.Function]] = {}
        self.problem_function = self._make_problem_function((None,) * len(inputs))
        torch.library.register_autograd(op.label, self.backward, setup_context=self.setup_context)

    def for_lists(self, args: Sequence[Any]) -> type[torch.autograd.Function]:
        """The Function that takes the flat form of `args` and the backend."""
        layout = (*arguments.layout_of(args), None)
        if layout not in self._functions:
            self._functions[layout] = self._make_function(layout)
        return self._functions[layout]

    def _make_function(self, layout: arguments.Layout | None) -> type[torch.autograd.Function]:
        """Takes the forward's arguments and the backend; with a `layout` their lists flat, since
        autograd and vmap see no tensor in a list."""
        autograd, op = self, self.op

        class Function(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*args: Any) -> Any:
                plain = is_plain([a for a in args if isinstance(a, Tensor)])
                if layout is not None:
                    args = arguments.grouped(args, layout)
                if plain:
                    return op.registration.run_forward(args[-1], args[:-1])
                return op.registered(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                inputs = inputs if layout is None else arguments.grouped(inputs, layout)
                autograd.setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                if layout is None:
                    return autograd.backward(ctx, *grads)
                needs = arguments.grouped(ctx.needs_input_grad, layout)
                flat: list[Any] = []
                for grad, length in zip(
                    autograd._gradients(ctx, needs, grads), layout, strict=True
                ):
                    flat.extend([grad] if length is None else grad or [None] * length)
                return tuple(flat)

        profiling.rename(Function, op.label)
        return Function

    def problem_function_for(self, tensors: Sequence[Any]) -> type[torch.autograd.Function]:
        """The Function that takes a problem, a backend and the flat form of `tensors`."""
        layout = arguments.layout_of(tensors)
        if layout not in self._problem_functions:
            self._problem_functions[layout] = self._make_problem_function(layout)
        return self._problem_functions[layout]

    def _make_problem_function(self, layout: arguments.Layout) -> type[torch.autograd.Function]:
        """Takes a problem, a backend and plain tensors; returns the public outputs alone."""
        autograd, op, spec = self, self.op, self.spec
        public, diff = len(spec.outputs), self._diff_inputs
        from_outputs = [spec.results.index(name) for name in spec.saved]
        first_made = len(spec.results) - len(spec.precomputed)
        each, save = spec.save == "each", spec.save_arguments(True)

        class ProblemFunction(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, problem: "Problem", backend: str, *tensors: Any) -> Any:
                inputs = arguments.grouped(tensors, layout) if spec.has_lists else tensors
                wanted = ([ctx.needs_input_grad[2 + i] for i in diff],) if each else save
                outputs = op.problem_fwd(backend, problem, inputs, wanted)
                ctx.problem, ctx.backend, ctx.layout = problem, backend, layout
                kept = [outputs[i] for i in from_outputs]
                ctx.save_for_backward(*tensors, *kept, *outputs[first_made:])
                ctx.set_materialize_grads(False)
                return outputs[0] if public == 1 else outputs[:public]

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return (None, None, *autograd._problem_gradients(ctx, grads))

        profiling.rename(ProblemFunction, op.label)
        return ProblemFunction

    def _problem_gradients(self, ctx: Any, grads: tuple[Any, ...]) -> Sequence[Tensor | None]:
        """One for each tensor among the inputs of the operation."""
        flat_needs = ctx.needs_input_grad[2:]
        if all(grad is None for grad in grads):
            return [None] * len(flat_needs)
        needs_inputs = flat_needs
        if self.spec.has_lists:
            needs_inputs = [*map(arguments.any_of, arguments.grouped(flat_needs, ctx.layout))]
        needs = [needs_inputs[i] for i in self._diff_inputs]
        found = self._of_differentiable(ctx, grads, needs)
        if len(needs) == len(needs_inputs):
            return found
        flat = iter(found)
        return [
            next(flat) if position in self._diff_inputs else None
            for position, length in enumerate(ctx.layout)
            for _ in range(1 if length is None else length)
        ]

    def _of_differentiable(
        self, ctx: Any, grads: tuple[Any, ...], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """One for each tensor among the differentiable inputs."""
        spec, problem, kept = self.spec, ctx.problem, ctx.saved_tensors
        count = sum(1 if length is None else length for length in ctx.layout)
        end = count + len(spec.saved)
        tensors, saved, precomputed = kept[:count], kept[count:end], kept[end:]
        if spec.has_lists:
            tensors = arguments.grouped(tensors, ctx.layout)
        differentiated = torch.is_grad_enabled()
        named: dict[str, Any] = {}
        if differentiated or precomputed:
            named |= zip(spec.input_names, tensors, strict=True)
            named |= zip(spec.option_names, problem.options, strict=True)
            named |= zip(spec.made_names, precomputed, strict=False)
        if differentiated:
            flat = self._differentiable_backward(named, grads, needs)
        elif precomputed and made.are_made(spec.differentiable, named, grads, needs):
            flat = made.scaled(spec.differentiable, named, grads[0], needs, self.op.ignored)
        elif is_plain([t for t in (*grads, *kept) if t is not None]):
            return self.op.problem_bwd(ctx.backend, problem, grads, tensors, saved, needs)
        else:
            saved = self.op.present(problem, tensors, saved)
            args = (*grads, *tensors, *saved, *problem.options, needs, ctx.backend)
            flat = self.op.registered_backward(*args)
        return arguments.spread([tensors[i] for i in self._diff_inputs], needs, iter(flat))

    def setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        outputs = as_tuple(output)
        ctx.backend = inputs[-1]
        ctx.constants, ctx.lists, ctx.saved_names = {}, {}, []
        saved: list[Tensor] = []
        for name, value in zip(self.spec.forward_names, inputs, strict=False):
            if isinstance(value, Tensor):
                ctx.saved_names.append(name)
                saved.append(value)
            elif arguments.is_tensors(value):
                ctx.saved_names.append(name)
                ctx.lists[name] = len(value)
                saved.extend(value)
            else:
                ctx.constants[name] = value
        for i in self._kept:
            ctx.saved_names.append(self.spec.results[i])
            saved.append(outputs[i])
        ctx.save_for_backward(*saved)
        if self._private:
            ctx.mark_non_differentiable(*[outputs[i] for i in self._private])
        ctx.set_materialize_grads(False)

    def backward(self, ctx: Any, *grads: Tensor | None) -> Any:
        return self._gradients(ctx, ctx.needs_input_grad, grads)

    def _gradients(
        self, ctx: Any, needs_inputs: Sequence[Any], grads: Sequence[Tensor | None]
    ) -> tuple[Any, ...]:
        """One entry for each of the forward's arguments and for the backend."""
        spec = self.spec
        named: dict[str, Any] = dict(ctx.constants)
        saved = iter(ctx.saved_tensors)
        for name in ctx.saved_names:
            count = ctx.lists.get(name)
            named[name] = next(saved) if count is None else [next(saved) for _ in range(count)]
        given = grads[: len(spec.outputs)]
        named |= dict(zip(spec.grad_names, given, strict=True))
        needs = [arguments.any_of(needs_inputs[i]) for i in self.diff_positions]
        if not any(needs) or all(grad is None for grad in given):
            return self._spread(named, [False] * len(needs), iter(()))
        if torch.is_grad_enabled():
            flat = self._differentiable_backward(named, given, needs)
        elif spec.precomputed and made.are_made(spec.differentiable, named, given, needs):
            ignored = self.op.ignored
            flat = made.scaled(spec.differentiable, named, given[0], needs, ignored)  # type: ignore[arg-type]
        else:
            named["needs"] = needs
            args = [named[name] for name in spec.backward_names]
            given_tensors = arguments.flat(args) if spec.has_lists else args
            if is_plain([a for a in given_tensors if isinstance(a, Tensor)]):
                found = self.op.registration.run_backward(ctx.backend, args)
                flat = [g for g in found if g is not None]
            else:
                flat = self.op.registered_backward(*args, ctx.backend)
        return self._spread(named, needs, iter(flat))

    def _differentiable_backward(
        self, named: dict[str, Any], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        names = (*self.spec.input_names, *self.spec.option_names)

        def call(*args: Any) -> Any:
            return self.op.reference(**dict(zip(names, args, strict=True)))

        diff = [names.index(name) for name in self.spec.differentiable]
        return by_autograd.gradients(call, [named[n] for n in names], diff, grads, needs, True)

    def _spread(self, named: dict[str, Any], needs: Sequence[bool], flat: Any) -> tuple[Any, ...]:
        """One entry for each forward argument and for the backend, None where there is no gradient.

        For a list it is a list, of None where none of its tensors needs a gradient: torch.library
        takes nothing else.
        """
        names = self.spec.forward_names
        spread: list[Any] = [
            [None] * len(value) if isinstance(value, list) and arguments.is_tensors(value) else None
            for value in (named.get(name) for name in names)
        ]
        for position, needed in zip(self.diff_positions, needs, strict=True):
            value = named[names[position]]
            if not needed or value is None:
                continue
            if isinstance(value, (list, tuple)):
                spread[position] = [next(flat) for _ in value]
            else:
                spread[position] = next(flat)
        return (*spread, None)
