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

from crossmodal.systems.experiments import resume, train
from crossmodal.training.checkpoint import latest_checkpoint
from crossmodal.training.loop import Interrupted, StopOnSignal
from crossmodal.training.runs import open_run

PER_EPOCH, AUTOENCODER, MAPPING = 42, 8, 8      # steps of an epoch (84 numbers x 64 pictures / 128), epochs of each phase
CHANGES = {"autoencoder": "mlp-vae", "per_number": 64, "autoencoder_images": AUTOENCODER * 84 * 64, "mapping_images": MAPPING * 84 * 64}
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


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Sums are then added in the same order here and in the other process."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return train("embedmap", preset="smoke", out=tmp_path_factory.mktemp("whole") / "run", changes=CHANGES, quiet=True)


@pytest.fixture
def start(tmp_path):
    "Starts the same training in another process; `start(n)` makes it wait for a signal at step n."
    children = []

    def start(wait_at=-1):
        script = tmp_path / "driver.py"
        script.write_text(TRAIN.format(changes=CHANGES))
        child = subprocess.Popen([sys.executable, str(script), str(tmp_path / "run"), str(wait_at)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "")})
        children.append(child)
        return child
    yield start
    for child in children:
        child.kill()
        child.communicate()


def wait_until(condition, child, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, f"ended early: {child.communicate()[0]}"
        assert time.monotonic() < end, f"waited {seconds} s in vain"
        time.sleep(.02)


def log(folder):
    "(total, phase, epoch, split) and figures of each row; not the seconds."
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row.pop("total"), row.pop("phase"), row.pop("epoch"), row.pop("split")): row for row in rows if row.pop("seconds") >= 0}, len(rows)


def assert_same_end(run, whole, same_figures=True):
    weights, expected = (latest_checkpoint(each.folder / "checkpoints").model for each in (run, whole))
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == [] and weights.keys() == expected.keys()
    assert run.finished and run.record["scores"] == whole.record["scores"]
    (rows, count), (wanted, _) = log(run.folder), log(whole.folder)
    assert list(rows) == list(wanted) and count == len(rows)        # the same rows in the same order, none twice
    if same_figures: assert rows == wanted


@pytest.mark.parametrize("number, step", [(signal.SIGINT, 3 * PER_EPOCH + 7), (signal.SIGTERM, (AUTOENCODER + 2) * PER_EPOCH + 13)],
                         ids=["SIGINT in the first phase", "SIGTERM in the second"])
def test_signal_leaves_a_checkpoint_that_leads_to_the_same_end(start, tmp_path, uninterrupted, number, step):
    child = start(wait_at=step)
    wait_until((tmp_path / "run" / "waiting").exists, child)
    child.send_signal(number)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == 1 and "Interrupted: stopped at phase " in output.splitlines()[-1] and f"step {step}" in output.splitlines()[-1]
    found = latest_checkpoint(tmp_path / "run" / "checkpoints").state
    assert (found["total"], found["step"]) == (step, step % PER_EPOCH) and open_run(tmp_path / "run").record["status"] == "running"
    assert_same_end(resume(tmp_path / "run", quiet=True), uninterrupted)


def test_killed_at_a_random_moment_it_resumes_to_the_same_end(start, tmp_path, uninterrupted):
    child, delay = start(), random.uniform(0, 1)
    print(f"killed {delay:.3f} s after the second checkpoint")
    wait_until((tmp_path / "run" / "checkpoints" / "000002").exists, child)
    time.sleep(delay)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL and open_run(tmp_path / "run").record["status"] == "running"
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").state["total"] >= 2 * PER_EPOCH
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
    stops = {50, 51, 200, AUTOENCODER * PER_EPOCH + 30}
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
