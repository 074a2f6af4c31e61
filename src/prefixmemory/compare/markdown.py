"""The figures of a comparison as Markdown tables, each with its seeds and conditions."""

from __future__ import annotations

from typing import Any

from prefixmemory.compare.over_tasks import total
from prefixmemory.compare.summary import Behind, Cell, Estimate, OnTask, Summary, TaskInfo
from prefixmemory.files.markup import in_markdown


def markdown(summary: Summary) -> str:
    """The figures as tables, each with its seeds and conditions."""
    parts = [
        f"# {in_markdown(summary.conditions['suite'])}",
        in_markdown(summary.conditions["description"]),
        _conditions(summary),
        "\n".join(f"- {in_markdown(note)}" for note in summary.notes),
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
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """``value`` for a table; a dash where there is none."""
    return "–" if value is None else f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}"  # no -0.0


def with_interval(entry: Estimate, digits: int = 1, sign: bool = False) -> str:
    """``72.3 [68.0, 76.5]``; without brackets where there is no interval."""
    low, high = number(entry.low, digits, sign), number(entry.high, digits, sign)
    return number(entry.mean, digits, sign) + ("" if entry.low is None else f" [{low}, {high}]")


def _conditions(summary: Summary) -> str:
    conditions = dict(summary.conditions)
    versions = ", ".join(f"{name} {value}" for name, value in conditions.pop("versions").items())
    lines = [
        f"- {name}: {in_markdown(_listed(value))}"
        for name, value in conditions.items()
        if name not in ("suite", "description")
    ]
    lines.append(f"- versions: {in_markdown(versions)}")
    if missing := sum(one.runs for one in summary.missing):
        lines.append(f"- **{missing} runs of this suite are missing**")
    if summary.failed:
        lines.append(f"- **{len(summary.failed)} runs failed**")
    return "\n".join(lines)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _methods(summary: Summary) -> list[str]:
    return [method.name for method in summary.methods]


def _cells(summary: Summary) -> dict[tuple[str, str], Cell]:
    return {(cell.task, cell.method): cell for cell in summary.cells}


def _averaged(summary: Summary) -> str:
    return ", ".join(in_markdown(task.name) for task in summary.tasks if task.averaged)


def _by_task(summary: Summary) -> str:
    cells, tasks = _cells(summary), summary.tasks
    rows = []
    for method in _methods(summary):
        found = [cells.get((task.name, method)) for task in tasks]
        if any(found):
            rows.append([in_markdown(method), *(_score(*one) for one in zip(found, tasks, strict=True))])
    return table(
        ["method", *(f"{in_markdown(task.name)} ({task.unit})" for task in tasks)], rows, "No run has been scored."
    )


def _score(cell: Cell | None, task: TaskInfo) -> str:
    if cell is None:
        return "–"
    made, planned = len(cell.seeds), cell.planned_seeds
    seeds = f"{made} seed{'s' * (made != 1)}" if made == planned else f"**{made} of {planned} seeds**"
    rate = "" if cell.learning_rate is None else f" at {cell.learning_rate:g}"
    return f"{with_interval(cell, task.digits)} ({number(cell.worst, task.digits)}), {seeds}{rate}"


def _averages(summary: Summary) -> str:
    rows = [
        [
            in_markdown(one.method),
            with_interval(one, summary.digits),
            number(one.worst, summary.digits),
            _of(one.collapsed, one.runs),
            f"{one.trainable_parameters:,}",
        ]
        for one in sorted(summary.averages, key=lambda one: -(one.mean or 0.0))
    ]
    head = ["method", "mean", "worst run", "below the untrained model", "trained parameters"]
    without = ", ".join(f"{in_markdown(one.method)} ({one.scored} of {one.runs} runs)" for one in summary.incomplete)
    parts = [table(head, rows, "No method is complete."), f"Not complete: {without}." if without else ""]
    return "\n\n".join(part for part in parts if part)


def _of(count: int | None, runs: int) -> str:
    return "–" if count is None else f"{count} of {runs}"


def _differences(summary: Summary) -> str:
    order = {name: place for place, name in enumerate(_methods(summary))}
    tasks = summary.tasks
    rows = [
        [
            f"{in_markdown(d.a)} − {in_markdown(d.b)}",
            with_interval(d, summary.digits, sign=True),
            f"{len(d.tasks)}",
            *(_by_seed(d.by_task.get(task.name), task) for task in tasks),
        ]
        for d in summary.differences
        if order[d.a] > order[d.b]
    ]
    return table(
        ["methods", "on average", "over tasks", *(in_markdown(task.name) for task in tasks)],
        rows,
        "No two methods have a task in common.",
    )


def _by_seed(one: OnTask | None, task: TaskInfo) -> str:
    if one is None:
        return "–"
    return f"{with_interval(one, task.digits, sign=True)}, {len(one.seeds)} seed{'s' * (len(one.seeds) != 1)}"


