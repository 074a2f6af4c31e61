"""Measures of one text against others: numbers, SQuAD's exact match and F1, BLEU, ROUGE-L."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from prefixmemory.errors import PrefixMemoryError

_DIGITS = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
#: ``1,024``, ``-3.50``, ``$5``, ``.5``, ``2e-5``, ``3/4``; between two numbers, as in ``10-4``, a minus sign is an
#: operation.
_NUMBER = re.compile(
    rf"(?:(?<![\w.)])[-−])?\$?({_DIGITS}(?:[eE][-+]?[0-9]{{1,3}}(?![\w.]))?)(?:/({_DIGITS})(?![\w/]))?"
)
_ANSWER_MARK = "####"  # GSM8K's sign for the result
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def last_number(text: str) -> Fraction | None:
    """The number that ``text`` gives as its result: the one after ``####``, else the last one; ``None``: there is none.

    What a model writes after the line with ``####`` does not count.
    """
    _, mark, result = text.partition(_ANSWER_MARK)
    marked = _NUMBER.search(result.lstrip().partition("\n")[0]) if mark else None
    found = marked or next(reversed(list(_NUMBER.finditer(text))), None)
    if found is None:
        return None
    value, below = (Fraction((part or "1").replace(",", "")) for part in found.groups())
    value = value / below if below else value
    return -value if found[0][0] in "-−" else value


def one_number(text: str) -> Fraction | None:
    """The number that ``text`` is, blanks aside; ``None``: it is none, or holds more than one."""
    found = _NUMBER.fullmatch(text.strip())
    return None if found is None else last_number(text)


# Reading: the definitions of SQuAD's evaluate-v1.1.py


def squad_normalized(text: str) -> str:
    """``text`` in lower case, without punctuation and articles, its words one blank apart."""
    without_articles = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def squad_exact_match(said: str, right: str) -> float:
    """1.0 if both are the same once normalised, else 0.0."""
    return float(squad_normalized(said) == squad_normalized(right))


def squad_f1(said: str, right: str) -> float:
    """Harmonic mean of precision and recall of the words, in [0, 1]."""
    words, expected = squad_normalized(said).split(), squad_normalized(right).split()
    common = sum((Counter(words) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(words), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def best(measure: Callable[[str, str], float], said: str, references: Sequence[str]) -> float:
    """The highest value of ``measure`` over ``references``."""
    return max(measure(said, right) for right in references)


# Generated text


def check_text_metrics() -> None:
    """Refuse where the packages for BLEU and ROUGE are not installed."""
    for package, module in (("sacrebleu", "sacrebleu"), ("rouge-score", "rouge_score")):
        if find_spec(module) is None:
            raise PrefixMemoryError(f"scoring='text' needs {package}: pip install 'prefixmemory[compare]'.")


def bleu(said: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU of a corpus in [0, 100], as sacrebleu computes it by default (13a tokens, upper and lower case differ).

    Args:
        said: one text a row.
        references: one or more texts a row.
    """
    check_text_metrics()
    from sacrebleu import corpus_bleu

    most = max(len(row) for row in references)
    streams: Any = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    return float(corpus_bleu(list(said), streams).score)


def rouge_l(said: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """F1 of ROUGE-L in [0, 1], one per row: the best of its references, unstemmed, as rouge_score computes it."""
    check_text_metrics()
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [
        max(float(scorer.score(right, text)["rougeL"].fmeasure) for right in row)
        for text, row in zip(said, references, strict=True)
    ]


def percent(values: Sequence[float]) -> float:
    """Mean of values in [0, 1], as a percentage."""
    return 100.0 * fmean(values)
