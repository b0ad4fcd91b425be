"""What `optimize` gains on whole models that nobody here wrote.

    python -m benchmarks.zoo [MODEL ...] [--batch 1] [--mode inference] [--compile] [--save]

Each model runs as it is and as `optimize` makes it, by "auto" and by "measured", in NCHW and, where
its inputs are images, in channels_last, all interleaved in one process on a warm heap. With --peers
inference engines run the same model. With one thread the CPU time of the process is taken, else the
time of the host's clock; of a form the median of the rounds stands. Training is a forward and a
backward. A ratio is PyTorch's fastest form over our fastest layout of a policy. No time is taken of
a model whose outputs or gradients have more than `check_parity` allows.
"""

import copy
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mbm_kernels
from benchmarks import zoo_models
from benchmarks.zoo_models import Entry, Inputs
from mbm_kernels import engines
from mbm_kernels._core import timing
from mbm_kernels.bench import isa, machine, results
from mbm_kernels.bench.statistics import Summary
from mbm_kernels.optimize.errors import without_dropout

HERE = Path(__file__).resolve().parent
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
MODES = ("inference", "training")
POLICIES = ("auto", "measured")
FROZEN = "frozen"  # "auto" with freeze=True
FORMS = (*POLICIES, FROZEN)
COLUMNS = ("model", "B", "replaced", "PyTorch's fastest", "ms", *FORMS, "fastest engine")
MIN_ROUNDS, MAX_ROUNDS = 3, 15
Call = Callable[[], object]


def prepared(entry: Entry, mode: str) -> nn.Module:
    """The model in its mode, without dropout and dropped paths, so that all forms do the same."""
    torch.manual_seed(0)
    model = without_dropout(entry.make().train(mode == "training"))
    for module in model.modules():
        if type(module).__name__ in ("StochasticDepth", "DropPath"):
            module.eval()
    return model


def call_of(model: nn.Module, inputs: Inputs, mode: str) -> Call:
    if mode == "inference":

        def infer() -> object:
            with torch.no_grad():
                return model(*inputs)

        return infer
    parameters = [p for p in model.parameters() if p.requires_grad]
    grad = torch.randn_like(first(model(*inputs)))

    def step() -> object:
        return torch.autograd.grad(first(model(*inputs)), parameters, grad, allow_unused=True)

    return step


def first(outputs: Any) -> Tensor:
    found: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return found


def forms(
    entry: Entry, batch: int, mode: str, compiled: bool
) -> Iterator[tuple[str, Call, mbm_kernels.Report | None]]:
    """Names "<form> <layout>", calls, and what `optimize` reports."""
    model, inputs = prepared(entry, mode), entry.inputs(batch)
    for layout, memory in LAYOUTS.items():
        if layout != "NCHW":
            if not entry.images:
                return
            model = copy.deepcopy(model).to(memory_format=memory)
            inputs = tuple(x.contiguous(memory_format=memory) for x in inputs)
        yield f"torch {layout}", call_of(model, inputs, mode), None
        if compiled:
            fast = torch.compile(copy.deepcopy(model))
            yield f"compile {layout}", call_of(fast, inputs, mode), None
        for form in FORMS if mode == "inference" else POLICIES:
            ours, frozen = copy.deepcopy(model), form == FROZEN
            policy = "auto" if frozen else form
            report = mbm_kernels.optimize(
                ours, mode=mode, policy=policy, sample_input=inputs, freeze=frozen
            )
            yield f"{form} {layout}", call_of(ours, inputs, mode), report


def measure(
    entry: Entry, batch: int, mode: str, compiled: bool, seconds: float, peers: bool = False
) -> dict[str, Any]:
    """Milliseconds of every form and engine, what was replaced, and the engines' errors."""
    started = time.perf_counter()
    calls: dict[str, Call] = {}
    row: dict[str, Any] = {"model": entry.name, "B": batch, "mode": mode}
    for name, call, report in forms(entry, batch, mode, compiled):
        calls[name] = call
        if report is not None:
            row[f"replaced {name}"], row[f"kept {name}"] = len(report.replaced), len(report.kept)
            if name == "auto NCHW":
                row["why"] = reasons(report)
    if peers and mode == "inference":
        model = engines.Model(prepared(entry, mode), entry.inputs(batch))
        found = engines.sessions(model, model.truth(), compiled=False)
        calls |= found.calls()
        row["engines"] = {name: asdict(measured) for name, measured in found.measured.items()}
        row["no_engines"] = found.missing
    row["parity"] = parity(entry, mode)
    if row["parity"] == "ok":
        one = torch.get_num_threads() == 1
        taken = timing.interleave(
            calls,
            seconds,
            min_rounds=MIN_ROUNDS,
            max_rounds=MAX_ROUNDS,
            sampler=timing.cpu_sample if one else timing.sample,
            settle_seconds=timing.SETTLE_SECONDS if row.get("engines") else 0.0,
        )
        row["ms"] = {name: round(Summary.of(t).median_ms, 4) for name, t in taken.items()}
    return row | {"seconds": round(time.perf_counter() - started)}


