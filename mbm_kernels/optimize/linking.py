"""One forward for a whole model: those of its containers written into one another.

Each container that runs chains keeps its own rewritten forward, for who calls it by itself. A
container that calls such ones gets a second one in which their text stands in place of the calls,
and chains that follow each other are one `Sequence`. PyTorch's modules in it are called as before.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn
from torch.fx import Node

from mbm_kernels.optimize import gating, heads, patterns, tracing
from mbm_kernels.optimize.chain import Chain
from mbm_kernels.optimize.fused import PLAN, Fused, FusedForward, Inlined, Plan
from mbm_kernels.optimize.fusing import FusedContainer
from mbm_kernels.optimize.heads import Head
from mbm_kernels.optimize.runs import Step, What
from mbm_kernels.optimize.sequence import Sequence


def link(
    model: nn.Module, fused: Many[FusedContainer], allowed: patterns.Allowed
) -> list[FusedForward]:
    """Links the outermost containers of a model that run chains or call those that do."""
    linker = _Linker({f.module: f for f in fused}, allowed)
    found: list[FusedForward] = []
    done: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in done or not linker.holds_fused(module):
            continue
        plan = linker.plan(name, module)
        if plan is None:
            continue
        done.update(module.modules())
        plan.fallback = vars(module).get(PLAN)
        found.append(FusedForward(name or "(model)", module, plan=plan))
    for linked in found:
        linked.redo()
    return found


@dataclass(eq=False)
class _Part:
    """A container's graph, for writing it into another's: `chains` by their nodes."""

    graph: torch.fx.Graph
    arguments: tuple[str, ...]
    chains: dict[Node, Chain]
    inlined: Many[nn.Module]  # its nn.Sequential

    @property
    def result(self) -> Any:
        (output,) = [node for node in self.graph.nodes if node.op == "output"]
        return output.args[0]


class _Linker:
    def __init__(self, fused: dict[nn.Module, FusedContainer], allowed: patterns.Allowed):
        self.fused, self.allowed = fused, allowed
        self.parts: dict[nn.Module, _Part | None] = {}
        self.in_chains = {m for f in fused.values() for _, c in f.sites for m in c.modules}

    def holds_fused(self, module: nn.Module) -> bool:
        return any(m in self.fused for m in module.modules())

    def part(self, module: nn.Module) -> _Part | None:
        """The graph of a container that runs chains or calls one that does; None for others."""
        if module not in self.parts:
            self.parts[module] = self._made(module)
        return self.parts[module]

    def _made(self, module: nn.Module) -> _Part | None:
        container = self.fused.get(module)
        if container is not None:
            found = patterns.rewritten(container.traced, container.sites)
            traced = container.traced
            return _Part(found.graph, traced.arguments, found.chains, traced.inlined)
        if not self.holds_fused(module) or isinstance(module, Fused):
            return None
        try:
            traced = tracing.trace(module)
        except tracing.UntraceableError:
            return None
        return _Part(traced.graph, traced.arguments, {}, traced.inlined)

    def plan(self, name: str, module: nn.Module) -> Plan | None:
        part = self.part(module)
        if part is None:
            return None
        writing = _Writing(self, module)
        arguments = [writing.graph.placeholder(name) for name in part.arguments]
        result = writing.write(module, part, "", arguments)
        if not writing.chains:
            return None
        writing.graph.output(result)
        graph, found = _Grouping(writing, name, self.allowed).grouped()
        attributes = {**found, **writing.leaves(graph)}
        code = graph.python_code("self")
        inlined = tuple(Inlined.of(m) for m in writing.inlined)
        return Plan(part.arguments, code.src, dict(code.globals), attributes, inlined)


class _Writing:
    """One graph in the making, into which containers are written."""

    def __init__(self, linker: _Linker, root: nn.Module):
        self.linker, self.root = linker, root
        self.graph = torch.fx.Graph()
        self.chains: dict[Node, Chain] = {}
        self.inlined: list[nn.Module] = []

    def write(self, module: nn.Module, part: _Part, prefix: str, arguments: list[Node]) -> Any:
        """Copies a container's nodes; returns what stands for its result."""
        self.inlined += part.inlined if module is self.root else [module, *part.inlined]
        given = iter(arguments)
        copies: dict[Node, Any] = {}
        for node in part.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                return torch.fx.node.map_arg(node.args[0], copies.__getitem__)
            elif node in part.chains:
                args = tuple(copies[a] for a in _nodes(node))
                copies[node] = made = self.graph.create_node("call_module", "_mbm_chain", args)
                self.chains[made] = part.chains[node]
            else:
                copies[node] = self._copied(module, node, prefix, copies)
        raise AssertionError("a graph without an output")

    def _copied(self, module: nn.Module, node: Node, prefix: str, copies: dict[Node, Any]) -> Any:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            part = None if called in self.linker.in_chains else self.linker.part(called)
            if part is not None and _fits(node, part):
                path = f"{prefix}{node.target}."
                return self.write(called, part, path, [copies[a] for a in _nodes(node)])
        made = self.graph.node_copy(node, copies.__getitem__)
        if node.op in ("call_module", "get_attr"):
            made.target = f"{prefix}{node.target}"
        return made

    def leaves(self, graph: torch.fx.Graph) -> dict[str, nn.Module]:
        """Modules that lie deep, as attributes of the root: a path takes longer than some calls."""
        found: dict[str, nn.Module] = {}
        for node in graph.nodes:
            target = str(node.target)
            if node.op == "call_module" and "." in target:
                node.target = f"_mbm_module_{len(found)}"
                found[node.target] = self.root.get_submodule(target)
        return found


