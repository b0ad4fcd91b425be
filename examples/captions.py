"""Trains the captioner on drawn scenes and captions new ones: python examples/captions.py [STEPS]

200 steps take a few minutes and write short captions; `mbm-kernels caption train` does it in
earnest, with schedules, validation, checkpoints and distillation. It needs mbm_kernels[caption].
"""

import sys

import torch

import mbm_kernels
from mbm_kernels.captioning.data import WordTokenizer, collate, load, normalise
from mbm_kernels.models import Captioner


def main(steps: int = 200, batch: int = 32, side: int = 32) -> None:
    splits = load("scenes", image_size=side, limit=4 * batch)
    tokenizer = WordTokenizer.train(splits["train"].captions)
    model = Captioner(tokenizer.vocab_size, size="student", image_size=side)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        rows = torch.randint(len(splits["train"]), (batch,))
        images, tokens, _ = collate(splits["train"], rows, tokenizer)
        out = model(images, tokens[:, :-1])
        loss = mbm_kernels.linear_cross_entropy(
            out.hidden, model.head.weight, tokens[:, 1:],
            bias=model.head.bias, ignore_index=tokenizer.pad_id,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    for ids in model.eval().generate(normalise(splits["val"].images[:4]), max_length=24):
        print(tokenizer.decode(ids))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