def reasons(report: mbm_kernels.Report) -> dict[str, int]:
    """Why modules were kept, the commonest reason first."""
    slower = re.compile(r"predicted [\d.]+x of PyTorch.*")
    said = [slower.sub("predicted to be slower", row.reason) for row in report.kept]
    return dict(Counter(said).most_common())


def parity(entry: Entry, mode: str) -> str:
    """ "ok", or the first row that is not."""
    model, inputs = prepared(entry, mode), entry.inputs(2)
    model.eval()  # a BatchNorm's statistics of a small batch are a source of errors of their own
    mbm_kernels.optimize(model, mode=mode, policy="auto", sample_input=inputs)
    found = mbm_kernels.check_parity(model, *inputs, backward=mode == "training")
    return "ok" if found.ok else next(str(r) for r in found.rows if not r.ok)


def times(row: dict[str, Any], *forms: str) -> dict[str, float]:
    """Milliseconds of these forms, in each layout that was timed."""
    return {name: ms for name, ms in row["ms"].items() if name.partition(" ")[0] in forms}


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """PyTorch's fastest form over our fastest layout, by our form as far as it was timed.

    A model of which nothing was replaced is PyTorch's, and so is its time.
    """

    def taken(name: str, ms: float) -> float:
        as_it_was = row.get(f"replaced {name}") == 0
        found: float = row["ms"][f"torch {name.partition(' ')[2]}"] if as_it_was else ms
        return found

    def least(*kinds: str) -> float:
        return min(taken(name, ms) for name, ms in times(row, *kinds).items())

    stock = least("torch", "compile")
    return {form: stock / least(form) for form in FORMS if times(row, form)}


def engine(row: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest engine and its time over that of our faster layout, frozen as its weights are; of
    a row without that, by "auto"."""
    timed = {name: row["ms"][name] for name in row.get("engines", {}) if name in row["ms"]}
    if not timed:
        return None
    best = min(timed, key=timed.__getitem__)
    ours = min((times(row, FROZEN) or times(row, "auto")).values())
    return best, timed[best] / ours


def cells(row: dict[str, Any]) -> list[str]:
    head = [row["model"], str(row["B"])]
    if "ms" not in row:
        return [*head, "", row["parity"]]
    stock = times(row, "torch", "compile")
    best = min(stock, key=stock.__getitem__)
    replaced, kept = row["replaced auto NCHW"], row["kept auto NCHW"]
    of_forms = ratios(row)
    found = [f"{of_forms[form]:.2f}" if form in of_forms else "" for form in FORMS]
    beside = engine(row)
    found.append("" if beside is None else f"{beside[0]} {beside[1]:.2f}")
    return [*head, f"{replaced} of {replaced + kept}", best, f"{stock[best]:.2f}", *found]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="models; default: all")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="default: 1 and 8")] = None,
    mode: Annotated[list[str] | None, typer.Option(help="default: both")] = None,
    threads: Annotated[int, typer.Option(help="1: CPU time of the process")] = 1,
    seconds: Annotated[float, typer.Option(help="of a model, about")] = 6.0,
    peers: Annotated[bool, typer.Option("--peers", help="inference engines, too")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile, too")] = False,
    save: Annotated[bool, typer.Option(help="write the rows into results/<device>/")] = False,
) -> None:
    machine.run_in_heap("warm", "benchmarks.zoo")
    torch.set_num_threads(threads)
    isa.check(isa.record())
    unknown = sorted(set(names or ()) - set(zoo_models.ENTRIES))
    if unknown:
        raise typer.BadParameter(f"got {unknown}; expected some of {sorted(zoo_models.ENTRIES)}")
    facts = {"heap": machine.heap(), "threads": threads, "compiled": compiled}
    path = results.new_study(HERE / "results", "zoo", go_on=True, **facts) if save else None
    console = Console(width=120)
    for which in mode or MODES:
        table = Table(title=f"{machine.device()}: {which}, {threads} thread(s), warm heap")
        for name in COLUMNS:
            table.add_column(name, justify="right" if name in ("B", "ms", *FORMS) else "left")
        for entry in (zoo_models.ENTRIES[n] for n in names or zoo_models.ENTRIES):
            if (package := entry.missing()) is not None:
                console.print(f"{entry.name}: {package} is not installed", style="yellow")
                continue
            for size in batch or (1, 8):
                row = measure(entry, size, which, compiled, seconds, peers)
                if path is not None:
                    with path.open("a") as file:
                        now = datetime.now(UTC).isoformat(timespec="seconds")
                        file.write(json.dumps(row | {"time": now}) + "\n")
                table.add_row(*cells(row))
                console.print(*cells(row), style="dim")
        console.print(table)
    if path is not None:
        console.print(str(path))


if __name__ == "__main__":
    typer.run(main)
