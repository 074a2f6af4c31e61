"""How often two processes that keep gloo's group behind its destruction are aborted when Python shuts down.

    python experiments/gloo_exit.py [--runs 16]

Prints, for each way to leave, how many of the runs failed. See pytorch/pytorch#190489 and docs/LOG.md, 2026-11-30.
"""

import argparse
import os
import random
import subprocess
import sys

import torch
import torch.distributed as dist

WAYS = {"kept": "the group is kept", "free": "no reference is kept", "exit": "it is kept, and os._exit leaves"}


def worker(way: str) -> None:
    """Many small sums, whose last references the threads of gloo drop."""
    dist.init_process_group("gloo")
    kept = None if way == "free" else dist.group.WORLD
    tensors = [torch.zeros(1000) for _ in range(200)]
    for tensor in tensors:
        tensor.of_python = object()  # freeing it needs Python
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work in works:
        work.wait()
    del tensor, tensors, work, works
    dist.destroy_process_group()
    if way == "exit":
        os._exit(0)
    globals()["kept"] = kept  # until Python shuts down


def main() -> None:
    """Run each way, and count."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--way", choices=WAYS, help="what a worker is told")
    given = parser.parse_args()
    if given.way:
        worker(given.way)
        return
    for way, meaning in WAYS.items():
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
        runs = [[*launch, str(random.randint(20000, 30000)), __file__, "--way", way] for _ in range(given.runs)]
        failed = sum(subprocess.run(run, capture_output=True).returncode != 0 for run in runs)
        print(f"{meaning}: {failed} of {given.runs} runs aborted", flush=True)


if __name__ == "__main__":
    main()
