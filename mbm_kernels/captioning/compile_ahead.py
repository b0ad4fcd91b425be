"""Compiles the stock forms that `speed.measure` times while something else trains.

torch.compile keeps what it made in a cache on disk, keyed by graph, sizes and configuration, and
takes it from there where it is asked for the same again. A process of the lowest priority fills
that cache from the time that a training leaves of the cores.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from mbm_kernels.captioning.data import CaptionSet, WordTokenizer, collate
from mbm_kernels.captioning.kinds import CAPTIONER
from mbm_kernels.captioning.speed import captioning_pass, training_step

LOWEST_PRIORITY = 19


@contextmanager
def compiled_ahead(
    settings: dict[str, Any],
    captions: CaptionSet,
    tokenizer: WordTokenizer,
    *,
    batch_size: int,
    max_length: int,
) -> Iterator[BaseProcess]:
    """The process that compiles; it is ended with the block where it has not finished.

    Args:
        settings: of the model, as a checkpoint keeps them; weights do not matter.
        captions, tokenizer, batch_size, max_length: as `speed.measure` gets them.
    """
    batch = collate(captions, range(min(batch_size, len(captions))), tokenizer)[:2]
    spawn = multiprocessing.get_context("spawn")  # a fork would share the locks of torch's threads
    arguments = (settings, *batch, max_length, torch.get_num_threads())
    process = spawn.Process(target=_compile, args=arguments, daemon=True)
    process.start()
    try:
        yield process
    finally:
        process.terminate()
        process.join()


def _compile(
    settings: dict[str, Any],
    images: torch.Tensor,
    tokens: torch.Tensor,
    max_length: int,
    threads: int,
) -> None:
    if hasattr(os, "nice"):
        os.nice(LOWEST_PRIORITY)
    torch.set_num_threads(threads)  # compiled code holds their number
    training_step(CAPTIONER.build(layers="stock", **settings), (images, tokens), True)()
    captioning_pass(CAPTIONER.build(layers="stock", **settings), images, max_length, True)()
