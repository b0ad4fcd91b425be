"""Chains in a container's graph, and the graph without them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from mbm_kernels.nn import counterparts
from mbm_kernels.optimize import gating, nodes, norms
from mbm_kernels.optimize.chain import Chain, Pool
from mbm_kernels.optimize.fused import Inlined, Plan
from mbm_kernels.optimize.held import holder
from mbm_kernels.optimize.tracing import Traced

Allowed = Callable[[str, nn.Module], bool]

POOL_CALLS = (F.max_pool2d, torch.max_pool2d)
POOL_ARGUMENTS = {"kernel_size": None, "stride": None, "padding": 0} | {
    "dilation": 1,
    "ceil_mode": False,
    "return_indices": False,
}
ADDITIONS = (operator.add, torch.add, "add")
ADDITIONS_IN_PLACE = (operator.iadd, "add_")
# These commute with the maximum of a pool.
BEFORE_OR_AFTER_POOL = ("relu", "relu6")


@dataclass
class Site:
    """A chain's place in a graph: its nodes, from the convolution's to the last."""

    conv: Node
    nodes: list[Node]
    modules: list[tuple[str, nn.Module]]  # by path in the container
    norm: Any = None  # a batch norm (norms.py)
    residual: Node | None = None
    addition: Node | None = None  # of the residual
    activation: str | None = None
    pool: Pool | None = None
    gates: bool = False  # its result goes to a product of maps (gating.py)
    stopped: list[str] = field(default_factory=list)  # why a module after it is not in it

    @property
    def is_chain(self) -> bool:
        return any((self.norm, self.residual, self.activation, self.pool, self.gates))

    @property
    def anchor(self) -> Node:
        """Where the chain runs: once its inputs are there, and before they may be written."""
        return self.conv if self.addition is None else self.addition

    @property
    def last(self) -> Node:
        return self.nodes[-1]


def sites(container: nn.Module, traced: Traced, path: str, allowed: Allowed) -> list[Site]:
    """The chains in a container's graph, none of them within another; and convolutions alone."""
    modules = dict(container.named_modules(remove_duplicate=False))
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    taken: set[Node] = set()
    found = []
    for node in traced.graph.nodes:
        if node.op != "call_module" or type(modules.get(str(node.target))) is not nn.Conv2d:
            continue
        conv = modules[str(node.target)]
        full = f"{path}.{node.target}" if path else str(node.target)
        if len(node.args) != 1 or node.kwargs or not allowed(full, conv):
            continue
        site = Site(node, [node], [(str(node.target), conv)])
        if reason := _why_not_alone(str(node.target), conv):
            site.stopped.append(reason)
        else:
            _Growth(site, modules, order, taken, path, allowed).grow()
            site.gates = conv.kernel_size == (1, 1) and gating.gates(site.last, modules)
        taken.update(site.nodes)
        found.append(site)
    return found


def _why_not_alone(name: str, module: nn.Module) -> str | None:
    if counterparts.has_hooks(module):
        return f"a hook sits on {name!r}"
    return counterparts.why_not(module)


