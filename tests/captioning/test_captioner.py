"""The captioner: shapes, both kinds of layers, decoding."""

import pytest
import torch

from mbm_kernels.models import Captioner, CaptionerConfig

VOCAB = 11


def make(**changes):
    torch.manual_seed(0)
    settings = {"layers": "stock", "image_size": 16, **changes}
    return Captioner(VOCAB, **settings).eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def tokens():
    return torch.tensor([[1, 4, 5, 6], [1, 7, 8, 0], [1, 9, 0, 0]])


@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize("size", ["student", "teacher"])
def test_output_shapes(size, attention, images, tokens):
    model = make(size=size, attention=attention)
    out = model(images, tokens)
    assert out.hidden.shape == (3, 4, model.hidden_size)
    assert out.features.shape == (3, 4, model.feature_size)
    assert out.weights.shape == (3, 4, 4)
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(3, 4))
    assert model.logits(out.hidden).shape == (3, 4, VOCAB)


def test_teacher_costs_3_to_6_times_the_student():
    from torch.utils.flop_counter import FlopCounterMode

    flops = {}
    for size in ("student", "teacher"):
        model = make(size=size, image_size=64)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 64, 64), torch.ones(1, 18, dtype=torch.int64))
        flops[size] = counter.get_total_flops()
    assert 3 <= flops["teacher"] / flops["student"] <= 6


