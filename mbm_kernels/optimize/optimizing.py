"""`optimize`: swaps a model's modules, and in inference fuses chains of them, on the instance."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mbm_kernels._core import checks
from mbm_kernels.nn import counterparts, trial
from mbm_kernels.optimize import fusing, linking, measure
from mbm_kernels.optimize.candidates import Candidate, ModuleCandidate, kinds_of_calls
from mbm_kernels.optimize.freezing import Frozen
from mbm_kernels.optimize.judging import Judge
from mbm_kernels.optimize.report import Report, Row

Filter = Callable[[str, nn.Module], bool]

MODES = ("inference", "training")
POLICIES = ("auto", "measured", "always")
OPS = tuple(c.op for c in counterparts.COUNTERPARTS)


def optimize(
    model: nn.Module,
    *,
    mode: str = "inference",
    sample_input: Any = None,
    policy: str = "auto",
    filter_fn: Filter | None = None,
    strict: bool = False,
    ops: Collection[str] | None = None,
    freeze: bool = False,
) -> Report:
    """Makes a model faster in place, and says what was changed, what was not, and why.

    Modules of torch that have a counterpart in `mbm_kernels.nn` become it: each stays the same
    object with the same parameters, buffers, hooks and names, only its class changes. In inference
    a container whose forward holds Conv2d -> BatchNorm2d -> residual addition -> activation ->
    MaxPool2d runs such a chain as one operation when it is called without gradients.

    Args:
        model: of any class; its own parameters stay what they are.
        mode: "training" swaps modules, nothing else; "inference" wants a model in eval mode.
        sample_input: what the model is called with: a tensor, a tuple of positional arguments or a
            dict of named ones. Forward passes on it, whose buffers and random numbers are put back,
            show what each module is called with.
        policy: "auto": modules where PyTorch is predicted to be faster in all calls of the sample
            stay as they are; without a sample all are swapped and choose at each call. "measured":
            those that are faster beyond noise in interleaved rounds on the sample's calls, and none
            if with them the whole model is not.
            "always": all, with the kernel's backend by name.
        filter_fn: filter_fn(name, module) says whether a module may be changed.
        strict: raises where a module of a supported type could not be changed, other than by
            `filter_fn`, `ops` or because PyTorch is faster; the model is as before then.
        ops: names of operations, of "conv_bias_act", "gru", "gru_cell", "cross_attention".
        freeze: takes the weights of what is replaced for constants, until `revert`: packed weights
            are used while addresses and torch's version counters of the weights stay the same,
            instead of a hash of every byte at each call. Writes that torch does not count
            (`weight.data`, NumPy, optimizers with fused=True) are not seen then; in-place
            operations, `load_state_dict` and new parameters are. For mode "inference".

    Returns:
        A Report: print it; `.replaced`, `.kept`, `.notes`, `.revert()`.

    Raises:
        ValueError: a mode, policy or operation that there is not, a model in training mode with
            mode "inference", policy "measured" without a sample, `freeze` in mode "training", or by
            `strict`.
        TypeError: `model` is no torch.nn.Module.
        Exception: whatever the model raises on the sample; it is as before then.

    Example:
        report = mbm_kernels.optimize(model.eval(), sample_input=images)
        print(report)
        report.revert()
    """
    _check(model, mode, sample_input, policy, ops)
    if freeze and mode != "inference":
        remedy = 'leave freeze out, or pass mode="inference"'
        checks.fail("optimize", "freeze", freeze, "False where weights are trained", remedy)
    task = _Task(
        model=model,
        report=Report(mode, policy),
        judge=Judge(policy, sample_input is not None, mode == "training"),
        sample=None if sample_input is None else arguments(sample_input),
        filter_fn=filter_fn,
        ops=OPS if ops is None else tuple(ops),
        failed=[],
    )
    try:
        if mode == "inference" and "conv_bias_act" in task.ops:
            task.fuse()
        task.swap()
        task.link()
        if policy == "measured":
            task.measure()
        if freeze:
            task.freeze()
        if strict and task.failed:
            raise ValueError(
                f"optimize: strict: got {'; '.join(task.failed)}; expected every module of a "
                "supported type to be replaced; leave them out by filter_fn, or strict=False"
            )
    except BaseException:
        task.report.revert()
        raise
    return task.report


@contextmanager
def optimized(model: nn.Module, **options: Any) -> Iterator[Report]:
    """Within it the model is as `optimize` makes it, with these options; after it as before."""
    report = optimize(model, **options)
    try:
        yield report
    finally:
        report.revert()


@dataclass
class _Task:
    model: nn.Module
    report: Report
    judge: Judge
    sample: tuple[tuple[Any, ...], dict[str, Any]] | None
    filter_fn: Filter | None
    ops: tuple[str, ...]
    failed: list[str]
    fused: list[fusing.FusedContainer] = field(default_factory=list)

    def allowed(self, name: str, module: nn.Module) -> bool:
        return self.filter_fn is None or bool(self.filter_fn(name, module))

    def fuse(self) -> None:
        """Containers run their chains; what is not kept of those is unfused again."""
        fusion = fusing.Fusion(self.model, self.allowed)
        self.report._changes += fusion.fused
        self.report.notes += fusion.notes
        self._observe({c: (c.container, c.attribute) for c in fusion.candidates})
        refused = fusion.refused()
        for candidate in fusion.candidates:
            if candidate.container in refused:
                continue
            verdict = self.judge.judge(candidate, candidate.chain.conv.weight)
            candidate.calls = []  # which hold activations
            if verdict.replaced:
                self.report.replaced.append(verdict.row(candidate))
            else:
                fusion.drop(candidate)
                if verdict.failed:
                    self.report.notes.append(f"{candidate.name}: not fused: {verdict.reason}")
        self.report.notes += [f"{f.name}: {reason}" for f, reason in refused.values()]
        self.fused = fusion.finish()
        self.report._changes = [*self.fused]

    def link(self) -> None:
        """Containers that call fused ones run all of that as one forward."""
        self.report._changes += linking.link(self.model, self.fused, self.allowed)

    def swap(self) -> None:
        """Modules become their counterparts; what is not kept of those is put back."""
        replaced = {row.name for row in self.report.replaced}
        in_chains = counterparts.in_chains(self.model)
        candidates = []
        for name, module in counterparts.named(self.model).items():
            shown = name or "(model)"
            if name in replaced:
                continue
            reason, failed = self._why_not(name, module)
            if module in in_chains:
                reason, failed = "it is in a chain that was fused; revert that first", False
            if reason is not None:
                self._keep(shown, module, reason, failed)
                continue
            known = counterparts.of(module)
            assert known is not None
            was = counterparts.label(module)
            counterparts.swap(module)
            candidate = ModuleCandidate(shown, was, counterparts.label(module), known.op, module)
            self.report._changes.append(candidate)
            candidates.append(candidate)
        self._observe({c: (c.module, "forward") for c in candidates})
        for candidate in candidates:
            verdict = self.judge.judge(candidate, counterparts.first_tensor(candidate.module))
            candidate.calls = []
            if not verdict.replaced:
                candidate.undo()
                self.report._changes.remove(candidate)
            if verdict.failed:
                self.failed.append(f"{candidate.name}: {verdict.reason}")
            rows = self.report.replaced if verdict.replaced else self.report.kept
            rows.append(verdict.row(candidate))

    def measure(self) -> None:
        """Undoes all changes unless with them the whole model is faster beyond noise."""
        if not self.report._changes:
            return
        assert self.sample is not None
        call = trial.Call(*self.sample)
        found = measure.whole(self.model, call, self.report._changes, self.judge.training)
        if measure.wins(found):
            self.report.ratio = found.value
            return
        self.report.revert()
        interval = f"{found.low:.2f} to {found.high:.2f}"
        reason = f"the model with all that won alone measured {interval}: not faster beyond noise"
        self.report.kept += [
            replace(row, now=row.was, backend="torch", reason=reason, error=None)
            for row in self.report.replaced
        ]
        self.report.replaced.clear()

    def freeze(self) -> None:
        """Takes the weights of what is replaced for constants."""
        found = {m for f in self.fused for _, chain in f.sites for m in chain.modules}
        found |= {c.module for c in self.report._changes if isinstance(c, ModuleCandidate)}
        if not self.report._changes:
            return
        frozen = Frozen([t for m in found for t in (*m.parameters(), *m.buffers())])
        frozen.redo()
        self.report._changes.append(frozen)

    def _why_not(self, name: str, module: nn.Module) -> tuple[str | None, bool]:
        """Why a module keeps its class before anything is tried, and whether `strict` minds."""
        known = counterparts.of(module)
        assert known is not None
        if known.op not in self.ops:
            return f"{known.op} is not among ops", False
        if not self.allowed(name, module):
            return "filter_fn left it out", False
        reason = counterparts.why_not(module)
        return reason, reason is not None and not isinstance(module, known.ours)

    def _keep(self, name: str, module: nn.Module, reason: str, failed: bool) -> None:
        if failed:
            self.failed.append(f"{name}: {reason}")
        label = counterparts.label(module)
        self.report.kept.append(Row(name, label, label, "torch", reason))

    def _observe(self, places: Mapping[Any, tuple[Any, str]]) -> None:
        """Runs the sample, if there is one, and gives each candidate its calls."""
        if self.sample is None or not places:
            return
        args, kwargs = self.sample
        by_id: dict[int, Candidate] = {id(c): c for c in places}
        watched = {id(c): place for c, place in places.items()}
        with (
            torch.set_grad_enabled(self.judge.training),
            trial.unchanged(self.model),
            trial.recorded(watched) as calls,
        ):
            self.model(*args, **kwargs)
        for key, made in calls.items():
            by_id[key].calls = kinds_of_calls(made)


def arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call from one tensor, a tuple or list of them, or a dict by name.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, (tuple, list)):
        return tuple(sample), {}
    if isinstance(sample, Mapping):
        return (), dict(sample)
    raise TypeError(
        f"optimize: sample_input: got {type(sample).__name__}; expected a tensor, a tuple of "
        "positional arguments or a dict of named ones; pass what the model is called with"
    )


def _check(
    model: Any, mode: str, sample_input: Any, policy: str, ops: Collection[str] | None
) -> None:
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        checks.fail("optimize", "model", got, "a torch.nn.Module", "pass the model", TypeError)
    checks.choice("optimize", "mode", mode, MODES)
    checks.choice("optimize", "policy", policy, POLICIES)
    if isinstance(ops, str):
        checks.fail("optimize", "ops", repr(ops), "several names", "write [name]", TypeError)
    for op in ops or ():
        checks.choice("optimize", "ops", op, OPS)
    if policy == "measured" and sample_input is None:
        remedy = "pass what the model is called with"
        checks.fail("optimize", "sample_input", None, 'inputs, for policy="measured"', remedy)
    if mode == "inference" and model.training:
        remedy = 'call model.eval() first, or pass mode="training"'
        checks.fail("optimize", "model", "one in training mode", "one in eval mode", remedy)
