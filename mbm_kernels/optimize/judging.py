"""Which candidates stay replaced: by prediction, by measurement, or wherever a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mbm_kernels import explaining
from mbm_kernels._core import dispatch
from mbm_kernels._core.errors import BackendUnavailableError
from mbm_kernels.nn import counterparts
from mbm_kernels.nn.trial import Call
from mbm_kernels.optimize import measure
from mbm_kernels.optimize.candidates import Candidate, ChainCandidate
from mbm_kernels.optimize.report import Row

STOCK_SERVES = "PyTorch's own forward serves such a call"
NOT_CALLED = "not called with sample_input"


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate stays replaced, and what the report says of it."""

    replaced: bool
    backend: str
    reason: str
    failed: bool = False  # it could not be replaced, rather than not being worth it
    error: float | None = None
    ratio: float | None = None

    def row(self, candidate: Candidate) -> Row:
        now = candidate.now if self.replaced else candidate.was
        return Row(
            candidate.name, candidate.was, now, self.backend, self.reason, self.error, self.ratio
        )


@dataclass(frozen=True)
class Judge:
    """Decides by `policy`, on the sample's calls if there was one."""

    policy: str
    sampled: bool
    training: bool

    def judge(self, candidate: Candidate, like: Tensor | None) -> Verdict:
        """The verdict on a candidate, whose backend is set accordingly."""
        if self.sampled and not candidate.calls:
            return _kept(NOT_CALLED)
        if self.policy == "always":
            found = self._always(candidate, like)
        elif not self.sampled:
            return Verdict(True, "auto", "decides at each call")
        elif self.policy == "measured":
            found = self._measured(candidate, like)
        else:
            found = _predicted(candidate)
        return self._exact(candidate, found) if found.replaced and self.sampled else found

    def _always(self, candidate: Candidate, like: Tensor | None) -> Verdict:
        kernel, reason = counterparts.kernel_of(candidate.op, like)
        if kernel is None:
            return _kept(str(reason), failed=True)
        candidate.use(kernel)
        reason = self._why_not_run(candidate)
        if reason is not None:
            return _kept(reason, failed=True)
        return Verdict(True, kernel, 'policy "always"')

    def _measured(self, candidate: Candidate, like: Tensor | None) -> Verdict:
        taken = _backend_taken(candidate)
        if taken == "torch" and not _folds(candidate):
            # The prediction may be wrong; what is measured decides.
            kernel, _ = counterparts.kernel_of(candidate.op, like)
            if kernel is None:
                return _predicted(candidate)
            candidate.use(kernel)
            if reason := self._why_not_run(candidate):
                return _kept(reason)
            taken = kernel
        found = measure.ratio(candidate, self.training)
        if measure.wins(found):
            interval = f"measured {found.low:.2f} to {found.high:.2f}"
            return Verdict(True, taken, interval, ratio=found.value)
        return _kept("measured: not faster beyond noise", ratio=found.value)

    def _why_not_run(self, candidate: Candidate) -> str | None:
        """Why the backend named cannot serve the sample's calls."""
        ours, _ = candidate.forms()
        try:
            with torch.set_grad_enabled(self.training), torch.random.fork_rng(devices=[]):
                for call, _ in candidate.calls:
                    ours(*call.args, **call.kwargs)
        except BackendUnavailableError as error:
            return str(error)
        return None

    def _exact(self, candidate: Candidate, found: Verdict) -> Verdict:
        """The verdict with its error; kept where that is over the library's limit."""
        parity = candidate.parity(self.training)
        if not parity.ok:
            return _kept(f"its error, {parity.error:.1e}, is over the limit", failed=True)
        return Verdict(True, found.backend, found.reason, error=parity.error, ratio=found.ratio)


def _kept(reason: str, failed: bool = False, ratio: float | None = None) -> Verdict:
    return Verdict(False, "torch", reason, failed=failed, ratio=ratio)


def _folds(candidate: Candidate) -> bool:
    return isinstance(candidate, ChainCandidate) and candidate.chain.norm is not None


def _chosen(candidate: Candidate) -> list[dispatch.Observed]:
    """What `auto` chose in the sample's calls, each kind of problem once."""
    calls: list[Call] = [call for call, _ in candidate.calls]
    return explaining.distinct(calls)


def _backend_taken(candidate: Candidate) -> str:
    """The kernels' backend if any of the calls takes one, else "torch"."""
    seen = _chosen(candidate)
    found = [c.chosen for c in seen]
    if isinstance(candidate, ChainCandidate):  # which runs among others
        found += [
            dispatch.select_among_others(c.op, c.asked, c.device, c.dtype, c.sizes) for c in seen
        ]
    return next((backend for backend in found if backend != "torch"), "torch")


def _predicted(candidate: Candidate) -> Verdict:
    seen = _chosen(candidate)
    taken = _backend_taken(candidate)
    rows = [explaining.row_of(candidate.name, call) for call in seen]
    if taken != "torch":
        among = all(call.chosen == "torch" for call in seen)
        return Verdict(True, taken, _gain_among_others(seen) if among else _gain(rows))
    if not rows:
        return _kept(STOCK_SERVES)
    row = next((r for r in rows if r.op == candidate.op), rows[0])
    kernel = min(row.why_not, key=lambda backend: backend not in row.predicted_ms)
    reason = row.why_not[kernel]
    if _folds(candidate):
        return Verdict(True, "torch", f"BatchNorm folded; the kernel: {reason}")
    return _kept(reason)


def _gain(rows: list[explaining.Row]) -> str:
    stock = sum(row.predicted_ms.get("torch", 0.0) for row in rows)
    ours = sum(row.predicted_ms.get(row.backend, 0.0) for row in rows)
    return f"predicted {stock / ours:.2f}x" if ours > 0 else "known to win on this device"


def _gain_among_others(seen: list[dispatch.Observed]) -> str:
    gains = [p.gain_among_others for c in seen if (p := dispatch.predicted(c.op, c.sizes))]
    return f"in one native call with its neighbours, predicted {max(gains):.2f}x"
