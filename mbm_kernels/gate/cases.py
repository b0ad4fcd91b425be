"""The calls whose launches the compile-time gate records: forward inputs on the meta device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbm_kernels._core import dispatch, triton_launch
from mbm_kernels._core.op import OPS, as_tuple


@dataclass(frozen=True)
class StaticCase:
    """One call of an operation: `inputs(dtype)` gives the forward schema's inputs by name."""

    op: str
    name: str
    inputs: Callable[[torch.dtype], dict[str, Any]]
    backward: bool = True
    function: str = "fwd"  # another of the backend's takes `inputs` by name

    def record(self, dtype: torch.dtype) -> list[triton_launch.Launch]:
        """The launches of the forward and, for every gradient, of the backward."""
        with triton_launch.record() as launches:
            op, backend = OPS[self.op], dispatch.load_backend(self.op, "triton")
            inputs = self.inputs(dtype)
            if self.function != "fwd":
                getattr(backend, self.function)(**inputs)
                return launches
            args = [inputs[name] for name in op.inputs]
            outputs = as_tuple(op.backend_fwd("triton", args))
            if self.backward:
                named = {**inputs, **dict(zip(op.outputs, outputs, strict=True))}
                for name in op.public:  # a backend leaves out what nobody asked for
                    output = named[name]
                    named[f"grad_{name}"] = None if output is None else torch.empty_like(output)
                named["needs"] = [inputs[name] is not None for name in op.diff]
                op.backend_bwd("triton", [named[name] for name in op.bwd_names])
        return launches


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _additive_attention(
    T: int = 20, S: int = 196, masked: bool = False
) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "query": empty(64, T, 512, dtype=dtype),
            "key": empty(64, S, 512, dtype=dtype),
            "value": empty(64, S, 512, dtype=dtype),
            "v": empty(512, dtype=dtype),
            "key_lengths": empty(64, dtype=torch.int64) if masked else None,
            "mask": empty(64, 1, S, dtype=torch.bool) if masked else None,
            "save": True,
        }

    return inputs


def _linear_cross_entropy(
    N: int = 1280, V: int = 10000, plain: bool = False
) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden": empty(N, 512, dtype=dtype),
            "weight": empty(V, 512, dtype=dtype),
            "target": empty(N, dtype=torch.int64),
            "bias": empty(V, dtype=dtype) if plain else None,
            "ignore_index": -100,
            "label_smoothing": 0.0 if plain else 0.1,
            "softcap": None if plain else 30.0,
            "z_loss": 0.0 if plain else 1e-4,
            "reduction": "mean" if plain else "none",
            "save": [True, True, plain],
        }

    return inputs


def _linear_topk(R: int, k: int) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "hidden": empty(R, 512, dtype=dtype),
            "weight": empty(10000, 512, dtype=dtype),
            "bias": empty(10000, dtype=dtype),
            "k": k,
        }

    return inputs


def _select(B: int, K: int) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "done": empty(B, K, dtype=torch.bool),
            "length": empty(B, K, dtype=torch.int64),
            "score": empty(B, K, dtype=torch.float32),
            "values": empty(B, K, K, dtype=dtype),
            "ids": empty(B, K, K, dtype=torch.int64),
            "state": empty(B, K, 512, dtype=dtype),
            "eos_id": 2,
        }

    return inputs


def _cross_attention(
    T: int = 20,
    S: int = 196,
    D: int = 64,
    need_weights: str | None = None,
    masked: bool = False,
    save: bool = True,
) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "query": empty(64, 8, T, D, dtype=dtype),
            "key": empty(64, 8, S, D, dtype=dtype),
            "value": empty(64, 8, S, D, dtype=dtype),
            "key_lengths": empty(64, dtype=torch.int64) if masked else None,
            "mask": empty(64, 1, 1, S, dtype=torch.bool) if masked else None,
            "scale": D**-0.5,
            "need_weights": need_weights,
            "save": save,
        }

    return inputs


