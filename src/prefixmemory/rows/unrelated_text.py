"""Unrelated text to precede a prompt: how well does an adapter answer at the end of a long input?"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.pipes import read_text

#: An essay on the keeping of lighthouses, written for this package: about 4,900 tokens of SmolLM2.
ESSAY = Path(str(files("prefixmemory") / "data" / "lighthouses.txt"))
#: Tokens that the blank line and the seam between text and prompt may take.
SEAM = 8


def unrelated_text(tokenizer: PreTrainedTokenizerBase, tokens: int, file: Path | None = None) -> str:
    """The first ``tokens`` tokens of a text, and a blank line for a prompt to stand behind; for 0 tokens, nothing.

    Encoding the returned text again may give a token or two more or less: the blank line is added, and the last word
    may have been cut.

    Args:
        tokenizer: of the base model; it counts the tokens, without special ones.
        tokens: length of the text.
        file: a UTF-8 text; ``None``: the essay that ships with the package.

    Raises:
        PrefixMemoryError: ``tokens`` is negative, or the file cannot be read, is empty or has fewer tokens.
    """
    if tokens < 0:
        raise PrefixMemoryError(f"tokens={tokens} is out of range: give the length of the text, 0 or more.")
    ids = _ids(tokenizer, file)  # also for 0 tokens: a wrong file is found at once
    if tokens == 0:
        return ""
    if len(ids) < tokens:
        name = "the essay that ships with the package" if file is None else str(file)
        raise PrefixMemoryError(
            f"The text in front has {len(ids):,} tokens ({name}), and {tokens:,} were asked for. Give a longer text or "
            "ask for fewer."
        )
    kept = tokenizer.decode(ids[:tokens], clean_up_tokenization_spaces=False)
    assert isinstance(kept, str)
    return kept.rstrip("\ufffd") + "\n\n"  # a character of several tokens may have been cut


def context_tokens(tokenizer: PreTrainedTokenizerBase, file: Path | None = None) -> int:
    """How many tokens :func:`unrelated_text` can give at most.

    Raises:
        PrefixMemoryError: the file cannot be read or is empty.
    """
    return len(_ids(tokenizer, file))


def _ids(tokenizer: PreTrainedTokenizerBase, file: Path | None) -> list[int]:
    text = read_context(ESSAY if file is None else file)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def read_context(file: Path) -> str:
    """The text of ``file``.

    Raises:
        PrefixMemoryError: it cannot be read, or is empty.
    """
    try:
        text = read_text(file)
    except (OSError, ValueError) as error:
        raise PrefixMemoryError(
            f"The text in front, {file}, cannot be read ({error}). Give a UTF-8 text file."
        ) from error
    if not text.strip():
        raise PrefixMemoryError(f"The text in front, {file}, is empty. Give a file that holds text.")
    return text
