"""What comes before all other imports: ctrl-C for ``python -m prefixmemory``, and PEFT without its back ends' remarks.

PEFT imports torchao and bitsandbytes where they are installed, and these tell on stderr of every kernel that was not
built for this machine. Only this import is quiet; what they say later is heard.
"""

import logging
import sys

_CHATTY = ("torchao", "bitsandbytes", "torch.utils._pytree")


def import_peft() -> None:
    """Import PEFT; remarks below an error are not shown."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        import peft  # noqa: F401
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def heed_interrupts() -> None:
    """As the command does it, where Python imports this package to run it, long before ``__main__.py`` can."""
    if sys.argv[:1] == ["-m"] and "-m prefixmemory " in f"{' '.join(sys.orig_argv)} ":
        from prefixmemory_cli import stop_on_interrupt

        stop_on_interrupt()


heed_interrupts()
import_peft()
