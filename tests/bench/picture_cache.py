"""What the picture cache gains over decoding JPEGs, and what its workers weigh.

    CROSSMODAL_DATA=<folder> python tests/bench/picture_cache.py [--data ucm cub] [--side 64] [--repeats 5]

Two loaders deliver the same batches of 64 from the same folder: one decodes, crops and resizes each picture when it is asked
for, the other reads the cache. The batches must be equal first; then the loaders take turns, without worker processes and with two.
Pictures per second are the median over repeats (with the range); the ratio is that of the medians.

Memory is that of two workers over one epoch from the cache, for sides that make the cache small and large: resident
memory after the first batches and at the end."""
import argparse
import copy
import itertools
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch.utils.data import BatchSampler, DataLoader

from crossmodal.data.captioned import CollectionSplit, open_collection
from crossmodal.data.images import Transform, prepare


class Decoding:
    "In place of the cache: every picture is decoded, cropped and resized when it is read."

    def __init__(self, collection, transform): self.collection, self.transform = collection, transform

    def read(self, positions):
        return [prepare(self.collection.pixels.read(i), self.collection.pictures[i].box, self.transform) for i in positions]


def opened(collection, side: int) -> CollectionSplit:
    return CollectionSplit(collection, "trainval", Transform((side,), box=True), captionless=True)


def loader(dataset, count: int, workers: int) -> DataLoader:
    "Batches of 64 over the dataset, again and again, until `count` pictures."
    order = list(itertools.islice(itertools.cycle(range(len(dataset))), count))
    return DataLoader(dataset, sampler=BatchSampler(order, 64, drop_last=True), batch_size=None, num_workers=workers)


def speed(dataset, count: int, workers: int) -> float:
    "Pictures per second, from the second batch on: workers have started by then."
    batches = iter(loader(dataset, count, workers))
    next(batches)
    start, seen = time.perf_counter(), 0
    for batch in batches: seen += len(batch)
    return seen / (time.perf_counter() - start)


def resident(pid: int) -> dict[str, float]:
    "Resident memory of a process in MB: all of it, and the part that is its own."
    rows = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {"all": int(rows["VmRSS"].split()[0]) / 1024, "own": int(rows["RssAnon"].split()[0]) / 1024}


def memory(dataset) -> dict[str, float]:
    "The larger of two workers, after eight batches and at the end of an epoch."
    batches = iter(loader(dataset, len(dataset), 2))
    pids = [worker.pid for worker in batches._workers]
    for _ in range(8): next(batches)
    early, late = [resident(pid) for pid in pids], None
    for _ in batches: late = [resident(pid) for pid in pids if os.path.exists(f"/proc/{pid}/status")] or late
    largest = lambda found, kind: round(max(row[kind] for row in found), 1)
    return {"early": largest(early, "all"), "late": largest(late, "all"), "own early": largest(early, "own"), "own late": largest(late, "own")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["ucm", "cub"])
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = {"torch": torch.__version__, "side": args.side}
    for name in args.data:
        collection = open_collection(name)
        cached = opened(collection, args.side)
        decoded = copy.copy(cached)
        decoded.pictures = Decoding(collection, cached.transform)
        a, b = cached[range(64)], decoded[range(64)]
        assert torch.equal(a.images, b.images) and torch.equal(a.captions, b.captions), "both loaders must deliver the same batches"
        row = report[name] = {"pictures": len(cached)}
        for workers in (0, 2):
            rates = {"decoded": [], "cached": []}
            for _ in range(args.repeats):
                rates["decoded"].append(speed(decoded, 640, workers))
                rates["cached"].append(speed(cached, 64 * 400, workers))
            middle = {kind: statistics.median(found) for kind, found in rates.items()}
            spread = {kind: [round(min(found)), round(middle[kind]), round(max(found))] for kind, found in rates.items()}
            row[f"{workers} workers"] = spread | {"ratio": round(middle["cached"] / middle["decoded"], 1)}
            print(f"{name}, {workers} workers:", row[f"{workers} workers"], flush=True)
        for side in (args.side, 2 * args.side, 4 * args.side):
            dataset = opened(collection, side)
            size = (dataset.pictures.folder / "pictures.bin").stat().st_size / 2**20
            row[f"memory at {side}"] = {"cache MB": round(size)} | memory(dataset)
            print(f"{name}, side {side}: {row[f'memory at {side}']}", flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__": main()
