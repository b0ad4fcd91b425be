"""The multimodal big model of this package's layers against the same model of stock layers.

All four streams and the similarity head; forward+backward is a training step's loss and gradients,
without the optimiser, which is the same stock code on both sides.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from mbm_kernels.bench import BOTH, FORWARD, Benchmark, Case, Form, parameters
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models import MultimodalBigModel, MultimodalConfig

STREAMS = ("image", "words", "color", "time", "word_lengths", "time_lengths")
TIME_FEATURES, BINS = 8, 8


def model_of(case, layers):
    config = MultimodalConfig(vocab_size=case.sizes["V"], time_features=TIME_FEATURES)
    return MultimodalBigModel(config, layers=layers)


def make(case, generator):
    b, t, v = (case.sizes[letter] for letter in "BTV")
    inputs = parameters.drawn(lambda: model_of(case, "stock"), generator)
    inputs["image"] = torch.rand(b, 3, 64, 64, generator=generator) * 2 - 1
    inputs["words"] = torch.randint(4, v, (b, t), generator=generator)
    inputs["color"] = torch.rand(b, BINS, BINS, BINS, generator=generator)
    inputs["time"] = torch.randn(b, t, TIME_FEATURES, generator=generator)
    for name in ("word_lengths", "time_lengths"):
        inputs[name] = torch.randint(6, t + 1, (b,), generator=generator)
    inputs["label"] = torch.randint(2, (b,), generator=generator).float()
    return {**inputs, "case": case}


class Similarity(torch.nn.Module):
    """Logits, or with labels their binary cross-entropy."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, label=None, **streams):
        logits = self.model.similarity(self.model(**streams))
        if label is None:
            return logits
        return F.binary_cross_entropy_with_logits(logits, label)


def build_from(layers, channels_last=False):
    def build(inputs):
        case = inputs["case"]
        model = parameters.holding(model_of(case, layers), inputs, inputs["image"])
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        given = (*STREAMS, "label") if case.passes == (BOTH,) else STREAMS
        called = Similarity(model).train(case.passes == (BOTH,))
        return called, {name: inputs[name] for name in given}

    return build


def stock(case):
    build = build_from("stock")
    return {
        "eager": Form(build),
        "eager channels_last": Form(build_from("stock", channels_last=True)),
        "compile": Form(build, compile=True),
    }


def work(case, which):
    inputs = make(Case({**case.sizes, "B": 1}, {}), torch.Generator())
    b = case.sizes["B"]
    with torch.device("meta"):
        model = model_of(case, "stock")
    given = (*STREAMS, "label") if which == BOTH else STREAMS
    streams = {
        name: torch.empty(b, *inputs[name].shape[1:], dtype=inputs[name].dtype, device="meta")
        for name in given
    }

    def run():
        out = Similarity(model)(**streams)
        if which == BOTH:
            out.backward()

    moved = sum(x.numel() for x in streams.values())
    return parameters.work(model, run, moved, which == BOTH)


BENCHMARK = Benchmark(
    op="multimodal",
    cases=[
        Case(
            {"B": 64, "T": 20, "V": 2000},
            {},
            what,
            passes=(which,),
            quick=True,
            check={"B": 3},
        )
        for which, what in ((BOTH, "training"), (FORWARD, "inference"))
    ],
    make=make,
    stock=stock,
    work=work,
    function=build_from("mbm"),
    reference=parameters.reference_of(build_from),
    diff=parameters.names,
    positive=False,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
