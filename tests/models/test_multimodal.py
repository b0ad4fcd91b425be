"""The multimodal big model: streams and subsets of them, both kinds of layers, heads, errors."""

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

import mbm_kernels
from mbm_kernels.models import MultimodalBigModel, MultimodalConfig
from mbm_kernels.models.multimodal import STREAMS

from .parity import assert_parity

SIZES = {"vocab_size": 11, "image_size": 16, "color_bins": 4, "time_features": 3, "joint": 20}
SUBSETS = [s for k in range(1, 5) for s in combinations(STREAMS, k)]
LENGTHS = {"word_lengths": "words", "time_lengths": "time"}


def make(layers="stock", **changes):
    torch.manual_seed(0)
    config = MultimodalConfig(**{**SIZES, "heads": ("similarity", "control"), **changes})
    return MultimodalBigModel(config, layers=layers).eval()


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1,
        "words": torch.tensor([[1, 4, 5, 2], [1, 7, 2, 0], [3, 8, 9, 10]]),
        "color": torch.rand(3, 4, 4, 4, generator=generator),
        "time": torch.randn(3, 5, 3, generator=generator),
        "word_lengths": torch.tensor([4, 3, 1]),
        "time_lengths": torch.tensor([2, 5, 0]),
    }


def only(given, streams):
    return {n: x for n, x in given.items() if LENGTHS.get(n, n) in streams}


def cast_all(given, cast):
    return {name: cast(x) for name, x in given.items()}


@pytest.mark.parametrize("streams", SUBSETS, ids="+".join)
def test_layers_share_state_dict_and_agree(streams, given):
    """Of a model of all streams that is given some."""

    def outputs(model, cast):
        y = model(**cast_all(only(given, streams), cast))
        return y, model.similarity(y), model.control(y)

    assert_parity(make(controls=2), make("mbm", controls=2), outputs)


@pytest.mark.parametrize("streams", [("image",), ("words", "color"), ("image", "words", "time")])
@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_a_configuration_of_some_streams(layers, streams, given):
    model = make(layers, streams=streams)
    assert set(model.encoders) == set(streams)
    y = model(**only(given, streams))
    assert y.shape == (3, 20)
    assert model.similarity(y).shape == (3,)
    assert model.control(y).shape == (3, 1)


def test_the_order_of_streams_does_not_matter(given):
    keys = list(make().state_dict())
    other = make(streams=("time", "color", "words", "image"))
    assert list(other.state_dict()) == keys
    assert torch.equal(other(**given), make()(**given))


@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_y_is_the_sum_of_the_streams_shares(layers, given):
    """Y = Linear(Concat(...)); a stream that is left out contributes nothing, the bias stays."""
    model = make(layers)
    bias = model.join.bias
    alone = {s: model(**only(given, (s,))) - bias for s in STREAMS}
    for streams in SUBSETS:
        expected = bias + sum(alone[s] for s in streams)
        torch.testing.assert_close(model(**only(given, streams)), expected)
    encodings = [
        model.encoders["image"](given["image"]).mean(1),
        model.encoders["words"](given["words"], given["word_lengths"]),
        model.encoders["color"](given["color"]),
        model.encoders["time"](given["time"], given["time_lengths"]),
    ]
    joined = F.linear(torch.cat(encodings, 1), model.join.weight, bias)
    torch.testing.assert_close(model(**given), joined)


def test_heads_relate_streams_to_each_other(given):
    """A score that only added what streams say could not tell which of them belong together."""
    model = make()
    swapped = {**given, "words": given["words"].flip(0), "word_lengths": torch.tensor([1, 3, 4])}
    image, words = only(given, ("image",)), only(given, ("words", "word_lengths"))
    mixed = model.similarity(model(**image, **words)) - model.similarity(
        model(**image, **only(swapped, ("words", "word_lengths")))
    )
    alone = model.similarity(model(**words)) - model.similarity(
        model(**only(swapped, ("words", "word_lengths")))
    )
    assert (mixed - alone).abs().max() > 1e-4


@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_what_follows_a_sequence_has_no_effect(layers, given):
    model = make(layers)
    expected = model(**given)
    changed = {**given, "words": given["words"].clone(), "time": given["time"].clone()}
    for name, length in (("words", "word_lengths"), ("time", "time_lengths")):
        for row, end in enumerate(given[length]):
            changed[name][row, end:] = 6
    torch.testing.assert_close(model(**changed), expected)


