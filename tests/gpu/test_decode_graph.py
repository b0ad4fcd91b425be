"""The captioner's search as a CUDA graph gives what the same search gives step by step."""

import pytest
import torch

from mbm_kernels._core import dispatch
from mbm_kernels.models import Captioner, decode_graph, generation

DEVICE = torch.device("cuda", 0)
TRITON = dispatch.why_not("linear_topk", "triton", DEVICE, torch.float32) is None


@pytest.fixture(params=["torch", "triton", "everything by triton"] if TRITON else ["torch"])
def vocabulary(request):
    """The backend of linear_topk and of the selection of beams, or of every operation."""
    if request.param == "everything by triton":
        with dispatch.preferring("triton"):
            yield
        return
    dispatch.set_backend(request.param, op="linear_topk")
    yield
    dispatch.set_backend("auto")


def make(dtype, attention):
    torch.manual_seed(0)
    model = Captioner(500, layers="mbm", attention=attention, image_size=32).to(DEVICE, dtype)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model.eval()


def pictures(count, dtype, seed):
    drawn = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return drawn.to(DEVICE, dtype)


@torch.no_grad()
def searched(model, images, length, beam, recorded):
    return generation.search(model, model.encode(images), length, beam, True, recorded=recorded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["additive", "dot"])
@pytest.mark.parametrize("beam", [1, 5])
def test_replays_agree_with_single_steps(beam, attention, dtype, vocabulary):
    model = make(dtype, attention)
    for seed, length in ((1, 19), (2, 19), (3, 8), (4, 1)):
        images = pictures(6, dtype, seed)
        words, weights = searched(model, images, length, beam, recorded=True)
        expected, their_weights = searched(model, images, length, beam, recorded=False)
        assert words == expected
        for ours, theirs in zip(weights, their_weights, strict=True):
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        model.head.weight.neg_()
    images = pictures(6, dtype, 5)
    words, _ = searched(model, images, 8, beam, recorded=True)
    assert words == searched(model, images, 8, beam, recorded=False)[0]


def test_generate_records():
    model = make(torch.float32, "additive")
    assert decode_graph.why_not(model, DEVICE) is None
    decode_graph._loops.clear()
    model.generate(pictures(2, torch.float32, 0), 4, 3)
    assert len(decode_graph._loops[model]) == 1
