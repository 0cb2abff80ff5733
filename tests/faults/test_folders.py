"Bad input, torn files, full disks: each is refused or survived, with a message that says what to do."
import errno
import gzip
import json
import multiprocessing
import os
import shutil
import struct
import time
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from crossmodal.data.captioned import open_dataset
from crossmodal.data.digits import MNIST_FILES, digit_pools, read_idx
from crossmodal.systems import embedmap, experiments
from crossmodal.systems.experiments import evaluate, load, plan, resume, train
from crossmodal.training import runs
from crossmodal.training.checkpoint import NotSaved, TornCheckpoint, checkpoints, latest_checkpoint, read_checkpoint, save_checkpoint
from crossmodal.training.runs import RunError, locked, new_run, open_run

SMALL = {"autoencoder": "mlp-vae"}
CHECKPOINT_FILES = ("model.safetensors", "training.safetensors", "state.json")


def contents(folder):
    "Every file below a folder, byte for byte."
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def idx(array):
    "An array of bytes as an idx file."
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder, train_labels=200):
    "A small folder in MNIST's layout, of noise; returns the folder."
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for (pictures, labels), count in zip(MNIST_FILES.values(), (200, 100)):
        (folder / pictures).write_bytes(idx(rng.integers(0, 256, (count, 28, 28))))
        (folder / labels).write_bytes(idx(np.arange(train_labels if count == 200 else count) % 10))
    return folder


def mark_unfinished(folder):
    "Make a finished run look like one that was killed before it was measured."
    record = json.loads((folder / "run.json").read_text()) | {"status": "running", "scores": {}}
    (folder / "run.json").write_text(json.dumps(record))


def cut(path): path.write_bytes(path.read_bytes()[:len(path.read_bytes()) * 2 // 3])


def flip(path):
    "Change one bit in the middle of a file."
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


DAMAGES = {"cut": cut, "emptied": lambda path: path.write_bytes(b""), "removed": lambda path: path.unlink(), "one bit flipped": flip}
torn_in_some_way = pytest.mark.parametrize("name, damage", [(name, damage) for name in CHECKPOINT_FILES for damage in DAMAGES])


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, hasty_reader):
    "A finished run; tests copy it."
    return train("embedmap", preset="smoke", out=tmp_path_factory.mktemp("trained") / "run", changes=SMALL, quiet=True).folder


@pytest.fixture
def run(trained, tmp_path): return shutil.copytree(trained, tmp_path / "run")


# names, keys and values: refused before anything is written

@pytest.mark.parametrize("asked, message", [
    ({"system": "embedmop"}, r"unknown system 'embedmop': choose one of .*embedmap, embedmap-direct"),
    ({"preset": "tiny"}, r"unknown preset 'tiny': choose one of smoke, quick, reduced, paper"),
    ({"changes": {"batchsize": "64"}}, r"EmbedMapConfig has no key 'batchsize'. Did you mean 'batch_size'\? Valid keys: .*seed.*learning_rate.*patience"),
    ({"changes": {"wings": "2"}}, r"has no key 'wings'\. Valid keys: .*batch_size"),
    ({"changes": {"batch_size": "many"}}, r"batch_size='many': .*integer"),
    ({"changes": {"batch_size": 2.5}}, r"batch_size=2\.5: .*integer"),
    ({"changes": {"colour": 1}}, r"colour=1: .*boolean"),
    ({"changes": {"autoencoder": "resnet"}}, r"autoencoder='resnet': .*'conv-vae', 'mlp-vae', 'conv-ae' or 'mlp-ae'"),
    ({"data": "didgits"}, r"'didgits' is neither a dataset nor a folder. Datasets: birds, digits, mnist"),
], ids=["system", "preset", "misspelt key", "foreign key", "word for a number", "fraction for a whole number", "number for a flag", "unknown choice", "data"])
def test_bad_request_is_refused_before_anything_is_written(tmp_path, asked, message):
    with pytest.raises(ValueError, match=message):
        train(**({"system": "embedmap", "preset": "smoke", "out": tmp_path / "run"} | asked))
    assert not (tmp_path / "run").exists()


def test_unknown_split_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown split 'valid': choose one of train, val, test"):
        open_dataset("digits", "valid")


# data files

def test_truncated_idx_gives_expected_and_found_bytes(tmp_path):
    path = tmp_path / "labels-idx1-ubyte"
    path.write_bytes(idx(np.arange(10))[:-3])
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte is cut off or too long: expected 18 bytes for shape \(10,\), found 15\. Fetch it again"):
        read_idx(path)


def test_idx_that_is_too_long_gives_expected_and_found_bytes(tmp_path):
    path = tmp_path / "labels-idx1-ubyte"
    path.write_bytes(idx(np.arange(10)) + b"!!")
    with pytest.raises(ValueError, match=r"expected 18 bytes .* found 20"):
        read_idx(path)


def test_idx_truncated_in_its_header(tmp_path):
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(idx(np.zeros((2, 28, 28)))[:9])
    with pytest.raises(ValueError, match="images-idx3-ubyte is cut off in its header: expected 16 bytes, found 9"):
        read_idx(path)


@pytest.mark.parametrize("raw, found", [(b"\x89PNG\r\n", "89 50 4e 47"), (b"\0\0\x0d\x01\0\0\0\x01....", "00 00 0d 01"), (b"", "nothing")],
                         ids=["a picture", "idx of floats", "empty"])
def test_wrong_magic_is_shown(tmp_path, raw, found):
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"images-idx3-ubyte is not an idx file of bytes: expected it to begin with 00 00 08 .*, found {found}"):
        read_idx(path)


