"""The compile-time gate of the CUDA C++ kernels: what nvcc makes of each, held to a baseline.

    python -m mbm_kernels.gate.cuda [--update] [--because TEXT]

benchmarks/static/nvcc-<version>/<op>.json has the form of the Triton kernels' baselines; an entry's
key is "kernel | target". Kernels with a reciprocal in their innermost loop also have a budget of
instructions for each of its elements, two of which share one; kernels that wait for an mbarrier or
for flags in their loop, one for each of its steps. Needs nvcc, no GPU; without nvcc there is
nothing to hold.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mbm_kernels.bench import exits
from mbm_kernels.gate import compare, resources
from mbm_kernels.gate.compare import Entry

TARGETS = ("sm_80", "sm_90", "sm_100")
OF_CLUSTERS = re.compile(r"gru_(?:fwd|bwd)<.* \| sm_80")  # empty
WINDOW_KERNEL = "conv_stem_mma_fwd"
WINDOW_PRODUCTS = 48  # matrix instructions for 8 pooling windows by 64 outputs
# Instructions for an element of the innermost loop, of the tiles that long targets take; a kernel
# over its own fails. The aim for grad_terms was 11: a key's addresses take 2 of its 12.2. A tile of
# 4 has no inner loop of its own, only that over stages, with their exponentials.
BUDGETS: dict[str, float] = {
    r"additive_attention_fwd<\w+, 20>": 7.0,
    r"additive_attention_grad_terms<\w+, 20>": 12.5,
}
# Instructions of a warp for a step of the recurrence, where 16 blocks hold 512 units.
STEP_BUDGETS: dict[str, float] = {
    r"gru_fwd<(?:bfloat16|float16), 512, 16>": 320,
    r"gru_bwd<(?:bfloat16|float16), 512, 16>": 390,
}
# Instructions of a warp for 8 pooling windows by 64 outputs, of y in channels_last, without their
# places and with them. The aim was 450 for any target; sm_100 moves constants of the places anew.
WINDOW_BUDGETS: dict[str, float] = {
    r"conv_stem_mma_fwd<(?:bfloat16|float16), 0, 1>": 300,
    r"conv_stem_mma_fwd<(?:bfloat16|float16), 1, 1> \| sm_(?:80|90)$": 450,
    r"conv_stem_mma_fwd<(?:bfloat16|float16), 1, 1> \| sm_100": 490,
}
# Of the sums in full float32, instructions for each FMA.
FMA_BUDGETS: dict[str, float] = {
    r"conv_stem_fwd<": 1.4,
    r"conv_stem_grad_weight<": 1.75,
}
# By what is recorded of a kernel: what it counts, and the most of it.
LIMITS: dict[str, tuple[str, dict[str, float]]] = {
    "loop_per_element": ("instructions an element", BUDGETS),
    "instructions_per_step": ("instructions a step", STEP_BUDGETS),
    "instructions_per_windows": ("instructions for 8 windows", WINDOW_BUDGETS),
    "instructions_per_fma": ("instructions an FMA", FMA_BUDGETS),
}
INSTRUCTION = re.compile(
    r"^\s+(?:/\*[0-9a-f]{4,}\*/\s+)?(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\b(.*);"
)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def kernel_name(mangled: str) -> str:
    """As `additive_attention_fwd<bfloat16, 20>`, of a template over a dtype and numbers."""
    found = re.search(
        r"\d+([a-z]\w*?)_kernelI(f|6__half|13__nv_bfloat16|N\w*?4tf32E)((?:Li\d+E)*)E", mangled
    )
    if found is None:
        return mangled
    kinds = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
    name = re.sub(r"^.*(?:additive|3gru|4conv)\d+", "", found.group(1))
    kind = kinds.get(found.group(2), "tf32")
    return f"{name}<{', '.join([kind, *re.findall(r'[0-9]+', found.group(3))])}>"


def loops(instructions: Sequence[tuple[str, str]], labels: dict[str, int]) -> list[list[str]]:
    """The names of the instructions of each loop."""
    found = []
    for end, (name, rest) in enumerate(instructions):
        target = re.search(r"(\.L_\w+)", rest)
        if name.startswith("BRA") and target and labels.get(target.group(1), end + 1) <= end:
            found.append([each for each, _ in instructions[labels[target.group(1)] : end + 1]])
    return found


def count(body: Sequence[str], prefix: str) -> int:
    return sum(name.startswith(prefix) for name in body)


def loop_per_element(every: Sequence[Sequence[str]]) -> float:
    """Of the loops with 8 reciprocals or more, the fewest instructions for each element."""
    pairs = [(len(body), count(body, "MUFU.RCP")) for body in every]
    return min((round(n / (2 * each), 2) for n, each in pairs if each >= 8), default=0.0)


def loop_of_steps(every: Sequence[Sequence[str]]) -> int:
    """Instructions of the longest loop that waits for an mbarrier, or else of the shortest that
    waits for flags and stores its own; 0 where there is neither."""
    found = [len(body) for body in every if count(body, "SYNCS.PHASECHK") and len(body) > 1]
    by_flags = [
        len(body) for body in every if count(body, "CCTL.IVALL") and count(body, "STG.E.STRONG")
    ]
    return max(found, default=min(by_flags, default=0))


def loop_of_windows(every: Sequence[Sequence[str]]) -> int:
    """Instructions of the shortest loop with the products of 8 pooling windows, 0 without one."""
    found = [len(body) for body in every if count(body, "HMMA") == WINDOW_PRODUCTS]
    return min(found, default=0)


def loop_per_fma(every: Sequence[Sequence[str]]) -> float:
    """Of the loops with 16 FMA or more, the fewest instructions for each."""
    pairs = [(len(body), count(body, "FFMA")) for body in every]
    return min((round(n / each, 2) for n, each in pairs if each >= 16), default=0.0)


def disassembled(sass: str) -> dict[str, tuple[list[tuple[str, str]], dict[str, int]]]:
    """Instructions and the places of labels, by mangled kernel."""
    found: dict[str, tuple[list[tuple[str, str]], dict[str, int]]] = {}
    name = ""
    for line in sass.splitlines():
        if section := re.match(r"\.text\.(\S+):", line.strip()):
            name = section.group(1)
            found[name] = ([], {})
        elif name and (label := re.match(r"\s*(\.L_\S+):", line)):
            found[name][1][label.group(1)] = len(found[name][0])
        elif name and (instruction := INSTRUCTION.match(line)):
            found[name][0].append((instruction.group(1), instruction.group(2)))
    return found


def measure(compiler: str, source: Path, target: str) -> dict[str, Entry]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [compiler, "-O3", "-std=c++17", f"-arch={target}", "-cubin", "-Xptxas", "-v"]
        where = f"-I{source.parents[1]}"
        report = resources._run(*command, where, str(source), "-o", str(cubin))
        listed = disassembled(resources._run(resources._tool("nvdisasm"), "-c", str(cubin)))
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found: dict[str, Entry] = {}
    for mangled, *numbers in re.findall(pattern, report, re.DOTALL):
        stack, stores, loads, registers = map(int, numbers)
        instructions, labels = listed[mangled]
        name, every = kernel_name(mangled), loops(instructions, labels)
        entry: Entry = {
            "registers": registers,
            "stack": stack,
            "spill_stores": stores,
            "spill_loads": loads,
            "local_instructions": sum(n.startswith(("STL", "LDL")) for n, _ in instructions),
            "instructions": len(instructions),
            "loop_per_element": loop_per_element(every),
        }
        if step := loop_of_steps(every):
            entry["instructions_per_step"] = step
        # A step of gru's has as many matrix instructions.
        if name.startswith(WINDOW_KERNEL) and (windows := loop_of_windows(every)):
            entry["instructions_per_windows"] = windows
        if any(re.match(pattern, name) for pattern in FMA_BUDGETS):
            entry["instructions_per_fma"] = loop_per_fma(every)
        found[f"{name} | {target}"] = entry
    return found


def over_budget(entries: dict[str, Entry]) -> list[str]:
    return [
        f"{key}: {entry[field]} {unit} of at most {most}"
        for field, (unit, budgets) in LIMITS.items()
        for key, entry in entries.items()
        for name, most in budgets.items()
        if re.match(name, key) and entry.get(field, 0) > most
    ]


def run(root: Path, update: bool, because: str | None) -> int:
    compiler = nvcc()
    if compiler is None:
        print("gate: no nvcc: the CUDA kernels' baselines are not held")
        return exits.OK
    release = re.search(r"release ([\d.]+), V([\d.]+)", resources._run(compiler, "--version"))
    assert release is not None
    folder = root / "benchmarks" / "static" / f"nvcc-{release.group(1)}"
    versions = {"nvcc": release.group(2)}
    failed = False
    for op in sorted({p.parent for p in root.glob("csrc/*/*_cuda*.cu")} - {root / "csrc/common"}):
        path = folder / f"{op.name}.json"
        baseline = compare.read_baseline(path)
        if not update and baseline["versions"] != versions:
            print(f"gate: {path.name}: no baseline of nvcc {versions['nvcc']}: not held")
            continue
        jobs = [(compiler, source, t) for source in op.glob("*_cuda*.cu") for t in TARGETS]
        now: dict[str, Entry] = {}
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for entries in pool.map(lambda job: measure(*job), jobs):
                now |= {k: e for k, e in entries.items() if not OF_CLUSTERS.match(k)}
        before = {
            key: {name: value for name, value in entry.items() if name != "because"}
            for key, entry in baseline["kernels"].items()
        }
        moves = compare.compare(before, now, whole=True)
        print(f"{op.name}: {len(now)} CUDA kernels, {len(moves)} moved")
        for line in (*map(compare.describe, moves), *(over := over_budget(now))):
            print(f"  {line}")
        if update and not over:
            compare.update(path, baseline, now, moves, versions, because)
        failed |= bool(over) or (bool(moves) and not update)
    return exits.REGRESSION if failed else exits.OK


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--update", action="store_true", help="record what moved")
    parser.add_argument("--because", help="why a kernel may spill or be over 5 %% worse")
    given = parser.parse_args()
    return run(Path.cwd(), given.update, given.because)


if __name__ == "__main__":
    sys.exit(exits.status(main))
