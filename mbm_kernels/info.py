"""What this installation can do on this machine: `python -m mbm_kernels info`."""

import importlib.metadata
import platform
from typing import Any

import torch

import mbm_kernels
from mbm_kernels._core import cost, env, heap, native, processor

PACKAGES = ("torch", "triton", "numpy", "pybind11")


def package_versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in PACKAGES}


def gpu() -> dict[str, Any]:
    """The CUDA device's name, or the reason why there is none; the state of `_C_cuda`."""
    if torch.cuda.is_available():
        name, reason = torch.cuda.get_device_name(), None
    elif torch.version.cuda is None:
        name, reason = None, "this torch is a CPU build"
    else:
        name, reason = None, "torch sees no CUDA device"
    return {"name": name, "why_not": reason, "extension": native.cuda_reason() or "ready"}


def collect() -> dict[str, Any]:
    """All of it, ready for JSON."""
    cpu_reason = native.cpu_reason()
    native_module = None if cpu_reason else native.cpu()
    return {
        "version": mbm_kernels.__version__,
        "python": platform.python_version(),
        "packages": package_versions(),
        "cpu": {
            "isa": native.isa(),
            "best_isa": native_module.best_isa() if native_module else None,
            "extension": cpu_reason or "ready",
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "openmp_runtimes": native.openmp_runtimes(),
            "device": processor.name(),
            "constants": table.source if (table := cost.table()) else None,
        },
        "heap": heap.report(),
        "gpu": gpu(),
        "ops": {op: mbm_kernels.backends(op) for op in mbm_kernels.ops.PUBLIC},
        "environment": env.in_force(),
        "unknown_environment": env.unknown(),
    }


def heap_line(found: dict[str, Any]) -> str:
    """What `heap.report` found, in words."""
    size = f"{found['probe_bytes'] >> 20} MiB"
    line = f"{found['state']}: {found['faults_per_call']} page faults to make a tensor of {size}"
    if found["state"] == "warm":
        return line
    if found["why_not_warm"]:
        return f"{line}; no warm_heap(): {found['why_not_warm']}"
    return f"{line}, {found['faults_per_call_warm']} after warm_heap()"


def print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(show_header=False, box=None, pad_edge=False)
    packages = ", ".join(f"{n} {v or 'not installed'}" for n, v in report["packages"].items())
    facts.add_row("mbm_kernels", f"{report['version']} on Python {report['python']}")
    facts.add_row("packages", packages)
    cpu = report["cpu"]
    forced = "" if cpu["isa"] == cpu["best_isa"] else f" (this CPU runs up to {cpu['best_isa']})"
    if cpu["isa"] == "avx512_lowered":
        forced += ": AVX-512's code made of AVX2 instructions, for tests, slow"
    facts.add_row("CPU kernels", f"{cpu['extension']}, ISA {cpu['isa']}{forced}")
    facts.add_row("threads", f"{cpu['threads']}; torch itself uses {cpu['torch_capability']}")
    runtimes = cpu["openmp_runtimes"]
    note = "" if len(runtimes) <= 1 else "  [red]more than one: thread pools will compete[/red]"
    facts.add_row("OpenMP runtimes", f"{len(runtimes)}: {', '.join(runtimes) or 'none seen'}{note}")
    constants = cpu["constants"] or "none: it takes PyTorch on CPUs"
    facts.add_row("auto's constants", f"{constants} (this CPU is {cpu['device']})")
    facts.add_row("heap", heap_line(report["heap"]))
    device = report["gpu"]
    facts.add_row("GPU", device["name"] or f"none: {device['why_not']}")
    facts.add_row("CUDA kernels", device["extension"])
    in_force = ", ".join(f"{n}={v}" for n, v in report["environment"].items())
    facts.add_row("MBM_* in force", in_force or "none")
    for name in report["unknown_environment"]:
        facts.add_row("", f"[yellow]{name} is not a variable of this library[/yellow]")
    console.print(facts)

    table = Table("operation", "cpu", "triton", "cuda", "torch", title="backends")
    reasons: dict[str, list[str]] = {}
    for op, backends in report["ops"].items():
        cells = []
        for name in ("cpu", "triton", "cuda", "torch"):
            reason = backends[name]
            cells.append("[green]yes[/green]" if reason is None else "[dim]no[/dim]")
            if reason is not None:
                reasons.setdefault(reason.removeprefix(f"{op} has "), []).append(op)
        table.add_row(op, *cells)
    console.print(table)
    for reason, ops in reasons.items():
        whose = "every operation" if len(ops) == len(report["ops"]) else ", ".join(ops)
        console.print(f"[dim]{reason}:[/dim] {whose}")
