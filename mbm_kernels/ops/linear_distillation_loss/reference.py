"""The definition of distillation through a linear head, without tricks."""

import torch
from torch import Tensor

# A teacher's tail is known as 1 - sum(p), so to about this much and no better.
TAIL_FLOOR = 2.0**-23


def linear_distillation_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Tensor,
    student_bias: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
    temperature: float = 1.0,
    hard_weight: float = 0.5,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """student_hidden [..., Hs], student_weight [V, Hs], target [...] -> loss, hard, soft."""
    ignored = target == ignore_index

    # What an ignored row holds is not read: even a NaN reaches neither a result nor a gradient.
    def read(x: Tensor) -> Tensor:
        return x.masked_fill(ignored.unsqueeze(-1), 0)

    logits = _linear(read(student_hidden), student_weight, student_bias)
    log_probs = torch.log_softmax(logits, -1)
    hard = -log_probs.gather(-1, target.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)

    if teacher_topk is not None:
        ids, teacher_log_probs = (read(x) for x in teacher_topk)
        student, teacher = _bins(log_probs, ids, teacher_log_probs.detach().to(log_probs.dtype))
    else:
        if teacher_logits is None:
            assert teacher_hidden is not None
            assert teacher_weight is not None
            teacher_logits = _linear(teacher_hidden, teacher_weight, teacher_bias)
        student, teacher = logits, read(teacher_logits).detach()
    log_q = torch.log_softmax(student / temperature, -1)
    log_p = torch.log_softmax(teacher / temperature, -1)
    soft = temperature**2 * _divergence(log_p, log_q, divergence, beta)

    hard, soft = (_reduce(rows, ignored, reduction) for rows in (hard, soft))
    terms = ((hard_weight, hard), (1 - hard_weight, soft))
    # A term of weight 0 is absent, even where it is infinite.
    loss = sum((weight * term for weight, term in terms if weight != 0), torch.zeros_like(hard))
    return loss, hard, soft


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden @ weight.t()
    return logits if bias is None else logits + bias


def _bins(log_probs: Tensor, ids: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the k ids and of all others together, [..., k + 1]; [..., V] for k = V.

    log_probs [..., V], ids [..., k], teacher [..., k].
    """
    student = log_probs.gather(-1, ids)
    if ids.size(-1) == log_probs.size(-1):
        return student, teacher
    rest = log_probs.scatter(-1, ids, -float("inf")).logsumexp(-1, keepdim=True)
    tail = (1 - teacher.exp().sum(-1, keepdim=True)).clamp_min(TAIL_FLOOR).log()
    return torch.cat((student, rest), -1), torch.cat((teacher, tail), -1)


def _divergence(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """[..., bins] of the teacher and of the student -> [...]."""
    if divergence == "forward_kl" or (divergence == "jsd" and beta == 0):
        return _kl(log_p, log_q)
    if divergence == "reverse_kl" or (divergence == "jsd" and beta == 1):
        return _kl(log_q, log_p)
    mixture = beta * log_p.exp() + (1 - beta) * log_q.exp()
    log_m = mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) = sum a (log a - log b), where 0 times anything is 0."""
    a = log_a.exp()
    return (a * (log_a - log_b).masked_fill(a == 0, 0)).sum(-1)


def _reduce(rows: Tensor, ignored: Tensor, reduction: str) -> Tensor:
    rows = rows.masked_fill(ignored, 0)
    if reduction == "none":
        return rows
    return rows.sum() / (~ignored).sum() if reduction == "mean" else rows.sum()
