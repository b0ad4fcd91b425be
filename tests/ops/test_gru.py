"""gru: the common suite, then the recurrence's own properties."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import mbm_kernels
from mbm_kernels.ops.gru import reference
from mbm_kernels.testing import Case, Hiding
from mbm_kernels.testing.suite import interpreted
from tests.conftest import raises

WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh")


def sizes(t, b, c, h):
    return {"T": t, "B": b, "C": c, "H": h}


HIDING = [
    Case("a row of length 0", sizes(5, 3, 3, 7), {"lengths": [3, 0, 5]}),
    Case("reversed", sizes(5, 4, 5, 8), {"reverse": True, "lengths": [2, 5, 0, 4]}),
    Case("most steps valid", sizes(5, 4, 5, 8), {"lengths": [5, 4, 5, 5]}),
    Case("most steps valid, reversed", sizes(5, 2, 5, 8), {"reverse": True, "lengths": [4, 5]}),
    Case("past a tile", sizes(3, 13, 33, 37), {"lengths": [3, 0, 1, 2, *[3] * 8, 0]}),
    Case("only rows of length 0", sizes(3, 2, 4, 5), {"lengths": [0, 0]}),
]


def unread_past_lengths(inputs):
    beyond = (torch.arange(len(inputs["x"]))[:, None] >= inputs["lengths"])[:, :, None]
    return {"x": beyond}, [beyond, torch.zeros(1, 1, dtype=torch.bool)]


def state_of_rows_without_steps(inputs):
    """h0 [..., B, H] is their h_n, and nothing else."""
    rests = (inputs["lengths"] == 0)[:, None]
    return [{**inputs, "h0": inputs["h0"].masked_fill(rests, torch.nan)}] if rests.any() else []


class TestGru(Hiding):
    op = "gru"
    function = staticmethod(mbm_kernels.gru)
    reference = staticmethod(reference.gru)
    diff = ("x", "h0", *WEIGHTS)
    cases = [
        Case("primes below one vector", sizes(5, 3, 3, 7), {"lengths": [3, 0, 5]}),
        Case("one row", sizes(4, 1, 19, 24)),
        Case("rows and units past a tile", sizes(3, 13, 33, 37)),
        Case("inputs past one slice of the depth", sizes(2, 3, 300, 20)),
        Case("reversed", sizes(4, 3, 5, 8), {"reverse": True}),
        Case("reversed in lengths", sizes(5, 4, 5, 8), {"reverse": True, "lengths": [2, 5, 0, 4]}),
        Case("most steps valid", sizes(5, 4, 5, 8), {"lengths": [5, 4, 5, 5]}),
        Case("most steps valid, reversed", sizes(5, 2, 5, 8), {"reverse": True, "lengths": [4, 5]}),
        Case("no initial state", sizes(4, 5, 6, 17), {"h0": False}),
        Case("no biases", sizes(4, 3, 8, 16), {"bias": False}),
        Case("only lengths", sizes(4, 2, 3, 5), {"h0": False, "bias": False, "lengths": [1, 4]}),
        Case("tiny magnitudes", sizes(4, 3, 9, 17), scale=1e-3),
        Case("large inputs saturate the gates", sizes(4, 3, 9, 17), {"x": 10.0}),
        Case("large states", sizes(4, 3, 9, 17), {"x": 0.1, "state": 10.0}),
    ]
    edge_cases = [
        Case("all ones", sizes(1, 1, 1, 1)),
        Case("no steps", sizes(0, 2, 3, 4)),
        Case("no steps, no state", sizes(0, 2, 3, 4), {"h0": False}),
        Case("no steps by lengths", sizes(0, 2, 3, 4), {"lengths": [0, 0]}),
        Case("no batch", sizes(3, 0, 4, 5)),
        Case("no batch with lengths", sizes(3, 0, 4, 5), {"lengths": []}),
        Case("no inputs", sizes(3, 2, 0, 5)),
        Case("no units", sizes(3, 2, 4, 0)),
        Case("only rows of length 0", sizes(3, 2, 4, 5), {"lengths": [0, 0]}),
        Case("last step of no row", sizes(6, 2, 4, 5), {"lengths": [1, 2]}),
        Case("lengths that are all T", sizes(3, 2, 4, 5), {"lengths": [3, 3]}),
    ]

    def make(self, case, generator):
        t, b, c, h = (case.sizes[letter] for letter in "TBCH")

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        given = case.options
        inputs = {"x": randn(t, b, c) * given.get("x", 1.0), "h0": None}
        if given.get("h0", True):
            inputs["h0"] = randn(b, h) * given.get("state", 1.0)
        bound = max(h, 1) ** -0.5  # the spread of a trained layer: of torch's own start
        inputs |= {"w_ih": randn(3 * h, c) * bound, "w_hh": randn(3 * h, h) * bound}
        if given.get("bias", True):
            inputs |= {"b_ih": randn(3 * h) * bound, "b_hh": randn(3 * h) * bound}
        if "lengths" in given:
            inputs["lengths"] = torch.tensor(given["lengths"], dtype=torch.int64)
        return inputs | {"reverse": given.get("reverse", False)}

    hiding_cases = HIDING

    def unread(self, inputs):
        return unread_past_lengths(inputs)

    def partly_read(self, inputs):
        return state_of_rows_without_steps(inputs)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("initial", [True, False])
    def test_equals_torch_gru(self, backend, bias, initial):
        stock = torch.nn.GRU(5, 6, bias=bias, bidirectional=True)
        x = torch.randn(4, 3, 5)
        h0 = torch.randn(2, 3, 6) if initial else None
        expected_y, expected_h = stock(x, h0)
        weights = dict(stock.named_parameters())
        for direction, suffix in enumerate(("", "_reverse")):
            given = [
                n for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if bias or "w" in n
            ]
            y, h_n = mbm_kernels.gru(
                x,
                None if h0 is None else h0[direction],
                *(weights[f"{name}_l0{suffix}"] for name in given),
                reverse=direction == 1,
                backend=backend,
            )
            torch.testing.assert_close(y, expected_y[..., 6 * direction : 6 * direction + 6])
            torch.testing.assert_close(h_n, expected_h[direction])

    @pytest.mark.parametrize("reverse", [False, True])
    def test_lengths_equal_a_packed_sequence(self, backend, reverse):
        stock = torch.nn.GRU(5, 6, bidirectional=True)
        lengths = torch.tensor([2, 6, 1, 4])
        x = torch.randn(6, 4, 5, requires_grad=True)
        output, states = stock(pack_padded_sequence(x, lengths, enforce_sorted=False))
        half = slice(6, 12) if reverse else slice(0, 6)
        expected = pad_packed_sequence(output)[0][..., half], states[int(reverse)]
        suffix = "_reverse" if reverse else ""
        weights = [
            getattr(stock, f"{name}_l0{suffix}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        ]
        actual = mbm_kernels.gru(
            x, None, *weights, lengths=lengths, reverse=reverse, backend=backend
        )
        torch.testing.assert_close(actual, expected)
        loss = [sum(o.sin().sum() for o in outputs) for outputs in (actual, expected)]
        ours, theirs = (torch.autograd.grad(v, [x, *weights]) for v in loss)
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_split_sequence_equals_the_whole(self, backend, reverse):
        inputs = self.inputs(Case("", sizes(7, 3, 5, 8)), torch.float32)
        inputs["reverse"] = reverse
        y, h_n = self.run(inputs, backend)
        parts, state = [], inputs["h0"]
        pieces = inputs["x"].split([3, 0, 4])
        for piece in reversed(pieces) if reverse else pieces:
            part, state = self.run({**inputs, "x": piece, "h0": state}, backend)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts[::-1] if reverse else parts), y)
        torch.testing.assert_close(state, h_n)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_row_does_not_depend_on_its_batch(self, backend, reverse):
        lengths = [3, 6, 0, 5, 6, 1, 4, 2, 6]
        inputs = self.inputs(Case("", sizes(6, 9, 20, 24), {"lengths": lengths}), torch.float32)
        inputs["reverse"] = reverse
        y, h_n = self.run(inputs, backend)
        for row, length in enumerate(lengths):
            single = {**inputs, "x": inputs["x"][:length, row : row + 1], "lengths": None}
            single["h0"] = inputs["h0"][row : row + 1]
            alone, state = self.run(single, backend)
            # MKL's order depends on B; one step has an order of its own.
            same = backend == "cpu" and length != 1
            exact = {"rtol": 0.0, "atol": 0.0} if same else {}
            torch.testing.assert_close(alone[:, 0], y[:length, row], **exact)
            torch.testing.assert_close(state[0], h_n[row], **exact)

    @pytest.mark.parametrize("reverse", [False, True])
    @pytest.mark.parametrize("lengths", [[2, 0, 1], [4, 3, 4]])
    def test_past_its_length_a_row_is_not_read(self, backend, lengths, reverse):
        case = Case("", sizes(4, 3, 5, 8), {"lengths": lengths, "reverse": reverse})
        inputs = self.inputs(case, torch.float32)
        beyond = torch.arange(4)[:, None] >= inputs["lengths"]
        inputs["x"][beyond] = float("nan")
        y, h_n = self.run(inputs, backend)
        assert (y[beyond] == 0).all()
        assert torch.equal(h_n[inputs["lengths"] == 0], inputs["h0"][inputs["lengths"] == 0])
        grads = self.gradients(
            lambda i: self.run(i, backend), inputs, [torch.ones_like(y), torch.ones_like(h_n)]
        )
        assert (grads["x"][beyond] == 0).all()
        for name, grad in grads.items():
            assert torch.isfinite(grad).all(), name
            assert (grad != 0).any(), name
        # A gradient that arrives for the zeros past a length has nowhere to go.
        arriving = torch.where(beyond[:, :, None], 5.0, 1.0).expand_as(y)
        again = self.gradients(
            lambda i: self.run(i, backend), inputs, [arriving, torch.ones_like(h_n)]
        )
        for name, grad in grads.items():
            torch.testing.assert_close(again[name], grad)

    def test_gradient_of_either_output_alone(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        for used in (0, 1):

            def one(run, used=used):
                return lambda given: (run(given)[used],)

            grads = [torch.ones_like(self.run(inputs, backend)[used])]
            actual = self.gradients(one(lambda i: self.run(i, backend)), inputs, grads)
            expected = self.gradients(one(self.define), inputs, grads)
            for name, grad in expected.items():
                torch.testing.assert_close(actual[name], grad, msg=lambda m, n=name: f"{n}: {m}")

    def test_frozen_inputs_get_no_gradient(self, backend):
        inputs = self.inputs(self.cases[0], torch.float32)
        grads = [torch.ones_like(o) for o in self.run(inputs, backend)]
        expected = self.gradients(self.define, inputs, grads)
        for name in self.diff:
            given = {**inputs, name: inputs[name].clone().requires_grad_()}
            sum(o.sum() for o in self.run(given, backend)).backward()
            torch.testing.assert_close(given[name].grad, expected[name])

    def test_result_is_never_a_view_of_h0(self, backend):
        for steps, lengths in ((0, None), (3, [0, 0])):
            case = Case("", sizes(steps, 2, 3, 4), {"lengths": lengths} if lengths else {})
            inputs = self.inputs(case, torch.float32)
            _, h_n = self.run(inputs, backend)
            assert torch.equal(h_n, inputs["h0"])
            assert h_n.data_ptr() != inputs["h0"].data_ptr()

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    @pytest.mark.parametrize("case_index", [0, 4])
    def test_vmap(self, backend, case_index):
        inputs = self.inputs(self.cases[case_index], torch.float32)
        xs = torch.randn(3, *inputs["x"].shape)

        def call(x):
            return self.run({**inputs, "x": x}, backend)

        expected = [torch.stack(o) for o in zip(*(call(x) for x in xs), strict=True)]
        for actual, e in zip(torch.func.vmap(call)(xs), expected, strict=True):
            torch.testing.assert_close(actual, e)

    @pytest.mark.filterwarnings("ignore:There is a performance drop")
    def test_per_sample_gradients(self, backend):
        inputs = self.inputs(self.cases[1], torch.float32)
        xs = torch.randn(3, *inputs["x"].shape)

        def loss(w_hh, x):
            return sum(o.sin().sum() for o in self.run({**inputs, "w_hh": w_hh, "x": x}, backend))

        grad = torch.func.grad(loss)
        actual = torch.func.vmap(grad, (None, 0))(inputs["w_hh"], xs)
        torch.testing.assert_close(actual, torch.stack([grad(inputs["w_hh"], x) for x in xs]))

    def test_threads_do_not_change_a_bit(self, backend):
        case = Case("", sizes(5, 9, 40, 48), {"lengths": [5, 4, 0, 1, 5, 2, 3, 5, 4]})
        if interpreted(backend):
            case = Case("", sizes(2, 3, 10, 12), {"lengths": [2, 0, 1]})
        inputs = self.inputs(case, torch.float32)
        before = torch.get_num_threads()
        results = []
        try:
            # ATen, whose products triton takes, promises nothing across thread counts.
            for threads in (1, 2, 3, 1) if backend == "cpu" else (1, 1):
                torch.set_num_threads(threads)
                outputs = self.run(inputs, backend)
                grads = [torch.ones_like(o) for o in outputs]
                found = self.gradients(lambda i: self.run(i, backend), inputs, grads)
                results.append((*outputs, *found.values()))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))

    def test_weights_changed_in_place_are_seen(self, backend):
        inputs = self.inputs(self.cases[2], torch.float32)
        self.run(inputs, backend)
        for name in WEIGHTS:
            inputs[name].mul_(-0.5)
            expected = self.define(inputs)
            torch.testing.assert_close(self.run(inputs, backend), expected)
        grads = [torch.ones_like(o) for o in expected]
        actual = self.gradients(lambda i: self.run(i, backend), inputs, grads)
        for name, grad in self.gradients(self.define, inputs, grads).items():
            torch.testing.assert_close(actual[name], grad)

    def test_bad_input(self):
        good = self.inputs(self.cases[0], torch.float32)

        def bad(**changes):
            return mbm_kernels.gru(**{**good, **changes})

        with raises(ValueError, "gru: x", "shape", "3 dimensions", "reshape"):
            bad(x=torch.randn(5, 3))
        with raises(TypeError, "x", "torch.Tensor"):
            bad(x=[[[1.0]]])
        with raises(TypeError, "w_hh", "NoneType", "torch.Tensor"):
            bad(w_hh=None)
        with raises(ValueError, "h0", r"\[B, H\] = \[3, 7\]"):
            bad(h0=torch.randn(2, 7))
        with raises(ValueError, "h0", "2 dimensions"):
            bad(h0=torch.randn(1, 3, 7))
        with raises(ValueError, "w_ih", r"\[3H, C\] = \[21, 3\]"):
            bad(w_ih=torch.randn(21, 4))
        with raises(ValueError, "w_hh", r"\[3H, H\] = \[21, 7\]"):
            bad(w_hh=torch.randn(28, 7))
        with raises(ValueError, "b_hh", r"\[3H\] = \[21\]"):
            bad(b_hh=torch.randn(7))
        with raises(ValueError, "b_ih", "None", "both biases, or neither"):
            bad(b_ih=None)
        with raises(ValueError, "b_hh", "None", "both biases, or neither"):
            bad(b_hh=None)
        with raises(TypeError, "w_ih", "float64", "float32 as x", "autocast"):
            bad(w_ih=good["w_ih"].double())
        with raises(TypeError, "x", "int64"):
            bad(x=torch.ones(5, 3, 3, dtype=torch.int64))
        with raises(ValueError, "w_hh", "meta", "cpu as x"):
            bad(w_hh=good["w_hh"].to("meta"))
        with raises(TypeError, "lengths", "float32", "int64"):
            bad(lengths=torch.tensor([1.0, 2.0, 3.0]))
        with raises(TypeError, "lengths", "list"):
            bad(lengths=[1, 2, 3])
        with raises(ValueError, "lengths", r"\[B\] = \[3\]"):
            bad(lengths=torch.tensor([1, 2]))
        with raises(ValueError, "lengths", "from -1 to 3", "0 <= length <= T = 5"):
            bad(lengths=torch.tensor([-1, 2, 3]))
        with raises(ValueError, "lengths", "from 2 to 6", "0 <= length <= T = 5"):
            bad(lengths=torch.tensor([6, 2, 3]))
        with raises(TypeError, "reverse", "int 1", "True or False"):
            bad(reverse=1)

    def test_bad_input_leaves_the_arguments_untouched(self):
        good = self.inputs(self.cases[0], torch.float32)
        before = {n: v.clone() for n, v in good.items() if isinstance(v, torch.Tensor)}
        with raises(ValueError, "lengths"):
            mbm_kernels.gru(**{**good, "lengths": torch.tensor([9, 9, 9])})
        for name, value in before.items():
            assert torch.equal(good[name], value), name
