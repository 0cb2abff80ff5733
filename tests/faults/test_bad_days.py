"What can go wrong while a run is under way, one by one: each is survived, or stops the run with everything that was learned and a word on how to go on."
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from crossmodal.data.batch import Batch
from crossmodal.losses.mmd import mmd2
from crossmodal.systems import embedmap, experiments
from crossmodal.systems.experiments import SYSTEMS, resume, train
from crossmodal.training import loop as loops
from crossmodal.training.checkpoint import checkpoints, latest_checkpoint
from crossmodal.training.config import Execution
from crossmodal.training.loop import Diverged, Loop, Phase
from crossmodal.training.runs import RunError, open_run

SMALL = {"autoencoder": "mlp-vae", "per_number": 4, "checkpoint_every": 0}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_measures(monkeypatch):
    "What comes out is asked elsewhere."
    for kind in SYSTEMS.values(): monkeypatch.setattr(kind, "evaluate", lambda self, test: {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "Weights of the small run that nothing happened to."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedmap.EmbedMap, "evaluate", lambda self, test: {})
        run = train("embedmap", preset="smoke", out=tmp_path_factory.mktemp("whole") / "run", changes=SMALL, quiet=True)
    return latest_checkpoint(run.folder / "checkpoints").model


def weights(run): return latest_checkpoint(run.folder / "checkpoints").model


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def poison(monkeypatch, at, times=1):
    "The loss of the autoencoder is NaN at its `at`-th step, so many times."
    losses, steps = embedmap.AutoencoderPhase.losses, [0, 0]

    def poisoned(self, batch):
        found = losses(self, batch)
        steps[0] += self.system.training
        if steps[0] >= at and steps[1] < times and self.system.training:
            steps[1] += 1
            found = {name: value * float("nan") for name, value in found.items()}
        return found
    monkeypatch.setattr(embedmap.AutoencoderPhase, "losses", poisoned)


# ------------------------------------------------------------------------------------------- losses that explode

def test_nan_stops_the_run_and_keeps_its_batch(tmp_path, monkeypatch, whole):
    said = r"phase autoencoder, step 5: .* is nan\. Its batch is kept in .*diverged/step-00000005.safetensors"
    with monkeypatch.context() as patch, pytest.raises(Diverged, match=said):
        poison(patch, at=5)
        train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL, quiet=True)
    kept = load_file(tmp_path / "run" / "diverged" / "step-00000005.safetensors")
    assert kept["0/images/0"].shape[1:] == (1, 28, 56) and len(kept["0/ids/0"]) == len(kept["0/images/0"]) and kept["0/images/0"].isfinite().all()
    told = json.loads((tmp_path / "run" / "diverged" / "step-00000005.json").read_text())
    assert told["phase"] == "autoencoder" and told["total"] == 5 and set(told["losses"].values()) == {"nan"}
    last = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert last is None or all(value.isfinite().all() for value in last.model.values() if value.is_floating_point())
    assert same(weights(resume(tmp_path / "run", quiet=True)), whole)           # it was a freak: gone, and nothing is left of it


def test_a_loss_too_large_to_be_true_stops_too(tmp_path, monkeypatch):
    losses = embedmap.AutoencoderPhase.losses
    monkeypatch.setattr(embedmap.AutoencoderPhase, "losses", lambda self, batch: {name: value * 1e9 for name, value in losses(self, batch).items()})
    with pytest.raises(Diverged, match="step 1"): train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL, quiet=True)


def test_on_request_it_goes_back_and_slows_down(tmp_path, monkeypatch, capsys):
    rates, sgd = [], torch.optim.Adam.step

    def step(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return sgd(self, *args)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    poison(monkeypatch, at=5, times=2)
    run = train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL | {"diverged": "slower"})
    said = capsys.readouterr().out
    assert run.finished and run.record["halved"] == 2 and said.count("Going back to the last checkpoint") == 2
    assert rates[0] == .001 and rates[-1] == .00025 and set(rates) == {.001, .0005, .00025}


