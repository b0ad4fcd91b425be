"""The model card of a run: README.md in its folder, written anew with each checkpoint."""

from __future__ import annotations

import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

from mbm_kernels import __version__
from mbm_kernels._core.files import write_atomic
from mbm_kernels.bench import machine
from mbm_kernels.captioning import pages
from mbm_kernels.captioning.kinds import Kind
from mbm_kernels.captioning.stored import Folder

CARD = "README.md"
SCORES = "scores.json"
MARK = "mbm-kernels writes this page"  # in a card, but in no page of the user's own
SCORED = {
    "exact_match": "exact match, %",
    **{f"bleu{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)},
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
}


@cache
def environment() -> dict[str, Any]:
    """Versions and machine, as a checkpoint keeps them."""
    facts = machine.facts()
    return {
        "versions": {"mbm_kernels": __version__, "python": platform.python_version()}
        | {name: version for name, version in facts["versions"].items() if version},
        "cpu": facts["cpu"],
        "cores": facts["cores"],
        "isa": facts["isa"],
        "gpu": facts["gpu"],
        "system": facts["system"],
    }


def write(run: Path, kind: Kind[Any]) -> None:
    """Write the card of what the run's folder holds; a README.md of another hand stays.

    Raises:
        OSError: it cannot be written; a card that was there stays.
    """
    path = run / CARD
    if path.exists() and MARK.encode() not in path.read_bytes():
        return
    write_atomic(path, text(run, kind).encode())


def text(run: Path, kind: Kind[Any]) -> str:
    """The card, in Markdown."""
    found = Folder(run, kind)
    names = found.index()
    latest, best = (found.checkpoint(which).config() for which in ("latest", "best"))
    training, history = latest.get("training") or {}, latest.get("history") or {}
    scores = _read_scores(run)
    return pages.render(
        "card.md",
        name=run.resolve().name,
        kind=kind,
        names=names,
        latest=latest,
        best=best,
        settings=_flat(latest["model"]),
        training=_flat(training.get("settings") or {}),
        objective=training.get("objective"),
        seed=training.get("seed"),
        data=latest.get("data"),
        pictures=training.get("pictures"),
        checksum=training.get("data"),
        losses=(history.get("train") or [])[-1:],
        validation=_lowest(history.get("validation") or []),
        scores={name: scores.get(weights_of(c), {}) for name, c in _named(names, latest, best)},
        scored=SCORED,
        environment=latest.get("environment"),
    )


def add_scores(run: Path, kind: Kind[Any], weights: str, data: str, found: dict[str, Any]) -> None:
    """Keep scores on a data set in the run's scores.json and its card.

    Args:
        weights: `weights_of` the checkpoint. found: `splits`, metrics by split, and how they were
            made.

    Raises:
        OSError: they cannot be written.
    """
    scores = _read_scores(run)
    scores.setdefault(weights, {})[data] = found
    write_atomic(run / SCORES, (json.dumps(scores, indent=1) + "\n").encode())
    write(run, kind)


def weights_of(config: dict[str, Any]) -> str:
    """What tells the weights of a checkpoint from all others."""
    return str(config["sha256"]["model.safetensors"])


def _read_scores(run: Path) -> dict[str, Any]:
    path = run / SCORES
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"scores {path}: got no JSON object, expected what `caption eval --save` wrote; "
            "delete it"
        )
    return found


def _named(
    names: dict[str, str], latest: dict[str, Any], best: dict[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    pairs = {names["best"]: best, names["latest"]: latest}
    return list(pairs.items())


def _lowest(rows: list[dict[str, float]]) -> dict[str, float] | None:
    return min(rows, key=lambda row: row["loss"], default=None)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """With the fields of a nested object in its place."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat
