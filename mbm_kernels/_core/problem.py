"""Problem descriptors: all that follows from the shapes, strides, dtypes and options of a call.

An operation's `Problem` is built, and its arguments checked, once per kind of call. Then it is
found again in one of two ways, neither of which lets a call pass that the checks would refuse
(`Problems`):

- The latest calls are known by a guard of torch's compiler, which compares in one step each
  tensor's type, dtype, device, sizes, strides, requires_grad and dispatch keys with those of the
  call before: no mode, tracer, functorch, autocast or negative view passes it.
- `key_of` gives a key that holds everything that checks and choices read.

What is not plain eager code neither looks a problem up nor keeps one.
"""

import functools
import marshal
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from mbm_kernels._core import arguments, dispatch, torch_private, tracing
from mbm_kernels._core.torch_private import TensorGuards, tangents

Key = tuple[Any, ...]


class Problem(Protocol):
    """What every operation's descriptor has."""

    @property
    def options(self) -> tuple[Any, ...]:
        """The options as the registered operation takes them."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def sizes(self) -> dict[str, int]:
        """The sizes by which a backend is chosen."""


P = TypeVar("P", bound=Problem)
T = TypeVar("T")


def key_of(tensors: Sequence[Any], options: tuple[Any, ...]) -> Key | None:
    """A key for this kind of call; None where it may not be looked up.

    Options are compared by type as well as by value, True, 1 and 1.0 being equal in Python:
    marshal writes the type of each, and refuses what is no plain number, string, tuple or list.
    """
    if not tracing.is_eager():
        return None
    try:
        key: list[Any] = [_written(options), arguments.layout_of(tensors)]
    except ValueError:
        return None
    for tensor in arguments.flat(tensors):
        if tensor is None:
            key.append(None)
            continue
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter:
            return None
        key += (tensor.shape, tensor.stride(), tensor.dtype)
        if not tensor.is_cpu:
            if tensor.is_meta:
                return None
            key.append(tensor.device)
    return tuple(key)


def derived(p: Any, key: Any, make: Callable[[Any], T]) -> T:
    """What a backend keeps in `p.derived`; `make` reads nothing but the problem."""
    found = p.derived.get(key)
    if found is None:
        found = p.derived[key] = make(p)
    return found  # type: ignore[no-any-return]


class Call(Generic[P]):
    """A problem and what one kind of call adds: the backend named, whether it has gradients."""

    __slots__ = ("_last", "backend", "check", "differentiable", "options", "problem")

    def __init__(
        self, problem: P, backend: str, tensors: Sequence[Tensor], options: tuple[Any, ...]
    ):
        self.problem, self.backend, self.options = problem, backend, options
        self.differentiable = any(t.requires_grad for t in tensors)
        self.check = guard(tensors)
        self._last: tuple[Any, str] = (None, "")

    def choose(self, op: str, training: bool) -> str:
        """As `dispatch.select`, whose last answer holds while nothing that it goes by changes."""
        named = self.backend != "auto"
        now: Any = (training, dispatch._epoch) if named else (training, dispatch.moment())
        known, chosen = self._last  # in one step: threads share the call
        if known != now:
            p = self.problem
            sizes = {**p.sizes, "training": int(training)}
            chosen = dispatch.select(op, self.backend, p.device, p.dtype, sizes)
            self._last = (now, chosen)
        return chosen


class Problems(Generic[P]):
    """An operation's problems by their keys, and its latest calls by guards.

    Bounded; threads may share it, for each step is one of a dictionary.

    Args:
        build: build(*inputs, *options), the problem of the registered operation's arguments, which
            it checks.
        inputs: how many of the arguments are inputs.
    """

    MOST = 1024
    MOST_ALIKE = 8  # calls that differ in what is left to their guards

    def __init__(self, build: Callable[..., P], inputs: int) -> None:
        self.build, self.inputs = build, inputs
        self._problems: dict[Key, P] = {}
        # By what is cheap to compare.
        self._calls: dict[Key, tuple[Call[P], ...]] = {}

    def find(self, *given: Any) -> P:
        """The problem of the registered operation's inputs and options.

        Raises:
            TypeError, ValueError: they do not fit.
        """
        key = key_of(given[: self.inputs], ("registered", *given[self.inputs :]))
        found = None if key is None else self._problems.get(key)
        return self._put(key, self.build(*given)) if found is None else found

    def checked(
        self,
        tensors: tuple[Any, ...],
        options: tuple[Any, ...],
        check: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[tuple[Any, ...], P]],
    ) -> tuple[tuple[Any, ...], P]:
        """The inputs and the problem of the public function's tensors and options.

        `check` makes them, where such a call is new: with the tensors as autocast wants them, which
        are the given ones where a call has a key.
        """
        key = key_of(tensors, options)
        found = None if key is None else self._problems.get(key)
        if found is None:
            tensors, found = check(tensors, options)
            self._put(key, found)
        return tensors, found

    def _put(self, key: Key | None, problem: P) -> P:
        if key is not None:
            if len(self._problems) >= self.MOST:
                self._problems.clear()
            self._problems[key] = problem
        return problem

    def call(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> Call[P] | None:
        """The call like this one; `options` say which tensors are left out of `tensors`."""
        if torch.compiler.is_compiling() or tangents._current_level >= 0:
            return None
        try:
            for call in self._calls[options, tensors[0].shape]:
                if call.check(*tensors) and _are_same(options, call.options):
                    return call
        except (AttributeError, KeyError, TypeError, ValueError):
            return None  # no tensor, no such call, no plain options or sizes
        return None

    def put(self, call: Call[P], tensors: Sequence[Tensor]) -> None:
        if call.check is None:
            return
        if len(self._calls) >= self.MOST:
            self._calls.clear()
        try:
            key = (call.options, tensors[0].shape)
            self._calls[key] = (call, *self._calls.get(key, ())[: self.MOST_ALIKE - 1])
        except TypeError:  # a list among the options has no hash
            return

    def remember(
        self, problem: P, backend: str, tensors: Sequence[Tensor], options: tuple[Any, ...]
    ) -> Call[P] | None:
        """The call, kept, if its guard knows others by it and plain eager code alone made it.

        Its arguments were checked.
        """
        if not (tracing.is_eager() and tracing.is_plain(tensors)):
            return None
        call = Call(problem, backend, tensors, options)
        self.put(call, tensors)
        return None if call.check is None else call

    def clear(self) -> None:
        self._problems.clear()
        self._calls.clear()

    def __len__(self) -> int:
        return len(self._problems)


def _are_same(options: tuple[Any, ...], known: tuple[Any, ...]) -> bool:
    """Whether options that are equal have the same types too: True, 1 and 1.0 are equal."""
    for option, other in zip(options, known, strict=True):
        if option is not other:
            return _written(options) == _written(known)
    return True


def _written(options: tuple[Any, ...]) -> bytes:
    """Bytes that are equal for options of the same types and values.

    Raises:
        ValueError: one is no plain number, string, tuple or list.
    """
    return marshal.dumps(options, 2)  # a later version depends on who else holds a string


def guard(tensors: Sequence[Tensor]) -> Any:
    """A function that tells whether tensors are like these; None where this torch has no guards."""
    return _guard(tensors) if _guards_hold() else None


def _guard(tensors: Sequence[Tensor]) -> Any:
    sizes: list[Any] = [list(t.shape) for t in tensors]
    strides: list[Any] = [list(t.stride()) for t in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return guards.check


@functools.cache
def _guards_hold() -> bool:
    """Whether this torch's guards compare what is relied upon; they are no public interface."""
    if TensorGuards is None:
        return False
    like, other = torch.zeros(2, 3, device="cpu"), torch.zeros(3, 2, device="cpu")
    try:
        check = _guard((like,))
        with torch.autocast("cpu", torch.bfloat16):
            refused = [not check(like)]
        others = (other, other.t(), like.double(), like.to("meta"), torch_private.negated(like))
        refused += [not check(x) for x in (*others, Parameter(like), like.clone().requires_grad_())]
        return bool(check(like.clone())) and all(refused)
    except Exception:
        return False
