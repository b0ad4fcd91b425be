"""Chosen files of npm packages: from the npm client, a .tgz, or an extracted folder.

Nothing of an archive is written to disk here, so a hostile member cannot land anywhere; one is
refused nevertheless, since a package that holds one is not the package that was meant.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MAX_MEMBER_BYTES = 8 << 20  # the largest wanted file, emojibase's data.json, has 0.9 MB
NPM_TIMEOUT_S = 900

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """An npm package at one version, and the files of it that are read.

    files: exact paths; folder: every .png directly in it. Both inside the package.
    """

    name: str
    version: str
    files: tuple[str, ...] = ()
    folder: str | None = None

    def wants(self, path: str) -> bool:
        pure = PurePosixPath(path)
        return path in self.files or (str(pure.parent) == self.folder and pure.suffix == ".png")


def npm_pack(package: Package, folder: Path) -> Path:
    """Download `name@version` with the npm client into the folder; npm checks its integrity.

    Raises:
        RuntimeError: npm is missing, fails or takes longer than 15 minutes.
    """
    remedy = (
        "install Node.js, or fetch the packages elsewhere by `npm pack` and pass their folder "
        "as --from-dir (from_dir=)"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"emoji: got no npm on PATH, expected the npm client; {remedy}")
    spec = f"{package.name}@{package.version}"
    command = [npm, "pack", spec, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"emoji: got nothing from `npm pack {spec}` in {NPM_TIMEOUT_S} s, "
            f"expected a package; check the network, or: {remedy}"
        ) from error
    archive = folder / f"{package.name}-{package.version}.tgz"
    if done.returncode != 0 or not archive.is_file():
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise RuntimeError(
            f"emoji: `npm pack {spec}` ended with {done.returncode}, expected {archive.name}; "
            f"npm said: {' / '.join(said) or 'nothing'}; check the network, or: {remedy}"
        )
    return archive


def find_local(package: Package, folder: Path) -> Path:
    """The package's .tgz or extracted folder in a folder of the user.

    Looks for `<name>-<version>.tgz`, `<name>/package` (as tar leaves it) and `<name>` (as in
    node_modules).

    Raises:
        ValueError: none of them is there.
    """
    candidates = (
        folder / f"{package.name}-{package.version}.tgz",
        folder / package.name / "package",
        folder / package.name,
    )
    for candidate in candidates:
        if candidate.is_file() or (candidate / "package.json").is_file():
            return candidate
    held = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    raise ValueError(
        f"emoji: from_dir: got {folder} ({held or 'empty'}), expected {candidates[0].name} or a "
        f"folder {package.name} with package.json; run `npm pack {package.name}@{package.version}` "
        "there"
    )


def read(package: Package, source: Path) -> Iterator[tuple[str, bytes]]:
    """(path inside the package, content) of each wanted file, after a check of name and version.

    Raises:
        ValueError: another package or version, a damaged archive, or a member that is absolute,
            climbs out by "..", is a link or a device, or is too large.
    """
    wanted = Package(
        package.name, package.version, (*package.files, "package.json"), package.folder
    )
    for path, content in _archive(wanted, source) if source.is_file() else _folder(wanted, source):
        if path == "package.json":
            _check_identity(package, source, content)
        else:
            yield path, content


def _check_identity(package: Package, source: Path, content: bytes) -> None:
    try:
        about = json.loads(content)
        got = (about["name"], about["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"emoji: got {source} with a package.json without name and version, "
            f"expected {package.name} {package.version}; fetch the package again"
        ) from error
    if got != (package.name, package.version):
        raise ValueError(
            f"emoji: got {source} with {got[0]} {got[1]}, expected {package.name} "
            f"{package.version}; run `npm pack {package.name}@{package.version}`"
        )


def _too_large(source: Path, path: str, size: int) -> ValueError:
    return ValueError(
        f"emoji: got {path!r} of {size} bytes in {source}, expected at most {MAX_MEMBER_BYTES}; "
        "fetch the package again"
    )


def _archive(package: Package, source: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(source, "r:gz") as archive:
            for member in archive:
                pure = PurePosixPath(member.name)
                plain = member.isreg() or member.isdir()
                if pure.is_absolute() or ".." in pure.parts or not plain or "\\" in member.name:
                    raise ValueError(
                        f"emoji: got member {member.name!r} in {source}, expected plain files "
                        "inside the package (no absolute path, '..', link or device); do not use "
                        "this archive, fetch the package again"
                    )
                path = "/".join(pure.parts[1:])  # npm puts everything under package/
                if not member.isreg() or not package.wants(path):
                    continue
                if member.size > MAX_MEMBER_BYTES:
                    raise _too_large(source, path, member.size)
                file = archive.extractfile(member)
                assert file is not None  # a regular file
                yield path, file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"emoji: got {source}, which cannot be read to its end ({error}), "
            "expected an npm package (.tgz); fetch it again"
        ) from error


def _folder(package: Package, source: Path) -> Iterator[tuple[str, bytes]]:
    paths = [*package.files]
    if package.folder is not None and (source / package.folder).is_dir():
        paths += [f"{package.folder}/{p.name}" for p in sorted((source / package.folder).iterdir())]
    for path in paths:
        file = source / path
        if not package.wants(path) or not file.exists():
            continue
        if file.is_symlink() or not file.is_file():
            raise ValueError(
                f"emoji: got {file}, expected a plain file, not a link; copy the package, "
                "or pass its .tgz"
            )
        if file.stat().st_size > MAX_MEMBER_BYTES:
            raise _too_large(source, path, file.stat().st_size)
        yield path, file.read_bytes()
