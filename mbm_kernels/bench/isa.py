"""Which ISA each library computes in. A ratio counts as evidence only where all run the same one.

`record` is of this process's environment: what ATen says, what oneDNN says and runs, what MKL says
or, where that is nothing (on AMD), what its environment and the rate of its product prove. They
read their environment once, when torch loads: a process is held to an ISA by starting it in
`environment`.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from mbm_kernels._core import env, native, processor, timing

ABSENT = "absent"  # this torch has no such library
WIDEST = env.ISAS[-1]
LIBRARIES = {"aten": "ATen", "onednn": "oneDNN", "mkl": "MKL"}

# What each library reads; MKL heeds it on Intel's CPUs alone, which the record then shows.
HELD: dict[str, dict[str, str]] = {
    "baseline": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {},
}
MKL_VARIABLES = ("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE")
VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", *MKL_VARIABLES)

Record = dict[str, Any]


def environment(wanted: str | None) -> dict[str, str]:
    """What a process needs so that no stock library runs wider than MBM_ISA=`wanted`."""
    return {} if wanted is None else HELD[wanted]


def is_held(wanted: str | None) -> bool:
    return all(os.environ.get(name) == value for name, value in environment(wanted).items())


def of_aten(capability: str) -> str | None:
    return {"DEFAULT": "baseline", "NO AVX": "baseline", "AVX2": "avx2", "AVX512": "avx512"}.get(
        capability
    )


def of_onednn(said: str) -> str | None:
    """From `info,cpu,isa:`'s words, such as "Intel AVX-512 with Intel DL Boost"."""
    for mark, isa in (("AVX-512", "avx512"), ("AVX10", "avx512"), ("AVX2", "avx2")):
        if mark in said:
            return isa
    return "baseline" if "SSE" in said or "AVX" in said else None


def of_implementation(name: str) -> str | None:
    """From an implementation's name, such as "brgconv:avx512_core" or "jit:avx2"."""
    for mark, isa in (("avx512", "avx512"), ("avx10", "avx512"), ("avx2", "avx2")):
        if mark in name:
            return isa
    return "baseline" if "sse" in name or "avx" in name else None


def of_mkl(said: str) -> str | None:
    """From MKL_VERBOSE's first line; None on AMD, whose CPUs it calls "Intel(R) Architecture"."""
    for mark, isa in (("AVX-512", "avx512"), ("AVX2", "avx2"), ("SSE4", "baseline")):
        if mark in said:
            return isa
    return None


def of_rate(rate: float, peaks: Mapping[str, float], held: str) -> str | None:
    """The narrowest ISA from `held` on whose arithmetic reaches `rate`.

    A rate proves that a library runs no narrower, never that it could run wider: one that is slow,
    or on a busy machine, stays below every peak. A tenth is left for two measurements.
    """
    wider = env.ISAS[env.ISAS.index(held) :]
    return next((name for name in wider if rate <= 1.1 * peaks.get(name, 0.0)), None)


CONVOLUTION = re.compile(r"exec,cpu,convolution,([^,]+),")


def parse_onednn(lines: list[str]) -> Record:
    said = next((s.split("isa:", 1)[1] for s in lines if "info,cpu,isa:" in s), "")
    ran = next((m[1] for s in lines if (m := CONVOLUTION.search(s))), "")
    widest, used = of_onednn(said), of_implementation(ran)
    # A kernel may be written for less than the library was allowed; never the other way round.
    return {"isa": used or widest, "allowed": widest, "says": said, "convolution": ran}


def parse_mkl(lines: list[str]) -> Record:
    said = next((s for s in lines if s.startswith("MKL_VERBOSE") and "MKL 20" in s), "")
    said = re.sub(r"^.* for |, Lnx.*$", "", said)
    return {"isa": of_mkl(said), "says": said}


PROBE = """
import json, torch
torch.set_num_threads(1)
torch.conv2d(torch.randn(4, 32, 32, 32), torch.randn(32, 32, 3, 3), padding=1)
torch.randn(64, 64) @ torch.randn(64, 64)
print(json.dumps({"aten": torch.backends.cpu.get_cpu_capability()}))
"""


