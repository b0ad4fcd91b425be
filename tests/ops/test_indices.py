"""Indices that nobody has looked at: targets, ids and lengths outside of what they may be.

Eager calls on plain tensors raise. Elsewhere values cannot be looked at, and what is outside is
read nowhere and written nowhere: a loss's row becomes NaN, a length counts as the nearest one.
"""

import functools
import importlib
import itertools
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mbm_kernels
from mbm_kernels._core import dispatch
from mbm_kernels._core.op import OPS, as_tuple
from mbm_kernels.testing import suite
from mbm_kernels.testing.suite import map_tensors, with_leaves
from tests.conftest import raises
from tests.gates import record, sanitize
from tests.gates.planting import ROOT

N, H, V, K = 11, 5, 130, 3  # more than a block of 112 classes
T, B, S = 4, 6, 5
IGNORED = -100
STUDENT = ("student_hidden", "student_weight", "student_bias")
# Rows 1 to 6 of a target; others are classes, the last is ignored.
WRONG = (-1, V, V + 5, 2**40, -(2**63), 2**63 - 1)
LENGTHS = (-1, 2**40, -(2**63), 2**63 - 1, 2, 0)


class Marked(torch.Tensor):
    """A subclass that changes nothing."""


def randn(*shape):
    return torch.randn(*shape)


def cross_entropy(**options):
    return {
        "hidden": randn(N, H),
        "weight": randn(V, H),
        "target": torch.arange(N) * 11,
        "bias": randn(V),
        "softcap": 3.0,
        "z_loss": 0.01,
        "label_smoothing": 0.1,
        **options,
    }


def distillation(source, **options):
    teacher = {"teacher_logits": randn(N, V)}
    if source == "hidden":
        teacher = {"teacher_hidden": randn(N, 4), "teacher_weight": randn(V, 4)}
    elif source == "topk":
        log_probs, ids = randn(N, V).log_softmax(-1).topk(options.pop("k", K))
        teacher = {"teacher_topk": (ids, log_probs)}
    return {
        "student_hidden": randn(N, H),
        "student_weight": randn(V, H),
        "student_bias": randn(V),
        "target": torch.arange(N) * 11,
        **teacher,
        "temperature": 2.0,
        **options,
    }


LOSSES = {
    "linear_cross_entropy": (cross_entropy, ("hidden", "weight", "bias")),
    "hidden": (lambda **o: distillation("hidden", **o), STUDENT),
    "logits": (lambda **o: distillation("logits", divergence="jsd", **o), STUDENT),
    "reverse": (lambda **o: distillation("logits", divergence="reverse_kl", **o), STUDENT),
    "hard": (lambda **o: distillation("logits", hard_weight=1.0, **o), STUDENT),
    "soft": (lambda **o: distillation("hidden", hard_weight=0.0, **o), STUDENT),
    "topk": (lambda **o: distillation("topk", **o), STUDENT),
    "topk of all": (lambda **o: distillation("topk", k=V, **o), STUDENT),
}


def op_of(name):
    return name if name in OPS else "linear_distillation_loss"


def sequence(name):
    """Inputs and diff of an operation with lengths."""
    if name.startswith("gru"):
        weights = {"w_ih": randn(9, 4), "w_hh": randn(9, 3), "b_ih": randn(9), "b_hh": randn(9)}
        h0 = randn(B, 3)
        if name == "gru_bidirectional":
            weights |= {f"{n}_reverse": randn(*x.shape) for n, x in weights.items()}
            h0 = randn(2, B, 3)
        inputs = {"x": randn(T, B, 4), "h0": h0, **weights}
    elif name == "additive_attention":
        inputs = {"query": randn(B, T, 7), "key": randn(B, S, 7), "value": randn(B, S, 3)}
        inputs["v"] = randn(7)
    else:
        inputs = {n: randn(B, 2, s, 7) for n, s in (("query", T), ("key", S), ("value", S))}
        inputs["need_weights"] = "heads"
    diff = tuple(n for n, x in inputs.items() if isinstance(x, torch.Tensor))
    return inputs, diff


SEQUENCES = {
    "gru": "lengths",
    "gru_bidirectional": "lengths",
    "additive_attention": "key_lengths",
    "cross_attention": "key_lengths",
}
MODES = ("flops", "subclass", "functorch", "compiled")
# Compilation takes 2 s, the interpreter of Triton as long: the other losses differ in no check.
FEW = ("linear_cross_entropy", "topk", *SEQUENCES)
SLOW = (*((backend, "compiled") for backend in ("cpu", "torch", "reference")),
        *(("triton", mode) for mode in ("flops", "plain")))  # fmt: skip