def test_weights_that_are_no_numbers_after_the_very_last_update_finish_no_run(tmp_path, monkeypatch, whole):
    "Every loss was finite, and none comes after it that could tell."
    losses, steps = embedmap.MappingPhase.losses, [0]

    def counted(self, batch):
        steps[0] += self.system.training
        found = losses(self, batch)
        return found | {"loss": found["loss"] + (found["loss"] - found["loss"]).sqrt()} if steps[0] == last and self.system.training else found
    with monkeypatch.context() as patch:
        last = 0
        patch.setattr(embedmap.MappingPhase, "losses", counted)
        train("embedmap", preset="smoke", out=tmp_path / "count", changes=SMALL, quiet=True)
        last, steps[0] = steps[0], 0
        with pytest.raises(Diverged, match="phase .*: weight .* holds NaN or infinity"):
            train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL, quiet=True)
    assert last and open_run(tmp_path / "run").record["status"] == "running"
    assert same(weights(resume(tmp_path / "run", quiet=True)), whole)


def test_a_loss_that_refuses_nan_makes_it_slow_down_too(tmp_path, monkeypatch):
    "The discrepancy of clouds raises where other losses are NaN."
    losses, steps = embedmap.AutoencoderPhase.losses, [0]

    def refusing(self, batch):
        steps[0] += self.system.training
        if steps[0] == 5 and self.system.training: mmd2(torch.full((2, 3), torch.nan), torch.zeros(2, 3))
        return losses(self, batch)
    monkeypatch.setattr(embedmap.AutoencoderPhase, "losses", refusing)
    run = train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL | {"diverged": "slower"}, quiet=True)
    assert run.finished and run.record["halved"] == 1


def test_it_does_not_slow_down_for_ever(tmp_path, monkeypatch):
    poison(monkeypatch, at=3, times=10**6)
    with pytest.raises(Diverged): train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL | {"diverged": "slower"}, quiet=True)
    assert open_run(tmp_path / "run").record["halved"] == experiments.HALVINGS


# ------------------------------------------------------------------------------------------- workers

class Deadly:
    "A dataset whose reader is killed once, or always, at one item."
    def __init__(self, folder, always=False): self.folder, self.always, self.epoch = folder, always, 0

    def __len__(self): return 32

    def __getitem__(self, indices):
        if 13 in indices and torch.utils.data.get_worker_info() and (self.always or not (self.folder / "died").exists()):
            (self.folder / "died").touch()
            os.kill(os.getpid(), 9)
        i = torch.as_tensor(indices)
        return Batch(i.view(-1, 1, 1, 1) / 16, i[:, None], torch.ones_like(i), i, i)


class FitLine(Phase):
    name, epochs, batch_size = "line", 2, 4

    def __init__(self, dataset): self.model, self.dataset = torch.nn.Linear(1, 1), dataset

    def begin(self):
        self.optimizers = (torch.optim.SGD(self.model.parameters(), .1),)
        return self.dataset

    def losses(self, batch): return {"loss": F.mse_loss(self.model(batch.images.flatten(1))[:, 0], batch.classes / 8)}


def fit(dataset, **execution):
    torch.manual_seed(0)
    phase = FitLine(dataset)
    Loop(phase.model, [phase], execution=Execution(**execution)).fit()
    return phase.model.state_dict()


def test_a_dead_worker_is_replaced_and_changes_nothing(tmp_path):
    alone = fit(Deadly(tmp_path))
    assert not (tmp_path / "died").exists()
    with pytest.warns(UserWarning, match="a loader's process died .* it is started again at batch"): helped = fit(Deadly(tmp_path), workers=1)
    assert (tmp_path / "died").exists() and same(helped, alone)


def test_workers_that_go_on_dying_stop_the_run(tmp_path):
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="exited unexpectedly|killed by signal"):
        warnings.simplefilter("ignore")
        fit(Deadly(tmp_path, always=True), workers=1)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), FileNotFoundError(2, "No such file or directory")],
                         ids=["reset", "end of file", "no socket"])
