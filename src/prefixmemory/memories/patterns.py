"""Regular expressions in configs: refused where matching one could take forever."""

from __future__ import annotations

import re
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from prefixmemory.errors import PrefixMemoryError

#: Fields of PEFT's configs that are matched against the names of modules; a list of names is not, but for the last.
FIELDS = ("target_modules", "exclude_modules", "layers_pattern")
#: Fields whose keys are.
KEYED = ("rank_pattern", "alpha_pattern", "scale_pattern", "output_limit_pattern")
LONGEST = 2000
#: How deep Python follows them into each other depends on what else the process has imported.
MOST_GROUPS = 100
#: Each quantifier without an end multiplies the steps by the length of a name.
MOST_UNBOUNDED = 6


def check_patterns(config: object) -> None:
    """Refuse patterns of a config that are no regular expressions, or that nest quantifiers.

    Raises:
        PrefixMemoryError: names the field.
    """
    found: list[tuple[str, Any]] = [(field, getattr(config, field, None)) for field in FIELDS]
    found += [(field, pattern) for field in KEYED for pattern in getattr(config, field, None) or ()]
    if isinstance(layers := getattr(config, "layers_pattern", None), list | tuple):
        found += [("layers_pattern", pattern) for pattern in layers]
    for field, pattern in found:
        if isinstance(pattern, str) and (problem := _problem(pattern)):
            raise PrefixMemoryError(
                f"{field}={pattern!r} {problem}. Give a list of names, such as target_modules=['self_attn'], or mend "
                "the expression."
            )


def _problem(pattern: str) -> str | None:
    if len(pattern) > LONGEST:
        return f"is longer than {LONGEST:,} characters"
    if (groups := pattern.count("(")) > MOST_GROUPS:
        return f"has {groups} groups; {MOST_GROUPS} may be"
    try:
        re.compile(pattern)
        unbounded = _unbounded(parser.parse(pattern), inside=False)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is not a valid regular expression ({error})"
    except _NestedError:
        return "nests quantifiers, as (a+)+ does, so that matching may take forever"
    return (
        None if unbounded <= MOST_UNBOUNDED else f"has {unbounded} quantifiers without an end; {MOST_UNBOUNDED} may be"
    )


class _NestedError(Exception):
    """A quantifier within what another repeats."""


def _unbounded(part: Any, inside: bool) -> int:
    """How many quantifiers without an end ``part`` has; ``inside``: it is repeated itself."""
    if isinstance(part, parser.SubPattern):
        return sum(_unbounded(one, inside) for one in part)
    is_step = isinstance(part, tuple) and part and isinstance(part[0], type(ops.MAX_REPEAT))  # not a group's number
    if is_step and part[0] in (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT):
        least, most, repeated = part[1]
        if inside and most != least:
            raise _NestedError
        return int(most == ops.MAXREPEAT) + _unbounded(repeated, inside or most > 1)
    return sum(_unbounded(one, inside) for one in part) if isinstance(part, tuple | list) else 0
