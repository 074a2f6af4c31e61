"""The whole suite under stand-ins for other processors, and a table of what came out.

    python -m experiments.processors --jobs 2     # or: make test-processors ARGS="--jobs 2"

MKL and PyTorch choose how they compute by the processor, the alignment of each tensor and the number of threads. Each
environment makes them choose as elsewhere. They run one after another; each has a log in ``runs/processors/<commit>``,
and an environment whose log is finished is not run again: delete a log to repeat it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from prefixmemory.files.records import provenance

ROOT = Path(__file__).parent.parent
#: Variables of each environment beside the number of threads, by the name of its log.
ENVIRONMENTS: dict[str, tuple[int, dict[str, str]]] = {
    "plain-1": (1, {}),
    "mkl-compatible-1": (1, {"MKL_CBWR": "COMPATIBLE"}),
    "mkl-avx2-1": (1, {"MKL_CBWR": "AVX2"}),
    "aten-default-1": (1, {"ATEN_CPU_CAPABILITY": "default"}),
    "aten-avx2-2": (2, {"ATEN_CPU_CAPABILITY": "avx2"}),
    "plain-2": (2, {}),
}
#: Set by none but an environment itself.
CHOICES = ("MKL_CBWR", "ATEN_CPU_CAPABILITY", "MKL_NUM_THREADS")
COUNTED = ("passed", "failed", "errors", "skipped")
#: Exit codes of pytest: all passed, some failed. Any other means that it did not come to its end.
FINISHED = (0, 1)


def variables(name: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """The environment of the process that runs the suite as ``name``."""
    threads, chosen = ENVIRONMENTS[name]
    kept = {key: value for key, value in inherited.items() if key not in CHOICES}
    # threads that turn round while they wait would take the cores from the other processes
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if threads > 1 else {}
    return {**kept, **chosen, **waiting, "OMP_NUM_THREADS": str(threads), "PREFIXMEMORY_TEST_THREADS": str(threads)}


def run(name: str, folder: Path, command: list[str]) -> bool:
    """Run the suite with its output in ``folder/name.log``, which is there once the suite came to its end."""
    partial, log = folder / f"{name}.log.partial", folder / f"{name}.log"
    with partial.open("w", encoding="utf-8") as out:
        # compiled code is cached by its source, whatever the processor that it was compiled for
        env = variables(name, os.environ) | {"TORCHINDUCTOR_CACHE_DIR": str(folder.resolve() / f"{name}.compiled")}
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT).returncode
    if code not in FINISHED:
        print(f"{name}: pytest ended with exit code {code}, see {partial}", file=sys.stderr)
        return False
    partial.replace(log)
    return True


def counts(log: str) -> dict[str, int]:
    """What pytest counted, from the last line that says how long it took."""
    summaries = re.findall(r"^=*\s*((?:\d+ \w+(?:, )?)+) in [\d.]+s", log, re.MULTILINE)
    if not summaries:
        raise ValueError("the log has no summary of pytest")
    found = {word: int(number) for number, word in re.findall(r"(\d+) (\w+)", summaries[-1])}
    found["errors"] = found.pop("error", 0) + found.get("errors", 0)
    return {word: found.get(word, 0) for word in COUNTED}


def table(folder: Path) -> str:
    """Environments and counts in Markdown."""
    lines = [f"| environment | threads | {' | '.join(COUNTED)} |", "|---|---|" + "---|" * len(COUNTED)]
    for name, (threads, chosen) in ENVIRONMENTS.items():
        log = folder / f"{name}.log"
        words = ", ".join(f"{key}={value}" for key, value in chosen.items()) or "nothing set"
        found = counts(log.read_text(encoding="utf-8")) if log.exists() else dict.fromkeys(COUNTED, "not finished")
        lines.append(f"| {words} | {threads} | {' | '.join(str(found[word]) for word in COUNTED)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """0 if every environment asked for was run and passed."""
    commit = provenance()["commit"] or "no-commit"
    parser = argparse.ArgumentParser(prog="python -m experiments.processors", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="pytest processes of an environment",
    )
    parser.add_argument("--only", nargs="+", choices=ENVIRONMENTS, default=list(ENVIRONMENTS), metavar="NAME",
                        help=f"these environments: {', '.join(ENVIRONMENTS)}")  # fmt: skip
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "processors" / commit, help="folder of the logs")
    parser.add_argument("tests", nargs="*", help="these tests, not the whole suite")
    asked = parser.parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    for name in asked.only:
        command = [sys.executable, "-m", "pytest", "-q", "--numprocesses", str(asked.jobs), *asked.tests]
        if not (asked.output / f"{name}.log").exists():
            print(f"{name}: running", file=sys.stderr, flush=True)
            run(name, asked.output, command)
    print(table(asked.output))
    logs = [asked.output / f"{name}.log" for name in asked.only]
    found = [counts(log.read_text(encoding="utf-8")) for log in logs if log.exists()]
    return int(len(found) < len(logs) or any(each["failed"] or each["errors"] for each in found))


if __name__ == "__main__":
    sys.exit(main())
