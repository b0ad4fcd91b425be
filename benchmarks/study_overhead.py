"""What a call costs beside its arithmetic: tiny cases of every operation and module against stock.

    python -m benchmarks.study_overhead [NAME ...] [--rounds 60] [--calls 200]

In each round every form of a case runs `calls` times, one form after the other, the order turned
from round to round, on one thread. The time is the process's CPU time, in which other processes do
not count; of the rounds the median stands in the table. "over" is ours less stock, which is what a
good engineer would write with torch alone; "training" is a forward and a backward.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import mbm_kernels
from mbm_kernels import nn as ours

BACKENDS = ("auto", "torch", "cpu")
Form = Callable[[], Any]
Given = tuple[str, tuple[Tensor, ...], Form, Callable[[str], Any]]


@dataclass(frozen=True)
class Case:
    """A stock form and ours for one backend, of the same inputs."""

    name: str
    backend: str
    stock: Form
    ours: Form
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
    module = ours.LinearDistillationLoss()
    yield (
        "nn.LinearDistillationLoss",
        (hidden, head),
        distillation,
        chosen(module, lambda: module(hidden, head, target, teacher_logits=teacher)),
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


def chosen(module: Any, form: Form) -> Callable[[str], Any]:
    """A module's form that takes a backend: each call sets it, in 0.1 us."""

    def run(backend: str) -> Any:
        module.__dict__["backend"] = backend
        return form()

    return run


def modules() -> Iterator[Given]:
    def pair(stock: nn.Module, mine: nn.Module, *inputs: Any, act: bool = False) -> Any:
        leaves = (*(i for i in inputs if isinstance(i, Tensor)), *stock.parameters())
        mine.load_state_dict(stock.state_dict())
        for name, parameter in stock.named_parameters():  # one leaf for both
            owner, _, attribute = name.rpartition(".")
            mine.get_submodule(owner)._parameters[attribute] = parameter  # type: ignore[assignment]
        form = (lambda: torch.relu_(stock(*inputs))) if act else (lambda: stock(*inputs))
        return f"nn.{type(mine).__name__}", leaves, form, chosen(mine, lambda: mine(*inputs))

    x = leaf(1, 4, 8, 8)
    yield pair(nn.Conv2d(4, 4, 3, padding=1), ours.Conv2d(4, 4, 3, padding=1), x)
    fused = ours.ConvBiasAct(4, 4, 3, padding=1, activation="relu")
    yield pair(nn.Conv2d(4, 4, 3, padding=1), fused, x, act=True)
    steps = leaf(2, 1, 8)
    yield pair(nn.GRU(8, 8), ours.GRU(8, 8), steps)
    yield pair(nn.GRUCell(8, 8), ours.GRUCell(8, 8), leaf(1, 8), leaf(1, 8))
    sequence = leaf(2, 1, 8)
    stock, mine = nn.MultiheadAttention(8, 2), ours.MultiheadAttention(8, 2)
    yield pair(stock, mine, sequence, sequence, sequence)
    joint, parts = nn.Linear(16, 8), (leaf(4, 8), leaf(4, 8))
    name, leaves, _, form = pair(joint, ours.ConcatLinear((8, 8), 8), *parts)
    yield name, leaves, lambda: joint(torch.cat(parts, -1)), form


def cases(wanted: list[str]) -> Iterator[Case]:
    for name, leaves, stock, form in (*operations(), *modules()):
        if wanted and name not in wanted:
            continue
        for backend in BACKENDS:
            # Each form is called by one function more, so that neither has a frame less.
            def call(form: Any = form, backend: str = backend) -> Any:
                return form(backend)

            def plain(form: Any = stock) -> Any:
                return form()

            yield Case(name, backend, plain, call, leaves)


def measured(forms: list[Form], rounds: int, calls: int) -> list[float]:
    """Median microseconds of CPU time of a call of each form."""
    for form in forms:
        for _ in range(20):
            form()
    found: list[list[float]] = [[] for _ in forms]
    for turn in range(rounds):
        for i in range(len(forms)):
            at = (i + turn) % len(forms)
            form = forms[at]
            start = time.process_time_ns()
            for _ in range(calls):
                form()
            found[at].append((time.process_time_ns() - start) / calls / 1e3)
    return [statistics.median(times) for times in found]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="operations or modules")] = None,
    rounds: Annotated[int, typer.Option(help="of all forms of a case")] = 60,
    calls: Annotated[int, typer.Option(help="of a form in a round")] = 200,
) -> None:
    torch.set_num_threads(1)
    print(f"{'':<28}{'':<8}{'no_grad, us':^27}{'training, us':^27}")
    columns = "".join(f"{c:>9}" for c in ("stock", "ours", "over"))
    print(f"{'operation or module':<28}{'backend':<8}{columns}{columns}")
    for case in cases(names or []):
        with torch.no_grad():
            stock, mine = measured([case.stock, case.ours], rounds, calls)
        row = [stock, mine, mine - stock]
        forms = [case.trained(case.stock), case.trained(case.ours)]
        stock, mine = measured(forms, rounds, calls)
        row += [stock, mine, mine - stock]
        numbers = "".join(f"{number:9.1f}" for number in row)
        print(f"{case.name:<28}{case.backend:<8}{numbers}", flush=True)


if __name__ == "__main__":
    typer.run(main)
