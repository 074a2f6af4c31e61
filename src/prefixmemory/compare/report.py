"""The report of a suite: figures as JSON, tables in Markdown, and one page to sort and filter."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixmemory.compare.page import page
from prefixmemory.compare.runs import Record, Run
from prefixmemory.compare.suite import Loaded
from prefixmemory.compare.summary import summarise
from prefixmemory.files.records import write_json

Summary = Mapping[str, Any]


def write_report(folder: Path, loaded: Loaded, records: Mapping[Run, Record]) -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.html`` into ``folder``; returns them."""
    summary = summarise(loaded, records)
    files = [folder / f"{loaded.suite.name}{suffix}" for suffix in (".json", ".md", ".html")]
    write_json(files[0], summary)
    for file, text in ((files[1], markdown(summary)), (files[2], page(summary))):
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    return files


def outcome(file: Path) -> list[str]:
    """What a report comes to, for the terminal: the mean of each method, and how many runs failed.

    Args:
        file: the ``NAME.json`` of the report.
    """
    summary = json.loads(file.read_bytes())
    lines = [f"{one['method']}: {with_interval(one)}" for one in summary["averages"]]
    if summary["failed"]:
        lines.append(f"{len(summary['failed'])} runs failed: the report says why, --retry-failed tries them again.")
    return lines


