"""What `make gpu-check` says, printed and kept."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbm_kernels._core import files


class Log:
    """Prints, and writes the same to $OUT as it comes: a machine may be taken at any moment."""

    def __init__(self, stage: str):
        out = os.environ.get("OUT")
        self.folder = Path(out) if out else None
        self.path = self.folder and self.folder / f"gpu-check-{stage}.log"

    def __call__(self, text: object) -> None:
        print(text, flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{text}\n")

    def keep(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        self.attach(name, json.dumps(rows, indent=1) + "\n")

    def attach(self, name: str, text: str) -> None:
        if self.folder is not None:
            files.write_atomic(self.folder / name, text.encode())
