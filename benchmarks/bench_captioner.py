"""The captioner of this package's layers against the same model of stock layers.

forward+backward is a training step's loss and gradients; the optimiser, the same stock code on both
sides, is left out. "captioning" decodes greedily, every caption to its full length.
"""

from pathlib import Path

import torch

from mbm_kernels.bench import BOTH, FORWARD, Benchmark, Case, Form, eager_and_compiled
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


def build_from(layers, channels_last=False):
    def build(inputs):
        model = with_parameters(inputs, layers)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        if "tokens" not in inputs:
            length = inputs["case"].sizes["T"]

            def caption(images):
                return torch.tensor(model.generate(images, max_length=length), dtype=images.dtype)

            return caption, {"images": inputs["images"]}
        loss = losses_named(layers).cross_entropy

        def step(images, tokens):
            hidden = model(images, tokens[:, :-1]).hidden
            return loss(
                hidden, model.head.weight, tokens[:, 1:], bias=model.head.bias, ignore_index=0
            )

        return step, {"images": inputs["images"], "tokens": inputs["tokens"]}

    return build


def definition(**inputs):
    step, arguments = build_from("stock")(inputs)
    return step(**arguments)


def stock(case):
    # The model itself converts its pictures; only its weights differ between the two layouts.
    forms = {"eager": Form(build_from("stock")), "eager channels_last": Form(last)}
    compiled = eager_and_compiled(build_from("stock"))["compile"]
    return forms | ({"compile": compiled} if case.passes == (BOTH,) else {})


def last(inputs):
    return build_from("stock", channels_last=True)(inputs)


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
                check={"B": 4},
            )


BENCHMARK = Benchmark(
    op="captioner",
    cases=[*cases("teacher", False), *cases("student", True)],
    make=make,
    stock=stock,
    function=build_from("mbm"),
    reference=definition,
    diff=parameters,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
