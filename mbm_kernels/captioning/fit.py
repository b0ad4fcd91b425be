"""One training loop for every objective: seeded, resumable, interruptible.

Everything random of a step comes from (seed, step), so a resumed run needs no generator state and
gives the same weights, bit for bit, as one that was never stopped. Where torch.distributed has
several processes, each calls `fit` with the same arguments and computes its share of every step.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from mbm_kernels.captioning import checkpoint, processes, tensorboard
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.execution import HERE, Execution
from mbm_kernels.captioning.history import History as History
from mbm_kernels.captioning.lock import locked
from mbm_kernels.captioning.objective import Objective
from mbm_kernels.captioning.presets import TrainSettings
from mbm_kernels.captioning.progress import training_progress
from mbm_kernels.captioning.taught import Teaching
from mbm_kernels.captioning.trainer import Trainer


def fit(
    objective: Objective,
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    settings: TrainSettings,
    *,
    seed: int = 0,
    validation: CaptionSet | None = None,
    run: Path | None = None,
    resume: bool = False,
    title: str | None = None,
    after_step: Callable[[int], None] | None = None,
    taught: Teaching | None = None,
    execution: Execution = HERE,
) -> History:
    """Minimise an objective over a set of captioned images.

    Args:
        objective: holds the model that is trained.
        seed: of the order of images, augmentation and dropout.
        validation: images whose loss decides the best checkpoint; None takes the latest.
        run: folder of the checkpoints; None writes none. Several processes need it in common.
        resume: continue from the latest checkpoint of ``run``.
        title: of the progress bar; None shows none.
        after_step: called with the number of steps done, after each.
        taught: the teacher's outputs for ``train_set``, which a distillation then takes from there.
        execution: device and form of parallelism. The model ends up on that device.

    Raises:
        ValueError: if the set has fewer images than a batch, if the batch cannot be computed in
            parts, if there is nothing to validate on but ``patience``, if ``run`` holds another
            run's checkpoints, or on resuming with other settings.
        FileNotFoundError: on resuming where there is no checkpoint.
        ImportError: if TensorBoard is asked for and absent.
        KeyboardInterrupt: after Ctrl-C; in a process alone once the last whole step is saved.
        RuntimeError: if another training works in ``run``, or another process has ended.
        OSError: if ``run`` cannot be written, before the first step, or later a checkpoint.
    """
    if execution.tensorboard:
        tensorboard.writer_class()
    first = processes.is_first()
    trainer = Trainer(
        objective, train_set, tokenizer, settings, seed, validation, run, taught, execution
    )
    with locked(run) if run is not None and first else nullcontext():
        processes.barrier()  # the folder is the first's now, and what was half written is gone
        if resume:
            trainer.restore()
        else:
            check_empty(run)
        objective.train()
        progress = training_progress(title if first else None, settings.steps, trainer.step)
        with progress as report, _board(trainer, execution) as write, deferred_sigint() as stop:
            while not trainer.done:
                parts = trainer.advance()
                report(trainer.step, parts)
                if after_step is not None:
                    after_step(trainer.step)
                if stop.is_set():
                    trainer.save()
                    raise KeyboardInterrupt
                if trainer.step % settings.evaluate_every == 0 or trainer.step == settings.steps:
                    trainer.validate()
                    trainer.save()
                write()
        objective.eval()
        trainer.finish()
    return trainer.history


def check_empty(run: Path | None) -> None:
    """Whether a training may begin in a folder.

    Raises:
        ValueError: it holds checkpoints.
    """
    if run is not None and checkpoint.exists(run):
        raise ValueError(
            f"run {run}: got a folder with checkpoints, expected an empty one; continue with "
            "--resume, or give another folder"
        )


def _board(trainer: Trainer, execution: Execution) -> AbstractContextManager[Callable[[], None]]:
    if execution.tensorboard and trainer.run is not None and processes.is_first():
        return tensorboard.board(trainer.run, trainer.history, trainer.step)
    return nullcontext(lambda: None)


@contextmanager
def deferred_sigint() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that a step is never cut in half; a second one interrupts at once.

    Signals reach only the main thread: elsewhere the event is never set. Nor is it in a group of
    processes, which would stop at different steps: Ctrl-C interrupts there at once.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread() or processes.grouped():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
