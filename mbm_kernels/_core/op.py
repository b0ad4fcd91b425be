"""How an operation becomes a differentiable torch operation.

An `Op` is two schemas. From their names follows all the wiring: an argument of the backward schema
called `grad_<output>` is that output's gradient (and makes that output differentiable and public;
other outputs are state saved for the backward), one called like an input or an output is that
tensor, and `needs` says which gradients are wanted. One input called `save` in the forward schema
says whether a backward will come; as `bool[]`, which of `diff` will want a gradient. An output
called `made_<input>` is then that input's gradient, made by the forward for a gradient of 1 of the
first output alone, a scalar; it is float32 and empty where none was made. The backward scales it,
and calls the backend's only where it does not hold what is asked for.

Two ways into a backend. In eager mode with plain tensors its functions are called directly under
one autograd.Function: 3 to 5 times less overhead than a registered op. Everything else (compile,
export, jit.trace, fake and meta tensors, dispatch modes) goes through
`torch.ops.mbm_kernels.<op>`, which has a fake kernel and an autograd formula made of the same two
functions; functorch takes the Function, and the registered op inside it.

A backend that was not asked to save may return None for its last output, the saved state, and
leave out all gradients to be made: making an empty tensor takes 0.5 us.

The `torch` backend is plain differentiable torch code: autograd sees through it, so it needs
neither way and may return None for what is not public, unless `opaque_torch` says that compilers
cannot trace it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import arguments, autocast, by_autograd, dispatch, flops, made, profiling
from mbm_kernels._core.arguments import as_tuple as as_tuple
from mbm_kernels._core.tracing import (
    in_functorch,
    is_plain,
    may_need_grad,
    no_kernel,
)

NAMESPACE = "mbm_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")
OPS: dict[str, "Op"] = {}

Outputs = tuple[Tensor, ...]
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


class Op:
    """One operation: its schemas, its reference and its backends.

    Args:
        name: of the function and, unless `package` says otherwise, of its package in
            `mbm_kernels.ops`.
        fwd: forward schema without the backend, as "(Tensor x, Tensor? mask) -> (Tensor y)".
        bwd: backward schema up to `needs`, without its returns, which are one tensor for each
            needed input, in the order of `diff`.
        diff: names of the inputs that have gradients.
        fake: shapes of the forward's outputs: called like the forward. The torch backend makes no
            gradients; what stands for them there is empty.
        reference: the definition, called with the forward's inputs by name; it answers where the
            backward itself is differentiated.
        torch_fwd: `fwd` of backend_torch: plain torch, called like the forward.
        opaque_torch: compilers cannot trace `torch_fwd`, so that it too is registered.
        ignored: of the inputs by name, bool [N]: rows of diff[0] whose made gradient is 0 and stays
            so whatever it is scaled by, NaN and infinities included.
        package: where its modules are, if not in `mbm_kernels.ops.<name>`.
        products: the definition's matrix products, for FLOP counters: called with the inputs by
            name; None where there are none.
    """

    def __init__(
        self,
        name: str,
        *,
        fwd: str,
        bwd: str,
        diff: Sequence[str],
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        torch_fwd: Callable[..., Any],
        opaque_torch: bool = False,
        ignored: Callable[[dict[str, Any]], Tensor] | None = None,
        products: Callable[..., list[flops.Product]] | None = None,
        package: str | None = None,
    ):
        self.name = name
        self.fake = fake
        self.reference = reference
        self.torch_fwd = torch_fwd
        self.opaque_torch = opaque_torch
        self.ignored = ignored
        self.products = products
        self.label = f"{NAMESPACE}::{name}"
        fwd_schema = torch._C.parse_schema(f"{name}{fwd}")
        inputs = [argument.name for argument in fwd_schema.arguments]
        outputs = [result.name for result in fwd_schema.returns]
        bwd_schema = torch._C.parse_schema(f"{name}_backward{bwd} -> ()")
        self.inputs, self.outputs, self.diff = inputs, outputs, list(diff)
        self.diff_positions = [inputs.index(n) for n in diff]
        self.takes_save = "save" in inputs
        self.saves_each = any(
            a.name == "save" and str(a.type) == "List[bool]" for a in fwd_schema.arguments
        )
        self.made = [n for n in outputs if n.startswith("made_")]
        self.has_lists = any(str(a.type) == "List[Tensor]" for a in fwd_schema.arguments)
        self.functions: dict[arguments.Layout, type[torch.autograd.Function]] = {}
        self.bwd_names = [argument.name for argument in bwd_schema.arguments]
        self.public = [n for n in outputs if f"grad_{n}" in self.bwd_names]
        self.saved_outputs = [n for n in outputs if n in self.bwd_names]
        self.kept_outputs = [outputs.index(n) for n in (*self.saved_outputs, *self.made)]
        self.state_outputs = [i for i, n in enumerate(outputs) if n not in self.public]
        self.reference_inputs = [n for n in inputs if n != "save"]
        self._register(fwd, bwd)
        self.function = self._make_function(None)
        dispatch.register(name, package)
        OPS[name] = self
        flops.count(self)

    def _register(self, fwd: str, bwd: str) -> None:
        declared, _, returns = fwd.partition(" -> ")
        _library.define(
            f"{self.name}{declared.rstrip(')')}, str backend) -> {returns}",
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        _library.define(
            f"{self.name}_backward{bwd.rstrip(')')}, str backend) -> Tensor[]",
            tags=(torch.Tag.pt2_compliant_tag,),
        )
        _library.impl(self.name, self._registered_fwd, "CompositeExplicitAutograd")
        _library.impl(f"{self.name}_backward", self._registered_bwd, "CompositeExplicitAutograd")
        torch.library.register_fake(self.label, self._fake_fwd)
        torch.library.register_fake(f"{self.label}_backward", self._fake_bwd)
        torch.library.register_autograd(
            self.label, self._backward, setup_context=self._setup_context
        )
        packet = getattr(torch.ops, NAMESPACE)
        self.registered = getattr(packet, self.name).default
        self.registered_backward = getattr(packet, f"{self.name}_backward").default
        if self.has_lists:  # torch's own loop over a batch takes no lists
            for registered in (self.registered, self.registered_backward):
                torch.library.register_vmap(registered, arguments.looped(registered))

    def _make_function(self, layout: arguments.Layout | None) -> type[torch.autograd.Function]:
        """Takes the forward's inputs and the backend; with a `layout` the inputs' lists flat, since
        autograd and vmap see no tensor in a list."""
        op = self

        class Function(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*args: Any) -> Any:
                plain = is_plain([a for a in args if isinstance(a, Tensor)])
                if layout is not None:
                    args = arguments.grouped(args, layout)
                if plain:
                    return op._run_fwd(args[-1], args[:-1])
                return op.registered(*args)

            @staticmethod
            def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
                inputs = inputs if layout is None else arguments.grouped(inputs, layout)
                op._setup_context(ctx, inputs, output)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                if layout is None:
                    return op._backward(ctx, *grads)
                found = op._gradients(ctx, arguments.grouped(ctx.needs_input_grad, layout), grads)
                flat: list[Any] = []
                for grad, length in zip(found, layout, strict=True):
                    flat.extend([grad] if length is None else grad or [None] * length)
                return tuple(flat)

        profiling.rename(Function, self.label)
        return Function

    def __call__(self, backend: str, *args: Any, sizes: dict[str, int]) -> Any:
        """Runs the operation; `args` are the forward's inputs without `save`, already checked.

        `sizes` are what backends and dispatch tables judge by. Returns the public outputs: a tensor
        where there is one, else a tuple.
        """
        tensors = [
            a for a in (arguments.flat(args) if self.has_lists else args) if isinstance(a, Tensor)
        ]
        device, dtype = tensors[0].device, tensors[0].dtype
        needs_grad = may_need_grad(tensors)
        sizes["training"] = int(needs_grad)
        if reason := no_kernel(tensors, self.saves_each):
            backend = dispatch.without_kernels(self.name, backend, reason)
        chosen = dispatch.select(self.name, backend, device, dtype, sizes)
        if not torch.compiler.is_compiling():
            dispatch.note(chosen)
        if self.saves_each:
            wanted = [args[i] for i in self.diff_positions]
            args = (*args, [needs_grad and w is not None and w.requires_grad for w in wanted])
        elif self.takes_save:
            args = (*args, needs_grad)
        if autocast.enabled(device):
            with torch.autocast(device.type, enabled=False):
                outputs = self._call(chosen, args, tensors, needs_grad)
        else:
            outputs = self._call(chosen, args, tensors, needs_grad)
        return outputs[: len(self.public)] if len(self.public) > 1 else outputs[0]

    def _call(
        self, backend: str, args: Sequence[Any], tensors: Sequence[Tensor], needs_grad: bool
    ) -> tuple[Any, ...]:
        if backend == "torch" and not (self.opaque_torch and torch.compiler.is_compiling()):
            return self._alone(backend, args)
        plain = is_plain(tensors)
        if plain and not needs_grad:
            return self._alone(backend, args)
        if plain or in_functorch():
            function = self.function
            if self.has_lists:
                layout = (*(len(a) if isinstance(a, (list, tuple)) else None for a in args), None)
                if layout not in self.functions:
                    self.functions[layout] = self._make_function(layout)
                function, args = self.functions[layout], arguments.flat(args)
            if not plain:
                return as_tuple(function.apply(*args, backend))
            # Function.apply itself, without its inspection of `forward`: 12 us of a call.
            alive = [_unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args]
            direct: Any = super(torch.autograd.Function, function)
            return as_tuple(direct.apply(*alive, backend))
        return as_tuple(self.registered(*args, backend))

    def _alone(self, backend: str, args: Sequence[Any]) -> tuple[Any, ...]:
        """A call that neither autograd's node nor the dispatcher names for the profiler."""
        if torch.compiler.is_compiling():
            return as_tuple(self.torch_fwd(*args))
        if not profiling.active():
            return self._backend_fwd(backend, args)
        with profiling.event(self.label, args):
            return self._backend_fwd(backend, args)

    def _backend_fwd(self, backend: str, args: Sequence[Any]) -> tuple[Any, ...]:
        fwd = self.torch_fwd
        if backend != "torch":
            fwd = dispatch.load_backend(self.name, backend).fwd
        if not profiling.active():
            return as_tuple(fwd(*args))
        with profiling.event(f"{self.label}.{backend}", args):
            return as_tuple(fwd(*args))

    def _run_fwd(self, backend: str, args: Sequence[Any]) -> Outputs:
        outputs = self._backend_fwd(backend, args)
        if backend == "torch":
            outputs = self._without_made(outputs)
            if all(o is not None for o in outputs):
                return outputs
            # What autograd keeps by itself; a registered op returns the same each time.
            made = as_tuple(self.fake(*args))
            return tuple(
                torch.zeros_like(m) if o is None else o for o, m in zip(outputs, made, strict=True)
            )
        if outputs[-1] is None:
            outputs = (*outputs[:-1], outputs[0].new_empty(0))
        return outputs if len(outputs) == len(self.outputs) else self._without_made(outputs)

    def _without_made(self, outputs: Outputs) -> Outputs:
        kept = outputs[: len(self.outputs) - len(self.made)]
        return (*kept, *(outputs[0].new_empty(0, dtype=torch.float32) for _ in self.made))

    def _fake_fwd(self, *args: Any) -> Any:
        outputs = as_tuple(self.fake(*args[:-1]))
        if args[-1] == "torch":
            outputs = self._without_made(outputs)
        return outputs if len(self.outputs) > 1 else outputs[0]

    def _run_bwd(
        self, backend: str, args: Sequence[Any], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        if backend != "torch":
            bwd = dispatch.load_backend(self.name, backend).bwd
            if not profiling.active():
                return tuple(bwd(*args))
            with profiling.event(f"{self.label}_backward.{backend}", args):
                return tuple(bwd(*args))
        named = dict(zip(self.bwd_names, args, strict=True))
        inputs = [True if n == "save" else named.get(n) for n in self.inputs]
        grads = [named[f"grad_{n}"] for n in self.public]
        flat = iter(
            by_autograd.gradients(self.torch_fwd, inputs, self.diff_positions, grads, needs, False)
        )
        found: list[Tensor | None] = []
        for position, needed in zip(self.diff_positions, needs, strict=True):
            value = inputs[position]
            if isinstance(value, (list, tuple)):
                found.extend(next(flat) if needed else None for _ in value)
            else:
                found.append(next(flat) if needed and value is not None else None)
        return tuple(found)

    def _registered_fwd(self, *args: Any) -> Any:
        with torch.no_grad():
            outputs = self._run_fwd(args[-1], args[:-1])
        outputs = tuple(arguments.fresh(o, args) for o in outputs)
        return outputs if len(self.outputs) > 1 else outputs[0]

    def _registered_bwd(self, *args: Any) -> list[Tensor]:
        needs = args[self.bwd_names.index("needs")]
        with torch.no_grad():
            found = self._run_bwd(args[-1], args[:-1], needs)
        return [grad.contiguous() for grad in found if grad is not None]

    def _fake_bwd(self, *args: Any) -> list[Tensor]:
        named = dict(zip(self.bwd_names, args, strict=False))
        shapes: list[Tensor] = []
        for name, needed in zip(self.diff, named["needs"], strict=True):
            if needed and named[name] is not None:
                shapes.extend(arguments.flat((named[name],)))
        return [torch.empty_like(s, memory_format=torch.contiguous_format) for s in shapes]

    def _setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        outputs = as_tuple(output)
        ctx.backend = inputs[-1]
        ctx.constants, ctx.lists, ctx.saved_names = {}, {}, []
        saved: list[Tensor] = []
        for name, value in zip(self.inputs, inputs, strict=False):
            if isinstance(value, Tensor):
                ctx.saved_names.append(name)
                saved.append(value)
            elif arguments.is_tensors(value):
                ctx.saved_names.append(name)
                ctx.lists[name] = len(value)
                saved.extend(value)
            else:
                ctx.constants[name] = value
        for i in self.kept_outputs:
            ctx.saved_names.append(self.outputs[i])
            saved.append(outputs[i])
        ctx.save_for_backward(*saved)
        if len(outputs) > len(self.public):
            ctx.mark_non_differentiable(*[outputs[i] for i in self.state_outputs])
        ctx.set_materialize_grads(False)

    def _backward(self, ctx: Any, *grads: Tensor | None) -> Any:
        return self._gradients(ctx, ctx.needs_input_grad, grads)

    def _gradients(
        self, ctx: Any, needs_inputs: Sequence[Any], grads: Sequence[Tensor | None]
    ) -> tuple[Any, ...]:
        """One entry for each of the forward's inputs and for the backend."""
        named: dict[str, Any] = dict(ctx.constants)
        saved = iter(ctx.saved_tensors)
        for name in ctx.saved_names:
            count = ctx.lists.get(name)
            named[name] = next(saved) if count is None else [next(saved) for _ in range(count)]
        for name, grad in zip(self.outputs, grads, strict=True):
            named[f"grad_{name}"] = grad
        needs = [arguments.any_of(needs_inputs[i]) for i in self.diff_positions]
        given = [named[f"grad_{name}"] for name in self.public]
        if not any(needs) or all(grad is None for grad in given):
            return self._spread(named, [False] * len(needs), iter(()))
        if torch.is_grad_enabled():
            flat = self._differentiable_backward(named, given, needs)
        elif self.made and made.are_made(self.diff, named, given, needs):
            flat = made.scaled(self.diff, named, given[0], needs, self.ignored)
        else:
            named["needs"] = needs
            args = [named[name] for name in self.bwd_names]
            given_tensors = arguments.flat(args) if self.has_lists else args
            if is_plain([a for a in given_tensors if isinstance(a, Tensor)]):
                flat = [g for g in self._run_bwd(ctx.backend, args, needs) if g is not None]
            else:
                flat = self.registered_backward(*args, ctx.backend)
        return self._spread(named, needs, iter(flat))

    def _differentiable_backward(
        self, named: dict[str, Any], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        names = self.reference_inputs

        def call(*args: Any) -> Any:
            return self.reference(**dict(zip(names, args, strict=True)))

        diff = [names.index(name) for name in self.diff]
        return by_autograd.gradients(call, [named[n] for n in names], diff, grads, needs, True)

    def _spread(self, named: dict[str, Any], needs: Sequence[bool], flat: Any) -> tuple[Any, ...]:
        """One entry for each forward input and for the backend, None where there is no gradient.

        For a list it is a list, of None where none of its tensors needs a gradient: torch.library
        takes nothing else.
        """
        spread: list[Any] = [
            [None] * len(value) if isinstance(value, list) and arguments.is_tensors(value) else None
            for value in (named.get(name) for name in self.inputs)
        ]
        for position, needed in zip(self.diff_positions, needs, strict=True):
            value = named[self.inputs[position]]
            if not needed or value is None:
                continue
            if isinstance(value, (list, tuple)):
                spread[position] = [next(flat) for _ in value]
            else:
                spread[position] = next(flat)
        return (*spread, None)