class _Growth:
    """One chain, grown from its convolution as far as it goes."""

    def __init__(
        self,
        site: Site,
        modules: dict[str, nn.Module],
        order: dict[Node, int],
        taken: set[Node],
        path: str,
        allowed: Allowed,
    ):
        self.site, self.modules, self.order, self.taken = site, modules, order, taken
        self.path, self.allowed = path, allowed

    def grow(self) -> None:
        site = self.site
        while True:
            if len(site.last.users) != 1:
                if len(site.last.users) > 1 and not (site.activation or site.pool):
                    site.stopped.append(f"what {site.last.name!r} returns is used elsewhere too")
                return
            (node,) = site.last.users
            if node in self.taken or not self._takes(node):
                return
            site.nodes.append(node)

    def _takes(self, node: Node) -> bool:
        """Whether the chain goes on with this node; then its part in it is noted."""
        if node.op == "call_module":
            return self._takes_module(node)
        if node.op not in ("call_function", "call_method"):
            return False
        target = node.target
        if target in ADDITIONS or target in ADDITIONS_IN_PLACE:
            return self._takes_addition(node, target in ADDITIONS_IN_PLACE)
        if not node.args or node.args[0] is not self.site.last:
            return False
        if target in POOL_CALLS:
            given = nodes.options(node, POOL_ARGUMENTS)
            return given is not None and self._takes_pool(**given)
        return target in nodes.ACTIVATION_CALLS and self._takes_activation(
            nodes.activation_called(node)
        )

    def _takes_module(self, node: Node) -> bool:
        name = str(node.target)
        if node.kwargs or len(node.args) != 1:
            return False
        module, site = self.modules[name], self.site
        parts = [(name, module)]
        if norms.is_norm(type(module)):
            parts += [(f"{name}.{key}", part) for key, part in norms.calls(module)]
        if not all(self._may_take(*part) for part in parts):
            return False
        before = site.norm, site.activation, site.pool
        if not all(self._takes_part(part) for _, part in parts):
            site.norm, site.activation, site.pool = before
            return False
        site.modules += parts
        return True

    def _may_take(self, name: str, module: nn.Module) -> bool:
        """Whether a module's class is known, and nothing but that says what it does."""
        kind = type(module)
        known = kind is nn.MaxPool2d or norms.is_norm(kind) or nodes.activation_of(kind) is not None
        if not known and not (nodes.is_dropout(kind) and not module.training):
            return False
        if "forward" in vars(module):
            return False
        if not self.allowed(f"{self.path}.{name}" if self.path else name, module):
            return False
        if counterparts.has_hooks(module):
            self.site.stopped.append(f"a hook sits on {name!r}")
            return False
        return True

    def _takes_part(self, module: nn.Module) -> bool:
        kind = type(module)
        if norms.is_norm(kind):
            return self._takes_norm(module)
        if kind is nn.MaxPool2d:
            keys = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
            return self._takes_pool(**{key: getattr(module, key) for key in keys})
        if nodes.is_dropout(kind):
            return True
        activation = nodes.activation_of(kind)
        return activation is not None and self._takes_activation(activation(module))

    def _takes_norm(self, norm: nn.Module) -> bool:
        site = self.site
        if site.norm or site.residual or site.activation or site.pool:
            return False
        conv: Any = site.modules[0][1]
        reason = norms.why_not_folded(conv, norm)
        if reason is not None:
            site.stopped.append(reason)
            return False
        site.norm = norm
        return True

    def _takes_activation(self, name: str | None) -> bool:
        site = self.site
        if name is None or site.activation or (site.pool and name not in BEFORE_OR_AFTER_POOL):
            return False
        site.activation = name
        return True

    def _takes_pool(self, kernel_size: Any, stride: Any, padding: Any, **rest: Any) -> bool:
        plain = rest == {"dilation": 1, "ceil_mode": False, "return_indices": False}
        sizes = (kernel_size, kernel_size if stride is None else stride, padding)
        if self.site.pool or not plain or any(isinstance(s, Node) for s in sizes):
            return False
        self.site.pool = sizes
        return True

    def _takes_addition(self, node: Node, in_place: bool) -> bool:
        site = self.site
        if site.residual or site.activation or site.pool or node.kwargs or len(node.args) != 2:
            return False
        first, second = node.args
        other = second if first is site.last else first
        if not isinstance(other, Node) or other is site.last or (in_place and other is first):
            return False
        if not self._may_wait(node):
            site.stopped.append("what stands before the residual's addition may write its input")
            return False
        site.residual, site.addition = other, node
        return True

    def _may_wait(self, node: Node) -> bool:
        """Whether the convolution may run only where its result is added: nothing between writes
        what it reads."""
        site = self.site
        inputs = site.conv.all_input_nodes
        start, end = self.order[site.conv], self.order[node]
        for between, place in self.order.items():
            if not start < place < end or between in site.nodes:
                continue
            if _writes(between, self.modules):
                return False
            reads = any(i in inputs for i in between.all_input_nodes)
            if reads and not _is_pure(between, self.modules):
                return False
        return True


def _writes(node: Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node writes a tensor in place, as far as its name tells."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method"):
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    operators = ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul")
    return in_place or name in operators or any(a is True for a in node.args)


def _is_pure(node: Node, modules: dict[str, nn.Module]) -> bool:
    if node.op != "call_module":
        return True
    return type(modules[str(node.target)]).__module__.startswith("torch.nn.")


def chain_of(container: nn.Module, site: Site, path: str) -> Chain:
    """The chain of a site."""
    conv: Any = site.modules[0][1]
    name = f"{path}.{site.conv.target}" if path else str(site.conv.target)
    return Chain(
        name=name,
        conv=conv,
        norm=site.norm,
        residual=site.residual is not None,
        activation=site.activation,
        pool=site.pool,
        modules=tuple(module for _, module in site.modules),
        holders=tuple(holder(container, target) for target, _ in site.modules),
    )


@dataclass
class Rewritten:
    """A container's graph in which each site is a node of its own: `chains` by such nodes."""

    graph: torch.fx.Graph
    chains: dict[Node, Chain]


def rewritten(traced: Traced, found: Sequence[tuple[Site, Chain]]) -> Rewritten:
    """The graph in which each site is a call of its chain; targets are attributes."""
    graph = torch.fx.Graph()
    chains: dict[Node, Chain] = {}
    by_anchor = {site.anchor: (site, chain) for site, chain in found}
    within = {node for site, _ in found for node in site.nodes}
    copies: dict[Node, Node] = {}
    for node in traced.graph.nodes:
        if node in by_anchor:
            site, chain = by_anchor[node]
            args = [copies[site.conv.all_input_nodes[0]]]
            args += [] if site.residual is None else [copies[site.residual]]
            target = f"_mbm_chain_{len(chains)}"
            made = graph.create_node("call_module", target, tuple(args))
            chains[made] = chain
            copies[site.last] = made
        elif node not in within:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return Rewritten(graph, chains)


def plan(traced: Traced, found: Sequence[tuple[Site, Chain]]) -> Plan:
    """The forward in which each site is a call of its chain."""
    made = rewritten(traced, found)
    code = made.graph.python_code("self")
    attributes = {str(node.target): chain for node, chain in made.chains.items()}
    inlined = tuple(Inlined.of(m) for m in traced.inlined)
    return Plan(traced.arguments, code.src, dict(code.globals), attributes, inlined)
