"""A step of Stage II, forward and back: what a distance without a kept difference, one look at the real pictures, and stopping early gain.

    python tests/bench/distillation.py [--device cpu | cuda] [--repeats 7]

Ours: the teacher looks at the real pictures once, without a graph, then at the drawn ones; distances keep the maps and not their difference.
  first      ours, but the best of the p pictures is chosen without a graph, and only the chosen ones are judged with one;
  repeated   the peer: every drawn picture's real one goes through the teacher again, and distances are (a - b).abs().mean();
With layers 1 to k only, k being half of them:
  half       ours with last=k;
  cut        the peer's way, all layers computed and the first k used.
On a GPU also ours in float32 and under bfloat16 autocast, in the contiguous layout and in channels-last, the one that `Teacher` and `Mirror` use.
All are our own code. Losses and the student's slopes must agree before anything is timed; then the ways take turns. Memory is what a step adds
at its highest: on a CPU measured in a process of its own, on a GPU as torch counts it. Weights are random: they do not change the speed.
The result is written beside this file, under the device's name."""
import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossmodal.losses.distillation import best_picture, stage2_loss
from crossmodal.models.mirror import VGG19, Mirror, Teacher, vgg_layers

SIZES = {"cpu": dict(plan=((16, 16), (32, 32), (64,) * 4), side=64, batch=12, hidden=128), "cuda": dict(plan=VGG19, side=224, batch=12, hidden=4096)}
WAYS = {"ours": "all layers", "first": "all layers", "repeated": "all layers", "half": "half of them", "cut": "half of them"}
LAYOUTS = ("float32 contiguous", "float32 channels-last", "bfloat16 contiguous", "bfloat16 channels-last")


def plain_teacher(teacher: Teacher, images: Tensor) -> list[Tensor]:
    "All levels, in whatever layout pictures and weights have."
    x, levels = ((images + 1) / 2 - teacher.mean) / teacher.std, []
    for layer in teacher.layers:
        x = layer(x)
        if isinstance(layer, nn.ReLU): levels.append(x)
        if len(levels) == sum(map(len, teacher.plan)): return levels


def plain_student(student: Mirror, codes: Tensor) -> Tensor:
    x, convolutions = student.dense(codes), iter(reversed([student.picture, *student.convolutions]))
    for group in reversed(student.plan):
        x = F.interpolate(x, scale_factor=2)
        for _ in group: x = next(convolutions)(x)
    return x.float().tanh().unflatten(1, (student.pictures, 3))


def plain_loss(real_levels: list[Tensor], drawn_levels: list[Tensor], real: Tensor, drawn: Tensor) -> Tensor:
    "Stage II by abs().mean(), the real maps and pictures repeated for each drawn picture."
    b, p = drawn.shape[:2]
    levels = sum((a.float() - c.float()).abs().mean((1, 2, 3)) for a, c in zip(real_levels, drawn_levels))
    return (levels.view(b, p) + (drawn - real[:, None]).abs().mean((2, 3, 4))).min(1).values.mean()


class Step:
    "Networks and a batch; call it with the name of a way."
    def __init__(self, device: str, batch: int, pictures: int, contiguous: bool = False):
        size = SIZES[device]
        torch.manual_seed(0)
        self.teacher = Teacher(vgg_layers(size["plan"], normalise=False)).freeze()
        self.student = Mirror(size["plan"], size["side"], 1024, size["hidden"], pictures)
        self.codes, self.real = torch.randn(batch, 1024), torch.rand(batch, 3, size["side"], size["side"]) * 2 - 1
        if contiguous: self.teacher.to(memory_format=torch.contiguous_format), self.student.to(memory_format=torch.contiguous_format)
        for name in ("teacher", "student", "codes", "real"): setattr(self, name, getattr(self, name).to(device))
        self.half = sum(map(len, size["plan"])) // 2

    def loss(self, way: str) -> Tensor:
        teacher, real, p = self.teacher, self.real, self.student.pictures
        if way == "contiguous":
            drawn = plain_student(self.student, self.codes)
            with torch.no_grad(): levels = plain_teacher(teacher, real)
            return stage2_loss(levels, plain_teacher(teacher, drawn.flatten(0, 1)), real, drawn)
        drawn, _ = self.student(self.codes)
        if way in ("repeated", "cut"):
            with torch.no_grad(): again = teacher(real.repeat_interleave(p, 0))
            last = len(again) if way == "repeated" else self.half
            return plain_loss(again[:last], teacher(drawn.flatten(0, 1))[:last], real, drawn)
        last = self.half if way == "half" else None
        with torch.no_grad():
            levels = teacher(real, last)
            if way == "first": best = best_picture(levels, teacher(drawn.flatten(0, 1)), real, drawn)
        if way == "first": drawn = drawn[torch.arange(len(drawn), device=drawn.device), best][:, None]
        return stage2_loss(levels, teacher(drawn.flatten(0, 1), last), real, drawn)

    def __call__(self, way: str, half: bool = False) -> Tensor:
        self.student.zero_grad(set_to_none=True)
        with torch.autocast(self.real.device.type, torch.bfloat16) if half else nullcontext(): loss = self.loss(way)
        loss.backward()
        if self.real.is_cuda: torch.cuda.synchronize()
        return loss.detach()

    def slopes(self) -> Tensor: return torch.cat([p.grad.flatten().float() for p in self.student.parameters()])


