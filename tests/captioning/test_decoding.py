"""Search by the fused step, recorded or not, against search by whole rows of logits."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mbm_kernels
from mbm_kernels._core import dispatch, native
from mbm_kernels.models import Captioner, decode_graph, decoding, generation
from tests.gates import record as gates_record

VOCAB = 37


def make(vocab=VOCAB, **changes):
    torch.manual_seed(0)
    settings = {"layers": "mbm", "image_size": 16, **changes}
    model = Captioner(vocab, **settings).eval()
    with torch.no_grad():
        model.head.weight.mul_(4)
        model.head.bias[model.eos_id] += 0.8
    return model


@pytest.fixture
def images():
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def trimmed(tokens, weights, eos_id):
    captions, kept = [], []
    for row, attention in zip(tokens.tolist(), weights, strict=True):
        length = row.index(eos_id) if eos_id in row else len(row)
        captions.append(row[:length])
        kept.append(attention[:length])
    return captions, kept


def pick(x, index):
    return x[torch.arange(x.shape[0])[:, None], index]


@torch.no_grad()
def greedy_by_rows(model, images, max_length):
    encoded = model.encode(images)
    batch, places = encoded.features.shape[:2]
    state = encoded.state.unsqueeze(1)
    last = torch.full((batch, 1), model.bos_id)
    done = torch.zeros_like(last, dtype=torch.bool)
    words, maps = [], []
    for _ in range(max_length):
        logits, state, weights = model.step(encoded, last, state)
        last = logits.argmax(dim=-1).masked_fill(done, model.eos_id)
        words.append(last)
        maps.append(weights)
        done = done | (last == model.eos_id)
        if bool(done.all()):
            break
    tokens, attention = torch.cat(words, dim=1), torch.cat(maps, dim=1)
    return trimmed(tokens, attention.reshape(batch, -1, places), model.eos_id)


@torch.no_grad()
def beam_by_rows(model, images, max_length, beam):
    """All continuations of all hypotheses of an image in one sort."""
    encoded = model.encode(images)
    batch, places = encoded.features.shape[:2]
    vocab = model.vocab_size
    state = encoded.state.unsqueeze(1).expand(-1, beam, -1)
    last = torch.full((batch, beam), model.bos_id)
    done = torch.zeros_like(last, dtype=torch.bool)
    length = torch.zeros_like(last)
    score = encoded.state.new_full((batch, beam), -torch.inf)
    score[:, 0] = 0.0
    tokens = torch.empty(batch, beam, 0, dtype=torch.int64)
    attention = encoded.state.new_empty(batch, beam, 0, places)
    ended = encoded.state.new_full((vocab,), -torch.inf)
    ended[model.eos_id] = 0.0
    for _ in range(max_length):
        logits, state, weights = model.step(encoded, last, state)
        gain = torch.where(done[..., None], ended, logits.log_softmax(dim=-1))
        total = score[..., None] + gain
        lengths = length + (~done).to(length.dtype)
        ranked = (total / lengths[..., None]).flatten(1)
        order = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :beam]
        parent, last = order // vocab, order % vocab
        score = total.flatten(1).gather(1, order)
        length = lengths.gather(1, parent)
        state = pick(state, parent)
        tokens = torch.cat([pick(tokens, parent), last[..., None]], dim=2)
        new = pick(weights, parent).unsqueeze(2)
        attention = torch.cat([pick(attention, parent), new], dim=2)
        done = done.gather(1, parent) | (last == model.eos_id)
        if bool(done.all()):
            break
    best = (score / length).argmax(dim=1, keepdim=True)
    return trimmed(pick(tokens, best)[:, 0], pick(attention, best)[:, 0], model.eos_id)


def by_rows(model, images, max_length, beam):
    if beam == 1:
        return greedy_by_rows(model, images, max_length)
    return beam_by_rows(model, images, max_length, beam)


@pytest.fixture(params=["torch", "cpu"])
def vocabulary(request):
    """The backend of linear_topk."""
    if request.param == "cpu" and native.cpu_reason():
        pytest.skip(native.cpu_reason())
    mbm_kernels.set_backend(request.param, op="linear_topk")
    yield request.param
    mbm_kernels.set_backend("auto")


def check(model, images, max_length, beam):
    rows, weights = model.generate(images, max_length, beam, True)
    expected, their_weights = by_rows(model, images, max_length, beam)
    assert rows == expected
    for ours, theirs in zip(weights, their_weights, strict=True):
        torch.testing.assert_close(ours, theirs)
    return rows


@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize("layers", ["mbm", "stock"])
@pytest.mark.parametrize("beam", [1, 2, 5])
def test_the_same_words_as_by_whole_rows(layers, attention, beam, images, vocabulary):
    model = make(layers=layers, attention=attention)
    rows = check(model, images, 12, beam)
    assert len({len(row) for row in rows}) > 1, "choose a model whose captions differ in length"


@pytest.mark.parametrize("beam", [1, 4])
def test_one_word_and_one_picture(beam, images, vocabulary):
    model = make()
    check(model, images, 1, beam)
    check(model, images[:1], 7, beam)


def test_fewer_words_than_hypotheses(images, vocabulary):
    check(make(vocab=3), images, 6, 5)


def test_all_end_at_once(images, vocabulary):
    model = make()
    with torch.no_grad():
        model.head.bias[model.eos_id] = 1e4
    for beam in (1, 3):
        assert model.generate(images, 9, beam) == [[]] * len(images)


@pytest.mark.parametrize("beam", [1, 3])
def test_equal_words(beam, images, vocabulary):
    """Every word twice: the lower id is taken, but for more than one by topk any."""
    model = make(vocab=36)
    with torch.no_grad():
        for tensor in (model.head.weight, model.head.bias):
            tensor[18:] = tensor[:18]
    if vocabulary == "torch" and beam > 1:
        rows = model.generate(images, 8, beam)
        words, theirs = (
            [word % 18 for row in x for word in row[:1]]
            for x in (rows, by_rows(model, images, 8, beam)[0])
        )
        assert words == theirs
        return
    rows = check(model, images, 8, beam)
    assert any(rows)
    if beam == 1:  # other hypotheses are made of the other half
        assert max(max(row, default=0) for row in rows) < 18


def test_a_logit_that_is_nan_is_the_likeliest(images, vocabulary):
    model = make()
    with torch.no_grad():
        model.head.bias[[9, 20]] = torch.nan
    assert check(model, images, 4, 1) == [[9] * 4] * len(images)


def test_word_table_follows_its_weights(images):
    model = make()
    first = decoding.word_table(model)
    assert decoding.word_table(model) is first
    with torch.no_grad():
        model.join_input.weight.mul_(-1)
    torch.testing.assert_close(decoding.word_table(model), -first)
    model.embedding.weight = torch.nn.Parameter(torch.zeros_like(model.embedding.weight))
    assert not decoding.word_table(model).any()
    check(model, images, 5, 1)
    with torch.inference_mode():
        inner = make()
        first = decoding.word_table(inner)
        assert decoding.word_table(inner) is first
        inner.embedding.weight[9, 3] += 1
        assert not torch.equal(decoding.word_table(inner), first)
        check(inner, images, 5, 2)


def test_word_table_sees_one_number_written_through_data(images):
    model = make()
    first = decoding.word_table(model)
    model.join_input.weight.data[3, -2] += 1
    weight = model.join_input.weight[:, -model.embedding.weight.shape[1] :]
    torch.testing.assert_close(decoding.word_table(model), model.embedding.weight @ weight.t())
    assert not torch.equal(decoding.word_table(model), first)
    check(model, images, 5, 2)


def test_autocast_makes_its_own_table(images):
    model = make()
    decoding.word_table(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert decoding.word_table(model).dtype == torch.bfloat16
        assert len(model.generate(images, 5)) == len(images)
    assert decoding.word_table(model).dtype == torch.float32


def test_tables_go_with_the_model():
    model = make()
    decoding.word_table(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Recording(TorchDispatchMode):
    """Writes operations down; what reads values on the host may not be among them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name()
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"), name
        outputs = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, outputs))
        return outputs


