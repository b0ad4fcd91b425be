"""Triton kernels with their launch configurations: run, or recorded for the compile-time gate.

Configurations are package data, `ops/<op>/launch.json`, one list for each kernel:

    {"kernels": {"scores": [{"where": {"S": [1, 64]}, "dtypes": ["bfloat16"],
                             "constants": {"BLOCK_S": 64}, "num_warps": 4, "num_stages": 2,
                             "max_registers": 128,
                             "source": "measured on <device>, <date>" or "estimated: <why>"}]}}

The first entry whose `where` and `dtypes` hold is the one that runs; one without either always
holds. `max_registers` is for NVIDIA and may be left out. With MBM_AUTOTUNE=1 every entry that the
dtype allows is timed, once for each set of sizes, on copies of the tensors, and the fastest runs.

An op with several ways lists them beside "kernels", with the same conditions (`read_choices`):

    {"choices": {"grad_x": [{"where": {"C": [1, 64]}, "use": "gemm", "source": "estimated: <why>"},
                            {"use": "aten", "source": "estimated: <why>"}]}}
"""

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import env

OPS_FOLDER = Path(__file__).resolve().parent.parent / "ops"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Grid = Callable[[dict[str, int]], tuple[int, ...]]


def why_not(device: Any, dtype: Any) -> str | None:
    """What every backend_triton answers, before anything of its own."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype is not None and dtype not in DTYPES:
        return f"it computes in float32, which would round {dtype}"
    if recording() or interpreting():
        return None
    if device is not None and torch.device(device).type != "cuda":
        kind = torch.device(device).type
        return f"it runs on cuda tensors, not {kind}; TRITON_INTERPRET=1 runs it on any, for tests"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; TRITON_INTERPRET=1 runs it on the CPU, for tests"
    return None


@functools.cache
def interpreting() -> bool:
    """Whether kernels run on the CPU by Triton's interpreter (the TRITON_INTERPRET variable)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


Where = tuple[tuple[str, float, float], ...]  # size, least, most


def _conditions(entry: dict[str, Any]) -> tuple[Where, tuple[str, ...]]:
    where = tuple(
        (name, -float("inf") if low is None else low, float("inf") if high is None else high)
        for name, (low, high) in entry.get("where", {}).items()
    )
    return where, tuple(entry.get("dtypes", ()))


def _hold(where: Where, dtypes: tuple[str, ...], dtype: torch.dtype, sizes: dict[str, int]) -> bool:
    named = str(dtype).removeprefix("torch.")
    return (not dtypes or named in dtypes) and all(
        low <= sizes[name] <= high for name, low, high in where
    )


@dataclass(frozen=True)
class Machine:
    """What a kernel that needs all its programs at once must know of the device."""

    multiprocessors: int  # each surely runs one program
    shared_kib: int  # of one program at most


H100 = Machine(132, 227)


def machine(device: torch.device) -> Machine:
    """The device's; an H100's while recording. The interpreter runs one program after another."""
    if recording():
        return H100
    if interpreting():
        return Machine(1, 0)
    found = torch.cuda.get_device_properties(device)
    shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return Machine(int(found.multi_processor_count), int(shared) // 1024)


@dataclass(frozen=True)
class Config:
    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int
    max_registers: int | None  # without it ptxas may spill a little to fit one block more
    where: Where
    dtypes: tuple[str, ...]
    source: str

    @classmethod
    def parse(cls, entry: dict[str, Any]) -> "Config":
        return cls(
            tuple(entry["constants"].items()),
            entry["num_warps"],
            entry["num_stages"],
            entry.get("max_registers"),
            *_conditions(entry),
            entry["source"],
        )

    def holds(self, dtype: torch.dtype, sizes: dict[str, int]) -> bool:
        return _hold(self.where, self.dtypes, dtype, sizes)

    def compile_options(self, nvidia: bool) -> dict[str, int | bool]:
        # Contraction to FMA is said outright: triton's default for it changes in 3.10.
        options: dict[str, int | bool] = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }
        if nvidia and self.max_registers:
            options["maxnreg"] = self.max_registers
        return options


@functools.cache
def read_configs(op: str) -> dict[str, tuple[Config, ...]]:
    kernels = json.loads((OPS_FOLDER / op / "launch.json").read_text())["kernels"]
    return {name: tuple(Config.parse(e) for e in entries) for name, entries in kernels.items()}


@dataclass(frozen=True)
class Choice:
    """One of several ways that an op goes."""

    use: str
    where: Where
    dtypes: tuple[str, ...]

    def holds(self, dtype: torch.dtype, sizes: dict[str, int]) -> bool:
        return _hold(self.where, self.dtypes, dtype, sizes)


@functools.cache
def read_choices(op: str) -> dict[str, tuple[Choice, ...]]:
    """By what is chosen for; the first that holds, of those that can run, is taken."""
    choices = json.loads((OPS_FOLDER / op / "launch.json").read_text()).get("choices", {})
    return {
        name: tuple(Choice(e["use"], *_conditions(e)) for e in entries)
        for name, entries in choices.items()
    }


def choice(op: str, what: str, dtype: torch.dtype, sizes: dict[str, int]) -> str:
    """How `what` is done: the first of the op's ways that holds."""
    return next(c.use for c in read_choices(op)[what] if c.holds(dtype, sizes))


