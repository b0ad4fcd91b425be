"""What compiled Triton kernels take of a GPU, with no GPU: registers, spills, shared memory, ...

A kernel's launches are recorded on meta tensors (`_core.triton_launch.record`) and each recorded
launch is compiled for a target, once for every configuration of its table.
"""

import functools
import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import env, files
from mbm_kernels._core.triton_launch import Config, Launch
from mbm_kernels.bench.exits import CannotMeasure


@dataclass(frozen=True)
class Target:
    """A GPU architecture and what one of its multiprocessors (compute units) holds."""

    name: str
    backend: str
    arch: int | str
    warp: int
    registers: int  # 32-bit, of all threads together
    register_step: int  # a warp's registers are rounded up to this
    warps: int
    shared: int  # bytes
    shared_reserved: int  # bytes a block takes beyond what it asks for

    @property
    def nvidia(self) -> bool:
        return self.backend == "cuda"


# CUDA C++ programming guide, "Technical specifications per compute capability"; AMD CDNA 3 ISA,
# section 3.6: 512 vector registers a lane for each of 4 SIMDs, at most 8 waves on each.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 65536, 256, 64, 167936, 1024),
        Target("sm_90", "cuda", 90, 32, 65536, 256, 64, 233472, 1024),
        Target("sm_100", "cuda", 100, 32, 65536, 256, 64, 233472, 1024),
        Target("gfx942", "hip", "gfx942", 64, 4 * 512 * 64, 8 * 64, 32, 65536, 0),
    )
}
MATRIX = re.compile(r"^(HMMA|HGMMA|IMMA|DMMA|UTC\w*MMA|QGMMA|v_mfma|v_smfmac)")


class DoesNotCompile(RuntimeError):
    """Triton's compiler refused a kernel, or broke off in it."""


@dataclass(frozen=True)
class Resources:
    registers: int  # a thread's
    stack: int  # bytes a thread
    spill_stores: int  # bytes (gfx942: registers) a thread, as the assembler reports them
    spill_loads: int
    local_instructions: int  # STL and LDL (gfx942: scratch_*), in the disassembly
    shared: int  # bytes a block
    matrix_instructions: int
    instructions: int
    occupancy: float  # resident warps over the most a multiprocessor holds, from the above


@functools.cache
def versions() -> dict[str, str]:
    """What the figures depend on beside the kernels' own source; a baseline is of one triton."""
    try:
        import triton
    except ImportError as error:
        raise CannotMeasure(f"triton cannot be imported: {error}; install triton") from None
    found = {"triton": triton.__version__.partition("+")[0]}
    for name in ("ptxas", "ptxas-blackwell"):
        release = re.search(r"release [\d.]+, V([\d.]+)", _run(_tool(name), "--version"))
        found[name] = release.group(1) if release else "unknown"
    return found


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(path) if path.exists() else shutil.which(name)
    if not found:
        raise CannotMeasure(f"{name} not found; expected it in triton's wheel; reinstall triton")
    return found


@dataclass(frozen=True)
class Specialisation:
    """A launch as triton's compiler takes it, with what a call would get specialised.

    Pointers count as aligned to 16 bytes, as torch allocates them; integers are specialised by
    value (1, or divisible by 16) where the kernel does not forbid it.
    """

    signature: dict[str, str]  # by argument: a type, or "constexpr"
    constants: dict[str, Any]
    divisible: frozenset[str]

    def traits(self) -> dict[str, str]:
        """Each argument in a word (every pointer is aligned, so none says so): equal traits,
        options and target are equal compilations."""
        return {
            name: str(self.constants[name])
            if kind == "constexpr"
            else kind + ("/16" if name in self.divisible and kind[0] != "*" else "")
            for name, kind in self.signature.items()
        }


