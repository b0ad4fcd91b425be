"""Which backend runs a call: the caller's choice, or the one predicted to be fastest.

On CPUs "auto" compares predicted times (cost.py). On GPUs it goes by rules that results from
hardware gave, package data in `ops/<op>/dispatch.json`:

    {"rules": [{"backend": "triton", "device": "cuda", "dtypes": ["bfloat16"],
                "where": {"B": [1, 64], "elements": [4096, null]},
                "results": "benchmarks/results/<device>/<date>-<sha7>.jsonl"}]}

A rule holds when device and dtype match and every size named in `where` lies in its closed
interval, null being unbounded. "auto" takes the first of cuda, triton, cpu that is known to win and
has no reason not to run; else torch.
"""

import functools
import importlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from mbm_kernels._core import cost, env, torch_private, tracing
from mbm_kernels._core.errors import BackendUnavailableError

OPS_FOLDER = Path(__file__).resolve().parent.parent / "ops"

_defaults: dict[str | None, str] = {}
# A plain global: torch.compile can guard on it, not on a ContextVar.
_disabled_depth = int(env.disable())
_disabled_lock = threading.Lock()
_epoch = 0  # counts what may make a call's choice another one


def _choices_change() -> None:
    global _epoch
    with _disabled_lock:
        _epoch += 1


@dataclass(frozen=True)
class Rule:
    backend: str
    device: str
    dtypes: tuple[str, ...]
    where: tuple[tuple[str, float, float], ...]  # name, least, most
    results: str

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> "Rule":
        where = tuple(
            (name, -float("inf") if low is None else low, float("inf") if high is None else high)
            for name, (low, high) in entry.get("where", {}).items()
        )
        return cls(
            entry["backend"], entry["device"], tuple(entry["dtypes"]), where, entry["results"]
        )

    def holds(self, device: str, dtype: str, sizes: dict[str, int]) -> bool:
        return (
            self.device == device
            and dtype in self.dtypes
            and all(low <= sizes[name] <= high for name, low, high in self.where)
        )


@dataclass(frozen=True, eq=False)  # by identity: part of the key of what was chosen
class Table:
    """What exists for one operation, in the order in which "auto" asks."""

    backends: tuple[str, ...]
    rules: tuple[Rule, ...]

    @classmethod
    def read(cls, op: str) -> "Table":
        folder = OPS_FOLDER.joinpath(*package_of(op).split(".")[2:])
        names = tuple(b for b in env.BACKENDS if (folder / f"backend_{b}.py").exists())
        path = folder / "dispatch.json"
        entries = json.loads(path.read_text())["rules"] if path.exists() else []
        return cls(names, tuple(Rule.parse(entry) for entry in entries))


F = TypeVar("F", bound=Callable[..., Any])


def _constant_for_compilers(function: F) -> F:
    torch_private.constant(function)
    return function


# Plain dictionaries, since torch.compile traces through `select`.
_tables: dict[str, Table] = {}
_packages: dict[str, str] = {}  # of operations inside another's package
_chosen: dict[tuple[Any, ...], str] = {}  # what `select` answered, 5 us of a call saved
MOST_REMEMBERED = 4096


def reload() -> None:
    """Forget what was chosen by the constants read before."""
    cost.reload()
    forget_choices()


def forget_choices() -> None:
    """What was chosen is chosen anew."""
    _chosen.clear()
    _choices_change()


def register(op: str, package: str | None = None) -> None:
    if package is not None:
        _packages[op] = package
    _tables[op] = Table.read(op)
    _choices_change()


def package_of(op: str) -> str:
    """Where an operation's modules are, as `mbm_kernels.ops.gru`."""
    return _packages.get(op, f"mbm_kernels.ops.{op}")