@functools.cache
def record() -> Record:
    """The ISA of every library in a process with this environment; about 3 s, once a process.

    Raises:
        ValueError: when the child that asks them fails.
    """
    asked = {**os.environ, "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=asked, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise ValueError(
            f"isa: got status {done.returncode} from the process that asks torch for its ISA; "
            f"expected its answer; mend torch first:\n{done.stderr[-500:]}"
        )
    says = json.loads(lines[-1])["aten"]
    found: Record = {
        "mbm": native.isa(),
        "aten": {"isa": of_aten(says), "says": says},
        "onednn": parse_onednn(lines) if torch.backends.mkldnn.is_available() else _absent(),
        "mkl": parse_mkl(lines) if torch.backends.mkl.is_available() else _absent(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if found["mkl"]["isa"] is None:
        found["mkl"] |= _mkl_unsaid()
    return found


def _absent() -> Record:
    return {"isa": ABSENT}


def _mkl_unsaid() -> Record:
    """MKL's ISA where it does not say: the CPU's widest, unless the environment holds it."""
    ours, given = native.isa(), {n: os.environ[n] for n in MKL_VARIABLES if n in os.environ}
    if ours is None:
        return {"isa": None}
    if not given:
        return {"isa": native.cpu().best_isa(), "by": "nothing holds it"}
    asked = HELD.get(ours, {}).get(MKL_VARIABLES[0])
    if given != {MKL_VARIABLES[0]: asked}:
        return {"isa": None, "by": "held, but not to mbm's"}
    return _mkl_by_rate(ours)


SIDE, ITERATIONS, SECONDS, TRIES = 512, 20_000, 0.3, 4


def _mkl_by_rate(ours: str) -> Record:
    """By the rate of a product on one thread, beside that of arithmetic in registers."""
    cpu = native.cpu()
    names = [name for name in native.isas() if name in env.ISAS]
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)

    def peak(name: str) -> None:
        cpu.set_isa(name)
        cpu.peak_run(ITERATIONS, 1)

    calls: dict[str, timing.Call] = {n: functools.partial(peak, n) for n in names}
    calls["mkl"] = lambda: a @ b
    operations = {"mkl": 2 * SIDE**3}
    rates = dict.fromkeys(calls, 0.0)
    try:
        for name in names:
            cpu.set_isa(name)
            operations[name] = cpu.peak_operations() * ITERATIONS
        with timing.threads(1), torch.no_grad():
            for _ in range(TRIES):  # the best counts, whatever else runs now and then
                for name, ns in timing.interleave(calls, SECONDS).items():
                    rates[name] = max(rates[name], float(operations[name] / ns.min()))
    finally:
        cpu.set_isa(ours)
    rounded = {name: round(rate, 1) for name, rate in rates.items()}
    peaks = {name: rates[name] for name in names}
    return {"isa": of_rate(rates["mkl"], peaks, ours), "by": "rate", "gflops": rounded}


def disagreement(found: Record) -> str | None:
    """What another library runs, where it is not our ISA."""
    ours = found.get("mbm")
    if ours not in env.ISAS:
        return f"mbm runs {ours}"
    others = {LIBRARIES[n]: found.get(n, {}).get("isa") for n in LIBRARIES}
    differing = {name: isa for name, isa in others.items() if isa not in (ours, ABSENT)}
    if not differing:
        return None
    listed = ", ".join(f"{name} {isa or 'an unknown one'}" for name, isa in differing.items())
    return f"mbm runs {ours}, {listed}"


def check(found: Record) -> None:
    """
    Raises:
        ValueError: when a stock library computes in another ISA than ours.
    """
    if reason := disagreement(found):
        raise ValueError(
            f"isa: got {reason}; expected one ISA for all, or the ratio says nothing of kernels; "
            f"unset {', '.join(VARIABLES)} and let MBM_ISA hold them all, or leave it out"
        )


def refusal(results: Mapping[str, Any], isa: str) -> str | None:
    """Why a results file is no evidence for a rule about CPUs with that ISA; None where it is.

    Files of schema 1 recorded ours and ATen's alone. Where ours was the CPU's own choice and the
    widest that there is, none ran wider; where it was forced, nothing shows that oneDNN and MKL
    were held.
    """
    machine = results.get("machine")
    if not machine:
        return "it does not say on what machine and in which ISA it was measured"
    if results.get("local"):
        return "it was measured with local edits or without torch.compile"
    if "isa" in results:
        found = results["isa"]
    else:
        if "MBM_ISA" in machine.get("environment", {}):
            return "MBM_ISA was forced, and oneDNN's and MKL's ISA are not recorded"
        aten = of_aten(machine.get("torch_capability", ""))
        rest = machine["isa"] if machine["isa"] == WIDEST else None
        found = {"mbm": machine["isa"], "aten": {"isa": aten}}
        found |= {"onednn": {"isa": rest}, "mkl": {"isa": rest}}
    if reason := disagreement(found):
        return reason
    return None if found["mbm"] == isa else f"it was measured in {found['mbm']}, not {isa}"


def check_engines() -> None:
    """
    Raises:
        ValueError: where MBM_ISA holds us to less than engines, which do not heed it, would run in.
    """
    wanted, widest = env.isa(), processor.best_isa(processor.read_cpuinfo())
    if wanted not in (None, widest):
        raise ValueError(
            f"peers: got MBM_ISA={wanted}, which no engine heeds; expected {widest}, the widest of "
            "this CPU; leave MBM_ISA or the engines out"
        )
