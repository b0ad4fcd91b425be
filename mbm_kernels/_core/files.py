"""Files that are whole or absent."""

import os
from pathlib import Path


def write_synced(path: Path, content: bytes) -> None:
    """Writes a new file and waits until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a temporary file beside `path`, syncs and renames it, making the folder if needed.

    A stop or a full disk at any moment leaves what was there before.

    Raises:
        OSError: when it cannot be written; the temporary file is gone then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(partial, content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
