"""The captioner's configuration: what it builds, counts and refuses."""

import json

import pytest
import torch

from mbm_kernels.captioning.model_config import read_config
from mbm_kernels.models import Captioner, CaptionerConfig
from mbm_kernels.models.captioner_config import MOST_PARAMETERS, SIZES

ODD = {"image_size": 24, "channels": [5, 9, 12], "depth": 3, "features": 15, "embedding": 7}
ODD |= {"hidden": 21, "attention_size": 11, "heads": 5}


def planned(config, **options):
    with torch.device("meta"):
        return Captioner(13, config=config, **options)


@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize("layers", ["mbm", "stock"])
def test_parameters_are_counted_as_they_are(layers, attention):
    for config in (*SIZES.values(), CaptionerConfig.from_dict(ODD)):
        model = planned(config, layers=layers, attention=attention)
        found = sum(p.numel() for p in model.parameters())
        assert model.config.parameters(13) == found
        assert CaptionerConfig.from_dict(json.loads(json.dumps(model.config.as_dict()))) == (
            model.config
        )


@pytest.mark.parametrize("attention", ["additive", "dot"])
def test_a_model_of_any_sizes_is_the_same_of_both_layers(attention):
    config = CaptionerConfig.from_dict({**ODD, "attention": attention})
    torch.manual_seed(0)
    stock = Captioner(13, config=config, layers="stock").eval()
    fused = Captioner(13, config=config, layers="mbm").eval()
    fused.load_state_dict(stock.state_dict())
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    tokens = torch.randint(3, 13, (2, 4))
    for ours, theirs in zip(fused(images, tokens), stock(images, tokens), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert fused.generate(images, 5, 2) == stock.generate(images, 5, 2)
    changed = {name: x + 0.1 for name, x in fused.state_dict().items() if "deeper.1" in name}
    before = fused(images, tokens).hidden
    assert changed
    fused.load_state_dict(changed, strict=False)
    assert not torch.equal(fused(images, tokens).hidden, before)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image_size": 20}, "image_size: got 20; expected a multiple of 8"),
        ({"channels": [8, 8]}, r"channels: got \[8, 8\]; expected 3 ints"),
        ({"depth": 0}, "depth: got 0; expected 1 to 64"),
        ({"hidden": 0}, "hidden: got 0"),
        ({"hidden": 1.5}, "expected an int"),
        ({"attention": "flash"}, "attention: got 'flash'"),
        ({"attention": "dot", "heads": 3}, "heads: got 3; expected a divisor of features = 128"),
        ({"layers": 3}, "layers: got no field"),
        ({"hidden": 1 << 14}, r"sizes: got 1,\d+,\d+,\d+ parameters with 0 words"),
    ],
)
def test_what_describes_no_captioner_is_refused(changes, text):
    with pytest.raises((ValueError, TypeError), match=text):
        CaptionerConfig.from_dict(changes)


def test_words_count_before_anything_is_allocated():
    config = CaptionerConfig()
    most = (MOST_PARAMETERS - config.parameters(0)) // (config.parameters(1) - config.parameters(0))
    config.check_count(most)
    with pytest.raises(ValueError, match=r"sizes: got 1,07\d,\d+,\d+ parameters with"):
        Captioner(most + 1, config=config)
    with pytest.raises(TypeError, match="config: got dict"):
        Captioner(13, config={"hidden": 8})


def test_a_file_gives_fields(tmp_path):
    toml, other = tmp_path / "model.toml", tmp_path / "model.json"
    toml.write_text('channels = [8, 16, 24]\nattention = "dot"\nimage_size = 32\n')
    other.write_text('{"hidden": 64}')
    expected = CaptionerConfig(channels=(8, 16, 24), attention="dot", image_size=32)
    assert read_config(toml, None, 56) == expected
    assert read_config(toml, 48, 56).image_size == 48
    assert read_config(other, None, 56) == CaptionerConfig(hidden=64, image_size=56)
    other.write_text("[1]")
    with pytest.raises(ValueError, match=r"model config .*model.json: got no file of its kind"):
        read_config(other, None, 56)
