"""Ten best of a million: captions ask a stored half-precision index of order codes, 1,024 dimensions, exactly and block by block.

    python tests/bench/order_index.py [--count 1000000] [--queries 64] [--threads 2] [--folder FOLDER]

The index (2 GB in full) is written to a temporary folder, so it is in the system's file cache when it is searched. The search runs in a process of
its own. Of the memory it gains, `anonymous` is what it needs; pages of the file are counted beside it, because the system may drop them at any time.
The brute force is numpy over blocks of the same file, for the first caption alone and for the first four."""
import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from crossmodal.metrics.retrieval import order_search

DIMS, STEP = 1024, 10_000


def unit(codes: torch.Tensor) -> torch.Tensor: return (codes / codes.norm(dim=1, keepdim=True)).abs()


def build(path: Path, count: int, queries: int) -> torch.Tensor:
    "Write the index; return captions which leave out half of what one of the pictures shows and blur the rest."
    generator = torch.Generator().manual_seed(0)
    index = np.lib.format.open_memmap(path, "w+", np.float16, (count, DIMS))
    for first in range(0, count, STEP):
        index[first:first + STEP] = unit(torch.randn(min(STEP, count - first), DIMS, generator=generator)).half().numpy()
    index.flush()
    rows = np.linspace(0, count - 1, queries).astype(int)
    pictures = torch.from_numpy(index[rows]).float()
    return (pictures * (torch.rand(pictures.shape, generator=generator) < .5) + torch.randn(pictures.shape, generator=generator) / 50).clamp(min=0)


def memory(name: str) -> float:
    "MiB of this process, as the system counts them."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) / 2**10


class Watch(threading.Thread):
    "The most anonymous memory seen, looking every few milliseconds."

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.done = 0., threading.Event()

    def run(self):
        while not self.done.wait(.005): self.most = max(self.most, memory("RssAnon"))


def search(path: Path, queries: np.ndarray, threads: int, repeats: int) -> dict:
    "Seconds and memory of `order_search`, in a process of its own."
    torch.set_num_threads(threads)
    index, queries = np.load(path, mmap_mode="r"), torch.from_numpy(queries)
    order_search(queries, index[:200])                                      # compile, or read what was compiled
    before, anonymous = memory("VmHWM"), memory("RssAnon")
    watch = Watch()
    watch.start()
    found = {}
    for name, asked in (("all at once", queries), ("one alone", queries[:1])):
        walls, cpus = [], []
        for _ in range(repeats):
            start, cpu = time.perf_counter(), time.process_time()
            result = order_search(asked, index)
            walls.append(time.perf_counter() - start); cpus.append(time.process_time() - cpu)
        if len(asked) == len(queries): scores, positions = (x.numpy() for x in result)
        found[name] = {"captions": len(asked), "seconds": [round(x, 2) for x in sorted(walls)], "processor seconds": [round(x, 2) for x in sorted(cpus)],
                       "seconds per caption": float(f"{statistics.median(walls) / len(asked):.3g}")}
    watch.done.set()
    watch.join()
    gained = {"anonymous": round(watch.most - anonymous), "with pages of the file": round(memory("VmHWM") - before), "before the search": round(before)}
    return {"scores": scores, "positions": positions, "report": found | {"peak MiB gained": gained}}


def brute_force(path: Path, queries: np.ndarray, k: int = 10) -> tuple[np.ndarray, np.ndarray]:
    "The definition in numpy, summed in float64; equal scores in the order of the index."
    index = np.load(path, mmap_mode="r")
    scores = np.empty((len(queries), len(index)))
    for first in range(0, len(index), STEP // 10):
        block = index[first:first + STEP // 10].astype(np.float32)
        for i, query in enumerate(queries): scores[i, first:first + len(block)] = -np.square(np.maximum(query - block, 0)).sum(1, dtype=np.float64)
    positions = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, positions, 1), positions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path, size = Path(folder)/"index.npy", args.count * DIMS * 2
        free = shutil.disk_usage(folder).free
        if free < 2 * size: raise SystemExit(f"{folder} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB of codes want twice that: pass --count or --folder.")
        queries = build(path, args.count, args.queries).numpy()
        load = os.getloadavg()[0]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            ours = pool.submit(search, path, queries, args.threads, args.repeats).result()
        some, seconds = queries[:4], []
        for asked in (some[:1], some):
            start = time.perf_counter()
            scores, positions = brute_force(path, asked)
            seconds.append(float(f"{(time.perf_counter() - start) / len(asked):.3g}"))
    report = {"index": f"{args.count:,} x {DIMS:,}, float16", "GB": round(size / 1e9, 2), "k": 10, "threads": args.threads, "cores": os.cpu_count(),
              "load of the machine before": round(load, 1), "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
              "numpy": np.__version__} | ours["report"] | {
                  "brute force in numpy": {"captions": len(some), "seconds per caption": seconds[1], "seconds for one alone": seconds[0],
                                           "same positions of the ten best": float(np.mean(positions == ours["positions"][:len(some)])),
                                           "largest difference of scores": float(f"{np.abs(scores - ours['scores'][:len(some)]).max():.1e}")}}
    print(json.dumps(report, indent=1))
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__": main()
