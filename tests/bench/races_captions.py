"""Caption metrics against pycocoevalcap: 256 hypotheses, five references each, a vocabulary of 27,012 words."""

import numpy as np
from race import Race

from crossmodal.metrics.captions import CiderD, bleu, rouge_l

WORDS, PICTURES = 27012, 256


def corpus() -> tuple[list[str], list[list[str]]]:
    "Captions of eight to fourteen words, as frequent as words are; hypotheses keep most words of a reference."
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, WORDS + 1)
    shares /= shares.sum()
    draw = lambda: rng.choice(WORDS, size=rng.integers(8, 15), p=shares)
    references = [[draw() for _ in range(5)] for _ in range(PICTURES)]
    said = [np.where(rng.random(len(texts[0])) < .7, texts[0], np.resize(draw(), len(texts[0]))) for texts in references]
    spell = lambda numbers: " ".join(f"w{number}" for number in numbers)
    return [spell(words) for words in said], [[spell(words) for words in texts] for texts in references]


def apart(ours, peer) -> float: return float(np.abs(np.asarray(ours) - np.asarray(peer)).max())


def races() -> list[Race]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    said, judges = corpus()
    results, sources = {k: [text] for k, text in enumerate(said)}, dict(enumerate(judges))
    split = lambda: ([text.split() for text in said], [[text.split() for text in texts] for texts in judges])      # the peers split, too
    words, known = split()
    rows = np.zeros((PICTURES, 16), dtype=np.int64)
    for k, text in enumerate(words): rows[k, :len(text)] = [int(word[1:]) + 1 for word in text]
    texts = CiderD(judges)                                                # the references are prepared once, as in training
    numbers = CiderD([[[int(word[1:]) + 1 for word in text] for text in captions] for captions in known])
    packages = ("pycocoevalcap", "numba", "numpy")
    return [
        Race("CIDEr-D, 256 texts x 5 references", lambda: texts.score(said), lambda: Cider().compute_score(sources, results)[1],
             apart, 1e-9, "pycocoevalcap Cider", packages, bar=25.),
        Race("CIDEr-D, 256 sampled rows x 5 references", lambda: numbers.score(rows), lambda: Cider().compute_score(sources, results)[1],
             apart, 1e-9, "pycocoevalcap Cider", packages, bar=25.),
        Race("CIDEr-D, references prepared each time", lambda: CiderD(judges).score(said), lambda: Cider().compute_score(sources, results)[1],
             apart, 1e-9, "pycocoevalcap Cider", packages),
        Race("ROUGE-L, 256 x 5 references", lambda: rouge_l(*split()), lambda: Rouge().compute_score(sources, results)[1],
             apart, 1e-9, "pycocoevalcap Rouge", packages, bar=5.),
        Race("BLEU-1 to -4, 256 x 5 references", lambda: bleu(*split())[1].T, lambda: Bleu().compute_score(sources, results, verbose=0)[1],
             apart, 1e-9, "pycocoevalcap Bleu", packages),
    ]
