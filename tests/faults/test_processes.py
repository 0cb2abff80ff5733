"""Two processes that share a batch end where one process ends: every phase of every system, at preset `smoke`.

What cannot be equal is noise: each process throws dice of its own. Here, and only here, dice are loaded: every draw is made for the whole batch from one
generator, and each process takes its rows of it. And updates are plain gradient descent, since Adam makes steps of full length out of gradients that are
nothing but rounding, with a tenth of the rates, since a GAN makes much of little. Then all that is left to differ is the order in which floats are added."""
import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

RUNS = {                                    # every phase of every system
    "embedmap": ("embedmap", {"autoencoder": "conv-vae", "autoencoder_images": 700, "mapping_images": 700}),
    "embedmap-direct": ("embedmap-direct", {"mapping_images": 700}),
    "selfsup": ("selfsup", {"per_species": 2, "matched": True}),
    "selfsup with wrong pictures": ("selfsup", {"per_species": 2, "wrong_pictures": True, "critic_bound": .01}),
    "selfsup-baseline": ("selfsup-baseline", {"per_species": 2}),
    "gxn": ("gxn", {"model": "i2t+t2i", "per_species": 2, "sampled": 0.}),       # else coins are thrown for each word of the longest caption of a part
    "laviter": ("laviter", {"model": "full", "per_species": 2, "draw_rate": 2e-5}),
    "laviter damsm": ("laviter", {"model": "damsm", "per_species": 2}),
    "sdn": ("sdn", {"model": "sdn", "per_species": 2}),
    "sdn diverse": ("sdn", {"model": "diverse", "per_species": 2}),
    "sdn gan-int-cls": ("sdn", {"model": "gan-int-cls", "per_species": 2}),
    "sdn stackgan": ("sdn", {"model": "stackgan", "per_species": 2}),
}
DRIVER = """
import json, sys, torch
from pathlib import Path
from torch.nn import functional as F
from safetensors.torch import save_file
from crossmodal.systems.base import System
from crossmodal.systems.experiments import SYSTEMS, train
from crossmodal.training import loop, processes

runs, out = json.loads(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
group, stepping = processes.join(), False


def loaded(draw, bounds=0):
    "Draws for the whole batch while a step is under way, and hands out this process's rows."
    def throw(*args, **options):
        first, shape = args[:len(args) - 1] if bounds else (), args[-1] if bounds or not isinstance(args[0], int) else args
        if not stepping or not shape: return draw(*args, **options)
        return group.mine(draw(*first, (shape[0] * group.count, *shape[1:]), **options))
    return throw


torch.randn, torch.rand, torch.randint = loaded(torch.randn), loaded(torch.rand), loaded(torch.randint, bounds=True)
torch.multinomial = lambda shares, count: (shares.log() - torch.rand(*shares.shape).log().neg().log()).topk(count).indices         # Gumbel's way
torch.Tensor.multinomial = torch.multinomial
torch.randn_like = lambda x: torch.randn(*x.shape, dtype=x.dtype, device=x.device)
F.dropout = lambda x, p=.5, training=True, inplace=False: x
attend = F.scaled_dot_product_attention
F.scaled_dot_product_attention = lambda q, k, v, mask=None, p=0., causal=False: attend(q, k, v, mask, 0., causal)


def descent(weights, lr=1e-3, *_, **__):
    slower = lambda group: {**group, "lr": .1 * group.get("lr", lr)} if isinstance(group, dict) else group
    return torch.optim.SGD(map(slower, weights), .1 * lr)


torch.optim.Adam = torch.optim.RMSprop = descent
learn, fit = loop.Loop.learn, loop.Loop.fit


def learn_loaded(self, parts):
    global stepping
    stepping = True
    try: return learn(self, parts)
    finally: stepping = False


def fit_loaded(self):
    folder = next(callback.path.parent for callback in self.callbacks if isinstance(callback, loop.Metrics))
    if group.first: save_file({name: value.contiguous().clone() for name, value in self.module.state_dict().items()}, folder / "start.safetensors")
    seed, torch.manual_seed = torch.manual_seed, lambda *_: None         # no dice of its own for each process
    try: fit(self)
    finally: torch.manual_seed = seed


def by_first_loaded(self, make, by_first=processes.Group.by_first):
    with torch.random.fork_rng(): return by_first(self, make)           # what one process draws to measure, the other does not


loop.Loop.learn, loop.Loop.fit, loop.Samples.after_epoch, processes.Group.by_first = learn_loaded, fit_loaded, lambda *_: None, by_first_loaded
for kind in SYSTEMS.values(): kind.evaluate = lambda self, test: {}
for name, (system, changes) in runs.items(): train(system, preset="smoke", out=out / name / "run", changes=changes, quiet=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "All runs, once by one process and once by two, at the same time."
    folder = tmp_path_factory.mktemp("processes")
    (folder / "driver.py").write_text(DRIVER)
    environment, started = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, []
    for count in (1, 2):
        alone = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        with open(folder / f"{count}.txt", "w") as output:
            command = [*alone[count - 1], str(folder / "driver.py"), json.dumps(RUNS), str(folder / str(count))]
            started.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
    try:
        for count, process in enumerate(started, 1): assert process.wait(3000) == 0, (folder / f"{count}.txt").read_text()[-5000:]
    finally:
        for process in started: process.kill()
    return folder


def runs_of(folder):
    "By name of the run: its record, where it began, where it ended, and what it logged. Those that others stand on lie beside them."
    from crossmodal.training.checkpoint import latest_checkpoint
    found = {}
    for place in sorted(path.parent for path in folder.glob("*/run.json")):
        record = json.loads((place / "run.json").read_text())
        log = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        found[record["id"]] = record, load_file(place / "start.safetensors"), latest_checkpoint(place / "checkpoints").model, log
    return found


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_end_where_one_ends(name, folder):
    one, two = (runs_of(folder / str(count) / name) for count in (1, 2))
    assert one.keys() == two.keys() and one
    for run, (record, start, end, log) in one.items():
        other, _, found, logged = two[run]
        assert (record["status"], other["status"]) == ("finished", "finished") and (record["machine"]["processes"], other["machine"]["processes"]) == (1, 2)
        moved = {key: float((end[key].double() - start[key].double()).abs().max()) for key in end}
        apart = {key: float((found[key].double() - end[key].double()).abs().max()) for key in end}
        worst = max(end, key=lambda key: apart[key] / (moved[key] + 1e-3))
        print(f"{run}: {sum(map(bool, moved.values()))} of {len(end)} tensors moved, by up to {max(moved.values()):.2g}; "
              f"worst {worst}: moved {moved[worst]:.2g}, apart {apart[worst]:.2g}")
        assert max(moved.values()) > 1e-5
        assert apart[worst] < 1e-2 * (moved[worst] + 1e-3), worst
        heads = [[(row["phase"], row["epoch"], row["split"], row["total"]) for row in rows] for rows in (log, logged)]
        assert heads[0] == heads[1]
        losses = [[row.get("loss", 0.) for row in rows if row["split"] == "train"] for rows in (log, logged)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)        # the mean of both processes, written by one
