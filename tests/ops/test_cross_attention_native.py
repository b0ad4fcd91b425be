"""cross_attention's CPU kernel past every block, in each ISA, for any threads."""

import itertools

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import native
from mbm_kernels.ops.cross_attention import reference
from mbm_kernels.testing import assert_matches

cpu = native.cpu()
DRAWN = 40  # shapes for each ISA

# B, N, T, S, D, E
SIZES = {
    "several blocks of queries": (2, 2, 101, 37, 19, 21),
    "more keys than one chain of the sum": (1, 2, 21, 1100, 33, 16),
    "few queries of wide blocks": (3, 2, 5, 4097, 3, 4),
    "one query": (5, 3, 1, 67, 40, 24),
    "more rows than a register tile": (2, 3, 20, 196, 64, 64),
}


def draw(sizes, generator):
    b, n, t, s, d, e = sizes

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    # As they leave a projection: heads side by side, key and value in one tensor.
    query = randn(b, t, n, d).transpose(1, 2)
    both = randn(b, s, n, d + e).transpose(1, 2)
    return {"query": query, "key": both[..., :d], "value": both[..., d:]}


def evaluate(given, need_weights=None, backend="cpu", **options):
    """Outputs, and gradients of query, key, value and a floating mask."""
    given = dict(given)
    names = [n for n in ("query", "key", "value", "mask") if n in given]
    leaves = {n: given[n].detach().requires_grad_() for n in names if given[n].is_floating_point()}
    if backend == "reference":
        outputs = reference.cross_attention(**given | leaves, need_weights=need_weights, **options)
    else:
        outputs = mbm_kernels.cross_attention(
            **given | leaves, need_weights=need_weights, backend=backend, **options
        )
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 1, o.numel()).view_as(o).to(o.dtype) for o in outputs]
    return *outputs, *torch.autograd.grad(outputs, list(leaves.values()), grads)


def with_threads(threads, *args, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return evaluate(*args, **options)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("need_weights", [None, "mean", "heads"])
@pytest.mark.parametrize("name", SIZES)
def test_bitwise_the_same_for_any_threads(isa, name, need_weights):
    generator = torch.Generator().manual_seed(0)
    b, n, t, s, _, _ = sizes = SIZES[name]
    given = draw(sizes, generator)
    given["mask"] = torch.randn(b, n, t, s, generator=generator)
    given["key_lengths"] = torch.randint(0, s + 1, (b,), generator=generator)
    one = with_threads(1, given, need_weights)
    for threads in (1, 2, 3):
        for expected, actual in zip(one, with_threads(threads, given, need_weights), strict=True):
            assert torch.equal(expected, actual)


def test_drawn_shapes(each_isa):
    generator = torch.Generator().manual_seed(1)

    def integer(least, most):
        return int(torch.randint(least, most + 1, (), generator=generator))

    for index in range(DRAWN):
        t, s = integer(1, 130), integer(1, 150)
        b, n = integer(1, 3), integer(1, 3)
        given = draw((b, n, t, s, integer(1, 70), integer(1, 70)), generator)
        shape = [size if integer(0, 1) else 1 for size in (b, n, t)] + [s]
        kind = index % 4
        if kind == 1:
            given["mask"] = torch.rand(*shape, generator=generator) < 0.6
        elif kind == 2:
            given["mask"] = torch.randn(*shape, generator=generator)
            given["mask"][torch.rand(*shape, generator=generator) < 0.3] = -torch.inf
        if kind == 3 or integer(0, 2) == 0:
            given["key_lengths"] = torch.randint(0, s + 1, (b,), generator=generator)
        scale = (None, 0.3, -0.7)[index % 3]
        need_weights = (None, "mean", "heads")[integer(0, 2)]
        options = {"need_weights": need_weights, "scale": scale}
        double = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        hides = {k: v for k, v in double.items() if k in ("mask", "key_lengths")}
        absolute = {k: double[k].abs() for k in ("query", "key", "value")} | hides
        expected = (
            evaluate(double, backend="reference", **options),
            evaluate(given, backend="reference", **options),
            evaluate(absolute, backend="reference", **options),
        )
        outputs = 1 if need_weights is None else 2
        for isa in each_isa():
            results = zip(evaluate(given, **options), *expected, strict=True)
            for place, (a, truth, stock, floor) in enumerate(results):
                what = f"{index} {place} {isa}"
                assert_matches(a, truth, stock, floor, gradient=place >= outputs, what=what)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_special_values_spread_as_in_torch(isa, where, value):
    given = draw((1, 1, 6, 37, 9, 7), torch.Generator().manual_seed(0))
    given[where] = given[where].clone()
    given[where][0, 0, 2, 3] = value
    scores = torch.softmax((given["query"] @ given["key"].transpose(2, 3)) / 3, -1)
    context, weights = mbm_kernels.cross_attention(**given, need_weights="heads", backend="cpu")
    for actual, expected in ((weights, scores), (context, scores @ given["value"])):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_what_is_hidden_is_not_read(isa):
    given = draw((2, 2, 5, 40, 8, 8), torch.Generator().manual_seed(0))
    lengths = torch.tensor([17, 0])
    padding = (torch.arange(40) < lengths[:, None])[:, None, None]
    expected = evaluate(given | {"key_lengths": lengths}, "mean")
    spoilt = {n: given[n].clone() for n in given}
    for name in ("key", "value"):
        spoilt[name][~padding[:, 0, 0, :, None].expand(2, 40, 2).transpose(1, 2)] = float("nan")
    for hiding in ({"key_lengths": lengths}, {"mask": padding}):
        for actual, wanted in zip(evaluate(spoilt | hiding, "mean"), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_gradients_not_needed_are_none_and_change_nothing(isa):
    given = draw((2, 2, 7, 33, 12, 20), torch.Generator().manual_seed(0))
    given["mask"] = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
    names = ("query", "key", "value", "mask")
    whole = dict(zip(names, evaluate(given)[1:], strict=True))
    for wanted in itertools.combinations(names, 2):
        leaves = {n: given[n].detach().requires_grad_() for n in wanted}
        context = mbm_kernels.cross_attention(**given | leaves, backend="cpu")
        grads = torch.autograd.grad(
            context, list(leaves.values()), torch.linspace(-1, 1, context.numel()).view_as(context)
        )
        for name, grad in zip(wanted, grads, strict=True):
            assert torch.equal(grad, whole[name])
