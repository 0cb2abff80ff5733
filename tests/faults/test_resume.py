"Stopped, terminated or killed, then resumed: the weights, the scores and the log end up as if nothing had happened."
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from crossmodal.data.digits import DoubleDigits
from crossmodal.systems.experiments import resume, train
from crossmodal.training.checkpoint import latest_checkpoint
from crossmodal.training.loop import Callback, Checkpoints, EarlyStop, Interrupted, Loop, Metrics, Phase, StopOnSignal, start_from
from crossmodal.training.runs import open_run

PER_EPOCH, AUTOENCODER, MAPPING = 21, 6, 6      # steps of an epoch (84 numbers x 32 pictures / 128), epochs of each phase
CHANGES = {"autoencoder": "mlp-vae", "per_number": 32, "autoencoder_images": AUTOENCODER * 84 * 32, "mapping_images": MAPPING * 84 * 32, "checkpoint_every": 0}
TRAIN = """
import sys, time
from pathlib import Path
from crossmodal.systems.experiments import train
from crossmodal.training.loop import StopOnSignal

folder, wait_at, changes = Path(sys.argv[1]), int(sys.argv[2]), {changes!r}
after_step = StopOnSignal.after_step
def wait_for_the_signal(self, loop):
    if loop.total == wait_at:
        (folder / "waiting").touch()
        while not self.asked: time.sleep(.01)
    after_step(self, loop)
StopOnSignal.after_step = wait_for_the_signal
train("embedmap", preset="smoke", out=folder, changes=changes, quiet=True)
"""


pytestmark = pytest.mark.usefixtures("one_thread", "hasty_reader")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train("embedmap", preset="smoke", out=tmp_path_factory.mktemp("whole") / "run", changes=CHANGES, quiet=True)


@pytest.fixture
def start(tmp_path):
    "Starts the same training in another process; `start(n)` makes it wait for a signal at step n."
    children, script, output = [], tmp_path / "driver.py", tmp_path / "output.txt"
    script.write_text(TRAIN.format(changes=CHANGES))

    def start(wait_at=-1):
        with open(output, "w") as file:
            command = [sys.executable, str(script), str(tmp_path / "run"), str(wait_at)]
            children.append(subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        return children[-1]
    yield start
    for child in children:
        child.kill()
        child.wait()


def wait_until(condition, child, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, "it ended too early"
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(.02)


def log(folder):
    "(total, phase, epoch, split) and figures of each row; not the seconds."
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row.pop("total"), row.pop("phase"), row.pop("epoch"), row.pop("split")): row for row in rows if row.pop("seconds") >= 0}, len(rows)


def assert_same_end(run, whole):
    weights, expected = (latest_checkpoint(each.folder / "checkpoints").model for each in (run, whole))
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == [] and weights.keys() == expected.keys()
    assert run.finished and run.record["scores"] == whole.record["scores"]
    (rows, count), (wanted, _) = log(run.folder), log(whole.folder)
    assert list(rows) == list(wanted) and count == len(rows)        # the same rows in the same order, none twice
    assert rows == wanted


@pytest.mark.parametrize("number, step", [(signal.SIGINT, 3 * PER_EPOCH + 7), (signal.SIGTERM, (AUTOENCODER + 2) * PER_EPOCH + 13)],
                         ids=["SIGINT in the first phase", "SIGTERM in the second"])
def test_signal_leaves_a_checkpoint_that_leads_to_the_same_end(start, tmp_path, uninterrupted, number, step):
    child = start(wait_at=step)
    wait_until((tmp_path / "run" / "waiting").exists, child)
    child.send_signal(number)
    assert child.wait(300) == 1
    last = (tmp_path / "output.txt").read_text().splitlines()[-1]
    assert "Interrupted: stopped at phase " in last and f"step {step}" in last
    found = latest_checkpoint(tmp_path / "run" / "checkpoints").state
    assert (found["total"], found["step"]) == (step, step % PER_EPOCH) and open_run(tmp_path / "run").record["status"] == "running"
    assert_same_end(resume(tmp_path / "run", quiet=True), uninterrupted)


def test_killed_at_a_random_moment_it_resumes_to_the_same_end(start, tmp_path, uninterrupted):
    child, delay = start(wait_at=(AUTOENCODER + MAPPING) * PER_EPOCH), random.uniform(0, 1)          # it never comes to its end, however late we are
    print(f"killed {delay:.3f} s after the second checkpoint")
    wait_until(lambda: any(path.name >= "000002" for path in (tmp_path / "run" / "checkpoints").glob("[0-9]" * 6)), child)
    time.sleep(delay)
    child.kill()
    assert child.wait() == -signal.SIGKILL and open_run(tmp_path / "run").record["status"] == "running"
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").path.name >= "000002"        # how many steps in, the machine's speed decides
    assert_same_end(resume(tmp_path / "run", quiet=True), uninterrupted)


@pytest.mark.parametrize("step", [1, 2 * PER_EPOCH, AUTOENCODER * PER_EPOCH, (AUTOENCODER + MAPPING) * PER_EPOCH],
                         ids=["first step", "end of an epoch", "end of a phase", "last step of all"])
