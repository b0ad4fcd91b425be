"""The captioner of this package's layers against the same model of stock layers.

forward+backward is a training step's loss and gradients; the optimiser, the same stock code on both
sides, is left out. "captioning" decodes greedily, every caption to its full length.
"""

from pathlib import Path

import torch

from mbm_kernels.bench import BOTH, FORWARD, Benchmark, Case, Form
from mbm_kernels.bench.cli import run_script
from mbm_kernels.captioning.losses import losses_named
from mbm_kernels.models import Captioner

IMAGE, PREFIX = 64, "model."


def model_of(case, layers):
    return Captioner(case.sizes["V"], layers=layers, image_size=IMAGE, **case.options)


def make(case, generator):
    b, t, v = (case.sizes[letter] for letter in "BTV")
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = model_of(case, "stock")
    images = torch.rand(b, 3, IMAGE, IMAGE, generator=generator) * 2 - 1
    inputs = {PREFIX + name: p.detach() for name, p in model.named_parameters()}
    if case.passes == (BOTH,):
        inputs["tokens"] = torch.randint(3, v, (b, t + 1), generator=generator)
    else:
        # Never the end: each caption is decoded to T words.
        inputs[f"{PREFIX}head.bias"][model.eos_id] = -1e4
    return {**inputs, "images": images, "case": case}


def with_parameters(inputs, layers):
    model = model_of(inputs["case"], layers).to(inputs["images"].dtype)
    for name, parameter in inputs.items():
        if name.startswith(PREFIX):
            path, _, leaf = name.removeprefix(PREFIX).rpartition(".")
            setattr(model.get_submodule(path), leaf, parameter)
    return model


class TrainingStep(torch.nn.Module):
    def __init__(self, model, layers):
        super().__init__()
        self.model, self.loss = model, losses_named(layers).cross_entropy

    def forward(self, images, tokens):
        hidden, head = self.model(images, tokens[:, :-1]).hidden, self.model.head
        return self.loss(hidden, head.weight, tokens[:, 1:], bias=head.bias, ignore_index=0)


class Captioning:
    def __init__(self, model, length):
        self.model, self.length = model.eval(), length

    def __call__(self, images):
        words = self.model.generate(images, max_length=self.length)
        return torch.tensor(words, dtype=images.dtype)

    def compiled(self):
        """The search itself is Python; the encoder and the step are compiled."""
        self.model.encode = torch.compile(self.model.encode, dynamic=False)
        self.model.step = torch.compile(self.model.step, dynamic=False)
        return self


def build_from(layers, channels_last=False):
    def build(inputs):
        model = with_parameters(inputs, layers)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        if "tokens" in inputs:
            named = {"images": inputs["images"], "tokens": inputs["tokens"]}
            return TrainingStep(model, layers), named
        return Captioning(model, inputs["case"].sizes["T"]), {"images": inputs["images"]}

    return build


def definition(**inputs):
    step, arguments = build_from("stock")(inputs)
    return step(**arguments)


def stock(case):
    # The model converts its pictures itself; only its weights differ between the two layouts.
    build = build_from("stock")
    forms = {"eager": Form(build), "eager channels_last": Form(build_from("stock", True))}
    if case.passes == (BOTH,):
        return forms | {"compile": Form(build, compile=True)}
    return forms | {"compile": Form(build, compile=True, compiler=Captioning.compiled)}


def parameters(inputs):
    return [name for name in inputs if name.startswith(PREFIX)]


def sizes(b):
    return {"B": b, "T": 16, "V": 2000}


def cases(size, quick):
    for attention in ("additive", "dot"):
        options = {"size": size, "attention": attention}
        # Convolutions take most of the check's time in float64, and each picture the same.
        for which, what in ((BOTH, "training"), (FORWARD, "captioning")):
            yield Case(
                sizes(32),
                options,
                f"{size} {attention} {what}",
                passes=(which,),
                quick=quick and attention == "additive",
                check={"B": 2},
            )


BENCHMARK = Benchmark(
    op="captioner",
    cases=[*cases("teacher", False), *cases("student", True)],
    make=make,
    stock=stock,
    function=build_from("mbm"),
    reference=definition,
    diff=parameters,
    positive=False,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