@pytest.mark.parametrize("attention", ["additive", "dot"])
def test_layers_share_state_dict_and_agree(attention, images, tokens):
    stock, fused = make(attention=attention), make(attention=attention, layers="mbm")
    for parameter in fused.parameters():
        torch.nn.init.zeros_(parameter)
    assert {k: v.shape for k, v in stock.state_dict().items()} == {
        k: v.shape for k, v in fused.state_dict().items()
    }
    fused.load_state_dict(stock.state_dict())
    for ours, theirs in zip(fused(images, tokens), stock(images, tokens), strict=True):
        torch.testing.assert_close(ours, theirs)
    for model in (stock, fused):
        out = model(images, tokens)
        model.logits(out.hidden).square().mean().backward()
    for (name, p), q in zip(fused.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert fused.generate(images, 6, beam=2) == stock.generate(images, 6, beam=2)


@pytest.mark.parametrize("attention", ["additive", "dot"])
def test_step_by_step_equals_whole_sequence(attention, images, tokens):
    model = make(attention=attention)
    out = model(images, tokens)
    encoded = model.encode(images)
    state = encoded.state.unsqueeze(1)
    for place in range(tokens.shape[1]):
        logits, state, weights = model.step(encoded, tokens[:, place : place + 1], state)
        torch.testing.assert_close(logits[:, 0], model.logits(out.hidden[:, place]))
        torch.testing.assert_close(weights[:, 0], out.weights[:, place])


def test_a_row_does_not_depend_on_its_batch(images, tokens):
    model = make()
    whole = model(images, tokens).hidden
    torch.testing.assert_close(model(images[1:2], tokens[1:2]).hidden, whole[1:2])
    assert model.generate(images, 6)[1] == model.generate(images[1:2], 6)[0]


def test_position_reaches_the_summary():
    model = make(image_size=32)
    scene = torch.ones(1, 3, 32, 32)
    left, right = scene.clone(), scene.clone()
    left[..., 12:20, 4:12] = -1
    right[..., 12:20, 20:28] = -1
    gap = (model.encode(left).summary - model.encode(right).summary).abs().max()
    assert gap > 1e-3


def script(model, table):
    """Make a model say what ``table`` [V, V] holds: logits that depend on the last word alone."""

    def step(encoded, tokens, state):
        places = encoded.features.shape[1]
        weights = tokens.new_zeros(*tokens.shape, places).float()
        weights[..., 0] = tokens.float()
        return table[tokens], state, weights

    model.step = step
    return model


def chain(*edges):
    table = torch.full((VOCAB, VOCAB), -20.0)
    for before, after, probability in edges:
        table[before, after] = torch.tensor(probability).log()
    return table


def test_greedy_follows_the_likeliest_word_and_stops_at_eos(images):
    model = script(make(), chain((1, 4, 0.9), (4, 5, 0.9), (5, 2, 0.9)))
    rows, weights = model.generate(images, 9, 1, True)
    assert rows == [[4, 5]] * 3
    assert [tuple(w.shape) for w in weights] == [(2, 4)] * 3
    assert weights[0][:, 0].tolist() == [1.0, 4.0]  # the word before each
    assert model.generate(images, 1) == [[4]] * 3


def test_beam_finds_what_greedy_misses(images):
    edges = ((1, 4, 0.6), (4, 5, 0.34), (4, 6, 0.33), (4, 7, 0.33), (1, 8, 0.4), (8, 9, 1.0))
    ends = tuple((k, 2, 1.0) for k in (5, 6, 7, 9))
    model = script(make(), chain(*edges, *ends))
    assert model.generate(images, 6) == [[4, 5]] * 3
    rows, weights = model.generate(images, 6, 2, True)
    assert rows == [[8, 9]] * 3
    assert weights[0][:, 0].tolist() == [1.0, 8.0]


def test_beam_normalises_by_length(images):
    # log .5 over 2 tokens, eos among them, loses to log .45 over 4.
    edges = ((1, 4, 0.5), (4, 2, 1.0), (1, 5, 0.45), (5, 6, 1.0), (6, 7, 1.0), (7, 2, 1.0))
    model = script(make(), chain(*edges))
    assert model.generate(images, 6, beam=2) == [[5, 6, 7]] * 3


def test_ties_go_to_the_lower_id(images):
    """Of a beam torch.topk chooses here, which leaves it open (test_decoding.py: kernels)."""
    model = script(make(), chain((1, 6, 0.5), (1, 4, 0.5), (4, 2, 1.0), (6, 2, 1.0)))
    assert model.generate(images, 4) == [[4]] * 3
    for beam in (2, 3):
        assert all(row in ([4], [6]) for row in model.generate(images, 4, beam=beam))


def test_the_stock_beam_sorts_nothing(images):
    """It is what kernels are compared with."""
    with torch.profiler.profile() as profile:
        make().generate(images, 4, beam=3)
    names = {event.key for event in profile.key_averages()}
    assert "aten::topk" in names
    assert "aten::sort" not in names


def test_rows_stop_on_their_own():
    model = make()
    many = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        model.head.bias[model.eos_id] += 0.15
    rows = model.generate(many, 12)
    assert len({len(row) for row in rows}) > 1
    assert not any(model.eos_id in row for row in rows)


def test_generate_leaves_the_mode_and_needs_no_gradient(images):
    model = make().train()
    _, weights = model.generate(images, 3, 1, True)
    assert model.training
    assert not weights[0].requires_grad


def test_empty_batch():
    model = make()
    assert model.generate(torch.zeros(0, 3, 16, 16), 4) == []
    assert model.generate(torch.zeros(0, 3, 16, 16), 4, 2, True) == ([], [])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"size": "huge"}, "size: got 'huge', expected one of"),
        ({"attention": "flash"}, "attention: got 'flash'; expected one of 'additive', 'dot'"),
        ({"size": "student", "config": CaptionerConfig()}, "size: got 'student' beside config"),
        ({"layers": "jax"}, "layers: got 'jax', expected 'mbm' or 'stock'"),
        ({"image_size": 60}, "image_size: got 60; expected a multiple of 8"),
        ({"eos_id": 11}, "vocab_size: got 11, expected more than the ids"),
    ],
)
def test_bad_settings(changes, text):
    with pytest.raises(ValueError, match=text):
        make(**changes)


def test_bad_inputs(images, tokens):
    model = make()
    with pytest.raises(ValueError, match=r"images: got shape \(3, 3, 8, 16\), expected \[B, 3, 16"):
        model(images[:, :, :8], tokens)
    with pytest.raises(TypeError, match=r"images: got torch\.uint8, expected floats"):
        model(images.byte(), tokens)
    with pytest.raises(TypeError, match=r"tokens: got torch.float32, expected torch\.int64"):
        model(images, tokens.float())
    with pytest.raises(ValueError, match=r"tokens: got shape \(2, 4\), expected \[B, T\]"):
        model(images, tokens[:2])
    with pytest.raises(ValueError, match="max_length: got 0, expected at least 1"):
        model.generate(images, 0)
    with pytest.raises(ValueError, match="beam: got 0, expected at least 1"):
        model.generate(images, 4, 0)
