"""Predicted times of a call, by which "auto" chooses between a CPU kernel and PyTorch.

Each operation's `ops/<op>/dispatch.py` has one function per backend, which says for a problem which
kernel runs and the amounts of work that its time is made of: calls, products, elements moved. A
machine's constants say what a unit of each takes, in nanoseconds:

    predicted ns = sum over amounts of constant x amount

They are data, `dispatch/<vendor>-<family>-<model>-<isa>.json`, fitted by `mbm-kernels calibrate` to
problems drawn at random; the user's own, in the cache folder, come first. A CPU without any takes
another one's, those of the same vector width before others, scaled by both CPUs' rates.
"""

import functools
import importlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mbm_kernels._core import env, native, processor

FOLDER = Path(__file__).resolve().parent.parent / "dispatch"
LANES = {"avx2": 8, "avx512": 16}
SCHEMA = 1
BACKENDS = ("cpu", "torch")
# Amounts of one thing at a time, whose time goes with the clock rather than with the vectors.
SERIAL = ("calls", "forks", "steps", "barriers", "rows", "inputs", "heads", "batch")

Sizes = Mapping[str, int]


class Work(NamedTuple):
    """Which kernel runs, and how much of each kind of work it does on its busiest thread."""

    kernel: str
    amounts: dict[str, float]


def share(units: float, threads: int) -> float:
    """Units of the busiest of `threads`, which share whole ones."""
    return math.ceil(units / threads)


def padded(number: int, lanes: int) -> int:
    """The next multiple of `lanes`."""
    return -(-number // lanes) * lanes


def total(units: Mapping[str, float], work: Work) -> float:
    """Nanoseconds of this work by these constants."""
    return sum(units.get(name, 0.0) * amount for name, amount in work.amounts.items())


def family(kernel: str) -> str:
    """The first word of a kernel's name: kernels of one family lend constants to one another."""
    return kernel.partition(" ")[0]


def units_of(known: Mapping[str, Any], kernel: str) -> Any:
    """The entry of a kernel, else of its family; None where neither is known."""
    return known.get(kernel, known.get(family(kernel)))


def machine_sizes() -> dict[str, int]:
    """What a problem's work depends on beside the problem: lanes, and bytes of a core's cache and
    of the last one."""
    near, last = processor.cache_bytes()
    cores = os.cpu_count() or 1
    return {
        "lanes": LANES.get(native.isa() or "", LANES["avx2"]),
        "near_cache": near // cores if near else 512 << 10,
        "cache": last or 8 << 20,
    }


# The predicted gain from which a kernel is taken among others. Of 0.5 to 1.5, 0.8 costs least on
# drawn convolutions (benchmarks/study_sequences.py).
AMONG_OTHERS = 0.8


@dataclass(frozen=True)
class Predicted:
    """Nanoseconds of a call by the kernel and by PyTorch, and the gain below which PyTorch stays.

    Errors of prediction are why a margin is needed; it is fitted with the constants. call_ns: how
    much of the kernel's time goes to the call, whatever the sizes.
    """

    cpu_ns: float
    torch_ns: float
    margin: float
    call_ns: float = 0.0

    @property
    def kernel_wins(self) -> bool:
        return self.cpu_ns * self.margin < self.torch_ns

    @property
    def kernel_wins_among_others(self) -> bool:
        """Whether the kernel is faster where others run before and after it in one native call.

        It needs no call of its own there, and PyTorch's form, which would part the others, does.
        """
        return self.gain_among_others > AMONG_OTHERS

    @property
    def gain_among_others(self) -> float:
        return (self.torch_ns + self.call_ns) / max(self.cpu_ns - self.call_ns, 1.0)


@dataclass(frozen=True, eq=False)
class Table:
    """A machine's constants.

    source: where they come from, for people. constants: op -> pass -> backend -> kernel -> amount
    -> ns of a unit. margins: op -> pass -> kernel -> the least predicted gain.
    """

    source: str
    machine: dict[str, int]
    constants: Mapping[str, Any]
    margins: Mapping[str, Any]

    def predict(self, op: str, sizes: Sizes, threads: int) -> Predicted | None:
        """The predicted times; None for an operation or a kernel that was not measured."""
        which = "training" if sizes["training"] else "inference"
        known = self.constants.get(op, {}).get(which)
        if known is None:
            return None
        model, problem = work_of(op), {**sizes, **self.machine, "threads": threads}
        times, call = [], 0.0
        for backend in BACKENDS:
            work: Work = getattr(model, backend)(problem)
            units = units_of(known[backend], work.kernel)
            if units is None:
                return None
            times.append(total(units, work))
            if backend == "cpu":
                margin = units_of(self.margins[op][which], work.kernel)
                call = units.get("calls", 0.0) * work.amounts.get("calls", 0.0)
        return None if margin is None else Predicted(times[0], times[1], margin, call)


@functools.cache
def work_of(op: str) -> Any:
    """The operation's module of work functions."""
    return importlib.import_module(f"mbm_kernels.ops.{op}.dispatch")


def user_folder() -> Path:
    """Where `mbm-kernels calibrate` puts the constants of the user's own machine."""
    return env.cache_dir() / "dispatch"


@functools.cache
def table() -> Table | None:
    """The constants in force; None where no kernel should run unasked (no AVX2)."""
    isa = native.isa()
    if isa not in LANES:
        return None
    name = processor.name()
    for folder, owner in ((user_folder(), "calibrated on this machine"), (FOLDER, "measured")):
        content = _read(folder / f"{name}.json")
        if content is not None:
            return of_content(content, f"{owner}: {name}, {content['date']}")
    others = [content for path in sorted(FOLDER.glob("*.json")) if (content := _read(path))]
    if not others:
        return None
    nearest = min(others, key=lambda c: abs(LANES[c["isa"]] - LANES[isa]))
    return of_content(scaled(nearest, LANES[isa]), f"scaled from {nearest['device']} to {name}")


def of_device(device: str) -> Table:
    """The package's constants of a machine.

    Raises:
        FileNotFoundError: the package has none of it.
    """
    path = FOLDER / f"{device}.json"
    content = _read(path)
    if content is None:
        raise FileNotFoundError(
            f"constants: got no {path.name}, expected a file that mbm-kernels calibrate wrote; "
            f"run it on that machine with --out {path.name}"
        )
    table = of_content(content, f"measured: {device}, {content['date']}")
    return replace(table, machine=content["machine"])


def reload() -> None:
    """Forget the constants read, after a calibration."""
    table.cache_clear()


def _read(path: Path) -> dict[str, Any] | None:
    """A file of constants; None where it is absent or of another version of the models."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if content.get("schema") == SCHEMA else None


def of_content(content: dict[str, Any], source: str) -> Table:
    """The table of a file that `mbm-kernels calibrate` wrote."""
    return Table(source, machine_sizes(), content["constants"], content["margins"])


def scaled(content: dict[str, Any], lanes: int) -> dict[str, Any]:
    """Constants of another machine as they would be here, by the rates of both."""
    theirs, ours = content["rates"], processor.rates()
    wider = lanes / LANES[content["isa"]]
    vectors = theirs["operations"] / ours.operations
    factors = {"serial": vectors * wider, "memory": theirs["bytes"] / ours.bytes, "vector": vectors}

    def kind(amount: str) -> str:
        if amount.endswith(("_far", "_beyond_cache")):
            return "memory"
        return "serial" if amount in SERIAL else "vector"

    def walk(node: Any) -> Any:
        return {
            name: walk(x) if isinstance(x, dict) else x * factors[kind(name)]
            for name, x in node.items()
        }

    return {**content, "constants": walk(content["constants"])}
