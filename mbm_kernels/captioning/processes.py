"""The processes of one training, as torch.distributed has them; one alone needs none of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

# The rest waits while the first scans and decodes data of the user's own.
TIMEOUT = timedelta(hours=2)


def grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 for the first or the only one."""
    return dist.get_rank() if grouped() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if grouped() else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def restartable() -> bool:
    """Whether torchrun started this process and starts it again when one of them dies."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def own_device(name: str) -> torch.device:
    """The device of this process; of several GPUs the one of its local rank.

    Raises:
        ValueError: for an unknown name, or a GPU where there is none.
    """
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected 'cpu' or 'cuda'")
    if name == "cpu":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"device: got 'cuda' for local rank {local}, expected one of "
            f"{torch.cuda.device_count()} GPUs; start as many processes as there are GPUs, or give "
            "--device cpu"
        )
    return torch.device("cuda", local)


@contextmanager
def group(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, by NCCL on GPUs and by Gloo on CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
    # torchrun keeps one store: without a prefix a restarted group finds the dead one's addresses.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", store)
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    yield
    # Not after an error: to leave a group waits for the others, which torchrun is about to end.
    dist.destroy_process_group()


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process does something, then the others do it."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def barrier() -> None:
    """Waits until every process is here."""
    if grouped():
        dist.barrier()


def summed(values: Sequence[float], device: torch.device) -> list[float]:
    """The sums of float64 values over the processes, the same in all of them."""
    if not grouped():
        return list(values)
    x = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(x)
    return x.tolist()
