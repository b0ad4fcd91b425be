"""A GRU that hears audio as it comes: python examples/streaming_gru.py [SECONDS]

Frames of 10 ms are fed chunk by chunk with the state carried along. The result is that of the whole
sequence at once, up to the order of float32 sums.
"""

import sys

import torch

import mbm_kernels

CHUNK = 4  # frames


class Denoiser(torch.nn.Module):
    def __init__(self, bands: int = 32, hidden: int = 256):
        super().__init__()
        self.rnn = mbm_kernels.nn.GRU(bands, hidden, num_layers=2, batch_first=True)
        self.gains = torch.nn.Linear(hidden, bands)

    def forward(self, frames, state=None):  # [B, T, bands], [layers, B, hidden]
        y, state = self.rnn(frames, state)
        return frames * self.gains(y).sigmoid(), state


@torch.inference_mode()
def main(seconds: int = 2) -> None:
    model, frames = Denoiser().eval(), torch.randn(1, seconds * 100, 32)
    whole, _ = model(frames)
    state, heard = None, []
    for chunk in frames.split(CHUNK, dim=1):
        clean, state = model(chunk, state)
        heard.append(clean)
    torch.testing.assert_close(torch.cat(heard, 1), whole, rtol=1e-4, atol=1e-5)
    print(mbm_kernels.explain(model, frames[:, :CHUNK], state))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
