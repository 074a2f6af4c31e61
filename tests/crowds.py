"""Two and three processes on one output folder in all combinations of plain, --resume and --overwrite, one killed.

    python tests/crowds.py                   # or: make crowds
    python tests/crowds.py --cases 9 --seed 1

Each combination, in its order, meets a folder with nothing in it, with a finished run and with an interrupted one; the
processes start at once, and one of them, drawn at random, gets SIGKILL at a random moment. All train the same, so that
whatever run stands in the folder in the end must be the undisturbed one to the last bit. The record goes to
results/crowds/.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch

import processes
import tiny
from command_line import call, jsonl, weights
from prefixmemory.files.json_text import read_object
from prefixmemory.files.records import provenance, write_json

MODES = ("plain", "--resume", "--overwrite")
COMBINATIONS = [modes for number in (2, 3) for modes in product(MODES, repeat=number)]
STATES = ("nothing", "finished", "interrupted")
#: What a folder may say of itself when nobody has it.
OWN_REFUSALS = ("already holds a finished run", "holds an interrupted run", "There is no interrupted run at")
HOLDER = re.compile(rf"belongs to a run that is going on: process (\d+) on {re.escape(socket.gethostname())} has it")
RECORD = Path(__file__).parent.parent / "results" / "crowds" / "record.json"


def train(place: Path, output: Path, mode: str, answers: Path) -> None:
    """A run of 12 steps by the command line in this process; what it said goes to a file with the process's number."""
    torch.set_num_threads(1)
    answer = call(
        "train", "--model", place / "base", "--data", place / "rows.jsonl", "--output", output, "--batch-size", 4,
        "--epochs", 2, "--save-steps", 3, "--learning-rate", 0.01, "--dtype", "float32",
        *(() if mode == "plain" else (mode,)),
    )  # fmt: skip
    (answers / str(os.getpid())).write_text("done" if answer.code == 0 else answer.err)
    sys.exit(answer.code)


def prepare(place: Path) -> float:
    """A base model, rows, the undisturbed run and an interrupted one; returns how long a run takes, in seconds."""
    tiny.save_tiny(place / "base")
    rows = [{"text": f"line {i} is dead" + " again" * (i % 5), "label": "abc"[i % 3]} for i in range(24)]
    jsonl(place / "rows.jsonl", rows)
    (place / "answers").mkdir()
    processes.start(train, place, place / "warm-up", "plain", place / "answers").join()  # the server's imports
    started = time.monotonic()
    whole = processes.start(train, place, place / "finished", "plain", place / "answers")
    whole.join()
    seconds = time.monotonic() - started
    assert whole.exitcode == 0
    begun = processes.start(train, place, place / "interrupted", "plain", place / "answers")
    while not list((place / "interrupted.partial").glob("checkpoints/*/trainer_state.json")):
        assert begun.is_alive()
        time.sleep(0.005)
    begun.kill()
    begun.join()
    (place / ".interrupted.lock").unlink(missing_ok=True)
    return seconds


@dataclass
class Case:
    """What a crowd did to a folder."""

    folder: str
    modes: tuple[str, ...]
    killed: int
    ends: list[str]
    faults: list[str]


def crowded(place: Path, seconds: float, folder: str, modes: tuple[str, ...], draw: random.Random) -> Case:
    """One crowd, and a run with --overwrite after it, which has to find a folder that is of use."""
    here = Path(tempfile.mkdtemp(dir=place))
    (here / "answers").mkdir()
    if folder == "finished":
        shutil.copytree(place / "finished", here / "out")
    elif folder == "interrupted":
        shutil.copytree(place / "interrupted.partial", here / "out.partial")
    crowd = [processes.start(train, place, here / "out", mode, here / "answers") for mode in modes]
    victim = draw.randrange(len(crowd))
    time.sleep(draw.uniform(0, 1.2 * seconds))
    crowd[victim].kill()
    for process in crowd:
        process.join()
    numbers = [process.pid or 0 for process in crowd]
    said = [_read(here / "answers" / str(number)) for number in numbers]
    ends, faults = [], []
    for number, text in zip(numbers, said, strict=True):
        holder = HOLDER.search(text)
        if text in ("done", "killed"):
            ends.append(text)
        elif holder and int(holder[1]) in set(numbers) - {number}:
            ends.append("refused, holder named")
        elif any(words in text for words in OWN_REFUSALS):
            ends.append("refused by what lies there")
        else:
            ends.append("fault")
            faults.append(text)
        if text.count("error: ") > 1 or "Traceback" in text:
            faults.append(text)
    if "done" in said or folder == "finished":
        standing = here / "out" if (here / "out").exists() else here / "out.replaced"  # killed between two renames
        faults += [] if _same(place, standing) else ["a run that was reported as done is lost"]
    after = processes.start(train, place, here / "out", "--overwrite", here / "answers")
    after.join()
    if after.exitcode or not _same(place, here / "out"):
        faults.append(f"--overwrite afterwards: {_read(here / 'answers' / str(after.pid))}")
    left = sorted(path.name for path in here.iterdir())
    faults += [] if left == ["answers", "out"] else [f"left behind: {left}"]
    shutil.rmtree(here)
    return Case(folder, modes, victim, ends, faults)


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else "killed"


def _same(place: Path, folder: Path) -> bool:
    """Whether a folder holds the undisturbed run, complete and to the last bit."""
    try:
        found, wanted = weights(folder), weights(place / "finished")
        record, expected = read_object(folder / "run.json", ""), read_object(place / "finished" / "run.json", "")
    except Exception:
        return False
    return (
        (folder / "README.md").is_file()
        and (folder / "adapter_config.json").is_file()
        and record.keys() == expected.keys()
        and found.keys() == wanted.keys()
        and all(torch.equal(found[key], wanted[key]) for key in wanted)
    )


def crowds(place: Path, seconds: float, seed: int, cases: int | None = None) -> Iterator[Case]:
    """All crowds, or ``cases`` of them drawn at random."""
    draw = random.Random(seed)
    chosen = list(product(STATES, COMBINATIONS))
    for folder, modes in chosen if cases is None else draw.sample(chosen, cases):
        yield crowded(place, seconds, folder, modes, draw)


def main() -> None:
    """All crowds, and their record."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--cases", type=int, help="so many at random; all where it is not given")
    words.add_argument("--seed", type=int, default=0)
    given = words.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = prepare(Path(folder))
        found = []
        for case in crowds(Path(folder), seconds, given.seed, given.cases):
            found.append(case)
            print(case, flush=True)
    faults, ends = sum(bool(case.faults) for case in found), Counter(end for case in found for end in case.ends)
    write_json(
        RECORD,
        {
            "seed": given.seed, "seconds_undisturbed": round(seconds, 2), "cases_with_faults": faults, "ends": ends,
            "cases": [asdict(case) for case in found], **provenance(),
        },
    )  # fmt: skip
    print(f"{len(found)} crowds, {faults} with faults; {dict(ends)}. Record: {RECORD}")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