def test_a_batch_that_breaks_off_on_its_way_means_a_dead_worker(tmp_path, monkeypatch, error):
    (tmp_path / "died").touch()                                             # nobody dies any more
    alone, real, calls = fit(Deadly(tmp_path)), loops.without_alarm, []

    def broken(loader):
        calls.append(loader)
        if len(calls) == 1: raise error
        return real(loader)
    monkeypatch.setattr(loops, "without_alarm", broken)
    with pytest.warns(UserWarning, match="a loader's process died"): assert same(fit(Deadly(tmp_path), workers=1), alone)
    monkeypatch.setattr(loops, "without_alarm", lambda loader: broken(calls.clear() or loader))
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="exited unexpectedly, the last of"):
        warnings.simplefilter("ignore")
        fit(Deadly(tmp_path), workers=1)


def test_what_a_worker_raises_itself_is_no_death(tmp_path, monkeypatch):
    def missing(*_): raise FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0: a.png")
    (tmp_path / "died").touch()
    monkeypatch.setattr(loops, "without_alarm", missing)
    with pytest.raises(FileNotFoundError, match="a.png"): fit(Deadly(tmp_path), workers=1)


def test_workers_change_nothing(tmp_path, whole):
    assert same(weights(train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL | {"workers": 2}, quiet=True)), whole)


# ------------------------------------------------------------------------------------------- pictures that cannot be read

class Holes(Deadly):
    "Some items cannot be read."
    def __init__(self, lost, count=400): self.lost, self.count, self.epoch = lost, count, 0

    def __len__(self): return self.count

    def name(self, item): return f"picture-{item}.jpg"

    def __getitem__(self, indices):
        i = torch.as_tensor([index for index in indices if index not in self.lost], dtype=torch.long)
        return Batch(i.view(-1, 1, 1, 1) / 16 / 400, i[:, None], torch.ones_like(i), i / 400, i)


def test_a_picture_that_cannot_be_read_is_skipped_and_named(tmp_path):
    torch.manual_seed(0)
    phase = FitLine(Holes({7, 300}))
    metrics = loops.Metrics(tmp_path)
    with pytest.warns(UserWarning, match=r"left out, because it cannot be read: picture-(7|300)\.jpg"): Loop(phase.model, [phase], [metrics]).fit()
    lost = [row for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["split"] == "unreadable"]
    assert [(row["count"], sorted(row["items"])) for row in lost] == [(2, [7, 300])] * 2            # in each of two epochs


class StopAt(loops.Callback):
    order = 25

    def __init__(self, step, signals): self.step, self.signals = step, signals

    def after_step(self, loop): self.signals.asked |= loop.total == self.step


def fit_with_holes(folder, stop_at=0, found=None):
    torch.manual_seed(0)
    phase = FitLine(Holes({7, 300}))
    metrics = loops.Metrics(folder, found.state["log"] if found else 0)
    early = loops.EarlyStop(metrics)
    saver = loops.Checkpoints(folder, early, found)
    signals = loops.StopOnSignal(saver)
    loop = Loop(phase.model, [phase], [metrics, early, saver, signals, StopAt(stop_at, signals)])
    if found: loops.start_from(loop, found)
    loop.fit()


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize("step", [50, 99, 100, 101])
def test_what_was_lost_is_remembered_over_a_stop(tmp_path, step):
    for name in ("whole", "cut"): (tmp_path / name).mkdir()
    fit_with_holes(tmp_path / "whole")
    with pytest.raises(loops.Interrupted): fit_with_holes(tmp_path / "cut", step)
    fit_with_holes(tmp_path / "cut", found=latest_checkpoint(tmp_path / "cut" / "checkpoints"))
    rows = [[{**json.loads(line), "seconds": 0} for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("whole", "cut")]
    assert rows[0] == rows[1] and sum(row["split"] == "unreadable" for row in rows[0]) == 2


def test_a_gradient_that_is_no_number_spoils_no_checkpoint(tmp_path, monkeypatch):
    "The loss is finite and its slope is not: weights are NaN before any loss is."
    losses, steps = embedmap.AutoencoderPhase.losses, [0]

    def rooted(self, batch):
        found, steps[0] = losses(self, batch), steps[0] + self.system.training
        if steps[0] == 5 and self.system.training: found["loss"] = found["loss"] + (found["loss"] - found["loss"]).sqrt()
        return found
    with monkeypatch.context() as patch, pytest.raises(Diverged, match="step 6"):
        patch.setattr(embedmap.AutoencoderPhase, "losses", rooted)
        patch.setattr(loops.Checkpoints, "after_step", lambda self, loop: self.save(loop, within_phase=True))
        train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL, quiet=True)
    found = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found.state["total"] == 4 and all(value.isfinite().all() for value in found.model.values() if value.is_floating_point())


