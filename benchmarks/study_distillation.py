"""What distillation brings: students of three seeds with and without one teacher, on scenes.

    python benchmarks/study_distillation.py [--seeds 0 --seeds 1] [--out FILE]

The teacher is trained once (seed 0) and is the same for all students, so that the spread is the
students' own. Everything goes to one JSON file, written after each student; it holds the mean and
the standard deviation over seeds, and the difference paired by seed.
"""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import machine
from mbm_kernels.captioning import data
from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.evaluate import evaluate
from mbm_kernels.captioning.presets import preset
from mbm_kernels.captioning.train import train_student, train_teacher

HERE = Path(__file__).resolve().parent
DATA = "scenes"
ARMS = ("distilled", "alone")


def study(seeds: list[int], out: Path) -> dict[str, Any]:
    """Trains, scores and writes; returns what was written."""
    chosen = preset(DATA)
    sets = data.load(DATA, seed=0, image_size=chosen.image_size)
    splits = [name for name in sets if name != "train"]
    tokenizer = WordTokenizer.train(sets["train"].captions)
    validation = None if chosen.validation is None else sets[chosen.validation]
    shared: dict[str, Any] = {"validation": validation, "progress": False}
    started = time.monotonic()

    def score(model: Any) -> dict[str, dict[str, float]]:
        return {
            split: evaluate(model, sets[split], tokenizer, max_length=chosen.max_length)[1]
            for split in splits
        }

    teacher = train_teacher(sets["train"], tokenizer, chosen.teacher, seed=0, **shared).model
    result: dict[str, Any] = {
        "data": DATA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine.device(),
        "commit": machine.commit(HERE),
        "machine": machine.facts(),
        "threads": torch.get_num_threads(),
        "teacher": score(teacher),
        "students": {arm: {} for arm in ARMS},
    }
    for seed in seeds:
        for arm in ARMS:
            done = train_student(
                sets["train"],
                tokenizer,
                chosen.student,
                teacher=teacher if arm == "distilled" else None,
                distill=chosen.distill,
                seed=seed,
                **shared,
            )
            result["students"][arm][str(seed)] = score(done.model)
            result["seconds"] = time.monotonic() - started
            result["summary"] = summarise(result["students"], splits)
            write_atomic(out, (json.dumps(result, indent=1) + "\n").encode())
            print(f"seed {seed}, {arm}: {result['students'][arm][str(seed)]}", flush=True)
    return result


def summarise(
    students: dict[str, dict[str, dict[str, dict[str, float]]]], splits: list[str]
) -> dict[str, Any]:
    """Per split and metric: mean and standard deviation of each arm, and the paired difference."""
    metrics = ("exact_match", "bleu4", "cider_d")
    both = sorted(set(students["distilled"]) & set(students["alone"]))
    found: dict[str, Any] = {}
    for split in splits:
        found[split] = {}
        for metric in metrics:
            row = {
                arm: _mean_and_spread([s[split][metric] for s in students[arm].values()])
                for arm in ARMS
            }
            row["difference"] = _mean_and_spread(
                [
                    students["distilled"][seed][split][metric]
                    - students["alone"][seed][split][metric]
                    for seed in both
                ]
            )
            found[split][metric] = row
    return found


def _mean_and_spread(values: list[float]) -> dict[str, float | int] | None:
    if not values:
        return None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": spread, "seeds": len(values)}


def show(result: dict[str, Any]) -> None:
    table = Table("split", "metric", "distilled", "alone", "difference", title="three seeds")
    for split, metrics in result["summary"].items():
        for metric, row in metrics.items():
            scale = 100 if metric == "exact_match" else 1
            cells = [
                f"{scale * row[k]['mean']:.2f} ± {scale * row[k]['std']:.2f}" if row[k] else "-"
                for k in (*ARMS, "difference")
            ]
            table.add_row(split, metric + (" %" if scale == 100 else ""), *cells)
    Console().print(table)


def main(
    seeds: Annotated[list[int] | None, typer.Option(help="Repeatable; 0, 1 and 2 if none.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    path = out or HERE / "results" / machine.device() / "study-distillation.json"
    show(study(seeds or [0, 1, 2], path))
    print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
