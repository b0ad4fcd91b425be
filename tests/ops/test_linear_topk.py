"""linear_topk: the common suite on its values, and the order of its classes."""

import pytest
import torch

import mbm_kernels
from mbm_kernels._core import native
from mbm_kernels.ops.linear_topk import linear_topk, reference
from mbm_kernels.testing import Case, OpSuite
from mbm_kernels.testing.suite import available_backends, device_of
from tests.conftest import raises

INF, NAN = float("inf"), float("nan")
backends = pytest.mark.parametrize("backend", list(available_backends("linear_topk")))


class TestLinearTopk(OpSuite):
    """Ids are integers: they are compared below."""

    op = "linear_topk"
    function = staticmethod(lambda **inputs: linear_topk(**inputs)[0])
    reference = staticmethod(lambda **inputs: reference.linear_topk(**inputs)[0])
    diff = ("hidden", "weight", "bias")
    cases = [
        Case("the usual one", {"R": 6, "H": 24, "V": 70}, {"k": 5}),
        Case("past a tile of rows, columns and terms", {"R": 35, "H": 70, "V": 301}, {"k": 3}),
        Case("greedy without bias", {"R": 5, "H": 33, "V": 131}, {"k": 1, "bias": False}),
        Case("large logits", {"R": 4, "H": 16, "V": 40}, {"k": 2}, scale=30.0),
    ]
    edge_cases = [
        Case("no rows", {"R": 0, "H": 5, "V": 7}, {"k": 2}),
        Case("no features", {"R": 3, "H": 0, "V": 7}, {"k": 2}),
        Case("one class", {"R": 3, "H": 4, "V": 1}, {"k": 1}),
        Case("all classes", {"R": 3, "H": 4, "V": 8}, {"k": 8}),
    ]

    def make(self, case, generator):
        r, h, v = (case.sizes[letter] for letter in "RHV")
        inputs = {
            "hidden": torch.randn(r, h, generator=generator).double(),
            "weight": torch.randn(v, h, generator=generator).double() * max(h, 1) ** -0.5,
            "k": case.options["k"],
        }
        if case.options.get("bias", True):
            inputs["bias"] = torch.randn(v, generator=generator).double()
        return inputs

    def schema_args(self, inputs):
        return [inputs["hidden"], inputs["weight"], inputs.get("bias"), inputs["k"]]

    def test_leading_dimensions(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        flat = linear_topk(**inputs, backend=backend)
        folded = linear_topk(
            **{**inputs, "hidden": inputs["hidden"].view(2, 3, -1)}, backend=backend
        )
        for one, other in zip(flat, folded, strict=True):
            assert torch.equal(one.view(2, 3, -1), other)

    def test_a_row_does_not_depend_on_the_others(self, backend):
        inputs = self.inputs(self.cases[1], torch.float32)
        whole = self.run(inputs, backend)[0]
        alone = self.run({**inputs, "hidden": inputs["hidden"][7:8]}, backend)[0]
        if backend == "torch":
            torch.testing.assert_close(alone, whole[7:8])
        else:
            assert torch.equal(alone, whole[7:8])


def rows_of(logits, k, backend):
    """Values and ids where the logits are exactly these, [R, V]."""
    logits = torch.as_tensor(logits)
    r, v = logits.shape
    weight = torch.zeros(v, r)
    found = []
    for row in logits:  # by the bias: products with NaN and infinities would spread
        found.append(linear_topk(torch.zeros(1, r), weight, row.float(), k, backend=backend))
    return torch.cat([x for x, _ in found]), torch.cat([i for _, i in found])


def check_order(logits, values, ids, backend):
    """Ids are those of a stable sort; of equal logits topk, hence torch, may take others."""
    k = ids.shape[1]
    expected = logits.sort(dim=-1, descending=True, stable=True)
    if backend == "torch" and k > 1:
        chosen = logits.gather(1, ids)
        torch.testing.assert_close(chosen, expected.values[:, :k], rtol=0, atol=0, equal_nan=True)
        assert all(len(set(row)) == k for row in ids.tolist()), "a class is there twice"
    else:
        assert torch.equal(ids, expected.indices[:, :k])
        assert torch.equal(ids[:, 0], logits.argmax(-1))
    truth = logits.log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(values, truth, equal_nan=True)


@backends
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_of_equal_logits_the_lower_class_is_first(backend, k):
    logits = torch.zeros(2, 600)
    logits[0, [7, 40, 41, 300, 599]] = 2.0
    logits[1, ::2] = -0.0  # equal to 0
    values, ids = rows_of(logits, k, backend)
    check_order(logits, values, ids, backend)
    if backend != "torch":
        assert ids[0].tolist() == [7, 40, 41, 300, 599, 0, 1, 2][:k]
        assert ids[1].tolist() == list(range(k))


@backends
@pytest.mark.parametrize("k", [1, 4])
def test_order_is_that_of_a_stable_sort(backend, k):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(-4, 5, (7, 777), generator=generator).float()
    check_order(logits, *rows_of(logits, k, backend), backend)


@backends
def test_nan_and_infinities(backend):
    logits = torch.linspace(-1, 1, 300).repeat(6, 1)
    logits[0, [50, 270]] = NAN
    logits[1, [5, 260]] = INF
    logits[2] = -INF
    logits[3, 1:] = -INF
    logits[4, 10:290] = -INF
    logits[5] = NAN
    for k in (1, 3, 8):
        check_order(logits, *rows_of(logits, k, backend), backend)


@backends
def test_far_logits_neither_overflow_nor_lose_the_sum(backend):
    logits = torch.full((2, 500), -3e38)
    logits[0, 3], logits[1, [3, 400]] = 3e38, 1e4
    values, ids = rows_of(logits, 2, backend)
    check_order(logits, values, ids, backend)
    half = -torch.tensor(2.0).log()
    torch.testing.assert_close(values[:, 0], torch.stack([torch.tensor(0.0), half]))
    assert values[1, 1] == values[1, 0]


def test_the_torch_backend_sorts_no_vocabulary():
    """It is what kernels are compared with: a sort takes some 15 times as long as topk."""
    hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
    for k in (1, 5):
        with torch.profiler.profile() as profile:
            linear_topk(hidden, weight, k=k, backend="torch")
        names = {event.key for event in profile.key_averages()}
        assert "aten::sort" not in names
        assert ("aten::topk" in names) == (k > 1)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_of_random_rows(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator).to(dtype)
    weight = torch.randn(900, 64, generator=generator).to(dtype)
    given = [x.to(device_of(backend)) for x in (hidden, weight)]
    _, ids = linear_topk(*given, k=5, backend=backend)
    logits = hidden.double() @ weight.double().t()
    best = logits.sort(dim=-1, descending=True).values[:, :5]
    chosen = logits.gather(1, ids.cpu())
    allowed = 1e-4 if backend != "torch" or dtype == torch.float32 else 0.25  # of 30, rounded
    assert (chosen - best).abs().max() <= allowed


def test_threads_agree_to_the_bit(isa):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(131, 65), torch.randn(1500, 65), torch.randn(1500)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(linear_topk(hidden, weight, bias, 5, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for values, ids in found[1:]:
        assert torch.equal(values, found[0][0])
        assert torch.equal(ids, found[0][1])


def test_more_rows_than_are_packed_at_once(isa):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1030, 3), torch.randn(20, 3)
    values, ids = linear_topk(hidden, weight, None, 2, backend="cpu")
    expected = reference.linear_topk(hidden, weight, None, 2)
    torch.testing.assert_close(values, expected[0])
    assert torch.equal(ids, expected[1])


def test_a_weight_changed_in_place_is_packed_anew():
    weight = torch.zeros(9, 4)
    hidden = torch.ones(1, 4)
    assert linear_topk(hidden, weight, backend="cpu")[1].item() == 0
    weight[5] = 1.0
    assert linear_topk(hidden, weight, backend="cpu")[1].item() == 5


def test_more_classes_than_a_kernel_finds_go_to_torch():
    hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
    assert linear_topk(hidden, weight, k=50)[1].sort(-1).values[0].tolist() == list(range(50))
    with pytest.raises(mbm_kernels.BackendUnavailableError, match="up to 16 classes, not 17"):
        linear_topk(hidden, weight, k=17, backend="cpu")


def test_it_is_not_public():
    assert not hasattr(mbm_kernels, "linear_topk")
    assert mbm_kernels.backends("linear_topk")["cpu"] == native.cpu_reason()


def test_bad_input():
    hidden, weight = torch.randn(3, 8), torch.randn(50, 8)
    with raises(ValueError, "linear_topk: k: got 0; expected 1 <= k <= V = 50"):
        linear_topk(hidden, weight, k=0)
    with raises(ValueError, "linear_topk: k: got 51"):
        linear_topk(hidden, weight, k=51)
    with raises(ValueError, r"weight: got shape \[50, 8\]; expected \[V, H\] = \[50, 7\]"):
        linear_topk(hidden[:, 1:], weight)
    with raises(ValueError, r"bias: got shape \[4\]; expected \[V\] = \[50\]"):
        linear_topk(hidden, weight, torch.zeros(4))
    with raises(TypeError, "weight: got torch.float64; expected torch.float32 as hidden"):
        linear_topk(hidden, weight.double())
