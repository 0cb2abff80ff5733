"""losses.ranking beside loops in plain Python and VSE++'s two losses, written down again from their description."""
import math

import pytest
import torch

from crossmodal.losses import ranking
from crossmodal.losses.ranking import cosine_scores, described, join, order_ranking_loss, order_scores, ranking_loss, structured_joint_loss, unit_magnitudes


def codes(n, d, seed, dtype=torch.float64):
    return unit_magnitudes(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype).requires_grad_()


def loop_score(v, t, reverse): return -sum(max(0., (a - b) if reverse else (b - a)) ** 2 for a, b in zip(v, t))


def loop_loss(scores, spared, margin, hardest):
    "Eq. 2 term by term."
    n, total = len(scores), 0.
    for k in range(n):
        row = [max(0., margin - scores[k][k] + scores[k][j]) for j in range(n) if j != k and not spared[k][j]]
        column = [max(0., margin - scores[k][k] + scores[i][k]) for i in range(n) if i != k and not spared[i][k]]
        total += (max(row, default=0.) + max(column, default=0.)) if hardest else sum(row) + sum(column)
    return total / n


def loop_slopes(v, t, weights):
    "Derivative of the weighted sum of order scores, coordinate by coordinate."
    to_v, to_t = torch.zeros_like(v), torch.zeros_like(t)
    for i in range(len(v)):
        for j in range(len(t)):
            over = (t[j] - v[i]).clamp(min=0)
            to_v[i] += 2 * weights[i, j] * over
            to_t[j] -= 2 * weights[i, j] * over
    return to_v, to_t


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (2, 5, 3), (7, 4, 9), (13, 13, 6)])
def test_scores_against_loops(n, m, d, reverse):
    v, t = codes(n, d, 0), codes(m, d, 1)
    wanted = torch.tensor([[loop_score(a, b, reverse) for b in t.tolist()] for a in v.tolist()], dtype=torch.float64)
    torch.testing.assert_close(order_scores(v, t, reverse).detach(), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("share", [1., .3, .25, .1, 0.])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 11, 100])
@pytest.mark.parametrize("n, m", [(11, 9), (8, 16)])
def test_slopes_at_every_border(monkeypatch, n, m, rows, share):
    "Blocks that divide the rows, that leave one over, that hold all; gradients for every pair, for some, for none."
    monkeypatch.setattr(ranking, "_block", lambda images, captions: images.new_empty(min(rows, len(images)), *captions.shape))
    v, t = codes(n, 5, 2), codes(m, 5, 3)
    weights = torch.rand(n, m, generator=torch.Generator().manual_seed(4), dtype=torch.float64) - .5
    weights.view(-1)[round(share * n * m):] = 0
    scores = order_scores(v, t)
    for found, wanted in zip(torch.autograd.grad((scores * weights).sum(), (v, t)), loop_slopes(v.detach(), t.detach(), weights)):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n, m, d", [(40, 300, 1024), (3, 2000, 700), (300, 2, 8), (33, 33, 1023)])
def test_blocks_of_the_real_size(n, m, d):
    v, t = codes(n, d, 0, torch.float32), codes(m, d, 1, torch.float32)
    v, t = (x.detach().requires_grad_() for x in (v, t))
    plain = -(t - v[:, None]).clamp(min=0).pow(2).sum(2)
    torch.testing.assert_close(order_scores(v, t), plain, rtol=0, atol=1e-6)
    for share in (1., .01):
        weights = (torch.rand(n, m) < share) / (n * m)
        for a, b in zip(*(torch.autograd.grad((s * weights).sum(), (v, t), retain_graph=True) for s in (order_scores(v, t), plain))):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_gradients_that_are_not_dense():
    "Expanded, transposed and sliced incoming gradients; codes that are views."
    v, t = codes(9, 6, 0), codes(7, 6, 1)
    plain = lambda v, t: -(t - v[:, None]).clamp(min=0).pow(2).sum(2)
    for use in (lambda s: s.sum(), lambda s: (s.T @ torch.arange(9.).double()).sum(), lambda s: s[::2, 1:3].sum(), lambda s: s.diagonal().sum()):
        for a, b in zip(*(torch.autograd.grad(use(f(v[:, ::2], t[:, 1::2])), (v, t)) for f in (order_scores, plain))):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("margin", [.05, .2, 1.])