def specialise(launch: Launch, config: Config, target: Target) -> Specialisation:
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible: set[str] = set()
    named = {
        **launch.constexprs,
        **launch.kernel.target_constants(target.nvidia),
        **dict(config.constants),
    }
    varying = launch.kernel.decorated("do_not_specialize")
    unaligned = (*varying, *launch.kernel.decorated("do_not_specialize_on_alignment"))
    for i, name in enumerate(launch.kernel.function.arg_names):
        value = launch.args[i] if i < len(launch.args) else named[name]
        one = type(value) is int and value == 1 and name not in varying
        if i >= len(launch.args) or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{_SHORT[value.dtype]}"
            divisible.add(name)
        elif isinstance(value, bool):
            signature[name] = "u1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in unaligned:
                divisible.add(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            raise TypeError(
                f"gate: {name}: got {type(value).__name__}; expected a tensor or number"
            )
    return Specialisation(signature, constants, frozenset(divisible))


def source_of(launch: Launch, config: Config, target: Target) -> Any:
    from triton.compiler import ASTSource

    given = specialise(launch, config, target)
    place = {name: (i,) for i, name in enumerate(launch.kernel.function.arg_names)}
    return ASTSource(
        launch.kernel.function,
        given.signature,
        {place[name]: value for name, value in given.constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in place if name in given.divisible},
    )


_SHORT = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def resources(launch: Launch, config: Config, target: Target, cache: Path) -> Resources:
    """Compiles the launch for the target, or takes what an equal compilation gave before."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = source_of(launch, config, target)
    options = config.compile_options(target.nvidia)
    key = json.dumps([source.hash(), target.name, options, versions()], sort_keys=True)
    stored = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if stored.exists():
        return Resources(**json.loads(stored.read_text()))
    try:
        compiled = triton.compile(
            source, target=GPUTarget(target.backend, target.arch, target.warp), options=options
        )
    except Exception as error:
        raise DoesNotCompile(f"{type(error).__name__}: {str(error).strip()[-300:]}") from error
    shared = compiled.metadata.shared
    if target.nvidia:
        found = _nvidia(compiled.asm, shared, config.num_warps, target)
    else:
        found = _amd(compiled.asm["amdgcn"], shared, config.num_warps, target)
    cache.mkdir(parents=True, exist_ok=True)
    files.write_atomic(stored, json.dumps(asdict(found)).encode())
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"gate: {Path(command[0]).name} failed: {done.stderr.strip()[-500:]}")
    return done.stdout + done.stderr


def _nvidia(asm: dict[str, Any], shared: int, num_warps: int, target: Target) -> Resources:
    arch = re.search(r"^\.target (\w+)", asm["ptx"], re.MULTILINE)
    assert arch is not None
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(asm["ptx"])
        gpu = f"--gpu-name={arch.group(1)}"
        assembler = _tool("ptxas-blackwell" if int(target.arch) >= 100 else "ptxas")
        # The options that triton's own compiler gives.
        report = _run(assembler, "-v", "--regAllocOptLevel=2", gpu, str(ptx), "-o", str(cubin))
        sass = _run(_tool("nvdisasm"), "-c", str(cubin))

    def number(pattern: str) -> int:
        found = re.search(pattern, report)
        if found is None:
            raise RuntimeError(f"gate: ptxas -v: expected {pattern!r} in {report!r}")
        return int(found.group(1))

    instructions = re.findall(
        r"^\s+(?:/\*[0-9a-f]{4,}\*/\s+)?(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\b.*;",
        sass,
        re.MULTILINE,
    )
    registers = number(r"Used (\d+) registers")
    return Resources(
        registers=registers,
        stack=number(r"(\d+) bytes stack frame"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        local_instructions=sum(i.startswith(("STL", "LDL")) for i in instructions),
        shared=shared,
        matrix_instructions=sum(bool(MATRIX.match(i)) for i in instructions),
        instructions=len(instructions),
        occupancy=_occupancy(registers, shared, num_warps, target),
    )


def _amd(assembly: str, shared: int, num_warps: int, target: Target) -> Resources:
    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"gate: AMD metadata has no .{name}")
        return int(found.group(1))

    body = re.findall(r"^\t((?:s|v|ds|buffer|global|flat|scratch)_\w+)", assembly, re.MULTILINE)
    registers = number("vgpr_count")
    return Resources(
        registers=registers,
        stack=number("private_segment_fixed_size"),
        spill_stores=number("vgpr_spill_count"),
        spill_loads=number("sgpr_spill_count"),
        local_instructions=sum(i.startswith("scratch_") for i in body),
        shared=shared,
        matrix_instructions=sum(bool(MATRIX.match(i)) for i in body),
        instructions=len(body),
        occupancy=_occupancy(registers, shared, num_warps, target),
    )


def _occupancy(registers: int, shared: int, num_warps: int, target: Target) -> float:
    step = target.register_step
    by_warp = -(-registers * target.warp // step) * step
    blocks = target.registers // max(by_warp, 1) // num_warps
    blocks = min(blocks, target.warps // num_warps)
    if shared:
        blocks = min(blocks, target.shared // (shared + target.shared_reserved))
    return blocks * num_warps / target.warps


def default_cache() -> Path:
    return env.cache_dir() / "static"
