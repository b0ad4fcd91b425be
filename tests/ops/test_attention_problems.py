"""What the problems of additive and cross attention may not let pass, and their native blocks."""

import re

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import native, problem
from mbm_kernels.ops.additive_attention import problem as additive
from mbm_kernels.ops.cross_attention import problem as cross
from tests.conftest import raises

OPS = {"additive_attention": additive, "cross_attention": cross}
ADDRESSES = {"additive_attention": (6, 2, 3, 4), "cross_attention": (5, 3, 4, 4)}
needs_cpu = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")


def inputs(op, dtype=torch.float32):
    heads = (2,) if op == "cross_attention" else ()
    given = {
        "query": torch.randn(2, *heads, 3, 8, dtype=dtype),
        "key": torch.randn(2, *heads, 5, 8, dtype=dtype),
        "value": torch.randn(2, *heads, 5, 6, dtype=dtype),
    }
    return given if heads else given | {"v": torch.randn(8, dtype=dtype)}


@pytest.fixture(params=sorted(OPS))
def op(request):
    OPS[request.param].PROBLEMS.clear()
    return request.param


@pytest.mark.parametrize("guarded", [True, False], ids=["guards", "keys"])
@pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
class TestLengths:
    """A call is known by the kind of its lengths, their values are read each time."""

    def test_values_are_checked_and_used_each_time(self, op, backend, guarded, monkeypatch):
        if not guarded:
            monkeypatch.setattr(problem, "_guards_hold", lambda: False)
        given, function = inputs(op), getattr(mbm_kernels, op)
        plain = function(**given, backend=backend)
        for _ in range(2):
            for lengths in ([5, 5], [0, 2], [3, 5]):
                found = function(**given, key_lengths=torch.tensor(lengths), backend=backend)
                mask = torch.arange(5) < torch.tensor(lengths).view(2, *(1,) * plain_rank(op))
                expected = function(**given, mask=mask, backend=backend)
                torch.testing.assert_close(found, expected)
            for wrong in ([-1, 2], [1, 6]):
                with raises(ValueError, "key_lengths", "0 <= length <= S = 5"):
                    function(**given, key_lengths=torch.tensor(wrong), backend=backend)
            with raises(ValueError, "key_lengths", r"\[B\] = \[2\]"):
                function(**given, key_lengths=torch.tensor([1]), backend=backend)
            with raises(TypeError, "key_lengths", "int64"):
                function(**given, key_lengths=torch.tensor([1, 2]).int(), backend=backend)
        torch.testing.assert_close(function(**given, backend=backend), plain)


def plain_rank(op):
    """Dimensions of a mask between the batch and the positions, and these."""
    return 3 if op == "cross_attention" else 2


def test_a_registered_call_leaves_no_public_problem(op):
    given = inputs(op)
    given["value"] = given["value"].double()
    registered = getattr(torch.ops.mbm_kernels, op)
    options = (0.5, None) if op == "cross_attention" else ()
    registered(*given.values(), None, None, *options, False, "cpu")
    for _ in range(2):
        with raises(TypeError, "value", "float64", "float32 as query"):
            options = {"scale": 0.5} if op == "cross_attention" else {}
            getattr(mbm_kernels, op)(**given, **options)


def test_a_registered_call_with_shapes_that_do_not_fit_is_refused(op):
    given = inputs(op)
    given["value"] = given["value"][..., :4, :]
    options = (0.5, None) if op == "cross_attention" else ()
    with raises(ValueError, "value", "check which tensor belongs where"):
        getattr(torch.ops.mbm_kernels, op)(*given.values(), None, None, *options, False, "cpu")


def test_masks_of_other_layouts_have_problems_of_their_own():
    given = inputs("cross_attention")
    mask = torch.randn(3, 5)
    transposed = mask.t().contiguous().t()
    assert transposed.stride() != mask.stride()
    for each in (mask, transposed, mask[:1].expand(3, 5), mask[:1], mask > 0, mask[0]):
        for _ in range(2):
            found = mbm_kernels.cross_attention(**given, mask=each, backend="cpu")
            expected = mbm_kernels.cross_attention(**given, mask=each, backend="torch")
            torch.testing.assert_close(found, expected)


@needs_cpu
class TestKeys:
    """What keys have prepared serves calls of their own kind alone."""

    def test_keys_of_other_dtypes_and_backends(self):
        additive.PROBLEMS.clear()
        made = {}
        for dtype in (torch.float32, torch.bfloat16):
            given = inputs("additive_attention", dtype)
            for backend in ("cpu", "torch"):
                keys = mbm_kernels.additive_attention_keys(given["key"], backend=backend)
                made[dtype, backend] = (given, keys)
        for _ in range(3):
            for (dtype, made_for), (given, keys) in made.items():
                for backend in ("cpu", "torch"):
                    expected = mbm_kernels.additive_attention(**given, backend=backend)
                    found = mbm_kernels.additive_attention(
                        **{**given, "key": keys}, backend=backend
                    )
                    assert all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))
                    other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
                    _, wrong = made[other, made_for]
                    with raises(TypeError, "key", "as query"):
                        mbm_kernels.additive_attention(**{**given, "key": wrong}, backend=backend)

    def test_a_wanted_gradient_after_a_call_without(self):
        given = inputs("additive_attention")
        given["key"] = mbm_kernels.additive_attention_keys(given["key"], backend="cpu")
        given["query"].requires_grad_()
        for _ in range(2):
            with torch.no_grad():
                mbm_kernels.additive_attention(**given, backend="cpu")
            with raises(ValueError, "key", "by query is wanted"):
                mbm_kernels.additive_attention(**given, backend="cpu")


@needs_cpu
class TestBlocks:
    def fields(self, op):
        return getattr(native.cpu(), f"{op}_problem_fields")()

    def calls(self, op, block):
        inputs, outputs, rows, grads = ((0,) * n for n in ADDRESSES[op])
        packed = (0,) if op == "additive_attention" else ()
        yield f"{op}_fwd", (block, inputs, *packed, outputs, 1)
        yield f"{op}_bwd", (block, inputs, 0, rows, rows, grads, 1)

    @pytest.mark.parametrize("size", [0, 8, 8000])
    def test_one_of_another_size_is_refused(self, op, size):
        for name, args in self.calls(op, bytes(size)):
            with pytest.raises(ValueError, match=f"problem: got {size} bytes; expected"):
                getattr(native.cpu(), name)(*args)

    def test_null_addresses_and_negative_sizes_are_refused(self, op):
        fields = self.fields(op)
        values = dict.fromkeys(fields, 1)
        for name, args in self.calls(op, native.block(fields, values)):
            with pytest.raises(ValueError, match="query: got a null address"):
                getattr(native.cpu(), name)(*args)
        for name, args in self.calls(op, native.block(fields, values | {"T": -1, "B": -1})):
            with pytest.raises(ValueError, match="problem: got a negative size"):
                getattr(native.cpu(), name)(*args)

    def test_native_calls_take_few_arguments(self, op):
        module = native.cpu()
        names = [name for name in dir(module) if name.startswith(op)]
        assert {f"{op}_fwd", f"{op}_bwd"} <= set(names)
        for name in names:
            assert len(re.findall(r"arg\d+:", getattr(module, name).__doc__)) <= 8, name
