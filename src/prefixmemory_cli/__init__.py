"""The ``prefixmemory`` command: its entry point, which imports nothing that takes time.

A package of its own, because importing :mod:`prefixmemory` imports PEFT, transformers and torch: seconds that
``--help`` should not cost. Its modules import typer at their top and :mod:`prefixmemory` in their functions.
Errors are one line on stderr and exit code 1 (2 for a wrong option); ctrl-C is 130.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

#: Characters of an error; more is what a file or an argument holds, not what there is to say.
LONGEST_LINE = 2000
#: Modules that the extra ``cli`` installs.
_EXTRA = ("accelerate", "datasets", "pydantic", "pydantic_core", "rich", "typer", "yaml")


def main() -> None:
    """Run the command that ``sys.argv`` names."""
    before = stop_on_interrupt()
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)  # what has ended is not stopped, in a traceback
    # A user of the command line works offline or with the Hub; either way tokenizers need no thread pool here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from prefixmemory_cli.app import app

        raise SystemExit(app(prog_name="prefixmemory", standalone_mode=False) or 0)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        _stop(f"{package} is missing, which the commands need. Install it: pip install 'prefixmemory[cli]'", 1)
    except OSError as error:  # a folder that cannot be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{error.strerror or error}.", 1)
    except Exception as error:
        if hasattr(error, "format_message"):
            _explain_usage(error)
        _explain(error)
    finally:
        signal.signal(signal.SIGINT, before)


def stop_on_interrupt() -> Any:
    """Leave at ctrl-C with one line, until the command has begun; returns the handler before."""
    return signal.signal(signal.SIGINT, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    """Ctrl-C during start-up, when nothing can be lost: an exception amid the imports would be wrapped or swallowed."""
    os.write(2, b"Stopped.\n")
    os._exit(130)


def _explain_usage(error: Exception) -> NoReturn:
    """Typer carries its own copy of click, whose errors have no public name: a wrong option, a missing argument."""
    message: str = error.format_message()  # type: ignore[attr-defined]
    if type(error).__name__ == "NoArgsIsHelpError":  # the message is the help
        print(message, file=sys.stderr)
        raise SystemExit(2) from None
    command = getattr(getattr(error, "ctx", None), "command_path", "prefixmemory")
    end = "" if message.endswith((".", "?")) else "."
    _stop(f"{message}{end} `{command} --help` lists what there is.", 2)


def _explain(error: Exception) -> NoReturn:
    """What went wrong, in one line, whoever raised it; what nobody foresaw has a place, for a report."""
    import traceback

    from prefixmemory.errors import PrefixMemoryError
    from prefixmemory.files.full_disk import is_disk_full

    if isinstance(error, PrefixMemoryError):
        _stop(str(error), 1)
    if is_disk_full(error):
        _stop(f"A file could not be written to its end ({error}). Is the disk full?", 1)
    if os.environ.get("PREFIXMEMORY_TRACEBACK"):
        raise error
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "prefixmemory" in frame.filename]
    place = f" in {os.path.basename(frames[-1].filename)}, line {frames[-1].lineno}" if frames else ""
    _stop(
        f"{type(error).__name__}{place}: {str(error)[:500].rstrip('.')}. Nobody foresaw this: please report it, with "
        "what PREFIXMEMORY_TRACEBACK=1 shows.",
        1,
    )


def _stop(message: str, code: int) -> NoReturn:
    line = f"error: {' '.join(message.split())}"
    if not line.isprintable() or len(line) > LONGEST_LINE:
        from prefixmemory.errors import for_terminal

        line = for_terminal(line, LONGEST_LINE)
    print(line, file=sys.stderr)
    raise SystemExit(code) from None
