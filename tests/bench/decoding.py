"""Captions of exactly twenty words with a memory and without: what keeping the state, and encoding a picture once, gain.

    python tests/bench/decoding.py [--repeats 5]

Ours: an encoder looks at each picture once, and every word is one step of the GRU from the state before it. Peers, as scripts that people
copy write it, read the sentence again from <start> for every new word: (a) with the picture's code kept; (b) with the encoder run again as well,
once a word; (c) as catr's predict.py does, which calls the whole model for each token: the encoder looks at the picture of every beam, and the decoder
scores all positions of a sentence of the full length, pads included. Peers use the same `write_greedily` and `write_beams`; only their step differs.
In (a) and (b) they read no pads, which favours them. All must write the same words, and beams find the same probabilities;
then they take turns. The captioner's weights are random: they do not change the speed."""
import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from crossmodal.models.backbones import Backbone
from crossmodal.models.captioners import GruCaptioner, write_beams, write_greedily

START, END, WORDS = 1, 2, 20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=5, help="of the beam")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    encoder = Backbone("efficientnet_lite0")
    model = GruCaptioner(args.vocabulary, START, END, codes=1280).eval()                    # 300 and 1024, the paper's sizes
    with torch.no_grad(): model.out.bias[END] = -1e4                                        # no sentence ends before its time
    images = torch.rand(args.pictures, 3, 224, 224) * 2 - 1

    @torch.no_grad()
    def look(images): return F.normalize(encoder(images)[0].clamp(min=0), dim=1)

    def again(codes_of, positions=1):
        "A step whose state is the pictures' numbers and all words so far, with room for this many positions at least."
        def step(words, state):
            rows, prefix = state
            prefix = torch.cat([prefix, words[:, None]], 1)
            said = prefix.shape[1]
            return model(codes_of(rows), F.pad(prefix, (0, 1 + max(positions - said, 0))))[:, said - 1], (rows, prefix)
        return step

    def looked_at_again(rows):
        seen, place = rows.unique(return_inverse=True)
        return look(images[seen])[place]

    codes = look(images)
    nothing = (torch.arange(args.pictures), torch.empty(args.pictures, 0, dtype=torch.long))
    greedy = lambda step, state: (write_greedily(step, state, START, END, WORDS), None)
    beams = lambda step, state: write_beams(step, state, START, END, WORDS, args.width)

    @torch.no_grad()
    def begin(codes): return model.begin(codes)

    report = {"torch": torch.__version__, "threads": args.threads, "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
              "pictures": args.pictures, "words": WORDS, "vocabulary": args.vocabulary, "encoder": encoder.name, "repeats": args.repeats}
    for name, write in (("greedy", greedy), (f"beams of {args.width}", beams)):
        for what, codes_once, step in (("decoder", lambda: codes, again(lambda rows: codes[rows])),
                                       ("encoder and decoder", lambda: look(images), again(looked_at_again)),
                                       ("whole model", lambda: look(images), again(lambda rows: look(images[rows]), WORDS))):
            ways = {"kept": lambda write=write, once=codes_once: write(model.step, begin(once())),
                    "again": lambda write=write, step=step: write(step, nothing)}
            (words, totals), (theirs, their_totals) = (run() for run in ways.values())      # this also warms both up
            assert words.shape[1] == WORDS and torch.equal(words, theirs), f"{name}, {what}: both ways must write the same {WORDS} words."
            if totals is not None: torch.testing.assert_close(totals, their_totals, atol=1e-3, rtol=1e-5)
            seconds = {"kept": [], "again": []}
            for _ in range(args.repeats):
                for way, run in ways.items():
                    start = time.perf_counter()
                    run()
                    seconds[way].append(time.perf_counter() - start)
            spread = lambda found: [float(f"{x:.3g}") for x in (min(found), statistics.median(found), max(found))]
            report[f"{name}, {what}"] = {"seconds": {way: spread(found) for way, found in seconds.items()},
                                         "ratio": spread([a / b for a, b in zip(seconds["again"], seconds["kept"], strict=True)])}
    print(json.dumps(report, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__": main()
