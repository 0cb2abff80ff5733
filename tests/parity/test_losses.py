"""Adversarial losses beside torch's BCELoss, MMD beside scikit-learn's kernels; and the NaN that a bare root would give."""
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from torch import nn

from crossmodal.losses.adversarial import colour_consistency, discriminator_loss, fake_loss, generator_loss, pair_judge_loss, real_loss
from crossmodal.losses.mmd import mmd2, one_sided, root_mmd

BANDWIDTHS = (1, 2, 4, 8, 16)
pytestmark = pytest.mark.usefixtures("one_thread")


class Verdict(NamedTuple):
    unconditional: torch.Tensor
    conditional: torch.Tensor


def points(n, d=5, seed=0, shift=0., scale=1.):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) * scale + shift


def verdict(seed, n=17):
    return Verdict(*points(n, 2, seed, scale=4).T)


# Adversarial losses

def bce(logits, target):
    "The papers' form: a sigmoid, then BCELoss."
    return nn.BCELoss()(logits.sigmoid(), torch.full_like(logits, target))


def test_terms_are_bce():
    for seed in range(5):
        logits = verdict(seed).conditional
        torch.testing.assert_close(real_loss(logits), bce(logits, 1.), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fake_loss(logits), bce(logits, 0.), rtol=1e-10, atol=1e-12)


def test_sums_are_those_of_the_released_code():
    real, fake, wrong = verdict(0), verdict(1, 9), verdict(2, 1)
    four = bce(real.unconditional, 1.) + bce(real.conditional, 1.) + bce(fake.unconditional, 0.) + bce(fake.conditional, 0.)
    torch.testing.assert_close(discriminator_loss(real, fake), four, rtol=1e-10, atol=0)
    six = four + bce(wrong.unconditional, 1.) + bce(wrong.conditional, 0.)
    torch.testing.assert_close(discriminator_loss(real, fake, wrong), six, rtol=1e-10, atol=0)
    torch.testing.assert_close(generator_loss(fake), bce(fake.unconditional, 1.) + bce(fake.conditional, 1.), rtol=1e-10, atol=0)


