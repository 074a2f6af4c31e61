"""The questions of these tests."""

from __future__ import annotations

from served_models import BASE, MEMORIES, prompt

COUNT = 8
EVERYBODY = [BASE, *MEMORIES, "lora"]


def questions(names: list[str] = EVERYBODY) -> list[tuple[str, list[int]]]:
    """Interleaved, of different lengths; the activated memory's with and without its invocation."""
    asked = [(name, prompt(20 + 7 * row, seed=row, invoked=9)) for row in range(3) for name in names]
    return [*asked, *[(name, prompt(40, seed=9)) for name in names]]
