"""FSIM and SSIM of pairs at 224 pixels."""
import torch
from race import Race

from crossmodal.metrics.similarity import fsim, ssim


def races() -> list[Race]:
    import piq
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(8, 3, 28, 28, generator=generator), size=(224, 224), mode="bilinear")
    y = (x + .1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    apart = lambda ours, theirs: float((ours - theirs).abs().max())
    return [
        Race("FSIM, 8 pairs at 224 x 224 (FSIM and FSIMc; the peer FSIMc)", lambda: fsim(x, y).fsimc, lambda: piq.fsim(x, y, reduction="none"),
             apart, 1e-4, "piq", ("piq", "numba"), bar=1),
        Race("SSIM, 8 pairs at 224 x 224", lambda: ssim(x, y), lambda: piq.ssim(x, y, reduction="none"), apart, 1e-6, "piq", ("piq", "numba"), bar=0),
    ]
