"""The two towers: shapes, both kinds of layers, what a text's end means, configurations, errors."""

import math

import pytest
import torch

import mbm_kernels
from mbm_kernels.models import TwoTower, TwoTowerConfig

from .parity import assert_parity

VOCAB = 11


def make(layers="stock", **changes):
    torch.manual_seed(0)
    config = TwoTowerConfig(image_size=16, **changes)
    return TwoTower(VOCAB, config=config, layers=layers).eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def tokens():
    return torch.tensor([[1, 4, 5, 2], [1, 7, 2, 0], [1, 2, 0, 0], [3, 8, 9, 10]])


@pytest.fixture
def lengths():
    return torch.tensor([4, 3, 0, 1])


@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_embeddings_have_length_1(layers, images, tokens, lengths):
    model = make(layers, dimension=24)
    for x in model(images, tokens, lengths):
        assert x.shape == (4, 24)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_layers_share_state_dict_and_agree(kind, images, tokens, lengths):
    def outputs(model, cast):
        embeddings = model(cast(images), tokens, lengths)
        return (*embeddings, model.loss(*embeddings))

    assert_parity(make(kind=kind), make("mbm", kind=kind), outputs)


def test_layers_agree_without_lengths(images, tokens):
    assert_parity(make(), make("mbm"), lambda model, cast: model(cast(images), tokens))


@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_what_follows_a_text_has_no_effect(layers, images, tokens, lengths):
    model = make(layers)
    changed = tokens.clone()
    for row, length in enumerate(lengths):
        changed[row, length:] = 6
    wider = torch.cat([tokens, tokens], dim=1)
    expected = model.embed_texts(tokens, lengths)
    for other in (changed, wider):
        torch.testing.assert_close(model.embed_texts(other, lengths), expected)
    torch.testing.assert_close(
        model.embed_texts(tokens[:1]), model.embed_texts(tokens[:1], torch.tensor([4]))
    )


@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_a_row_does_not_depend_on_its_batch(layers, images, tokens, lengths):
    model = make(layers)
    for whole, alone in zip(
        model(images, tokens, lengths), model(images[1:2], tokens[1:2], lengths[1:2]), strict=True
    ):
        torch.testing.assert_close(alone, whole[1:2])


def test_loss_is_that_of_the_operation(images, tokens, lengths):
    embeddings = make()(images, tokens, lengths)
    loss = make(temperature=0.1).loss(*embeddings)
    torch.testing.assert_close(loss, mbm_kernels.contrastive_loss(*embeddings, 10.0))
    loss = make(temperature=0.1, kind="siglip").loss(*embeddings)
    expected = mbm_kernels.contrastive_loss(*embeddings, 10.0, bias=-10.0, kind="siglip")
    torch.testing.assert_close(loss, expected)


def test_the_scale_is_learned_up_to_a_bound():
    model = make()
    assert model.scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(math.log(1e6))
    assert model.scale.item() == pytest.approx(100)


@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_pairs_are_learned_by_heart(layers, images, tokens):
    model = make(layers).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        loss = model.loss(*model(images, tokens))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, text = model(images, tokens)
    assert (image @ text.T).argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert loss.item() < 0.1


def test_optimize_swaps_stock_layers_and_back(images, tokens, lengths):
    model = make()
    with torch.no_grad():
        expected = model(images, tokens, lengths)
        report = mbm_kernels.optimize(model, policy="always")
        assert {row.name for row in report.replaced} >= {"text_encoder.sequence.gru"}
        for _ in range(2):
            for ours, theirs in zip(model(images, tokens, lengths), expected, strict=True):
                torch.testing.assert_close(ours, theirs)
        report.revert()
    for ours, theirs in zip(model(images, tokens, lengths), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_compiles_and_exports(layers, images, tokens, lengths):
    model = make(layers)
    expected = model(images, tokens, lengths)
    # torch.compile breaks the graph at torch.nn.GRU.
    compiled = torch.compile(model, backend="aot_eager", fullgraph=layers == "mbm")
    torch.testing.assert_close(compiled(images, tokens, lengths), expected)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        model, (images, tokens, lengths), dynamic_shapes=({0: batch}, {0: batch}, {0: batch})
    ).module()
    for rows in (4, 3):
        given = images[:rows], tokens[:rows], lengths[:rows]
        torch.testing.assert_close(program(*given), model(*given))


