"""metrics.fidelity beside torch-fidelity and scipy, on random and on awkward features; and its memory."""
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from crossmodal.metrics import fidelity as ours

isc = pytest.importorskip("torch_fidelity.metric_isc", reason="torch-fidelity is not installed")
fid = pytest.importorskip("torch_fidelity.metric_fid")
kid = pytest.importorskip("torch_fidelity.metric_kid")


def features(n, d, seed=0, scale=1.):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def their_fid(a, b):
    return fid.fid_statistics_to_metric(fid.fid_features_to_statistics(a), fid.fid_features_to_statistics(b), False)["frechet_inception_distance"]


def scipy_fid(a, b):
    from scipy.linalg import sqrtm
    (ma, sa), (mb, sb) = ((x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in (a.numpy(), b.numpy()))
    return ((ma - mb) ** 2).sum() + np.trace(sa) + np.trace(sb) - 2 * np.trace(sqrtm(sa @ sb)).real


def statistics(x, batch=37):
    found = ours.FeatureStatistics()
    for part in x.split(batch): found.update(part)
    return found


RANDOM = {
    "more pictures than features": (features(300, 40), features(200, 40, 1, 2.) + .5),
    "correlated": (features(300, 40) @ features(40, 40, 5), features(300, 40, 1) @ features(40, 40, 6)),
    "one feature": (features(30, 1), features(20, 1, 1) + 3),
    "far from zero": (features(300, 20) + 1e3, features(300, 20, 1) + 1e3),
}
AWKWARD = {
    "fewer pictures than features": (features(30, 80), features(50, 80, 1, 2.)),
    "few against many": (features(30, 80), features(300, 80, 1)),
    "two pictures": (features(2, 16), features(2, 16, 1)),
    "rank three": (features(300, 3) @ features(3, 40, 7), features(300, 3, 1) @ features(3, 40, 7)),
    "rank three against full": (features(300, 3) @ features(3, 40, 7), features(300, 40, 1)),
    "duplicated pictures": (features(20, 40).repeat(20, 1), features(300, 40, 1)),
    "duplicated features": (features(300, 20).repeat(1, 2), features(300, 20, 1).repeat(1, 2)),
    "constant against random": (torch.ones(60, 20, dtype=torch.float64), features(60, 20)),
    "both constant": (torch.ones(60, 20, dtype=torch.float64), torch.zeros(50, 20, dtype=torch.float64)),
    "one constant feature": (torch.cat([features(60, 9), torch.ones(60, 1).double()], 1), torch.cat([features(60, 9, 1), torch.ones(60, 1).double()], 1)),
}


@pytest.mark.parametrize("case", RANDOM)
def test_frechet(case):
    a, b = RANDOM[case]
    value = ours.frechet_distance(a, b)
    assert value == pytest.approx(scipy_fid(a, b), rel=1e-6)
    if a.shape[1] > 1: assert value == pytest.approx(their_fid(a, b), rel=1e-6)
    assert ours.frechet_distance(statistics(a), statistics(b)) == pytest.approx(value, rel=1e-9)
    assert ours.frechet_distance(b, a) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("case", AWKWARD)
def test_frechet_of_awkward_features(case):
    "Here their general eigenvalues are the inexact side: sqrt(1e-16) of noise for each zero, so the scale is that of the traces."
    a, b = AWKWARD[case]
    value, scale = ours.frechet_distance(a, b), float(a.var(0).sum() + b.var(0).sum() + (a.mean(0) - b.mean(0)).square().sum())
    assert value == pytest.approx(their_fid(a, b), abs=2e-6 * scale)
    assert ours.frechet_distance(statistics(a), statistics(b)) == pytest.approx(value, abs=2e-6 * scale)
    assert ours.frechet_distance(b, a) == pytest.approx(value, abs=2e-6 * scale)
    assert ours.frechet_distance(a, a) == pytest.approx(0, abs=2e-6 * scale)


def test_frechet_in_float32_and_from_numpy():
    a, b = (x.float() for x in RANDOM["more pictures than features"])
    assert ours.frechet_distance(a, b) == pytest.approx(their_fid(a, b), rel=1e-5)           # their mean is in float32
    assert ours.frechet_distance(a.numpy(), b.numpy()) == ours.frechet_distance(a, b)


def test_frechet_at_inceptions_width():
    a, b = features(300, 2048).float(), features(300, 2048, 1).float() * 1.1
    whole = ours.frechet_distance(a, b)
    (ma, ca), (mb, cb) = ((x.double().mean(0), x.double() - x.double().mean(0)) for x in (a, b))
    root = torch.linalg.svdvals(ca @ cb.T).sum()
    assert whole == pytest.approx(float((ma - mb).square().sum() + (ca.square().sum() + cb.square().sum() - 2 * root) / 299), rel=1e-9)
    assert "fewer pictures than the 2,048 features" in whole.note


def logits(n, c, seed=0, scale=4.): return torch.randn(n, c, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("n", "c", "splits"), [(1000, 50, 10), (1003, 50, 10), (23, 5, 10), (10, 7, 10), (57, 3, 1), (300, 1008, 7)])
def test_inception_score(n, c, splits):
    x = logits(n, c)
    p = x.double().softmax(1)
    for seed in (None, 2020):
        theirs = isc.isc_features_to_metric(x, splits, seed is not None, seed or 0)
        value = ours.inception_score(p, splits, seed)
        assert value.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
        assert value.std == pytest.approx(theirs["inception_score_std"], rel=1e-6, abs=1e-9)
        assert ours.inception_score(p.float(), splits, seed).mean == pytest.approx(value.mean, rel=1e-6)


def sbarratt(p, splits):
    "The scoring loop of sbarratt/inception-score-pytorch, one scipy entropy per picture."
    from scipy.stats import entropy
    scores, n = [], len(p)
    for k in range(splits):
        part = p[k * (n // splits):(k + 1) * (n // splits)]
        py = part.mean(0)
        scores.append(np.exp(np.mean([entropy(row, py) for row in part])))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("n", [200, 207])
def test_inception_score_of_sbarratt(n):
    p = logits(n, 20).double().softmax(1)
    assert ours.inception_score(p, 10, drop_remainder=True) == pytest.approx(sbarratt(p.numpy(), 10), rel=1e-9)


def test_inception_score_of_certain_pictures():
    "p log p at p = 0, which their log-softmax never meets."
    assert ours.inception_score(torch.eye(10).repeat(20, 1)) == pytest.approx((10, 0), abs=1e-9)
    assert ours.inception_score(torch.eye(10)[:1].repeat(20, 1)) == pytest.approx((1, 0), abs=1e-12)


@pytest.mark.parametrize(("n", "m", "size", "subsets"), [(120, 90, 50, 20), (50, 50, 50, 3), (700, 600, 20, 5), (2, 3, 2, 4)])
def test_kernel_distance(n, m, size, subsets):
    "Also with so many pictures that subsets are taken one by one."
    a, b = features(n, 30), features(m, 30, 1, 1.2)
    theirs = kid.kid_features_to_metric(a, b, kid_subsets=subsets, kid_subset_size=size, verbose=False, rng_seed=2020)
    value = ours.kernel_distance(a, b, subsets, size)
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6, abs=1e-12)
    assert value.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("case", ["duplicated pictures", "rank three", "both constant", "fewer pictures than features"])
def test_kernel_distance_of_awkward_features(case):
    a, b = AWKWARD[case]
    size = min(len(a), len(b), 30)
    theirs = kid.kid_features_to_metric(a, b, kid_subsets=10, kid_subset_size=size, verbose=False, rng_seed=5)
    value = ours.kernel_distance(a, b, 10, size, seed=5)
    assert value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6, abs=1e-10)


def test_published_inception(tmp_path, monkeypatch):
    "torch-fidelity's network with random weights in its file: the same features for uint8 and for [-1, 1], and a file of another digest is refused."
    import hashlib
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(kind, "load_state_dict", lambda *a, **k: None)
        network = kind("x", ["2048", "logits_unbiased"], verbose=False)
    path = tmp_path / "weights.pth"
    torch.save(network.state_dict(), path)
    with pytest.raises(ValueError, match="not torch-fidelity's file"): ours.fid_inception(path)
    monkeypatch.setattr(ours, "FID_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    extractor = ours.fid_inception(path)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, probabilities = extractor.function(images.float() / 127.5 - 1)
    expected, scores = network(images)
    assert torch.equal(found, expected) and torch.equal(probabilities, scores.softmax(1))


PEAK = """
    import torch
    torch.set_num_threads(1)
    from crossmodal.metrics.fidelity import Extractor, measure
    weights = torch.randn(3 * 64, 256, generator=torch.Generator().manual_seed(0))
    flat = lambda images: torch.nn.functional.adaptive_avg_pool2d(images, 8).flatten(1) @ weights
    extractor = Extractor("random", lambda images: (flat(images), flat(images)[:, :50].softmax(1)))
    stream = (torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8) for _ in range({batches}))
    found = measure(stream, extractor, batch_size=64, keep=500)
    print(found.n, next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_pictures():
    "13 times the pictures, in processes of their own. Kept, the features alone of the larger crowd would be 26 MB, its pictures 79 MB."
    if not Path("/proc/self/status").exists(): pytest.skip("no /proc here: ru_maxrss begins with the parent's peak and would show nothing")
    found = [subprocess.run([sys.executable, "-c", textwrap.dedent(PEAK.format(batches=batches))], capture_output=True, text=True, check=True).stdout.split()
             for batches in (30, 400)]
    assert [int(n) for n, _ in found] == [1920, 25600]
    small, large = (int(kilobytes) / 2 ** 10 for _, kilobytes in found)
    assert large - small < 10, f"{small:.0f} MB, then {large:.0f} MB"
