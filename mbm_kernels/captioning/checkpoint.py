"""Checkpoints that are whole or absent.

A run folder holds ``step-<n>/`` with model.safetensors, config.json, tokenizer.json and
training.safetensors, and ``checkpoints.json``, which names the latest and the best. A checkpoint is
written under a temporary name, synced and renamed; then checkpoints.json is replaced. Whatever
stops in between, the names that stand point to complete files.

config.json holds the checksums of the other files and of its own other values, so that a folder is
one checkpoint or none: a file changed, or taken from another checkpoint, is refused. Nothing is
allocated by what config.json says before it agrees with the weights that are there.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mbm_kernels._core.files import sync_folder, write_atomic, write_synced
from mbm_kernels.captioning.data import WordTokenizer
from mbm_kernels.captioning.lock import PARTIAL
from mbm_kernels.models import Captioner

FORMAT = "mbm_kernels.captioner"
VERSION = 2
# What the checksums of a version are of; the first knew those of tensors alone.
SEALED = {
    1: ("model.safetensors", "training.safetensors"),
    2: ("model.safetensors", "training.safetensors", "tokenizer.json", "config.json"),
}
INDEX = "checkpoints.json"
_STEP_FOLDER = re.compile(r"step-\d{8}")

Which = Literal["latest", "best"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back: the model, its tokenizer and what config.json holds beside."""

    model: Captioner
    tokenizer: WordTokenizer
    config: dict[str, Any]
    path: Path


def save(
    run: Path,
    model: Captioner,
    tokenizer: WordTokenizer,
    *,
    step: int,
    best: bool,
    training: dict[str, Tensor],
    info: dict[str, Any],
) -> Path:
    """Write a checkpoint of a run and make it the latest, and the best if ``best``.

    Args:
        run: the run's folder, made if absent.
        training: tensors that only a resumed training needs.
        info: JSON-able facts for config.json.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it cannot be written; what was there before is untouched.
    """
    name = f"step-{step:08d}"
    try:
        run.mkdir(parents=True, exist_ok=True)
        names = _read_index(run)
        _write_folder(run, name, model, tokenizer, step, training, info)
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
        if _STEP_FOLDER.fullmatch(folder.name) and folder.name not in names.values():
            shutil.rmtree(folder)
    return run / name


