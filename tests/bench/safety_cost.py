"""What it costs never to lose work: the writing of checkpoints, and the way back.

For each system at preset `quick` (data of its own, no download): how long one checkpoint takes and how large it is; what share of the time that is at the
default interval; how often one was written and what it really took in the seconds that were watched; and, after a stop, how many seconds pass from the
command to the first step, and how many of those before the package is imported.

    python tests/bench/safety_cost.py            writes tests/bench/safety_cost.json
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from crossmodal.training.config import Execution

SYSTEMS = {"embedmap": ["autoencoder_images=100000000"], "selfsup": ["image_epochs=1000"], "gxn": ["model=gru-bi", "look_epochs=1000"],
           "laviter": ["model=vta", "align_epochs=1000"], "sdn": ["model=teacher", "teacher_epochs=1000"]}       # a first phase that does not end
WATCH = """
import json, os, signal, sys, time
from crossmodal.cli import main
from crossmodal.training import loop
imported = time.time() - float(os.environ["STARTED"])
report, limit = os.environ["REPORT"], float(os.environ["SECONDS_TO_WATCH"])
saves, first = [], []
save, learn = loop.Checkpoints.save, loop.Loop.learn


def timed(self, *args, **options):
    before = time.perf_counter()
    save(self, *args, **options)
    saves.append(time.perf_counter() - before)


def learned(self, parts):
    if not first: first.extend([time.time() - float(os.environ["STARTED"]), time.perf_counter(), self.total])
    found = learn(self, parts)
    if time.perf_counter() - first[1] > limit:
        watched = time.perf_counter() - first[1]
        told = {"imported": imported, "first step": first[0], "from": first[2], "watched": watched, "saves": saves, "until": self.total + 1}
        with open(report, "w") as file: json.dump(told, file)
        os.kill(os.getpid(), signal.SIGTERM)
    return found


loop.Checkpoints.save, loop.Loop.learn = timed, learned
sys.exit(main(sys.argv[1:]))
"""


def watch(folder: Path, words: list[str], seconds: float) -> dict:
    "Run the command until its training has been watched for so long; it stops itself with a signal, and so leaves a checkpoint."
    report = folder / "report.json"
    environment = os.environ | {"STARTED": str(time.time()), "REPORT": str(report), "SECONDS_TO_WATCH": str(seconds)}
    done = subprocess.run([sys.executable, "-c", WATCH, *words], env=environment, capture_output=True, text=True)
    if done.returncode != 130: raise SystemExit(f"{' '.join(words)} ended with {done.returncode}, where a stop was expected:\n{done.stderr[-2000:]}")
    return json.loads(report.read_text())


def measure(system: str, changes: list[str], seconds: float) -> dict:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run = str(folder / "run")
        went = watch(folder, ["train", system, *changes, "--preset", "quick", "--out", run], seconds)
        again = watch(folder, ["resume", run], .1)
        size = sum(path.stat().st_size for path in max((folder / "run" / "checkpoints").iterdir()).iterdir())
    if again["from"] != went["until"]: raise SystemExit(f"{system} stopped at step {went['until']} and went on from {again['from']}")
    one = max(went["saves"])
    return {"megabytes": round(size / 1e6, 2), "seconds of one": round(one, 4),
            "share at the default interval": round(one / max(Execution().checkpoint_every, 50 * one), 5),
            "seconds watched": round(went["watched"], 1), "written within": len(went["saves"]),
            "share of what was watched": round(sum(went["saves"]) / went["watched"], 5),
            "seconds to the first step after resume": round(again["first step"], 2), "before the package is imported": round(again["imported"], 2)}


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 70.
    found = {"load of the machine before": round(os.getloadavg()[0], 1), "seconds watched": seconds} | {
        system: measure(system, changes, seconds) for system, changes in SYSTEMS.items()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
