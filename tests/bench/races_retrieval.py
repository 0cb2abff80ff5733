"""Order similarity with ranks against vsepp's way (expand, clamp, pow, sum; argsort), R-precision against one picture at a time. Both peers are ours."""
import numpy as np
import torch
from race import Race

from crossmodal.metrics.alignment import distractors, r_precision
from crossmodal.metrics.retrieval import order_ranks


def broadcast_ranks(images: torch.Tensor, captions: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    "Blocks of 100 pictures, all captions; then a sort for every query. The root that vsepp takes is left out: same order."
    n, m, d = len(images), len(captions), images.shape[1]
    scores = []
    for block in images.split(100):
        shape = len(block), m, d
        scores.append(-(captions[None].expand(shape) - block[:, None].expand(shape)).clamp(min=0).pow(2).sum(2))
    scores = torch.cat(scores).numpy()
    of_images, of_captions = np.empty(n), np.empty(m)
    for i in range(n):
        order = np.argsort(scores[i])[::-1]
        of_images[i] = min(np.where(order == j)[0][0] for j in range(5 * i, 5 * i + 5))
    for j in range(m): of_captions[j] = np.where(np.argsort(scores[:, j])[::-1] == j // 5)[0][0]
    return of_images, of_captions


def one_at_a_time(images: torch.Tensor, texts: torch.Tensor, table: np.ndarray) -> np.ndarray:
    "R-precision as the released scripts do it, codes given: a cosine matrix for each picture."
    hits = []
    for image, row in zip(images, torch.from_numpy(table)):
        candidates = texts[row]
        norms = image[None].norm(dim=1, keepdim=True) @ candidates.norm(dim=1, keepdim=True).T
        hits.append((image[None] @ candidates.T / norms.clamp(min=1e-8)).argmax(1).item() == 0)
    return np.array(hits, float)


def races() -> list[Race]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(200, 1024, generator=generator)
    captions = images.repeat_interleave(5, 0) + 2 * torch.randn(1000, 1024, generator=generator)
    images, captions = (codes.div(codes.norm(dim=1, keepdim=True)).abs() for codes in (images, captions))
    pictures = torch.randn(2933, 256, generator=generator)
    texts, table = pictures + 5 * torch.randn(2933, 256, generator=generator), distractors(2933, np.arange(2933) % 50)

    def ours():
        ranks = order_ranks(images, captions)
        return ranks.image_to_text.numpy(), ranks.text_to_image.numpy()

    def apart(a, b): return max(np.mean(x != y) for x, y in zip(a, b))          # share of ranks that differ: rounding may swap two near neighbours
    return [
        Race("order similarity and ranks, 200 x 1,000 x 1,024", ours, lambda: broadcast_ranks(images, captions), apart, .01,
             "vsepp's way: n x m x d block, argsort", ("torch", "numba"), bar=50),
        Race("R-precision, 2,933 pictures x 100 captions x 256",
             lambda: r_precision(pictures, texts, table).hits, lambda: one_at_a_time(pictures, texts, table),
             lambda a, b: np.mean(a != b), .001, "one picture at a time, codes given", ("torch", "numba"), bar=1),
    ]
