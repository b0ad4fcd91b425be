"""The C++ kernel of contrastive_loss: chunks, blocks, threads, scales, special values."""

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels._core.op import OPS
from mbm_kernels.bench import memory
from mbm_kernels.ops.contrastive_loss import backend_cpu, problem, reference
from mbm_kernels.testing.poison import poison

OP = OPS["contrastive_loss"]
KINDS = ("infonce", "siglip")
NAMES = ("image", "text", "scale", "bias")
IN_TWO_CHUNKS = 1700  # 8 MB hold 1176 rows of as many floats


def make(b, d, kind="infonce", scale=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(b, d, generator=generator), dim=1)
    noise = torch.randn(b, d, generator=generator)
    return {
        "image": F.normalize(text + noise * d**-0.5, dim=1),
        "text": text,
        "scale": torch.tensor(scale),
        "bias": torch.tensor(-2.0),
        "kind": kind,
    }


def gradients(inputs, backend="cpu", grad=None):
    leaves = [inputs[n].detach().requires_grad_() for n in NAMES]
    named = {**inputs, **dict(zip(NAMES, leaves, strict=True))}
    loss = mbm_kernels.contrastive_loss(**named, backend=backend)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, grad))


def exact(inputs):
    leaves = [inputs[n].detach().double().requires_grad_() for n in NAMES]
    loss = reference.contrastive_loss(*leaves, kind=inputs["kind"])
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return tuple(x.detach().float() for x in (loss, *found))


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * scale + 1e-30)


# Beyond a block of texts (112), a panel of images (32), a slice of depth (256) and a chunk.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1), (33, 3), (113, 300), (250, 5), (IN_TWO_CHUNKS, 6)])
def test_every_build(isa, sizes, kind):
    inputs = make(*sizes, kind)
    with poison():
        found = gradients(inputs)
    close(found, exact(inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_for_any_threads_and_again(kind):
    inputs = make(IN_TWO_CHUNKS, 37, kind)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(gradients(inputs))
    finally:
        torch.set_num_threads(before)
    assert all(equal(result, results[0]) for result in results[1:])


def test_memory_does_not_grow_with_the_square_of_the_batch():
    gradients(make(64, 4))
    inputs = make(6000, 4)
    extra = memory.peak_extra_bytes(lambda: gradients(inputs))
    assert extra is None or extra < 30e6  # one array of logits is 144 MB


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [-3.0, 0.0, 100.0, 1e4])
def test_scales(scale, kind):
    inputs = make(70, 20, kind, scale)
    close(gradients(inputs), exact(inputs))


def test_confident_pairs_keep_their_digits():
    # Rounded logits of 100 would leave 1e-5 of loss where there is none.
    inputs = make(70, 300, scale=100.0)
    inputs["image"] = inputs["text"]
    loss = float(gradients(inputs)[0])
    assert abs(loss - float(exact(inputs)[0])) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["image", "text", "scale"])
def test_special_values_as_the_definition(value, where, kind):
    inputs = make(40, 6, kind)
    if where == "scale":
        inputs["scale"] = torch.tensor(value)
    else:
        inputs[where][3] = 0.5
        inputs[where][3, 2] = value
    for name, a, b in zip(("loss", *NAMES), gradients(inputs), exact(inputs), strict=True):
        torch.testing.assert_close(
            a, b, equal_nan=True, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_makes_the_gradients_that_are_wanted(wanted, kind):
    inputs = make(IN_TWO_CHUNKS if kind == "infonce" else 40, 4, kind)
    args = [*(inputs[n] for n in NAMES), kind]
    expected = gradients(inputs)[1:]
    outputs = OP.registered(*args, [bool(w) for w in wanted], "cpu")
    for want, made, all_made in zip(wanted, outputs[1:], expected, strict=True):
        assert torch.equal(made, all_made) if want else made.shape == (0,)
    grad = torch.tensor(0.5)
    p = problem.find(*args)
    again = backend_cpu.bwd(p, [grad], args[:4], [], [bool(w) for w in wanted])
    for want, made, all_made in zip(wanted, again, expected, strict=True):
        if want:
            close([made], [0.5 * all_made])
        else:
            assert made is None


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_by_what_comes_from_above(kind):
    inputs = make(40, 6, kind)
    expected = [0.25 * g for g in gradients(inputs)[1:]]
    close(gradients(inputs, grad=torch.tensor(0.25))[1:], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_single(kind):
    inputs = make(40, 6, kind)
    for name in ("image", "text"):
        inputs[name] = inputs[name].bfloat16()
    found = gradients(inputs)
    single = gradients({**inputs, **{n: inputs[n].float() for n in ("image", "text")}})
    for a, b in zip(found, single, strict=True):
        assert torch.equal(a, b.to(a.dtype))