def _linear_distillation_loss(
    teacher: str, divergence: str = "forward_kl", temperature: float = 2.0
) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        N, V = 1280, 10000
        hidden, topk = teacher == "hidden", teacher == "topk"
        return {
            "student_hidden": empty(N, 512, dtype=dtype),
            "student_weight": empty(V, 512, dtype=dtype),
            "target": empty(N, dtype=torch.int64),
            "student_bias": empty(V, dtype=dtype) if hidden else None,
            "teacher_hidden": empty(N, 1024, dtype=dtype) if hidden else None,
            "teacher_weight": empty(V, 1024, dtype=dtype) if hidden else None,
            "teacher_bias": empty(V, dtype=dtype) if hidden else None,
            "teacher_logits": empty(N, V, dtype=dtype) if teacher == "logits" else None,
            "teacher_topk_ids": empty(N, 64, dtype=torch.int64) if topk else None,
            "teacher_topk_log_probs": empty(N, 64, dtype=dtype) if topk else None,
            "temperature": temperature,
            "hard_weight": 0.5,
            "divergence": divergence,
            "beta": 0.5,
            "ignore_index": -100,
            "reduction": "mean",
            "save": [True, True, hidden],
        }

    return inputs


def _concat_linear(*leads: tuple[int, ...]) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "inputs": [empty(*lead, 512, dtype=dtype) for lead in leads],
            "weight": empty(512, 512 * len(leads), dtype=dtype),
            "bias": empty(512, dtype=dtype),
        }

    return inputs


def _contrastive_loss(kind: str) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "image": empty(4096, 512, dtype=dtype),
            "text": empty(4096, 512, dtype=dtype),
            "scale": empty(dtype=torch.float32),
            "bias": empty(dtype=torch.float32) if kind == "siglip" else None,
            "kind": kind,
            "save": [True, True, True, kind == "siglip"],
        }

    return inputs


def gru(B: int, H: int, lengths: bool = False) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        return {
            "x": empty(32, B, 512, dtype=dtype),
            "h0": empty(B, H, dtype=dtype) if lengths else None,
            **_gru_weights(512, H, dtype),
            "lengths": empty(B, dtype=torch.int64) if lengths else None,
            "reverse": lengths,
            "save": True,
        }

    return inputs


def _gru_cell(B: int) -> Callable[[torch.dtype], dict[str, Any]]:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        given = {"x": empty(B, 1024, dtype=dtype), "h": empty(B, 512, dtype=dtype), "save": True}
        return given | _gru_weights(1024, 512, dtype)

    return inputs


