"""Chains that follow each other as one native call: its values, and when it stands aside."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn

import mbm_kernels
from mbm_kernels._core import dispatch, native, packing
from mbm_kernels.optimize.parity import stock_form
from tests.optimize.models import (
    Block,
    OfBlocks,
    ResNet,
    assert_same_objects,
    optimized,
    sequences,
    state,
    warmed,
)


class Scaled(nn.Module):
    """Two containers with something between them that is no chain."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Block(3, 8), Block(8, 8)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        x = self.first(x)
        return self.second(x * self.scale) + x.mean()


@pytest.fixture
def network():
    """A residual network, what it is called with, and what it answers in stock PyTorch."""
    generator = torch.Generator().manual_seed(3)
    model, x = warmed(ResNet()), torch.randn(2, 3, 40, 40, generator=generator)
    with torch.no_grad():
        return model, x, model(x)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
class TestValues:
    def test_of_a_whole_network(self, network, calls, memory):
        model, x, expected = network
        x = x.contiguous(memory_format=memory)
        report = optimized(model, x)
        assert [len(s.steps) for s in sequences(model)] == [6]  # the stem and both blocks
        calls()
        with torch.no_grad():
            found = model(x)
            assert calls() == 1
            with dispatch.observed() as seen:
                one_by_one = [model(x) for _ in range(4)][-1]
            assert len(seen) == 6  # each choice is told once
            assert calls() == 0
        if memory is torch.channels_last:  # which all steps are in either way
            assert torch.equal(found, one_by_one)
        torch.testing.assert_close(found, one_by_one, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert len(report.replaced) == 6

    def test_of_parts(self, calls, memory):
        model = warmed(Scaled())
        x = torch.randn(2, 3, 12, 9).contiguous(memory_format=memory)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            calls()
            found = model(x)
        assert calls() == 2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_of_results_used_twice(self, calls, memory):
        def forward(self, x):
            y = self.a(x).relu()
            z = self.b(y).relu()
            return {"y": y, "w": self.c(z + y).relu() + z}

        layers = {name: nn.Conv2d(5, 5, 3, padding=1) for name in "abc"}
        model = OfBlocks(forward, **layers).eval()
        x = torch.randn(2, 5, 8, 7).contiguous(memory_format=memory)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            calls()
            found = model(x)
        assert calls() >= 1
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


class TestKinds:
    def test_each_kind_of_inputs_is_right(self, network, calls):
        model, x, _expected = network
        optimized(model, x)
        kinds = [x, x[:1], x[..., :33], x.contiguous(memory_format=torch.channels_last)]
        truth = stock_form(copy.deepcopy(model))
        with torch.no_grad():
            for _ in range(4):
                for given in kinds:
                    torch.testing.assert_close(model(given), truth(given), rtol=1e-4, atol=1e-4)
            calls()
            for given in kinds:
                model(given)
        assert calls() == len(kinds)

    def test_an_empty_batch(self, network):
        model, x, _expected = network
        optimized(model, x)
        with torch.no_grad():
            for _ in range(4):
                assert model(x[:0]).shape == (0, 5)

    def test_another_number_of_threads(self, network, calls):
        model, x, expected = network
        optimized(model, x)
        before = torch.get_num_threads()
        torch.set_num_threads(1 if before > 1 else 2)
        try:
            with torch.no_grad():
                found = [model(x) for _ in range(4)]
        finally:
            torch.set_num_threads(before)
        for value in found:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


def _in_place(model):
    model.layer1[0].conv1.weight.mul_(2)


def _by_data(model):
    model.layer1[0].conv1.weight.data[0] += 1


def _by_numpy(model):
    model.layer1[1].bn2.running_var.numpy()[:] = 3


def _another(model):
    model.layer1[0].conv2.weight = nn.Parameter(torch.randn(16, 16, 3, 3))


def _loaded(model):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


COUNTED = (_in_place, _another, _loaded)
CHANGES = (*COUNTED, _by_data, _by_numpy)


class TestWeights:
    @pytest.mark.parametrize(
        ("change", "freeze"),
        [(c, False) for c in CHANGES] + [(c, True) for c in COUNTED],
    )
    def test_changed_ones_are_seen(self, network, change, freeze):
        model, x, _expected = network
        stock = copy.deepcopy(model)
        optimized(model, x, freeze=freeze)
        with torch.no_grad():
            torch.manual_seed(0)
            change(model)
            torch.manual_seed(0)
            change(stock)
            for _ in range(4):
                torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)

    def test_settings_are_seen(self, network):
        model, x, _expected = network
        stock = copy.deepcopy(model)
        optimized(model, x)
        with torch.no_grad():
            for _ in range(3):
                for form in (model, stock):
                    form.layer1[0].bn1.eps = 0.5
                    form.layer1[1].downsample[0].stride = (2, 2)
                torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)

    def test_a_weight_that_is_not_folded_is_copied(self):
        model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.ReLU()).eval()
        x = torch.randn(1, 4, 9, 9)
        with torch.no_grad():
            expected = model(x)
            optimized(model, x)
            same = model[0].weight.detach().clone()
            model[0].weight.data = same  # the memory before is freed
            del same
            gc.collect()
            rest = [torch.full((4, 1, 3, 3), 7.0) for _ in range(50)]
            torch.testing.assert_close(model(x), expected)
            assert len(rest) == 50

    def test_copies_are_shared_by_kinds_of_inputs(self):
        model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()).eval()
        kinds = [torch.randn(size, 16, 9, 9) for size in (1, 2, 3)]
        optimized(model, kinds[0])
        with torch.no_grad():
            for x in 3 * kinds:
                model(x)
        (sequence,) = sequences(model)
        first, *others = (ready.runs[0].held[0] for ready in sequence._ready)
        assert len(others) == 2
        for held in others:
            assert native.addresses(held) == native.addresses(first)

    def test_bytes_are_refused_as_by_torch(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
        optimized(model, torch.randn(1, 3, 8, 8))
        with torch.no_grad(), pytest.raises(RuntimeError):
            model(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


class TestFreeze:
    def test_takes_no_hash(self, network, monkeypatch):
        model, x, expected = network
        report = optimized(model, x, freeze=True)
        taken = []
        right = packing._hashes
        monkeypatch.setattr(packing, "_hashes", lambda *args: taken.append(1) or right(*args))
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
            assert not taken
            report.revert()
            mbm_kernels.optimize(model, policy="always", sample_input=x)
            model(x)
        assert taken

    def test_of_a_gru(self):
        model, x = nn.Sequential(nn.GRU(8, 16)).eval(), torch.randn(5, 3, 8)
        stock = copy.deepcopy(model)
        with torch.no_grad():
            report = mbm_kernels.optimize(model, policy="always", sample_input=x, freeze=True)
            for _ in range(3):
                torch.testing.assert_close(model(x)[0], stock(x)[0])
            for form in (model, stock):
                form[0].weight_hh_l0.mul_(0.5)
            torch.testing.assert_close(model(x)[0], stock(x)[0])
            report.revert()
            for form in (model, stock):
                form[0].weight_hh_l0.data[0] = 1
            torch.testing.assert_close(model(x)[0], stock(x)[0])

    def test_of_a_weight_that_died(self):
        """Another one may lie where it lay, with as many writes."""
        model, x = nn.Sequential(nn.GRU(8, 16)).eval(), torch.randn(5, 3, 8)
        with torch.no_grad():
            mbm_kernels.optimize(model, policy="always", sample_input=x, freeze=True)
            for _ in range(20):
                del model[0].weight_hh_l0
                model[0].weight_hh_l0 = nn.Parameter(torch.randn(48, 16))
                stock = nn.GRU(8, 16)
                stock.load_state_dict(model[0].state_dict())
                torch.testing.assert_close(model(x)[0], stock(x)[0])

    def test_is_undone_by_forget_and_revert(self, network):
        model, x, _ = network
        report = optimized(model, x, freeze=True)
        weight = model.conv1.weight
        assert packing._is_frozen(weight)
        mbm_kernels.forget(weight)
        assert not packing._is_frozen(weight)
        report.revert()
        assert not any(packing._is_frozen(t) for t in (*model.parameters(), *model.buffers()))

    def test_is_for_inference(self):
        with pytest.raises(ValueError, match="freeze: got True; expected False where weights"):
            mbm_kernels.optimize(nn.GRU(2, 2), mode="training", freeze=True)

    def test_of_weights_made_in_inference_mode(self):
        with torch.inference_mode():
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
            x = torch.randn(1, 3, 8, 8)
            expected = model(x)
            optimized(model, x, freeze=True)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class TestUndone:
    def test_revert_restores_everything(self, network):
        model, x, _expected = network
        before = state(model)
        optimized(model, x).revert()
        assert_same_objects(model, before)

    @pytest.mark.parametrize("part", ["", "layer1", "layer1.0"])
    def test_a_hook_is_called(self, network, part):
        model, x, expected = network
        optimized(model, x)
        seen = []
        model.get_submodule(part).register_forward_hook(lambda *args: seen.append(1))
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
        assert seen == [1]

    def test_another_module_is_called(self, network):
        model, x, _expected = network
        stock = copy.deepcopy(model)
        optimized(model, x)
        torch.manual_seed(0)
        block = warmed(Block(16, 32, 2))
        with torch.no_grad():
            for form in (model, stock):
                form.layer1[1] = copy.deepcopy(block)
            for _ in range(3):
                torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)

    def test_training_mode_of_a_part(self, network):
        model, x, _expected = network
        stock = copy.deepcopy(model)
        optimized(model, x)
        with torch.no_grad():
            for form in (model, stock):
                form.layer1[0].train()
            torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)

    def test_a_part_by_itself(self, network, calls):
        model, x, _expected = network
        optimized(model, x)
        part = torch.randn(1, 16, 6, 6)
        stock = stock_form(copy.deepcopy(model.layer1[0]))
        with torch.no_grad():
            torch.testing.assert_close(model.layer1[0](part), stock(part), rtol=1e-4, atol=1e-4)

    def test_gradients_are_stock(self, network):
        model, x, _expected = network
        optimized(model, x)
        model(x).sum().backward()
        assert model.conv1.weight.grad is not None

    def test_copies_and_pickles(self, network, calls):
        model, x, expected = network
        optimized(model, x)
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                made.conv1.weight.mul_(2)
                found = [made(x) for _ in range(4)]
                truth = stock_form(copy.deepcopy(made))
                for value in found:
                    torch.testing.assert_close(value, truth(x), rtol=1e-4, atol=1e-4)
                calls()
                made(x)
                assert calls() == 1
                torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


class TestNative:
    def test_what_it_refuses(self):
        made = native.cpu().ConvSequence(2)
        with pytest.raises(ValueError, match="problem: got 3 bytes"):
            made.add(b"abc", (0, 0, 0), [(0, 0), (-1, 0), (1, 0)])
        made.run([0, 0], 1)  # of no steps
