"""Fixtures that several test modules share."""

import json
import os

# Tests fork processes that are killed. Where numba has used GNU OpenMP, its forked children end themselves.
os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")

import numpy as np
import pytest
import torch
from PIL import Image

SLOW = ("browser", "faults")                    # folders whose files take minutes each


def pytest_collection_modifyitems(items):
    "The slow folders first: a file is one worker's, and whichever begins last should be short."
    items.sort(key=lambda item: not any(folder in item.path.parts for folder in SLOW))


@pytest.fixture(scope="module")
def one_thread():
    "Sums are then added in the same order in every run and every process."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def karpathy(tmp_path):
    "Six pictures in Karpathy's layout, all of them test or train; their words are nobody else's."
    folder = tmp_path / "strange"
    (folder / "images").mkdir(parents=True)
    rng, entries = np.random.default_rng(0), []
    for k in range(6):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / "images" / f"{k}.png")
        sentences = [{"raw": f"zeppelin number{k} over gizmo{j}", "tokens": ["zeppelin", f"number{k}", "over", f"gizmo{j}"]} for j in range(5)]
        entries.append({"filename": f"{k}.png", "split": "train" if k < 2 else "val" if k == 2 else "test", "sentences": sentences, "imgid": k})
    (folder / "dataset.json").write_text(json.dumps({"dataset": "strange", "images": entries}))
    return folder