def _gru_weights(C: int, H: int, dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {"w_ih": (3 * H, C), "w_hh": (3 * H, H), "b_ih": (3 * H,), "b_hh": (3 * H,)}
    return {name: empty(*shape, dtype=dtype) for name, shape in shapes.items()}


def _conv_bias_act(
    B: int,
    C: int,
    K: int,
    side: int,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    activation: str = "relu",
    max_pool: tuple[int, ...] | None = (2, 2, 2, 2, 0, 0),
    residual: bool = False,
    channels_last: bool = True,
) -> Callable[[torch.dtype], dict[str, Any]]:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        def image(channels: int, size: int) -> Tensor:
            return empty(B, channels, size, size, dtype=dtype).to(memory_format=layout)

        edge = kernel // 2
        weight = empty(K, C // groups, kernel, kernel, dtype=dtype)
        return {
            "x": image(C, side),
            "weight": weight.to(memory_format=layout),
            "bias": empty(K, dtype=dtype),
            "residual": image(K, side // stride) if residual else None,
            "stride": (stride, stride),
            "padding": (edge, edge, edge, edge),
            "dilation": (1, 1),
            "groups": groups,
            "activation": activation,
            "max_pool": max_pool,
            "save": True,
        }

    return inputs


CASES = (
    StaticCase("additive_attention", "T20 S196", _additive_attention()),
    StaticCase("additive_attention", "T20 S196 masked", _additive_attention(masked=True)),
    StaticCase("additive_attention", "T1 S49", _additive_attention(T=1, S=49)),
    StaticCase("linear_cross_entropy", "V10000", _linear_cross_entropy(plain=True)),
    StaticCase("linear_cross_entropy", "V10000 cap, smoothing, z", _linear_cross_entropy()),
    StaticCase("cross_attention", "T20 S196 D64", _cross_attention()),
    StaticCase(
        "cross_attention",
        "T20 S196 D64 mean masked",
        _cross_attention(need_weights="mean", masked=True),
    ),
    StaticCase("cross_attention", "T100 S300 D128", _cross_attention(T=100, S=300, D=128)),
    StaticCase("linear_distillation_loss", "KL", _linear_distillation_loss("hidden")),
    StaticCase(
        "linear_distillation_loss", "JSD, T 3", _linear_distillation_loss("logits", "jsd", 3.0)
    ),
    StaticCase("linear_distillation_loss", "top 64", _linear_distillation_loss("topk")),
    StaticCase("linear_topk", "64 greedy", _linear_topk(64, 1), backward=False),
    StaticCase("linear_topk", "64 beam 5", _linear_topk(320, 5), backward=False),
    StaticCase("linear_topk", "64 beam 8", _linear_topk(512, 8), backward=False),
    StaticCase("linear_topk", "64 beam 5, selection", _select(64, 5), function="select"),
    StaticCase("linear_topk", "64 beam 8, selection", _select(64, 8), function="select"),
    StaticCase("concat_linear", "B64 T20, shared", _concat_linear((64, 20), (64, 1))),
    StaticCase("concat_linear", "B64 T20, both", _concat_linear((64, 20), (64, 20))),
    StaticCase("contrastive_loss", "infonce", _contrastive_loss("infonce")),
    StaticCase("contrastive_loss", "siglip", _contrastive_loss("siglip")),
    StaticCase("gru", "T32 B32 H512", gru(32, 512)),
    StaticCase("gru", "T32 B256 H512", gru(256, 512)),
    StaticCase("gru", "T32 B64 H1024 reversed lengths", gru(64, 1024, lengths=True)),
    StaticCase("gru", "T32 B32 H128", gru(32, 128)),
    StaticCase("gru", "T32 B32 H32 reversed lengths", gru(32, 32, lengths=True)),
    StaticCase("gru_cell", "B64 C1024 H512", _gru_cell(64)),
    StaticCase("gru_cell", "B320 C1024 H512", _gru_cell(320)),
    StaticCase(
        "conv_bias_act",
        "7x7 stem, pool 3",
        _conv_bias_act(
            64, 3, 64, 224, kernel=7, stride=2, max_pool=(3, 3, 2, 2, 1, 1), channels_last=False
        ),
    ),
    StaticCase("conv_bias_act", "3x3 64 at 56", _conv_bias_act(32, 64, 64, 56)),
    StaticCase(
        "conv_bias_act", "3x3 stem at 224", _conv_bias_act(64, 3, 64, 224, channels_last=False)
    ),
    StaticCase("conv_bias_act", "3x3 stem at 224, channels_last", _conv_bias_act(64, 3, 64, 224)),
    StaticCase(
        "conv_bias_act",
        "3x3 64 at 56, silu",
        _conv_bias_act(32, 64, 64, 56, activation="silu", max_pool=None, residual=True),
    ),
    StaticCase(
        "conv_bias_act",
        "3x3 256 at 14, silu",
        _conv_bias_act(32, 256, 256, 14, activation="silu", max_pool=None, residual=True),
    ),
    StaticCase(
        "conv_bias_act",
        "depthwise 128 at 56, hardswish",
        _conv_bias_act(32, 128, 128, 56, groups=128, activation="hardswish", max_pool=None),
    ),
)


def of(op: str) -> Iterator[StaticCase]:
    return (case for case in CASES if case.op == op)
