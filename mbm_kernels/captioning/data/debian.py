"""Data sets out of Debian packages, kept as WebDataset shards in the cache folder.

A package's files come from apt, a .deb, a folder that one was extracted to, or from where it is
installed. Nothing of an archive is extracted.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mbm_kernels._core import env

APT_TIMEOUT_S = 900
MOST_BYTES = 1 << 26  # of a wanted file; fashion's largest has 26 MB
AR_MAGIC, AR_HEADER = b"!<arch>\n", 60

Files = Iterator[tuple[str, bytes]]  # path below the package's folder, content
Samples = Iterable[tuple[str, dict[str, bytes]]]  # key, content by suffix
Say = Callable[[str], None]


@dataclass(frozen=True)
class DebianSet:
    """A data set of a package.

    folder: of its files, below the root. suffixes: of those that are read. shards: makes the
    samples of each shard, by name, from the files.
    """

    name: str
    package: str
    folder: str
    suffixes: tuple[str, ...]
    shards: Callable[[Files], dict[str, Samples]]

    def prepare(
        self,
        cache_dir: str | Path | None = None,
        from_dir: str | Path | None = None,
        progress: Say | None = None,
    ) -> Path:
        """Make the folder of shards `<cache_dir>/<name>`, or return it if it is there already.

        Args:
            cache_dir: None takes `$MBM_CACHE` or the user's cache folder.
            from_dir: folder with the .deb, or one that it was extracted to; None takes the
                installed package, else `apt-get download`.
            progress: called with one line of text per step.

        Raises:
            RuntimeError: apt is missing or fails.
            ValueError: no such package in `from_dir`, a damaged one, or one of other content.
        """
        say = progress or (lambda _: None)
        cache = Path(cache_dir) if cache_dir is not None else env.cache_dir()
        target = cache / self.name
        if target.is_dir():
            say(f"{self.name}: {target} is complete")
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{self.name}-") as scratch:
            build, downloads = Path(scratch) / self.name, Path(scratch) / "apt"
            build.mkdir()
            downloads.mkdir()
            source = self._source(from_dir, downloads, say)
            for shard, samples in self.shards(self.files(source)).items():
                count = write_shard(build / f"{shard}.tar", samples)
                say(f"{self.name}: {count} images in {shard}.tar")
            build.rename(target)
        return target

    def folder_of(self, root: str | Path | None) -> Path:
        """The folder of shards that `prepare` made.

        Raises:
            ValueError: it is not there.
        """
        folder = Path(root) if root is not None else env.cache_dir() / self.name
        if not folder.is_dir():
            raise ValueError(
                f"load: {self.name}: got no folder {folder}, expected the one that prepare made; "
                f"run `mbm-kernels caption prepare {self.name}`"
            )
        return folder

    def _source(self, from_dir: str | Path | None, downloads: Path, say: Say) -> Path:
        if from_dir is not None:
            folder = Path(from_dir)
            packages = sorted(folder.glob(f"{self.package}_*.deb"))
            if packages:
                return packages[-1]
            if (folder / self.folder).is_dir():
                return folder
            raise ValueError(
                f"{self.name}: from_dir: got {folder}, expected {self.package}_*.deb or a folder "
                f"{self.folder} in it; run `apt-get download {self.package}` there"
            )
        if (Path("/") / self.folder).is_dir():
            return Path("/")
        say(f"{self.name}: apt-get download {self.package}")
        return self._download(downloads)

    def _download(self, folder: Path) -> Path:
        """The .deb, whose checksum apt verifies."""
        remedy = (
            f"fetch {self.package} elsewhere by `apt-get download` and pass its folder as "
            "--from-dir (from_dir=)"
        )
        apt = shutil.which("apt-get")
        if apt is None:
            raise RuntimeError(f"{self.name}: got no apt-get on PATH, expected Debian's; {remedy}")
        try:
            done = subprocess.run(
                [apt, "download", self.package],
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=APT_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(
                f"{self.name}: got nothing from `apt-get download {self.package}` in "
                f"{APT_TIMEOUT_S} s, expected a package; check the network, or: {remedy}"
            ) from error
        found = sorted(folder.glob(f"{self.package}_*.deb"))
        if done.returncode != 0 or not found:
            said = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise RuntimeError(
                f"{self.name}: `apt-get download {self.package}` ended with {done.returncode}, "
                f"expected a package; apt said: {' / '.join(said) or 'nothing'}; run `apt-get "
                f"update`, or: {remedy}"
            )
        return found[-1]

    def files(self, source: Path) -> Files:
        """The wanted files of a .deb or of a folder that holds the package's.

        Raises:
            ValueError: the archive is damaged.
        """
        if source.is_dir():
            folder = source / self.folder
            for file in sorted(folder.rglob("*")):
                if file.suffix in self.suffixes and file.is_file() and not file.is_symlink():
                    yield file.relative_to(folder).as_posix(), file.read_bytes()
            return
        try:
            with source.open("rb") as deb:
                _seek_data(deb)
                with tarfile.open(fileobj=deb, mode="r|*") as archive:
                    yield from self._members(archive)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise ValueError(
                f"{self.name}: got {source}, which cannot be read to its end ({error}), expected "
                "a Debian package; fetch it again, or extract it by `dpkg-deb -x` and pass the "
                "folder"
            ) from error

    def _members(self, archive: tarfile.TarFile) -> Files:
        for member in archive:
            path = PurePosixPath(member.name)
            if not member.isreg() or member.issparse() or ".." in path.parts:
                continue
            if path.suffix not in self.suffixes or not path.is_relative_to(self.folder):
                continue
            if member.size > MOST_BYTES:
                raise ValueError(f"{member.name} of {member.size} bytes")
            content = archive.extractfile(member)
            assert content is not None  # a regular file
            yield path.relative_to(self.folder).as_posix(), content.read()


def _seek_data(file: BinaryIO) -> None:
    """Go to the beginning of data.tar.* in a .deb, which is an ar archive."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise ValueError("it is no ar archive")
    while len(header := file.read(AR_HEADER)) == AR_HEADER:
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            # tarfile takes a header that is cut off for the end.
            if os.fstat(file.fileno()).st_size - file.tell() < size:
                raise ValueError("its data.tar is cut off")
            return
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError("it has no data.tar")


def write_shard(path: Path, samples: Samples) -> int:
    """Write a tar file of samples; returns how many.

    The same samples give the same bytes.
    """
    count = 0
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for key, contents in samples:
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            count += 1
    return count
