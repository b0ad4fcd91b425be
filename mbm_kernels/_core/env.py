"""The only place that reads MBM_* environment variables."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BACKENDS = ("cuda", "triton", "cpu", "torch")  # in the order in which "auto" asks
ISAS = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Variable:
    name: str
    meaning: str


VARIABLES = (
    Variable("MBM_AUTOTUNE", "1 times every launch configuration of a Triton kernel, once a shape"),
    Variable(
        "MBM_BACKEND", "backend used where a call says auto: auto, cpu, triton, cuda or torch"
    ),
    Variable("MBM_BUILD_ISA", "compiles one CPU code path alone, for tests (read by setup.py)"),
    Variable(
        "MBM_CACHE",
        "folder for downloaded data and calibrated constants; default: mbm_kernels in the user "
        "cache folder",
    ),
    Variable("MBM_CUDA", "0 builds without the CUDA extension (read by setup.py)"),
    Variable("MBM_DISABLE", "1 runs every operation's torch backend, as disabled() does"),
    Variable("MBM_ISA", "force a CPU code path: baseline, avx2 or avx512"),
    Variable(
        "MBM_LOWERED",
        "1 also compiles the AVX-512 code with AVX2 instructions, for tests, 0 does not; default: "
        "where the CPU has no AVX-512 (read by setup.py)",
    ),
    Variable(
        "MBM_SANITIZE",
        "address, thread or coverage instruments the CPU kernels, for tests (read by setup.py)",
    ),
    Variable("MBM_WARM_HEAP", "1 keeps freed memory mapped from the import on: warm_heap()"),
    Variable("MBM_WINOGRAD", "0 turns Winograd's convolution off on CPUs"),
)


def in_force() -> dict[str, str]:
    """The MBM_* variables set in this process, known or not."""
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith("MBM_")}


def unknown() -> list[str]:
    known = {variable.name for variable in VARIABLES}
    return [name for name in in_force() if name not in known]


def _choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in choices:
        raise ValueError(
            f"{name}: got {value!r}; expected one of {', '.join(filter(None, choices))}; fix it"
        )
    return value


# Every call asks: os.environ takes 0.6 us to say that a name is not set, its own dictionary 0.05.
_raw: Any = getattr(os.environ, "_data", os.environ)
_BACKEND: Any = "MBM_BACKEND" if _raw is os.environ else os.environ.encodekey("MBM_BACKEND")
_WINOGRAD: Any = "MBM_WINOGRAD" if _raw is os.environ else os.environ.encodekey("MBM_WINOGRAD")


def backend() -> str:
    if _BACKEND not in _raw:
        return "auto"
    return _choice("MBM_BACKEND", "auto", ("auto", *BACKENDS))


def isa() -> str | None:
    """The ISA asked for, or None for the best that the CPU has."""
    return _choice("MBM_ISA", "", ("", *ISAS)) or None


def winograd() -> bool:
    return _WINOGRAD not in _raw or os.environ.get("MBM_WINOGRAD") != "0"


def autotune() -> bool:
    return os.environ.get("MBM_AUTOTUNE") == "1"


def disable() -> bool:
    return os.environ.get("MBM_DISABLE") == "1"


def warm_heap() -> bool:
    return os.environ.get("MBM_WARM_HEAP") == "1"


def cache_dir() -> Path:
    if path := os.environ.get("MBM_CACHE"):
        return Path(path).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mbm_kernels"
