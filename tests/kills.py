"""A run of 90 steps is killed at random moments, by SIGKILL and SIGTERM in turn, and resumed: nothing may differ.

    python tests/kills.py                    # or: make kills
    python tests/kills.py --moments 3 --seed 1

A moment is a step, and a part of the time that one takes: however busy the machine, it is one of the run. Every step's
loss, before and after, and the final memory must be those of the undisturbed run to the last bit. The record goes to
results/kills/.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from transformers import TrainerCallback

import processes
import tiny
from command_line import call, jsonl, weights
from prefixmemory.files.records import provenance, write_json

STEPS, SAVE_STEPS = 90, 7
RECORD = Path(__file__).parent.parent / "results" / "kills" / "record.json"


class Losses(TrainerCallback):
    """Writes the loss of each step at once, so that it outlives the process."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = True

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            with self.file.open("a") as stream:
                stream.write(json.dumps([state.global_step, logs["loss"], logs["grad_norm"]]) + "\n")


def train(place: Path, name: str, *more: str) -> None:
    """The command line's run ``name`` of 15 epochs of 6 steps, in this process."""
    torch.set_num_threads(1)
    with mock.patch("prefixmemory.training.run.show_progress", lambda _: Losses(place / f"{name}.losses")):
        answer = call(
            "train", "--model", place / "base", "--data", place / "rows.jsonl", "--output", place / name,
            "--batch-size", 4, "--epochs", 15, "--save-steps", SAVE_STEPS, "--learning-rate", 0.01,
            "--dtype", "float32", *more,
        )  # fmt: skip
    sys.exit(answer.err if answer.code not in (0, 143) else answer.code)


def prepare(place: Path) -> float:
    """A base model, rows of different lengths, and the undisturbed run; returns how long that trained, in seconds."""
    tiny.save_tiny(place / "base")
    rows = [{"text": f"line {i} is dead" + " again" * (i % 5), "label": "abc"[i % 3]} for i in range(24)]
    jsonl(place / "rows.jsonl", rows)
    process = processes.start(train, place, "undisturbed")
    started = _begun(place / "undisturbed.partial")
    process.join()
    assert process.exitcode == 0 and [step for step, _ in losses(place, "undisturbed")] == list(range(1, STEPS + 1))
    return time.monotonic() - started


def losses(place: Path, name: str) -> list[tuple[int, list[float]]]:
    """Step, and its loss and gradient norm, in the order in which they were computed."""
    file = place / f"{name}.losses"
    lines = file.read_text().splitlines() if file.exists() else []
    return [(step, figures) for step, *figures in map(json.loads, lines)]


def same(place: Path, name: str, other: str = "undisturbed") -> bool:
    """Whether two runs had the same losses at every step, however often it was made, and the same memory in the end."""
    found, expected = losses(place, name), dict(losses(place, other))
    memory, wanted = weights(place / name), weights(place / other)
    return (
        {step for step, _ in found} == expected.keys()
        and all(figures == expected[step] for step, figures in found)
        and memory.keys() == wanted.keys()
        and all(torch.equal(memory[key], wanted[key]) for key in wanted)
    )


@dataclass
class Kill:
    """One run that was killed: by what, after which step, how its process ended, and whether it mattered."""

    signal: str
    step: int
    exit_code: int
    resumed: bool
    same: bool


def killed(place: Path, seconds: float, moments: int, seed: int) -> Iterator[Kill]:
    """Runs that are killed, and finished; one that is left alone takes ``seconds`` seconds."""
    draw = random.Random(seed)
    for number in range(moments):
        name, by = f"{seed}-{number}", (signal.SIGKILL, signal.SIGTERM)[number % 2]
        step, part = draw.randrange(STEPS - 5), draw.random()
        process = processes.start(train, place, name)
        _begun(place / f"{name}.partial")
        while len(losses(place, name)) < step and process.is_alive():
            time.sleep(0.002)
        time.sleep(part * seconds / STEPS)
        if by == signal.SIGKILL:
            process.kill()
        else:
            process.terminate()
        process.join()
        reached = max((step for step, _ in losses(place, name)), default=0)
        left = not (place / name).exists()
        if left:
            again = processes.start(train, place, name, "--resume")
            again.join()
        yield Kill(by.name, reached, process.exitcode or 0, left, same(place, name))


def _begun(partial: Path) -> float:
    """When a run has its folder, after which it may be killed."""
    end = time.monotonic() + 300
    while not ((partial / "run.json").exists() and (partial / "run.json").stat().st_size):
        assert time.monotonic() < end, partial
        time.sleep(0.005)
    return time.monotonic()


def main() -> None:
    """Thirty moments, and their record."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--moments", type=int, default=30)
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = prepare(Path(folder))
        kills = []
        for kill in killed(Path(folder), seconds, given.moments, given.seed):
            kills.append(kill)
            print(kill, flush=True)
    differ = sum(not kill.same for kill in kills)
    torch.set_num_threads(1)  # as the runs had it
    write_json(
        RECORD,
        {
            "seed": given.seed, "steps": STEPS, "save_steps": SAVE_STEPS, "seconds_undisturbed": round(seconds, 2),
            "runs_that_differ": differ, "kills": [asdict(kill) for kill in kills], **provenance(),
        },
    )  # fmt: skip
    print(f"{len(kills)} runs killed and resumed, {differ} differ from the undisturbed one. Record: {RECORD}")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