@pytest.mark.parametrize("keep", [5, 40, -4])
def test_truncated_gzip_is_named(tmp_path, keep):
    path = tmp_path / "images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (4, 28, 28))))[:keep])
    with pytest.raises(ValueError, match="images-idx3-ubyte.gz is not a whole gzip file .* fetch it again"):
        read_idx(path)


def test_gzip_of_a_truncated_idx_gives_expected_and_found_bytes(tmp_path):
    path = tmp_path / "labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx(np.arange(10))[:-3]))
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte.gz .* expected 18 bytes .* found 15"):
        read_idx(path)


def test_missing_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSMODAL_DATA", str(tmp_path / "nowhere"))
    digit_pools.cache_clear()
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere/mnist: get it with `crossmodal data get mnist`.*CROSSMODAL_DATA"):
        train("embedmap", "mnist", "smoke", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for names in MNIST_FILES.values() for name in names])
def test_mnist_folder_without_one_file_names_it(tmp_path, name):
    (write_mnist(tmp_path / "mnist") / name).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="crossmodal data get mnist") as caught:
        open_dataset(tmp_path / "mnist")
    assert name in str(caught.value) or name == MNIST_FILES["train"][0]         # the file by which the layout is recognised


def test_folder_of_unknown_layout_says_what_was_looked_for(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(ValueError, match=r"has none of the layouts that are known here: .*MNIST \(four idx files"):
        open_dataset(tmp_path)


def test_more_pictures_than_labels_gives_both_counts(tmp_path):
    with pytest.raises(ValueError, match=r"with a label each, found pictures \(200, 28, 28\) and labels \(199,\)"):
        open_dataset(write_mnist(tmp_path / "mnist", train_labels=199))


# run folders

def test_run_folder_in_the_way_is_refused_and_untouched(run):
    before = contents(run)
    with pytest.raises(RunError, match=r"run is not empty. Go on with `crossmodal resume .*run`, choose another --out, or move it aside with --force"):
        train("embedmap", preset="smoke", out=run, changes=SMALL, quiet=True)
    assert contents(run) == before


def test_folder_of_foreign_files_is_refused_and_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="is not empty"):
        train("embedmap", preset="smoke", out=tmp_path, changes=SMALL, quiet=True)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_force_moves_the_old_run_aside_whole(run):
    before = contents(run)
    config, _, data, _ = plan("embedmap", preset="smoke", changes=SMALL)
    for _ in range(2):
        with new_run(run, "embedmap", config, "smoke", data, force=True): pass
    assert contents(run.with_name("run.old-1")) == before
    assert contents(run.with_name("run.old-2")).keys() - {".lock"} == {"run.json"} == contents(run).keys() - {".lock"}


def start_together(folder, name, other, force):
    "In a process of its own: come to where the folder was found empty and the record is not yet written, and wait there for the other one."
    torch.set_num_threads(1)
    place, versions, begin = folder.parent, runs.versions, embedmap.AutoencoderPhase.begin

    def wait_for(what):
        end = time.monotonic() + 300
        while not (place / what).exists() and time.monotonic() < end: time.sleep(.01)

    def together():
        (place / f"{name} is in").touch()
        wait_for(f"{other} is in")
        return versions()
    runs.versions, embedmap.EmbedMap.evaluate = together, lambda self, test: {}
    embedmap.AutoencoderPhase.begin = lambda self: wait_for(f"{other} is refused") or begin(self)          # no checkpoint is written until then
    try: train("embedmap", preset="smoke", out=folder, changes=SMALL | {"per_number": 4}, force=force, quiet=True)
    except RunError as error:
        for what in ("in", "refused"): (place / f"{name} is {what}").write_text(str(error))
        os._exit(3)


