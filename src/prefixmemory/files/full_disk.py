"""What a full disk looks like, by whatever library it is reported."""

from __future__ import annotations

import errno
import re

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Of libraries that write files in C++ and Rust, torch and safetensors: their errors have no number.
_WORDS = re.compile(
    r"PytorchStreamWriter failed|file write failed|iostream error|unexpected pos|os error (27|28|122)\b|No space left"
)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error``, or one that led to it, means that a file could not be written to its end."""
    while error is not None:
        in_words = not isinstance(error, OSError) and _WORDS.search(str(error)) is not None
        if in_words or (isinstance(error, OSError) and error.errno in _NUMBERS):
            return True
        error = error.__cause__ or error.__context__
    return False
