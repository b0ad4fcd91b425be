"""Compiles csrc with ninja; never imports torch, so build isolation works.

One ISA per file: every `csrc/*/*_cpu*.cpp` is compiled for a baseline, for AVX2+FMA and for
AVX-512 (see csrc/common/isa.h) and picked at run time. `_C_cuda` is built when nvcc is found and
MBM_CUDA is not 0. For tests there are MBM_BUILD_ISA, which compiles one ISA alone, MBM_SANITIZE,
which instruments the kernels (coverage: counts their lines), and avx512_lowered: MBM_LOWERED=1
builds it, 0 does not, by default a build in place does where this CPU cannot run AVX-512. That
also compiles the CUDA kernels for the host (csrc/common/gpu/emulation.h), without nvcc.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
INCLUDE = "-Icsrc"

CXXFLAGS = [
    *("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-g0"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    # -Wno-psabi: vector arguments change ABI between builds, which namespaces already separate.
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
ISAS = {
    "baseline": (4, ["-msse2"]),
    "avx2": (8, ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (
        16,
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
    ),
}
# For tests alone. At -O3 it would take as long to compile as everything else together.
LOWERED = {"avx512_lowered": (16, [*ISAS["avx2"][1], "-O1"])}
# The binding stays as it is: what it does is convert arguments.
SANITIZERS = {
    "": [],
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        *("-O1", "-g1", "-fno-omit-frame-pointer", "-DMBM_GUARDED_SCRATCH"),
    ],
    "thread": [
        *("-fsanitize=thread", "-fno-openmp", "-DMBM_STD_THREADS"),
        *("-O1", "-g1", "-fno-omit-frame-pointer", "-DMBM_GUARDED_SCRATCH"),
    ],
    # Which lines run, exactly: no two are merged. Allocations fail where a test asks for it.
    "coverage": ["--coverage", "-fprofile-update=atomic", "-O0", "-g1", "-DMBM_FAILING_SCRATCH"],
}
CUDA_ARCHS = ("80", "90", "100")
EMULATED = "_C_cuda_emulated"


def find_ninja() -> str:
    """This interpreter's own first, whatever PATH says: two versions refuse each other's log, and
    compile everything anew in turn."""
    own = Path(sys.executable).with_name("ninja")
    found = str(own) if own.exists() else shutil.which("ninja")
    if found:
        return found
    try:
        import ninja
    except ImportError:
        raise SystemExit("setup.py: ninja not found; install it with: pip install ninja") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def chosen(name: str, choices: Iterable[str]) -> str:
    """An environment variable with a value among `choices`, which hold ""."""
    value = os.environ.get(name, "")
    if value not in choices:
        expected = ", ".join(filter(None, choices))
        raise SystemExit(f"setup.py: {name}: got {value!r}; expected one of {expected}")
    return value


def cpu_has_avx512() -> bool:
    """True too where it cannot be seen: what is at stake is one more build for tests."""
    try:
        return " avx512vl" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def find_nvcc() -> str | None:
    if os.environ.get("MBM_CUDA", "1") == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def cuda_archs(nvcc: str) -> list[str]:
    """Those of CUDA_ARCHS that this nvcc knows: 100 came with CUDA 12.8."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = listed.stdout.split()
    return [arch for arch in CUDA_ARCHS if f"compute_{arch}" in known] or list(CUDA_ARCHS)


def python_includes() -> list[str]:
    import pybind11

    return [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]


