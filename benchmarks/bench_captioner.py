"""The captioner of this package's layers against the same model of stock layers.

forward+backward is a training step's loss and gradients; the optimiser, the same stock code on both
sides, is left out. "captioning" decodes greedily, every caption to its full length; the steps of
search alone are bench_decode_step.py's.
"""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from mbm_kernels.bench import BOTH, FORWARD, Benchmark, Case, Form, Work
from mbm_kernels.bench.cli import run_script
from mbm_kernels.bench.parameters import PREFIX, WINOGRAD_SAVES, holding, names, reference_of
from mbm_kernels.captioning.losses import losses_named
from mbm_kernels.models import Captioner
from mbm_kernels.models.generation import search

IMAGE = 64
OURS = ("beam", "clear")  # options of the search, not of the model


def model_of(case, layers):
    options = {name: value for name, value in case.options.items() if name not in OURS}
    return Captioner(case.sizes["V"], layers=layers, **{"image_size": IMAGE, **options})


def make(case, generator):
    b, t, v = (case.sizes[letter] for letter in "BTV")
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = model_of(case, "stock")
    side = model.image_size
    images = torch.rand(b, 3, side, side, generator=generator) * 2 - 1
    inputs = {PREFIX + name: p.detach() for name, p in model.named_parameters()}
    if case.passes == (BOTH,):
        inputs["tokens"] = torch.randint(3, v, (b, t + 1), generator=generator)
    else:
        # Never the end: each caption is decoded to T words.
        inputs[f"{PREFIX}head.bias"][model.eos_id] = -1e4
        if case.options.get("clear"):  # a best word that 16-bit floats do not change
            inputs[f"{PREFIX}head.bias"][7] = 100.0
    return {**inputs, "images": images, "case": case}


class TrainingStep(torch.nn.Module):
    def __init__(self, model, layers):
        super().__init__()
        self.model, self.loss = model, losses_named(layers).cross_entropy

    def forward(self, images, tokens):
        hidden, head = self.model(images, tokens[:, :-1]).hidden, self.model.head
        return self.loss(hidden, head.weight, tokens[:, 1:], bias=head.bias, ignore_index=0)


class Captioning:
    def __init__(self, model, length, beam):
        self.model, self.length, self.beam = model.eval(), length, beam

    def words(self, images):
        return self.model.generate(images, max_length=self.length, beam=self.beam)

    def __call__(self, images):
        return torch.tensor(self.words(images), dtype=images.dtype)

    def compiled(self):
        """The search itself is Python; the encoder and the step are compiled."""
        self.model.encode = torch.compile(self.model.encode, dynamic=False)
        self.model.step = torch.compile(self.model.step, dynamic=False)
        return self


class Recorded(Captioning):
    """The stock model's loop as a CUDA graph too."""

    def words(self, images):
        encoded = self.model.encode(images)
        return search(self.model, encoded, self.length, self.beam, False, recorded=True)[0]


def build_from(layers, channels_last=False, captioning=Captioning):
    def build(inputs):
        model = holding(model_of(inputs["case"], layers), inputs, inputs["images"])
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        if "tokens" in inputs:
            named = {"images": inputs["images"], "tokens": inputs["tokens"]}
            return TrainingStep(model, layers), named
        case = inputs["case"]
        search_of = captioning(model, case.sizes["T"], case.options.get("beam", 1))
        return search_of, {"images": inputs["images"]}

    return build


def stock(case):
    # The model converts its images itself; only its weights differ between the two layouts.
    build = build_from("stock")
    forms = {"eager": Form(build), "eager channels_last": Form(build_from("stock", True))}
    if case.passes == (BOTH,):
        return forms | {"compile": Form(build, compile=True)}
    if case.options.get("clear"):  # only on a GPU
        forms["graph"] = Form(build_from("stock", captioning=Recorded))
    return forms | {"compile": Form(build, compile=True, compiler=Captioning.compiled)}


def work(case, which):
    """Products counted by torch on meta tensors; images and weights once, gradients once more."""
    b, t = case.sizes["B"], case.sizes["T"]
    with torch.device("meta"):
        model = model_of(case, "stock")
        images = torch.empty(b, 3, model.image_size, model.image_size)
        words = torch.zeros(b, t + 1, dtype=torch.int64)
        step = torch.zeros(b, case.options.get("beam", 1), dtype=torch.int64)
        state = torch.empty(*step.shape, model.hidden_size)
    parameters = sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        if which == BOTH:
            TrainingStep(model, "stock")(images, words).backward()
        else:
            encoded = model.encode(images)
    operations = counter.get_total_flops()
    # Every convolution is 3x3 with stride 1: Winograd's takes a quarter of the products.
    counts = counter.get_flop_counts()["Global"]
    saved = WINOGRAD_SAVES * sum(n for name, n in counts.items() if "convolution" in str(name))
    if which == BOTH:
        moved = images.numel() + 3 * parameters
        return Work(operations, 4 * moved, fewest=operations - saved)
    with FlopCounterMode(display=False) as one:
        model.step(encoded, step, state)
    operations += t * one.get_total_flops()
    return Work(operations, 4 * (images.numel() + parameters), fewest=operations - saved)


def sizes(b, v=2000):
    return {"B": b, "T": 16, "V": v}


def cases(size, quick):
    for attention in ("additive", "dot"):
        options = {"size": size, "attention": attention}
        # Convolutions take most of the check's time in float64, and each image the same.
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
    gpu_cases=[
        Case(
            sizes(64, 10000),
            {"size": "teacher", "beam": 5, "clear": True},
            "captioning, beam 5",
            passes=(FORWARD,),
            check={"B": 2},
        ),
        Case(
            sizes(256),
            {"size": "teacher", "image_size": 128},
            "training at 128x128",
            passes=(BOTH,),
            quick=True,
            check={"B": 2},
        ),
    ],
    make=make,
    stock=stock,
    work=work,
    function=build_from("mbm"),
    reference=reference_of(build_from),
    diff=names,
    positive=False,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
