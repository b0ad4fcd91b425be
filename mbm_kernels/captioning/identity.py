"""Whether a checkpoint is of the run that would go on from it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from mbm_kernels.captioning.checkpoint import Checkpoint
from mbm_kernels.captioning.presets import TrainSettings


def check_same_run(
    run: Path, found: Checkpoint[Any], identity: dict[str, Any], model: dict[str, Any]
) -> None:
    """Compares what a checkpoint says with a run's identity and its model's settings.

    Raises:
        ValueError: they differ; it names in what.
    """
    saved = found.config.get("training")
    got: dict[str, Any] = {"settings": None}
    if isinstance(saved, dict) and isinstance(saved.get("settings"), dict):
        # A setting that is newer than the checkpoint had its default.
        defaults = {x.name: x.default for x in fields(TrainSettings)}
        got = {**saved, "settings": {**defaults, **saved["settings"]}}
    flat_got = _flat({**got, "model": found.model.settings})
    flat_expected = _flat({**identity, "model": model})
    names = {**flat_expected, **flat_got}
    other = [name for name in names if flat_got.get(name) != flat_expected.get(name)]
    if other:
        raise ValueError(
            f"run {run}: got a checkpoint with "
            + ", ".join(f"{name} {flat_got.get(name)!r}" for name in other)
            + ", expected "
            + ", ".join(f"{name} {flat_expected.get(name)!r}" for name in other)
            + "; resume with the settings that it began with"
        )


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """Values by their own name, whatever dictionary they are in."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat
