"""Captions of exactly twenty words by the transformer captioner: pictures looked at once and words remembered, or everything again for each word.

    python tests/bench/transformer_decoding.py [--repeats 3]

Ours: the encoder runs once, its keys and values in the six decoder layers are computed once, and a step takes one word. Peers, own
re-implementations:
  again       the released way (catr's predict.py): for each word the encoder runs anew, and the decoder over all 30 positions, pads included;
  remembered  the encoder's output is kept, the decoder runs over all 30 positions;
  carried     as ours, but the pictures' keys and values are in the state, so that beams copy and re-order them with it.
All use the same `write_greedily` and `write_beams`; the encoder sees each picture once a word, not once a beam, which favours the peers.
All must write the same words, and beams find the same probabilities; then they take turns. The network has the paper's size and random
weights, which do not change the speed. What makes the regions, Inception v3 up to its map of 17 x 17, is left out; the released way runs
it for each word as well, so this favours the peers again."""
import argparse
import json
import os
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from crossmodal.models.captioners import write_beams, write_greedily
from crossmodal.models.transformer_captioner import TransformerCaptioner

START, END, WORDS, MOST = 1, 2, 20, 30


def repeated(seen, times): return tuple(tuple(part.repeat_interleave(times, 0) for part in memory) for memory in seen)


def padded(model, seen_now, pictures):
    "A step whose state is all words so far; the decoder reads them filled up to its longest sentence."
    def step(words, prefix):
        prefix = torch.cat([prefix, words[:, None]], 1)
        seen = seen_now()
        nothing = model._silence(repeated(seen, len(words) // pictures))
        x, _ = model._read(F.pad(prefix, (0, MOST - prefix.shape[1])), nothing, seen)
        return model.out(x)[:, prefix.shape[1] - 1], prefix
    return step, torch.empty(pictures, 0, dtype=torch.long)


def carried(model, maps):
    seen = model.look(maps)
    def step(words, state):
        logits, said = model.step(words, state[0], state[1])
        return logits, (said, state[1])
    return step, (model._silence(seen), seen)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=5, help="of the beam")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = TransformerCaptioner(args.vocabulary, START, END, most=MOST).eval()
    with torch.no_grad(): model.out[-1].bias[END] = -1e4                    # no sentence ends before its time
    maps = torch.randn(args.pictures, 256, 17, 17)

    def remembered():
        seen = model.look(maps)
        return padded(model, lambda: seen, args.pictures)

    ways = {"ours": lambda: model.ready(maps), "again": lambda: padded(model, partial(model.look, maps), args.pictures),
            "remembered": remembered, "carried": lambda: carried(model, maps)}
    writers = {"greedy": lambda step, state: (write_greedily(step, state, START, END, WORDS), None),
               f"beams of {args.width}": lambda step, state: write_beams(step, state, START, END, WORDS, args.width)}
    report = {"torch": torch.__version__, "threads": args.threads, "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
              "pictures": args.pictures, "words": WORDS, "positions": MOST, "vocabulary": args.vocabulary, "repeats": args.repeats}
    for name, write in writers.items():
        runs = {way: lambda write=write, begin=begin: write(*begin()) for way, begin in ways.items()}
        (words, totals), *others = (torch.no_grad()(run)() for run in runs.values())      # this also warms all up
        for way, (theirs, their_totals) in zip(list(runs)[1:], others, strict=True):
            assert words.shape[1] == WORDS and torch.equal(words, theirs), f"{name}, {way}: all ways must write the same {WORDS} words."
            if totals is not None: torch.testing.assert_close(totals, their_totals, atol=1e-3, rtol=1e-5)
        seconds = {way: [] for way in runs}
        for _ in range(args.repeats):
            for way, run in runs.items():
                start = time.perf_counter()
                torch.no_grad()(run)()
                seconds[way].append(time.perf_counter() - start)
        spread = lambda found: [float(f"{x:.3g}") for x in (min(found), statistics.median(found), max(found))]
        ratios = {way: [a / b for a, b in zip(found, seconds["ours"], strict=True)] for way, found in seconds.items() if way != "ours"}
        report[name] = {"seconds": {way: spread(found) for way, found in seconds.items()},
                        "ratio to ours": {way: spread(found) for way, found in ratios.items()}}
    print(json.dumps(report, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__": main()
