"""contrastive_loss against the logits of all pairs and torch's losses."""

from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import FORWARD, Benchmark, Case, Work, as_called, eager_and_compiled
from mbm_kernels.bench.cli import run_script


def make(case, generator):
    b, d = (case.sizes[letter] for letter in "BD")

    def unit():
        return F.normalize(torch.randn(b, d, generator=generator), dim=-1)

    inputs = {"image": unit(), "text": unit(), "scale": torch.tensor(10.0)}
    if case.options["kind"] == "siglip":
        inputs["bias"] = torch.tensor(-10.0)
    return {**inputs, "kind": case.options["kind"]}


def infonce(image, text, scale, kind):
    logits = (image * scale) @ text.t()
    target = torch.arange(image.size(0), device=image.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def infonce_log_softmax(image, text, scale, kind):
    logits = (image * scale) @ text.t()
    both = logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()
    return -both.mean() / 2


def infonce_logsumexp(image, text, scale, kind):
    """Without log-probabilities of all pairs."""
    logits = (image * scale) @ text.t()
    both = logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()
    return both.mean() / 2


def siglip(image, text, scale, bias, kind):
    logits = torch.addmm(bias, image * scale, text.t())
    signs = 2 * torch.eye(image.size(0), device=image.device) - 1
    return -F.logsigmoid(signs * logits).sum() / image.size(0)


def siglip_flipped(image, text, scale, bias, kind):
    margins = torch.addmm(-bias, image * -scale, text.t())
    margins.diagonal().neg_()
    return -F.logsigmoid(margins).sum() / image.size(0)


def siglip_softplus(image, text, scale, bias, kind):
    """-logsigmoid(m) = softplus(-m), with one sign to turn and none of all losses."""
    negated = torch.addmm(bias, image * scale, text.t())
    negated.diagonal().neg_()
    return F.softplus(negated).sum() / image.size(0)


def stock(case):
    first, *rest = {
        "infonce": (infonce, infonce_log_softmax, infonce_logsumexp),
        "siglip": (siglip, siglip_flipped, siglip_softplus),
    }[case.options["kind"]]
    forms = eager_and_compiled(as_called(first))
    for function in rest:
        name = function.__name__.partition("_")[2]
        variants = eager_and_compiled(as_called(function))
        forms |= {f"{form} {name}": variant for form, variant in variants.items()}
    return forms


def work(case, which):
    b, d = (case.sizes[letter] for letter in "BD")
    operations, floats = 2 * b * b * d, 2 * b * d
    return Work(operations, 4 * floats) if which == FORWARD else Work(3 * operations, 8 * floats)


def sizes(b, d):
    return {"B": b, "D": d}


BENCHMARK = Benchmark(
    op="contrastive_loss",
    cases=[
        Case(sizes(1024, 256), {"kind": "infonce"}, "infonce"),
        Case(sizes(1024, 256), {"kind": "siglip"}, "siglip"),
        Case(sizes(1024, 64), {"kind": "infonce"}, "infonce narrow"),
        Case(sizes(1024, 64), {"kind": "siglip"}, "siglip narrow"),
        Case(sizes(4096, 512), {"kind": "infonce"}, "infonce large"),
        Case(sizes(4096, 512), {"kind": "siglip"}, "siglip large"),
        Case(sizes(256, 512), {"kind": "infonce"}, "infonce medium"),
        Case(sizes(256, 256), {"kind": "siglip"}, "siglip medium"),
        Case(sizes(128, 256), {"kind": "infonce"}, "infonce small", quick=True),
        Case(sizes(128, 256), {"kind": "siglip"}, "siglip small"),
        Case(sizes(64, 512), {"kind": "infonce"}, "infonce tiny"),
        Case(sizes(64, 512), {"kind": "siglip"}, "siglip tiny"),
        Case(sizes(8, 64), {"kind": "infonce"}, "infonce least"),
        Case(sizes(64, 16), {"kind": "siglip"}, "siglip least"),
    ],
    gpu_cases=[
        Case(sizes(4096, 512), {"kind": "infonce"}, "infonce", quick=True),
        Case(sizes(4096, 512), {"kind": "siglip"}, "siglip"),
    ],
    make=make,
    stock=stock,
    work=work,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
