"""The cache under real processes: killed builders, two builders at once, worker processes, a full disk."""

import os
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader

from crossmodal.data import cache
from crossmodal.data.cache import cache_folder, cached_pictures
from crossmodal.data.captioned import CollectionSplit
from crossmodal.data.collection import Collection, Picture, PictureFiles
from crossmodal.data.images import Transform, prepare

TRANSFORM = Transform((24,))

# What a builder process runs: it opens the folder of pictures that it is told, and says where the cache is.
BUILDER = """
import sys
from pathlib import Path
from crossmodal.data.cache import cached_pictures
from crossmodal.data.collection import Collection, Picture, PictureFiles
from crossmodal.data.images import Transform
names = tuple(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
made_up = Collection("made-up", tuple(Picture(name, "train") for name in names), pixels=PictureFiles(Path(sys.argv[1]), names))
print(cached_pictures(made_up, Transform((24,)), progress=False).folder, flush=True)
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    "Twenty-four pictures in files, and a cache of their own."
    monkeypatch.setenv("CROSSMODAL_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = tuple(f"{k:03d}.jpg" for k in range(24))
    for k, name in enumerate(names):
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (600, 800 + k, 3), dtype=np.uint8)).save(folder / name)
    return Collection("made-up", tuple(Picture(name, "train") for name in names), pixels=PictureFiles(folder, names))


def builder(collection):
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(collection.pixels.folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished():
    "The entries of the cache that look finished."
    found = cache_folder().iterdir() if cache_folder().exists() else ()
    return [path for path in found if path.is_dir() and not path.name.endswith(".unfinished")]


def assert_whole(collection):
    "Every picture of the one finished entry is what `prepare` makes of its file."
    (folder,) = finished()
    read = cache.PictureCache(folder).read(range(len(collection.pictures)))
    for position, picture in enumerate(read):
        np.testing.assert_array_equal(picture, prepare(collection.pixels.read(position), None, TRANSFORM))


def test_a_killed_builder_leaves_nothing_that_looks_finished(made_up):
    dice, killed_while_building = random.Random(0), 0
    for trial in range(20):
        if trial >= 3 and killed_while_building: break
        shutil.rmtree(cache_folder(), ignore_errors=True)
        process = builder(made_up)
        while process.poll() is None and not list(cache_folder().glob("*.unfinished")): time.sleep(.001)
        time.sleep(dice.uniform(0, .1))
        process.kill()
        process.communicate()
        killed_while_building += not finished() and cache_folder().exists()
        if finished(): assert_whole(made_up)
        cached_pictures(made_up, TRANSFORM, progress=False)      # the next one is not kept waiting, and builds
        assert_whole(made_up)
        assert not list(cache_folder().glob("*.unfinished"))
    assert killed_while_building, "no process was killed while it built: the test shows nothing"


def test_two_builders_at_once_build_once(made_up):
    both = [builder(made_up) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert all(process.returncode == 0 for process in both), said
    assert len({out.split()[-1] for out, _ in said}) == 1
    assert_whole(made_up)


def test_workers_deliver_what_the_main_process_does(made_up):
    split = CollectionSplit(made_up, "train", TRANSFORM, captionless=True)
    rows = BatchSampler(range(len(split)), 16, drop_last=False)
    alone, together = (list(DataLoader(split, sampler=rows, batch_size=None, num_workers=workers)) for workers in (0, 2))
    assert len(alone) == 2
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids)


def test_a_disk_too_small_is_said_before_it_is_full(made_up, monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 10)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="CROSSMODAL_CACHE") as raised: cached_pictures(made_up, TRANSFORM, progress=False)
    assert "are needed" in str(raised.value.__cause__)
    assert not finished() and not list(cache_folder().glob("*.unfinished"))


def test_a_torn_picture_is_named_and_nothing_is_kept(made_up):
    torn = made_up.pixels.path(7)
    torn.write_bytes(torn.read_bytes()[:50_000])
    with pytest.raises(ValueError, match="1 of 24 pictures.*007.jpg"): cached_pictures(made_up, TRANSFORM, progress=False)
    assert not finished()
    shutil.rmtree(cache_folder())


@pytest.mark.parametrize("call", ["draw_bird(sample_bird(0, 0, 0), 48)", "order_similarity(torch.eye(8), torch.eye(8))"])
def test_the_first_calls_of_a_compiled_loop_may_come_from_many_threads(call, tmp_path):
    "Readers draw in a pool of threads; the loops are compiled, or loaded, by whoever comes first."
    program = ("import torch\nfrom concurrent.futures import ThreadPoolExecutor\nfrom threading import Barrier\n"
               "from crossmodal.data.birds import draw_bird, sample_bird\n"
               f"from crossmodal.metrics.retrieval import order_similarity\nstart = Barrier(8)\ndef one(k):\n    start.wait()\n    return {call}\n"
               "with ThreadPoolExecutor(8) as pool: assert len(list(pool.map(one, range(8)))) == 8\n")
    command, place = [sys.executable, "-W", "error::UserWarning", "-c", program], {"NUMBA_CACHE_DIR": str(tmp_path)}
    for _ in range(2): subprocess.run(command, check=True, env=os.environ | place)      # compiled, then loaded
