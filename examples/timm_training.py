"""A timm model trained on random images: python examples/timm_training.py [STEPS] [MODEL]

It needs timm and torchvision. 10 steps of resnet18 by default.
"""

import sys

import timm
import torch
from torch.nn.functional import cross_entropy

import mbm_kernels


def main(steps: int = 10, name: str = "resnet18", side: int = 64, batch: int = 4) -> None:
    model = timm.create_model(name, pretrained=False, num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, side, side)

    report = mbm_kernels.optimize(model, mode="training", sample_input=images)
    print(report)
    for step in range(steps):
        target = torch.randint(10, (batch,))
        loss = cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")
    report.revert()  # the model is timm's own again, trained

    model.eval()
    with mbm_kernels.optimized(model, sample_input=images) as report, torch.no_grad():
        print(report.title, model(images).shape)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:3])
