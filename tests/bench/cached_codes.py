"""What cached codes gain over running the frozen encoder at every step, as paper 000's released code does.

    python tests/bench/cached_codes.py [--data birds] [--repeats 5]

A step of a mapping network needs the codes of 64 pictures. Peer: a ResNet-50 over 64 decoded pictures, without gradients
(the released code also builds the graph). Ours: 64 rows of the feature cache. The codes must agree to half precision first;
then both take turns. The network's weights are random: they do not change its speed."""
import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from crossmodal.data.captioned import CollectionSplit, Transform, open_collection
from crossmodal.data.features import cached_features
from crossmodal.models.backbones import Backbone


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="birds", help="a dataset's name or a folder")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    transform = Transform((224,), margin=1)
    collection = open_collection(args.data, **({"side": 224, "per_species": 4} if args.data == "birds" else {}))
    split = CollectionSplit(collection, "trainval", transform, augment=False, captionless=True)
    network = Backbone("resnet50", trained=False).to(memory_format=torch.channels_last)
    encode = lambda images: {"vector": network(images)[0]}
    features = cached_features(encode, f"{network.name} {network.fingerprint()}", collection, transform)
    rng = np.random.default_rng(0)

    def again(rows):
        with torch.no_grad(): return network(split.images(rows))[0]

    def kept(rows): return features.read(split.positions[rows])

    rows = rng.integers(0, len(split), 64)
    difference = (again(rows) - kept(rows)).abs().max() / kept(rows).abs().max()
    assert difference < 2e-3, f"the cache must hold what the network says, to half precision; found {difference:.1e}"
    seconds = {"encoded": [], "cached": []}
    for _ in range(args.repeats):
        for name, codes, steps in (("encoded", again, 1), ("cached", kept, 100)):
            batches = [rng.integers(0, len(split), 64) for _ in range(steps)]
            start = time.perf_counter()
            for rows in batches: codes(rows)
            seconds[name].append((time.perf_counter() - start) / steps)
    spread = lambda found: [float(f"{x:.3g}") for x in (min(found), statistics.median(found), max(found))]
    report = {"torch": torch.__version__, "threads": torch.get_num_threads(), "data": collection.name, "encoder": network.name,
              "relative difference": float(f"{difference:.1e}"), "seconds per batch of 64": {name: spread(found) for name, found in seconds.items()},
              "ratio": spread([a / b for a, b in zip(seconds["encoded"], seconds["cached"], strict=True)])}
    print(json.dumps(report, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__": main()
