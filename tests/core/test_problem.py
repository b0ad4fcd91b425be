"""Problem descriptors: specs, backends' signatures, and what a cached problem may not let pass."""

import inspect
import struct
import threading

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import mbm_kernels
from mbm_kernels._core import dispatch, native, problem
from mbm_kernels._core.op import OPS
from mbm_kernels._core.problem import Problems, key_of
from mbm_kernels._core.spec import Spec
from mbm_kernels.ops.conv_bias_act import problem as conv_problem
from tests.conftest import raises

BACKENDS = [(op, backend) for op in sorted(OPS) for backend in dispatch._tables[op].backends]


def assert_takes(function, expected: list[str]) -> None:
    """That its parameters are `expected`; it may pass the last of them on as *args, and take more
    that the public function gives it, with a default."""
    taken = list(inspect.signature(function).parameters.values())
    named = [p for p in taken if p.kind is not p.VAR_POSITIONAL]
    passed_on = len(named) < len(taken)
    count = len(named) if passed_on else len(expected)
    assert [p.name for p in named[:count]] == expected[:count]
    assert all(p.default is not p.empty for p in named[count:])


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_signatures_follow_the_spec(op, backend):
    spec = OPS[op].spec
    module = dispatch.load_backend(op, backend)
    described = OPS[op].problem is not None
    save = () if spec.save is None else ("save",)
    described_fwd = ["p", *spec.input_names, *save]
    assert_takes(module.fwd, described_fwd if described else list(spec.forward_names))
    if backend != "torch":
        roles = ["p", "grads", "tensors", "saved", "needs"]
        assert_takes(module.bwd, roles if described else list(spec.backward_names))
    assert_takes(module.why_not, ["device", "dtype", "sizes"])


