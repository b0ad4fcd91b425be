"""T steps of the captioner's beam search, projected keys and values of the images made before.

The call that is timed prepares the keys for its steps, as `generate` does once for its up to 24; in
the cases "keys kept" that is done before, and what is timed are steps alone. The stock step has
nothing of its keys to prepare but their projection, which is made before in every case.

Without the encoder and without a look at the words on the host, so that both sides can be recorded
as CUDA graphs; the time of a step is a T-th. B images, K hypotheses of each, S places, V words.
"""

from pathlib import Path

import torch

from mbm_kernels.bench import FORWARD, Benchmark, Case, Form, Work
from mbm_kernels.bench.cli import run_script
from mbm_kernels.bench.parameters import PREFIX, holding, names
from mbm_kernels.models import Captioner
from mbm_kernels.models.captioner_config import SIZES
from mbm_kernels.models.decode_graph import STEPS
from mbm_kernels.models.decoding import decoder_for
from mbm_kernels.models.generation import Beam, start
from mbm_kernels.models.image_encoder import STRIDE
from mbm_kernels.models.search_state import EncodedImages, stacked

ENCODED = "encoded."
LIKELIEST = 7  # its logit is far above the others', so that rounding changes no best hypothesis


def model_of(case, layers):
    side = STRIDE * int(case.sizes["S"] ** 0.5)
    return Captioner(case.sizes["V"], layers=layers, image_size=side, size=case.options["size"])


def make(case, generator):
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        model = model_of(case, "stock")
    side = model.image_size
    images = torch.rand(case.sizes["B"], 3, side, side, generator=generator) * 2 - 1
    with torch.no_grad():
        encoded = model.encode(images)
        model.head.bias[LIKELIEST] = 100.0
    inputs = {PREFIX + name: p.detach() for name, p in model.named_parameters()}
    inputs |= {ENCODED + name: x for name, x in encoded._asdict().items()}
    return {**inputs, "case": case}


class Steps(torch.nn.Module):
    def __init__(self, inputs, layers):
        super().__init__()
        case = inputs["case"]
        encoded = EncodedImages(*(inputs[ENCODED + name] for name in EncodedImages._fields))
        model = holding(model_of(case, layers), inputs, encoded.state).eval()
        self.model, self.steps = model, case.sizes["T"]
        self.search = Beam(model, case.sizes["K"])
        with torch.no_grad():
            self.decoder = decoder_for(model, encoded)
            self.prepared = self.decoder.for_steps() if case.options["kept"] else None
            self.carry = start(model, encoded, case.sizes["K"])

    def forward(self):
        """Of the best hypothesis: states [B, H], score [B], weights [T, B, S], words [T, B]."""
        carry, traces, decoder = self.carry, [], self.prepared or self.decoder
        if self.prepared is None and not carry.state.is_cuda:  # a recorded loop reads the keys
            decoder = decoder.for_steps()
        for _ in range(self.steps):
            carry, trace = self.search.step(decoder, carry)
            traces.append(trace)
        trace = stacked(traces)
        words = trace.words[:, :, 0].to(carry.state.dtype)
        return carry.state[:, 0], carry.score[:, 0], trace.weights[:, :, 0], words

    def compiled(self):
        """A step of search at a time: all of them at once would take minutes to compile."""
        self.search.step = torch.compile(self.search.step, dynamic=False)
        return self


def build_from(layers):
    return lambda inputs: (Steps(inputs, layers), {})


def definition(**inputs):
    return Steps(inputs, "stock")()


def stock(case):
    build = build_from("stock")
    return {"eager": Form(build), "compile": Form(build, compile=True, compiler=Steps.compiled)}


def work(case, which):
    b, k, s, t, v = (case.sizes[letter] for letter in "BKSTV")
    size = SIZES[case.options["size"]]
    h, d, a, rows = size.hidden, size.features, size.attention_size, b * k
    # Weights, keys and values once: what fits in a cache is not read again at the next step.
    weights = 6 * h * h + h * a + h * (h + d) + v * (h + 1)
    attended = rows * s * (4 * a + 2 * d)
    moved = weights + b * s * (a + d) + rows * (2 * h + t * (s + 2))
    special = rows * (s * a / 2 + 5 * h + v)  # as bench_additive_attention.py counts a tanh
    return Work(t * (2 * rows * weights + attended), 4 * moved, t * special)


def sizes(b, k, v, s=64, t=STEPS):
    return {"B": b, "K": k, "T": t, "S": s, "V": v}


def case(shape, size, check=None, quick=False, kept=False):
    note = f"{size}, keys kept" if kept else size
    return Case(shape, {"size": size, "kept": kept}, note, quick, (FORWARD,), check or {})


BENCHMARK = Benchmark(
    op="decode_step",
    cases=[
        case(sizes(32, 5, 2000), "student", {"B": 2}),
        case(sizes(32, 5, 2000), "student", {"B": 2}, kept=True),
        case(sizes(32, 5, 2000), "teacher", {"B": 2}),
        case(sizes(32, 5, 2000), "teacher", {"B": 2}, kept=True),
        case(sizes(2, 3, 60, s=16), "student", quick=True),
    ],
    gpu_cases=[case(sizes(64, 5, 10000), "teacher", {"B": 2}, quick=True)],
    make=make,
    stock=stock,
    work=work,
    function=build_from("mbm"),
    reference=definition,
    diff=names,
    positive=False,
)

if __name__ == "__main__":
    run_script(BENCHMARK, Path(__file__).resolve().parent)
