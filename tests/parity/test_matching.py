"""losses.matching beside DAMSM's losses, written down again from their description: pair by pair, word by word, in float64."""
import math

import pytest
import torch

from crossmodal.losses.matching import matching_loss, sentence_matching_loss, word_matching_loss, word_region_attention, word_scores


def shares(values):
    "Softmax of a list of numbers."
    weights = [value.exp() for value in values]
    return [weight / sum(weights) for weight in weights]


def pair_attention(cells, caption, gamma1):
    "Cells and words of one pair as lists of vectors; a row of shares for each word."
    owners = [shares([word @ cell for word in caption]) for cell in cells]                          # of each cell, among the words
    return [shares([gamma1 * owner[t] for owner in owners]) for t in range(len(caption))]


def pair_score(cells, caption, gamma1, gamma2, root):
    total = 0
    for word, alpha in zip(caption, pair_attention(cells, caption, gamma1)):
        context = sum(share * cell for share, cell in zip(alpha, cells))
        total = total + (gamma2 * (context @ word) / (context.norm() * word.norm()).clamp(min=1e-8)).exp()
    return total.log() / (gamma2 if root else 1)


def loop_scores(regions, words, lengths, gamma1=4., gamma2=5., root=False):
    return torch.stack([torch.stack([pair_score(list(picture.T), list(caption[:length]), gamma1, gamma2, root)
                                     for caption, length in zip(words, lengths.tolist())]) for picture in regions])


def loop_loss(scores, classes):
    "Both cross-entropies; rivals of the same class are left out of the sums, which is what -inf before a softmax does."
    n, total = len(scores), 0
    kinds = list(range(n)) if classes is None else classes.tolist()
    for k in range(n):
        rivals = [k] + [j for j in range(n) if kinds[j] != kinds[k]]
        total = total + sum(scores[k, j].exp() for j in rivals).log() + sum(scores[i, k].exp() for i in rivals).log() - 2 * scores[k, k]
    return total / n


def pairs(n, m, t, d, r, seed=0, dtype=torch.float64, pads=math.nan):
    g = torch.Generator().manual_seed(seed)
    regions, words = torch.randn(n, d, r, generator=g, dtype=torch.float64), torch.randn(m, t, d, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, t + 1, (m,), generator=g)
    words[torch.arange(t) >= lengths[:, None]] = pads
    return regions.to(dtype).requires_grad_(), words.to(dtype).requires_grad_(), lengths


def close(found, wanted, within=1e-11): torch.testing.assert_close(found, wanted, rtol=0, atol=within)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("n, m, t, d, r", [(1, 1, 1, 2, 1), (2, 3, 1, 3, 4), (3, 2, 5, 4, 1), (4, 6, 7, 5, 9), (5, 5, 4, 16, 6)])
def test_scores_and_slopes_against_loops(n, m, t, d, r, root):
    regions, words, lengths = pairs(n, m, t, d, r)
    weights = torch.randn(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for gamma1, gamma2 in ((4., 5.), (0., 1.), (11., .3)):
        ours, loop = (f(regions, words, lengths, gamma1, gamma2, root) for f in (word_scores, loop_scores))
        close(ours, loop)
        for a, b in zip(*(torch.autograd.grad((s * weights).sum(), (regions, words)) for s in (ours, loop))): close(a, b, 1e-10)


@pytest.mark.parametrize("classes", [None, (0, 1, 2, 3, 4, 5), (0, 0, 1, 1, 1, 7), (3, 3, 3, 3, 3, 3), (5, -1, 5, -1, 0, 0)])
def test_losses_against_loops(classes):
    classes = classes and torch.tensor(classes)
    regions, words, lengths = pairs(6, 6, 8, 5, 7)
    for gammas in ((4., 5., 10.), (2., 1., 3.)):
        ours = word_matching_loss(regions, words, lengths, classes, gammas)
        loop = loop_loss(gammas[2] * loop_scores(regions, words, lengths, *gammas[:2]), classes)
        close(ours, loop)
        for a, b in zip(*(torch.autograd.grad(loss, (regions, words)) for loss in (ours, loop))): close(a, b, 1e-10)
    images, texts = (torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(k)).requires_grad_() for k in (2, 3))
    cosines = torch.stack([torch.stack([a @ b / a.norm() / b.norm() for b in texts]) for a in images])
    ours, loop = sentence_matching_loss(images, texts, classes), loop_loss(10 * cosines, classes)
    close(ours, loop)
    for a, b in zip(*(torch.autograd.grad(loss, (images, texts)) for loss in (ours, loop))): close(a, b)