@pytest.mark.parametrize("n", [1, 2, 5, 17])
def test_loss_against_loops(n, margin, hardest):
    g = torch.Generator().manual_seed(n)
    scores = torch.randn(n, n, generator=g, dtype=torch.float64)
    owners = torch.randint(0, max(1, n // 2), (n,), generator=g)
    for spared in (None, owners[:, None] == owners):
        table = torch.zeros(n, n, dtype=torch.bool) if spared is None else spared
        wanted = loop_loss(scores.tolist(), table.tolist(), margin, hardest)
        assert math.isclose(ranking_loss(scores, spared, margin, hardest).item(), wanted, abs_tol=1e-12)
    v, t = codes(n, 4, 5), codes(n, 4, 6)
    wanted = loop_loss([[loop_score(a, b, False) for b in t.tolist()] for a in v.tolist()], [[False] * n] * n, margin, hardest)
    assert math.isclose(order_ranking_loss(v, t, None, margin, False, hardest).item(), wanted, abs_tol=1e-12)


@pytest.mark.parametrize("hardest", [False, True])
def test_vsepp(hardest):
    """VSE0 / VSE++: cosine of unit vectors, hinge against both ways, the diagonal struck out, summed over the batch and not averaged;
    its order measure is minus the length, not minus its square, of what a caption has beyond its picture."""
    n, margin = 12, .2
    x, y = (torch.randn(n, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in (0, 1))
    off = ~torch.eye(n, dtype=torch.bool)
    cosine = torch.stack([torch.stack([a @ b / a.norm() / b.norm() for b in y]) for a in x])
    beyond = torch.stack([torch.stack([-torch.linalg.vector_norm((b - a).clamp(min=0)) for b in y.abs()]) for a in x.abs()])
    ours = cosine_scores(x, y), -(-order_scores(x.abs(), y.abs())).sqrt()
    for scores, mine in zip((cosine, beyond), ours):
        torch.testing.assert_close(mine, scores, rtol=0, atol=1e-12)
        cost = [[max(0., margin + (scores[i, j] - scores[k, k]).item()) * off[i, j].item() for i in range(n) for j in range(n) if (i, j)[way] == k]
                for way in (0, 1) for k in range(n)]
        summed = sum(max(one) if hardest else sum(one) for one in cost)
        assert math.isclose(ranking_loss(mine, margin=margin, hardest=hardest).item() * n, summed, rel_tol=1e-12)


def test_described_against_loops():
    g = torch.Generator().manual_seed(0)
    said, sentences = torch.randint(-1, 9, (40, 3), generator=g), torch.randint(0, 9, (40,), generator=g)
    wanted = [[sentence in own for sentence in sentences.tolist()] for own in said.tolist()]
    assert torch.equal(described(said, sentences), torch.tensor(wanted))


@pytest.mark.parametrize("weight", [0., .3, .5, 1.])
def test_branches(weight):
    v_h, v_l, t_h, t_l = codes(5, 6, 0), codes(5, 3, 1), codes(8, 6, 2), codes(8, 3, 3)
    joined = order_scores(join(v_h, v_l, weight), join(t_h, t_l, weight))
    apart = weight * order_scores(v_h, t_h) + (1 - weight) * order_scores(v_l, t_l)
    torch.testing.assert_close(joined, apart, rtol=0, atol=1e-14)
    g = torch.randn(5, 8, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((s * g).sum(), (v_h, v_l, t_h, t_l), retain_graph=True) for s in (joined, apart))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def loop_structured(v, t, classes):
    "Value and slopes, one hinge after the other, each adding its own slope (Reed et al. 2016)."
    n, total, to_v, to_t = len(v), 0., torch.zeros_like(v), torch.zeros_like(t)
    for i in range(n):
        for j in range(n):
            if j == i or classes is not None and classes[i] == classes[j]: continue
            for over, wrong_v, wrong_t in ((1 - v[i] @ t[i] + v[i] @ t[j], i, j), (1 - v[i] @ t[i] + v[j] @ t[i], j, i)):
                if over <= 0: continue
                total += over.item()
                to_v[wrong_v] += t[wrong_t]; to_t[wrong_t] += v[wrong_v]
                to_v[i] -= t[i]; to_t[i] -= v[i]
    return total / n**2, to_v / n**2, to_t / n**2


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("size", [.1, 1.])
def test_structured_against_loops(n, size):
    g = torch.Generator().manual_seed(n)
    v, t = ((size * torch.randn(n, 6, generator=g, dtype=torch.float64)).requires_grad_() for _ in range(2))
    for classes in (None, torch.arange(n), torch.randint(0, max(1, n // 2), (n,), generator=g)):
        loss = structured_joint_loss(v, t, classes)
        wanted, to_v, to_t = loop_structured(v.detach(), t.detach(), classes)
        assert math.isclose(loss.item(), wanted, abs_tol=1e-12)
        for found, slope in zip(torch.autograd.grad(loss, (v, t)), (to_v, to_t)): torch.testing.assert_close(found, slope, rtol=0, atol=1e-12)
