"""What channels-last weights gain in the convolutional autoencoders of paper 002 on a CPU.

    python tests/bench/channels_last.py [--repeats 15]

The same weights and pictures twice, in both layouts: the losses must agree first; then training steps take turns.
The figure is plain / channels-last, the median over repeats, with the range."""
import argparse
import copy
import statistics
import time

import torch
from torch.nn import functional as F

from crossmodal.models.autoencoders import conv_ae, conv_vae


def step(model, images) -> float:
    "One training step's forward and backward pass; returns the loss."
    torch.manual_seed(0)
    out = model(images)
    loss = F.binary_cross_entropy_with_logits(out[0] if isinstance(out, tuple) else out, (images + 1) / 2)
    model.zero_grad()
    loss.backward()
    return loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batches of 128")
    for build in (conv_vae, conv_ae):
        for channels in (1, 3):
            images = torch.rand(128, channels, 28, 56) * 2 - 1
            plain = build(channels)
            last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
            assert abs(step(plain, images) - step(last, images)) < 1e-5, "the two layouts must compute the same loss"
            ratios = []
            for _ in range(repeats):
                start = time.perf_counter()
                step(plain, images)
                middle = time.perf_counter()
                step(last, images)
                ratios.append((middle - start) / (time.perf_counter() - middle))
            print(f"{build.__name__}, {channels} channel(s): {statistics.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