def record(body):
    """What a CUDA graph does: the same operations again, results in the same memory."""
    body()
    with Recording() as recording:
        body()

    def replay():
        for function, args, kwargs, outputs in recording.calls:
            new = function(*args, **kwargs)
            both = (x if isinstance(x, (tuple, list)) else (x,) for x in (outputs, new))
            for old, fresh in zip(*both, strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                    old.copy_(fresh)

    return replay


@pytest.fixture
def recorded(monkeypatch):
    """Search goes through recorded loops; a list of how many steps each was recorded for."""
    made = []

    def capture(body):
        made.append(body)
        return record(body)

    monkeypatch.setattr(decode_graph, "why_not", lambda model, device: None)
    monkeypatch.setattr(decode_graph, "capture", capture)
    decode_graph._loops.clear()
    yield made
    decode_graph._loops.clear()


@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize("beam", [1, 3])
def test_a_recorded_loop_gives_the_same(attention, beam, images, recorded, vocabulary):
    model = make(attention=attention)
    for max_length in (1, 8, 11, 16):
        check(model, images, max_length, beam)
        check(model, images.flip(0), max_length, beam)
    # Of 8 steps, of 1 and, unless all have ended by then, of 3.
    assert 2 <= len(recorded) <= 3


def test_recorded_anew_where_it_must_be(images, recorded):
    model = make()
    check(model, images, 8, 2)
    check(model, images, 8, 2)
    assert len(recorded) == 1
    check(model, images[:4], 8, 2)
    assert len(recorded) == 2
    with torch.no_grad():
        model.head.weight.mul_(0.5)
        model.embedding.weight[:, ::3] -= 1
    check(model, images, 8, 2)
    assert len(recorded) == 2, "a loop reads weights where they lie"
    model.head.weight = torch.nn.Parameter(model.head.weight * 2)
    check(model, images, 8, 2)
    assert len(recorded) == 3
    (loops,) = decode_graph._loops.values()
    assert len(loops) == 1, "loops of old weights are kept"
    with mbm_kernels.disabled():
        check(model, images, 8, 2)
    assert len(recorded) == 4


def test_an_early_end_replays_no_more(images, recorded, monkeypatch):
    model = make()
    with torch.no_grad():
        model.head.bias[model.eos_id] = 1e4
    runs = []
    monkeypatch.setattr(decode_graph, "capture", lambda body: lambda: runs.append(body()))
    assert model.generate(images, 80, 2) == [[]] * len(images)
    assert len(runs) == 1


def test_few_loops_are_kept(images, recorded, monkeypatch):
    monkeypatch.setattr(decode_graph, "MOST_KEPT", 2)
    model = make()
    for count in (1, 2, 3):
        check(model, images[:count], 2, 1)
    (loops,) = decode_graph._loops.values()
    assert len(loops) == 2


def test_where_nothing_is_recorded(images):
    device = images.device
    assert "graphs are CUDA's" in decode_graph.why_not(make(), device)
    cuda = torch.device("cuda", 0)
    assert "compared with" in decode_graph.why_not(make(layers="stock"), cuda)


@pytest.mark.skipif(native.cpu_reason() is not None, reason="needs _C_cpu")
@pytest.mark.parametrize("beam", [1, 3])
def test_keys_are_prepared_once_for_all_steps(beam, images, tmp_path):
    model = make(image_size=32)
    images = torch.nn.functional.interpolate(images, scale_factor=2)
    dispatch.set_backend("cpu", op="additive_attention")
    try:
        with gates_record.recording(tmp_path / "records") as recorder, torch.no_grad():
            encoded = model.encode(images)
            words, weights = generation.search(model, encoded, 9, beam, True)
            calls = dict(recorder.calls)
            how = generation.Greedy(model) if beam == 1 else generation.Beam(model, beam)
            carry = generation.start(model, encoded, beam)
            plain = generation.loop(how, decoding.decoder_for(model, encoded), carry, 9)
    finally:
        dispatch.set_backend("auto")
    assert calls["additive_attention_fwd"] > calls["additive_attention_pack_key"] == 1
    assert recorder.calls["additive_attention_pack_key"] == 1
    expected, their_weights = generation._best(*plain, True)
    for row, ours, theirs, full in zip(words, weights, their_weights, expected, strict=True):
        assert full[: len(row)] == row
        assert torch.equal(ours, theirs[: len(row)])


def test_search_in_grad_mode_takes_the_keys_as_they_are(images):
    model = make()
    with torch.no_grad():
        expected = generation.search(model, model.encode(images), 5, 2, False)
    assert generation.search(model, model.encode(images), 5, 2, False) == expected
    assert decoding.decoder_for(model, model.encode(images)).for_steps().key.requires_grad
