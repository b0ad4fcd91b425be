"""linear_distillation_loss against two linear layers, F.cross_entropy and F.kl_div."""

from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import FORWARD, Benchmark, Case, Form, Work, as_called, eager_and_compiled
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models.captioner_config import SIZES

IGNORE = -100
TEMPERATURE = 2.0


def make(case, generator):
    n, hs, ht, v = (case.sizes[letter] for letter in ("N", "Hs", "Ht", "V"))

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    target = torch.randint(v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < case.options.get("ignored", 0.0)] = IGNORE
    return {
        "student_hidden": randn(n, hs),
        "student_weight": randn(v, hs, scale=hs**-0.5),
        "target": target,
        "student_bias": randn(v, scale=0.1),
        "teacher_hidden": randn(n, ht),
        "teacher_weight": randn(v, ht, scale=ht**-0.5),
        "teacher_bias": randn(v, scale=0.1),
        "temperature": TEMPERATURE,
    }


def losses(logits, teacher, target, temperature):
    """Mean over the rows given, none of them ignored."""
    hard = F.cross_entropy(logits, target)
    soft = temperature**2 * F.kl_div(
        (logits / temperature).log_softmax(-1),
        (teacher / temperature).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    # Training follows the loss; its two parts are logged.
    return (hard + soft) / 2, hard.detach(), soft.detach()


def layers(
    student_hidden,
    student_weight,
    target,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    temperature,
):
    with torch.no_grad():
        teacher = F.linear(teacher_hidden, teacher_weight, teacher_bias)
    logits = F.linear(student_hidden, student_weight, student_bias)
    return losses(logits, teacher, target, temperature)


def kept_rows(student_hidden, student_weight, target, *rest, **named):
    kept = target != IGNORE
    named["teacher_hidden"] = named["teacher_hidden"][kept]
    return layers(student_hidden[kept], student_weight, target[kept], *rest, **named)


def stock(case):
    if case.options.get("ignored"):
        # As many rows are kept in each call, so that compiled code could be reused; the pick of
        # rows by a mask breaks its graph all the same.
        return {
            "eager kept rows": Form(as_called(kept_rows)),
            "compile kept rows": Form(as_called(kept_rows), compile=True),
        }
    return eager_and_compiled(as_called(layers))


def work(case, which):
    n, hs, ht, v = (case.sizes[letter] for letter in ("N", "Hs", "Ht", "V"))
    n = n * (1 - case.options.get("ignored", 0.0))
    floats = (n + v) * (hs + ht) + 2 * v
    if which == FORWARD:
        return Work(2 * n * v * (hs + ht), 4 * floats)
    return Work(2 * n * v * (3 * hs + ht), 4 * (floats + (n + v) * hs))


def sizes(n, hs, ht, v):
    return {"N": n, "Hs": hs, "Ht": ht, "V": v}


BENCHMARK = Benchmark(
    op="linear_distillation_loss",
    cases=[
        Case(sizes(1280, 512, 1024, 10000), check={"N": 160}),
        Case(sizes(1280, 512, 1024, 10000), {"ignored": 0.4}, "40 % ignored", check={"N": 160}),
        Case(
            sizes(512, SIZES["student"].hidden, SIZES["teacher"].hidden, 2000),
            note="captioner",
            quick=True,
            check={"N": 128},
        ),
        Case(sizes(32, 512, 512, 1000), note="as little as auto takes"),
        Case(sizes(8, 512, 1024, 10000), note="few rows"),
    ],
    gpu_cases=[
        Case(sizes(1280, 512, 1024, 10000), quick=True),
        Case(sizes(1280, 512, 1024, 10000), {"ignored": 0.4}, "40 % ignored"),
        Case(sizes(8192, 1024, 2048, 32000)),
    ],
    make=make,
    stock=stock,
    work=work,
    backward_from=1,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
