"""Words that were given up do not come back to what users read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = [
    *(file for end in ("py", "html", "md", "yaml") for file in (ROOT / "src").rglob(f"*.{end}")),
    *(file for file in ROOT.glob("docs/**/*.md") if file.name not in ("LOG.md", "paper.md")),
    ROOT / "README.md",
]
#: What is said instead, and the words.
GIVEN_UP = {
    "scale": r"\bdoses?\b",
    "readout": r"\bread-outs?\b",
    "Frobenius norm of the memory matrix": r"(?<!Frobenius )norm of the memory",
    "no unit where there is none": r"\(1\)[\"'`]",
}


def found(pattern: str, texts: dict[str, str]) -> list[str]:
    return [name for name, text in texts.items() if re.search(pattern, text, re.IGNORECASE)]


@pytest.mark.parametrize("instead", GIVEN_UP)
def test_a_word_that_was_given_up_is_nowhere(instead):
    texts = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in TEXTS}
    assert len(texts) > 100 and found(GIVEN_UP[instead], texts) == []


@pytest.mark.parametrize("instead", GIVEN_UP)
def test_it_would_be_found(instead):
    said = {"a": 'axis("ratio (1)"), the dose, a read-out, the norm of the memory'}
    assert found(GIVEN_UP[instead], said) == ["a"]
