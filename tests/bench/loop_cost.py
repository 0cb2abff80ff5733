"""What the loop costs: ours, with its callbacks on, against a bare PyTorch loop that does the same arithmetic.

    python tests/bench/loop_cost.py [--autoencoders mlp-vae conv-vae] [--repeats 6] [--per-number 600] [--epochs 2] [--out FILE.json]

Both sides live in one process and take turns every 20 steps, so that whatever else the machine does hits both alike. Each side has its own model, optimiser
and random state; after every repeat the weights must be equal, bit for bit. A repeat trains `epochs` epochs and validates after each, on both sides.
Who is built first and leads changes from repeat to repeat.
Wall time and CPU time are summed per side; the figure is ours / bare, the median over repeats, with the range.
A first, shorter repeat is thrown away."""
import argparse
import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path

import torch
from torch.utils.data import BatchSampler, DataLoader

from crossmodal.data.digits import DoubleDigits
from crossmodal.systems.embedmap import AutoencoderPhase, EmbedMap, EmbedMapConfig
from crossmodal.training.loop import Callback, Loop, Metrics, Progress, StopOnNaN

TURN = 20


class Clock:
    "Sums wall and CPU seconds between `start` and `stop`."
    def __init__(self): self.wall = self.cpu = 0.

    def start(self): self.began = time.perf_counter(), time.process_time()

    def stop(self):
        now = time.perf_counter(), time.process_time()
        self.wall, self.cpu = self.wall + now[0] - self.began[0], self.cpu + now[1] - self.began[1]


def new_system(config, train):
    torch.manual_seed(config.seed)
    return EmbedMap(config, train.vocabulary).train()


def bare(system, phase, epochs, orders):
    "The loop anyone would write. It pauses after every 20 steps."
    dataset, parameters = phase.train, list(system.autoencoder.parameters())
    optimizer, total = torch.optim.Adam(parameters, system.config.learning_rate), 0
    for epoch in range(epochs):
        sampler = BatchSampler(orders[epoch], phase.batch_size, drop_last=False)
        for batch in DataLoader(dataset, sampler=sampler, batch_size=None, generator=torch.Generator()):
            loss = phase.losses(batch)["loss"]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += 1
            if total % TURN == 0: yield True
        system.eval()
        with torch.no_grad(): phase.validate()
        system.train()


class TakeTurns(Callback):
    "Lets the bare loop run after every 20 of our steps; only one side's clock runs at a time."
    order = 100

    def __init__(self, other, first): self.other, self.first, self.ours, self.theirs = other, first, Clock(), Clock()

    def before_phase(self, loop):
        self.random = torch.get_rng_state()
        if self.first == "bare": self.run_other()
        self.ours.start()

    def after_step(self, loop):
        if loop.total % TURN == 0: self.turn()

    def after_phase(self, loop):
        self.ours.stop()
        while self.run_other(): pass

    def turn(self):
        self.ours.stop()
        self.run_other()
        self.ours.start()

    def run_other(self):
        mine = torch.get_rng_state()
        torch.set_rng_state(self.random)
        self.theirs.start()
        more = next(self.other, False)
        self.theirs.stop()
        self.random = torch.get_rng_state()
        torch.set_rng_state(mine)
        return more


class Screen(io.StringIO):
    "Somewhere to draw a progress bar, so that it is really drawn."
    def isatty(self): return True


def orders(seed, items, epochs):
    "The orders in which our loop shuffles its first phase, written down before the clocks start."
    generator = lambda epoch: torch.Generator().manual_seed(hash((seed, 0, epoch)) % 2**63)
    return [torch.randperm(items, generator=generator(epoch)).tolist() for epoch in range(epochs)]


def repeat(config, train, val, epochs, first="ours"):
    "Both sides once; wall and CPU seconds of each, after the weights were found equal. `first` is built first and takes the first turn."
    systems = [new_system(config, train) for _ in range(2)][::1 if first == "ours" else -1]
    phases = [AutoencoderPhase(system, train, val) for system in systems]
    phases[0].epochs = epochs
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(Screen()) as screen:
        turns = TakeTurns(bare(systems[1], phases[1], epochs, orders(config.seed, len(train), epochs)), first)
        loop = Loop(systems[0], phases[:1], [StopOnNaN(), Metrics(folder), Progress(), turns], config.seed)
        phases[1].accelerator = loop.accelerator                    # `validate` asks it for the device
        loop.fit()
    assert "autoencoder: 100%" in screen.getvalue(), "no progress was shown"
    ours, theirs = (system.state_dict() for system in systems)
    unequal = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not unequal and loop.total == epochs * -(-len(train) // config.batch_size), f"the two sides did not compute the same: {unequal}"
    fresh = new_system(config, train).state_dict()
    assert any(not torch.equal(ours[name], fresh[name]) for name in ours), "nothing was learned"
    return {"steps": loop.total, "ours_wall": turns.ours.wall, "bare_wall": turns.theirs.wall, "ours_cpu": turns.ours.cpu, "bare_cpu": turns.theirs.cpu}


def measure(autoencoder, repeats, per_number, epochs):
    config = EmbedMapConfig(autoencoder=autoencoder, per_number=per_number)
    train, val = DoubleDigits("digits", "train", per_number=per_number), DoubleDigits("digits", "val", per_number=10)
    repeat(config, train, val, 1)                                   # imports, allocator, caches
    rows = [repeat(config, train, val, epochs, ("ours", "bare")[k % 2]) for k in range(repeats)]
    print(f"{autoencoder}: {repeats} repeats of {rows[0]['steps']} steps of {config.batch_size} pictures; final weights equal, bit for bit")
    summary = {"autoencoder": autoencoder, "rows": rows}
    print("  ours / bare, repeat by repeat: " + ", ".join(f"{row['ours_cpu'] / row['bare_cpu']:.3f}" for row in rows) + " (CPU; ours and bare lead in turn)")
    for clock in ("wall", "cpu"):
        for side in ("ours", "bare"):
            step = [1000 * row[f"{side}_{clock}"] / row["steps"] for row in rows]
            print(f"  {clock:4} {side}: {statistics.median(step):7.3f} ms a step ({min(step):.3f} to {max(step):.3f})")
        ratios = [row[f"ours_{clock}"] / row[f"bare_{clock}"] for row in rows]
        summary[f"{clock}_ratio"] = statistics.median(ratios)
        print(f"  {clock:4} ours / bare: {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})")
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--autoencoders", nargs="+", default=["mlp-vae", "conv-vae"])
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--per-number", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    versions = {name: metadata.version(name) for name in ("crossmodal", "torch", "accelerate", "numpy")} | {"python": platform.python_version()}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), f"on {platform.machine()}, {torch.get_num_threads()} thread(s)")
    results = [measure(name, asked.repeats, asked.per_number, asked.epochs) for name in asked.autoencoders]
    if asked.out: asked.out.write_text(json.dumps({"versions": versions, "threads": torch.get_num_threads(), "results": results}, indent=1) + "\n")


if __name__ == "__main__": main()
