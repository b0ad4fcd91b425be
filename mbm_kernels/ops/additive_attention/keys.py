"""What repeats between calls of additive_attention with one key, owned by the caller."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import autocast, checks, dispatch
from mbm_kernels._core.tracing import is_plain, wants_gradient
from mbm_kernels.ops.additive_attention import problem

NAME = "additive_attention_keys"


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False, repr=False)
class AdditiveAttentionKeys:
    """A snapshot of a key, and what a backend made of it; `additive_attention_keys` makes one.

    A call of `additive_attention` with it has the result of the call with the snapshot. What is
    prepared serves calls that run on `backend`, in the key's dtype and in the ISA that it was made
    in; all other calls take the snapshot.

    Attributes:
        backend: the one that it is prepared for.
        dtype: the key's.
        shape: the key's, [B, S, D].
        device: the key's.
    """

    backend: str
    dtype: torch.dtype
    _snapshot: Tensor  # [B, S, D] contiguous, of `dtype` or the backend's SNAPSHOT_DTYPE
    _prepared: Any  # by the backend's `prepare_key`, which reads the snapshot; None without one

    @property
    def shape(self) -> torch.Size:
        return self._snapshot.shape

    @property
    def device(self) -> torch.device:
        return self._snapshot.device

    def key(self) -> Tensor:
        """The snapshot in `dtype`; not to be written."""
        return self._snapshot.to(self.dtype)  # float32 holds every 16-bit number

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}={getattr(self, name)}" for name in ("dtype", "device"))
        return f"AdditiveAttentionKeys({list(self.shape)}, {listed}, backend={self.backend!r})"


def additive_attention_keys(key: Tensor, *, backend: str = "auto") -> AdditiveAttentionKeys:
    """What calls of `additive_attention` with one key have in common, made once for all of them.

    Equivalent to:
        key.detach().clone()

    For decoding: each step attends with new queries to the same key. The result is passed as `key`,
    and is a snapshot: later writes to `key`, by whatever way, do not change it. It lives as long as
    the caller keeps it; nothing else holds on to it.

    Args:
        key: [B, S, D], floating.
        backend: "auto", "cpu", "triton", "cuda" or "torch": the one to prepare for. "auto" is what
            the call would choose for one query. The kernels prepare the key's exponentials; "torch"
            has nothing that steps share. It decides nothing for the calls, which have their own.

    Returns:
        AdditiveAttentionKeys, accepted as `key` by `additive_attention` where no gradient is
        wanted. It holds a copy of the key, in float32 where it is prepared for "cpu", and the
        exponentials in float32: one number for each of the key's, two for "triton".

    Raises:
        TypeError: key is not a floating tensor.
        ValueError: it has not three dimensions, a gradient by it is wanted, or the backend's name
            is unknown.
        BackendUnavailableError: a backend asked for by name cannot run.

    Numerics:
        "cpu" gives bit by bit what it gives for the key itself; other kernels may sum in another
        order. Under autocast the key is cast as
        the call would cast it; a call under another autocast casts the snapshot.
    """
    checks.tensor(NAME, "key", key, 3)
    if wants_gradient(key):
        checks.fail(
            NAME,
            "key",
            "a tensor that a gradient is wanted by",
            "one without: keys are a snapshot",
            "make them under torch.no_grad() or of key.detach(), or pass the key itself",
        )
    (key,) = autocast.cast(key)
    checks.same_floating(NAME, (("key", key),))
    batch, positions, features = key.shape
    sizes = {"B": batch, "T": 1, "S": positions, "D": features, "E": features}
    sizes |= {"elements": batch * positions * features, "training": 0}
    chosen = dispatch.select(problem.NAME, backend, key.device, key.dtype, sizes)
    prepare, kept = None, key.dtype
    if is_plain((key,)):
        module = dispatch.load_backend(problem.NAME, chosen)
        prepare = getattr(module, "prepare_key", None)
        kept = getattr(module, "SNAPSHOT_DTYPE", kept)
    snapshot = key.detach().to(kept, copy=True, memory_format=torch.contiguous_format)
    prepared = None if prepare is None else prepare(snapshot)
    return AdditiveAttentionKeys(chosen, key.dtype, snapshot, prepared)
