"""DDP and FSDP2 of swapped modules: two processes train as one does."""

import os
import socket
import warnings

import pytest
import torch
from torch import distributed, nn

import mbm_kernels
from tests import children

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="this torch has no gloo",
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cell = nn.GRUCell(8, 8)

    def forward(self, x):
        f = self.conv(x).flatten(2).transpose(1, 2)
        y, _ = self.gru(f)
        y, _ = self.attention(y, f, f)
        return self.cell(y[:, 0]).sum(-1)


def _train(rank, processes, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*view")
            for wrapper in ("ddp", "fsdp2"):
                _compare(rank, processes, wrapper)
    finally:
        distributed.destroy_process_group()


def _compare(rank, processes, wrapper):
    torch.manual_seed(0)
    single = Net()
    torch.manual_seed(0)
    model = Net()
    report = mbm_kernels.optimize(model, mode="training", policy="always")
    assert len(report.replaced) == 4
    images = torch.randn(4, 3, 4, 4)
    mine = images.chunk(processes)[rank]
    if wrapper == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for child in model.children():
            fully_shard(child)
        fully_shard(model)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    ours = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = torch.optim.SGD(single.parameters(), lr=0.1)
    for _ in range(2):
        model(mine).sum().backward()
        ours.step()
        ours.zero_grad()
        (single(images).sum() / processes).backward()
        theirs.step()
        theirs.zero_grad()
    named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
    for name, expected in single.named_parameters():
        found = named[name]
        found = found.full_tensor() if wrapper == "fsdp2" else found
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_swapped_modules_train():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_train, (2, port), 2, start_method=children.METHOD)
