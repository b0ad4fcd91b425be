"""The containers of a model whose forward holds chains: fused, and unfused where none pays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mbm_kernels.optimize import patterns, tracing
from mbm_kernels.optimize.candidates import ChainCandidate
from mbm_kernels.optimize.chain import Chain
from mbm_kernels.optimize.fused import PLAN, Fused, FusedForward


@dataclass(eq=False)
class FusedContainer(FusedForward):
    """A container that runs chains."""

    traced: tracing.Traced
    sites: list[tuple[patterns.Site, Chain]]

    def fuse(self) -> None:
        """Gives the container a forward with its present chains."""
        plan = patterns.plan(self.traced, self.sites)
        plan.checked = self.plan is not None and self.plan.checked
        if isinstance(self.module, Fused):
            self.module.unfuse()
        self.plan = plan
        self.redo()


class Fusion:
    """All chains of a model, each run as one operation; `notes` say where none could be found."""

    def __init__(self, model: nn.Module, allowed: patterns.Allowed):
        self.fused: list[FusedContainer] = []
        self.candidates: list[ChainCandidate] = []
        self.notes: list[str] = []
        inlined: set[nn.Module] = set()
        for name, module in list(model.named_modules()):
            if isinstance(module, Fused):
                inlined.update(part.module for part in vars(module)[PLAN].inlined)
            elif module not in inlined and _may_hold_chains(module):
                inlined.update(self._look_into(name, module, allowed))

    def _look_into(
        self, name: str, module: nn.Module, allowed: patterns.Allowed
    ) -> Sequence[nn.Module]:
        """Fuses one container; returns the nn.Sequential that need not be looked into any more."""
        shown = name or "(model)"
        try:
            traced = tracing.trace(module)
        except tracing.UntraceableError as error:
            self.notes.append(
                f"{shown}: could not be traced, so that only its nn.Sequential are fused: {error}"
            )
            return ()
        found = patterns.sites(module, traced, name, allowed)
        for site in found:
            path = f"{name}.{site.conv.target}" if name else str(site.conv.target)
            self.notes += [f"{path}: the chain ends before: {reason}" for reason in site.stopped]
        chains = [(s, patterns.chain_of(module, s, name)) for s in found if s.is_chain]
        if chains:
            container = FusedContainer(shown, module, traced, chains)
            container.fuse()
            self.fused.append(container)
            self.candidates += [
                ChainCandidate(
                    chain.name,
                    chain.was,
                    "mbm_kernels.conv_bias_act",
                    "conv_bias_act",
                    chain,
                    module,
                    attribute,
                )
                for attribute, chain in vars(module)[PLAN].attributes.items()
            ]
        return traced.inlined

    def refused(self) -> dict[nn.Module, tuple[FusedContainer, str]]:
        """Containers whose forward as traced was found wrong, with the reason."""
        plans = [(f, vars(f.module)[PLAN]) for f in self.fused]
        return {f.module: (f, p.refused) for f, p in plans if p.refused is not None}

    def drop(self, candidate: ChainCandidate) -> None:
        """Takes a chain out of its container's forward; `finish` makes it so."""
        for container in self.fused:
            if container.module is candidate.container:
                container.sites = [s for s in container.sites if s[1] is not candidate.chain]

    def finish(self) -> list[FusedContainer]:
        """The containers that stay fused."""
        refused = self.refused()
        kept = []
        for container in self.fused:
            if container.module in refused or not container.sites:
                container.undo()
                continue
            if len(container.sites) < len(vars(container.module)[PLAN].chains):
                container.fuse()
            kept.append(container)
        return kept


def _may_hold_chains(module: nn.Module) -> bool:
    """Whether a module's forward is its author's, or nn.Sequential's, and calls convolutions."""
    sequential = tracing.is_sequential(module)
    own = sequential or not type(module).__module__.startswith("torch.")
    return own and _has_convolutions(module)


def _has_convolutions(module: nn.Module) -> bool:
    """Among its modules, or in nn.Sequential among them."""
    for child in module.children():
        if isinstance(child, nn.Conv2d):
            return True
        if tracing.is_sequential(child) and _has_convolutions(child):
            return True
    return False
