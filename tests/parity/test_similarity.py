"""SSIM and FSIM beside piq and scikit-image."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crossmodal.metrics.similarity import fsim, ssim

piq = pytest.importorskip("piq", reason="piq is not installed")


def pair(n=2, c=3, h=64, w=64, seed=0, noise=.1):
    generator = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n, c, h // 8 + 1, w // 8 + 1, generator=generator), size=(h, w), mode="bilinear")
    return x, (x + noise * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def photographs():
    from sklearn.datasets import load_sample_images
    x = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images]).permute(0, 3, 1, 2) / 255
    return x[:, :, :224, :300], F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)[:, :, :224, :300].clamp(0, 1)


def digits():
    "Mostly black."
    from sklearn.datasets import load_digits
    x = F.pad(torch.from_numpy(load_digits().images[:40]).float()[:, None] / 16, (12, 12, 12, 12))
    return x[:20], x[20:]


def squares():
    x = torch.zeros(2, 3, 48, 48)
    x[0, :, 10:30, 10:30] = 1
    x[1, 0, 20:40, 5:9] = .5
    return x, x.roll(3, -1)


PAIRS = {
    "noisy": pair(), "grey": pair(c=1), "odd": pair(h=61, w=75), "224": pair(1, h=224, w=224), "unrelated": (pair()[0], pair(seed=1)[0]),
    "photographs": photographs(), "digits": digits(), "squares": squares(), "negative": (pair()[0], 1 - pair()[0]),
    "duplicates": (pair()[0][:1].repeat(3, 1, 1, 1), pair()[1][:1].repeat(3, 1, 1, 1)),
}


def skimage_ssim(x, y):
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed")
    return [metrics.structural_similarity(a.double().numpy(), b.double().numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5,
                                          use_sample_covariance=False, data_range=1.) for a, b in zip(x, y)]


@pytest.mark.parametrize("case", PAIRS)
def test_ssim(case):
    x, y = PAIRS[case]
    assert ssim(x, y).numpy() == pytest.approx(skimage_ssim(x, y), abs=1e-6)
    assert ssim(x, y).numpy() == pytest.approx(piq.ssim(x.double(), y.double(), reduction="none").numpy(), abs=1e-6)
    assert ssim(x.double(), y.double()).numpy() == pytest.approx(np.array(skimage_ssim(x, y)), abs=1e-12)


def test_ssim_of_large_pictures():
    x, y = pair(1, h=400, w=520)
    assert ssim(x, y).item() == pytest.approx(skimage_ssim(x, y)[0], abs=1e-6)
    assert ssim(x, y, shrink=True).item() == pytest.approx(piq.ssim(x.double(), y.double()).item(), abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0., 0.), (0., 1.), (.3, .3), (.2, .7)])
def test_ssim_of_constants(a, b):
    x, y = torch.full((1, 3, 20, 30), a), torch.full((1, 3, 20, 30), b)
    assert ssim(x, y).item() == pytest.approx(skimage_ssim(x, y)[0], abs=1e-6)


@pytest.mark.parametrize("case", PAIRS)
def test_fsim(case):
    x, y = PAIRS[case]
    found = fsim(x, y)
    assert found.fsim.numpy() == pytest.approx(piq.fsim(x, y, reduction="none", chromatic=False).numpy(), abs=1e-4)
    if x.shape[1] == 3: assert found.fsimc.numpy() == pytest.approx(piq.fsim(x, y, reduction="none").numpy(), abs=1e-4)
    exact = fsim(x.double(), y.double())
    assert exact.fsim.numpy() == pytest.approx(piq.fsim(x.double(), y.double(), reduction="none", chromatic=False).numpy(), abs=1e-6)


def test_fsim_of_large_and_small_pictures():
    for x, y in (pair(1, h=400, w=430), pair(1, h=13, w=17)):
        assert fsim(x, y).fsimc.item() == pytest.approx(piq.fsim(x, y).item(), abs=1e-4)


def test_fsim_against_a_constant():
    x, y = pair(1)[0], torch.full((1, 3, 64, 64), .5)
    assert fsim(x, y).fsimc.item() == pytest.approx(piq.fsim(x, y).item(), abs=1e-4)


@pytest.mark.parametrize("case", PAIRS)
def test_equal_pictures_are_exactly_one(case):
    x, _ = PAIRS[case]
    for values in (ssim(x, x), *fsim(x, x)): assert (values == 1).all()
