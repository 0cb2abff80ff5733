"""Which share of a step of paper 003's reward phase is spent on the reward.

    python tests/bench/reward_cost.py [--data birds] [--preset reduced] [--steps 20]

A step samples a caption for each of 128 pictures, writes another greedily, scores both by CIDEr-D against the picture's own captions, and learns;
then it matches. The reward's share is the time inside `CiderD.score`. The decoder is untrained, so its sentences run to the limit of 30 words:
the longest there are to score. Before that, some scores are compared with those of a scorer that was made of texts and reads texts."""
import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from crossmodal.metrics.captions import CiderD
from crossmodal.systems.gxn import GXN_PRESETS, Gxn, GxnConfig
from crossmodal.training.config import apply_preset
from crossmodal.training.loop import Loop


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="birds", help="a dataset's name or a folder")
    parser.add_argument("--preset", default="reduced")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    config = replace(apply_preset(GxnConfig(), GXN_PRESETS, args.preset), model="i2t-mix")
    train = Gxn.open_data(config, args.data, "train")
    system = Gxn(config, train.vocabulary)
    phase = system.phases(train, train)[0]
    phase.accelerator = Loop(system, [phase]).accelerator
    phase.begin()
    system.train()

    with torch.no_grad(): codes = system.matcher.images(phase.vectors[:16, 0], "low")
    said = system.writer.sample(codes, config.longest)
    by_texts = CiderD(train.texts, tokenizer=train.vocabulary.tokenizer).score(train.vocabulary.decode(said), np.arange(16))
    by_numbers = CiderD(train.texts, train.vocabulary).score(train.vocabulary.encode(train.vocabulary.decode(said))[0], np.arange(16))
    assert np.allclose(by_texts, by_numbers), "numbers and texts must be scored alike"

    inside, score = [0.], phase.reward.score
    def timed(*args):
        start = time.perf_counter()
        try: return score(*args)
        finally: inside[0] += time.perf_counter() - start
    phase.reward.score = timed
    rng, shares, steps = np.random.default_rng(0), [], []
    for k in range(args.steps + 2):
        batch, inside[0], start = train[rng.integers(0, len(train), config.batch)], 0., time.perf_counter()
        phase.step(batch)
        if k > 1: steps.append(time.perf_counter() - start), shares.append(inside[0] / steps[-1])
    spread = lambda found: [float(f"{x:.3g}") for x in (min(found), statistics.median(found), max(found))]
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "data": train.source, "preset": args.preset, "batch": config.batch,
              "seconds per step": spread(steps), "share of the reward": spread(shares)}
    print(json.dumps(report, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__": main()