@functools.cache
def load_backend(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{package_of(op)}.backend_{backend}")


def why_not(
    op: str,
    backend: str,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    **sizes: int,
) -> str | None:
    if backend not in _tables[op].backends:
        return f"{op} has no {backend} backend"
    reason: str | None = load_backend(op, backend).why_not(device, dtype, **sizes)
    return reason


@_constant_for_compilers
def _static_why_not(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    # Under torch.compile the sizes may be symbolic; a backend judges those when it runs.
    return why_not(op, backend, torch.device(device), dtype)


@_constant_for_compilers
def _kernel_wins(op: str, sizes: tuple[tuple[str, int], ...]) -> bool:
    found = predicted(op, dict(sizes))
    return found is not None and found.kernel_wins


def predicted(op: str, sizes: dict[str, int]) -> cost.Predicted | None:
    """Times of a float32 call on the CPU with the present number of threads; None: not known."""
    table = cost.table()
    return None if table is None else table.predict(op, sizes, torch.get_num_threads())


@_constant_for_compilers
def _static_env_backend() -> str:
    return env.backend()


def check_backend(op: str, backend: str) -> None:
    if backend != "auto" and backend not in env.BACKENDS:
        listed = ", ".join(("auto", *sorted(env.BACKENDS)))
        raise ValueError(f"{op}: backend: got {backend!r}; expected one of {listed}; fix the name")


def unavailable(op: str, backend: str, reason: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{op}: backend {backend!r} cannot run: {reason}; use backend='auto' or 'torch'"
    )


def without_kernels(op: str, backend: str, reason: str) -> str:
    """The backend of a call that only plain torch can run; raises where another is named."""
    check_backend(op, backend)
    named = default(op) if backend == "auto" else backend
    if named not in ("auto", "torch") and _disabled_depth == 0:
        raise unavailable(op, named, reason)
    return "torch"


def _why_not_call(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int]
) -> str | None:
    if torch.compiler.is_compiling():
        return _static_why_not(op, backend, device.type, dtype)
    return why_not(op, backend, device, dtype, **sizes)


def select(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int]
) -> str:
    """The name of the backend that runs this call; raises rather than swap a named one."""
    chosen = _choose(op, backend, device, dtype, sizes)
    if not torch.compiler.is_compiling():
        seen = _watchers.observed
        if seen is not None:
            seen.append(Observed(op, backend, chosen, device, dtype, dict(sizes)))
    return chosen


def select_among_others(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int]
) -> str:
    """As `select`, of a call that runs in one native call with others (cost.Predicted)."""
    chosen = _choose(op, backend, device, dtype, sizes)
    auto = backend == default(op) == "auto" and _disabled_depth == 0
    if chosen != "torch" or not auto or device.type != "cpu" or dtype is not torch.float32:
        return chosen
    found = predicted(op, sizes)
    wins = found is not None and found.kernel_wins_among_others
    return "cpu" if wins and why_not(op, "cpu", device, dtype, **sizes) is None else chosen


def _choose(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int]
) -> str:
    check_backend(op, backend)
    if _disabled_depth > 0:
        return "torch"
    if backend == "auto":
        backend = default(op)
    if backend == "torch":
        return backend
    if torch.compiler.is_compiling() or torch_private.jit_state() is not None:
        return _select(op, backend, device, dtype, tracing.concrete(sizes))
    # An op always names its sizes in one order, so their values are the key.
    key = (_tables[op], backend, device, dtype, torch.get_num_threads(), *sizes.values())
    try:
        chosen = _chosen.get(key)
    except TypeError:  # symbolic sizes have no hash
        return _select(op, backend, device, dtype, tracing.concrete(sizes))
    if chosen is None:
        if len(_chosen) >= MOST_REMEMBERED:
            _chosen.clear()
        chosen = _chosen[key] = _select(op, backend, device, dtype, sizes)
    return chosen


def _select(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int]
) -> str:
    if backend != "auto":
        if reason := _why_not_call(op, backend, device, dtype, sizes):
            raise unavailable(op, backend, reason)
        return backend
    for name in _tables[op].backends:
        if not _is_known_to_win(op, name, device, dtype, sizes):
            continue
        if _why_not_call(op, name, device, dtype, sizes) is None:
            return name
    return "torch"


def _is_known_to_win(
    op: str, backend: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int]
) -> bool:
    if device.type == "cpu":
        known = backend == "cpu" and dtype is torch.float32
        return known and _kernel_wins(op, tuple(sizes.items()))
    name = str(dtype).removeprefix("torch.")
    return any(
        rule.backend == backend and rule.holds(device.type, name, sizes)
        for rule in _tables[op].rules
    )


def default(op: str) -> str:
    if op in _defaults:
        return _defaults[op]
    if None in _defaults:
        return _defaults[None]
    return _static_env_backend() if torch.compiler.is_compiling() else env.backend()


