"""What the commands share: options, the end of start-up, and what an interrupted run says."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished run once the new one is complete.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
AdapterArgument = Annotated[str | None, typer.Argument(help="Trained adapter: a folder, or a Hub id.")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="The same, as an option.")]
TemperatureOption = Annotated[float, typer.Option(help="0: always the likeliest token; above: drawn.")]
TopPOption = Annotated[
    float | None, typer.Option("--top-p", help="Draw among the likeliest tokens that make up this share.")
]
DrawSeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the draw, for the same answer again.")]
BaseOption = Annotated[
    str | None, typer.Option("--model", help="Base model, when it is not where the adapter's config says.")
]


def put(text: object) -> None:
    """Print what a model, a file or a user's name is part of."""
    from prefixmemory.errors import for_terminal

    print(for_terminal(text))


def path(text: str) -> Path:
    """A path of the command line; a shell leaves the ``~`` of ``--output=~/memory`` as it is."""
    return Path(text).expanduser()


def one_adapter(argument: str | None, option: str | None) -> str:
    """The adapter that was named, in either of the two ways."""
    name = argument or option
    if not name or (argument and option):
        raise typer.BadParameter("give one trained adapter, a folder or a Hub id", param_hint="'adapter'")
    return name


def given(**values: Any) -> dict[str, Any]:
    """The options that were given, so that defaults live in one place."""
    return {name: value for name, value in values.items() if value is not None}


def ready() -> None:
    """End the start-up of a command, once it has imported what it needs.

    Libraries say nothing beside our own lines, and ctrl-C is an exception that the command can catch.
    """
    from prefixmemory.training.run import quiet_libraries

    quiet_libraries()
    warnings.showwarning = _in_one_line
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    from prefixmemory.errors import for_terminal

    print(f"warning: {for_terminal(str(message), 1000)}", file=sys.stderr)


def check_room_for(output: Path) -> None:
    """Refuse a place where nothing can be written, before hours of work are to go there.

    Raises:
        PrefixMemoryError: says why.
    """
    from prefixmemory.errors import PrefixMemoryError

    nearest = next(folder for folder in output.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise PrefixMemoryError(f"{nearest} is a file, so that {output} cannot be made. Give another name.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PrefixMemoryError(f"Nothing can be written into {nearest}. Give another name for {output.name}.")


@contextmanager
def resumable(output: Path) -> Iterator[None]:
    """Turn an interrupted run into the message that says how to go on, and exit code 130 (143 after SIGTERM)."""
    from prefixmemory.training.checkpoints import last_complete_checkpoint
    from prefixmemory.training.interrupt import Interrupted, say_to_stderr
    from prefixmemory.training.output import Output

    try:
        yield
    except Interrupted as stopped:
        words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        say_to_stderr(Output(output).interrupted_message(shlex.join(["prefixmemory", *words])))
        raise SystemExit(stopped.exit_status) from None
    except KeyboardInterrupt:  # typer would exit without a word
        kept = Output(output).partial
        there = last_complete_checkpoint(kept / "checkpoints")
        where = "" if there is None else f" What was done until the last checkpoint is kept in {kept}."
        say_to_stderr(f"Stopped.{where}")
        raise SystemExit(130) from None