def markdown(summary: Summary) -> str:
    """The figures as tables, each with its seeds and conditions."""
    conditions = summary["conditions"]
    parts = [
        f"# {conditions['suite']}",
        conditions["description"],
        _conditions(summary),
        "\n".join(f"- {note}" for note in summary["notes"]),
        "## Score by task\n\nMean over seeds, [95 % interval], the worst seed in brackets.",
        _by_task(summary),
        f"## Averages over {_averaged(summary)}\n\nOf the methods whose every run has a score.",
        _averages(summary),
        "## Differences\n\nPaired by task, seed and row; 95 % bootstrap interval over seeds and rows, each for itself: "
        "nothing is added for looking at many of them.",
        _differences(summary),
        "## Learning rates\n\nScore on the test rows, one seed beside the other. `*`: the rate that was chosen by the "
        "validation rows.",
        _rates(summary),
        _robustness(summary),
        "## Behind unrelated text\n\nMean over tasks and seeds behind so many tokens of text, and in brackets the "
        "change against the same rows behind nothing.",
        _long_input(summary),
        "## Other tasks, and what is forgotten\n\nAnother task's test rows with one of its examples a label in the "
        "prompt, and the likelihood of an essay that no task has to do with.",
        _transfer(summary),
        "## Cost",
        _cost(summary),
        _metrics(summary),
        _failed(summary),
        _missing(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: list[str], rows: list[list[str]], empty: str = "No run of it has been scored.") -> str:
    """A Markdown table, or ``empty`` where it has no rows."""
    if not rows:
        return empty
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (head, ["---"] * len(head), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """``value`` for a table; a dash where there is none."""
    return "–" if value is None else f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"  # no -0.0


def with_interval(entry: Mapping[str, Any], sign: bool = False) -> str:
    """``72.3 [68.0, 76.5]``; without brackets where there is no interval."""
    low, high = (number(entry[name], sign=sign) for name in ("low", "high"))
    return number(entry["mean"], sign=sign) + ("" if entry["low"] is None else f" [{low}, {high}]")


def _conditions(summary: Summary) -> str:
    conditions = dict(summary["conditions"])
    versions = ", ".join(f"{name} {value}" for name, value in conditions.pop("versions").items())
    lines = [
        f"- {name}: {_listed(value)}" for name, value in conditions.items() if name not in ("suite", "description")
    ]
    lines.append(f"- versions: {versions}")
    if missing := sum(one["runs"] for one in summary["missing"]):
        lines.append(f"- **{missing} runs of this suite are missing**")
    if summary["failed"]:
        lines.append(f"- **{len(summary['failed'])} runs failed**")
    return "\n".join(lines)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _names(summary: Summary, field: str = "methods") -> list[str]:
    return [one["name"] for one in summary[field]]


def _cells(summary: Summary) -> dict[tuple[str, str], Any]:
    return {(cell["task"], cell["method"]): cell for cell in summary["cells"]}


def _averaged(summary: Summary) -> str:
    return ", ".join(task["name"] for task in summary["tasks"] if task["averaged"])


def _by_task(summary: Summary) -> str:
    cells, tasks = _cells(summary), summary["tasks"]
    rows = []
    for method in _names(summary):
        found = [cells.get((task["name"], method)) for task in tasks]
        if any(found):
            rows.append([method, *(_score(cell) for cell in found)])
    return table(["method", *(f"{task['name']} ({task['unit']})" for task in tasks)], rows, "No run has been scored.")


def _score(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    made, planned = len(cell["seeds"]), cell["planned_seeds"]
    seeds = f"{made} seed{'s' * (made != 1)}" if made == planned else f"**{made} of {planned} seeds**"
    rate = "" if cell["learning_rate"] is None else f" at {cell['learning_rate']:g}"
    return f"{with_interval(cell)} ({cell['worst']:.1f}), {seeds}{rate}"


def _averages(summary: Summary) -> str:
    rows = [
        [
            one["method"],
            with_interval(one),
            number(one["worst"]),
            _of(one["collapsed"], one["runs"]),
            f"{one['trainable_parameters']:,}",
        ]
        for one in sorted(summary["averages"], key=lambda one: -one["mean"])
    ]
    head = ["method", "mean", "worst run", "below the base model", "trained parameters"]
    without = ", ".join(f"{one['method']} ({one['scored']} of {one['runs']} runs)" for one in summary["incomplete"])
    parts = [table(head, rows, "No method is complete."), f"Not complete: {without}." if without else ""]
    return "\n\n".join(part for part in parts if part)


def _of(count: int | None, runs: int) -> str:
    return "–" if count is None else f"{count} of {runs}"


def _differences(summary: Summary) -> str:
    order = {name: place for place, name in enumerate(_names(summary))}
    tasks = _names(summary, "tasks")
    rows = [
        [
            f"{d['a']} − {d['b']}",
            with_interval(d, sign=True),
            f"{len(d['tasks'])}",
            *(_by_seed(d["by_task"].get(task)) for task in tasks),
        ]
        for d in summary["differences"]
        if order[d["a"]] > order[d["b"]]
    ]
    return table(["methods", "on average", "over tasks", *tasks], rows, "No two methods have a task in common.")


def _by_seed(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "–"
    return f"{with_interval(one, sign=True)}, {len(one['seeds'])} seed{'s' * (len(one['seeds']) != 1)}"


def _rates(summary: Summary) -> str:
    factors = sorted({one["factor"] for one in summary["rates"]})
    rows = []
    for task in _names(summary, "tasks"):
        for method in _names(summary):
            own = [one for one in summary["rates"] if (one["task"], one["method"]) == (task, method)]
            if not any(one["tests"] or one["failed"] or one["validation"] is not None for one in own):
                continue
            found = []
            for factor in factors:
                one = next((one for one in own if one["factor"] == factor), None)
                tests = " / ".join(map(number, one["tests"])) if one else ""
                failed = f"{one['failed']} failed" if one and one["failed"] else ""
                star = "*" if tests and one and one["chosen"] else ""
                found.append(" ".join(part for part in (tests + star, failed) if part) or "–")
            valid = " / ".join(number(one["validation"]) for one in own)
            below = [one["below_base"] for one in own if one["tests"]]
            runs = sum(len(one["tests"]) for one in own)
            rows.append([task, method, valid, *found, _of(None if None in below else sum(below), runs)])
    heads = [f"{factor:g} × its rate" for factor in factors]
    return table(
        ["task", "method", "validation, by rate", *heads, "below the base model"],
        rows,
        "No learning rate has been tried.",
    )


def _robustness(summary: Summary) -> str:
    rows = [
        [
            one["method"],
            " / ".join(
                f"{mean:.1f} at {factor:g} ×" for factor, mean in zip(one["factors"], one["means"], strict=True)
            ),
            number(one["worst_against_best"], sign=True),
            "; ".join(f"{task} {number(change, sign=True)}" for task, change in one["by_task"].items()),
            _of(one["below_base"], one["runs"]),
        ]
        for one in summary["robustness"]
    ]
    if not rows:
        return ""
    head = ["method", "mean over tasks and seeds", "worst rate − best", "by task", "below the base model"]
    return "Methods whose every rate was tested with every seed:\n\n" + table(head, rows)


def _long_input(summary: Summary) -> str:
    with_lengths = [one for one in summary["averages"] if one["long_input"]]
    if not with_lengths:
        return "Not measured, or no method is complete."
    lengths = list(with_lengths[0]["long_input"])
    rows = [[one["method"], *(_behind(one["long_input"].get(length)) for length in lengths)] for one in with_lengths]
    return table(["method", *(f"{int(length):,} tokens" for length in lengths)], rows)


def _behind(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "–"
    moved = one["change"]["mean"] or one["change"]["low"] or one["change"]["high"]
    return number(one["mean"]) + (f" ({with_interval(one['change'], sign=True)})" if moved else "")


def _transfer(summary: Summary) -> str:
    bases = [method["name"] for method in summary["methods"] if method["kind"] == "base"]
    essay = next((cell["neutral_text"] for cell in summary["cells"] if cell["method"] in bases), None)
    rows = [
        [
            one["method"],
            "–" if one["transfer"] is None else with_interval(one["transfer"]["own"]),
            "–" if one["transfer"] is None else with_interval(one["transfer"]),
            number(one["neutral_text"], 3),
            "–" if None in (essay, one["neutral_text"]) else number(one["neutral_text"] - essay, 3, sign=True),
        ]
        for one in summary["averages"]
    ]
    head = ["method", "own tasks", "other tasks", "essay, nats a token", "against the base model"]
    return table(head, rows, "No method is complete.")


def _cost(summary: Summary) -> str:
    rows = [
        [
            one["method"],
            f"{one['trainable_parameters']:,}",
            f"{one['file_bytes'] / 1e6:.1f} MB",
            number(one["train_seconds"]),
            number(one["rows_a_second"], 2),
            number(one["decoding"], 2),
            "–" if one["peak_memory_bytes"] is None else f"{one['peak_memory_bytes'] / 2**30:.1f} GiB",
        ]
        for one in summary["costs"]
        if one["trainable_parameters"]
    ]
    note = (
        "Means over all final runs. Speeds were measured while other runs may have shared the machine: compare with "
        "care. Writing is relative to the base model in the same run; memory is the most of any run, scoring included."
    )
    head = ["method", "trained parameters", "file", "seconds of training", "rows a second", "writing speed",
            "peak memory (GPU)"]  # fmt: skip
    return f"{note}\n\n{table(head, rows, 'No trained method has been scored.')}"


def _metrics(summary: Summary) -> str:
    rows = [
        [cell["task"], cell["method"], "; ".join(f"{name}: {number(v, 2)}" for name, v in cell["metrics"].items()),
         str(len(cell["seeds"]))]
        for cell in summary["cells"]
        if cell["metrics"]
    ]  # fmt: skip
    return f"## Further figures\n\n{table(['task', 'method', 'mean over seeds', 'seeds'], rows)}" if rows else ""


def _failed(summary: Summary) -> str:
    rows = [
        [one["task"], one["method"], one["stage"], "–" if one["rate"] is None else f"{one['rate']:g}",
         str(one["seed"]), f"{one['type']}: {one['message']}".replace("\n", " ")]
        for one in summary["failed"]
    ]  # fmt: skip
    head = ["task", "method", "stage", "learning rate", "seed", "error"]
    return f"## Runs that failed\n\n{table(head, rows)}" if rows else ""


def _missing(summary: Summary) -> str:
    rows = [[one["task"], one["method"], str(one["runs"]), one["why"]] for one in summary["missing"]]
    return f"## Runs that are missing\n\n{table(['task', 'method', 'runs', 'why'], rows)}" if rows else ""
