"""R-precision, AIMCoS and class accuracy against loops in numpy and scikit-learn."""
import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier

from crossmodal.metrics import alignment as A


def codes(n, d, seed): return np.random.default_rng(seed).normal(size=(n, d))


def t(x): return torch.from_numpy(np.asarray(x))


def loop_hits(images, texts, table, top):
    "The chance of the truth to be among the first, found by walking through the places of its tied group."
    hits = []
    for image, row in zip(images, table):
        scores = [float(np.dot(image, texts[c]) / np.linalg.norm(image) / np.linalg.norm(texts[c])) for c in row]
        above, tied = sum(s > scores[0] + 1e-9 for s in scores[1:]), sum(abs(s - scores[0]) <= 1e-9 for s in scores[1:])
        hits.append(np.mean([place < top for place in range(above, above + tied + 1)]))
    return hits


@pytest.mark.parametrize("top", [1, 3])
@pytest.mark.parametrize("kind", ["random", "constant", "duplicates", "one", "coarse"])
@pytest.mark.parametrize("d", [1, 7, 32])
def test_r_precision(kind, top, d):
    n = 1 if kind == "one" else 40
    if kind == "coarse": d = {1: 1, 7: 4, 32: 16}[d]                # then lengths are powers of two, and equal cosines of different codes equal to the bit
    images, texts = codes(n, d, 0), codes(60, d, 1)
    if kind == "constant": images[:], texts[:] = images[0], texts[0]
    if kind == "duplicates": texts[30:] = texts[:30]
    if kind == "coarse": images, texts = np.sign(images), np.sign(texts)
    table = A.distractors(60, truths=np.arange(n), count=20)
    result = A.r_precision(t(images), t(texts), table, top)
    np.testing.assert_allclose(result.hits, loop_hits(images, texts, table, top), atol=1e-12)
    assert result.score == pytest.approx(result.fold_mean) and result.chance == top / 21 and result.n == n
    if kind == "constant": assert result.score == pytest.approx(result.chance)


def test_distractors_of_irregular_owners():
    rng = np.random.default_rng(0)
    owners, classes = rng.integers(30, size=200), rng.integers(5, size=30)
    for group, table in ((owners, A.distractors(owners, count=99)), (classes[owners], A.distractors(owners, classes, count=99))):
        for text, row in enumerate(table):
            assert row[0] == text and len(set(row)) == 100
            assert all(group[other] != group[text] for other in row[1:])
    part = A.distractors(owners, classes, truths=[7, 3])
    assert (part == A.distractors(owners, classes)[[7, 3]]).all()


@pytest.mark.parametrize("over", ["images", "texts"])
def test_aimcos(over):
    images, texts, present = codes(30, 8, 0), codes(12, 8, 1), np.random.default_rng(2).random((30, 12)) < .2
    present[0], present[1] = False, True                            # nothing present; everything present
    result, cosines = A.aimcos(t(images), t(texts), t(present), over), cosine_similarity(images, texts)
    if over == "texts": cosines, present = cosines.T, present.T
    matched = [np.mean([c for c, p in zip(*row) if p]) for row in zip(cosines, present) if any(row[1])]
    both = [np.mean(c[p]) - np.mean(c[~p]) for c, p in zip(cosines, present) if p.any() and not p.all()]
    assert result.score == pytest.approx(np.mean(matched)) and result.n == len(matched)
    np.testing.assert_allclose(result.margin, both, atol=1e-12)
    rng, axis = np.random.default_rng(0), 0 if over == "images" else 1
    shuffled = []
    for _ in range(1000):
        mixed = rng.permutation(cosines, axis=axis)
        shuffled.append(np.mean([c[p].mean() for c, p in zip(mixed, present) if p.any()]))
    assert result.chance == pytest.approx(np.mean(shuffled), abs=5 * np.std(shuffled) / 1000**.5)


def test_class_accuracy_is_that_of_the_nearest_neighbour():
    fakes, trues, classes = codes(80, 6, 0), codes(80, 6, 1), np.random.default_rng(2).integers(4, size=80)
    nearest = KNeighborsClassifier(1, metric="cosine", algorithm="brute").fit(trues, classes)
    result = A.class_accuracy(t(fakes), t(trues), classes)
    assert result.score == pytest.approx(nearest.score(fakes, classes))
    assert result.chance == pytest.approx(sum((np.bincount(classes) / 80)**2))
    similar = cosine_similarity(fakes, trues)
    np.fill_diagonal(similar, -2)
    other = classes[similar.argmax(1)]
    assert A.class_accuracy(t(fakes), t(trues), classes, own=False).score == pytest.approx(np.mean(other == classes))


def test_class_accuracy_shares_ties():
    trues, classes = np.repeat(codes(3, 5, 0), 4, axis=0), np.array([0, 0, 0, 1, 2, 2, 3, 3, 4, 4, 4, 4])
    assert A.class_accuracy(t(trues), t(trues), classes).hits.tolist() == [.75, .75, .75, .25, .5, .5, .5, .5, 1, 1, 1, 1]
    constant = torch.ones(12, 5)
    assert A.class_accuracy(constant, constant, classes).score == pytest.approx(sum((np.bincount(classes) / 12)**2))


def test_a_file_of_something_else_is_refused(tmp_path):
    from safetensors.numpy import save_file
    save_file({"weights": np.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="weights: not a table"): A.load_distractors(tmp_path / "w.safetensors")
