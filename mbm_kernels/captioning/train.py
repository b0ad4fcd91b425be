"""Training of a teacher, and of a student with or without one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mbm_kernels.captioning import processes
from mbm_kernels.captioning.data import CaptionSet, WordTokenizer
from mbm_kernels.captioning.distill import CrossEntropyObjective, DistillationObjective
from mbm_kernels.captioning.execution import HERE, Execution
from mbm_kernels.captioning.fit import History, fit
from mbm_kernels.captioning.presets import DistillSettings, TrainSettings
from mbm_kernels.captioning.prior import NeighbourPrior
from mbm_kernels.captioning.seeding import seeded
from mbm_kernels.captioning.taught import TaughtSet, Teaching
from mbm_kernels.captioning.teacher_cache import TeacherCache
from mbm_kernels.models import Captioner, CaptionerConfig

TOPK = 32  # words of a place that a teacher's cache keeps, unless said


@dataclass(frozen=True)
class Trained:
    """A finished training: the model after its last step, in eval mode, and its losses."""

    model: Captioner
    tokenizer: WordTokenizer
    history: History


def train_teacher(
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    settings: TrainSettings,
    *,
    size: str = "teacher",
    config: CaptionerConfig | None = None,
    attention: str | None = None,
    layers: str = "mbm",
    seed: int = 0,
    validation: CaptionSet | None = None,
    run: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    execution: Execution = HERE,
) -> Trained:
    """Train a captioner by cross-entropy; see ``fit`` for the arguments that the two share.

    ``config`` takes the place of ``size``, ``attention`` that of the configuration's.
    """
    model = fresh_model(train_set, tokenizer, size, attention, layers, seed, config)
    objective = CrossEntropyObjective(model, _prior(train_set, tokenizer, settings))
    title = f"{size if config is None else 'captioner'} by cross-entropy"
    history = fit(
        objective,
        train_set,
        tokenizer,
        settings,
        seed=seed,
        validation=validation,
        run=run,
        resume=resume,
        title=title if progress else None,
        execution=execution,
    )
    return Trained(model.eval(), tokenizer, history)


def train_student(
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    settings: TrainSettings,
    *,
    teacher: Captioner | None,
    distill: DistillSettings | None = None,
    config: CaptionerConfig | None = None,
    teacher_cache: Path | None = None,
    topk: int | None = None,
    attention: str | None = None,
    layers: str = "mbm",
    seed: int = 0,
    validation: CaptionSet | None = None,
    run: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    execution: Execution = HERE,
) -> Trained:
    """Train a student from a teacher, or by cross-entropy alone if ``teacher`` is None.

    Args:
        teacher_cache: a folder of the teacher's ``topk`` likeliest words (32 if None) at each
            place, computed there if absent, which the student learns from instead of whole
            distributions; the images must not be augmented then.
    """
    if teacher is None:
        return train_teacher(
            train_set,
            tokenizer,
            settings,
            size="student",
            config=config,
            attention=attention,
            layers=layers,
            seed=seed,
            validation=validation,
            run=run,
            resume=resume,
            progress=progress,
            execution=execution,
        )
    prior = _prior(train_set, tokenizer, settings)
    teacher.to(processes.own_device(execution.device))
    taught = _taught(teacher, train_set, tokenizer, settings, teacher_cache, topk, prior)
    model = fresh_model(train_set, tokenizer, "student", attention, layers, seed, config)
    with seeded(seed, -2):
        objective = DistillationObjective(model, teacher, distill or DistillSettings(), prior)
    history = fit(
        objective,
        train_set,
        tokenizer,
        settings,
        seed=seed,
        validation=validation,
        run=run,
        resume=resume,
        title="student by distillation" if progress else None,
        taught=taught,
        execution=execution,
    )
    return Trained(model.eval(), tokenizer, history)


def _taught(
    teacher: Captioner,
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    settings: TrainSettings,
    cache: Path | None,
    topk: int | None,
    prior: NeighbourPrior | None,
) -> Teaching | None:
    """The teacher's outputs that are known before training."""
    if cache is None:
        return TaughtSet.if_worth(teacher, train_set, tokenizer, settings)
    if settings.augment:
        raise ValueError(
            f"teacher_cache: got {cache} for images that are augmented, expected images as they "
            "are, of which its outputs are; give --no-augment, or leave --teacher-cache out"
        )
    k = min(TOPK, teacher.vocab_size) if topk is None else topk
    with processes.first_alone():
        return TeacherCache.open(cache, teacher, train_set, tokenizer, k=k, prior=prior)


def fresh_model(
    train_set: CaptionSet,
    tokenizer: WordTokenizer,
    size: str,
    attention: str | None,
    layers: str,
    seed: int,
    config: CaptionerConfig | None = None,
) -> Captioner:
    """The model before its first step; size is "teacher" or "student", unless config is given."""
    with seeded(seed, -1):
        return Captioner(
            tokenizer.vocab_size,
            config=config,
            size=size if config is None else None,
            attention=attention,
            layers=layers,
            image_size=train_set.images.shape[-1],
            pad_id=tokenizer.pad_id,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
        )


def _prior(
    train_set: CaptionSet, tokenizer: WordTokenizer, settings: TrainSettings
) -> NeighbourPrior | None:
    if not settings.neighbour_prior:
        return None
    words = [tokenizer.encode(caption) for caption in train_set.captions]
    return NeighbourPrior(words, tokenizer.vocab_size)