def test_a_checkpoint_of_an_earlier_version_says_so(tmp_path, whole, monkeypatch):
    read = experiments.latest_checkpoint
    with pytest.raises(loops.Interrupted):
        with monkeypatch.context() as patch:
            patch.setattr(loops.StopOnSignal, "before_fit", lambda self, loop: setattr(self, "old", {}) or setattr(self, "asked", True))
            train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL, quiet=True)

    def older(folder):
        found = read(folder)
        if found: found.state["random"] = found.state["random"][0]; del found.state["log"], found.state["lost"]
        return found
    monkeypatch.setattr(experiments, "latest_checkpoint", older)
    with pytest.raises(ValueError, match="was written by an earlier version"): resume(tmp_path / "run", quiet=True)


def test_too_many_stop_the_run():
    with warnings.catch_warnings(), pytest.raises(loops.Unreadable, match="5 of 400 items cannot be read in epoch 1, .* more than 1% stop a run"):
        warnings.simplefilter("ignore")
        fit(Holes(set(range(0, 400, 50))))


# ------------------------------------------------------------------------------------------- disks, clocks, company

def test_the_disk_fills_up(tmp_path, whole):
    "A real limit on the size of files, in a process of its own."
    script = f"""
import resource, signal, sys
from crossmodal.cli import main
from crossmodal.systems import embedmap
embedmap.EmbedMap.evaluate = lambda self, test: {{}}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
sys.exit(main(["train", "embedmap", "autoencoder=mlp-vae", "per_number=4", "checkpoint_every=0", "--preset", "smoke", "--out", {str(tmp_path / 'run')!r}]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "no room for a checkpoint of " in done.stderr and f"go on with `crossmodal resume {tmp_path / 'run'}`" in done.stderr
    assert not checkpoints(tmp_path / "run" / "checkpoints") and not list((tmp_path / "run" / "checkpoints").glob("*.part"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert same(weights(resume(tmp_path / "run", quiet=True)), whole)


def test_the_clock_jumps(tmp_path, monkeypatch, whole):
    "Backwards by a day at every question: nothing but labels depends on the time of day."
    day, now = [0], time.time

    def jumping():
        day[0] += 1
        return now() - 86400 * day[0]

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None): return datetime.fromtimestamp(jumping(), tz or timezone.utc)
    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr("crossmodal.training.runs.datetime", Jumping)
    run = train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL, quiet=True)
    assert same(weights(run), whole) and 0 < run.record["seconds"] < 600
    assert datetime.fromisoformat(run.record["ended"]) < datetime.fromisoformat(run.record["started"]) - timedelta(hours=1)
    assert all(json.loads(line)["seconds"] >= 0 for line in (run.folder / "metrics.jsonl").read_text().splitlines())


def test_a_second_process_on_the_same_folder_is_refused(tmp_path, whole, monkeypatch):
    refused, begin = [], embedmap.AutoencoderPhase.begin

    def visited(self):
        command = [sys.executable, "-c", "import sys; from crossmodal.cli import main; sys.exit(main(sys.argv[1:]))", "resume", str(tmp_path / "run")]
        refused.append(subprocess.run(command, capture_output=True, text=True))
        return begin(self)
    monkeypatch.setattr(embedmap.AutoencoderPhase, "begin", visited)
    run = train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL, quiet=True)
    assert refused[0].returncode == 2 and "is being trained by another process at this moment" in refused[0].stderr and "Traceback" not in refused[0].stderr
    assert same(weights(run), whole)


def test_in_the_same_process_too(tmp_path, monkeypatch):
    begin = embedmap.AutoencoderPhase.begin

    def visited(self):
        with pytest.raises(RunError, match="by another process at this moment"): resume(tmp_path / "run", quiet=True)
        return begin(self)
    monkeypatch.setattr(embedmap.AutoencoderPhase, "begin", visited)
    assert train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL, quiet=True).finished


# ------------------------------------------------------------------------------------------- switches that every phase obeys

ALL = {"embedmap": {"autoencoder": "mlp-vae", "per_number": 4}, "embedmap-direct": {"per_number": 4}, "selfsup": {"per_species": 2},
       "selfsup-baseline": {"per_species": 2}, "gxn": {"model": "i2t+t2i", "per_species": 2}, "laviter": {"model": "full", "per_species": 2},
       "sdn": {"model": "sdn", "per_species": 2}}


@pytest.mark.parametrize("system", ALL)
def test_every_phase_obeys(system, tmp_path, monkeypatch):
    "Batches in two parts, short gradients, slower rates: counted where it matters, at the optimisers."
    longest, parts = [], []
    update = loops.update

    def watched(phase, loss, optimizer, clip=0.):
        parts.append((phase.name, phase.part.first, phase.part.last))
        before = [weight.detach().clone() for group in optimizer.param_groups for weight in group["params"]]
        update(phase, loss, optimizer, clip)
        after = [weight for group in optimizer.param_groups for weight in group["params"]]
        moved = any(not torch.equal(a, b) for a, b in zip(before, after))
        assert phase.part.last or not moved, "half a batch moved a weight"
        if phase.part.last:
            gradients = [weight.grad for weight in after if weight.grad is not None]
            if gradients: longest.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()) / (clip or .01))
    monkeypatch.setattr(loops, "update", watched)
    run = train(system, preset="smoke", out=tmp_path / "runs" / "run", changes=ALL[system] | {"accumulate": 2, "clip_others": .01}, quiet=True)
    assert run.finished and {last for _, _, last in parts} == {True, False}
    names = {name for name, *_ in parts}
    assert names == {name for name, first, last in parts if first and not last}                     # no phase went on in whole batches
    assert longest and max(longest) < 1.01                                                          # the paper's own limit, where it has one
    assert run.record["execution"]["accumulate"] == 2


def test_parts_of_a_batch_add_up():
    "A mean over items does not mind being cut into unequal parts."
    line, parts = fit(Holes(set(), 64)), fit(Holes(set(), 64), accumulate=3)
    assert all(torch.allclose(line[name], parts[name], atol=1e-6) for name in line)


def test_compiled_it_learns_the_same(monkeypatch):
    "torch.compile's graphs, forward and backward (without the C++ compiler, which would take a minute): the same curve, up to rounding."
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="aot_eager"))

    class Wrapped(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    class FitCurve(FitLine):
        def __init__(self, dataset): self.model, self.dataset = Wrapped(), dataset

        def losses(self, batch): return {"loss": F.mse_loss(self.model.net(batch.images.flatten(1))[:, 0], batch.classes)}
    ends, compiled = {}, []
    for switch in (False, True):
        torch.manual_seed(0)
        phase = FitCurve(Holes(set(), 64))
        Loop(phase.model, [phase], execution=replace(Execution(), compile=switch)).fit()
        ends[switch] = phase.model.state_dict()
        compiled.append(phase.model.net._compiled_call_impl is not None)
    assert compiled == [False, True]
    assert all(torch.allclose(ends[True][name], value, atol=1e-5) for name, value in ends[False].items())