@pytest.mark.parametrize("force", [False, True], ids=["into nothing", "over an old run"])
def test_of_two_that_start_at_once_one_is_refused_and_removes_nothing(tmp_path, force):
    folder = tmp_path / "run"
    if force:
        folder.mkdir()
        (folder / "old.txt").write_text("of another day")
    both = [multiprocessing.get_context("fork").Process(target=start_together, args=(folder, *names, force)) for names in ("ab", "ba")]
    for child in both: child.start()
    for child in both: child.join(300)
    assert sorted(child.exitcode for child in both) == [0, 3]
    refused, = tmp_path.glob("* is refused")
    assert "is being trained by another process" in refused.read_text() or "is not empty" in refused.read_text()
    assert open_run(folder).finished and latest_checkpoint(folder / "checkpoints")
    if force: assert (tmp_path / "run.old-1" / "old.txt").exists() and not (tmp_path / "run.old-2").exists()


def test_a_folder_that_is_trained_in_is_not_cleared_by_who_is_refused(tmp_path):
    "Not even if it holds nothing yet but a record."
    config, _, data, _ = plan("embedmap", preset="smoke", changes=SMALL)
    with new_run(tmp_path / "run", "embedmap", config, "smoke", data) as ours:
        before = contents(ours.folder)
        for force in (False, True):
            with pytest.raises(RunError): train("embedmap", preset="smoke", out=ours.folder, changes=SMALL, force=force, quiet=True)
        with pytest.raises(RunError, match="by another process at this moment"): resume(ours.folder, quiet=True)
        assert contents(ours.folder) == before


def test_the_lock_of_a_folder_that_was_moved_aside_meanwhile_is_no_lock(tmp_path, monkeypatch):
    "Asked for in the folder, got in `old`: what now has the folder's name belongs to another."
    folder, acquire = tmp_path / "run", FileLock.acquire
    folder.mkdir()

    def late(self, **options):
        lock = acquire(self, **options)
        folder.rename(tmp_path / "old")
        folder.mkdir()
        return lock
    with monkeypatch.context() as patch, pytest.raises(RunError, match="by another process"):
        patch.setattr(FileLock, "acquire", late)
        with locked(folder): pass
    with locked(folder), locked(tmp_path / "old"): pass                     # neither is held any more


@pytest.mark.parametrize("use", [load, evaluate, resume])
def test_run_of_another_format_is_refused_with_both_versions(run, use):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"format": 99, "versions": {"crossmodal": "7.8.9"}}))
    before = contents(run)
    with pytest.raises(RunError) as caught: use(run)
    here = metadata.version("crossmodal")
    for part in ("run.json", "format 99", "crossmodal 7.8.9", f"crossmodal {here}, which reads format 1", "Install the version that wrote it"):
        assert part in str(caught.value)
    assert contents(run) == before


@pytest.mark.parametrize("keep", [0, 1, 200, -3])
@pytest.mark.parametrize("use", [load, evaluate, resume])
def test_run_json_that_is_cut_off_is_named(run, use, keep):
    (run / "run.json").write_bytes((run / "run.json").read_bytes()[:keep])
    before = contents(run)
    with pytest.raises(RunError, match=r"run/run.json cannot be read"): use(run)
    assert contents(run) == before


def test_folder_without_run_json_is_no_run(tmp_path):
    with pytest.raises(RunError, match="is not a run folder: it has no run.json. `crossmodal train` makes one"): load(tmp_path)


def test_run_without_a_checkpoint_says_how_to_go_on(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match="holds no checkpoint yet: go on with `crossmodal resume .*run`"): load(run)


def test_resume_with_other_data_is_refused_and_untouched(run, tmp_path):
    mark_unfinished(run)
    before, expected = contents(run), open_run(run).record["data"]["fingerprint"]
    other = write_mnist(tmp_path / "mnist")
    found = open_dataset(other, "train", per_number=8).fingerprint
    with pytest.raises(RunError, match=f"was begun on other data: expected fingerprint {expected}, found {found} in .*mnist"):
        resume(run, data=str(other), quiet=True)
    assert contents(run) == before


