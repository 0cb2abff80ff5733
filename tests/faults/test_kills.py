"""Killed without warning (`kill -9`) at random moments, all five systems' smoke runs reach the very end that they would have reached.

Each system is trained once in peace. Then the same training is started, killed after a random time, resumed, killed again, and so on, and at last left alone:
weights, scores and every row of the log must be those of the peaceful run, bit for bit. A kill that went wrong can only be hidden by another if it left
no trace at all. CROSSMODAL_KILLS says how many in all. Few moments lie inside the writing of a checkpoint, so the second test visits each of them."""
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import accelerate  # noqa: F401  what a training imports late, so that forked children find it
import pytest
import torch
import torch.utils.tensorboard  # noqa: F401
import torchvision.utils  # noqa: F401

from crossmodal.data.batch import Batch
from crossmodal.systems.experiments import resume, train
from crossmodal.training.checkpoint import latest_checkpoint
from crossmodal.training.config import Execution
from crossmodal.training.loop import Checkpoints, EarlyStop, Loop, Metrics, Phase, start_from
from crossmodal.training.runs import open_run

SYSTEMS = {                                 # a run of each system with several phases, and those that it stands on
    "embedmap": {"autoencoder": "mlp-vae", "per_number": 4},
    "selfsup": {"per_species": 2, "critic_bound": .01},
    "gxn": {"model": "i2t-mix", "per_species": 2},
    "laviter": {"model": "full", "per_species": 2},
    "sdn": {"model": "sdn", "per_species": 2},
}
pytestmark = pytest.mark.usefixtures("hasty_reader")
KILLS = int(os.environ.get("CROSSMODAL_KILLS", 50)) // len(SYSTEMS)
OFTEN = {"checkpoint_every": 0}


def work(folder, system, log):
    "In a process of its own: train, or go on."
    torch.set_num_threads(1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    if (folder / "run.json").exists(): resume(folder, quiet=True)
    else: train(system, preset="smoke", out=folder, changes=SYSTEMS[system] | OFTEN, quiet=True)


def start(folder, system):
    "Everything is imported already, so a forked child begins at once."
    child = multiprocessing.get_context("fork").Process(target=work, args=(folder, system, folder.parent / "errors.txt"))
    child.start()
    return child


def rows(folder):
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def runs_in(folder):
    "The run and those that it stands on, by name."
    return {run.name: run for run in (open_run(path.parent) for path in folder.glob("*/run.json"))}


@pytest.mark.parametrize("system", SYSTEMS)
def test_killed_at_random_moments_it_reaches_the_same_end(system, tmp_path, one_thread):
    seed = int(os.environ.get("CROSSMODAL_SEED", random.randrange(10**6)))
    dice = random.Random(seed)
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    for folder in (whole, cut): folder.parent.mkdir()
    began = time.monotonic()
    child = start(whole, system)
    child.join(300)
    assert child.exitcode == 0, (whole.parent / "errors.txt").read_text()[-3000:]
    lasted, kills, writing = time.monotonic() - began, 0, 0
    while kills < KILLS:
        child = start(cut, system)
        child.join(dice.uniform(0, 1.5 * lasted / max(3, KILLS / 3)))
        if child.exitcode is not None:
            assert child.exitcode == 0, (cut.parent / "errors.txt").read_text()[-3000:]
            if kills: break                 # it has reached its end
            shutil.rmtree(cut.parent)       # unhurt, since the first run was disturbed and took long: again, with less patience
            cut.parent.mkdir()
            lasted /= 2
            continue
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += 1
        writing += bool(list(Path(cut.parent).glob("*/checkpoints/*.part")))
    child = start(cut, system)
    child.join(300)
    assert child.exitcode == 0, (cut.parent / "errors.txt").read_text()[-3000:]
    print(f"{system}: seed {seed}, {kills} kills, {writing} of them while a checkpoint was written; "
          f"{lasted:.1f} s in peace, {time.monotonic() - began - lasted:.1f} s with kills")
    one, other = runs_in(whole.parent), runs_in(cut.parent)
    assert one.keys() == other.keys() and kills and any(run.record["scores"] for run in one.values())
    for name, run in one.items():
        weights, found = (latest_checkpoint(each.folder / "checkpoints").model for each in (run, other[name]))
        assert weights.keys() == found.keys() and [key for key in weights if not torch.equal(weights[key], found[key])] == []
        assert run.record["scores"] == other[name].record["scores"]
        assert rows(run.folder) == rows(other[name].folder)
        pictures, again = ({path.name: path.read_bytes() for path in each.folder.glob("samples/*")} for each in (run, other[name]))
        assert pictures == again


class Line:
    "y = 3 x, as a dataset."
    def __len__(self): return 24

    def __getitem__(self, indices):
        i = torch.as_tensor(indices)
        x = (i / 20 - 1).view(-1, 1, 1, 1)
        return Batch(x, i[:, None], torch.ones_like(i), 3 * x.flatten() + torch.randn(len(i)), i)       # the global dice are part of the state


class FitLine(Phase):
    name, epochs, batch_size = "line", 2, 8

    def __init__(self): self.model = torch.nn.Linear(1, 1)

    def begin(self):
        self.optimizers = (torch.optim.Adam(self.model.parameters(), .1),)
        return Line()

    def losses(self, batch): return {"loss": (self.model(batch.images.flatten(1))[:, 0] - batch.classes).pow(2).mean()}

    def validate(self): return {"weight": float(self.model.weight)}


class Always(Checkpoints):
    def after_step(self, loop): self.save(loop, within_phase=True)


def fit_line(folder, die_at=0):
    "Train the line, or go on; `die_at` kills this process at that operation on files."
    operations = 0

    def mortal(operation):
        def operate(*args, **options):
            nonlocal operations
            operations += 1
            if operations == die_at: os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **options)
        return operate
    Path.write_bytes, Path.mkdir = mortal(Path.write_bytes), mortal(Path.mkdir)
    os.replace, os.fsync, os.rmdir, os.unlink = map(mortal, (os.replace, os.fsync, os.rmdir, os.unlink))
    torch.manual_seed(0)
    found, phase = latest_checkpoint(folder / "checkpoints"), FitLine()
    metrics = Metrics(folder, found.state["log"] if found else 0)
    early = EarlyStop(metrics)
    loop = Loop(phase.model, [phase], [metrics, early, Always(folder, early, found)], execution=Execution())
    if found: start_from(loop, found)
    loop.fit()


def test_killed_at_every_operation_on_files(tmp_path, one_thread):
    context, killed = multiprocessing.get_context("fork"), 0
    (tmp_path / "whole").mkdir()
    child = context.Process(target=fit_line, args=(tmp_path / "whole",))
    child.start()
    child.join(300)
    whole = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    for die_at in range(1, 1000):
        folder = tmp_path / str(die_at)
        folder.mkdir()
        for step in (die_at, 0):
            child = context.Process(target=fit_line, args=(folder, step))
            child.start()
            child.join(300)
            if step and child.exitcode == 0: break              # there are not so many
            assert child.exitcode == (-signal.SIGKILL if step else 0)
        else:
            killed += 1
            found = latest_checkpoint(folder / "checkpoints")
            assert all(torch.equal(found.model[name], value) for name, value in whole.model.items()) and rows(folder) == rows(tmp_path / "whole")
            continue
        break
    print(f"killed at each of {killed} operations on files")
    assert killed > 60