@pytest.mark.parametrize("op", sorted(OPS))
def test_references_take_inputs_and_options_by_name(op):
    taken = inspect.signature(OPS[op].reference).parameters
    names = set(OPS[op].reference_inputs)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    assert names <= set(taken) or open_ended
    required = {n for n, p in taken.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    assert required <= names


class TestSpec:
    def test_schemas_follow_from_the_roles(self):
        spec = Spec(
            "op",
            inputs="Tensor x, Tensor? mask",
            options="int k",
            outputs=("y", "w"),
            state=("s",),
            saved=("w", "s"),
            differentiable=("x",),
            precomputed=("x",),
            save="each",
        )
        assert spec.forward_schema == (
            "(Tensor x, Tensor? mask, int k, bool[] save)"
            " -> (Tensor y, Tensor w, Tensor s, Tensor made_x)"
        )
        assert spec.backward_schema == (
            "(Tensor? grad_y, Tensor? grad_w, Tensor x, Tensor? mask, Tensor w, Tensor s, int k,"
            " bool[] needs)"
        )

    def test_strangers_are_refused(self):
        with raises(ValueError, r"op: saved: got \['z'\]; expected names among \['y'\]"):
            Spec("op", inputs="Tensor x", outputs=("y",), differentiable=("x",), saved=("z",))


def conv(x, weight, bias=None, **options):
    options.setdefault("backend", "torch")
    return mbm_kernels.conv_bias_act(x, weight, bias, **options)


@pytest.fixture
def image():
    return torch.randn(1, 4, 6, 6)


@pytest.fixture
def weight():
    return torch.randn(4, 4, 3, 3)


@pytest.mark.parametrize("guarded", [True, False], ids=["guards", "keys"])
class TestNothingSlipsBy:
    """Each call follows a legal one whose cached problem must not answer for it."""

    @pytest.fixture(autouse=True)
    def _found_by(self, guarded, monkeypatch):
        conv_problem.PROBLEMS.clear()
        if guarded:
            assert problem._guards_hold()
        else:
            monkeypatch.setattr(problem, "_guards_hold", lambda: False)

    @pytest.mark.parametrize("backend", ["torch", "cpu"])
    @pytest.mark.parametrize(
        ("legal", "wrong", "error"),
        [
            ({"stride": 1}, {"stride": True}, TypeError),
            ({"stride": 1}, {"stride": 1.0}, TypeError),
            ({"stride": (1, 1)}, {"stride": (True, 1)}, TypeError),
            ({"stride": (1, 1)}, {"stride": (1, 1.0)}, TypeError),
            ({"groups": 1}, {"groups": True}, TypeError),
            ({"groups": 1}, {"groups": 1.0}, TypeError),
            ({"dilation": 1}, {"dilation": True}, TypeError),
            ({"padding": 1}, {"padding": True}, TypeError),
            ({"padding": 0}, {"padding": False}, TypeError),
            ({"padding": (1, 1)}, {"padding": (1, 1, 1, 1)}, TypeError),
            ({"max_pool": 2}, {"max_pool": 2.0}, TypeError),
            ({"max_pool": 1}, {"max_pool": True}, TypeError),
            ({"max_pool": (2, 2, 0)}, {"max_pool": (2, 2, 0.0)}, TypeError),
            ({"max_pool": (2, 2, 0)}, {"max_pool": (2, 2, 2, 2, 0, 0)}, TypeError),
            ({"activation": "relu"}, {"activation": "RELU"}, ValueError),
        ],
    )
    def test_options_of_another_type(self, image, weight, legal, wrong, error, backend):
        for _ in range(2):
            conv(image, weight, **legal, backend=backend)
            with pytest.raises(error, match=f"conv_bias_act: {next(iter(wrong))}"):
                conv(image, weight, **wrong, backend=backend)

    def test_tensors_of_another_kind(self, image, weight):
        bias = torch.randn(4)
        residual = torch.randn(1, 4, 4, 4)
        wrong = [
            ((image.double(), weight, bias), {}, TypeError, "weight: got torch.float32"),
            ((image, weight.double(), bias), {}, TypeError, "weight: got torch.float64"),
            ((image, weight, bias.double()), {}, TypeError, "bias: got torch.float64"),
            ((image, weight, bias.to("meta")), {}, ValueError, "bias: got meta"),
            ((image, weight.to("meta"), bias), {}, ValueError, "weight: got meta"),
            ((image, weight, bias[:3]), {}, ValueError, "bias: got shape"),
            ((image, weight, bias[None]), {}, ValueError, "bias: got shape"),
            ((image, weight, [0.0] * 4), {}, TypeError, "bias: got list"),
            ((image[0, 0], weight, bias), {}, ValueError, "x: got shape"),
            ((image[:, :3], weight, bias), {}, ValueError, "x: got 3 channels"),
            ((image.int(), weight.int(), bias.int()), {}, TypeError, "x: got torch.int32"),
            ((image, weight, bias), {"residual": residual[..., :3]}, ValueError, "residual"),
            ((image, weight, bias), {"residual": residual.half()}, TypeError, "residual"),
            ((image, weight, bias), {"residual": residual[0]}, ValueError, "residual"),
        ]
        for arguments, options, error, message in wrong:
            conv(image, weight, bias)
            conv(image, weight, bias, residual=residual)
            for _ in range(2):
                with pytest.raises(error, match=f"conv_bias_act: {message}"):
                    conv(*arguments, **options)

    def test_a_registered_call_leaves_no_public_problem(self, image, weight):
        registered = torch.ops.mbm_kernels.conv_bias_act
        registered(
            image, weight, None, None, [1, 1], [1] * 4, [1, 1], 1, None, None, False, "torch"
        )
        for _ in range(2):
            with raises(TypeError, "padding", "an int or a pair"):
                conv(image, weight, stride=[1, 1], padding=[1] * 4, dilation=[1, 1])

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_layouts_have_problems_of_their_own(self, image, weight, layout):
        conv(image, weight)
        given = image.contiguous(memory_format=layout)
        stock = torch.nn.functional.conv2d(given, weight)
        for backend in ("torch", "cpu"):
            y = conv(given, weight, backend=backend)
            assert y.stride() == stock.stride()
            torch.testing.assert_close(y, stock)


def gru_inputs(cell: bool = False):
    x = torch.randn(2, 8) if cell else torch.randn(3, 2, 8)
    weights = [torch.randn(s) for s in ((12, 8), (12, 4), (12,), (12,))]
    return dict(
        zip(
            ("x", "h" if cell else "h0", "w_ih", "w_hh", "b_ih", "b_hh"),
            (x, torch.randn(2, 4), *weights),
            strict=True,
        )
    )


def attention_inputs(heads: tuple[int, ...] = ()):
    query, key, value = (torch.randn(2, *heads, n, 8) for n in (3, 5, 5))
    return {"query": query, "key": key, "value": value}


LEGAL = {
    "gru": gru_inputs,
    "gru_cell": lambda: gru_inputs(cell=True),
    "additive_attention": lambda: attention_inputs() | {"v": torch.randn(8)},
    "cross_attention": lambda: attention_inputs((2,)),
}
WRONG = [
    ("gru", {"reverse": 0}, TypeError, "reverse"),
    ("gru", {"reverse": None}, TypeError, "reverse"),
    ("gru", {"lengths": torch.tensor([1, 4])}, ValueError, "lengths"),
    ("gru", {"lengths": torch.tensor([1.0, 2.0])}, TypeError, "lengths"),
    ("gru", {"b_ih": None}, ValueError, "b_"),
    ("gru", {"b_hh": None}, ValueError, "b_"),
    ("gru", {"h0": torch.randn(4)}, ValueError, "h0"),
    ("gru", {"x": torch.randn(3, 2, 7)}, ValueError, "w_ih"),
    ("gru", {"x": torch.randn(3, 2, 8).double()}, TypeError, "h0"),
    ("gru", {"w_ih": torch.randn(12, 8).half()}, TypeError, "w_ih"),
    ("gru_cell", {"h": torch.randn(1, 4)}, ValueError, "h"),
    ("gru_cell", {"b_ih": None}, ValueError, "b_"),
    ("gru_cell", {"x": torch.randn(2, 8).double()}, TypeError, "h"),
    ("gru_cell", {"w_hh": [0.0]}, TypeError, "w_hh"),
    ("additive_attention", {"v": torch.randn(7)}, ValueError, "v"),
    ("additive_attention", {"mask": torch.ones(2, 3, 5)}, TypeError, "mask"),
    ("additive_attention", {"mask": torch.ones(2, 4, 5).bool()}, ValueError, "mask"),
    ("additive_attention", {"key_lengths": torch.tensor([1, 6])}, ValueError, "key_lengths"),
    ("additive_attention", {"key": torch.randn(2, 5, 8).half()}, TypeError, "key"),
    ("cross_attention", {"scale": True}, TypeError, "scale"),
    ("cross_attention", {"scale": "1"}, TypeError, "scale"),
    ("cross_attention", {"need_weights": "all"}, ValueError, "need_weights"),
    ("cross_attention", {"mask": torch.ones(2, 2, 3, 5).int()}, TypeError, "mask"),
    ("cross_attention", {"mask": torch.ones(2, 2, 3, 4).bool()}, ValueError, "mask"),
    ("cross_attention", {"key_lengths": torch.tensor([1, 6])}, ValueError, "key_lengths"),
    ("cross_attention", {"value": torch.randn(2, 2, 4, 8)}, ValueError, "value"),
]


@pytest.mark.parametrize("backend", ["auto", "torch", "cpu"])
@pytest.mark.parametrize(("op", "wrong", "error", "name"), WRONG)
def test_nothing_slips_by_a_call_that_is_remembered(op, wrong, error, name, backend):
    function, legal = getattr(mbm_kernels, op), LEGAL[op]()
    for _ in range(2):
        function(**legal, backend=backend)
        if op == "cross_attention":
            function(**legal, scale=1, backend=backend)
        with pytest.raises(error, match=f"{op}: {name}"):
            function(**{**legal, **wrong}, backend=backend)


@pytest.mark.parametrize("op", LEGAL)
def test_a_call_that_is_remembered_has_the_same_result(op):
    function = getattr(mbm_kernels, op)
    for backend in ("torch", "cpu"):
        for training in (False, True):
            legal = {n: t.clone().requires_grad_(training) for n, t in LEGAL[op]().items()}
            outputs = []
            for _ in range(3):
                found = function(**legal, backend=backend)
                first = found[0] if isinstance(found, tuple) else found
                grads = torch.autograd.grad(first.sum(), list(legal.values())) if training else ()
                outputs.append((first, *grads))
            for again in outputs[1:]:
                for a, e in zip(again, outputs[0], strict=True):
                    assert torch.equal(a, e)
        with torch.autocast("cpu", torch.bfloat16):
            found = function(**LEGAL[op](), backend=backend)
        assert (found[0] if isinstance(found, tuple) else found).dtype == torch.bfloat16
        found = function(**LEGAL[op](), backend=backend)
        assert (found[0] if isinstance(found, tuple) else found).dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_concat_linear_remembers_its_list(backend):
    parts, weight = [torch.randn(4, 3), torch.randn(4, 5)], torch.randn(6, 8)
    expected = mbm_kernels.concat_linear(parts, weight, backend=backend)
    for inputs in (parts, tuple(parts)):
        assert torch.equal(mbm_kernels.concat_linear(inputs, weight, backend=backend), expected)
    for wrong, error in (
        ((parts[::-1], weight[:, :7]), ValueError),
        (([*parts, parts[0]], weight), ValueError),
        ((parts[:1], weight), ValueError),
        ((iter(parts), weight), TypeError),
        (([parts[0].double(), parts[1]], weight), TypeError),
        (([], weight), ValueError),
    ):
        with pytest.raises(error, match="concat_linear: "):
            mbm_kernels.concat_linear(*wrong, backend=backend)


class TestChoice:
    """A cached choice ends with what it was made of."""

    def taken(self, *args, **options) -> str:
        with dispatch.watched() as backends:
            conv(*args, **{"backend": "auto", **options})
        return backends[0]

    @pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
    def test_what_changes_it_acts_at_once(self, image, weight, monkeypatch, torch_wins):
        assert self.taken(image, weight) == "torch"
        with dispatch.preferring("cpu"):
            assert self.taken(image, weight) == "cpu"
            with mbm_kernels.disabled():
                assert self.taken(image, weight) == "torch"
                assert self.taken(image, weight, backend="cpu") == "torch"
            assert self.taken(image, weight) == "cpu"
        assert self.taken(image, weight) == "torch"
        monkeypatch.setenv("MBM_BACKEND", "cpu")
        assert self.taken(image, weight) == "cpu"
        monkeypatch.setenv("MBM_BACKEND", "gpu")
        with raises(ValueError, "MBM_BACKEND: got 'gpu'"):
            conv(image, weight, backend="auto")
        monkeypatch.delenv("MBM_BACKEND")
        assert self.taken(image, weight) == "torch"

    def test_unknown_and_missing_backends_raise_each_time(self, image, weight):
        for _ in range(2):
            conv(image, weight)
            with raises(ValueError, "backend: got 'fast'"):
                conv(image, weight, backend="fast")
            with raises(mbm_kernels.BackendUnavailableError, "cuda"):
                conv(image, weight, backend="cuda")


def test_a_block_has_a_value_for_each_field():
    assert native.block(("b", "a"), {"a": 1, "b": -2}) == struct.pack("2q", -2, 1)
    for values, error in (
        ({"a": 1}, KeyError),
        ({"a": 1, "b": 2, "c": 3}, struct.error),
        ({"a": 1, "b": 2**63}, struct.error),
    ):
        with pytest.raises(error):
            native.block(("b", "a"), values)


class TestCache:
    def test_it_is_bounded(self):
        built = []
        problems = Problems(lambda *given: built.append(given) or len(built), inputs=0)
        for i in range(3 * problems.MOST):
            assert problems.find(i) == i + 1
            assert len(problems) <= problems.MOST
        assert problems.find(i) == len(built) == i + 1

    def test_a_kind_of_call_is_built_once(self, image, weight, monkeypatch):
        built = []
        build = conv_problem.build
        monkeypatch.setattr(conv_problem.PROBLEMS, "build", lambda *a: built.append(a) or build(*a))
        conv_problem.PROBLEMS.clear()
        for _ in range(3):
            conv(torch.randn_like(image), torch.randn_like(weight), padding=1)
        assert len(built) == 1
        conv(image, weight, padding=2)
        assert len(built) == 2

    def test_threads_share_it(self, weight):
        conv_problem.PROBLEMS.clear()
        images = [torch.randn(1, 4, 4 + i % 40, 5) for i in range(400)]
        expected = [torch.nn.functional.conv2d(x, weight) for x in images]
        failures = []

        def work():
            for x, e in zip(images, expected, strict=True):
                if not torch.equal(conv(x, weight), e):
                    failures.append(x.shape)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_what_is_not_plain_has_no_key(self, image):
        assert key_of((image,), (1,)) is not None
        assert key_of((image,), (torch.ones(()),)) is None
        assert key_of((image.to("meta"),), (1,)) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert key_of((image,), (1,)) is None
        seen = []
        torch.func.vmap(lambda x: seen.append(key_of((x,), (1,))) or x)(image)
        assert seen == [None]


class TestBackward:
    """What is at work around a backward need not have been around its forward."""

    @pytest.fixture(params=[None, "relu", "silu"])
    def graph(self, image, weight, request):
        leaves = (image.requires_grad_(), weight.requires_grad_(), torch.randn(4).requires_grad_())
        y = conv(*leaves, activation=request.param, backend="cpu")
        expected = conv(*leaves, activation=request.param, backend="torch")
        grad = torch.randn_like(y)
        return leaves, y, grad, torch.autograd.grad(expected, leaves, grad, retain_graph=True)

    def assert_close(self, actual, expected) -> None:
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)

    def test_twice_and_within_a_mode(self, graph):
        leaves, y, grad, expected = graph
        self.assert_close(torch.autograd.grad(y, leaves, grad, retain_graph=True), expected)
        with FlopCounterMode(display=False) as counter:
            self.assert_close(torch.autograd.grad(y, leaves, grad), expected)
        assert counter.get_total_flops() == 2 * 2 * 4 * 4 * leaves[1].numel()

    def test_saved_tensors_that_return_as_others(self, image, weight):
        weight.requires_grad_()

        def unpack(tensor):
            return TwoTensor(tensor, tensor) if tensor.dim() == 4 else tensor

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = conv(image, weight, backend="cpu")
        (found,) = torch.autograd.grad(y.sum(), weight)
        (expected,) = torch.autograd.grad(conv(image, weight).sum(), weight)
        torch.testing.assert_close(getattr(found, "a", found), expected, rtol=1e-4, atol=1e-4)