def _rates(summary: Summary) -> str:
    factors = sorted({one.factor for one in summary.rates})
    rows = []
    for task in summary.tasks:
        for method in _methods(summary):
            own = [one for one in summary.rates if (one.task, one.method) == (task.name, method)]
            if not any(one.tests or one.failed or one.validation is not None for one in own):
                continue
            found = []
            for factor in factors:
                one = next((one for one in own if one.factor == factor), None)
                tests = " / ".join(number(test, task.digits) for test in one.tests) if one else ""
                failed = f"{one.failed} failed" if one and one.failed else ""
                star = "*" if tests and one and one.chosen and len(factors) > 1 else ""
                found.append(" ".join(part for part in (tests + star, failed) if part) or "–")
            valid = " / ".join(number(one.validation, task.digits) for one in own)
            below = [one.below_base for one in own if one.tests]
            runs = sum(len(one.tests) for one in own)
            rows.append(
                [
                    in_markdown(task.name),
                    in_markdown(method),
                    valid,
                    *found,
                    _of(total(below), runs),
                ]
            )
    heads = [f"{factor:g} × its rate" for factor in factors]
    return table(
        ["task", "method", "validation, by rate", *heads, "below the untrained model"],
        rows,
        "No learning rate has been tried.",
    )


def _robustness(summary: Summary) -> str:
    digits, of = summary.digits, {task.name: task.digits for task in summary.tasks}
    rows = [
        [
            in_markdown(one.method),
            " / ".join(f"{number(mean, digits)} at {x:g} ×" for x, mean in zip(one.factors, one.means, strict=True)),
            number(one.worst_against_best, digits, sign=True),
            "; ".join(f"{in_markdown(task)} {number(x, of[task], sign=True)}" for task, x in one.by_task.items()),
            _of(one.below_base, one.runs),
        ]
        for one in summary.robustness
    ]
    if not rows:
        return ""
    head = ["method", "mean over tasks and seeds", "worst rate − best", "by task", "below the untrained model"]
    return "Methods whose every rate was tested with every seed:\n\n" + table(head, rows)


def _long_input(summary: Summary) -> str:
    with_lengths = [one for one in summary.averages if one.long_input]
    if not with_lengths:
        return "Not measured, or no method is complete."
    lengths = list(with_lengths[0].long_input)
    rows = [
        [in_markdown(one.method), *(_behind(one.long_input.get(length), summary.digits) for length in lengths)]
        for one in with_lengths
    ]
    return table(["method", *(f"{int(length):,} tokens" for length in lengths)], rows)


def _behind(one: Behind | None, digits: int) -> str:
    if one is None:
        return "–"
    moved = one.change.mean or one.change.low or one.change.high
    return number(one.mean, digits) + (f" ({with_interval(one.change, digits, sign=True)})" if moved else "")


def _transfer(summary: Summary) -> str:
    bases = [method.name for method in summary.methods if method.kind == "base"]
    essay = next((cell.neutral_text for cell in summary.cells if cell.method in bases), None)
    rows = [
        [
            in_markdown(one.method),
            "–" if one.transfer is None else with_interval(one.transfer.own, summary.digits),
            "–" if one.transfer is None else with_interval(one.transfer, summary.digits),
            number(one.neutral_text, 3),
            number(None if essay is None or one.neutral_text is None else one.neutral_text - essay, 3, sign=True),
        ]
        for one in summary.averages
    ]
    head = ["method", "own tasks", "other tasks", "essay, nats a token", "against the base model"]
    return table(head, rows, "No method is complete.")


def _cost(summary: Summary) -> str:
    rows = [
        [
            in_markdown(one.method),
            f"{one.trainable_parameters:,}",
            f"{one.file_bytes / 1e6:.1f} MB",
            number(one.train_seconds),
            number(one.rows_a_second, 2),
            number(one.decoding, 2),
            "–" if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 2**30:.1f} GiB",
        ]
        for one in summary.costs
        if one.trainable_parameters
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
        [
            in_markdown(cell.task),
            in_markdown(cell.method),
            "; ".join(f"{in_markdown(name)}: {number(value, 2)}" for name, value in cell.metrics.items()),
            str(len(cell.seeds)),
        ]
        for cell in summary.cells
        if cell.metrics
    ]
    return f"## Further figures\n\n{table(['task', 'method', 'mean over seeds', 'seeds'], rows)}" if rows else ""


def _failed(summary: Summary) -> str:
    rows = [
        [in_markdown(one.task), in_markdown(one.method), one.stage, "–" if one.rate is None else f"{one.rate:g}",
         str(one.seed), in_markdown(f"{one.type}: {one.message}")]
        for one in summary.failed
    ]  # fmt: skip
    head = ["task", "method", "stage", "learning rate", "seed", "error"]
    return f"## Runs that failed\n\n{table(head, rows)}" if rows else ""


def _missing(summary: Summary) -> str:
    rows = [[in_markdown(one.task), in_markdown(one.method), str(one.runs), one.why] for one in summary.missing]
    return f"## Runs that are missing\n\n{table(['task', 'method', 'runs', 'why'], rows)}" if rows else ""
