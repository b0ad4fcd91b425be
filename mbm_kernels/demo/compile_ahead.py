"""Compiles the stock forms that `speed.measure` times while something else trains.

torch.compile keeps what it made in a cache on disk, keyed by graph, sizes and configuration, and
takes it from there where it is asked for the same again. A process of the lowest priority fills
that cache from the time that a training leaves of the cores.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import torch

from mbm_kernels.demo.subjects import Subject

LOWEST_PRIORITY = 19


@contextmanager
def compiled_ahead(subjects: Sequence[Subject]) -> Iterator[BaseProcess]:
    """The process that compiles; it is ended with the block where it has not finished.

    Weights do not matter.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would share the locks of torch's threads
    arguments = (list(subjects), torch.get_num_threads())
    process = spawn.Process(target=_compile, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join()


def _compile(subjects: Sequence[Subject], threads: int) -> None:
    if hasattr(os, "nice"):
        os.nice(LOWEST_PRIORITY)
    torch.set_num_threads(threads)  # compiled code holds their number
    for subject in subjects:
        subject.training_step("stock", True)()
        subject.inference("stock", True)()