NEVER = [("triton", mode) for mode in ("subclass", "functorch", "compiled")]


@functools.lru_cache(maxsize=1)
def forget_graphs(*kind):
    """Unless the calls before were of this kind too: their graph takes other values as well."""
    torch._dynamo.reset()


def evaluate(op, inputs, diff, backend, mode, grad=1.0):
    """Outputs, and by name the gradients for one of `grad` of each."""
    inputs, leaves = with_leaves(inputs, diff)
    others = [n for n in inputs if n not in leaves]
    if mode == "subclass":
        inputs = map_tensors(inputs, lambda x: x if x.requires_grad else x.as_subclass(Marked))
    given = [inputs[n] for n in others]
    function = getattr(mbm_kernels.ops, op)
    if backend == "reference":
        function = getattr(importlib.import_module(f"{dispatch.package_of(op)}.reference"), op)
    options = {} if backend == "reference" else {"backend": backend}

    def call(*values):
        named = dict(zip((*leaves, *others), (*values, *given), strict=True))
        return as_tuple(function(**named, **options))

    values = list(leaves.values())
    if mode == "functorch":
        outputs, pull = torch.func.vjp(call, *values)
        found = pull(tuple(torch.ones_like(o) * grad for o in outputs))
        return outputs, dict(zip(leaves, found, strict=True))
    if mode == "compiled":
        plain = (x for x in given if isinstance(x, (bool, int, float, str)))
        forget_graphs(op, backend, *inputs, *plain)
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    with FlopCounterMode(display=False) if mode == "flops" else nullcontext():
        outputs = call(*values)
        grads = [torch.ones_like(o) * grad for o in outputs]
        found = torch.autograd.grad(outputs, values, grads, allow_unused=True)
    plain = [x.detach().as_subclass(torch.Tensor) for x in (*outputs, *found)]
    return plain[: len(outputs)], dict(zip(leaves, plain[len(outputs) :], strict=True))


def every(names, modes=("plain",), more=(), **options):
    """Each name by each of its backends in each mode, with each combination of `options`, of which
    what is slow takes the first alone."""
    combinations = list(itertools.product(*options.values()))
    found = [
        (name, backend, mode, *values)
        for name in names
        for backend in (*suite.available_backends(op_of(name)), *more)
        for mode in modes
        if (backend, mode) not in NEVER and (name in FEW or (backend, mode) not in SLOW)
        for values in (combinations[:1] if (backend, mode) in SLOW else combinations)
    ]
    arguments = ("name", "backend", "mode", *options)
    return pytest.mark.parametrize(arguments, found, ids=["-".join(map(str, f)) for f in found])


def spoil(inputs, into):
    """Wrong indices in rows 1 to 6, an ignored last row; the right ones for comparison."""
    inputs["target"][-1] = IGNORED
    right = {**inputs, "target": inputs["target"].clone()}
    if into == "target":
        inputs["target"][1:7] = torch.tensor(WRONG)
    else:
        ids, log_probs = inputs["teacher_topk"]
        ids = ids.clone()
        ids[1:7, 1] = torch.tensor(WRONG)
        ids[-1] = 2**40  # of the ignored row
        inputs["teacher_topk"] = (ids, log_probs)
    return inputs, right


@every(LOSSES, MODES, reduction=("none", "mean"))
def test_a_row_with_a_wrong_index_is_nan(name, backend, mode, reduction):
    make, diff = LOSSES[name]
    intos = ("target", "ids") if name.startswith("topk") else ("target",)
    for into in intos:
        inputs, right = spoil(make(reduction=reduction), into)
        outputs, found = evaluate(op_of(name), inputs, diff, backend, mode)
        exact, expected = evaluate(op_of(name), right, diff, backend, mode)
        wrong = torch.zeros(N, dtype=torch.bool)
        wrong[1:7] = True
        for output, whole in zip(outputs, exact, strict=True):
            if reduction == "none":
                assert torch.equal(output.isnan(), wrong)
                assert torch.equal(output[~wrong], whole[~wrong])
                assert output[-1] == 0
            else:
                assert output.isnan()
        hidden, *others = (found[n] for n in diff)
        assert hidden[wrong].isnan().all()
        torch.testing.assert_close(hidden[~wrong], expected[diff[0]][~wrong])
        assert (hidden[-1] == 0).all()
        assert all(grad.isnan().all() for grad in others)