def test_pairs_are_weighed_as_released():
    "AttnGAN: halves of what is real, thirds of what is not; n - 1 pictures with the sentences after theirs."
    real, fake, wrong = verdict(0), verdict(1), verdict(2, 16)
    reals = (bce(real.unconditional, 1.) + bce(real.conditional, 1.)) / 2
    fakes = bce(fake.unconditional, 0.) + bce(fake.conditional, 0.)
    torch.testing.assert_close(pair_judge_loss(real, fake, wrong), reals + (fakes + bce(wrong.conditional, 0.)) / 3, rtol=1e-10, atol=0)
    torch.testing.assert_close(pair_judge_loss(real, fake), reals + fakes / 2, rtol=1e-10, atol=0)
    for seed in range(4):
        usable = torch.rand(16, generator=torch.Generator().manual_seed(seed)) < .4
        expected = reals + (fakes + bce(wrong.conditional[usable], 0.)) / 3
        torch.testing.assert_close(pair_judge_loss(real, fake, wrong, usable), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(pair_judge_loss(real, fake, wrong, usable & False), reals + fakes / 2, rtol=1e-10, atol=0)


@pytest.mark.parametrize("size", [50., 1e4, 1e30])
def test_sure_verdicts_keep_their_slope(size):
    for loss, wrong in ((real_loss, -1.), (fake_loss, 1.)):
        logits = (torch.tensor([wrong, -wrong]) * size).requires_grad_()
        value = loss(logits)
        value.backward()
        assert value.item() == pytest.approx(size / 2)
        assert logits.grad.tolist() == pytest.approx([.5 * wrong, 0.], abs=1e-12)


def test_colours_are_those_of_numpy():
    images, reference = points(2 * 3, 35, 0).view(2, 3, 5, 7), points(2 * 3, 16, 1).view(2, 3, 4, 4)
    means = [x.mean((2, 3)).numpy() for x in (images, reference)]
    covariances = [np.stack([np.cov(one.flatten(1).numpy(), ddof=0) for one in x]) for x in (images, reference)]
    expected = 2 * ((means[0] - means[1]) ** 2).mean() + 3 * ((covariances[0] - covariances[1]) ** 2).mean()
    assert colour_consistency(images, reference, 2., 3.).item() == pytest.approx(expected, rel=1e-10)


# Maximum mean discrepancy

def sklearn_mmd2(x, y, bandwidths):
    kernel = lambda a, b: sum(rbf_kernel(a, b, gamma=1 / (2 * s ** 2)) for s in bandwidths).mean()
    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


PAIRS = {
    "random": (points(20), points(20, seed=1)), "shifted": (points(20), points(20, seed=1, shift=2)), "n != m": (points(7), points(31, seed=1)),
    "duplicates": (points(5).repeat(4, 1), points(5, seed=1).repeat(3, 1)),
    "one row": (points(1), points(12, seed=1)), "one row each": (points(1), points(1, seed=1)),
    "one point": (points(6, shift=3, scale=0), points(4, scale=0)), "the same": (points(9), points(9)), "shared rows": (points(9), points(9)[:4]),
    "one coordinate": (points(9, 1), points(8, 1, 1)), "wide": (points(9, 300), points(8, 300, 1)), "far apart": (points(9), points(8, seed=1, shift=1e3)),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("bandwidths", [BANDWIDTHS, (.3,), (2, 50.)], ids=str)
def test_mmd2_is_that_of_sklearn(name, bandwidths):
    x, y = PAIRS[name]
    assert mmd2(x, y, bandwidths).item() == pytest.approx(sklearn_mmd2(x.numpy(), y.numpy(), bandwidths), abs=1e-10)
    assert mmd2(y, x, bandwidths).item() == pytest.approx(mmd2(x, y, bandwidths).item(), abs=1e-12)


def test_moving_both_clouds_changes_nothing():
    x, y = points(20), points(30, seed=1, shift=.5)
    for shift in (1., -100., 1e4): assert mmd2(x + shift, y + shift).item() == pytest.approx(mmd2(x, y).item(), rel=1e-9)
    x, y = (x * 64).round().float() / 64, (y * 64).round().float() / 64        # steps that float32 keeps around 1000
    assert mmd2(x + 1000, y + 1000).item() == pytest.approx(mmd2(x, y).item(), rel=1e-4)


def plain_mmd2(x, y):
    "Eq. 5 as it is usually written: distances from one product, no centring, kernels near 1."
    def kernel(a, b): return sum(torch.exp(-(a.pow(2).sum(1)[:, None] - 2 * a @ b.T + b.pow(2).sum(1)) / (2 * s ** 2)) for s in BANDWIDTHS).mean()
    return kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)


@pytest.mark.parametrize("shift", [0., .01, .5])
def test_tiny_features_in_float32(shift):
    "What comes out of an encoder with its weights clamped to 0.01."
    x, y = (points(64, 100, seed, shift + seed * 2e-5, 1e-4).float() for seed in (0, 1))
    exact = mmd2(x.double(), y.double()).item()
    assert exact == pytest.approx(sklearn_mmd2(x.double().numpy(), y.double().numpy(), BANDWIDTHS), rel=1e-4)
    assert mmd2(x, y).item() == pytest.approx(exact, rel=1e-3)
    assert abs(plain_mmd2(x, y).item() / exact - 1) > .5                        # nothing but rounding
    slopes = []
    for kind in (torch.float32, torch.float64):
        moving = y.to(kind, copy=True).requires_grad_()
        mmd2(x.to(kind), moving).backward()
        slopes.append(moving.grad.double())
    assert (slopes[0] - slopes[1]).norm() < 1e-3 * slopes[1].norm()


def test_gradients():
    x, y = points(5, 3).requires_grad_(), points(4, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(mmd2, (x, y))
    assert torch.autograd.gradgradcheck(mmd2, (x, y))
    assert torch.autograd.gradcheck(root_mmd, (x, y))
    assert torch.autograd.gradcheck(lambda x, y: one_sided(x, y), (x, y))


BATCHES = {
    "identical": points(8, 3).float(), "all points equal": torch.ones(8, 3), "all zero": torch.zeros(8, 3), "one point": torch.ones(1, 3),
    "tiny": points(8, 3).float() * 1e-20,
}


@pytest.mark.parametrize("name", BATCHES)
def test_equal_batches_have_finite_slopes(name):
    x = BATCHES[name]
    for loss in (mmd2, root_mmd):
        y = x.clone().requires_grad_()
        value = loss(x, y)
        value.backward()
        assert value.item() == pytest.approx(0 if loss is mmd2 else 1e-4, abs=1e-6)
        assert y.grad.abs().max() < 1e-3


def bare_root(x, y): return plain_mmd2(x.double(), y.double()).sqrt()


def train(loss, steps):
    "A linear generator that starts as the identity, so the first batches are identical; so is every hundredth after."
    source = torch.randn(steps // 100 + 50, 8, 2, generator=torch.Generator().manual_seed(0))
    generator = nn.Linear(2, 2)
    with torch.no_grad(): generator.weight.copy_(torch.eye(2)); generator.bias.zero_()
    values = []
    for step in range(steps):
        z = source[step % len(source)]
        drawn = generator(z)
        target = drawn.detach() if step % 100 == 0 else source[(step + 7) % len(source)]
        value = loss(target, drawn)
        slopes = torch.autograd.grad(value, list(generator.parameters()))
        with torch.no_grad():
            for p, slope in zip(list(generator.parameters()), slopes): p -= .05 * slope
        values.append(value.detach())
        if step == 0 and not all(p.isfinite().all() for p in generator.parameters()): break
    return torch.stack(values), generator


def test_a_bare_root_ruins_the_generator_at_once():
    _, generator = train(bare_root, 1)
    assert generator.weight.isnan().any()


def test_ten_thousand_steps_from_identical_batches():
    values, generator = train(root_mmd, 10_000)
    assert len(values) == 10_000 and values.isfinite().all()
    assert values[0].item() == pytest.approx(1e-4, abs=1e-5)
    assert all(p.isfinite().all() for p in generator.parameters())
    # the best map is the identity up to a turn or a mirror: it must not have wandered off
    assert generator.bias.abs().max() < .5 and generator.weight.norm() < 3


def test_one_sided():
    x, y = points(9), points(4, seed=1)
    assert one_sided(x, y).item() == pytest.approx(-np.maximum(0, -(x.mean(0) - y.mean(0)).numpy()).mean())
    assert one_sided(x + 10, y).item() == 0 and one_sided(x, x).item() == 0


def test_refusals():
    x = points(4)
    bad_clouds = {
        "at least one point": x[:0], "have no distance": x[:, :2], "NaN": x * float("nan"), "infinity": x / 0, "must be floats": x.long(), "coordinates": x[0],
    }
    for words, bad in bad_clouds.items():
        for loss in (mmd2, root_mmd, one_sided):
            with pytest.raises(FloatingPointError if words in ("NaN", "infinity") else ValueError, match=words): loss(x, bad)
    with pytest.raises(ValueError, match="bandwidths"): mmd2(x, x, ())
    with pytest.raises(ValueError, match="same pictures"): colour_consistency(torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4))
