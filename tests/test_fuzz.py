"""Spoilt files are read or refused by one of our own errors, within seconds; ``make fuzz`` tries thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

import fuzz
from fuzz import KINDS, Bench, outcome, run
from prefixmemory import PrefixMemoryError

INPUTS, SEED = 360, 0


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.usefixtures("untyped")
def test_no_spoilt_file_ends_in_anything_but_a_result_or_a_refusal(bench):
    counts, failures = run(bench, INPUTS, SEED)
    assert failures == []
    assert sum(counts.values()) == INPUTS
    # Spoilt a little, some files of each kind are good still: it is not something else that refuses them.
    assert all(counts[f"{kind} read"] and counts[f"{kind} refused"] for kind in KINDS), counts


def raising(error: BaseException) -> object:
    def read() -> None:
        raise error

    return lambda self, choice: read


def test_what_no_error_of_ours_explains_is_found(bench, monkeypatch):
    monkeypatch.setattr(Bench, "rows", raising(KeyError("x")))
    assert outcome(bench, "rows", 3, SEED) == "rows 3: KeyError: 'x'"
    monkeypatch.setattr(Bench, "rows", raising(PrefixMemoryError("x")))
    assert outcome(bench, "rows", 3, SEED) == "refused"


def test_what_does_not_end_is_found(bench, monkeypatch):
    def forever(self: Bench, choice: object) -> object:
        def read() -> None:
            while True:
                pass

        return read

    monkeypatch.setattr(fuzz, "PATIENCE", 0.1)
    monkeypatch.setattr(Bench, "rows", forever)
    assert "TooLongError" in outcome(bench, "rows", 0, SEED)


def test_an_input_is_made_again_by_its_number(bench):
    made = []
    for _ in range(2):
        outcome(bench, "recipe", 7, SEED)
        made.append(Path(bench.spoilt / "recipe.yaml").read_bytes())
    outcome(bench, "recipe", 8, SEED)
    assert made[0] == made[1] != Path(bench.spoilt / "recipe.yaml").read_bytes()
