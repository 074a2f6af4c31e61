"""Errors that a user can act on: each message names the value and the fix."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import cast


class PrefixMemoryError(ValueError):
    """Something in the user's input is wrong; the message says what and how to fix it."""


class UnknownFieldError(PrefixMemoryError, TypeError):
    """A keyword that does not exist: a ``TypeError``, as Python's own, with a suggestion."""


#: What a terminal would obey, or show in another order: control characters, marks of direction, halves of pairs.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def for_terminal(text: object, most: int | None = None) -> str:
    """``text`` as a terminal may be given it: what it would obey is written out, as ``\\x1b``.

    Args:
        text: from wherever: a model, a file, a name.
        most: characters; of a longer text the middle is left out, since messages end with what to do.
    """
    shown = str(text)
    if most is not None and len(shown) > most:
        shown = f"{shown[: most * 2 // 3]} [...] {shown[-most // 3 :]}"
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], shown)


#: Names of other libraries for what is meant here.
_ELSEWHERE = {
    "r": "rank",
    "lora_r": "rank",
    "lr": "learning_rate",
    "lora_alpha": "scale",
    "lora_dropout": "dropout",
    "num_virtual_tokens": "prefix_length",
}


#: Comparing takes time that grows with the number of words and with the square of their length.
_MOST_CHOICES, _LONGEST_WORD = 20_000, 40


def did_you_mean(value: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'elu'?`` for the nearest of ``choices``, or an empty string when none is near."""
    choices = [choice for choice in choices if len(choice) <= _LONGEST_WORD]
    if len(value) > _LONGEST_WORD or len(choices) > _MOST_CHOICES:
        return ""
    if _ELSEWHERE.get(value) in choices:
        return f" Did you mean {_ELSEWHERE[value]!r}?"
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_number(
    field: str, value: object, low: float = -1e6, high: float = 1e6, what: str = "a number between -1e6 and 1e6"
) -> None:
    """Raise :class:`PrefixMemoryError` unless ``value`` is a number with ``low`` <= value < ``high``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= cast(float, value) < high:  # NaN is in no range
        raise PrefixMemoryError(f"{field}={value!r} is out of range: give {what}.")


def check_choice(field: str, value: object, choices: Iterable[str]) -> None:
    """Raise :class:`PrefixMemoryError` unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise PrefixMemoryError(
            f"{field}={value!r} is not known.{did_you_mean(str(value), choices)} Choose one of: {', '.join(choices)}."
        )


def check_positive_integer(field: str, value: object) -> None:
    """Raise :class:`PrefixMemoryError` unless ``value`` is a positive integer or ``None``."""
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        raise PrefixMemoryError(f"{field}={value!r} is out of range: give a positive integer, or None.")
