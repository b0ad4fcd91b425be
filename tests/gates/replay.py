"""Makes recorded native calls again, without torch: on guarded buffers, under any tool.

    python tests/gates/replay.py EXTENSION RECORDS [--placement end|start] [--marks LIBRARY]
        [--fail-allocations]

Every buffer of a call lies in pages of its own between two that may not be touched, against the
one behind it ("end") or the one before it ("start", aligned as torch aligns); what is left of its
pages is poisoned under AddressSanitizer, else filled with a pattern that is checked afterwards.
The name of each call is printed to stderr before it is made, so that a crash has a name.

With --marks, a library with the client requests of callgrind, each call is made three times and
the third is counted: scratch memory then has its final size. Questions for a size are not counted.

With --fail-allocations, of a build with -DMBM_FAILING_SCRATCH, the first calls of each function are
made with their first allocation of scratch memory failing, then the second, ...: each must end as a
MemoryError, wherever in a parallel region it is, and the call after it as ever.
"""

import argparse
import ctypes
import importlib.machinery
import importlib.util
import mmap
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

PATTERN = 0xA5
PROTECTION_NONE = 0
FAILED_CALLS = 8  # of each function: every one is made again for each of its allocations


class Record(NamedTuple):
    """One native call."""

    label: str
    isa: str
    function: str
    arguments: tuple[Any, ...]  # see substitute
    buffers: list[bytes]
    result: Any  # of a function that returns numbers, else None


def read(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        while True:
            try:
                fields = pickle.load(file)
            except EOFError:
                return
            yield Record(*fields)


def substitute(value: Any, buffers: Sequence["Guarded"], module: ModuleType) -> Any:
    """A recorded argument as the extension takes it.

    An address was written as ("@", buffer, offset in bytes), an enum's value as ("#", the enum's
    name, number).
    """
    if isinstance(value, tuple) and len(value) == 3 and value[0] == "@":
        return buffers[value[1]].address + value[2]
    if isinstance(value, tuple) and len(value) == 3 and value[0] == "#":
        return getattr(module, value[1])(value[2])
    if isinstance(value, (list, tuple)):
        return type(value)(substitute(v, buffers, module) for v in value)
    return value


class Guarded:
    """`data` in pages of its own between two that may not be touched."""

    libc = ctypes.CDLL(None, use_errno=True)
    poison = getattr(libc, "__asan_poison_memory_region", None)
    unpoison = getattr(libc, "__asan_unpoison_memory_region", None)

    def __init__(self, data: bytes, placement: str):
        page = mmap.PAGESIZE
        self.inner = max(1, -(-len(data) // page)) * page
        self.pages = mmap.mmap(-1, self.inner + 2 * page)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.pages)) + page
        self.start = 0 if placement == "start" else self.inner - len(data)
        self.length = len(data)
        self.address = self.base + self.start
        ctypes.memset(self.base, PATTERN, self.inner)
        ctypes.memmove(self.address, data, len(data))
        for wall in (self.base - page, self.base + self.inner):
            if self.libc.mprotect(ctypes.c_void_p(wall), page, PROTECTION_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self._mark(self.poison)

    def _mark(self, mark: Any) -> None:
        if mark is not None:
            mark(ctypes.c_void_p(self.base), ctypes.c_size_t(self.start))
            behind = self.start + self.length
            mark(ctypes.c_void_p(self.base + behind), ctypes.c_size_t(self.inner - behind))

    def check(self) -> None:
        """Raises if anything around the data was written."""
        self._mark(self.unpoison)
        around = ctypes.string_at(self.base, self.inner)
        outside = around[: self.start] + around[self.start + self.length :]
        if outside.count(PATTERN) != len(outside):
            raise AssertionError("wrote outside of a buffer")


def load(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_C_cpu", str(path))
    spec = importlib.util.spec_from_loader("_C_cpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def replay(record: Record, module: ModuleType, placement: str, marks: Any = None) -> None:
    buffers = [Guarded(data, placement) for data in record.buffers]
    arguments = substitute(record.arguments, buffers, module)
    module.set_isa(record.isa)
    function = getattr(module, record.function)
    result = function(*arguments)
    if marks is not None and record.result is None:
        function(*arguments)
        marks.start()
        function(*arguments)
        marks.stop(f"{record.label}: {record.function}".encode())
    if record.result is not None and result != record.result:
        raise AssertionError(f"returned {result}, not {record.result}")
    for buffer in buffers:
        buffer.check()


def replay_failing(record: Record, module: ModuleType, allocations_left: Any) -> int:
    """The call with each of its allocations failing in turn, at last with none; how many did."""
    failed = 0
    while True:
        allocations_left.value = failed
        try:
            replay(record, module, "end")
        except MemoryError:
            failed += 1
            continue
        if allocations_left.value < 0:
            raise AssertionError("an allocation failed and the call went on")
        allocations_left.value = -1
        return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extension", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--placement", choices=("end", "start"), default="end")
    parser.add_argument("--marks", type=Path)
    parser.add_argument("--fail-allocations", action="store_true")
    given = parser.parse_args()
    module = load(given.extension)
    marks = None if given.marks is None else ctypes.CDLL(str(given.marks))
    count, failed, calls = 0, 0, dict[str, int]()
    if given.fail_allocations:
        left = ctypes.c_int64.in_dll(ctypes.CDLL(str(given.extension)), "mbm_allocations_left")
    for record in read(given.records):
        calls[record.function] = calls.get(record.function, 0) + 1
        if given.fail_allocations and calls[record.function] > FAILED_CALLS:
            continue
        print(f"{record.function} [{record.isa}] {record.label}", file=sys.stderr, flush=True)
        if given.fail_allocations:
            failed += replay_failing(record, module, left)
        else:
            replay(record, module, given.placement, marks)
        count += 1
    print(f"{count} calls" + (f", {failed} failed allocations" if given.fail_allocations else ""))


if __name__ == "__main__":
    main()
