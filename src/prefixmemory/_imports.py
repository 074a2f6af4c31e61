"""Import PEFT once, without the remarks of its optional back ends.

PEFT imports torchao and bitsandbytes where they are installed, and these tell on stderr of every kernel that was not
built for this machine. Only this import is quiet; what they say later is heard.
"""

import logging

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


import_peft()
