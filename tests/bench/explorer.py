"""How long does the explorer take to answer, for a gallery of ten thousand pictures?

    python tests/bench/explorer.py [--pictures 10000] [--questions 15] [--threads 2]

Ten thousand drawn birds with five captions each, as COCO has them; systems of the sizes that the preset `reduced` gives them, with weights
as they are before training, since a question costs the same before and after it. The points of the first pictures and sentences are theirs;
the others' are these, moved a little: a gallery is looked at once, and this is about what comes after. One question is asked first and not counted.
`found` ends when the nearest pictures and sentences stand in the answer, thumbnails included; `made` is what drawing and writing take on top of it."""
import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from crossmodal.data.text import SPECIALS, Vocabulary
from crossmodal.systems.experiments import find_system
from crossmodal.training.config import apply_preset, override
from crossmodal.workbook.explorers import Explorer, Index
from crossmodal.workbook.plots import embed_pictures, embed_sentences, open_gallery

MODELS = {"selfsup": {}, "gxn": {"model": "i2t+t2i"}, "laviter": {"model": "full"}, "sdn": {"model": "sdn"}}


def untrained(name: str, words: Vocabulary):
    "A system of the size that `reduced` gives it."
    kind = find_system(name)
    config = override(apply_preset(kind.Config(), kind.presets, "reduced"), MODELS[name])
    torch.manual_seed(0)
    return kind(config, words).eval().requires_grad_(False)


def filled(codes: torch.Tensor, count: int) -> torch.Tensor:
    "As many points as asked for, each near one of these."
    rows = torch.arange(count) % len(codes)
    return codes[rows] + .01 * torch.randn(count, codes.shape[1], generator=torch.Generator().manual_seed(0))


def figures(walls: list[float], processors: list[float]) -> dict[str, float]:
    "Milliseconds on the clock, and of processors, which say what a quiet machine would need at most."
    return {name: round(1000 * float(np.quantile(walls, share))) for name, share in (("median", .5), ("95 %", .95))} | {
        "processor": round(1000 * float(np.median(processors)))}


def ask(explorer: Explorer, question) -> list[tuple[float, float]]:
    "Clock and processor when everything is found, and when everything is drawn and written as well."
    now = lambda: (time.perf_counter(), time.process_time())
    times, answers, parts = [now()], {}, []
    for name in explorer.systems:
        answers[name] = explorer.find(question, [name])[name]
        parts += explorer.parts(question, {name: answers[name]})
        explorer.page(question, parts)
    times.append(now())
    explorer.page(question, explorer.parts(question, explorer.make(question, answers)))
    times.append(now())
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(times, times[1:])]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--questions", type=int, default=15, help="of each kind")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    gallery = open_gallery("birds", "train", side=96, most=args.pictures, captions=5, per_species=-(-args.pictures // 26))
    words = Vocabulary.build(gallery.sentences, specials=SPECIALS)
    few, said = range(64), gallery.sentences[:256]
    systems = {name: untrained(name, words) for name in MODELS}
    explorer = Explorer({}, gallery)
    explorer.systems = systems
    explorer.indexes = {name: Index(filled(embed_pictures(system, gallery, few), len(gallery)),
                                    filled(embed_sentences(system, said), len(gallery.sentences))) for name, system in systems.items()}
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(gallery), args.questions).tolist()
    questions = {"sentence": [gallery.captions[row][1] for row in rows], "picture of the gallery": rows,
                 "uploaded picture": [gallery.images([row])[0] for row in rows]}
    report = {}
    for kind, asked in questions.items():
        report[kind] = {}
        for name in [*systems, "all four"]:
            alone = Explorer({}, gallery)
            these = systems if name == "all four" else {name: systems[name]}
            alone.systems, alone.indexes = these, {one: explorer.indexes[one] for one in these}
            asked_once = [ask(alone, question) for question in [asked[-1], *asked]][1:]
            report[kind][name] = {step: figures(*zip(*(times[k] for times in asked_once))) for k, step in enumerate(("found", "made"))}
            print(f"{kind:24s} {name:10s} found {report[kind][name]['found']}  made {report[kind][name]['made']}", flush=True)
    about = {"pictures": len(gallery), "sentences": len(gallery.sentences), "widths": {name: index.images.shape[1] for name, index in explorer.indexes.items()},
             "questions of each kind": args.questions, "unit": "ms", "threads": args.threads, "cores": os.cpu_count(),
             "load of the machine before": round(load, 1), "machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    Path(__file__).with_suffix(".json").write_text(json.dumps(about | report, indent=1) + "\n")


if __name__ == "__main__": main()
