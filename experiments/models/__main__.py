"""The model matrix: which transformers types a memory works on, with LoRA and prefix tuning beside it.

    python -m experiments.models                     # every kind, type and method; then docs/models.md
    python -m experiments.models --only llama t5     # some types again; the other records stay
    python -m experiments.models --only t5 --method inside    # a memory's other place, recorded beside them
    python -m experiments.models --resume            # only what has no record yet
    python -m experiments.models --report            # docs/models.md from the records

Each type is built tiny and random from its config class, offline. Each (type, method) runs in a process of its own with
a time limit, so that one that dies or hangs does not end the walk. Records are in results/models/, one file a kind.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import tqdm

from . import records
from .base import ask_base
from .checks import INSIDE, METHODS, ask_method
from .kinds import KINDS, NOT_RUN, by_name, kind_of
from .report import write_report
from .running import reason

Task = tuple[str, str, str]  # kind, type, method


def measure(kind_name: str, model_type: str, method: str) -> dict[str, Any]:
    """What one method does on one type: ``{"base": ..., "outcome": ...}``, or ``{"not_run": why}``."""
    if model_type in NOT_RUN:
        return {"not_run": NOT_RUN[model_type]}
    kind = by_name(kind_name)
    try:
        facts = ask_base(kind, model_type)
    except Exception as error:
        return {"not_run": reason(error)}
    base = {"class": facts.class_name, "attends": facts.attends, "cannot": facts.cannot}
    return {"base": base, "outcome": ask_method(kind, model_type, method, facts)}


def _work(task: Task, answer: Connection) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    answer.send(measure(*task))


def walk(tasks: list[Task], jobs: int, limit: float) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Measure each task in a process of its own, ``jobs`` at a time, each for at most ``limit`` seconds."""
    context = multiprocessing.get_context("fork")  # the libraries are imported once, here
    waiting, running = deque(tasks), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(waiting[0], send), daemon=True)
                process.start()
                send.close()
                running[receive] = (waiting.popleft(), process, time.monotonic() + limit)
            ready = wait(list(running), timeout=1.0)
            for receive, (task, process, deadline) in list(running.items()):
                if receive in ready:
                    try:
                        result = receive.recv()
                    except EOFError:
                        process.join()
                        result = _gave_up(f"the process died with exit code {process.exitcode}")
                elif time.monotonic() > deadline:
                    process.kill()
                    result = _gave_up(f"no answer within {limit:g} s")
                else:
                    continue
                process.join()
                del running[receive]
                yield task, result
    finally:
        for _, process, _ in running.values():
            process.kill()


def _gave_up(why: str) -> dict[str, Any]:
    return {"outcome": {"passed": [], "failed": {"attach": why}, "not_applicable": {}}}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m experiments.models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types, whatever their kind")
    parser.add_argument("--kind", nargs="+", choices=[kind.name for kind in KINDS], help="these kinds")
    parser.add_argument("--method", nargs="+", choices=(*METHODS, INSIDE), default=METHODS, help="these methods")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time")
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS", help="for one type and method")
    parser.add_argument("--resume", action="store_true", help="only what has no record yet")
    parser.add_argument("--report", action="store_true", help="measure nothing, write docs/models.md")
    args = parser.parse_args()
    if not args.report:
        for name in args.only or ():
            if not kind_of(name):
                parser.error(f"no kind has the type {name!r}")
        kinds = [kind for kind in KINDS if args.kind is None or kind.name in args.kind]
        tasks = [
            (kind.name, model_type, method)
            for kind in kinds
            for model_type in kind.types
            if args.only is None or model_type in args.only
            for method in args.method
            if not (args.resume and records.has(kind.name, model_type, method))
        ]
        bar = tqdm(walk(tasks, args.jobs, args.limit), total=len(tasks), unit="run", disable=None, file=sys.stderr)
        for task, result in bar:
            records.put(*task, result)
            bar.set_postfix_str(f"{task[1]} {task[2]}")
    write_report()


if __name__ == "__main__":
    main()
