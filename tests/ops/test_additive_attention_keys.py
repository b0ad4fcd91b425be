"""additive_attention_keys: a snapshot of the key, prepared once and owned by the caller."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import mbm_kernels
from mbm_kernels import additive_attention, additive_attention_keys, nn
from mbm_kernels._core import native
from mbm_kernels.testing import Case
from mbm_kernels.testing.layouts import LAYOUTS, relayout
from mbm_kernels.testing.suite import available_backends, device_of, interpreted, placed
from tests.conftest import raises
from tests.gates import record

from . import test_additive_attention

BACKENDS = list(available_backends("additive_attention"))
ON_CPU = [name for name in BACKENDS if device_of(name).type == "cpu"]
needs_cpu = pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")


def with_keys(query, key, value, v, *, key_lengths=None, mask=None, backend="auto"):
    """While the memory of the key is full of NaN."""
    keys, memory = additive_attention_keys(key, backend=backend), key.untyped_storage()
    before = memory.clone()
    memory.fill_(0xFF)
    try:
        return additive_attention(
            query, keys, value, v, key_lengths=key_lengths, mask=mask, backend=backend
        )
    finally:
        memory.copy_(before)


class Suite(test_additive_attention.TestAdditiveAttention):
    function = staticmethod(with_keys)


SUITE = Suite()


def cases(backend, dtype):
    """All where something is prepared; of the interpreter, which is slow, a few."""
    if backend != "triton":
        return [*Suite.cases, *Suite.edge_cases]
    return [Suite.cases[0], *Suite.edge_cases[1:4]] if dtype == torch.float32 else Suite.cases[:1]


def case(queries=3, batch=3, positions=67, features=261):
    """67 and 261 leave a tail in every ISA."""
    return test_additive_attention.sizes(batch, queries, positions, features, 33)


def drawn(dtype=torch.float32, scale=1.0, **sizes):
    inputs = SUITE.inputs(Case("", case(**sizes), scale=scale), dtype)
    batch, positions = inputs["key"].shape[:2]
    inputs["key_lengths"] = torch.tensor([positions, 0, positions // 2 + 1] * batch)[:batch]
    return inputs


def attend(inputs, backend="auto", **changes):
    return additive_attention(**{**inputs, **changes}, backend=backend)


def same(found, expected):
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a.nan_to_num(7.0), e.nan_to_num(7.0))


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_error_rule_and_bit_by_bit_the_keys_own(self, backend, dtype):
        if dtype == torch.float64 and backend != "torch":
            pytest.skip("kernels compute in float32")
        for each in cases(backend, dtype):
            inputs = SUITE.inputs(each, dtype)
            SUITE.check_forward(inputs, backend)
            inputs = placed(inputs, device_of(backend))
            same(with_keys(**inputs, backend=backend), attend(inputs, backend))

    @needs_cpu
    @pytest.mark.parametrize("queries", [1, 2, 3, 5, 8, 9, 70])
    def test_every_form_of_the_kernel(self, queries, isa):
        """24: past the range of e^2k here and there. Where query and key are small and v is long,
        scores have relative accuracy."""
        for small, key, v in itertools.product((1.0, 0.03), (1.0, 0.3, 24.0), (1.0, 0.05)):
            inputs = drawn(queries=queries)
            inputs["query"] *= small
            inputs["key"] *= small * key
            inputs["v"] *= v
            if v < 1:  # a single draw with a longer one may exceed the budget, keys or not
                SUITE.check_forward(inputs, "cpu")
            same(with_keys(**inputs, backend="cpu"), attend(inputs, "cpu"))

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_layouts(self, layout, backend):
        inputs = SUITE.inputs(Suite.cases[0], torch.float32)
        inputs["key"] = relayout(inputs["key"], layout)
        SUITE.check_forward(inputs, backend)
        inputs["key"] = inputs["key"].contiguous()
        inputs["query"] = relayout(inputs["query"], layout)
        SUITE.check_forward(inputs, backend)

    @needs_cpu
    def test_one_key_for_many_queries_masks_and_values(self):
        inputs = drawn()
        keys = additive_attention_keys(inputs["key"], backend="cpu")
        for queries in (1, 6, 2, 0, 1):
            more = {
                "query": torch.randn(3, queries, 261),
                "mask": torch.rand(3, queries, 67) < 0.5,
                "value": torch.randn(3, 67, queries + 1),
            }
            for given in (more, {**more, "mask": None}, {**more, "key_lengths": None}):
                found = attend(inputs, "cpu", **given, key=keys)
                same(found, attend(inputs, "cpu", **given))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_positions_past_the_length_have_no_influence(self, backend):
        inputs = placed(drawn(batch=2), device_of(backend))
        expected = attend(inputs, backend)
        beyond = torch.arange(67) >= inputs["key_lengths"][:, None]
        for other in (torch.nan,) if interpreted(backend) else (77.0, torch.inf, torch.nan):
            inputs["key"][beyond] = other
            same(with_keys(**inputs, backend=backend), expected)

    @needs_cpu
    def test_threads_do_not_change_a_bit(self):
        inputs, before, results = drawn(), torch.get_num_threads(), []
        try:
            for making, using in itertools.product((1, 2, 3), repeat=2):
                torch.set_num_threads(making)
                keys = additive_attention_keys(inputs["key"], backend="cpu")
                torch.set_num_threads(using)
                results.append(attend(inputs, "cpu", key=keys))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            same(other, results[0])

    @needs_cpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_another_isa_than_the_one_it_was_made_in(self, dtype):
        inputs, before = drawn(dtype), native.cpu().isa()
        try:
            for making, using in itertools.product(native.isas(), repeat=2):
                native.cpu().set_isa(making)
                keys = additive_attention_keys(inputs["key"], backend="cpu")
                native.cpu().set_isa(using)
                same(attend(inputs, "cpu", key=keys), attend(inputs, "cpu"))
        finally:
            native.cpu().set_isa(before)


def by_numpy(key, index, image, path):
    key.numpy()[index] = image.numpy()


def by_data(key, index, image, path):
    key.data[index] = image


def in_place(key, index, image, path):
    key[index].copy_(image)


def by_another_mapping(key, index, image, path):
    """As another process writes to memory that it shares."""
    torch.from_file(path, shared=True, size=key.numel()).view_as(key)[index] = image


class TestSnapshot:
    """Of 64 images one is replaced, by a write that need not raise the version of the key."""

    @pytest.mark.parametrize("write", [in_place, by_numpy, by_data, by_another_mapping])
    @pytest.mark.parametrize("backend", ["auto", *ON_CPU])
    def test_a_replaced_picture(self, write, backend, tmp_path):
        pictures, positions, features = (64, 49, 128) if backend in ("auto", "cpu") else (3, 2, 16)
        size, path = pictures * positions * features, str(tmp_path / "key")
        key = torch.from_file(path, shared=True, size=size).view(pictures, positions, features)
        key.copy_(torch.randn(key.shape))
        shapes = ((pictures, 1, features), (pictures, positions, 8), (features,))
        query, value, v = (torch.randn(*shape) for shape in shapes)

        def call(key):
            return additive_attention(query, key, value, v, backend=backend)

        # For one query whose key is not prepared, Triton computes tanh of each pair.
        agree = torch.testing.assert_close if backend == "triton" else same
        for index in range(0, pictures, 9):  # the first and the last of 64 among them
            before = key.clone()
            keys, expected = additive_attention_keys(key, backend=backend), call(before)
            agree(call(keys), expected)
            write(key, index, torch.randn(positions, features), path)
            agree(call(keys), expected)
            assert torch.equal(keys.key(), before)
            replaced = call(key.clone())
            assert not torch.equal(replaced[1][index], expected[1][index])
            for _ in range(2):
                same(call(key), replaced)
            agree(call(additive_attention_keys(key, backend=backend)), replaced)

    @needs_cpu
    def test_nothing_is_prepared_but_by_request(self, tmp_path):
        inputs = drawn(queries=1)
        with record.recording(tmp_path / "records") as recorder:
            for _ in range(3):
                attend(inputs, "cpu")
            others = {"index_range", "additive_attention_problem_fields"}
            assert set(recorder.calls) - others == {"additive_attention_fwd"}
            keys = additive_attention_keys(inputs["key"], backend="cpu")
            for _ in range(3):
                attend(inputs, "cpu", key=keys)
        assert recorder.calls["additive_attention_pack_key"] == 1
        assert recorder.calls["additive_attention_fwd"] == 6

    @needs_cpu
    def test_freed_with_the_keys(self):
        inputs = drawn()
        keys = additive_attention_keys(inputs["key"], backend="cpu")
        attend(inputs, "cpu", key=keys)
        gone = [weakref.ref(x) for x in (keys, keys._snapshot, keys._prepared.packed)]
        assert all(ref() is not None for ref in gone)
        del keys
        gc.collect()
        assert all(ref() is None for ref in gone)

    def test_what_it_tells(self):
        key = torch.randn(2, 3, 4, dtype=torch.bfloat16)
        keys = additive_attention_keys(key, backend="torch")
        assert (keys.shape, keys.dtype, keys.device) == (key.shape, key.dtype, key.device)
        assert repr(keys) == (
            "AdditiveAttentionKeys([2, 3, 4], dtype=torch.bfloat16, device=cpu, backend='torch')"
        )
        with pytest.raises(AttributeError):
            keys.backend = "cpu"

    @pytest.mark.parametrize("backend", ON_CPU)
    @pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, again, backend):
        inputs = drawn(batch=1, positions=5, features=9)
        keys = again(additive_attention_keys(inputs["key"], backend=backend))
        same(attend(inputs, backend, key=keys), attend(inputs, backend))


class TestBackends:
    @pytest.mark.parametrize(("making", "using"), [*itertools.product(ON_CPU, repeat=2)])
    def test_the_call_decides_who_runs(self, making, using):
        inputs = drawn(batch=2, positions=5, features=9, dtype=torch.float16)
        keys = additive_attention_keys(inputs["key"], backend=making)
        assert keys.backend == making
        same(attend(inputs, using, key=keys), attend(inputs, using))
        with mbm_kernels.disabled():
            same(attend(inputs, using, key=keys), attend(inputs, "torch"))
        try:
            mbm_kernels.set_backend(using, op="additive_attention")
            same(attend(inputs, key=keys), attend(inputs, using))
            assert additive_attention_keys(inputs["key"]).backend == using
        finally:
            mbm_kernels.set_backend("auto")

    def test_auto(self):
        for positions in (1, 200):
            inputs = drawn(queries=1, positions=positions)
            keys = additive_attention_keys(inputs["key"])
            assert keys.backend in BACKENDS
            same(attend(inputs, key=keys), attend(inputs))

    def test_disabled_prepares_nothing(self):
        with mbm_kernels.disabled():
            keys = additive_attention_keys(torch.randn(3, 67, 261), backend=BACKENDS[0])
        assert keys.backend == "torch"
        assert keys._prepared is None

    def test_errors_of_backends(self):
        key = torch.randn(2, 5, 7)
        with raises(ValueError, "backend: got 'fast'"):
            additive_attention_keys(key, backend="fast")
        with raises(mbm_kernels.BackendUnavailableError, "'cuda' cannot run"):
            additive_attention_keys(key, backend="cuda")
        inputs = SUITE.inputs(Suite.cases[0], torch.float32)
        keys = additive_attention_keys(inputs["key"])
        with raises(mbm_kernels.BackendUnavailableError, "'cuda' cannot run"):
            attend(inputs, "cuda", key=keys)

    @pytest.mark.parametrize("backend", ON_CPU)
    def test_autocast(self, backend):
        inputs = drawn(batch=2, positions=5, features=9)
        outside = additive_attention_keys(inputs["key"], backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            inside = additive_attention_keys(inputs["key"], backend=backend)
            assert inside.dtype == torch.bfloat16
            expected = attend(inputs, backend)
            assert expected[0].dtype == torch.bfloat16
            for keys in (outside, inside):
                same(attend(inputs, backend, key=keys), expected)
        same(attend(inputs, backend, key=outside), attend(inputs, backend))
        with raises(TypeError, "key", "bfloat16", "float32 as query"):
            attend(inputs, backend, key=inside)

    @pytest.mark.parametrize("backend", ON_CPU)
    def test_inference_mode(self, backend):
        inputs = drawn(batch=2, positions=5, features=9)
        expected = attend(inputs, backend)
        outside = additive_attention_keys(inputs["key"], backend=backend)
        with torch.inference_mode():
            inside = additive_attention_keys(inputs["key"], backend=backend)
            same(attend(inputs, backend, key=outside), expected)
        same(attend(inputs, backend, key=inside), expected)


class TestTransforms:
    @pytest.mark.parametrize("backend", ON_CPU)
    def test_compile(self, backend):
        inputs = drawn(batch=2, positions=5, features=9)
        keys = additive_attention_keys(inputs["key"], backend=backend)
        expected = attend(inputs, backend)

        def given(query, keys):
            return attend(inputs, backend, query=query, key=keys)

        def closed(query, _):
            return attend(inputs, backend, query=query, key=keys)

        def made(query, _):
            keys = additive_attention_keys(inputs["key"], backend=backend)
            return attend(inputs, backend, query=query, key=keys)

        for function in (given, closed, made):
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(inputs["query"], keys), expected)

    @pytest.mark.parametrize("backend", ON_CPU)
    def test_modes_and_transforms(self, backend):
        inputs = drawn(batch=2, positions=5, features=9)
        keys = additive_attention_keys(inputs["key"], backend=backend)
        expected = attend(inputs, backend)
        with FlopCounterMode(display=False):
            same(attend(inputs, backend, key=keys), expected)
        queries = torch.stack([inputs["query"], -inputs["query"]])
        mapped = torch.func.vmap(lambda q: attend(inputs, backend, query=q, key=keys))(queries)
        for i, query in enumerate(queries):
            torch.testing.assert_close(
                [x[i] for x in mapped], [*attend(inputs, backend, query=query)]
            )

        def traced(query):
            return attend(inputs, backend, query=query, key=keys)

        same(torch.jit.trace(traced, inputs["query"])(inputs["query"]), expected)
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(x) for name, x in inputs.items()}
            fake["key"] = additive_attention_keys(fake["key"], backend=backend)
            found = attend(fake, backend)
        assert [x.shape for x in found] == [x.shape for x in expected]

    @pytest.mark.parametrize("backend", ON_CPU)
    def test_keys_of_each_in_a_batch(self, backend):
        inputs = drawn(batch=2, positions=5, features=9)
        stacked = torch.stack([inputs["key"], inputs["key"].flip(0)])

        def call(key):
            return attend(inputs, backend, key=additive_attention_keys(key, backend=backend))

        mapped = torch.func.vmap(call)(stacked)
        for i, key in enumerate(stacked):
            torch.testing.assert_close([x[i] for x in mapped], [*attend(inputs, backend, key=key)])


class TestErrors:
    @pytest.mark.parametrize("name", ["query", "value", "v"])
    def test_a_wanted_gradient(self, name):
        inputs = SUITE.inputs(Suite.cases[0], torch.float32)
        expected = attend(inputs)
        keys = additive_attention_keys(inputs["key"])
        inputs[name].requires_grad_()
        with raises(ValueError, "key: got", f"by {name}", "expected a tensor", "pass the key"):
            attend(inputs, key=keys)
        with torch.no_grad():
            same(attend(inputs, key=keys), expected)
        inputs[name].requires_grad_(False)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[name], torch.ones_like(inputs[name]))
            with raises(ValueError, f"by {name}"):
                attend(inputs, key=keys, **{name: dual})
        with raises(ValueError, f"by {name}"):
            torch.func.grad(lambda x: attend(inputs, key=keys, **{name: x})[0].sum())(inputs[name])

    def test_a_key_that_a_gradient_is_wanted_by(self):
        inputs = SUITE.inputs(Suite.cases[0], torch.float32)
        expected = attend(inputs)
        key = inputs["key"].requires_grad_()
        with raises(ValueError, "additive_attention_keys: key: got", "expected", "no_grad"):
            additive_attention_keys(key)
        with forward_ad.dual_level(), raises(ValueError, "gradient"):
            additive_attention_keys(forward_ad.make_dual(key.detach(), torch.ones_like(key)))
        same(attend(inputs, key=additive_attention_keys(key.detach())), expected)
        with torch.no_grad():
            keys = additive_attention_keys(key)
        assert not keys.key().requires_grad
        same(attend(inputs, key=keys), expected)

    def test_bad_input(self):
        inputs = SUITE.inputs(Suite.cases[0], torch.float32)
        keys = additive_attention_keys(inputs["key"])
        with raises(TypeError, "additive_attention_keys: key: got list", "torch.Tensor"):
            additive_attention_keys([1.0])
        with raises(ValueError, "key", "3 dimensions"):
            additive_attention_keys(torch.randn(3, 4))
        with raises(TypeError, "key", "int64"):
            additive_attention_keys(torch.ones(2, 3, 4, dtype=torch.int64))
        with raises(ValueError, "key", r"\[B, S, D\]"):
            attend(inputs, key=keys, query=torch.randn(2, 3, 8), v=torch.randn(8))
        with raises(TypeError, "key", "float32", "float64 as query"):
            wide = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
            attend(wide, key=keys)
        with raises(ValueError, "value", "cpu|meta"):
            attend(inputs, key=keys, value=inputs["value"].to("meta"))
        with raises(ValueError, "key_lengths", "0 <= length <= S = 5"):
            attend(inputs, key=keys, key_lengths=torch.tensor([-1, 2]))


class TestModule:
    @pytest.mark.parametrize("backend", ["auto", *ON_CPU])
    def test_the_same_with_keys(self, backend):
        module = nn.AdditiveAttention(6, 7, 8, backend=backend)
        query, features = torch.randn(2, 3, 6), torch.randn(2, 5, 7)
        with torch.no_grad():
            keys, expected = module.keys(features), module(query, features)
            features_then = features.clone()
            features.zero_()
            same(module(query, keys, features_then), expected)
            with raises(ValueError, "value: got None", "pass the features"):
                module(query, keys)
        with raises(ValueError, "key", "no_grad"):
            module.keys(features)