def highest() -> float:
    "MiB of this process at its highest so far. (getrusage would count its parent's, from before it was a process of its own.)"
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")) / 2**10


def memory_alone(way: str, batch: int, pictures: int, threads: int) -> float:
    "MiB that a step adds to a process of its own."
    torch.set_num_threads(threads)
    Step("cpu", 1, 1)(way)                                                      # what torch loads the first time
    step = Step("cpu", batch, pictures)
    before = highest()
    step(way)
    return highest() - before


def memory(step: Step, way: str, batch: int, pictures: int, threads: int, half: bool = False) -> int:
    if not step.real.is_cuda:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return round(pool.submit(memory_alone, way, batch, pictures, threads).result())
    step.student.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(way, half)
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def spread(found: list[float]) -> list[float]: return [float(f"{x:.3g}") for x in (min(found), statistics.median(found), max(found))]


def take_turns(ways: dict, repeats: int) -> dict[str, list[float]]:
    seconds = {way: [] for way in ways}
    for _ in range(repeats):
        for way, go in ways.items():
            start = time.perf_counter()
            go()
            seconds[way].append(time.perf_counter() - start)
    return seconds


def agree(step: Step, ways: list[str]) -> dict[str, float]:
    "How far each way's loss and slopes are from the first one's, relatively. This also warms all up."
    wanted = step(ways[0]).item()
    slopes, found = step.slopes(), {}
    for way in ways[1:]:
        loss = step(way).item()
        apart = max(abs(loss - wanted) / wanted, ((step.slopes() - slopes).norm() / slopes.norm()).item())
        assert apart < 1e-3, f"{way} must find the loss and slopes that {ways[0]} finds, found a difference of {apart:.1e}."
        found[way] = float(f"{apart:.1e}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, help="default: the paper's 12")
    parser.add_argument("--pictures", type=int, default=3, help="drawn of each sentence")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False     # float32 means float32
    size, batch = SIZES[args.device], args.batch or SIZES[args.device]["batch"]
    step, load = Step(args.device, batch, args.pictures), os.getloadavg()[0]
    sizes = (batch, args.pictures, args.threads)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    report = {"torch": torch.__version__, "threads": args.threads, "machine": machine, "load of the machine before": round(load, 1), "repeats": args.repeats,
              "plan": size["plan"], "side": size["side"], "batch": batch, "pictures": args.pictures}
    for what in ("all layers", "half of them"):
        names = [way for way, kind in WAYS.items() if kind == what]
        apart = agree(step, names)
        seconds = take_turns({way: lambda way=way: step(way) for way in names}, args.repeats)
        peer = seconds[names[-1]]
        report[what] = {"apart from ours": apart, "seconds": {way: spread(found) for way, found in seconds.items()},
                        f"{names[-1]} / ": {way: spread([a / b for a, b in zip(peer, seconds[way])]) for way in names[:-1]},
                        "peak MiB gained": {way: memory(step, way, *sizes) for way in names}}
    if args.device == "cuda":
        steps = {"contiguous": Step("cuda", batch, args.pictures, contiguous=True), "channels-last": step}
        ways, losses = {}, {}
        for name in LAYOUTS:
            kind, layout = name.split()
            ways[name] = lambda kind=kind, layout=layout: steps[layout]("contiguous" if layout == "contiguous" else "ours", kind == "bfloat16")
            for _ in range(2): losses[name] = float(f"{ways[name]().item():.6g}")
            assert abs(losses[name] / losses[LAYOUTS[0]] - 1) < .02, f"losses must agree within 2 %, found {losses}."
        seconds = take_turns(ways, args.repeats)
        report["precision and layout"] = {"losses": losses, "seconds": {name: spread(found) for name, found in seconds.items()},
                                          "peak MiB gained": {name: memory(steps[name.split()[1]], "contiguous" if "contiguous" in name else "ours", *sizes,
                                                                           half="bfloat16" in name) for name in LAYOUTS}}
    print(json.dumps(report, indent=1))
    out = Path(__file__).with_suffix(".json")
    kept = json.loads(out.read_text()) if out.is_file() else {}
    out.write_text(json.dumps(kept | {args.device: report}, indent=1) + "\n")


if __name__ == "__main__": main()
