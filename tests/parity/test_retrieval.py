"""Retrieval scores, ranks and figures against loops in numpy and scikit-learn, on random and on awkward input."""
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from sklearn.metrics.pairwise import cosine_similarity as sklearn_cosine

from crossmodal.metrics import retrieval as R


def loop_order(images, captions, reverse=False):
    "The definition, pair by pair, in float64."
    out = np.empty((len(images), len(captions)))
    for i, v in enumerate(images.astype(np.float64)):
        for j, t in enumerate(captions.astype(np.float64)):
            out[i, j] = -(np.maximum(0, v - t if reverse else t - v)**2).sum()
    return out


def loop_ranks(scores, owners, ties):
    "One query at a time; the mean is that of the two extremes."
    def place(foreign, truth):
        low, high = sum(s > truth for s in foreign), sum(s >= truth for s in foreign)
        return {"optimistic": low, "pessimistic": high, "mean": (low + high) / 2}[ties]
    images = [place([s for s, o in zip(row, owners) if o != i], max(s for s, o in zip(row, owners) if o == i)) for i, row in enumerate(scores)]
    captions = [place([s for i, s in enumerate(scores[:, j]) if i != o], scores[o, j]) for j, o in enumerate(owners)]
    return images, captions


def check(ranks, scores, owners, ties):
    images, captions = loop_ranks(np.asarray(scores), owners, ties)
    assert ranks.image_to_text.tolist() == images and ranks.text_to_image.tolist() == captions


SIZES = [(1, 1, 1), (1, 5, 3), (7, 1, 9), (9, 130, 17), (17, 129, 130), (8, 128, 8), (3, 257, 1023)]