# checkpoints

@torn_in_some_way
def test_load_uses_the_checkpoint_before_a_torn_one(run, name, damage):
    older, newest = checkpoints(run / "checkpoints")
    expected = read_checkpoint(older).model
    DAMAGES[damage](newest / name)
    with pytest.warns(UserWarning, match=f"{newest.name} is torn: .*{name}.* Using the previous checkpoint, {older.name}"): system = load(run)
    assert same(system.state_dict(), expected)


@torn_in_some_way
def test_resume_goes_on_from_the_checkpoint_before_a_torn_one(run, trained, name, damage):
    mark_unfinished(run)
    older, newest = checkpoints(run / "checkpoints")
    DAMAGES[damage](newest / name)
    with pytest.warns(UserWarning, match=f"{newest.name} is torn: .*{name}.* Using the previous checkpoint, {older.name}"): again = resume(run, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load(run).state_dict(), load(trained).state_dict())
    assert again.finished and again.record["scores"] == open_run(trained).record["scores"]


@pytest.mark.parametrize("use", [load, evaluate, resume])
def test_if_all_checkpoints_are_torn_nothing_is_deleted(run, use):
    mark_unfinished(run)
    for path in checkpoints(run / "checkpoints"): cut(path / "model.safetensors")
    before = contents(run)
    with pytest.raises(TornCheckpoint, match=r"\d{6} is torn: model.safetensors: expected SHA-256 .*, found "): use(run)
    assert contents(run) == before


def test_what_a_killed_writer_left_is_ignored_and_overwritten(run):
    folder = run / "checkpoints"
    newest = checkpoints(folder)[-1]
    part = folder / f"{int(newest.name) + 1:06d}.part"
    part.mkdir()
    for name in ("model.safetensors", "leftover"): (part / name).write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(run)
    assert checkpoints(folder)[-1] == newest and part.exists()
    saved = save_checkpoint(folder, {"w": torch.ones(2)}, {"step": 1})
    assert saved.name == part.stem and not part.exists() and sorted(path.name for path in saved.iterdir()) == sorted(CHECKPOINT_FILES)
    assert same(read_checkpoint(saved).model, {"w": torch.ones(2)})


def full_disk(monkeypatch, after):
    "The `after`-th file of checkpoints is written half, and fails as it would on a full disk."
    written, write_bytes = [], Path.write_bytes

    def write(path, data):
        if path.parent.suffix != ".part": return write_bytes(path, data)
        written.append(path)
        if len(written) < after: return write_bytes(path, data)
        write_bytes(path, data[:len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    monkeypatch.setattr(Path, "write_bytes", write)


@pytest.mark.parametrize("after", [1, 2, 3], ids=["model", "training", "state"])
def test_full_disk_leaves_older_checkpoints_readable(run, monkeypatch, after):
    folder = run / "checkpoints"
    older = {path.name: contents(path) for path in checkpoints(folder)}
    with monkeypatch.context() as patch, pytest.raises(NotSaved, match="free some, then go on with `crossmodal resume"):
        full_disk(patch, after)
        save_checkpoint(folder, {"w": torch.ones(2)}, {"step": torch.ones(1)})
    assert {path.name: contents(path) for path in checkpoints(folder)} == older
    assert latest_checkpoint(folder).path.name == max(older)
    assert latest_checkpoint(save_checkpoint(folder, {"w": torch.ones(2)}, {}).parent).path.name > max(older)


def test_training_that_filled_the_disk_is_resumed_to_the_same_end(trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(NotSaved, match="free some, then go on with `crossmodal resume"):
        full_disk(patch, after=5)                       # three files each: the second checkpoint, in its second file
        train("embedmap", preset="smoke", out=tmp_path / "run", changes=SMALL, quiet=True)
    assert open_run(tmp_path / "run").record["status"] == "running" and len(checkpoints(tmp_path / "run" / "checkpoints")) == 1
    run = resume(tmp_path / "run", quiet=True)
    assert same(load(run.folder).state_dict(), load(trained).state_dict()) and run.record["scores"] == open_run(trained).record["scores"]


def test_finished_run_is_returned_as_it_is(run, monkeypatch):
    monkeypatch.setattr(experiments, "fit_run", None)
    before = contents(run)
    assert resume(run).finished and contents(run) == before
