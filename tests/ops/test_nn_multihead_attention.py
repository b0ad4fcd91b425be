"""nn.MultiheadAttention against torch.nn.MultiheadAttention."""

import copy
import pickle

import pytest
import torch

import mbm_kernels
from mbm_kernels import nn
from mbm_kernels._core import dispatch, native
from mbm_kernels.nn import counterparts
from tests.conftest import raises

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")
HEADS, SIZE = 2, 8
CONFIGURATIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zeros appended": {"add_zero_attn": True},
    "all appended": {"add_bias_kv": True, "add_zero_attn": True},
    "own kdim and vdim": {"kdim": 5, "vdim": 6},
    "own vdim, appended, no bias": {"vdim": 6, "add_bias_kv": True, "bias": False},
    "inactive dropout": {"dropout": 0.5},
    "double": {"dtype": torch.float64},
}
MASKS = (
    "none",
    "padding",
    "steps",
    "each",
    "padding+steps",
    "added",
    "padding+added",
    "padding added",
)
KINDS = ("cross", "memory", "self")


def twins(batch_first=True, **options):
    stock = torch.nn.MultiheadAttention(SIZE, HEADS, batch_first=batch_first, **options)
    ours = nn.MultiheadAttention(SIZE, HEADS, batch_first=batch_first, **options)
    ours.load_state_dict(stock.state_dict())
    if options.get("dropout"):
        stock.eval(), ours.eval()
    return stock, ours


def inputs(stock, kind="cross", batch=3, steps=4, source=5):
    """query, key and value in the layout of the module; `batch` None is unbatched."""

    def sequence(length, size):
        lead = (length,) if batch is None else (batch, length)
        x = torch.randn(*lead, size, dtype=stock.out_proj.weight.dtype)
        x = x if stock.batch_first or batch is None else x.transpose(0, 1).contiguous()
        return x.requires_grad_()

    query = sequence(steps, SIZE)
    if kind == "self":
        return query, query, query
    key = sequence(source, stock.kdim)
    return query, key, key if kind == "memory" else sequence(source, stock.vdim)


def masks(kind, dtype, batch=3, steps=4, source=5, hide_row=False):
    given = {}
    lead = () if batch is None else (batch,)
    if "padding" in kind:
        given["key_padding_mask"] = torch.rand(*lead, source) < 0.3
        given["key_padding_mask"][..., 0] = hide_row
    if "each" in kind:
        given["attn_mask"] = torch.rand((batch or 1) * HEADS, steps, source) < 0.3
        given["attn_mask"][..., 0] = False
    elif "steps" in kind:
        given["attn_mask"] = torch.rand(steps, source) < 0.3
        given["attn_mask"][..., 0] = False
    elif "+added" in kind or kind == "added":
        given["attn_mask"] = torch.randn(steps, source, dtype=dtype)
    elif kind == "padding added":
        given["key_padding_mask"] = torch.randn(*lead, source, dtype=dtype)
    if hide_row:
        given["key_padding_mask"][0] = True
    return given


