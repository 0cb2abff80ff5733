"""What a block that doubles its maps gains on a CPU: by adding weights first and gathering its gates, and by the gates alone.

    python tests/bench/up_block.py [--repeats 15]         writes up_block.json beside this file

Peers: the same layers one after the other, each pixel repeated (`nn.Upsample`, `nn.Conv2d`, `nn.BatchNorm2d`, `nn.GLU`), and our block with `nn.GLU`.
Channels-last, forwards and backwards. Values and slopes must agree first; then the two take turns. The figure is peer / ours, the median
over repeats, with the range."""
import argparse
import copy
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from crossmodal.models.blocks import UpBlock

SIZES = {"32 -> 16 channels, 32 -> 64 pixels, batch 24": (32, 16, 32, 24), "128 -> 64 channels, 16 -> 32 pixels, batch 24": (128, 64, 16, 24)}


def slopes(network: nn.Module, maps: torch.Tensor, towards: torch.Tensor):
    "Result, and slopes of maps and weights."
    result = network(maps)
    return result.detach(), torch.autograd.grad(result, (maps, *network.parameters()), towards)


def race(ours: nn.Module, peer: nn.Module, maps: torch.Tensor, repeats: int) -> dict:
    "Ratios of neighbouring turns, after values and slopes have been compared."
    maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
    towards = torch.randn_like(ours(maps))
    (a, slopes_a), (b, slopes_b) = (slopes(network, maps, towards) for network in (ours, peer))
    apart = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip((a, *slopes_a), (b, *slopes_b)))
    assert apart < 1e-4, f"the two must compute the same: {apart:.1e} apart"
    ratios = []
    for _ in range(repeats):
        start = time.perf_counter()
        slopes(ours, maps, towards)
        middle = time.perf_counter()
        slopes(peer, maps, towards)
        ratios.append((time.perf_counter() - middle) / (middle - start))
    return {"largest relative difference": float(f"{apart:.1e}"), "ratio": [round(f(ratios), 2) for f in (min, statistics.median, max)]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.manual_seed(0)
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
              "load of the machine before": round(os.getloadavg()[0], 1), "repeats": repeats}
    for name, (inputs, outputs, side, batch) in SIZES.items():
        block = UpBlock(inputs, outputs).to(memory_format=torch.channels_last)
        layers, ungathered = nn.Sequential(*list(block)[:3], nn.GLU(1)), copy.deepcopy(block)
        ungathered[3] = nn.GLU(1)
        for against, peer in (("layer by layer", layers), ("with nn.GLU", ungathered)):
            report[f"{name}, against it {against}"] = race(block, peer, torch.randn(batch, inputs, side, side), repeats)
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