def test_a_configuration_survives_json():
    config = TwoTowerConfig(image_size=32, channels=(8, 8, 16), kind="siglip")
    values = config.as_dict()
    assert values["channels"] == [8, 8, 16]
    assert TwoTowerConfig.from_dict(values) == config
    assert TwoTowerConfig.from_dict({}) == TwoTowerConfig()
    assert make().settings == {"vocab_size": VOCAB, "config": make().config.as_dict()}


BAD = {
    "image_size": (60, "multiple of 8; round it"),
    "channels": ((8, 8), r"channels: got \[8, 8\]; expected 3 ints"),
    "features": (0, "got 0; expected 1 to 65536"),
    "hidden": (2.0, "got float 2.0; expected an int"),
    "dimension": (True, "got bool True; expected an int"),
    "kind": ("triplet", "expected one of 'infonce', 'siglip'"),
    "temperature": (0.0, "temperature: got 0.0; expected 0.01 or more"),
    "pad_id": (-1, "pad_id: got -1; expected 0 to"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configurations(name):
    value, text = BAD[name]
    with pytest.raises((ValueError, TypeError), match=f"TwoTowerConfig: {name}: got .*; .*; "):
        TwoTowerConfig(**{name: value})
    with pytest.raises((ValueError, TypeError), match=text):
        TwoTowerConfig.from_dict({name: value})


def test_bad_settings():
    with pytest.raises(ValueError, match="TwoTowerConfig: heigth: got no field; expected one of"):
        TwoTowerConfig.from_dict({"heigth": 3})
    with pytest.raises(TypeError, match=r"config: got dict .*; expected a TwoTowerConfig"):
        TwoTower(VOCAB, config={"image_size": 16})
    with pytest.raises(ValueError, match="vocab_size: got 0; expected more than pad_id = 0"):
        TwoTower(0)
    with pytest.raises(ValueError, match="layers: got 'jax', expected 'mbm' or 'stock'"):
        make("jax")


@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_bad_inputs(layers, images, tokens, lengths):
    model = make(layers)
    with pytest.raises(ValueError, match=r"images: got shape \(4, 3, 8, 16\), expected \[B, 3, 16"):
        model(images[:, :, :8], tokens, lengths)
    with pytest.raises(TypeError, match=r"images: got torch\.uint8, expected floats"):
        model(images.byte(), tokens, lengths)
    with pytest.raises(ValueError, match=r"tokens: got shape \[3, 4\]; expected \[B, T\] = \[4, 4"):
        model(images, tokens[:3], lengths)
    with pytest.raises(TypeError, match=r"tokens: got torch.float32; expected int64"):
        model(images, tokens.float(), lengths)
    with pytest.raises(ValueError, match=r"tokens: got shape \[4, 0\]; expected at least one step"):
        model(images, tokens[:, :0], lengths * 0)
    with pytest.raises(TypeError, match=r"lengths: got torch.int32; expected int64"):
        model(images, tokens, lengths.int())
    with pytest.raises(ValueError, match=r"lengths: got values from 0 to 5; expected 0 <= length"):
        model(images, tokens, lengths + torch.tensor([1, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"lengths: got shape \[3\]; expected \[B\] = \[4\]"):
        model(images, tokens, lengths[:3])


@pytest.mark.parametrize("layers", ["stock", "mbm"])
def test_an_empty_batch(layers, images, tokens, lengths):
    for x in make(layers)(images[:0], tokens[:0], lengths[:0]):
        assert x.shape == (0, 128)


def test_autocast(images, tokens, lengths):
    """Both kinds of layers are as far from float32 as bfloat16 is."""
    expected = make()(images, tokens, lengths)
    for layers in ("stock", "mbm"):
        model = make(layers)
        model.load_state_dict(make().state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = model(images, tokens, lengths)
            loss = model.loss(*found)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x.float(), y, atol=2e-2, rtol=0)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