def _write_folder(
    run: Path,
    name: str,
    model: Captioner,
    tokenizer: WordTokenizer,
    step: int,
    training: dict[str, Tensor],
    info: dict[str, Any],
) -> None:
    """Write the files under a temporary name, sync them, and rename the folder."""
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=run))
    try:
        contents = {
            "model.safetensors": _tensors_to_bytes(dict(model.state_dict())),
            "training.safetensors": _tensors_to_bytes(training),
            "tokenizer.json": tokenizer.to_bytes(),
        }
        config = {
            "format": FORMAT,
            "version": VERSION,
            "model": model.settings,
            "step": step,
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


def exists(run: Path) -> bool:
    """Whether the folder holds a run's checkpoints."""
    return (run / INDEX).is_file()


def remove(run: Path) -> None:
    """Delete a run's checkpoints and nothing else in the folder."""
    (run / INDEX).unlink(missing_ok=True)
    for folder in run.glob("step-*"):
        if _STEP_FOLDER.fullmatch(folder.name):
            shutil.rmtree(folder)


def load(path: str | Path, *, layers: str = "mbm", which: Which = "best") -> Checkpoint:
    """Read a checkpoint's model and tokenizer.

    Args:
        path: a checkpoint's folder, or a run's folder, of which ``which`` is taken.
        layers: what to build the model from.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if what is there is damaged or is something else.
    """
    folder = _resolve(Path(path), which)
    config = _read_config(folder)
    tensors = _read_tensors(folder, "model.safetensors", config)
    content = _read_sealed(folder, "tokenizer.json", config)
    settings = config["model"]
    try:
        with torch.device("meta"):
            planned = Captioner(layers=layers, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _foreign(folder, f"a config.json that describes no captioner: {error}") from error
    _check_tensors(folder, tensors, dict(planned.state_dict()))
    tokenizer = WordTokenizer.from_bytes(content, folder / "tokenizer.json")
    if tokenizer.vocab_size != planned.vocab_size:
        raise _foreign(
            folder,
            f"a tokenizer.json of {tokenizer.vocab_size} words for a model of {planned.vocab_size}",
        )
    model = Captioner(layers=layers, **settings)
    model.load_state_dict(tensors)
    return Checkpoint(model.eval(), tokenizer, config, folder)


def config_checksum(config: dict[str, Any]) -> str:
    """Of all values but the checksums of files, however they are laid out."""
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_training(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors that a resumed training needs.

    Raises:
        FileNotFoundError: if the checkpoint has none. ValueError: if they are damaged.
    """
    return _read_tensors(checkpoint.path, "training.safetensors", checkpoint.config)


def _tensors_to_bytes(tensors: dict[str, Tensor]) -> bytes:
    return save_tensors({name: x.detach().cpu().contiguous() for name, x in tensors.items()})


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _foreign(folder: Path, reason: str) -> ValueError:
    return ValueError(
        f"checkpoint {folder}: got {reason}, expected a folder written by "
        "`mbm-kernels caption train`; train it again or give another folder"
    )


def _read_bytes(path: Path, folder: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint {folder}: got no {path.name}, expected one; train it again or give another"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise type(error)(
            f"checkpoint {folder}: got a {path.name} that cannot be read ({error.strerror}), "
            "expected one that can; look at its rights and its disk, or give another"
        ) from error


def _read_json(path: Path, folder: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_bytes(path, folder))
    except (ValueError, RecursionError) as error:
        raise _foreign(folder, f"a {path.name} that is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _foreign(folder, f"a {path.name} that is no object")
    return value


def _read_index(run: Path) -> dict[str, str]:
    return _read_json(run / INDEX, run) if exists(run) else {}


def _resolve(path: Path, which: Which) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(
            f"checkpoint {path}: got no such folder, expected a run or a checkpoint; train one "
            "with `mbm-kernels caption train`"
        )
    if not exists(path):
        return path
    name = _read_index(path).get(which)
    if not isinstance(name, str) or not _STEP_FOLDER.fullmatch(name):
        raise _foreign(path, f"{which} {name!r} in {INDEX}")
    return path / name


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise _foreign(folder, "no config.json")
    config = _read_json(path, folder)
    version = config.get("version")
    if config.get("format") != FORMAT or version not in tuple(SEALED):
        raise _foreign(folder, f"format {config.get('format')!r} version {version!r}")
    sums, model = config.get("sha256"), config.get("model")
    if not isinstance(sums, dict) or not isinstance(model, dict):
        raise _foreign(folder, "a config.json without its model or checksums")
    if "config.json" in SEALED[version] and config_checksum(config) != sums.get("config.json"):
        raise _foreign(folder, "a config.json that fails its checksum")
    wanted = {"vocab_size": int, "size": str, "attention": str, "image_size": int}
    wanted |= {"pad_id": int, "bos_id": int, "eos_id": int}
    if {name: type(value) for name, value in model.items()} != wanted:
        raise _foreign(folder, f"a config.json that describes no captioner: {model}")
    if type(config.get("step")) is not int or config["step"] < 0:
        raise _foreign(folder, f"step {config.get('step')!r} in config.json")
    return config


def _read_sealed(folder: Path, name: str, config: dict[str, Any]) -> bytes:
    content = _read_bytes(folder / name, folder)
    if name in SEALED[config["version"]]:
        found = hashlib.sha256(content).hexdigest()
        if found != config["sha256"].get(name):
            raise _foreign(folder, f"a {name} of {len(content)} bytes that fails its checksum")
    return content


def _read_tensors(folder: Path, name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    try:
        return load_tensors(_read_sealed(folder, name, config))
    except SafetensorError as error:
        raise _foreign(folder, f"a {name} that is no safetensors file ({error})") from error


def _check_tensors(folder: Path, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    odd = sorted(got.keys() ^ expected.keys())
    if odd:
        raise _foreign(folder, f"tensors that do not match the model, such as {odd[0]!r}")
    for name, x in sorted(got.items()):
        if x.shape != expected[name].shape or x.dtype != expected[name].dtype:
            raise _foreign(
                folder,
                f"{name} {x.dtype} {tuple(x.shape)} where the model has "
                f"{expected[name].dtype} {tuple(expected[name].shape)}",
            )
