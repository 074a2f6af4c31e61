"""``prefixmemory compare``: run a suite of tasks and methods, and report on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixmemory_cli.common import path, put, ready


def compare(
    suite: Annotated[Path, typer.Argument(parser=path, help="YAML file with model, tasks, methods and seeds.")],
    data: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder of the tasks' data; without it, their own files or the Hub."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=path, help="Folder of records and report; default: beside the suite, with its name."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray (an existing cluster, or one on this machine).")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the runs.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; report on the records there are.")] = False,
    keep_adapters: Annotated[
        bool, typer.Option("--keep-adapters", help="Leave the trained adapters in work/.")
    ] = False,
) -> None:
    """Compare PEFT methods on tasks: learning rates by validation, then every seed on the test rows.

    What has a record is not run again; a stopped comparison goes on where it stood.

    \b
    Example: prefixmemory compare suite.yaml --output tickets-compared
    Example: prefixmemory compare suite.yaml --output tickets-compared --report
    """
    from rich.console import Console

    from prefixmemory.compare.engines import ENGINES, run_suite
    from prefixmemory.compare.report import outcome, write_report
    from prefixmemory.compare.store import Store
    from prefixmemory.compare.suite import load_suite
    from prefixmemory.compare.summarise import summarise
    from prefixmemory.compare.work import checksums, forget_work, state
    from prefixmemory.errors import PrefixMemoryError, check_choice
    from prefixmemory.progress import say

    ready()
    check_choice("--engine", engine, ENGINES)
    loaded = load_suite(suite)
    if data is not None and not data.is_dir():
        raise PrefixMemoryError(f"--data {data} is no folder. Give the one that holds the tasks' folders.")
    folder = output or suite.parent / loaded.suite.name
    store = Store(folder, loaded, checksums(loaded, data))
    console = Console(stderr=True)
    if not report:
        try:
            run_suite(ENGINES[engine], suite, store, data, workers, retry_failed, console)
        except KeyboardInterrupt:  # typer would exit without a word
            say(console, f"Stopped. The records in {folder} are kept; the same command goes on.")
            raise SystemExit(130) from None
        if not keep_adapters:
            forget_work(store)
    _, records = state(store)
    if not records:
        raise PrefixMemoryError(f"{folder} holds no records of {suite}. Run it first, without --report.")
    summary = summarise(loaded, records)
    files = write_report(folder, summary)
    for line in outcome(summary):
        say(console, line)
    for file in files:
        put(file)