def test_optimize_swaps_stock_layers_and_back(given):
    model = make()
    with torch.no_grad():
        expected = model(**given)
        report = mbm_kernels.optimize(model, policy="always")
        assert {row.name for row in report.replaced} >= {"encoders.time.gru"}
        for _ in range(2):
            torch.testing.assert_close(model(**given), expected)
        report.revert()
        assert torch.equal(model(**given), expected)


@pytest.mark.parametrize("layers", ["stock", "mbm"])
@pytest.mark.parametrize("streams", [STREAMS, ("image", "words")], ids="+".join)
def test_compiles_and_exports(layers, streams, given):
    model, given = make(layers), only(given, streams)
    expected = model(**given)
    # torch.compile breaks the graph at torch.nn.GRU.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=layers == "mbm")
    torch.testing.assert_close(compiled(**given), expected)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, (), given, dynamic_shapes={name: {0: batch} for name in given}
    ).module()
    some = {name: x[:2] for name, x in given.items()}
    torch.testing.assert_close(program(**some), model(**some))


def test_a_configuration_survives_json():
    config = MultimodalConfig(**SIZES, streams=("words", "time"), heads=("control",), controls=3)
    assert MultimodalConfig.from_dict(config.as_dict()) == config
    assert make().settings == {"config": make().config.as_dict()}


BAD = {
    "streams": ((), r"streams: got \[\]; expected one or more of \['image', 'words', 'color'"),
    "heads": ("similarity", "heads: got str 'similarity'; expected a sequence"),
    "color_channels": ((8,), r"color_channels: got \[8\]; expected 2 ints"),
    "color_bins": (3, "color_bins: got 3; expected 4 to 64"),
    "vocab_size": (0, "vocab_size: got 0; expected more than pad_id = 0 for the words"),
    "image_size": (12, "image_size: got 12; expected a multiple of 8"),
    "joint": (0, "joint: got 0; expected 1 to 65536"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations(name):
    value, text = BAD[name]
    with pytest.raises((ValueError, TypeError), match=f"MultimodalConfig: {text}"):
        MultimodalConfig(**{**SIZES, name: value})


def test_an_unknown_or_repeated_stream():
    for streams in (("image", "sound"), ("image", "image")):
        with pytest.raises(ValueError, match=r"streams: got .*; expected one or more of"):
            MultimodalConfig(**SIZES, streams=streams)


def test_a_model_without_words_needs_no_vocabulary():
    assert MultimodalBigModel(MultimodalConfig(streams=("color",)), layers="stock")


def test_bad_inputs(given):
    model = make(streams=("image", "words", "time"), heads=("similarity",))
    image, words, time = given["image"], given["words"], given["time"]
    with pytest.raises(ValueError, match=r"streams: got none; expected one or more of \['image'"):
        model()
    with pytest.raises(ValueError, match=r"streams: got color; expected some of .*; leave it out"):
        model(image, color=given["color"])
    with pytest.raises(ValueError, match="words: got a batch of 2; expected 3 as in image"):
        model(image, words[:2])
    with pytest.raises(ValueError, match="word_lengths: got lengths without words; expected both"):
        model(image, word_lengths=given["word_lengths"])
    with pytest.raises(ValueError, match=r"time_lengths: got values from 0 to 5; expected 0 <="):
        model(time=time[:, :4], time_lengths=given["time_lengths"])
    with pytest.raises(ValueError, match=r"time: got shape \[3, 5, 2\]; expected \[B, T, C\]"):
        model(time=time[..., :2])
    with pytest.raises(TypeError, match=r"words: got torch.float32; expected int64"):
        model(words=words.float())
    with pytest.raises(ValueError, match=r"heads: got a call of control; expected one of"):
        model.control(model(image))
    with pytest.raises(ValueError, match=r"color: got shape .*; expected \[B, Q, Q, Q\]"):
        make()(color=given["color"][:, :2])
    with pytest.raises(TypeError, match=r"color: got torch\.int64; expected floats"):
        make()(color=given["color"].long())
    with pytest.raises(TypeError, match=r"config: got dict .*; expected a MultimodalConfig"):
        MultimodalBigModel({})
