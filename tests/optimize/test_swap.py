"""Modules become their counterparts on the instance, and are themselves again."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import mbm_kernels
from tests.conftest import near, raises
from tests.optimize.models import GRUClassifier, ResNet, assert_same_objects, state, warmed


def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())


def encoder():
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)


MODELS = {
    "resnet": (ResNet, lambda: torch.randn(2, 3, 32, 32)),
    "gru": (GRUClassifier, lambda: torch.randint(0, 11, (2, 5))),
    "encoder": (encoder, lambda: torch.randn(2, 6, 16)),
}


@pytest.fixture(params=MODELS)
def case(request):
    build, sample = MODELS[request.param]
    return build(), sample()


class TestTraining:
    def test_values_and_gradients(self, case, predictions):
        predictions(lambda op, sizes: True)
        model, sample = case
        report = mbm_kernels.optimize(model, mode="training")
        assert report.replaced
        parity = mbm_kernels.check_parity(model, sample)
        assert parity.ok, str(parity)
        assert any(row.what.startswith("gradient of ") for row in parity.rows)

    def test_objects_stay(self, case):
        model, sample = case
        before = state(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model(sample).sum().backward()
        optimizer.step()
        report = mbm_kernels.optimize(model, mode="training", policy="always")
        for name, module in model.named_modules():
            assert module is before[name][0]
            assert module._parameters is before[name][2]["_parameters"]
        model(sample).sum().backward()
        optimizer.step()
        report.revert()
        assert_same_objects(model, before)

    def test_a_step_is_the_same(self, predictions):
        predictions(lambda op, sizes: True)
        model, sample = GRUClassifier(), torch.randint(0, 11, (3, 4))
        other = copy.deepcopy(model)
        mbm_kernels.optimize(model, mode="training")
        for m in (model, other):
            optimizer = torch.optim.Adam(m.parameters(), 0.01)
            for _ in range(2):
                optimizer.zero_grad()
                m(sample).square().sum().backward()
                optimizer.step()
        for ours, stock in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-4)

    def test_nothing_is_folded(self):
        model = ResNet()
        report = mbm_kernels.optimize(model, mode="training")
        assert all(row.now == "mbm_kernels.nn.Conv2d" for row in report.replaced)
        assert type(model) is ResNet


class TestRevert:
    def test_bit_equal_and_idempotent(self, case):
        model, sample = case
        warmed(model)
        before, keys = state(model), list(model.state_dict())
        with torch.no_grad():
            expected = model(sample)
            report = mbm_kernels.optimize(model, policy="always")
            assert list(model.state_dict()) == keys
            model(sample)
            report.revert()
            report.revert()
            assert torch.equal(model(sample), expected)
        assert_same_objects(model, before)

    def test_context(self):
        model = GRUClassifier()
        before = state(model)
        with mbm_kernels.optimized(model, mode="training") as report:
            assert isinstance(model.gru, mbm_kernels.nn.GRU)
            assert len(report.replaced) == 2
        assert_same_objects(model, before)

    def test_a_class_that_changed_since(self):
        model = convolution()
        report = mbm_kernels.optimize(model, mode="training")
        parametrizations.weight_norm(model[0])
        with raises(RuntimeError, "0: its class is ParametrizedConv2d now", "undo that first"):
            report.revert()
        torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        report.revert()
        assert type(model[0]) is nn.Conv2d

    def test_fused_then_optimized_for_training(self):
        model = warmed(ResNet())
        before = state(model)
        first = mbm_kernels.optimize(model)
        again = mbm_kernels.optimize(model)
        second = mbm_kernels.optimize(model, mode="training")
        assert not again.replaced
        assert not second.replaced
        assert {row.reason for row in second.kept} == {
            "it is in a chain that was fused; revert that first"
        }
        second.revert()
        again.revert()
        first.revert()
        assert_same_objects(model, before)

    def test_twice_optimized(self):
        model = convolution()
        first = mbm_kernels.optimize(model, mode="training")
        second = mbm_kernels.optimize(model, mode="training")
        assert not second.replaced
        assert second.kept[0].reason == "it is a module of mbm_kernels already"
        second.revert()
        assert isinstance(model[0], mbm_kernels.nn.Conv2d)
        first.revert()
        assert type(model[0]) is nn.Conv2d


class TestKept:
    def test_reasons(self):
        class Own(nn.Conv2d):
            pass

        replaced = nn.GRUCell(2, 2)
        replaced.forward = lambda x, h=None: x
        model = nn.ModuleDict(
            {
                "own": Own(1, 1, 1),
                "normed": weight_norm(nn.Conv2d(1, 1, 1)),
                "parametrized": parametrizations.weight_norm(nn.Conv2d(1, 1, 1)),
                "replaced": replaced,
                "complex": nn.Conv2d(1, 1, 1, dtype=torch.complex64),
                "ours": mbm_kernels.nn.GRU(1, 1),
                "lazy": nn.LazyConv2d(1, 1),
            }
        )
        report = mbm_kernels.optimize(model, mode="training")
        reasons = {row.name: row.reason for row in report.kept}
        assert not report.replaced
        assert "Own, a subclass of torch.nn.Conv2d" in reasons["own"]
        assert "computed by a hook (weight_norm" in reasons["normed"]
        assert reasons["parametrized"] == "its weights are parametrized"
        assert reasons["replaced"] == "its forward was replaced on the instance"
        assert reasons["complex"] == "its dtype is complex64"
        assert reasons["ours"] == "it is a module of mbm_kernels already"
        assert "LazyConv2d, a subclass" in reasons["lazy"]

    def test_filter_and_ops(self):
        model = GRUClassifier()
        report = mbm_kernels.optimize(model, mode="training", ops=["gru"])
        assert [row.name for row in report.replaced] == ["gru"]
        assert report.kept[0].reason == "gru_cell is not among ops"
        report.revert()
        seen = {}

        def choose(name, module):
            seen[name] = module
            return name == "cell"

        report = mbm_kernels.optimize(model, mode="training", filter_fn=choose)
        assert [row.name for row in report.replaced] == ["cell"]
        assert seen == {"gru": model.gru, "cell": model.cell}
        assert report.kept[0].reason == "filter_fn left it out"

    def test_strict(self):
        model = nn.Sequential(nn.Conv2d(1, 1, 1), parametrizations.weight_norm(nn.Conv2d(1, 1, 1)))
        with raises(ValueError, "strict: got 1: its weights are parametrized", "filter_fn"):
            mbm_kernels.optimize(model, mode="training", strict=True)
        assert type(model[0]) is nn.Conv2d
        options = {"mode": "training", "strict": True}
        report = mbm_kernels.optimize(model, filter_fn=lambda name, _: name == "0", **options)
        assert len(report.replaced) == 1


class TestSharing:
    def test_a_module_in_two_places(self):
        shared = nn.Conv2d(3, 3, 1)
        model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
        report = mbm_kernels.optimize(model, mode="training")
        assert [row.name for row in report.replaced] == ["a"]
        assert model["a"] is model["b"][0] is shared

    def test_hooks_run_and_can_be_removed(self):
        model, seen = convolution(), []
        handles = [
            model[0].register_forward_pre_hook(lambda m, args: seen.append("pre")),
            model[0].register_forward_hook(
                lambda m, args, kwargs, out: seen.append("post"), with_kwargs=True
            ),
            model[0].register_full_backward_hook(lambda m, i, o: seen.append("back")),
            model[0].register_state_dict_post_hook(lambda *args: seen.append("state")),
            model[0].register_load_state_dict_post_hook(lambda *args: seen.append("load")),
        ]
        mbm_kernels.optimize(model, mode="training")
        model(torch.randn(1, 3, 4, 4, requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())
        assert seen == ["pre", "post", "back", "state", "load"]
        for handle in handles:
            handle.remove()
        model(torch.randn(1, 3, 4, 4))
        assert len(seen) == 5

    def test_the_model_itself(self):
        gru = nn.GRU(3, 4)
        x = torch.randn(2, 1, 3)
        expected, _ = gru(x)
        with mbm_kernels.optimized(gru, mode="training") as report:
            assert report.replaced[0].name == "(model)"
            near(gru(x)[0], expected)
        assert type(gru) is nn.GRU

    def test_deepcopy_pickle_and_checkpoints(self, case):
        model, sample = case
        warmed(model)
        with torch.no_grad():
            expected = model(sample)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            report = mbm_kernels.optimize(model)
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            loaded = torch.load(file, weights_only=False)
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
                assert [type(m).__name__ for m in other.modules()] == [
                    type(m).__name__ for m in model.modules()
                ]
                torch.testing.assert_close(other(sample), expected, rtol=1e-4, atol=1e-4)
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name])
            report.revert()
            model.load_state_dict(loaded.state_dict())
            torch.testing.assert_close(model(sample), expected)


@pytest.mark.parametrize(
    ("options", "error", "fragments"),
    [
        ({"mode": "eval"}, ValueError, ("mode: got 'eval'", "'inference', 'training'")),
        ({"policy": "never"}, ValueError, ("policy: got 'never'", "'measured'")),
        ({"ops": ["conv"]}, ValueError, ("ops: got 'conv'", "conv_bias_act")),
        ({"ops": "gru"}, TypeError, ("several names",)),
        ({"policy": "measured"}, ValueError, ("sample_input", "measured")),
        ({"sample_input": 3}, TypeError, ("sample_input: got int", "tuple")),
        ({"mode": "inference"}, ValueError, ("training mode", r"model.eval\(\)")),
    ],
)
def test_wrong_arguments(options, error, fragments):
    with raises(error, *fragments):
        mbm_kernels.optimize(convolution(), **{"mode": "training", **options})


def test_what_is_no_model():
    with raises(TypeError, "model: got function", "torch.nn.Module"):
        mbm_kernels.optimize(convolution)


def test_a_model_that_fails_on_the_sample():
    model = convolution()
    with pytest.raises((RuntimeError, ValueError)):
        mbm_kernels.optimize(model, mode="training", sample_input=torch.randn(1, 5, 4, 4))
    assert type(model[0]) is nn.Conv2d
