"""``prefixmemory quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixmemory_cli.common import OverwriteOption, ResumeOption, given, path, ready, resumable


def quickstart(
    output: Annotated[Path, typer.Option(parser=path, help="Folder for the trained memory.")] = Path(
        "northline-memory"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the training run.")] = 0,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate; default: the recipe's.")
    ] = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
) -> None:
    """Train a memory for SmolLM2-135M on the data that ships with the package, and show what it changed.

    \b
    Example: prefixmemory quickstart --output my-first-memory
    """
    from rich.console import Console

    from prefixmemory.quickstart import quickstart as run
    from prefixmemory.training.settings import TrainingSettings

    ready()
    with resumable(output):
        run(output, TrainingSettings(**given(seed=seed, learning_rate=learning_rate)), overwrite, resume, Console())


def remeasure(adapter: Path, out: Path) -> None:
    """Second half of the quickstart, run by it in a new process."""
    from prefixmemory.quickstart import remeasure as run

    ready()
    run(adapter, out)
