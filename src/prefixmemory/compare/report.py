"""The report of a suite: figures as JSON, tables in Markdown, and one page to sort and filter, without a network."""

from __future__ import annotations

from pathlib import Path

from prefixmemory.compare.markdown import markdown, with_interval
from prefixmemory.compare.summary import Summary
from prefixmemory.files.markup import in_page
from prefixmemory.files.records import write_text


def write_report(folder: Path, summary: Summary) -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.html`` into ``folder``; returns them."""
    files = [folder / f"{summary.conditions['suite']}{suffix}" for suffix in (".json", ".md", ".html")]
    summary.write(files[0])
    write_text(files[1], markdown(summary))
    write_text(files[2], in_page("compare", summary.plain()))
    return files


def outcome(summary: Summary) -> list[str]:
    """What a report comes to, for the terminal: the mean of each method, and how many runs failed."""
    lines = [f"{one.method}: {with_interval(one, summary.digits)}" for one in summary.averages]
    if summary.failed:
        lines.append(f"{len(summary.failed)} runs failed: the report says why, --retry-failed tries them again.")
    return lines
