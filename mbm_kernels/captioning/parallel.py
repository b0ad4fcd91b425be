"""An objective whose step several processes share: replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mbm_kernels.captioning import processes

KINDS = ("ddp", "fsdp2")


class Parallel:
    """Calls an objective, and sums the gradients of the processes at a step's last part.

    FSDP2 shards parameters, gradients and moments of the optimizer between steps; a forward or
    backward has them whole. The objective's parameters are DTensors then.
    """

    def __init__(self, objective: nn.Module, kind: str) -> None:
        """
        Raises:
            ValueError: for an unknown kind.
        """
        if kind not in KINDS:
            raise ValueError(f"parallel: got {kind!r}, expected one of {KINDS}")
        self.world = processes.world()
        self.call: Any = objective
        self.sharded: Any = None
        if self.world > 1 and kind == "ddp":
            self.call = DistributedDataParallel(objective)
        elif self.world > 1:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            device = next(objective.parameters()).device.type
            # One group: the losses read the vocabulary's weight outside the model's forward.
            fully_shard(objective, mesh=init_device_mesh(device, (self.world,)))
            self.sharded = objective

    def part(self, last: bool) -> AbstractContextManager[Any]:
        """A context for the forward and backward of one part of a step."""
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            return self.call.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients; both kinds divide the sum by the processes, so it is undone."""
        (loss * self.world if self.world > 1 else loss).backward()

    def reshard(self) -> None:
        """After forwards without backward."""
        if self.sharded is not None:
            self.sharded.reshard()

    def finish(self) -> None:
        """Leaves plain parameters behind."""
        if self.sharded is not None:
            self.sharded.unshard()


def whole(x: Tensor) -> Tensor:
    """A tensor whose shards the processes hold; all of them must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x.detach()


def like(x: Tensor, value: Tensor) -> Tensor:
    """A whole value on x's device, sharded as x is."""
    value = value.to(x.device)
    if isinstance(x, DTensor):
        # Every process has the value: nothing is sent.
        return distribute_tensor(value, x.device_mesh, x.placements, src_data_rank=None)
    return value


@torch.no_grad()
def assign(x: Tensor, value: Tensor) -> None:
    """Writes a whole value into x."""
    if x.shape != value.shape:
        raise TypeError(f"got shape {list(value.shape)}, expected {list(x.shape)}")
    x.copy_(like(x, value))


def local(x: Tensor) -> Tensor:
    """This process's shard."""
    return x.to_local() if isinstance(x, DTensor) else x