def assert_same(stock, ours, given, **options):
    leaves = [x for i, x in enumerate(given) if all(x is not y for y in given[:i])]
    results = []
    for module in (stock, ours):
        output, weights = module(*given, **options)
        assert (weights is not None) == options.get("need_weights", True)
        total = output.sin().sum() + (0 if weights is None else weights.sin().sum())
        grads = torch.autograd.grad(total, (*leaves, *module.parameters()))
        results.append(([output] if weights is None else [output, weights], grads))
    (expected, wanted), (actual, found) = results
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    names = ["query", "key", "value"][: len(leaves)] + [n for n, _ in stock.named_parameters()]
    for name, a, e in zip(names, found, wanted, strict=True):
        torch.testing.assert_close(a, e, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_constructor_option(name, need_weights):
    stock, ours = twins(**CONFIGURATIONS[name])
    assert isinstance(ours, torch.nn.MultiheadAttention)
    dtype = stock.out_proj.weight.dtype
    for mask in ("none", "padding+steps", "added"):
        assert_same(stock, ours, inputs(stock), need_weights=need_weights, **masks(mask, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [3, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_layouts(batch_first, batch, kind):
    stock, ours = twins(batch_first)
    given = inputs(stock, kind, batch)
    source = 4 if kind == "self" else 5
    for mask in ("none", "padding", "each"):
        given_masks = masks(mask, torch.float32, batch, source=source)
        for options in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            assert_same(stock, ours, given, **given_masks, **options)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks_with_torchs_polarity(mask, need_weights):
    stock, ours = twins(add_zero_attn=mask == "padding")
    given = inputs(stock)
    options = {"need_weights": need_weights, "average_attn_weights": False}
    assert_same(stock, ours, given, **masks(mask, torch.float32), **options)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("added", [False, True])
def test_row_with_nothing_is_torchs_nan(average, added):
    stock, ours = twins()
    mask = masks("padding", torch.float32, hide_row=True)["key_padding_mask"]
    if added:
        mask = torch.zeros(mask.shape).masked_fill(mask, -torch.inf)
    given = inputs(stock)
    for need_weights in (True, False):
        options = {"need_weights": need_weights, "average_attn_weights": average}
        expected = stock(*given, key_padding_mask=mask, **options)
        actual = ours(*given, key_padding_mask=mask, **options)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)
        assert expected[0].isnan().any() == need_weights


@pytest.mark.parametrize("large", [-1e9, torch.finfo(torch.float32).min, 1e9])
@pytest.mark.parametrize("kind", ["steps", "each", "padding", "steps and padding"])
@pytest.mark.parametrize("backend", [None, "torch", "cpu"])
def test_rows_filled_with_a_large_number(backend, kind, large):
    """Left padding as transformer libraries write it: the explicit softmax decides, in outputs and
    gradients, whether or not weights are asked for. (Stock's fused form has other gradients.)"""
    if backend is not None and mbm_kernels.backends("cross_attention")[backend] is not None:
        pytest.skip("cannot run here")
    stock, ours = twins()
    ours.backend = backend or "auto"
    causal = torch.ones(4, 5, dtype=torch.bool).triu(1)
    causal[:, :2] = True
    given_masks = {}
    if kind == "steps and padding":
        large /= 2  # their sum is finite too
    if "steps" in kind:
        given_masks["attn_mask"] = torch.zeros(4, 5).masked_fill(causal, large)
    if kind == "each":
        given_masks["attn_mask"] = torch.zeros(3 * HEADS, 4, 5).masked_fill(causal, large)
    if "padding" in kind:
        padded = torch.arange(5) < torch.tensor([0, 3, 5])[:, None]
        given_masks["key_padding_mask"] = torch.zeros(3, 5).masked_fill(padded, large)
    given = inputs(stock)
    results = []
    for module, need_weights in ((stock, True), (ours, True), (ours, False)):
        output, _ = module(*given, need_weights=need_weights, **given_masks)
        leaves = (*given, *module.parameters())
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for actual in results[1:]:
        for a, e in zip(actual, results[0], strict=True):
            torch.testing.assert_close(a, e, equal_nan=True)


def test_causal_hint():
    stock, ours = twins()
    given = inputs(stock, "self")
    causal = torch.nn.Transformer.generate_square_subsequent_mask(4)
    for need_weights in (True, False):
        options = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
        assert_same(stock, ours, given, **options)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(*given, is_causal=True)


def test_float_mask_has_a_gradient():
    stock, ours = twins()
    given = inputs(stock)
    mask = torch.randn(4, 5, requires_grad=True)
    results = [
        torch.autograd.grad(m(*given, attn_mask=mask)[0].sin().sum(), mask)[0]
        for m in (stock, ours)
    ]
    torch.testing.assert_close(results[1], results[0])


def test_dropout_is_torchs():
    stock, ours = twins(dropout=0.5)
    stock.train(), ours.train()
    given = inputs(stock)
    results = []
    for module in (stock, ours):
        torch.manual_seed(7)
        results.append(module(*given))
    for a, e in zip(results[1], results[0], strict=True):
        assert torch.equal(a, e)
    ours.backend = "cpu"
    with raises(mbm_kernels.BackendUnavailableError, "nn.MultiheadAttention", "dropout"):
        ours(*given)


@pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "padding", "added"])
def test_dropout_between_projections_by_the_kernel(mask, need_weights, monkeypatch):
    """The attention is torch's and so are its random numbers."""
    stock, ours = twins(dropout=0.5)
    stock.train(), ours.train()
    given = inputs(stock)
    options = {"need_weights": need_weights, **masks(mask, torch.float32)}
    mbm_kernels.set_backend("cpu", op="concat_linear")
    try:
        results = []
        for module in (stock, ours):
            torch.manual_seed(7)
            results.append(module(*given, **options))
        with dispatch.watched() as taken:
            ours(*given, **options)
    finally:
        mbm_kernels.set_backend("auto", op="concat_linear")
    assert "cpu" in taken
    for a, e in zip(results[1], results[0], strict=True):
        assert (a is None and e is None) or torch.allclose(a, e, atol=1e-5)


def test_explain_says_why_dropout_is_torchs():
    _, ours = twins(dropout=0.5)
    rows = mbm_kernels.explain(ours.train(), *inputs(ours)).rows
    (row,) = (row for row in rows if row.op == "cross_attention")
    assert row.backend == "torch"
    assert native.cpu_reason() or "dropout on the weights" in row.why_not["cpu"]


@pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
def test_a_named_backend_inside_a_fused_transformer_layer():
    layer = torch.nn.TransformerEncoderLayer(SIZE, HEADS, 16, batch_first=True).eval()
    x = torch.randn(3, 4, SIZE)
    with torch.no_grad():
        expected = layer(x)
        counterparts.swap(layer.self_attn, "cpu")
        with dispatch.watched() as taken:
            torch.testing.assert_close(layer(x), expected)
        assert "cpu" in taken
        layer.self_attn.backend = "auto"
        assert torch.equal(layer(x), expected)
        counterparts.restore(layer.self_attn)
    assert not layer.self_attn._forward_pre_hooks


def test_fused_path_without_gradients():
    stock, ours = twins()
    stock.eval(), ours.eval()
    (x, _, _) = inputs(stock, "self")
    padding = torch.zeros(3, 4, dtype=torch.bool)
    padding[0, 2:] = True
    with torch.no_grad():
        expected, actual = (m(x, x, x, key_padding_mask=padding) for m in (stock, ours))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_inside_a_transformer_layer():
    stock = torch.nn.TransformerEncoderLayer(SIZE, HEADS, 16, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(stock)
    ours.self_attn = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
    ours.self_attn.load_state_dict(stock.self_attn.state_dict())
    x = torch.randn(3, 4, SIZE)
    torch.testing.assert_close(ours(x), stock(x))
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), stock.eval()(x))


@pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
@pytest.mark.parametrize("kind", KINDS)
def test_projections_by_the_kernel(kind, monkeypatch):
    """Where concat_linear's table names it; here it is set, whatever the size."""
    from mbm_kernels.ops.concat_linear import backend_cpu

    calls, fwd = [], backend_cpu.fwd
    monkeypatch.setattr(backend_cpu, "fwd", lambda *args: calls.append(1) or fwd(*args))
    stock, ours = twins()
    given = inputs(stock, kind)
    mbm_kernels.set_backend("cpu", op="concat_linear")
    try:
        assert_same(stock, ours, given)
        assert len(calls) == {"self": 2, "memory": 3, "cross": 4}[kind]
        ours.backend = "torch"
        assert_same(stock, ours, given)
        assert len(calls) == {"self": 2, "memory": 3, "cross": 4}[kind]
    finally:
        mbm_kernels.set_backend("auto", op="concat_linear")


def test_same_seed_same_parameters():
    states = []
    for kind in (torch.nn.MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(3)
        states.append(kind(SIZE, HEADS, 0.1, True, True).state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(v, states[1][n]) for n, v in states[0].items())


def test_copies_keep_everything():
    module = nn.MultiheadAttention(SIZE, HEADS, backend="torch")
    x = torch.randn(4, 3, SIZE)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, x, x)[0], module(x, x, x)[0])
        assert twin.backend == "torch"
    assert "backend='torch'" in repr(module)


def test_autocast_and_compile():
    stock, ours = twins()
    query, key, value = (x.detach() for x in inputs(stock))
    mask = masks("padding+steps", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (m(query, key, value, **mask)[0] for m in (stock, ours))
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for a, e in zip(
        compiled(query, key, value, **mask), ours(query, key, value, **mask), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_bad_input():
    ours = nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
    query, key = torch.randn(3, 4, SIZE), torch.randn(3, 5, SIZE)
    with raises(ValueError, "key", r"\[B, S, kdim\] = \[3, 5, 8\]"):
        ours(query, torch.randn(3, 5, 7), key)
    with raises(ValueError, "key", "2 dimensions|3 dimensions"):
        ours(query, key[0], key)
    with raises(ValueError, "value", r"\[3, 5, 8\]"):
        ours(query, key, key[:, :4])
    with raises(ValueError, "attn_mask", r"\[T, S\] = \[4, 5\]"):
        ours(query, key, key, attn_mask=torch.zeros(5, 5))
    with raises(ValueError, "key_padding_mask", r"\[B, S\] = \[3, 5\]"):
        ours(query, key, key, key_padding_mask=torch.zeros(3, 4, dtype=torch.bool))
    with raises(TypeError, "key_padding_mask", "torch.int64", "True = masked"):
        ours(query, key, key, key_padding_mask=torch.zeros(3, 5, dtype=torch.int64))
    with raises(ValueError, "backend: got 'fast'"):
        nn.MultiheadAttention(SIZE, HEADS, backend="fast")(query, query, query)
