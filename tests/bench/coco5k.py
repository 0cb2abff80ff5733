"""COCO's "5K" ranks from codes: 5,000 pictures, 25,000 captions, 1,024 dimensions, both directions. Prints seconds and peak memory; asserts nothing.

    python tests/bench/coco5k.py [--threads 2] [--pictures 5000]"""
import argparse
import resource
import time

import torch

from crossmodal.metrics.retrieval import order_ranks, retrieval_report


def peak() -> float:
    "GiB that this process has held at most."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=5000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    order_ranks(torch.ones(1, 8), torch.ones(1, 8), 1)                      # compile, or read what was compiled
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.pictures, 1024, generator=generator)
    captions = images.repeat_interleave(5, 0).add_(torch.randn(5 * args.pictures, 1024, generator=generator), alpha=2)
    for codes in (images, captions): codes.div_(codes.norm(dim=1, keepdim=True)).abs_()
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    report = retrieval_report(order_ranks(images, captions))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{len(images):,} pictures x {len(captions):,} captions x 1,024, {args.threads} threads: {seconds:.1f} s ({cpu:.1f} s of processor time); "
          f"peak {peak():.2f} GiB, {before:.2f} of it before the ranks")
    for name, row in (("R@1", report), ("chance", report.chance)): print(f"{name} {row.image_to_text.r1:.2f} and {row.text_to_image.r1:.2f}")
