"""`make demo`: captioners, search, matching of pairs, their speed, and a report of all that."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import machine
from mbm_kernels.captioning import data, metrics
from mbm_kernels.captioning.checkpoint import remove
from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.evaluate import evaluate
from mbm_kernels.captioning.lock import locked
from mbm_kernels.captioning.presets import Preset, preset
from mbm_kernels.captioning.train import Trained, fresh_model, train_student, train_teacher
from mbm_kernels.demo import finding
from mbm_kernels.demo.compile_ahead import compiled_ahead
from mbm_kernels.demo.report import write_report
from mbm_kernels.demo.results import MODELS, Demo
from mbm_kernels.demo.speed import measure
from mbm_kernels.demo.subjects import CaptionerSubject, Subject
from mbm_kernels.retrieval import presets as retrieval

SPEED_SECONDS = 4.0
WITH_TEACHER = ("teacher", "student")


def run(
    name: str,
    *,
    out: Path | None = None,
    root: Path | None = None,
    attention: str = "additive",
    seed: int = 0,
    limit: int | None = None,
    steps: int | None = None,
    compiled: bool = True,
    alone: bool = False,
    console: Console | None = None,
) -> Demo:
    """Trains, captions, times and writes `report.html` and `results.json`.

    Args:
        name: "scenes" or "emoji".
        out: folder to write to; default out/demo/<name> below the current folder.
        root: folder of the prepared data.
        limit, steps: smaller than the preset's, for a trial.
        compiled: whether torch.compile of the stock model is among the forms timed.
        alone: whether a student without a teacher is trained too.

    Raises:
        ValueError: unknown data set, or data that does not fit.
        RuntimeError: when another demo works in that folder.
        OSError: when something cannot be written; whether `out` can is tried first.
    """
    chosen = preset(name)
    out = out or Path("out") / "demo" / name
    console = console or Console()
    started = time.monotonic()
    console.print(f"[bold]Captioning demo on {name}[/bold], {torch.get_num_threads()} threads")
    demo = Demo(name, attention, seed, {}, WordTokenizer.train(["-"]))
    with locked(out, "demo"):
        with _clock(demo, "data", console):
            demo.sets = data.load(
                name, seed=seed, root=root, image_size=chosen.image_size, limit=limit
            )
            demo.tokenizer = WordTokenizer.train(demo.sets["train"].captions)
        captioner = _captioner(demo, chosen)
        others = finding.Subjects.of(demo, retrieval.preset(name))
        timed: list[Subject] = [captioner, others.towers, others.matching]
        with compiled_ahead(timed) if compiled else nullcontext() as ahead:
            timed = [captioner.of(_train(demo, chosen, out, steps, alone, console))]
            with _clock(demo, "search and matching", console):
                timed += finding.train(demo, retrieval.preset(name), others, out, steps)
            if ahead is not None:
                _wait_for(ahead, demo, console)
        with _clock(demo, "baselines", console):
            _baselines(demo)
        with _clock(demo, "speed", console):
            for subject in timed:
                demo.speed += measure(subject, seconds=SPEED_SECONDS, compiled=compiled)
        demo.seconds["total"] = time.monotonic() - started
        results = as_results(demo)
        write_atomic(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
        write_report(demo, results, out / "report.html")
        print_summary(demo, console)
        console.print(f"\nreport: {out / 'report.html'}\nresults: {out / 'results.json'}")
    return demo


@contextmanager
def _clock(demo: Demo, name: str, console: Console) -> Iterator[None]:
    start = time.monotonic()
    yield
    demo.seconds[name] = time.monotonic() - start
    console.print(f"  {name}: {demo.seconds[name]:.0f} s", style="dim")


def _captioner(demo: Demo, chosen: Preset) -> Subject:
    """The teacher before its first step."""
    train, shown = demo.sets["train"], demo.sets[demo.splits[0]]
    model = fresh_model(train, demo.tokenizer, "teacher", demo.attention, "stock", demo.seed)
    rows = range(min(chosen.teacher.batch_size, len(shown)))
    batch = data.collate(shown, rows, demo.tokenizer)[:2]
    return CaptionerSubject("teacher", model.settings, *batch, max_length=chosen.max_length)


def _wait_for(process: BaseProcess, demo: Demo, console: Console) -> None:
    with _clock(demo, "waiting for torch.compile", console):
        process.join()
    if process.exitcode:
        console.print(
            f"  compiling the stock forms ahead ended with exit status {process.exitcode}; "
            "they are compiled before they are timed",
            style="yellow",
        )


def _train(
    demo: Demo, chosen: Preset, out: Path, steps: int | None, alone: bool, console: Console
) -> Any:
    """The captioners' trainings and their captions; returns the teacher's model."""
    validation = None if chosen.validation is None else demo.sets[chosen.validation]
    shared: dict[str, Any] = {
        "attention": demo.attention,
        "seed": demo.seed,
        "validation": validation,
    }
    teacher: Trained | None = None
    for role in MODELS if alone else WITH_TEACHER:
        settings = chosen.teacher if role == "teacher" else chosen.student
        if steps is not None:
            settings = settings.shortened(steps)
        folder = out / "models" / role
        remove(folder)
        with _clock(demo, role, console):
            if role == "teacher":
                done = teacher = train_teacher(
                    demo.sets["train"], demo.tokenizer, settings, run=folder, **shared
                )
            else:
                done = train_student(
                    demo.sets["train"],
                    demo.tokenizer,
                    settings,
                    teacher=teacher.model if teacher and role == "student" else None,
                    distill=chosen.distill,
                    run=folder,
                    **shared,
                )
        demo.histories[role] = done.history
        demo.parameters[role] = sum(p.numel() for p in done.model.parameters())
        demo.scores[role], demo.predictions[role] = {}, {}
        with _clock(demo, f"captions of the {MODELS[role]}", console):
            for split in demo.splits:
                texts, scores, weights = evaluate(
                    done.model, demo.sets[split], demo.tokenizer, max_length=chosen.max_length
                )
                demo.scores[role][split], demo.predictions[role][split] = scores, texts
                if role == "student":
                    demo.weights[split] = weights
    assert teacher is not None
    return teacher.model


def _baselines(demo: Demo) -> None:
    train = demo.sets["train"]
    frequent = metrics.most_frequent_caption(train)
    for name in ("most_frequent", "nearest"):
        demo.baselines[name], demo.predictions[name] = {}, {}
        for split in demo.splits:
            wanted = demo.sets[split]
            texts = (
                [frequent] * len(wanted)
                if name == "most_frequent"
                else metrics.nearest_image_captions(train, wanted.images)
            )
            demo.predictions[name][split] = texts
            demo.baselines[name][split] = metrics.score(texts, wanted.captions)


def as_results(demo: Demo) -> dict[str, Any]:
    """The content of results.json."""
    facts = machine.facts()
    return {
        "data": demo.data,
        "device": machine.device(),
        "versions": facts["versions"],
        "commit": machine.commit(Path(__file__).resolve().parent),
        "seconds": demo.seconds["total"],
        **demo.scores,
        "baselines": demo.baselines,
        "retrieval": demo.recalls,
        "matching": demo.aucs,
        "speed": [row.as_dict() for row in demo.speed],
        "seconds_by_part": {k: v for k, v in demo.seconds.items() if k != "total"},
        "pictures": {name: len(captions) for name, captions in demo.sets.items()},
        "parameters": demo.parameters,
        "seed": demo.seed,
        "attention": demo.attention,
        "threads": torch.get_num_threads(),
        "machine": facts,
    }


def print_summary(demo: Demo, console: Console) -> None:
    """The report's tables in the terminal."""
    table = Table("captions by", title=f"{demo.data}: exact match %, BLEU-4, CIDEr-D")
    for split in demo.splits:
        table.add_column(split, justify="right")
    for name, scores in {**demo.scores, **demo.baselines}.items():
        cells = [
            f"{100 * s['exact_match']:.1f}   {s['bleu4']:.1f}   {s['cider_d']:.2f}"
            for s in (scores[split] for split in demo.splits)
        ]
        table.add_row(MODELS.get(name, name.replace("_", " ")), *cells)
    console.print(table)
    search = Table("R@1 %, text to image and back", title="search")
    for split in demo.recalls:
        search.add_column(split, justify="right")
    for method in next(iter(demo.recalls.values())):
        found = [list(methods[method].values()) for methods in demo.recalls.values()]
        cells = ["   ".join(f"{100 * way['R@1']:.1f}" for way in ways) for ways in found]
        search.add_row(method.replace("_", " "), *cells)
    console.print(search)
    pairs = Table("AUC %, hard and other texts", title="do image and text belong together")
    for split in demo.aucs:
        pairs.add_column(split, justify="right")
    for streams in demo.aucs[demo.splits[0]]:
        aucs = [list(table[streams].values()) for table in demo.aucs.values()]
        cells = ["   ".join(f"{100 * value:.1f}" for value in row) for row in aucs]
        pairs.add_row(streams.replace("+", ", "), *cells)
    console.print(pairs)
    speed = Table("what", "stock form", "stock ms", "mbm ms", "ratio (95 %)", title="speed")
    for row in demo.speed:
        ratio = f"{row.ratio:.2f} ({row.ratio_lo:.2f} to {row.ratio_hi:.2f})"
        speed.add_row(row.what, row.stock_form, f"{row.stock_ms:.1f}", f"{row.mbm_ms:.1f}", ratio)
    console.print(speed)
    console.print(f"{demo.seconds['total']:.0f} s in all")