@dataclass(frozen=True)
class Launch:
    """One launch that was recorded instead of run."""

    kernel: "Kernel"
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    config: Config
    grid: tuple[int, ...]


_recorded: list[Launch] | None = None


def recording() -> bool:
    return _recorded is not None


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Within it kernels do not run but are listed; the tensors may be on the meta device."""
    global _recorded
    if _recorded is not None:
        raise RuntimeError("triton_launch.record: already recording; leave the outer one first")
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


class Kernel:
    """A `triton.jit` function and the table of its configurations.

    Args:
        op: the operation's name, whose launch.json holds the table.
        name: the key in that table.
        function: the jitted function; arguments in capitals are its constexprs. One called NVIDIA
            is filled in here: whether it is compiled for such a GPU, and so may hold PTX.
    """

    def __init__(self, op: str, name: str, function: Any):
        self.op, self.name, self.function = op, name, function
        self._fastest: dict[tuple[Any, ...], Config] = {}

    @property
    def configs(self) -> tuple[Config, ...]:
        return read_configs(self.op)[self.name]

    def decorated(self, option: str) -> tuple[str, ...]:
        """Arguments that the decorator names in `option`, which the interpreter keeps elsewhere."""
        given = self.function.kwargs if interpreting() else vars(self.function)
        return tuple(given[option] or ())

    def config(self, dtype: torch.dtype, sizes: dict[str, int]) -> Config:
        for config in self.configs:
            if config.holds(dtype, sizes):
                return config
        raise RuntimeError(
            f"{self.op}: kernel {self.name}: no configuration for {dtype} and {sizes}; "
            f"expected launch.json to end with an entry that always holds; add one"
        )

    def __call__(
        self,
        grid: Grid,
        *args: Any,
        dtype: torch.dtype,
        sizes: dict[str, int],
        cooperative: bool = False,
        allocated_by: Sequence[str] = (),
        **constexprs: Any,
    ) -> None:
        """Launches over grid(constants), on the device of the first tensor among `args`.

        `allocated_by`: constants of `config` that sizes of the tensors were computed from, so that
        MBM_AUTOTUNE tries no entry with others.
        `cooperative`: its programs wait for one another, so all of them run at once or the launch
        fails; never timed by MBM_AUTOTUNE, since what they count by holds for one run.
        """
        config = self.config(dtype, sizes)
        if _recorded is not None:
            shape = grid(dict(config.constants))
            _recorded.append(Launch(self, args, constexprs, config, shape))
            return
        device = next(a.device for a in args if isinstance(a, Tensor))
        if device.type != "cuda":
            self._run(config, grid, args, constexprs)
            return
        if cooperative:
            constexprs = {**constexprs, "launch_cooperative_grid": True}
        with torch.cuda.device(device):
            if env.autotune() and not cooperative:
                config = self._tuned(config, grid, args, constexprs, dtype, sizes, allocated_by)
            self._run(config, grid, args, constexprs)

    def _run(
        self, config: Config, grid: Grid, args: Sequence[Any], constexprs: dict[str, Any]
    ) -> None:
        shape = grid(dict(config.constants))
        if 0 in shape:
            return
        nvidia = torch.version.hip is None
        options = config.compile_options(nvidia)
        given = {**constexprs, **self.target_constants(nvidia and not interpreting())}
        self.function[shape](*args, **given, **dict(config.constants), **options)

    def target_constants(self, nvidia: bool) -> dict[str, bool]:
        return {"NVIDIA": nvidia} if "NVIDIA" in self.function.arg_names else {}

    def _tuned(
        self,
        default: Config,
        grid: Grid,
        args: Sequence[Any],
        constexprs: dict[str, Any],
        dtype: torch.dtype,
        sizes: dict[str, int],
        allocated_by: Sequence[str],
    ) -> Config:
        fixed = {name: dict(default.constants)[name] for name in allocated_by}
        key = (dtype, *sizes.values(), *constexprs.items(), *fixed.values())
        if key in self._fastest or torch.cuda.is_current_stream_capturing():
            return self._fastest.get(key, default)
        from triton.testing import do_bench

        named = str(dtype).removeprefix("torch.")
        args = [
            _copy(a) if isinstance(a, Tensor) else a for a in args
        ]  # some kernels work in place
        times = {}
        for config in self.configs:
            if (config.dtypes and named not in config.dtypes) or not (
                fixed.items() <= dict(config.constants).items()
            ):
                continue
            run = functools.partial(self._run, config, grid, args, constexprs)
            try:
                times[config] = do_bench(run, return_mode="min")
            except Exception:  # it asks for more than the device has, which only compiling tells
                continue
        self._fastest[key] = min(times, key=times.__getitem__) if times else default
        return self._fastest[key]


def _copy(x: Tensor) -> Tensor:
    """With all of its memory, so that any strides hold."""
    storage = x.untyped_storage().clone()
    return x.new_empty(0).set_(storage, x.storage_offset(), x.shape, x.stride())  # type: ignore[call-overload]


@functools.cache
def kernel(op: str, name: str) -> Kernel:
    """The kernel `name` of ops/<op>/triton_kernels.py; the same object each time."""
    module = importlib.import_module(f"mbm_kernels.ops.{op}.triton_kernels")
    return Kernel(op, name, getattr(module, name))


def ceil_div(n: int, block: int) -> int:
    return -(-n // block)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n and at least 1."""
    return 1 << max(n - 1, 0).bit_length()