def test_attention_against_loops():
    regions, words, lengths = pairs(5, 5, 6, 4, 9)
    found = word_region_attention(regions, words, lengths)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loop = torch.zeros_like(found)
    for i, length in enumerate(lengths.tolist()):
        rows = pair_attention(list(regions[i].T), list(words[i, :length]), 4.)
        loop = loop.index_put((torch.tensor(i), torch.arange(length)), torch.stack([torch.stack(row) for row in rows]))
    close(found, loop)
    for a, b in zip(*(torch.autograd.grad((x * weights).sum(), (regions, words)) for x in (found, loop))): close(a, b)
    scores = torch.stack([pair_score(list(regions[i].T), list(words[i, :length]), 4., 5., False) for i, length in enumerate(lengths.tolist())])
    contexts = found @ regions.mT                                                                   # the maps are those that the scores are made of
    for i, length in enumerate(lengths.tolist()):
        cosines = torch.nn.functional.cosine_similarity(contexts[i, :length], words[i, :length], dim=1)
        close((5 * cosines).logsumexp(0), scores[i])


def test_pads_are_never_read():
    wanted = None
    for pads in (0., math.nan, math.inf, 1e30):
        regions, words, lengths = pairs(6, 6, 7, 4, 5, pads=pads)
        outputs = word_matching_loss(regions, words, lengths), word_region_attention(regions, words, lengths)
        slopes = torch.autograd.grad(outputs[0] + outputs[1].square().sum(), (regions, words))
        assert (slopes[1][torch.arange(7) >= lengths[:, None]] == 0).all() and all(x.isfinite().all() for x in slopes)
        assert wanted is None or all(torch.equal(a, b) for a, b in zip((*outputs, *slopes), wanted))
        wanted = *outputs, *slopes


def test_orders_that_must_not_matter():
    regions, words, lengths = pairs(6, 6, 7, 4, 9)
    classes, g = torch.tensor([0, 1, 0, 2, 2, 2]), torch.Generator().manual_seed(4)
    scores, loss = word_scores(regions, words, lengths), word_matching_loss(regions, words, lengths, classes)
    rows, columns, cells = (torch.randperm(n, generator=g) for n in (6, 6, 9))
    close(word_scores(regions[rows], words[columns], lengths[columns]), scores[rows][:, columns])
    close(word_matching_loss(regions[rows], words[rows], lengths[rows], classes[rows]), loss)
    close(word_scores(regions[..., cells], words, lengths), scores)
    turned = torch.stack([torch.cat([caption[:n].flip(0), caption[n:]]) for caption, n in zip(words, lengths.tolist())])
    close(word_scores(regions, turned, lengths), scores)
    close(word_scores(regions.unflatten(2, (3, 3)), words, lengths), scores)
    longer = torch.cat([words, torch.full((6, 3, 4), math.nan, dtype=torch.float64)], 1)
    close(word_scores(regions, longer, lengths), scores)


@pytest.mark.parametrize("length", [1, 7])
def test_captions_of_one_length(length):
    regions, words, _ = pairs(4, 4, 7, 5, 6, pads=.5)
    lengths = torch.full((4,), length)
    close(word_scores(regions, words, lengths), loop_scores(regions, words, lengths))
    if length == 1:                                                                                 # its context is the mean of the picture
        mean = regions.mean(2)
        cosines = mean @ words[:, 0].T / mean.norm(dim=1)[:, None] / words[:, 0].norm(dim=1)
        close(word_scores(regions, words, lengths), 5 * cosines)


