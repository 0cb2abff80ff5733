"""metrics.human beside krippendorff and scipy."""
import numpy as np
import pytest
from scipy import stats

from crossmodal.metrics import human

krippendorff = pytest.importorskip("krippendorff", reason="krippendorff is not installed")


def plain_alpha(sheet, level):
    "The definition: mean disagreement of pairs within units over that of all pairs."
    units = [unit[~np.isnan(unit)] for unit in sheet.T]
    units = [unit for unit in units if len(unit) > 1]
    values = np.concatenate(units)
    marks, counts = np.unique(values, return_counts=True)

    def disagreement(a, b):
        if level == "nominal": return float(a != b)
        if level == "interval": return (a - b) ** 2
        low, high = sorted((a, b))
        between = counts[(marks >= low) & (marks <= high)].sum()
        return (between - (counts[marks == low][0] + counts[marks == high][0]) / 2) ** 2 if a != b else 0.
    mean = lambda items: sum(disagreement(a, b) for i, a in enumerate(items) for j, b in enumerate(items) if i != j) / (len(items) - 1)
    return 1 - sum(mean(unit) for unit in units) / mean(values)


def sheet(raters, items, seed, missing=0., marks=4):
    rng = np.random.default_rng(seed)
    out = np.clip(np.round(rng.normal(2.5, 1, items) + rng.normal(0, .7, (raters, items))), 1, marks)
    out[rng.random(out.shape) < missing] = np.nan
    return out


@pytest.mark.parametrize("level", human.LEVELS)
@pytest.mark.parametrize("table", [sheet(5, 20, 0), sheet(3, 15, 1, .3), sheet(2, 8, 2), sheet(6, 30, 3, .6),
                                   np.array([[1, 2.], [2, 1]]), np.array([[1.], [2], [2]])])
def test_alpha(table, level):
    value = human.krippendorff_alpha(table, level)
    assert value == pytest.approx(plain_alpha(table, level), abs=1e-9)
    assert value == pytest.approx(krippendorff.alpha(table, level_of_measurement=level), abs=1e-9)


@pytest.mark.parametrize("table", [sheet(5, 20, 0), sheet(3, 6, 4), sheet(10, 40, 5),
                                   np.random.default_rng(0).permuted(np.tile(np.arange(12.), (4, 1)), axis=1)])
def test_kendalls_w_is_friedmans_statistic(table):
    "chi2 = k (n - 1) W, ties and all."
    statistic = stats.friedmanchisquare(*table.T).statistic
    assert human.kendall_w(table) == pytest.approx(statistic / len(table) / (table.shape[1] - 1), abs=1e-9)


def test_kendalls_w_by_chance():
    rng = np.random.default_rng(0)
    values = [human.kendall_w(rng.random((5, 20))) for _ in range(300)]
    assert np.mean(values) == pytest.approx(1 / 5, abs=.01)


def test_mean_opinion():
    table = sheet(5, 40, 0, .2)
    found = human.mean_opinion(table)
    assert (found.mean, found.std) == pytest.approx((np.nanmean(table), np.nanstd(table)))
    rng, means = np.random.default_rng(1), []
    for _ in range(4000): means.append(np.nanmean(table[rng.integers(0, 5, 5)][:, rng.integers(0, 40, 40)]))
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [.025, .975]), abs=.03)
    assert found == human.mean_opinion(table)


def test_mean_rank():
    rng = np.random.default_rng(0)
    ranks = stats.rankdata(np.round(rng.normal(size=(4, 25, 3)) + [0, .5, 1], 1), axis=2)
    found = human.mean_rank(ranks)
    assert [one.mean for one in found] == pytest.approx(ranks.mean((0, 1)))
    assert sum(one.mean for one in found) == pytest.approx(6)
    ranks[1, 3] = np.nan
    assert human.mean_rank(ranks)[0].ratings == 99
