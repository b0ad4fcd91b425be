"""nn.LinearDistillationLoss, and the bad input of linear_distillation_loss."""

import pytest
import torch

import mbm_kernels
from mbm_kernels import nn
from tests.conftest import raises

OPTIONS = {
    "temperature": 2.0,
    "hard_weight": 0.25,
    "divergence": "jsd",
    "beta": 0.1,
    "ignore_index": 3,
    "reduction": "none",
}


def arguments():
    return {
        "student_hidden": torch.randn(2, 3, 5),
        "student_weight": torch.randn(7, 5),
        "target": torch.tensor([[0, 3, 6], [1, 2, 3]]),
        "student_bias": torch.randn(7),
        "teacher_hidden": torch.randn(2, 3, 4),
        "teacher_weight": torch.randn(7, 4),
        "teacher_bias": torch.randn(7),
    }


def without_teacher():
    return {k: v for k, v in arguments().items() if not k.startswith("teacher")}


def topk(k=2):
    log_probs, ids = torch.randn(2, 3, 7).log_softmax(-1).topk(k)
    return ids, log_probs


def test_module_is_drop_in():
    given = arguments()
    module = nn.LinearDistillationLoss(**OPTIONS, backend="torch")
    expected = mbm_kernels.linear_distillation_loss(**given, **OPTIONS, backend="torch")
    found = module(
        given.pop("student_hidden"), given.pop("student_weight"), given.pop("target"), **given
    )
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    assert all(x.shape == (2, 3) for x in found)
    assert module.state_dict() == {}
    assert "temperature=2.0" in repr(module)
    assert "divergence='jsd'" in repr(module)


def test_module_passes_every_teacher():
    module = nn.LinearDistillationLoss()
    for teacher in ({"teacher_logits": torch.randn(2, 3, 7)}, {"teacher_topk": topk()}):
        given = {**without_teacher(), **teacher}
        expected = mbm_kernels.linear_distillation_loss(**given)
        assert all(torch.equal(f, e) for f, e in zip(module(**given), expected, strict=True))


def test_module_reads_its_backend():
    with pytest.raises(mbm_kernels.BackendUnavailableError):
        nn.LinearDistillationLoss(backend="cuda")(**arguments())


def test_no_gradient_to_the_teacher():
    ids, log_probs = topk()
    linear = {k: v.requires_grad_() for k, v in arguments().items() if k.startswith("teacher")}
    logits = torch.randn(2, 3, 7, requires_grad=True)
    log_probs.requires_grad_()
    for teacher, leaves in (
        (linear, linear.values()),
        ({"teacher_logits": logits}, [logits]),
        ({"teacher_topk": (ids, log_probs)}, [log_probs]),
    ):
        given = {**without_teacher(), **teacher}
        assert not any(x.requires_grad for x in mbm_kernels.linear_distillation_loss(**given))
        weight = given["student_weight"].requires_grad_()
        torch.stack(mbm_kernels.linear_distillation_loss(**given)).sum().backward()
        assert weight.grad.abs().max() > 0
        assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize("build", [nn.LinearDistillationLoss, None])
def test_bad_options(build):
    def call(**option):
        if build is None:
            mbm_kernels.linear_distillation_loss(**arguments(), **option)
        else:
            build(**option)

    for name, values in {
        "temperature": (0, -1.0, float("nan"), float("inf")),
        "hard_weight": (-0.1, 1.1, float("nan")),
        "beta": (-0.1, 1.1, float("nan")),
    }.items():
        for value in values:
            with raises(ValueError, f"{name}: got {value}; expected 0 <"):
                call(**{name: value})
    with raises(ValueError, "divergence: got 'kl'", "'forward_kl', 'reverse_kl', 'jsd'"):
        call(divergence="kl")
    with raises(ValueError, "reduction: got 'batchmean'", "'none', 'mean', 'sum'"):
        call(reduction="batchmean")


def bad(*sources, **changes):
    base = without_teacher() if sources == ("no teacher",) else arguments()
    mbm_kernels.linear_distillation_loss(**{**base, **changes})


def test_bad_teacher_sources():
    logits = torch.randn(2, 3, 7)
    with raises(ValueError, "teacher: got none", "exactly one of"):
        bad("no teacher")
    with raises(ValueError, "teacher: got teacher_hidden and teacher_logits", "exactly one of"):
        bad(teacher_logits=logits)
    with raises(ValueError, "teacher_logits and teacher_topk", "exactly one of"):
        bad("no teacher", teacher_logits=logits, teacher_topk=topk())
    with raises(ValueError, "teacher_weight: got None", "the teacher's head"):
        bad("no teacher", teacher_hidden=torch.randn(2, 3, 4))
    with raises(ValueError, "teacher_weight", "None beside teacher_logits"):
        bad("no teacher", teacher_logits=logits, teacher_weight=torch.randn(7, 4))
    with raises(ValueError, "teacher_bias", "None beside teacher_topk"):
        bad("no teacher", teacher_topk=topk(), teacher_bias=torch.randn(7))