class NinjaFile:
    """A build.ninja of compile and link edges; ninja rebuilds what changed, headers included."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.lines = [
            "ninja_required_version = 1.8",
            f"builddir = {self.escape(folder)}",
            "rule cc\n  command = $cmd -MMD -MF $out.d -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = CC $out",
            "rule link\n  command = $cmd $in -o $out $libs\n  description = LINK $out",
        ]

    @staticmethod
    def relative(path: Path) -> Path:
        """To the checkout where it lies inside, so that a copy of it does not rebuild."""
        return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path

    def escape(self, path: Path) -> str:
        text = str(self.relative(path))
        return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def compile(
        self, source: Path, tag: str, command: list[str], first: Path | None = None
    ) -> Path:
        """`first`: what `precompile` returned, which is included before all else."""
        name = "_".join(source.relative_to(CSRC).parts)
        target = self.folder / f"{name}.{tag}.o"
        needs = "" if first is None else f" | {self.escape(first)}"
        if first is not None:
            folder, header = first.parents[1], Path(first.parent.name, first.stem)
            at = command.index(INCLUDE)
            more = [f"-I{self.relative(folder)}", "-include", str(header)]
            command = [*command[:at], *more, *command[at:]]
        self.lines.append(f"build {self.escape(target)}: cc {self.escape(source)}{needs}")
        self.lines.append(f"  cmd = {shlex.join(command)}")
        return target

    def precompile(self, header: Path, tag: str, command: list[str]) -> Path:
        target = self.folder / tag / header.parent.name / f"{header.name}.gch"
        self.lines.append(f"build {self.escape(target)}: cc {self.escape(header)}")
        self.lines.append(f"  cmd = {shlex.join([*command, '-x', 'c++-header'])}")
        return target

    def link(self, target: Path, objects: list[Path], command: list[str], libs: list[str]) -> None:
        inputs = " ".join(self.escape(o) for o in objects)
        self.lines.append(f"build {self.escape(target)}: link {inputs}")
        self.lines.append(f"  cmd = {shlex.join(command)}\n  libs = {shlex.join(libs)}")

    def run(self, verbose: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "build.ninja"
        path.write_text("\n".join(self.lines) + "\n")
        flags = ["-v"] if verbose else ["--quiet"] if ninja_is_quiet() else []
        # Of make's jobs ninja would want file descriptors that Python has closed.
        alone = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
        subprocess.run([find_ninja(), "-f", str(path), *flags], check=True, cwd=ROOT, env=alone)


def ninja_is_quiet() -> bool:
    version = subprocess.run([find_ninja(), "--version"], capture_output=True, text=True).stdout
    return tuple(int(part) for part in version.split(".")[:2]) >= (1, 11)


class BuildNative(build_ext):
    def finalize_options(self) -> None:
        # Otherwise an editable install or a wheel compiles in a folder of its own, all of it again.
        self.build_temp = self.build_temp or str(ROOT / "build")
        super().finalize_options()

    def run(self) -> None:
        # Setuptools' own run() forgets the first of them while it builds.
        self.in_checkout = bool(self.inplace or self.editable_mode)
        if not self.in_checkout:
            self.extensions = [e for e in self.extensions if not e.name.endswith(EMULATED)]
            for stale in Path(self.build_lib, "mbm_kernels").glob("_C_*.so"):
                stale.unlink()  # of a build with other extensions, which a wheel would take along
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        tag = f"{sysconfig.get_config_var('SOABI')}-{ext.name.rpartition('.')[2]}"
        ninja = NinjaFile(Path(self.build_temp).resolve() / tag)
        add = {"_C_cpu": self.add_cpu, "_C_cuda": self.add_cuda, EMULATED: self.add_emulated}
        add[ext.name.rpartition(".")[2]](ninja, target)
        try:
            ninja.run(self.verbose > 1)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"setup.py: compiling {ext.name} failed, see above") from error

    def wants_lowered(self) -> bool:
        asked = chosen("MBM_LOWERED", ("", "0", "1"))
        return asked == "1" or (not asked and self.in_checkout and not cpu_has_avx512())

    def add_cpu(self, ninja: NinjaFile, target: Path) -> None:
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        base = [*cxx, *CXXFLAGS, INCLUDE]
        sanitizer = SANITIZERS[chosen("MBM_SANITIZE", SANITIZERS)]
        only = chosen("MBM_BUILD_ISA", ("", *ISAS, *LOWERED))
        objects, calls, isas, tag = [], [], ISAS, "any"
        if only:
            isas, calls = {only: {**ISAS, **LOWERED}[only]}, [f"-DMBM_ONLY_ISA={only}"]
        elif self.wants_lowered():
            isas, calls, tag = {**ISAS, **LOWERED}, ["-DMBM_LOWERED"], "lowered"
        for isa, (lanes, flags) in isas.items():
            command = [*base, *sanitizer, *flags, f"-DMBM_ISA={isa}", f"-DMBM_LANES={lanes}"]
            # A quarter of the time of compiling the kernels; sanitizers do without.
            header = CSRC / "common" / "standard.h"
            first = None if sanitizer else ninja.precompile(header, isa, command)
            for source in sorted(CSRC.glob("*/*_cpu*.cpp")):
                objects.append(ninja.compile(source, isa, command, first))
        # Which of its lines run goes by what else the machine does: none is counted.
        checked = [] if "--coverage" in sanitizer else sanitizer
        for name in ("isa.cpp", "contention.cpp"):
            objects.append(ninja.compile(CSRC / "common" / name, tag, [*base, *checked, *calls]))
        # -O1: the binding only converts arguments, and compiles twice as fast.
        binding = [*base, *calls, "-O1", *python_includes()]
        for source in sorted(CSRC.glob("*/bind.cpp")):
            objects.append(ninja.compile(source, tag, binding))
        strip = [] if self.in_checkout or only or sanitizer else ["-s"]
        ninja.link(target, objects, [*cxx, "-shared", "-fopenmp", *strip, *sanitizer], [])

    def add_cuda(self, ninja: NinjaFile, target: Path) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None
        archs = cuda_archs(nvcc)
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        cuda = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC", INCLUDE, *gencode]
        objects = [ninja.compile(s, "cuda", cuda) for s in sorted(CSRC.glob("*/*_cuda*.cu"))]
        # By nvcc, which knows where the headers of the CUDA runtime are.
        host = ",".join(("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"))
        binding = [nvcc, "-O1", "-std=c++20", "-Xcompiler", host, INCLUDE, *python_includes()]
        for source in sorted(CSRC.glob("*/bind_cuda.cpp")):
            objects.append(ninja.compile(source, "any", binding))
        ninja.link(target, objects, [nvcc, "-shared", "-cudart", "static"], [])

    def add_emulated(self, ninja: NinjaFile, target: Path) -> None:
        cxx = shlex.split(os.environ.get("CXX", "g++"))
        base = [*cxx, *CXXFLAGS, "-O2", "-Wno-unknown-pragmas", "-DMBM_EMULATED", INCLUDE]
        kernels = sorted(set(CSRC.glob("*/*_cuda*.cu")) - {CSRC / "common" / "probe_cuda.cu"})
        objects = [ninja.compile(s, "emulated", [*base, "-x", "c++"]) for s in kernels]
        for source in sorted(CSRC.glob("common/gpu/*.cpp")):
            objects.append(ninja.compile(source, "emulated", base))
        for source in sorted(CSRC.glob("*/bind_cuda.cpp")):
            objects.append(ninja.compile(source, "any", [*base, "-O1", *python_includes()]))
        ninja.link(target, objects, [*cxx, "-shared"], [])


extensions = [Extension(f"mbm_kernels.{name}", sources=[]) for name in ("_C_cpu", EMULATED)]
if find_nvcc():
    extensions.append(Extension("mbm_kernels._C_cuda", sources=[]))
elif "build_ext" in sys.argv:
    print("setup.py: no nvcc (or MBM_CUDA=0): building without _C_cuda", file=sys.stderr)

setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative})
