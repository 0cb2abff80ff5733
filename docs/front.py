"""The picture at the top of README.md, from a trained run and a diagram:

    crossmodal train embedmap colour=true autoencoder=conv-vae --data mnist --preset reduced --out runs/front
    python docs/front.py runs/front
"""
import io
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import crossmodal
from crossmodal.training.config import apply_preset
from crossmodal.workbook.diagrams import draw_flow, watch_phase
from crossmodal.workbook.pictures import SPEECH, TEXT


def paint(ax, image):
    ax.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0), interpolation="bicubic")
    ax.axis("off")


def unseen(system, count: int) -> list[str]:
    "Names of numbers that the system has never seen, spread over all of them."
    test = type(system).open_data(system.config, "digits", "test")         # held out by the seed alone, whatever the handwriting
    classes = sorted(set(test.classes.tolist()))
    return [test.class_names[k] for k in classes[5::len(classes) // count][:count]]


def diagram():
    "One step of LAViTeR's last phase, watched."
    kind = crossmodal.SYSTEMS["laviter"]
    config = apply_preset(kind.Config(), kind.presets, "smoke")
    train, val = (kind.open_data(config, kind.home, split) for split in ("train", "val"))
    torch.manual_seed(0)
    system = kind(config, train.vocabulary)
    phase = next(phase for phase in system.phases(train, val) if phase.name == "together")
    return draw_flow(watch_phase(system, phase, stored="pictures"))


def main(run: str, out: str = "docs/pictures/front.png"):
    system = crossmodal.load(run)
    names = unseen(system, 6)
    written, heard = names[::2], names[1::2]
    sounds = system.names["speech"]
    vectors = sounds.vectors(system.captions(heard))
    fig = plt.figure(figsize=(11, 7.4), dpi=100)
    whole = fig.add_gridspec(2, 2, height_ratios=(1, 1.15), hspace=.08, wspace=.05, left=.02, right=.98, top=.95, bottom=.0)
    fig.text(.02, .965, "written", fontsize=12, color=TEXT, weight="bold")
    fig.text(.51, .965, "heard", fontsize=12, color=SPEECH, weight="bold")
    left, right = (whole[0, k].subgridspec(3, 2, width_ratios=(1, 1), hspace=.18, wspace=.05) for k in (0, 1))
    for row, (name, image) in enumerate(zip(written, system.images_from_texts(written))):
        ax = fig.add_subplot(left[row, 0])
        ax.text(.95, .5, f"“{name}”", ha="right", va="center", fontsize=12)
        ax.axis("off")
        paint(fig.add_subplot(left[row, 1]), image)
    for row, (name, vector, image) in enumerate(zip(heard, vectors, system.draw("speech", vectors))):
        ax = fig.add_subplot(right[row, 0])
        words = vector.view(system.length, 13)
        for k, word in enumerate(words): ax.fill_between(torch.arange(13) / 14 + k, -word, word, color=SPEECH, lw=0, step="mid")
        for k, word in enumerate(name.split()): ax.text(k + .43, -3.6, word, ha="center", va="top", fontsize=7, color="#777777")
        ax.set(ylim=(-4.6, 3.5), xlim=(-.1, system.length))
        ax.axis("off")
        paint(fig.add_subplot(right[row, 1]), image)
    ax = fig.add_subplot(whole[1, :])
    picture = io.BytesIO()
    diagram().savefig(picture, dpi=130)
    picture.seek(0)
    ax.imshow(plt.imread(picture))
    ax.axis("off")
    fig.savefig(out)
    print(f"{out}: {Path(out).stat().st_size:,} bytes")


if __name__ == "__main__": main(*sys.argv[1:])
