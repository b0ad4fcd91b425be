"""What a call costs beside its arithmetic: tiny cases of every operation and module against stock.

    python -m benchmarks.study_overhead [NAME ...] [--seconds 0.5] [--save]

In each round every form of a case runs for a few calls, one form after the other, the order turned
from round to round, on one thread; inputs are made before. The time is the process's CPU time, in
which other processes do not count. In the table stand the median of each form and the median over
the rounds of ours less stock, which is what a good engineer would write with torch alone;
"training" is a forward and a backward. A module stands for torch's own: "auto=torch" is what it
costs where the choice is PyTorch. `--save` writes results/<device>/<date>-<commit>-overhead.jsonl.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import mbm_kernels
from mbm_kernels import nn as ours
from mbm_kernels._core import dispatch, timing
from mbm_kernels.bench import results
from mbm_kernels.ops.linear_topk import linear_topk

HERE = Path(__file__).resolve().parent
Form = Callable[[], Any]
Given = tuple[str, tuple[Tensor, ...], Form, Callable[[str], Any]]

# Microseconds: of a call by kernels without gradients; beyond stock in training, of the torch
# backend, and of a module whose choice is PyTorch.
CALL = {"conv_bias_act": 22, "gru": 20, "additive_attention": 22}
OTHER_CALL, TRAINING, TORCH, STOCK_SERVES = 25, 15, 5, 3


@dataclass(frozen=True)
class Row:
    """Microseconds of a form and of stock; `over` is the median of their differences."""

    name: str
    form: str
    training: bool
    stock: float
    ours: float
    over: float
    goal: str
    reached: bool


@dataclass(frozen=True)
class Case:
    """A stock form and ours of the same inputs, by the name of each."""

    name: str
    stock: Form
    ours: dict[str, Form]
    leaves: tuple[Tensor, ...]

    def trained(self, form: Form) -> Form:
        """`form` and the gradients by its leaves, from a dense gradient of its first result."""
        grad = torch.ones_like(self._first(form()))

        def run() -> None:
            torch.autograd.grad(self._first(form()), self.leaves, grad, allow_unused=True)

        return run

    @staticmethod
    def _first(found: Any) -> Any:
        return found[0] if isinstance(found, tuple) else found


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def operations() -> Iterator[Given]:
    """Names, leaves, stock forms and ours, which take a backend."""
    x, weight, bias = leaf(1, 4, 8, 8), leaf(4, 4, 3, 3), leaf(4)
    yield (
        "conv_bias_act",
        (x, weight, bias),
        lambda: torch.relu_(F.conv2d(x, weight, bias, 1, 1)),
        lambda backend: mbm_kernels.conv_bias_act(
            x, weight, bias, padding=1, activation="relu", backend=backend
        ),
    )
    steps, state = leaf(2, 1, 8), leaf(1, 8)
    cell = tuple(leaf(*shape) for shape in ((24, 8), (24, 8), (24,), (24,)))
    yield (
        "gru",
        (steps, state, *cell),
        lambda: torch.gru(
            steps, state.unsqueeze(0), cell, True, 1, 0.0, torch.is_grad_enabled(), False, False
        ),
        lambda backend: mbm_kernels.gru(steps, state, *cell, backend=backend),
    )
    yield (
        "gru_cell",
        (state, *cell),
        lambda: torch.gru_cell(steps[0], state, *cell),
        lambda backend: mbm_kernels.gru_cell(steps[0], state, *cell, backend=backend),
    )
    query, key, value, v = leaf(1, 2, 8), leaf(1, 4, 8), leaf(1, 4, 8), leaf(8)

    def additive() -> Any:
        scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ v
        weights = torch.softmax(scores, -1)
        return weights @ value, weights

    yield (
        "additive_attention",
        (query, key, value, v),
        additive,
        lambda backend: mbm_kernels.additive_attention(query, key, value, v, backend=backend),
    )
    heads = tuple(leaf(1, 2, n, 8) for n in (2, 4, 4))
    yield (
        "cross_attention",
        heads,
        lambda: F.scaled_dot_product_attention(*heads),
        lambda backend: mbm_kernels.cross_attention(*heads, backend=backend),
    )
    parts, joint = (leaf(4, 8), leaf(4, 8)), leaf(8, 16)
    yield (
        "concat_linear",
        (*parts, joint),
        lambda: F.linear(torch.cat(parts, -1), joint),
        lambda backend: mbm_kernels.concat_linear(parts, joint, backend=backend),
    )
    yield from losses()


def losses() -> Iterator[Given]:
    hidden, head, target = leaf(4, 8), leaf(16, 8), torch.arange(4)
    yield (
        "linear_cross_entropy",
        (hidden, head),
        lambda: F.cross_entropy(F.linear(hidden, head), target),
        lambda backend: mbm_kernels.linear_cross_entropy(hidden, head, target, backend=backend),
    )
    yield (
        "linear_topk",
        (hidden, head),
        lambda: torch.log_softmax(F.linear(hidden, head), -1).topk(2),
        lambda backend: linear_topk(hidden, head, k=2, backend=backend),
    )
    teacher = torch.randn(4, 16)

    def distillation() -> Any:
        logits = F.linear(hidden, head)
        soft = F.kl_div(
            F.log_softmax(logits, -1),
            F.log_softmax(teacher, -1),
            reduction="batchmean",
            log_target=True,
        )
        return 0.5 * F.cross_entropy(logits, target) + 0.5 * soft

    yield (
        "linear_distillation_loss",
        (hidden, head),
        distillation,
        lambda backend: mbm_kernels.linear_distillation_loss(
            hidden, head, target, teacher_logits=teacher, backend=backend
        ),
    )
    image, text, scale = leaf(4, 8), leaf(4, 8), torch.tensor(10.0)

    def infonce() -> Tensor:
        logits, pairs = scale * image @ text.T, torch.arange(4)
        return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2

    yield (
        "contrastive_loss",
        (image, text),
        infonce,
        lambda backend: mbm_kernels.contrastive_loss(image, text, scale, backend=backend),
    )


def modules() -> Iterator[Given]:
    def pair(name: str, stock: nn.Module, *inputs: Tensor, **options: Any) -> Given:
        leaves = (*{id(x): x for x in inputs}.values(), *stock.parameters())
        kind, arguments = options.pop("kind", getattr(ours, name)), options.pop("arguments")
        mine = {}
        for backend in ("auto", "cpu"):
            mine[backend] = kind(*arguments, **options, backend=backend)
            for path, parameter in stock.named_parameters():  # one leaf for all
                owner, _, attribute = path.rpartition(".")
                mine[backend].get_submodule(owner)._parameters[attribute] = parameter
        return f"nn.{name}", leaves, lambda: stock(*inputs), lambda b: mine[b](*inputs)

    x, row = leaf(1, 4, 8, 8), leaf(1, 4, 16)
    yield pair("Conv2d", nn.Conv2d(4, 4, 3, padding=1), x, arguments=(4, 4, 3), padding=1)
    yield pair("Conv1d", nn.Conv1d(4, 4, 3, padding=1), row, arguments=(4, 4, 3), padding=1)
    steps = leaf(2, 1, 8)
    yield pair("GRU", nn.GRU(8, 8), steps, arguments=(8, 8))
    yield pair("GRUCell", nn.GRUCell(8, 8), leaf(1, 8), leaf(1, 8), arguments=(8, 8))
    sequence, memory = leaf(2, 1, 8), leaf(2, 1, 8)
    attention = nn.MultiheadAttention(8, 2)
    yield pair("MultiheadAttention", attention, *[sequence] * 3, arguments=(8, 2))
    name, *rest = pair("MultiheadAttention", attention, sequence, memory, memory, arguments=(8, 2))
    yield f"{name}, memory", *rest


def fused_modules() -> Iterator[Given]:
    """Modules that torch has not: their stock form is a good engineer's."""
    x, conv = leaf(1, 4, 8, 8), nn.Conv2d(4, 4, 3, padding=1)
    act = {b: ours.ConvBiasAct(4, 4, 3, padding=1, activation="relu", backend=b) for b in FORMS}
    parts, joint = (leaf(4, 8), leaf(4, 8)), nn.Linear(16, 8)
    linear = {b: ours.ConcatLinear((8, 8), 8, backend=b) for b in FORMS}
    for stock, made in ((conv, act), (joint, linear)):
        for module in made.values():
            module._parameters.update(stock._parameters)  # type: ignore[attr-defined]
    leaves = (x, *conv.parameters())
    yield "nn.ConvBiasAct", leaves, lambda: torch.relu_(conv(x)), lambda b: act[b](x)
    leaves = (*parts, *joint.parameters())
    yield (
        "nn.ConcatLinear",
        leaves,
        lambda: joint(torch.cat(parts, -1)),
        lambda b: linear[b](*parts),
    )


