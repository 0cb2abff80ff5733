"Shards under fire: exact epochs, bad pictures, torn and hostile files, several processes, little room."
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import time
import warnings
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from crossmodal.cli import main
from crossmodal.data import shards
from crossmodal.data.cache import cache_folder, cached_pictures
from crossmodal.data.captioned import CollectionSplit, open_collection, open_dataset
from crossmodal.data.collection import Collection, Picture, PictureFiles
from crossmodal.data.images import Transform
from crossmodal.data.shards import ShardError, read_shards, shard_faults, shard_order, write_shards
from crossmodal.data.store import check
from crossmodal.training.loop import Callback, Interrupted, Loop, Metrics, Phase, Unreadable
from crossmodal.training.processes import Group

SMALL = Transform((16,))


def small_set(folder, count=230):
    "Coloured pictures in files, six of seven of them to train on."
    folder.mkdir()
    names = tuple(f"{k:03d}.{'png' if k % 2 else 'JPG'}" for k in range(count))
    for k, name in enumerate(names): Image.fromarray(np.full((20, 20 + k % 4, 3), (k, 255 - k, 99), np.uint8)).save(folder / name)
    pictures = tuple(Picture(name, "train" if k % 7 else "test", k % 2, (f"colour {k}", "a colour"), (1, 2.5, 12, 9)) for k, name in enumerate(names))
    return Collection("colours", pictures, ("even", "odd"), PictureFiles(folder, names))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    write_shards(small_set(place / "colours"), place / "shards", per_shard=10, progress=False)
    return place


@pytest.fixture
def colours(made, tmp_path, monkeypatch):
    monkeypatch.setenv("CROSSMODAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CROSSMODAL_SHARDS", raising=False)
    return small_set(tmp_path / "colours")


@pytest.fixture
def folder(made, colours, tmp_path): return Path(shutil.copytree(made / "shards", tmp_path / "shards"))


def edit_index(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def elsewhere(folder, base):
    "An index in a folder of its own."
    far = folder.with_name("far")
    far.mkdir(exist_ok=True)
    (far / "index.json").write_bytes((folder / "index.json").read_bytes())
    edit_index(far, lambda index: index.update(base=base))
    return far


def damage(collection, position):
    shard, offset, count, _ = collection.pixels.places[position].tolist()
    with open(collection.pixels.folder / collection.pixels.shards[shard].name, "r+b") as file:
        file.seek(offset)
        file.write(bytes(count))


# What was written is what is read.

def test_nothing_changes_but_the_place(colours, folder):
    plain, streamed = CollectionSplit(colours, "train", SMALL), open_dataset(folder, "train", transform=SMALL)
    assert streamed.fingerprint == plain.fingerprint and streamed.collection.pictures == colours.pictures
    for items in ([0, 7, 100], [5, 5]):
        for a, b in zip(vars(streamed[items]).values(), vars(plain[items]).values(), strict=True): assert torch.equal(a, b)
    assert not [path for path in cache_folder().rglob("pictures.bin") if len(path.parent.name.split("-")) > 2]
    assert streamed.collection.pixels.raw(3) == (colours.pixels.folder / "003.png").read_bytes()


def test_captions_as_items_and_pyramids(colours, folder):
    options = {"items": "captions", "transform": Transform((8, 16))}
    plain, streamed = CollectionSplit(colours, "train", **options), open_dataset(folder, "train", **options)
    a, b = plain[[0, 1, 9]], streamed[[0, 1, 9]]
    assert torch.equal(a.captions, b.captions) and all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
    order = streamed.order(torch.Generator(), 2, 10)
    assert sorted(order) == list(range(len(streamed))) == list(range(2 * len(streamed.positions)))


def test_streaming_makes_no_cache(folder):
    open_dataset(folder, "train", transform=SMALL)[[0, 1]]
    assert not cache_folder().exists()


def test_webdataset_reads_our_shards(colours, folder):
    import webdataset
    paths = sorted(map(str, folder.glob("*.tar")))
    found = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode("pil"))
    by_name = {sample["json"]["name"]: sample for sample in found}
    assert len(found) == 230 and set(by_name) == {picture.name for picture in colours.pictures}
    for k in (0, 1, 77):
        sample = by_name[colours.pictures[k].name]
        assert sample["json"]["captions"] == list(colours.pictures[k].captions) and sample["json"]["label"] == k % 2
        np.testing.assert_array_equal(np.asarray(sample["png" if k % 2 else "jpg"]), (colours.pixels.read(k)))


