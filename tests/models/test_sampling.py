"""Words that are drawn: the distribution, what cuts it, and the numbers that a seed gives."""

from dataclasses import replace

import pytest
import torch

from mbm_kernels.models import Captioner, Sampling
from mbm_kernels.models.sampling import choose

VOCAB = 23


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make(layers="mbm"):
    torch.manual_seed(0)
    model = Captioner(VOCAB, layers=layers, image_size=16).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)
        model.head.bias[model.eos_id] += 2
    return model


def shares_of(how, count=4000):
    """How often each place is drawn of five words by evenly spread numbers."""
    values = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0]).log()
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = choose(values.expand(count, 5), numbers, how)
    return (torch.bincount(chosen, minlength=5) / count).tolist()


def test_words_are_drawn_by_their_probabilities():
    assert shares_of(Sampling()) == [0.5, 0.25, 0.125, 0.125, 0]
    # Squared and normalised: 16, 4, 1 and 1 of 22.
    assert shares_of(Sampling(temperature=0.5)) == pytest.approx(
        [16 / 22, 4 / 22, 1 / 22, 1 / 22, 0], abs=1 / 2000
    )


def test_top_p_keeps_the_fewest_words_that_reach_it():
    assert shares_of(Sampling(top_p=0.5)) == [1, 0, 0, 0, 0]
    assert shares_of(Sampling(top_p=0.51)) == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=1 / 2000)
    assert shares_of(Sampling(top_p=1e-9)) == [1, 0, 0, 0, 0]


def test_the_last_number_draws_the_last_word():
    values = torch.randn(300, 50, generator=torch.Generator().manual_seed(0))
    values = values.log_softmax(-1).sort(-1, descending=True).values
    last = torch.tensor(1 - 2**-53, dtype=torch.float64).expand(300)
    assert choose(values, last, Sampling()).unique().tolist() == [49]


@pytest.mark.parametrize("layers", ["mbm", "stock"])
def test_the_words_are_those_of_the_numbers(layers, images):
    """By the model's own step: no loop, no decoder."""
    model, how = make(layers), Sampling(temperature=0.7, top_k=6, top_p=0.9, seed=3)
    with torch.no_grad():
        encoded = model.encode(images)
        last, state = torch.full((5, 1), model.bos_id), encoded.state.unsqueeze(1)
        rows = []
        for numbers in how.numbers(5, 8).unbind(1):
            logits, state, _ = model.step(encoded, last, state)
            values, ids = logits.log_softmax(-1).topk(6)
            last = ids.gather(-1, choose(values, numbers[:, None], how)[..., None])[..., 0]
            rows.append(last[:, 0])
    drawn = [
        row[: row.index(model.eos_id)] if model.eos_id in row else row
        for row in torch.stack(rows, dim=1).tolist()
    ]
    assert len({len(row) for row in drawn}) > 1
    words, weights = model.generate(images, 8, 1, True, how)
    assert words == drawn
    assert [len(w) for w in weights] == [len(w) for w in words]


def test_a_seed_gives_each_image_its_words_whatever_is_beside_it(images):
    model, how = make(), Sampling(seed=7)
    whole = model.generate(images, 9, sampling=how)
    assert model.generate(images, 9, sampling=how) == whole
    assert model.generate(images, 9, sampling=replace(how, seed=8)) != whole
    parts = model.generate(images[:2], 9, sampling=how)
    parts += model.generate(images[2:], 9, sampling=replace(how, first=2))
    assert parts == whole
    assert model.generate(images[:1].expand(3, -1, -1, -1), 9, sampling=how) != whole[:1] * 3


def test_one_word_kept_is_greedy(images):
    model = make()
    greedy = model.generate(images, 9)
    assert model.generate(images, 9, sampling=Sampling(top_k=1)) == greedy
    assert model.generate(images, 9, sampling=Sampling(temperature=1e-6)) == greedy
    assert model.generate(images[:0], 9, sampling=Sampling()) == []


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"temperature": 0}, ValueError, "temperature: got 0; expected more than 0"),
        ({"temperature": float("nan")}, ValueError, "temperature: got nan"),
        ({"temperature": "hot"}, TypeError, "expected a number"),
        ({"top_p": 0.0}, ValueError, "top_p: got 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p: got 1.5"),
        ({"top_k": -1}, ValueError, "top_k: got -1"),
        ({"top_k": 2.0}, TypeError, "expected an int"),
        ({"seed": -1}, ValueError, "seed: got -1"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(changes, error, text):
    with pytest.raises(error, match=text):
        Sampling(**changes)


def test_hypotheses_are_not_drawn(images):
    with pytest.raises(ValueError, match="beam: got 2 with sampling, expected 1"):
        make().generate(images, 9, 2, sampling=Sampling())
