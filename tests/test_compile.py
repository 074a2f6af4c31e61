"""torch.compile takes a model with memories whole, and swapping adapters by copy never compiles again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("query", ["content", "rotary"])
def test_compiled_equals_eager_and_swaps_do_not_recompile(query):
    # In a process of its own: the shape checks that conftest switches on are Python that no graph can hold.
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_checks.py"), query, "inductor"],
        env={**os.environ, "PREFIXMEMORY_SHAPES": "0"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.endswith("all ok\n"), done.stdout