FORMS = ("auto", "torch", "cpu")


def cases(wanted: list[str]) -> Iterator[Case]:
    def called(form: Any, backend: str) -> Form:
        return lambda: form(backend)

    groups = ((operations(), FORMS), (fused_modules(), FORMS), (modules(), ("auto=torch", "cpu")))
    for group, names in groups:
        for name, leaves, stock, form in group:
            if wanted and name not in wanted:
                continue
            mine = {b: called(form, b.partition("=")[0]) for b in names}
            # Each form is called by one function more, so that neither has a frame less.
            yield Case(name, lambda stock=stock: stock(), mine, leaves)  # type: ignore[misc]


def measured(forms: list[Form], seconds: float) -> list[list[float]]:
    """Microseconds of CPU time of a call of each form, in each round."""
    for form in forms:
        for _ in range(20):
            form()
    found: list[list[float]] = [[] for _ in forms]
    turn, end, calls = 0, time.monotonic() + seconds, 20
    while turn < 10 or time.monotonic() < end:
        for i in range(len(forms)):
            at = (i + turn) % len(forms)
            found[at].append(timing.cpu_sample(forms[at], calls) / 1e3)
        turn += 1
    return found


def goal(case: Case, form: str, training: bool, mine: float, over: float) -> tuple[str, bool]:
    """What is aimed at, and whether it is reached."""
    if form == "auto=torch":
        return f"over {STOCK_SERVES}", over <= STOCK_SERVES
    if form == "torch":
        return f"over {TORCH}", over <= TORCH
    if training:
        return f"over {TRAINING}", over <= TRAINING
    most = CALL.get(case.name, OTHER_CALL)
    return ("", True) if case.name.startswith("nn.") else (f"call {most}", mine <= most)