def _fits(node: Node, part: _Part) -> bool:
    """Whether a call of a container may be replaced by its nodes."""
    positional = not node.kwargs and all(isinstance(a, Node) for a in node.args)
    return positional and len(node.args) == len(part.arguments) and isinstance(part.result, Node)


def _nodes(node: Node) -> list[Node]:
    """A call's positional arguments, which are nodes."""
    return [a for a in node.args if isinstance(a, Node)]


@dataclass(frozen=True, eq=False)
class _Found:
    """A step and what it reads; within: nodes that are part of it beside its own."""

    what: What
    reads: tuple[Node, ...]
    within: tuple[Node, ...] = ()


class _Grouping:
    """A graph with one node for each run of steps that nothing stands between."""

    def __init__(self, writing: _Writing, name: str, allowed: patterns.Allowed):
        self.written, self.chains = writing.graph, writing.chains
        self.modules = dict(writing.root.named_modules(remove_duplicate=False))
        self.name, self.allowed = name, allowed
        self.graph = torch.fx.Graph()
        self.copies: dict[Node, Node] = {}
        self.found: dict[str, Sequence] = {}
        self.of_one_pixel: set[Node] = set()
        self.flat: set[Node] = set()  # of two dimensions

    def grouped(self) -> tuple[torch.fx.Graph, dict[str, Sequence]]:
        """The graph, and its sequences by their targets."""
        steps = {node: self._step(node) for node in self.written.nodes}
        within = {n for found in steps.values() if found is not None for n in found.within}
        run: dict[Node, _Found] = {}
        for node, found in steps.items():
            if found is not None:
                run[node] = found
            elif node not in within:
                self._close(run)
                self._copy(node)
        return self.graph, self.found

    def _step(self, node: Node) -> _Found | None:
        """What a node is in a sequence; None: a node that is in none."""
        chain = self.chains.get(node)
        if chain is not None:
            found = _Found(chain, tuple(_nodes(node)))
            if len(found.reads) == 1 and found.reads[0] in self.of_one_pixel:
                self.of_one_pixel.add(node)
            return found
        squeeze = gating.squeeze_of(node, self.modules)
        if squeeze is not None and self._may_change(node):
            self.of_one_pixel.add(node)
            return _Found(squeeze, tuple(_nodes(node)))
        head = heads.head_of(node, self.modules, self.flat, self._may_change)
        if head is not None:
            self.flat.add(node)
            linear, read, within = head
            return _Found(linear, (read,), within)
        if heads.is_flat(node, self.modules, self.flat):
            self.flat.add(node)
        scale = gating.scale_of(node, self.modules)
        if scale is None:
            return None
        what, reads, gate = scale
        if sum(read in self.of_one_pixel for read in reads) != 1:
            return None
        if gate is not None and not self._may_change(gate):
            return None
        return _Found(what, reads, () if gate is None else (gate,))

    def _may_change(self, node: Node) -> bool:
        """Whether the filter lets a node's module be replaced; functions are nobody's."""
        if node.op != "call_module":
            return True
        path = f"{self.name}.{node.target}" if self.name else str(node.target)
        return self.allowed(path, self.modules[str(node.target)])

    def _copy(self, node: Node) -> None:
        self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)

    def _close(self, run: dict[Node, _Found]) -> None:
        """Writes the run so far: as a sequence where there is a chain or a linear layer in it, else
        as it was."""
        if any(isinstance(found.what, Chain | Head) for found in run.values()):
            self._write(run)
        else:
            for node, found in run.items():
                for part in (*found.within, node):
                    self._copy(part)
        run.clear()

    def _write(self, run: dict[Node, _Found]) -> None:
        outside = [a for found in run.values() for a in found.reads if a not in run]
        inputs = list(dict.fromkeys(outside))
        numbers = {node: i for i, node in enumerate((*inputs, *run))}
        steps = []
        for found in run.values():
            x, *rest = (numbers[a] for a in found.reads)
            steps.append(Step(found.what, x, rest[0] if rest else None))
        within = {n for found in run.values() for n in found.within}
        own = {*run, *within}
        outputs = [node for node in run if any(user not in own for user in node.users)]
        target = f"_mbm_sequence_{len(self.found)}"
        made = self.graph.create_node("call_module", target, tuple(self.copies[i] for i in inputs))
        for i, node in enumerate(outputs):
            several = len(outputs) > 1
            self.copies[node] = (
                self.graph.call_function(operator.getitem, (made, i)) if several else made
            )
        self.found[target] = Sequence(
            tuple(steps), len(inputs), tuple(numbers[node] for node in outputs)
        )
