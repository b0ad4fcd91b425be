"""One forward for a whole model: those of its containers written into one another.

Each container that runs chains keeps its own rewritten forward, for who calls it by itself. A
container that calls such ones gets a second one in which their text stands in place of the calls,
and chains that follow each other are one `Sequence`. PyTorch's modules in it are called as before.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence as Many
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn
from torch.fx import Node

from mbm_kernels.optimize import patterns, tracing
from mbm_kernels.optimize.chain import Chain
from mbm_kernels.optimize.fused import PLAN, Fused, FusedForward, Inlined, Plan
from mbm_kernels.optimize.fusing import FusedContainer
from mbm_kernels.optimize.sequence import Sequence, Step


def link(model: nn.Module, fused: Many[FusedContainer], apart: Set[Chain]) -> list[FusedForward]:
    """Links the outermost containers of a model that run chains or call those that do.

    apart: chains that PyTorch is known to run, which are in no sequence.
    """
    linker = _Linker({f.module: f for f in fused}, apart)
    found: list[FusedForward] = []
    done: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in done or not linker.holds_fused(module):
            continue
        plan = linker.plan(module)
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
    def __init__(self, fused: dict[nn.Module, FusedContainer], apart: Set[Chain]):
        self.fused, self.apart = fused, apart
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

    def plan(self, module: nn.Module) -> Plan | None:
        part = self.part(module)
        if part is None:
            return None
        writing = _Writing(self, module)
        arguments = [writing.graph.placeholder(name) for name in part.arguments]
        result = writing.write(module, part, "", arguments)
        if not writing.chains:
            return None
        writing.graph.output(result)
        graph, found = _grouped(writing.graph, writing.chains, self.apart)
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


def _grouped(
    graph: torch.fx.Graph, chains: dict[Node, Chain], apart: Set[Chain]
) -> tuple[torch.fx.Graph, dict[str, Chain | Sequence]]:
    """The graph with a node for each run of chains that nothing stands between, and what those and
    the chains apart are, by their targets."""
    made = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    found: dict[str, Chain | Sequence] = {}
    run: list[Node] = []

    def close() -> None:
        if run:
            target = f"_mbm_sequence_{len(found)}"
            found[target] = _write(made, target, run, chains, copies)
            run.clear()

    for node in graph.nodes:
        chain = chains.get(node)
        if chain is not None and chain not in apart:
            run.append(node)
            continue
        close()
        copies[node] = made.node_copy(node, copies.__getitem__)
        if chain is not None:
            target = f"_mbm_alone_{len(found)}"
            copies[node].target, found[target] = target, chain
    return made, found


def _write(
    graph: torch.fx.Graph,
    target: str,
    run: list[Node],
    chains: dict[Node, Chain],
    copies: dict[Node, Node],
) -> Sequence:
    """Adds a run of chains to the graph; returns its sequence."""
    outside = [a for node in run for a in node.all_input_nodes if a not in run]
    inputs = list(dict.fromkeys(outside))
    numbers = {node: i for i, node in enumerate((*inputs, *run))}
    steps = []
    for node in run:
        x, *rest = (numbers[a] for a in _nodes(node))
        steps.append(Step(chains[node], x, rest[0] if rest else None))
    outputs = [node for node in run if any(user not in run for user in node.users)]
    found = graph.create_node("call_module", target, tuple(copies[i] for i in inputs))
    for i, node in enumerate(outputs):
        picked = graph.call_function(operator.getitem, (found, i)) if len(outputs) > 1 else found
        copies[node] = picked
    return Sequence(tuple(steps), len(inputs), tuple(numbers[node] for node in outputs))