def set_backend(name: str, op: str | None = None) -> None:
    """Use `name` wherever a call says backend="auto", for one operation or for all.

    Args:
        name: "cpu", "triton", "cuda", "torch", or "auto" to go by predicted times again.
        op: the operation's name, such as "gru"; None sets all of them, and forgets what was set
            for single ones.

    Raises:
        ValueError: for an unknown name or operation.
        BackendUnavailableError: when `op` is given and its backend cannot run on this machine.
    """
    check_backend("set_backend", name)
    if op is None:
        _defaults.clear()
        _defaults[None] = name
        _choices_change()
        return
    check_op(op)
    if name not in ("auto", "torch") and (reason := why_not(op, name)):
        raise unavailable(op, name, reason)
    _defaults[op] = name
    _choices_change()


@contextmanager
def preferring(name: str) -> Iterator[None]:
    """Within this context "auto" means `name` for each operation that has it here."""
    before = dict(_defaults)
    try:
        for op in _tables:
            if name in ("auto", "torch") or why_not(op, name) is None:
                _defaults[op] = name
        _choices_change()
        yield
    finally:
        _defaults.clear()
        _defaults.update(before)
        _choices_change()


@contextmanager
def disabled() -> Iterator[None]:
    """Within this context every operation runs its torch backend, named backends included.

    It holds for the whole process, threads started before it too.
    """
    global _disabled_depth
    with _disabled_lock:
        _disabled_depth += 1
    _choices_change()
    try:
        yield
    finally:
        with _disabled_lock:
            _disabled_depth -= 1
        _choices_change()


@dataclass(frozen=True)
class Observed:
    """One choice of a backend: `asked` by the caller, else "auto", and what was `chosen`; `reason`
    where nothing was to choose."""

    op: str
    asked: str
    chosen: str
    device: torch.device
    dtype: torch.dtype
    sizes: dict[str, int]
    reason: str | None = None


class _Watchers(threading.local):
    observed: "list[Observed] | None" = None
    seen: list[str] | None = None  # of the class: an attribute that is missing takes 0.5 us


_watchers = _Watchers()
_watching = 0  # in all threads, so that `note` need not ask for this thread's


@contextmanager
def observed() -> Iterator[list[Observed]]:
    """The choices made within this context by this thread, outside compiled graphs."""
    before = _watchers.observed
    seen: list[Observed] = []
    _choices_change()  # so that what calls keep of a choice is asked anew
    _watchers.observed = seen
    try:
        yield seen
    finally:
        _watchers.observed = before


def observe(
    op: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int], reason: str
) -> None:
    """Tells `observed` of a call that only PyTorch runs."""
    seen = _watchers.observed
    if seen is not None:
        seen.append(Observed(op, "auto", "torch", device, dtype, sizes, reason))


@contextmanager
def watched() -> Iterator[list[str]]:
    """The backends that operations take within this context, in this thread."""
    global _watching
    before = _watchers.seen
    seen: list[str] = []
    with _disabled_lock:
        _watching += 1
    _watchers.seen = seen
    try:
        yield seen
    finally:
        _watchers.seen = before
        with _disabled_lock:
            _watching -= 1


def is_watched() -> bool:
    """Whether somebody wants to be told of each call's choice."""
    return _watching > 0 or _watchers.observed is not None


def note(backend: str) -> None:
    """Tells `watched` which backend a call takes."""
    if _watching > 0 and _watchers.seen is not None:
        _watchers.seen.append(backend)


def state() -> tuple[Any, ...]:
    """Changes where set_backend, `disabled` or the environment make "auto" mean something else."""
    asked = env.backend() if env._BACKEND in env._raw else "auto"
    return (_disabled_depth > 0, *_defaults.items(), asked)


def moment() -> tuple[Any, ...]:
    """What a call's choice depends on beside the call: it is kept while this is the same."""
    return _epoch, env._raw.get(env._BACKEND), torch.get_num_threads()


def backends(op: str) -> dict[str, str | None]:
    """The four backends of `op`: None where it can run on this machine, else the reason why not.

    Raises:
        ValueError: for an unknown operation.
    """
    check_op(op)
    return {name: why_not(op, name) for name in ("cpu", "triton", "cuda", "torch")}


def check_op(op: str) -> None:
    if op not in _tables:
        raise ValueError(f"op: got {op!r}; expected one of {', '.join(_tables)}; fix the name")
