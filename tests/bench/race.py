"""Races: our implementation and the one that people use today, in one process, taking turns.

    crossmodal bench [--only TOPIC ...] [--repeats 5]        (or: python tests/bench/race.py)

Every `races_<topic>.py` beside this file has a function `races()` that returns a list of `Race`. Before anything is timed both results are
compared; a race whose results differ is reported as such and not timed. The ratio is peer / ours, the median over repeats of the
ratios of neighbouring runs, with its range: above 1 we are faster. Races that we lose stay in the table."""
import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Race:
    "Two ways to the same result."
    name: str                                # what is computed, with its sizes
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    equal: Callable[[Any, Any], float]       # how far the two results are apart: a relative or absolute difference
    within: float                            # the largest difference that counts as equal
    against: str                             # the peer, as a reader knows it
    packages: tuple[str, ...] = ()           # whose versions matter
    bar: float = 1.                          # the ratio that we promise
    peer_share: float = 1.                   # the peer runs on this share of the work (its time is divided by it): for peers that would take hours


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def run(race: Race, repeats: int) -> dict[str, Any]:
    "One row of the table."
    row = {"race": race.name, "peer": race.against, "versions": {name: version(name) for name in race.packages}, "bar": race.bar}
    difference = float(race.equal(race.ours(), race.peer()))         # this also warms both up
    row |= {"difference": difference, "equal": bool(difference <= race.within)}
    if not row["equal"]: return row
    pairs = [(seconds(race.ours), seconds(race.peer) / race.peer_share) for _ in range(repeats)]
    ratios = [peer / ours for ours, peer in pairs]
    middle = lambda values: float(f"{statistics.median(values):.3g}")
    return row | {"ours s": middle([ours for ours, _ in pairs]), "peer s": middle([peer for _, peer in pairs]), "ratio": middle(ratios),
                  "range": [float(f"{x:.3g}") for x in (min(ratios), max(ratios))]}


def show(row: dict[str, Any]) -> str:
    "A row as a line of the table."
    if not row["equal"]: return f"{row['race']:60s} DIFFERS by {row['difference']:.1e} from {row['peer']}"
    return (f"{row['race']:60s} {row['ours s']:10.4g} s {row['peer s']:10.4g} s {row['ratio']:8.4g}x  ({row['range'][0]:g}-{row['range'][1]:g})  "
            f"bar {row['bar']:g}  difference {row['difference']:.0e}  {row['peer']}")


def main(words: list[str] | None = None) -> int:
    import torch
    topics = sorted(path.stem.removeprefix("races_") for path in HERE.glob("races_*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=topics, default=topics, metavar="TOPIC", help=", ".join(topics))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    sys.path.insert(0, str(HERE))
    stored = HERE / "races.json"
    report = json.loads(stored.read_text()) if stored.exists() else {}
    print(f"{'':60s} {'ours':>12s} {'peer':>12s} {'ratio':>9s}")
    lost = 0
    for topic in args.only:
        rows = report[topic] = []
        for race in importlib.import_module(f"races_{topic}").races():
            row = run(race, args.repeats) | {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads",
                                             "torch": torch.__version__, "python": platform.python_version()}
            rows.append(row)
            print(show(row), flush=True)
            lost += not row["equal"] or row["ratio"] < row["bar"]
        stored.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{lost} below their bar" if lost else "\nall at or above their bars")
    return int(lost > 0)


if __name__ == "__main__": sys.exit(main())
