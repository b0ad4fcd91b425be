"""Checkpoints that are whole or absent.

A run folder holds ``step-<n>/`` with model.safetensors, config.json, tokenizer.json and
training.safetensors, ``checkpoints.json``, which names the latest and the best, and README.md, a
model card. A checkpoint is
written under a temporary name, synced and renamed; then checkpoints.json is replaced. Whatever
stops in between, the names that stand point to complete files.

config.json holds the checksums of the other files and of its own other values, so that a folder is
one checkpoint or none: a file changed, or taken from another checkpoint, is refused. Nothing is
allocated by what config.json says before it agrees with the weights that are there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, overload

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from mbm_kernels._core.files import sync_folder, write_atomic, write_synced
from mbm_kernels.captioning import card
from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.kinds import CAPTIONER, Kind, Model, kind_of
from mbm_kernels.captioning.lock import PARTIAL
from mbm_kernels.captioning.stored import (
    INDEX,
    STEP_FOLDER,
    VERSION,
    Folder,
    Which,
    config_checksum,
)
from mbm_kernels.captioning.stored import exists as exists
from mbm_kernels.models import Captioner


@dataclass(frozen=True)
class Checkpoint(Generic[Model]):
    """A checkpoint read back: the model, its tokenizer and what config.json holds beside."""

    model: Model
    tokenizer: WordTokenizer
    config: dict[str, Any]
    path: Path


def save(
    run: Path,
    model: nn.Module,
    tokenizer: WordTokenizer,
    *,
    step: int,
    best: bool,
    weights: dict[str, Tensor],
    training: dict[str, Tensor],
    info: dict[str, Any],
) -> Path:
    """Write a checkpoint of a run and make it the latest, and the best if ``best``.

    Args:
        run: the run's folder, made if absent.
        weights: the model's state_dict, whole where the model has shards.
        training: tensors that only a resumed training needs.
        info: JSON-able facts for config.json.

    Returns:
        The checkpoint's folder, of which the run's model card tells.

    Raises:
        OSError: if it cannot be written; what was there before is untouched.
    """
    name = f"step-{step:08d}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        names = Folder(run, kind_of(model)).index()
        _write_folder(run, name, model, tokenizer, step, weights, training, info)
        names["latest"] = name
        if best or "best" not in names:
            names["best"] = name
        write_atomic(run / INDEX, _json_bytes(names))
    except OSError as error:
        raise OSError(
            error.errno,
            f"saving the checkpoint of step {step} failed ({error.strerror or error}); the one "
            "before it is intact, make room and continue with --resume",
            str(run),
        ) from error
    for folder in run.iterdir():
        if STEP_FOLDER.fullmatch(folder.name) and folder.name not in names.values():
            shutil.rmtree(folder)
    try:
        card.write(run, kind_of(model))
    except OSError as error:
        raise OSError(
            error.errno,
            f"writing the model card failed ({error.strerror or error}); the checkpoint of step "
            f"{step} is whole, make room and continue with --resume",
            str(run),
        ) from error
    return run / name


def _write_folder(
    run: Path,
    name: str,
    model: nn.Module,
    tokenizer: WordTokenizer,
    step: int,
    weights: dict[str, Tensor],
    training: dict[str, Tensor],
    info: dict[str, Any],
) -> None:
    """Write the files under a temporary name, sync them, and rename the folder."""
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=run))
    try:
        contents = {
            "model.safetensors": _tensors_to_bytes(weights),
            "training.safetensors": _tensors_to_bytes(training),
            "tokenizer.json": tokenizer.to_bytes(),
        }
        config = {
            "format": kind_of(model).format,
            "version": VERSION,
            "model": model.settings,
            "step": step,
            "parameters": sum(p.numel() for p in model.parameters()),
            "environment": card.environment(),
            "sha256": {file: hashlib.sha256(x).hexdigest() for file, x in contents.items()},
            **info,
        }
        config["sha256"]["config.json"] = config_checksum(config)
        for file, content in contents.items():
            write_synced(partial / file, content)
        write_synced(partial / "config.json", _json_bytes(config))
        sync_folder(partial)
        partial.chmod(0o755)
        if (run / name).exists():
            # A run that resumes before this step meets what it wrote the time before.
            shutil.rmtree(run / name)
        partial.rename(run / name)
        sync_folder(run)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(run: Path) -> None:
    """Delete a run's checkpoints and nothing else in the folder."""
    (run / INDEX).unlink(missing_ok=True)
    for folder in run.glob("step-*"):
        if STEP_FOLDER.fullmatch(folder.name):
            shutil.rmtree(folder)


@overload
def load(path: str | Path, *, layers: str = ..., which: Which = ...) -> Checkpoint[Captioner]: ...


@overload
def load(
    path: str | Path, *, layers: str = ..., which: Which = ..., kind: Kind[Model]
) -> Checkpoint[Model]: ...


def load(
    path: str | Path,
    *,
    layers: str = "mbm",
    which: Which = "best",
    kind: Kind[Any] = CAPTIONER,
) -> Checkpoint[Any]:
    """Read a checkpoint's model and tokenizer.

    Args:
        path: a checkpoint's folder, or a run's folder, of which ``which`` is taken.
        layers: what to build the model from.
        kind: of the model that is expected there.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if what is there is damaged or is something else.
    """
    folder = Folder(Path(path), kind).checkpoint(which)
    config = folder.config()
    tensors = folder.tensors("model.safetensors", config)
    content = folder.sealed("tokenizer.json", config)
    settings = config["model"]
    try:
        with torch.device("meta"):
            planned = kind.build(layers=layers, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = f"a config.json that describes no {kind.noun}: {error}"
        raise folder.foreign(reason) from error
    folder.compare(tensors, dict(planned.state_dict()))
    tokenizer = WordTokenizer.from_bytes(content, folder.path / "tokenizer.json")
    if tokenizer.vocab_size != planned.vocab_size:
        raise folder.foreign(
            f"a tokenizer.json of {tokenizer.vocab_size} words for a model of {planned.vocab_size}",
        )
    model = kind.build(layers=layers, **settings)
    model.load_state_dict(tensors)
    return Checkpoint(model.eval(), tokenizer, config, folder.path)


def load_training(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that a resumed training needs.

    Raises:
        FileNotFoundError: if the checkpoint has none. ValueError: if they are damaged.
    """
    folder = Folder(checkpoint.path, kind_of(checkpoint.model))
    return folder.tensors("training.safetensors", checkpoint.config)


def _tensors_to_bytes(tensors: dict[str, Tensor]) -> bytes:
    return save_tensors({name: x.detach().cpu().contiguous() for name, x in tensors.items()})


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