@pytest.mark.parametrize("dtype, within", [("float16", 1e-5), ("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("n, m, d", SIZES)
def test_scores_are_the_definition(n, m, d, dtype, within):
    rng = np.random.default_rng(n * m * d)
    a, b = (rng.normal(size=(k, d)).astype(dtype) for k in (n, m))
    for reverse in (False, True):
        ours = R.order_similarity(torch.from_numpy(a), torch.from_numpy(b), reverse)
        np.testing.assert_allclose(ours.numpy(), loop_order(a, b, reverse), rtol=within, atol=within)
    ours = R.cosine_similarity(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(ours.numpy(), sklearn_cosine(a.astype(float), b.astype(float)), atol=within)


def test_strides_gradients_and_zeros():
    a, b = torch.randn(20, 6).T, torch.randn(18, 40)[::2, ::2]
    np.testing.assert_allclose(R.order_similarity(a, b).numpy(), loop_order(a.numpy(), b.numpy()), rtol=1e-5)
    assert not R.order_similarity(a.requires_grad_(), b).requires_grad
    assert R.cosine_similarity(torch.zeros(1, 3), torch.ones(2, 3)).tolist() == [[0, 0]]


def test_plain_torch_gives_the_same_bits():
    a, b = torch.randn(19, 150), torch.randn(140, 150)
    assert R._compiled(), "numba is a part of this environment"
    for signs, order in (((1., 1.), True), ((-1., -1.), True), ((-1., 1.), False)):
        assert torch.equal(R._similarity(a, b, signs, order), 0 - R._torch_costs(a, b, signs, order))


@pytest.mark.parametrize("ties", R.TIES)
@pytest.mark.parametrize("kind", ["random", "coarse", "constant", "duplicates", "one", "irregular"])
def test_ranks(kind, ties):
    rng = np.random.default_rng(3)
    n, m = (1, 4) if kind == "one" else (12, 60)
    owners = np.repeat(np.arange(n), m // n)
    if kind == "irregular": owners = rng.permutation(np.concatenate([np.arange(n), rng.integers(n, size=m - n)]))
    a, b = rng.normal(size=(n, 4)), rng.normal(size=(m, 4))
    if kind in ("coarse", "irregular"): a, b = a.round(), b.round()
    if kind == "constant": a[:], b[:] = a[0], b[0]
    if kind == "duplicates": a[1::2], b[1::2] = a[::2], b[::2]
    a, b = torch.from_numpy(a).float(), torch.from_numpy(b).float()
    for reverse in (False, True):
        scores = R.order_similarity(a, b, reverse)
        check(R.retrieval_ranks(scores, owners, ties), scores, owners, ties)
        check(R.order_ranks(a, b, owners, reverse, ties), scores, owners, ties)
    scores = R.cosine_similarity(a, b)
    check(R.cosine_ranks(a, b, torch.from_numpy(owners), ties), scores, owners, ties)


def test_ranks_without_ties_are_those_of_sorting():
    scores = np.random.default_rng(0).permutation(20 * 100).reshape(20, 100).astype(float)
    ranks = R.retrieval_ranks(torch.from_numpy(scores))
    for i in range(20):                                             # as order-embedding and vsepp do it
        order = np.argsort(scores[i])[::-1]
        assert ranks.image_to_text[i] == min(np.where(order == j)[0][0] for j in range(5 * i, 5 * i + 5))
    for j in range(100): assert ranks.text_to_image[j] == np.where(np.argsort(scores[:, j])[::-1] == j // 5)[0][0]
    report = R.retrieval_report(ranks)
    for k in (1, 5, 10):
        assert getattr(report.text_to_image, f"r{k}") == pytest.approx(100 * top_k_accuracy_score(ranks.owners.numpy(), scores.T, k=k))
    assert report.text_to_image.median == np.floor(np.median(ranks.text_to_image.numpy())) + 1


def test_chance_is_the_mean_over_all_orders():
    owners = np.array([0, 0, 1, 2, 2])
    every = [R.retrieval_ranks(torch.tensor([order] * 3, dtype=torch.float64), owners, "optimistic").image_to_text for order in permutations(range(5))]
    ours = R.retrieval_report(R.retrieval_ranks(torch.rand(3, 5), owners)).chance.image_to_text
    ranks = torch.cat(every)
    assert ours.r1 == pytest.approx(100 * (ranks < 1).double().mean().item()) and ours.mean == pytest.approx(ranks.mean().item() + 1)
    assert ours.median == np.floor(np.median(ranks.numpy())) + 1


def test_folds_cover_everything_once():
    images, captions, owners = torch.randn(12, 3), torch.randn(40, 3), np.random.default_rng(0).permutation(np.r_[np.arange(12), np.arange(28) % 12])
    folds = list(R.in_folds(images, captions, owners, size=4))
    assert [len(f[0]) for f in folds] == [4, 4, 4] and sum(len(f[1]) for f in folds) == 40
    for k, (_, part, own) in enumerate(folds): assert torch.equal(part, captions[torch.from_numpy(owners // 4 == k)]) and own.max() == 3
    with pytest.raises(ValueError, match="whole folds of 5"): list(R.in_folds(images, captions, owners, size=5))


MEMORY = """
import torch
from crossmodal.metrics.retrieval import order_ranks
torch.set_num_threads(2)
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))          # ru_maxrss begins with the parent's
def more(m):
    captions = torch.rand(m, 32)
    before = peak()
    order_ranks(images, captions, m // 2000)
    return (peak() - before) / 2**10
images = torch.rand(2000, 32)
more(4000)
print(more(8000), more(32000))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here, where the peak of this process alone stands")
def test_memory_does_not_grow_with_the_matrix():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    small, large = map(float, done.stdout.split())
    matrix, codes = 2000 * 24000 * 4 / 2**20, 34000 * 32 * 4 / 2**20
    assert large - small < codes < matrix / 40, f"{small:.1f} MiB more for 8,000 captions, {large:.1f} for 32,000; codes {codes:.1f}, matrix {matrix:.0f}"


def loop_search(queries, index, k, find, reverse):
    "Every pair by its definition; a tie is won by the lower position."
    scores = loop_order(index, queries, reverse).T if find == "images" else loop_order(queries, index, reverse)
    return [sorted(range(len(index)), key=lambda j: (-row[j], j))[:k] for row in scores]


@pytest.mark.parametrize("block", [1, 3, 64, 65, 199, 200, 1000, None])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("find", R.FINDS)
def test_search_is_a_sort_of_everything(find, reverse, block, tmp_path):
    rng = np.random.default_rng(4)
    queries, index = rng.integers(-2, 3, (5, 4)).astype(np.float32), rng.integers(-2, 3, (200, 4)).astype(np.float16)       # whole numbers: exact ties
    np.save(tmp_path/"index.npy", index)
    for held in (index, torch.from_numpy(index), torch.from_numpy(index).bfloat16(), index[::-1][::-1], np.load(tmp_path/"index.npy", mmap_mode="r")):
        for k in (1, 10, 200):
            scores, positions = R.order_search(torch.from_numpy(queries), held, k, find, reverse, block)
            assert positions.tolist() == loop_search(queries, index, k, find, reverse)
            assert scores.dtype == torch.float32 and (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("order", ["rising", "falling", "constant"])
def test_search_in_an_index_that_gets_better_or_worse(order):
    index = {"rising": torch.arange(300.), "falling": -torch.arange(300.), "constant": torch.zeros(300)}[order][:, None]
    for block in (1, 7, 64, 300):
        positions = R.order_search(torch.full((2, 1), 1000.), index, 5, block=block)[1]
        assert positions.tolist() == [list(range(299, 294, -1)) if order == "rising" else list(range(5))] * 2


def test_search_without_numba(monkeypatch):
    queries, index = torch.rand(3, 20), torch.rand(150, 20).half()
    fast = R.order_search(queries, index, 7, block=50)
    monkeypatch.setattr(R, "_compiled", lambda: False)
    assert all(torch.equal(a, b) for a, b in zip(fast, R.order_search(queries, index, 7, block=40)))


SEARCH = """
import sys, threading, numpy as np, torch
from pathlib import Path
from crossmodal.metrics.retrieval import order_search
torch.set_num_threads(2)
def anonymous(): return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")) / 2**10
index, queries, done, most = np.load(sys.argv[1], mmap_mode="r"), torch.rand(4, 256), threading.Event(), [0.]
def watch():
    while not done.wait(.002): most[0] = max(most[0], anonymous())
order_search(queries, index[:4096], block=2048)
before, watcher = anonymous(), threading.Thread(target=watch)
watcher.start(); order_search(queries, index, block=2048); done.set(); watcher.join()
print(most[0] - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_search_holds_a_block_and_not_the_index(tmp_path):
    path, rows = tmp_path/"index.npy", 120_000
    index = np.lib.format.open_memmap(path, "w+", np.float16, (rows, 256))
    for first in range(0, rows, 20_000): index[first:first + 20_000] = np.random.default_rng(first).random((20_000, 256), np.float32)
    index.flush()
    done = subprocess.run([sys.executable, "-c", SEARCH, str(path)], capture_output=True, text=True, check=True)
    gained, stored = float(done.stdout), rows * 256 * 2 / 2**20
    assert gained < stored / 3, f"{gained:.1f} MiB more for an index of {stored:.0f} MiB in half precision, in blocks of 1 MiB"