def rows_of(case: Case, seconds: float) -> Iterator[Row]:
    for training in (False, True):
        if training and case.name == "linear_topk":
            continue
        for served in (True, False):  # whether "auto" means PyTorch
            names = [name for name in case.ours if (name == "auto=torch") == served]
            forms = [case.stock, *(case.ours[name] for name in names)]
            context = dispatch.preferring("torch") if served else nullcontext()
            if not names:
                continue
            with torch.set_grad_enabled(training), context:
                forms = [case.trained(f) for f in forms] if training else forms
                stock, *times = measured(forms, seconds)
            for name, mine in zip(names, times, strict=True):
                over = statistics.median(m - s for m, s in zip(mine, stock, strict=True))
                middle = statistics.median(mine)
                wanted = goal(case, name, training, middle, over)
                numbers = (round(n, 2) for n in (statistics.median(stock), middle, over))
                yield Row(case.name, name, training, *numbers, *wanted)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="operations or modules")] = None,
    seconds: Annotated[float, typer.Option(help="of all forms of a case, each pass")] = 0.5,
    save: Annotated[bool, typer.Option("--save", help="write the rows")] = False,
) -> None:
    torch.set_num_threads(1)
    columns = "".join(f"{c:>9}" for c in ("stock", "ours", "over"))
    print(f"{'operation or module':<28}{'form':<12}{'pass':<10}{columns}  goal, us")
    found = []
    for case in cases(names or []):
        for row in rows_of(case, seconds):
            found.append(row)
            numbers = "".join(f"{n:9.1f}" for n in (row.stock, row.ours, row.over))
            which = "training" if row.training else "no_grad"
            said = f"{row.goal}{'' if row.reached else ': missed'}"
            print(f"{row.name:<28}{row.form:<12}{which:<10}{numbers}  {said}", flush=True)
    if save:
        path = results.new_study(HERE / "results", "overhead", threads=1)
        with path.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in found)
        print(path)


if __name__ == "__main__":
    typer.run(main)