def test_finite_differences():
    regions, words, lengths = pairs(3, 3, 4, 3, 5, pads=.5)
    classes = torch.tensor([0, 1, 0])
    assert torch.autograd.gradcheck(lambda v, e: word_matching_loss(v, e, lengths, classes, (4., 5., 2.)), (regions, words))
    assert torch.autograd.gradcheck(lambda v, e: word_region_attention(v, e, lengths), (regions, words))
    assert torch.autograd.gradcheck(lambda v, e: sentence_matching_loss(v[..., 0], e[:, 0], classes, 2.), (regions, words))


def test_float32_at_the_size_of_the_paper():
    exact = pairs(48, 48, 18, 256, 289, seed=5)
    single = pairs(48, 48, 18, 256, 289, seed=5, dtype=torch.float32)
    outputs = [word_matching_loss(*one) for one in (exact, single)]
    close(outputs[1].double(), outputs[0], 1e-5)
    (to_regions, to_words), found = (torch.autograd.grad(loss, one[:2]) for loss, one in zip(outputs, (exact, single)))
    close(found[0].double(), to_regions, 1e-6)
    close(found[1].double(), to_words, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    regions, words, lengths = (x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in pairs(6, 6, 9, 16, 12))
    loss = word_matching_loss(regions, words, lengths)
    slopes = torch.autograd.grad(loss, (regions, words))
    assert loss.dtype == torch.float32 and all(slope.dtype == dtype and slope.isfinite().all() for slope in slopes)
    close(loss.double(), loop_loss(10 * loop_scores(regions.double(), words.double(), lengths), None), 1e-4)
    regions, words = (x.detach().float().requires_grad_() for x in (regions, words))
    with torch.autocast("cpu", dtype=torch.bfloat16): inside = word_matching_loss(regions, words, lengths)
    close(inside, loss, 0.)
    for a, b in zip(torch.autograd.grad(inside, (regions, words)), slopes): torch.testing.assert_close(a.to(dtype), b)


def test_nothing_to_tell_apart():
    "A batch of one, vectors of zeros, cells that are all alike."
    regions, words, lengths = pairs(1, 1, 5, 4, 6)
    assert word_matching_loss(regions, words, lengths).item() == 0 == sentence_matching_loss(regions[..., 0], words[:, 0]).item()
    assert all((slope == 0).all() for slope in torch.autograd.grad(word_matching_loss(regions, words, lengths), (regions, words)))
    regions, words, lengths = pairs(4, 4, 5, 4, 6)
    for v, e in ((torch.zeros_like(regions), words), (regions, torch.zeros_like(words)), (torch.zeros_like(regions), torch.zeros_like(words))):
        v, e = v.detach().requires_grad_(), e.detach().requires_grad_()
        scores = word_scores(v, e, lengths)
        close(scores, lengths.double().log().expand(4, 4))                                          # each word's cosine is 0
        assert all(slope.abs().max() < 100 for slope in torch.autograd.grad(scores.sum(), (v, e)))
    alike = torch.ones_like(regions)
    close(word_region_attention(alike, words, lengths)[0, :lengths[0]], torch.full((lengths[0], 6), 1 / 6, dtype=torch.float64))


def test_scores_that_are_far_apart():
    "A right pair beyond doubt costs nothing, a wrong one its distance; nothing overflows."
    scores = torch.diag(torch.full((4,), 1e4))
    assert matching_loss(scores).item() == 0
    close(matching_loss(scores.roll(1, 0)), torch.tensor(2e4), 1e-2)
    close(matching_loss(scores.roll(1, 0), torch.tensor([0, 0, 0, 0])), torch.tensor(0.), 0.)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    regions, words, lengths = pairs(6, 6, 8, 5, 7)
    there = [x.detach().cuda().requires_grad_() for x in (regions, words)]
    classes = torch.tensor([0, 0, 1, 2, 3, 4])
    for n in (lengths, lengths.cuda()):
        losses = word_matching_loss(regions, words, lengths, classes), word_matching_loss(*there, n, classes)
        close(losses[1].cpu(), losses[0])
        for a, b in zip(torch.autograd.grad(losses[1], there), torch.autograd.grad(losses[0], (regions, words))): close(a.cpu(), b)
        close(word_region_attention(*there, n).cpu(), word_region_attention(regions, words, lengths))