def test_the_same_set_gives_the_same_files(colours, folder, tmp_path):
    write_shards(colours, tmp_path / "again", per_shard=10, progress=False)
    assert all(path.read_bytes() == (tmp_path / "again" / path.name).read_bytes() for path in folder.iterdir())


def test_drawn_birds_and_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CROSSMODAL_CACHE", str(tmp_path / "cache"))
    birds = open_collection("birds", per_species=1, progress=False)
    monkeypatch.setattr("crossmodal.data.captioned.drawn_birds", lambda: birds)
    assert main(["data", "shard", "birds", "--out", str(tmp_path / "birds"), "--per-shard", "20"]) == 0
    assert "40 pictures in " in capsys.readouterr().out
    found = read_shards(tmp_path / "birds")
    assert found.fingerprint != "" and found.pictures == birds.pictures and found.fingerprint == birds.fingerprint
    np.testing.assert_array_equal(found.pixels.read(9), birds.pixels.read(9))
    np.testing.assert_array_equal(found.attributes, birds.attributes)
    for wrong in (["birds"], ["digits", "--out", "x"], ["birds", "--out", str(tmp_path / "birds")]): assert main(["data", "shard", *wrong]) == 2


# Epochs.

def dealt(order, count, size):
    "What the loop's `deal` gives each process: the items of its steps."
    batches = [order[k:k + size] for k in range(0, len(order), size)]
    return [[part for batch in batches if (part := Group(count, rank).mine(batch))] for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("items", [1000, 998, 1009])
def test_an_epoch_is_exact_for_any_number_of_processes(count, items):
    of, size = np.arange(items) // 25, 12
    order = shard_order(of, torch.Generator().manual_seed(3), count, size)
    assert sorted(order) == list(range(items))
    parts = dealt(order, count, size)
    seen = [item for part in parts for step in part for item in step]
    assert len(set(map(len, parts))) == 1 and len(seen) == len(set(seen)) == items - items % count
    for steps in zip(*parts): assert len(set(map(len, steps))) == 1
    for part in parts: assert len({of[item] for step in part for item in step}) <= -(-len(set(of)) // count) + 2


def test_few_shards_are_open_at_a_time():
    of = np.arange(4000) // 50
    for part in dealt(shard_order(of, torch.Generator().manual_seed(0), 2, 20), 2, 20):
        steps = [{int(of[item]) for item in step} for step in part]
        first, last = {}, {}
        for k, met in enumerate(steps):
            for shard in met: first.setdefault(shard, k); last[shard] = k
        assert max(sum(first[shard] <= k <= last[shard] for shard in first) for k in range(len(steps))) <= 2 * shards.WINDOW
        assert np.mean([len(met) for met in steps]) > 3                                     # and those are mixed


def test_epochs_differ_and_come_again(folder):
    split = open_dataset(folder, "train", transform=SMALL)
    order = lambda seed: split.order(torch.Generator().manual_seed(seed), 2, 10)
    assert order(0) == order(0) != order(1)


class Mean(Phase):
    "Learns one colour; notes what it has seen."
    name, epochs, batch_size = "mean", 2, 10

    def __init__(self, dataset): self.dataset, self.model, self.seen = dataset, nn.Linear(3, 1), []

    def begin(self):
        self.optimizers = (torch.optim.SGD(self.model.parameters(), .01),)
        return self.dataset

    def losses(self, batch):
        self.seen.append(batch.ids.tolist())
        return {"loss": self.model(batch.images.mean((2, 3))).square().mean()}


class Stop(Callback):
    def __init__(self, step): self.step = step
    def after_step(self, loop):
        if loop.total == self.step: raise Interrupted


def test_resumed_within_an_epoch_the_rest_is_the_same(folder):
    whole, cut, rest = (Mean(open_dataset(folder, "train", transform=SMALL)) for _ in range(3))
    Loop(whole.model, [whole]).fit()
    with pytest.raises(Interrupted): Loop(cut.model, [cut], [Stop(27)]).fit()
    loop = Loop(rest.model, [rest])
    loop.epoch, loop.step, loop.total = 1, 7, 27
    loop.fit()
    assert len(whole.seen) == 40 and cut.seen + rest.seen == whole.seen
    for epoch in (whole.seen[:20], whole.seen[20:]): assert sorted(sum(epoch, [])) == list(range(197))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_loop_deals_each_process_its_own_shards(folder, count):
    split, met = open_dataset(folder, "train", transform=SMALL), []
    of = split.collection.pixels.shard_of[split.positions]
    phase = Mean(split)
    loop = Loop(phase.model, [phase])
    loop.phase, loop.dataset = phase, split
    for rank in range(count):
        loop.group = Group(count, rank)
        met.append(loop.deal()[0])
    seen = [item for batches in met for batch in batches for item in batch]
    assert len(seen) == len(set(seen)) == 197 - 197 % count and {len(batches) for batches in met} == {20}
    for batches in met: assert len({of[item] for batch in batches for item in batch}) <= -(-20 // count) + 2


# Bad pictures.

def test_a_bad_picture_within_an_epoch_is_skipped_and_named(folder, tmp_path):
    split = open_dataset(folder, "train", transform=SMALL)
    damage(split.collection, split.positions[50])
    phase = Mean(split)
    with pytest.warns(UserWarning, match=f"left out.*{split.name(50)}"): Loop(phase.model, [phase], [Metrics(tmp_path)]).fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    noted = [row for row in rows if row["split"] == "unreadable"]
    assert [(row["count"], row["items"], row["names"]) for row in noted] == [(1, [50], [split.name(50)])] * 2
    assert Counter(sum(phase.seen, [])) == {k: 2 for k in range(197) if k != 50}


def test_too_many_bad_pictures_stop_the_run(folder):
    split = open_dataset(folder, "train", transform=SMALL)
    for k in (3, 50): damage(split.collection, split.positions[k])
    phase = Mean(split)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(Unreadable, match="2 of 197"): Loop(phase.model, [phase]).fit()


def test_what_is_measured_has_no_holes(folder):
    split = open_dataset(folder, "test", transform=SMALL)
    damage(split.collection, split.positions[2])
    with pytest.raises(OSError, match=split.name(2)): split[[1, 2]]
    assert len(split[[1, 3]]) == 2


def test_a_few_bad_files_are_left_out_of_a_cache(colours):
    for k in (9, 14): Path(colours.pixels.path(k)).write_bytes(b"no picture")                 # 9 trains, 14 tests
    with pytest.warns(UserWarning, match="2 of 230.*black.*009.png, 014.JPG"): cached_pictures(colours, SMALL, progress=False)
    with pytest.warns(UserWarning, match="1 pictures of colours, split 'train'.*009.png"): train = CollectionSplit(colours, "train", SMALL)
    assert len(train) == 196 and 9 not in train.positions and len(train[range(196)]) == 196
    assert {k: train.name(k) for k in (7, 8)} == {7: "010.JPG", 8: "011.png"}
    (record,) = cache_folder().glob("*/unreadable.json")
    assert [(row["position"], row["name"]) for row in json.loads(record.read_text())] == [(9, "009.png"), (14, "014.JPG")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning): CollectionSplit(colours, "test", SMALL)
        same = Collection(colours.name, colours.pictures, colours.class_names, PictureFiles(colours.pixels.folder, ("001.png",) * 230))
        assert len(CollectionSplit(same, "train", SMALL)) == 197


def test_holes_change_a_splits_fingerprint(colours):
    whole = CollectionSplit(colours, "train", SMALL).fingerprint
    path = colours.pixels.path(9)
    size = path.stat().st_size
    path.write_bytes(bytes(size))                                                           # as long as it was
    again = Collection(colours.name, colours.pictures, colours.class_names, colours.pixels)
    assert again.fingerprint == colours.fingerprint
    with pytest.warns(UserWarning, match="left out"): assert CollectionSplit(again, "train", SMALL).fingerprint != whole


# Fetching.

@pytest.fixture
def server(folder):
    "The shards behind an address; what was asked for is counted."
    asked = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words): pass

        def do_GET(self):
            asked[self.path] += 1
            super().do_GET()

    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    running.shutdown()
    running.server_close()


def read_some(far, total):
    "What a process does that was started for it."
    pixels = read_shards(far).pixels
    os._exit(0 if sum(int(pixels.read(k).sum()) for k in range(0, 230, 5)) == total else 1)


def test_two_processes_fetch_each_shard_once(colours, folder, server):
    base, asked = server
    far = elsewhere(folder, base)
    total = sum(int(colours.pixels.read(k).sum()) for k in range(0, 230, 5))
    both = [multiprocessing.get_context("fork").Process(target=read_some, args=(far, total)) for _ in range(2)]
    for process in both: process.start()
    for process in both: process.join(300)
    assert [process.exitcode for process in both] == [0, 0]
    assert asked and set(asked.values()) == {1}
    assert not list(cache_folder().rglob("*.part"))


def test_a_fetched_set_is_the_set(colours, folder, server):
    far = open_dataset(elsewhere(folder, server[0]), "train", transform=SMALL)
    assert torch.equal(far[[0, 3]].images, CollectionSplit(colours, "train", SMALL)[[0, 3]].images)


@pytest.mark.parametrize("harm, said", [
    (lambda path: path.unlink(), "cannot be fetched"),
    (lambda path: path.write_bytes(path.read_bytes()[:5000]), "only 5000 bytes"),
    (lambda path: path.write_bytes(path.read_bytes() + b"x"), "more"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"), "not what its index promises"),
])
def test_refused_and_torn_downloads_name_the_address(folder, server, harm, said):
    pixels = read_shards(elsewhere(folder, server[0])).pixels
    shard = pixels.shards[pixels.shard_of[0]]
    kept = (folder / shard.name).read_bytes()
    harm(folder / shard.name)
    with pytest.raises(ShardError, match=f"http://127.*{shard.name}.*{said}.*start again"): pixels.read(0)
    assert not list(pixels.home.glob("*.tar*")) or {path.name for path in pixels.home.iterdir()} == {f"{shard.name}.lock"}
    (folder / shard.name).write_bytes(kept)
    assert pixels.read(0).shape == (20, 20, 3)


def test_a_shard_that_is_not_to_be_had_stops_a_run_at_once(folder):
    split = open_dataset(elsewhere(folder, "../shards"), "train", transform=SMALL)
    for path in folder.glob("train-*.tar"): path.unlink()
    phase = Mean(split)
    with pytest.raises(ShardError, match="cannot be fetched"): Loop(phase.model, [phase]).fit()
    assert phase.seen == []


def test_the_least_recently_used_shard_goes(folder, monkeypatch):
    pixels = read_shards(elsewhere(folder, "../shards")).pixels
    size, of = max(shard.bytes for shard in pixels.shards), pixels.shard_of
    monkeypatch.setenv("CROSSMODAL_SHARDS", str(3.01 * size / 1e9))
    here = lambda: {path.name for path in pixels.home.glob("*.tar")}
    name = lambda k: pixels.shards[k].name
    def first(k):
        pixels.read(int(np.flatnonzero(of == k)[0]))
        time.sleep(.02)                                         # a clock of files that ticks slowly tells the one from the next
    full = [k for k, shard in enumerate(pixels.shards) if shard.count == 10][:6]
    for k in (full[0], full[1], full[2], full[0], full[3]): first(k)
    assert here() == {name(full[0]), name(full[2]), name(full[3])}                          # 1 was used longest ago
    with pixels.open(full[2]): first(full[4])                                               # 2 would be next, but is open
    assert here() == {name(full[2]), name(full[3]), name(full[4])}
    for k in full: first(k)
    assert sum(path.stat().st_size for path in pixels.home.glob("*.tar")) <= 3.01 * size


def test_the_rest_of_a_killed_fetch_is_cleared(folder, monkeypatch):
    pixels = read_shards(elsewhere(folder, "../shards")).pixels
    monkeypatch.setenv("CROSSMODAL_SHARDS", str(2.01 * max(shard.bytes for shard in pixels.shards) / 1e9))
    pixels.home.mkdir(parents=True)
    os.truncate(os.open(pixels.home / "x.tar.part", os.O_CREAT | os.O_WRONLY), pixels.shards[0].bytes * 2)
    pixels.read(0)
    assert not list(pixels.home.glob("*.part"))


def test_no_room(folder, monkeypatch):
    split = open_dataset(elsewhere(folder, "../shards"), "train", transform=SMALL)
    monkeypatch.setenv("CROSSMODAL_SHARDS", str(2 * split.collection.pixels.shards[0].bytes / 1e9))
    with pytest.warns(UserWarning, match="again and again"): split.order(torch.Generator(), 1, 10)
    monkeypatch.setenv("CROSSMODAL_SHARDS", "1e-9")
    with pytest.raises(ShardError, match="allow more"): split[[0]]
    monkeypatch.setenv("CROSSMODAL_SHARDS", "-3")
    with pytest.raises(ShardError, match="expected gigabytes"): split[[0]]


# Damaged and hostile folders.

def test_a_half_written_folder_is_refused(colours, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_write_index", lambda *words: 1 / 0)
    with pytest.raises(ZeroDivisionError): write_shards(colours, tmp_path / "half", per_shard=50, progress=False)
    assert not (tmp_path / "half").exists()
    with pytest.raises(ShardError, match="no index.json"): open_dataset(tmp_path / "half.unfinished")
    monkeypatch.undo()
    monkeypatch.setenv("CROSSMODAL_CACHE", str(tmp_path / "cache"))
    write_shards(colours, tmp_path / "half", per_shard=10, progress=False)
    assert len(read_shards(tmp_path / "half").pictures) == 230 and not (tmp_path / "half.unfinished").exists()


def test_torn_missing_and_changed_shards(folder):
    collection = read_shards(folder)
    first, second, third = (folder / shard.name for shard in collection.pixels.shards[:3])
    content = bytearray(first.read_bytes())
    content[-1] ^= 1                                                                        # as long as it was, and all pictures are whole
    first.write_bytes(content)
    assert [(fault.kind, fault.where) for fault in shard_faults(collection)] == [("changed shard", first.name)]
    assert [problem.kind for problem in check(read_shards(folder)).problems] == ["changed shard"]
    second.write_bytes(second.read_bytes()[:-512])
    third.unlink()
    assert [problem.kind for problem in read_shards(folder).problems] == ["torn shard", "missing shard"]
    with pytest.raises(ValueError, match="2 faults"): open_dataset(folder)
    assert {"torn shard", "missing shard"} <= {problem.kind for problem in check(read_shards(folder)).problems}


def first_shard(**change): return lambda index: index["shards"][0].update(change)
def first_picture(**change): return lambda index: index["pictures"][0].update(change)


@pytest.mark.parametrize("change", [
    *(first_shard(name=name) for name in ("../../x.tar", "/etc/x.tar", "a/b.tar", "a\\b.tar", "..", "x.tar\n", ".hidden.tar", "x", "", 3, None)),
    *(first_shard(**it) for it in ({"bytes": -1}, {"bytes": 1.5}, {"count": 0}, {"count": 11}, {"sha256": "../.."}, {"sha256": None}, {"more": 1})),
    *(first_picture(**it) for it in ({"offset": -512}, {"offset": 10**9}, {"offset": True}, {"bytes": 10**12}, {"bytes": -1}, {"shard": -1}, {"shard": 99})),
    *(first_picture(**it) for it in ({"label": 2}, {"label": "0"}, {"split": "x"}, {"captions": "text"}, {"captions": [1]}, {"box": [1, 2]}, {"size": -1})),
    *(lambda index, base=base: index.update(base=base) for base in ("pipe:touch owned", "PIPE:touch owned", "-", "ssh://x", 3)),
    *(lambda index, name=name: index.update(name=name) for name in ("../../x", "/x", "", ".x", 3)),
    lambda index: index.update(crossmodal_shards=2), lambda index: index.pop("tokenizer"),
    lambda index: index.update(pictures={}), lambda index: index.update(shards=None),
    lambda index: index.update(attribute_names=["a"], attributes=[[1.]], attribute_type="float32"),
    lambda index: index.update(attribute_names=["a"], attributes=[[1.]] * 230, attribute_type="O8,O"),
])
def test_a_hostile_index_is_refused(folder, change, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edit_index(folder, change)
    with pytest.raises(ShardError, match="index.json is damaged"): read_shards(folder)
    assert not list(tmp_path.rglob("owned"))


@pytest.mark.parametrize("content", [b'{"crossmodal_shards"', b'["crossmodal_shards"]', b'{"crossmodal_shards": 1}', b'{"crossmodal_shards": 1, \xff}'])
def test_a_torn_index_is_refused(folder, content):
    (folder / "index.json").write_bytes(content)
    with pytest.raises(ShardError, match="fetch it again"): read_shards(folder)


def test_members_with_paths_are_never_unpacked(colours, folder, tmp_path):
    "A tar that would overwrite files, with a right sum: its bytes are read, and nothing is written."
    collection = read_shards(folder)
    shard = int(collection.pixels.shard_of[0])
    path, picture = folder / collection.pixels.shards[shard].name, collection.pixels.raw(0)
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("../../../owned.jpg")
        member.size = len(picture)
        tar.addfile(member, io.BytesIO(picture))
    change = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "count": 1}

    def hostile(index):
        index["pictures"] = [row for row in index["pictures"] if row["shard"] != shard] + [index["pictures"][0] | {"offset": 512}]
        index["shards"][shard].update(change)
    edit_index(folder, hostile)
    far = read_shards(elsewhere(folder, "../shards"))
    np.testing.assert_array_equal(far.pixels.read(len(far.pictures) - 1), colours.pixels.read(0))
    assert not list(tmp_path.rglob("owned*")) and not list(tmp_path.parent.glob("owned*"))


def test_a_set_in_shards_or_without_pictures_is_not_written(folder, tmp_path):
    with pytest.raises(ShardError, match="already"): write_shards(read_shards(folder), tmp_path / "new", progress=False)
    with pytest.raises(ShardError, match="no pictures"): write_shards(Collection("words", (Picture("1", "train"),)), tmp_path / "words", progress=False)


def test_neighbours_in_a_set_are_not_neighbours_in_shards(folder):
    of = read_shards(folder).pixels.shard_of
    assert sum(a == b for a, b in pairwise(of.tolist())) < len(of) / 4
