"""A run's folder belongs to one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"
PARTIAL = ".partial-"  # prefix of a checkpoint's folder while it is written
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


@contextmanager
def locked(folder: Path, what: str = "run") -> Iterator[None]:
    """Makes a folder, if need be, and holds it until the end of the context.

    The kernel lets go of the lock when the process ends, however it ends; a lock file that is left
    behind is taken over. What an earlier process left half written is removed, and at the end the
    folder too if it was made here and is empty.

    Raises:
        RuntimeError: another training, or another thread, holds it.
        OSError: nothing can be written there.
    """
    made: list[Path] = []
    try:
        try:
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            handle = _acquire(folder, what)
        except OSError as error:
            raise type(error)(
                f"{what} {folder}: got a folder that cannot be written "
                f"({error.strerror or error}), expected one that can; give another"
            ) from error
        try:
            for partial in folder.glob(f"{PARTIAL}*"):
                shutil.rmtree(partial, ignore_errors=True)
            yield
        finally:
            # Unlinked while it is held: who waits for this file sees that it is no longer named.
            (folder / LOCK).unlink(missing_ok=True)
            os.close(handle)
    finally:
        for path in made:
            try:
                path.rmdir()
            except OSError:
                break  # not empty, or never made


def _acquire(folder: Path, what: str) -> int:
    """A descriptor that holds the lock on the file that has the lock's name."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _flock(handle, folder, what)
            if _is_named(path, handle):
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it between open and flock


def _flock(handle: int, folder: Path, what: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(handle, 100, 0).decode(errors="replace").strip()
        raise RuntimeError(
            f"{what} {folder}: got a folder that {holder or 'another process'} works in, expected "
            "one of this run alone; wait for it, or give another folder"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{what} {folder}: this file system has no locks", stacklevel=5)


def _is_named(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
