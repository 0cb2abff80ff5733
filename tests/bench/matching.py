"""DAMSM's word loss, forward and back: all captions in one pass against one caption at a time.

    python tests/bench/matching.py [--repeats 7] [--batch 48] [--threads 2]

The peer does what AttnGAN's released `words_loss` does (MirrorGAN, DM-GAN and LAViTeR's release have the same function), in our own words: a loop over
captions, each repeated once per picture; regions transposed and copied anew for each; every step brought into the layout of the next by a copy;
attention maps kept. No classes are given: with them the released function stops on today's torch, which takes no masks of bytes.
Captions have 5 to 18 words. Values and slopes must be equal, to float32's rounding; then the two take turns. Memory is what a process of its own,
which runs one of them once, gains at its highest."""
import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from crossmodal.losses.matching import word_matching_loss


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-8)


def one_caption_at_a_time(maps: Tensor, words: Tensor, lengths: Tensor, gammas: tuple[float, float, float] = (4., 5., 10.)) -> tuple[Tensor, list[Tensor]]:
    "Maps (b, d, h, w) and words (b, d, t), as the released function takes them; the loss and the attention maps."
    gamma1, gamma2, gamma3 = gammas
    b, d, h, w = maps.shape
    scores, looks = [], []
    for i, length in enumerate(lengths.tolist()):
        query = words[i, :, :length].unsqueeze(0).contiguous().repeat(b, 1, 1)
        regions = maps.view(b, d, h * w)
        attention = torch.bmm(regions.transpose(1, 2).contiguous(), query)                          # b, regions, words
        attention = F.softmax(attention.view(b * h * w, length), dim=1).view(b, h * w, length)
        attention = attention.transpose(1, 2).contiguous().view(b * length, h * w)
        attention = F.softmax(attention * gamma1, dim=1).view(b, length, h * w)
        contexts = torch.bmm(regions, attention.transpose(1, 2).contiguous())                       # b, d, words
        looks.append(attention.view(b, length, h, w)[i].unsqueeze(0).contiguous())
        query, contexts = (x.transpose(1, 2).contiguous().view(b * length, d) for x in (query, contexts))
        cosines = cosine(query, contexts).view(b, length)
        scores.append(torch.log((cosines * gamma2).exp().sum(dim=1, keepdim=True)))
    scores, own = torch.cat(scores, 1) * gamma3, torch.arange(b)
    return F.cross_entropy(scores, own) + F.cross_entropy(scores.transpose(0, 1), own), looks


def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return (.3 * torch.randn(batch, 256, 17, 17, generator=g), .3 * torch.randn(batch, 18, 256, generator=g),
            torch.randint(5, 19, (batch,), generator=g))


def run(way: str, batch: int) -> tuple[float, Tensor, Tensor]:
    "The loss and its slopes."
    maps, words, lengths = draw(batch)
    maps.requires_grad_(), words.requires_grad_()
    loss = word_matching_loss(maps, words, lengths) if way == "ours" else one_caption_at_a_time(maps, words.transpose(1, 2), lengths)[0]
    loss.backward()
    return loss.item(), maps.grad, words.grad


def highest() -> float:
    "MiB of this process at its highest so far. (getrusage would count its parent's, from before it was a process of its own.)"
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")) / 2**10


def memory(way: str, batch: int, threads: int) -> float:
    "MiB that one run adds to this process at its highest."
    torch.set_num_threads(threads)
    run(way, 2)                                                                                     # what torch loads the first time
    before = highest()
    run(way, batch)
    return highest() - before


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways = {way: partial(run, way, args.batch) for way in ("ours", "peer")}
    (loss, *slopes), (their_loss, *their_slopes) = (go() for go in ways.values())                   # this also warms both up
    apart = abs(loss - their_loss) / their_loss, max((a - b).abs().max().item() for a, b in zip(slopes, their_slopes))
    assert max(apart) < 1e-6, f"both ways must find the same loss and slopes, found differences of {apart}."
    load, seconds = os.getloadavg()[0], {"ours": [], "peer": []}
    for _ in range(args.repeats):
        for way, go in ways.items():
            start = time.perf_counter()
            go()
            seconds[way].append(time.perf_counter() - start)
    peaks = {}
    for way in ways:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            peaks[way] = round(pool.submit(memory, way, args.batch, args.threads).result())
    spread = lambda found: [float(f"{x:.3g}") for x in (min(found), statistics.median(found), max(found))]
    lengths = draw(args.batch)[2]
    report = {"torch": torch.__version__, "threads": args.threads, "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
              "load of the machine before": round(load, 1), "batch": args.batch, "words": int(lengths.sum()), "longest": int(lengths.max()),
              "regions": 289, "coordinates": 256, "repeats": args.repeats, "loss": float(f"{loss:.7g}"),
              "difference of the loss, relative": float(f"{apart[0]:.1e}"), "largest difference of a slope": float(f"{apart[1]:.1e}"),
              "largest slope": float(f"{max(x.abs().max().item() for x in slopes):.1e}"),
              "seconds": {way: spread(found) for way, found in seconds.items()},
              "ratio": spread([a / b for a, b in zip(seconds["peer"], seconds["ours"], strict=True)]), "peak MiB gained": peaks}
    print(json.dumps(report, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__": main()