def test_bad_vocabularies_have_a_remedy():
    with raises(
        ValueError, "teacher_weight", "a vocabulary of 8", "V = 7", r"teacher_weight\[ids\]"
    ):
        bad(teacher_weight=torch.randn(8, 4))
    with raises(ValueError, "teacher_logits", "a vocabulary of 6", "V = 7"):
        bad("no teacher", teacher_logits=torch.randn(2, 3, 6))


def test_bad_shapes_and_types():
    with raises(TypeError, "student_hidden", "torch.Tensor"):
        bad(student_hidden=[1.0])
    with raises(ValueError, "student_hidden", r"\[\.\.\., Hs\]"):
        bad(student_hidden=torch.tensor(1.0))
    with raises(ValueError, "student_weight", r"\[V, Hs\] = \[7, 5\]"):
        bad(student_weight=torch.randn(7, 6))
    with raises(ValueError, "student_bias", r"\[V\] = \[7\]"):
        bad(student_bias=torch.randn(8))
    with raises(ValueError, "teacher_hidden", r"\[\.\.\., Ht\] = \[2, 3, 4\]"):
        bad(teacher_hidden=torch.randn(2, 4, 4))
    with raises(ValueError, "teacher_weight", "2 dimensions"):
        bad(teacher_weight=torch.randn(7))
    with raises(ValueError, "teacher_bias", r"\[V\] = \[7\]"):
        bad(teacher_bias=torch.randn(1))
    with raises(ValueError, "teacher_logits", r"\[\.\.\., V\] = \[2, 3, 7\]"):
        bad("no teacher", teacher_logits=torch.randn(6, 7))
    with raises(TypeError, "student_weight", "float32 as student_hidden", "autocast"):
        bad(student_weight=torch.randn(7, 5).double())
    with raises(TypeError, "teacher_hidden", "bfloat16", "float32 as student_hidden"):
        bad(teacher_hidden=torch.randn(2, 3, 4).bfloat16())
    with raises(TypeError, "teacher_logits", "float64", "float32 as student_hidden"):
        bad("no teacher", teacher_logits=torch.randn(2, 3, 7).double())
    with raises(TypeError, "target", "int64"):
        bad(target=torch.zeros(2, 3))
    with raises(ValueError, "target", "leading dimensions"):
        bad(target=torch.zeros(6, dtype=torch.int64))
    with raises(ValueError, "target", "got the value 7", "0 <= target < V = 7"):
        bad(target=torch.full((2, 3), 7))
    with raises(ValueError, "teacher_hidden", "meta", "cpu"):
        bad(teacher_hidden=torch.randn(2, 3, 4, device="meta"))


def test_bad_top_k():
    ids, log_probs = topk()

    def top(*pair):
        bad("no teacher", teacher_topk=pair)

    with raises(TypeError, "teacher_topk: got tuple of 3", "ids, log-probabilities"):
        top(ids, log_probs, ids)
    with raises(TypeError, "teacher_topk: got Tensor of 2"):
        bad("no teacher", teacher_topk=log_probs)
    with raises(TypeError, "ids", "float32; expected int64", "ids come first"):
        top(log_probs, ids)
    with raises(ValueError, "ids", r"\[\.\.\., k\] = \[2, 3, 2\]"):
        top(ids[:1], log_probs)
    with raises(ValueError, "log-probabilities", r"\[\.\.\., k\] = \[2, 3, 2\]"):
        top(ids, log_probs[..., :1])
    with raises(ValueError, "teacher_topk: got k = 0", "1 <= k <= V = 7"):
        top(ids[..., :0], log_probs[..., :0])
    with raises(ValueError, "teacher_topk: got k = 8"):
        top(ids.repeat(1, 1, 4), log_probs.repeat(1, 1, 4))
    with raises(ValueError, "got the value 7", "0 <= id < V = 7"):
        top(ids + 7 - ids.max(), log_probs)
    with raises(ValueError, "log-probabilities", "a sum of at most 1", "log_softmax"):
        top(ids, log_probs + 3)
    with raises(TypeError, "log-probabilities", "float64", "float32 as student_hidden"):
        top(ids, log_probs.double())
