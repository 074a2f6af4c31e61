"""The command line. Errors are one line on stderr and exit code 1 (2 for a wrong option); ctrl-C is 130, SIGTERM 143.

One module a group of commands; each command imports what it needs when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from prefixmemory.cli import compare, inspect, quickstart, recipes, train, use
from prefixmemory.errors import PrefixMemoryError


def _version(wanted: bool | None) -> None:
    if wanted:
        from prefixmemory import __version__

        print(f"prefixmemory {__version__}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    version: Annotated[
        bool | None, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = None,
) -> None:
    """PrefixMemory-Tuning: a trainable memory outside the softmax of every attention head."""


app.command()(quickstart.quickstart)
app.command()(train.train)
app.command()(use.evaluate)
app.command()(compare.compare)
app.command()(use.generate)
app.command()(use.chat)
app.command()(inspect.inspect)
app.command()(use.push)
app.add_typer(recipes.app, name="recipes")
app.command(hidden=True)(quickstart.remeasure)


def main() -> None:
    """Entry point: user errors become one line on stderr."""
    # A user of the command line works offline or with the Hub; either way tokenizers need no thread pool here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        raise SystemExit(app(prog_name="prefixmemory", standalone_mode=False) or 0)
    except PrefixMemoryError as error:
        _stop(str(error), 1)
    except OSError as error:  # a folder that cannot be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{error.strerror or error}.", 1)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        # typer carries its own copy of click, whose errors have no public name: a wrong option, a missing argument
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":  # the message is the help
            print(message, file=sys.stderr)
            raise SystemExit(2) from None
        command = getattr(getattr(error, "ctx", None), "command_path", "prefixmemory")
        end = "" if message.endswith((".", "?")) else "."
        _stop(f"{message}{end} `{command} --help` lists what there is.", 2)


def _stop(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code) from None
