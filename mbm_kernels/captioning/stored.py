"""A checkpoint's folder as it is read: every file is checked before it is believed."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from mbm_kernels.captioning.kinds import Kind

VERSION = 2
# What the checksums of a version are of; the first knew those of tensors alone.
SEALED = {
    1: ("model.safetensors", "training.safetensors"),
    2: ("model.safetensors", "training.safetensors", "tokenizer.json", "config.json"),
}
INDEX = "checkpoints.json"
STEP_FOLDER = re.compile(r"step-\d{8}")

Which = Literal["latest", "best"]


def exists(run: Path) -> bool:
    """Whether the folder holds a run's checkpoints."""
    return (run / INDEX).is_file()


def config_checksum(config: dict[str, Any]) -> str:
    """Of all values but the checksums of files, however they are laid out."""
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Folder:
    """A run's or a checkpoint's folder, expected to hold a kind of model."""

    path: Path
    kind: Kind[Any]

    def foreign(self, reason: str) -> ValueError:
        return ValueError(
            f"checkpoint {self.path}: got {reason}, expected a folder written by "
            f"`mbm-kernels {self.kind.command}`; train it again or give another folder"
        )

    def read_bytes(self, name: str) -> bytes:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(
                f"checkpoint {self.path}: got no {name}, expected one; train it again or give "
                "another"
            )
        try:
            return path.read_bytes()
        except OSError as error:
            raise type(error)(
                f"checkpoint {self.path}: got a {name} that cannot be read ({error.strerror}), "
                "expected one that can; look at its rights and its disk, or give another"
            ) from error

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads(self.read_bytes(name))
        except (ValueError, RecursionError) as error:
            raise self.foreign(f"a {name} that is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise self.foreign(f"a {name} that is no object")
        return value

    def index(self) -> dict[str, str]:
        """The names of the latest and the best of a run's checkpoints."""
        return self.read_json(INDEX) if exists(self.path) else {}

    def checkpoint(self, which: Which) -> Folder:
        """Itself, or of a run the checkpoint."""
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"checkpoint {self.path}: got no such folder, expected a run or a checkpoint; "
                f"train one with `mbm-kernels {self.kind.command}`"
            )
        if not exists(self.path):
            return self
        name = self.index().get(which)
        if not isinstance(name, str) or not STEP_FOLDER.fullmatch(name):
            raise self.foreign(f"{which} {name!r} in {INDEX}")
        return Folder(self.path / name, self.kind)

    def config(self) -> dict[str, Any]:
        if not (self.path / "config.json").is_file():
            raise self.foreign("no config.json")
        config = self.read_json("config.json")
        version = config.get("version")
        if config.get("format") != self.kind.format or version not in tuple(SEALED):
            raise self.foreign(f"format {config.get('format')!r} version {version!r}")
        sums, model = config.get("sha256"), config.get("model")
        if not isinstance(sums, dict) or not isinstance(model, dict):
            raise self.foreign("a config.json without its model or checksums")
        if "config.json" in SEALED[version] and config_checksum(config) != sums.get("config.json"):
            raise self.foreign("a config.json that fails its checksum")
        if not self.kind.describes(model):
            raise self.foreign(f"a config.json that describes no {self.kind.noun}: {model}")
        if type(config.get("step")) is not int or config["step"] < 0:
            raise self.foreign(f"step {config.get('step')!r} in config.json")
        return config

    def sealed(self, name: str, config: dict[str, Any]) -> bytes:
        content = self.read_bytes(name)
        if name in SEALED[config["version"]]:
            found = hashlib.sha256(content).hexdigest()
            if found != config["sha256"].get(name):
                raise self.foreign(f"a {name} of {len(content)} bytes that fails its checksum")
        return content

    def tensors(self, name: str, config: dict[str, Any]) -> dict[str, Tensor]:
        try:
            return load_tensors(self.sealed(name, config))
        except SafetensorError as error:
            raise self.foreign(f"a {name} that is no safetensors file ({error})") from error

    def compare(self, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        odd = sorted(got.keys() ^ expected.keys())
        if odd:
            raise self.foreign(f"tensors that do not match the model, such as {odd[0]!r}")
        for name, x in sorted(got.items()):
            if x.shape != expected[name].shape or x.dtype != expected[name].dtype:
                raise self.foreign(
                    f"{name} {x.dtype} {tuple(x.shape)} where the model has "
                    f"{expected[name].dtype} {tuple(expected[name].shape)}"
                )