def test_stopped_at_a_seam_it_resumes_to_the_same_end(tmp_path, uninterrupted, monkeypatch, step):
    after_step = StopOnSignal.after_step

    def signal_myself(self, loop):
        if loop.total == step: os.kill(os.getpid(), signal.SIGINT)
        after_step(self, loop)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"step {step}"):
        patch.setattr(StopOnSignal, "after_step", signal_myself)
        train("embedmap", preset="smoke", out=tmp_path / "run", changes=CHANGES, quiet=True)
    assert_same_end(resume(tmp_path / "run", quiet=True), uninterrupted)


def test_stopped_again_and_again_it_still_reaches_the_same_end(tmp_path, uninterrupted, monkeypatch):
    stops = {30, 31, 100, AUTOENCODER * PER_EPOCH + 30}
    after_step, go = StopOnSignal.after_step, lambda: train("embedmap", preset="smoke", out=tmp_path / "run", changes=CHANGES, quiet=True)

    def signal_myself(self, loop):
        if loop.total in stops: os.kill(os.getpid(), signal.SIGTERM)
        after_step(self, loop)
    monkeypatch.setattr(StopOnSignal, "after_step", signal_myself)
    for _ in stops:
        with pytest.raises(Interrupted): go()
        go = lambda: resume(tmp_path / "run", quiet=True)
    assert_same_end(go(), uninterrupted)


def test_signal_handlers_are_given_back(tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(StopOnSignal, "after_step", lambda self, loop: self.handle(signal.SIGINT, None) or self.handle(signal.SIGINT, None))
    with pytest.raises(KeyboardInterrupt):              # asked twice: at once
        train("embedmap", preset="smoke", out=tmp_path / "run", changes=CHANGES, quiet=True)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Drawing(Phase):
    "A phase that draws its first weights when it begins, and noise at every step."
    epochs, batch_size = 2, 4

    def __init__(self, name, module): self.name, self.module = name, module

    def begin(self):
        nn.init.normal_(self.module.weight)
        self.optimizers = (self.adam(self.module, .1),)
        return DoubleDigits("digits", "val", per_number=1)

    def losses(self, batch): return {"loss": (self.module.weight - torch.randn(3, 2)).square().sum()}


def test_numbers_drawn_when_a_phase_begins_are_the_same_after_a_stop(tmp_path):
    class Stop(Callback):
        def before_phase(self, loop):
            if loop.phase.name == "second": raise Interrupted

    def fit(folder, *extra, resume=None):
        torch.manual_seed(0 if resume is None else 1)
        module = nn.Linear(2, 3)
        loop = Loop(module, [Drawing("first", module), Drawing("second", module)], [Checkpoints(folder, resume=resume), *extra])
        if resume: start_from(loop, resume)
        loop.fit()
        return module.weight
    whole = fit(tmp_path / "whole")
    with pytest.raises(Interrupted): fit(tmp_path / "stopped", Stop())
    assert torch.equal(fit(tmp_path / "stopped", resume=latest_checkpoint(tmp_path / "stopped" / "checkpoints")), whole)


class Pulled(Drawing):
    "Its first weights are as they come, so it may begin again in the middle."
    def begin(self):
        self.optimizers = (self.adam(self.module, .1),)
        return DoubleDigits("digits", "val", per_number=1)


class TakesTurns(Pulled):
    "One loss at odd steps, another at even ones. The turn is a buffer, so a stop does not make it forget."
    def losses(self, batch):
        self.module.turn += 1
        weighed = super().losses(batch)["loss"]
        return {"loss": weighed, "critic": weighed * 0 + 3} if self.module.turn % 2 else {"loss": weighed, "generator": weighed * 0 + 5}


class StopAt(Callback):
    order = 25

    def __init__(self, step, saver): self.step, self.saver = step, saver

    def after_step(self, loop):
        if loop.total == self.step:
            self.saver.save(loop, within_phase=True)
            raise Interrupted


def fit_and_log(kind, folder, stop_at=0, resume=None):
    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    module = nn.Linear(2, 3)
    module.register_buffer("turn", torch.tensor(0))
    metrics = Metrics(folder, resume.state["log"] if resume else None)
    early = EarlyStop(metrics)
    saver = Checkpoints(folder, early, resume)
    loop = Loop(module, [kind("only", module)], [metrics, early, saver, StopAt(stop_at, saver)])
    if resume: start_from(loop, resume)
    loop.fit()
    return log(folder)


def test_losses_that_take_turns_have_their_own_means_also_after_a_stop(tmp_path):
    rows, count = fit_and_log(TakesTurns, tmp_path / "whole")
    assert count > 2 and all((row["critic"], row.get("generator", 5)) == (3, 5) for row in rows.values())       # the line of step 21 covers one step
    with pytest.raises(Interrupted): fit_and_log(TakesTurns, tmp_path / "cut", stop_at=7)
    found = latest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert found.state["metrics"][1] == {"loss": 7, "critic": 4, "generator": 3}
    assert fit_and_log(TakesTurns, tmp_path / "cut", resume=found) == (rows, count)


def test_a_checkpoint_that_counted_steps_only_is_still_read(tmp_path):
    whole = fit_and_log(Pulled, tmp_path / "whole")
    with pytest.raises(Interrupted): fit_and_log(Pulled, tmp_path / "cut", stop_at=7)
    found = latest_checkpoint(tmp_path / "cut" / "checkpoints")
    found.state["metrics"] = [found.state["metrics"][0], 7]             # as they were written until losses had counts of their own
    assert fit_and_log(Pulled, tmp_path / "cut", resume=found) == whole
