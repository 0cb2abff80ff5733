"""The distance step of FID, KID and the Inception Score, from features or probabilities that are given. The encoder's own time is not in it."""
import numpy as np
import torch
from race import Race

from crossmodal.metrics.fidelity import frechet_distance, inception_score, kernel_distance


def features(n: int, d: int, seed: int) -> torch.Tensor:
    "Correlated, as features are."
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(.1, 2, d) + torch.randn(n, 8, generator=generator) @ torch.randn(8, d, generator=generator)


def their_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    return fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)["frechet_inception_distance"]


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
    out = []
    for n in (2933, 500):
        a, b = features(n, 2048, 0), features(n, 2048, 1)
        out.append(Race(f"FID, distance step, {n:,} + {n:,} x 2,048 features", lambda a=a, b=b: frechet_distance(a, b), lambda a=a, b=b: their_fid(a, b),
                        relative, 1e-5, "torch-fidelity", ("torch-fidelity", "numpy"), bar=10))
    c, d = (features(2933, 2048, seed).double() for seed in (2, 3))
    out.append(Race("KID, 100 subsets of 1,000 from 2,933 + 2,933 x 2,048", lambda: kernel_distance(c, d), lambda: their_kid(c, d),
                    lambda ours, theirs: relative(kernel_distance(c, d, subsets=10), theirs), 1e-6,
                    "torch-fidelity (10 subsets)", ("torch-fidelity", "numpy"), bar=3, peer_share=.1))
    p = (torch.randn(10_000, 1000, generator=torch.Generator().manual_seed(0)) * 3).double().softmax(1)
    out.append(Race("Inception Score, 10,000 x 1,000", lambda: inception_score(p).mean, lambda: entropies(p.numpy()), relative, 1e-9,
                    "scipy entropy per picture (sbarratt)", ("scipy",), bar=30))
    return out
