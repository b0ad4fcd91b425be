"""Two towers of this package's layers against the same model of stock layers.

forward+backward is a training step's loss and gradients, without the optimiser, which is the same
stock code on both sides; forward is what an index and a query need, the embeddings of images and of
texts. Texts have drawn lengths: stock layers run all of them to T or take a packed sequence.
"""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pack_padded_sequence

from mbm_kernels.bench import BOTH, FORWARD, Benchmark, Case, Form, parameters
from mbm_kernels.bench.cli import run_script
from mbm_kernels.models import TwoTower, TwoTowerConfig

WIDE = {"channels": (32, 96, 160), "features": 192, "embedding": 96, "hidden": 320}
SHORTEST = 6  # of a text


def model_of(case, layers):
    config = TwoTowerConfig(**{"image_size": 64, **case.options})
    return TwoTower(case.sizes["V"], config=config, layers=layers)


def make(case, generator):
    b, t, v = (case.sizes[letter] for letter in "BTV")
    inputs = parameters.drawn(lambda: model_of(case, "stock"), generator)
    inputs["images"] = torch.rand(b, 3, 64, 64, generator=generator) * 2 - 1
    inputs["tokens"] = torch.randint(4, v, (b, t), generator=generator)
    inputs["lengths"] = torch.randint(SHORTEST, t + 1, (b,), generator=generator)
    return {**inputs, "case": case}


class TrainingStep(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, tokens, lengths):
        return self.model.loss(*self.model(images, tokens, lengths))


def last_of_packed(gru, x, lengths):
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return gru(packed)[1][-1]


def build_from(layers, channels_last=False, packed=False):
    def build(inputs):
        case = inputs["case"]
        model = parameters.holding(model_of(case, layers), inputs, inputs["images"])
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        if packed:
            model.text_encoder.sequence.last_state = last_of_packed
        called = TrainingStep(model) if case.passes == (BOTH,) else model.eval()
        return called, {name: inputs[name] for name in ("images", "tokens", "lengths")}

    return build


def stock(case):
    build = build_from("stock")
    return {
        "eager": Form(build),
        "eager channels_last": Form(build_from("stock", channels_last=True)),
        "eager packed": Form(build_from("stock", packed=True)),
        "compile": Form(build, compile=True),
    }


def work(case, which):
    b, t = case.sizes["B"], case.sizes["T"]
    with torch.device("meta"):
        model = model_of(case, "stock")
        images, tokens = torch.empty(b, 3, 64, 64), torch.zeros(b, t, dtype=torch.int64)
        lengths = torch.ones(b, dtype=torch.int64)

    def run():
        if which == BOTH:
            TrainingStep(model)(images, tokens, lengths).backward()
        else:
            model(images, tokens, lengths)

    return parameters.work(model, run, images.numel(), which == BOTH)


def cases():
    for options, size in (({}, "default"), (WIDE, "wide")):
        for which, what in ((BOTH, "training"), (FORWARD, "embedding")):
            yield Case(
                {"B": 64, "T": 20, "V": 2000},
                options,
                f"{size} {what}",
                passes=(which,),
                quick=size == "default",
                check={"B": 3},
            )


BENCHMARK = Benchmark(
    op="two_tower",
    cases=list(cases()),
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