@every(SEQUENCES, MODES)
def test_a_wrong_length_counts_as_the_nearest(name, backend, mode):
    inputs, diff = sequence(name)
    lengths = torch.tensor(LENGTHS)
    limit = T if name.startswith("gru") else S
    found = evaluate(name, {**inputs, SEQUENCES[name]: lengths}, diff, backend, mode)
    inputs[SEQUENCES[name]] = lengths.clamp(0, limit)
    expected = evaluate(name, inputs, diff, backend, mode)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every(LOSSES)
def test_eager_calls_raise_for_wrong_indices(name, backend, mode):
    call = getattr(mbm_kernels, op_of(name))
    for value in WRONG:
        inputs = LOSSES[name][0]()
        inputs["target"][3] = value
        with raises(ValueError, "target", f"got the value {value}", "0 <= target < V = 130"):
            call(**inputs, backend=backend)
        if "teacher_topk" in inputs:
            inputs["target"][3] = IGNORED
            inputs["teacher_topk"][0][3, 1] = value
            call(**inputs, backend=backend)  # of an ignored row: not read
            inputs["target"][3] = 0
            with raises(ValueError, "id", f"got the value {value}", "0 <= id < V = 130"):
                call(**inputs, backend=backend)


@every(SEQUENCES)
def test_eager_calls_raise_for_wrong_lengths(name, backend, mode):
    inputs, _ = sequence(name)
    call, argument = getattr(mbm_kernels.ops, name), SEQUENCES[name]
    for value in (-1, 6, 2**40, -(2**63)):
        inputs[argument] = torch.tensor([1, value, 2, 0, 1, 1])
        with raises(ValueError, argument, f"values from .*{value}", "0 <= length <= [TS]"):
            call(**inputs, backend=backend)


@every(SEQUENCES)
def test_lengths_without_values_raise(name, backend, mode):
    inputs, _ = sequence(name)
    inputs[SEQUENCES[name]] = torch.ones(B, dtype=torch.int64, device="meta")
    with raises(ValueError, SEQUENCES[name], "got meta", "expected values, on cpu"):
        getattr(mbm_kernels.ops, name)(**inputs, backend=backend)


def test_inductor_makes_no_garbage_of_stock_forms():
    for name, into in (("linear_cross_entropy", "target"), ("topk", "ids")):
        torch._dynamo.reset()
        inputs, _ = spoil(LOSSES[name][0](), into)
        function = getattr(mbm_kernels, op_of(name))
        compiled = torch.compile(function, fullgraph=True)
        assert all(x.isnan() for x in as_tuple(compiled(**inputs, backend="torch")))


def test_saved_indices_are_bounded_too():
    """What the backward of an operation gets back as saved state, of any value."""
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    op = OPS["conv_bias_act"]
    named = {"x": x, "weight": weight, "stride": [1, 1], "padding": [1] * 4, "dilation": [1, 1]}
    named |= {"groups": 1, "activation": "relu", "max_pool": [3, 3, 2, 2, 1, 1], "save": True}
    args = [named.get(n) for n in op.inputs]
    outputs = dict(zip(op.outputs, op.registered(*args, "cpu"), strict=True))
    named |= {**outputs, "grad_y": torch.randn_like(outputs["y"]), "needs": [True] * len(op.diff)}
    named["needs"] = [named.get(n) is not None for n in op.diff]
    named["places"] = torch.full_like(outputs["places"], 127)
    found = op.registered_backward(*(named.get(n) for n in op.bwd_names), "cpu")
    assert all(grad.isfinite().all() for grad in found)
    hidden, weight = torch.randn(2, 3), torch.randn(5, 3)
    ids = torch.tensor([[1], [2**40]])
    args = (torch.ones(2, 1), None, hidden, weight, None, ids, 1, [True, True, False])
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        OPS["linear_topk"].registered_backward(*args, "cpu")


@pytest.mark.parametrize("placement", ["end", "start"])
def test_nothing_outside_is_read_or_written(placement, tmp_path):
    """Between pages that may not be touched, in another process."""
    path = tmp_path / "records"
    with record.recording(path, threads=2) as recorder, record.Unlooked():
        for name, (make, _) in LOSSES.items():
            for into in ("target", "ids") if name.startswith("topk") else ("target",):
                for reduction in ("none", "mean"):
                    recorder.label = f"{name}, {into}"
                    record.run(recorder, op_of(name), spoil(make(reduction=reduction), into)[0])
        for name, argument in SEQUENCES.items():
            recorder.label = name
            inputs, _ = sequence(name)
            record.run(recorder, name, {**inputs, argument: torch.tensor(LENGTHS)})
    command = [sys.executable, "-S", str(ROOT / "tests" / "gates" / "replay.py")]
    command += [str(sanitize.extension(ROOT)), str(path), "--placement", placement]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[0]) >= 40
