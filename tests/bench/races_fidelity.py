"""The distance step of FID, KID and the Inception Score, from features or probabilities that are given. The encoder's own time is not in it."""
import numpy as np
import torch
from race import Race

from crossmodal.metrics.fidelity import FeatureStatistics, frechet_distance, inception_score, kernel_distance


def features(n: int, d: int, seed: int) -> torch.Tensor:
    "Correlated, as features are."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(.1, 2, d) + torch.randn(n, 8, generator=generator) @ torch.randn(8, d, generator=generator)


def their_statistics(features: torch.Tensor) -> dict:
    from torch_fidelity.metric_fid import fid_features_to_statistics
    return fid_features_to_statistics(features)


def their_fid(a: dict, b: dict) -> float:
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    return fid_statistics_to_metric(a, b, False)["frechet_inception_distance"]


def root_fid(a: dict, b: dict) -> float:
    "The root of the product of the covariances by SciPy: pytorch-fid, and torch-fidelity before 0.4."
    from scipy.linalg import sqrtm
    root = sqrtm(a["sigma"] @ b["sigma"])
    return float(np.square(a["mu"] - b["mu"]).sum() + np.trace(a["sigma"]) + np.trace(b["sigma"]) - 2 * np.trace(root).real)


def their_kid(a: torch.Tensor, b: torch.Tensor) -> float:
    from torch_fidelity.metric_kid import kid_features_to_metric
    return kid_features_to_metric(a, b, kid_subsets=10, kid_subset_size=1000, verbose=False, rng_seed=2020)["kernel_inception_distance_mean"]


def entropies(p: np.ndarray, splits: int = 10) -> float:
    "sbarratt/inception-score-pytorch: scipy's entropy, picture by picture."
    from scipy.stats import entropy
    scores, n = [], len(p)
    for k in range(splits):
        part = p[k * (n // splits):(k + 1) * (n // splits)]
        mean = part.mean(0)
        scores.append(np.exp(np.mean([entropy(row, mean) for row in part])))
    return float(np.mean(scores))


def relative(ours: float, theirs: float) -> float: return abs(float(ours) - float(theirs)) / abs(float(theirs))


def races() -> list[Race]:
    few, many = ([features(n, 2048, seed) for seed in (0, 1)] for n in (500, 2933))
    ours, theirs = [FeatureStatistics().update(x) for x in many], [their_statistics(x) for x in many]
    out = [Race("FID, distance step, 2,933 + 2,933 x 2,048", lambda: frechet_distance(*ours), lambda: root_fid(*theirs), relative, 1e-5,
                "scipy.linalg.sqrtm (pytorch-fid; torch-fidelity 0.3)", ("scipy", "numpy"), bar=10),
           Race("FID, distance step, 2,933 + 2,933 x 2,048, newer peer", lambda: frechet_distance(*ours), lambda: their_fid(*theirs), relative, 1e-5,
                "torch-fidelity 0.4: numpy's eigvals", ("torch-fidelity", "numpy"), bar=10),
           Race("FID from 500 + 500 x 2,048 features", lambda: frechet_distance(*few), lambda: their_fid(*map(their_statistics, few)), relative, 1e-5,
                "torch-fidelity", ("torch-fidelity", "numpy"), bar=10),
           Race("FID from 2,933 + 2,933 x 2,048 features", lambda: frechet_distance(*many), lambda: their_fid(*map(their_statistics, many)), relative, 1e-5,
                "torch-fidelity", ("torch-fidelity", "numpy"), bar=1)]
    c, d = (features(2933, 2048, seed).double() for seed in (2, 3))
    out.append(Race("KID, 100 subsets of 1,000 from 2,933 + 2,933 x 2,048", lambda: kernel_distance(c, d), lambda: their_kid(c, d),
                    lambda ours, theirs: relative(kernel_distance(c, d, subsets=10), theirs), 1e-6,
                    "torch-fidelity (10 subsets)", ("torch-fidelity", "numpy"), bar=3, peer_share=.1))
    p = (torch.randn(10_000, 1000, generator=torch.Generator().manual_seed(0)) * 3).double().softmax(1)
    out.append(Race("Inception Score, 10,000 x 1,000", lambda: inception_score(p).mean, lambda: entropies(p.numpy()), relative, 1e-9,
                    "scipy entropy per picture (sbarratt)", ("scipy",), bar=30))
    return out
