"""The records in results/: they can be read, and the tables that the docs link to are what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixmemory.compare.markdown import markdown
from prefixmemory.compare.records import RECORDS, read_records
from prefixmemory.compare.store import Store
from prefixmemory.compare.suite import load_suite
from prefixmemory.compare.summarise import summarise
from prefixmemory.compare.work import checksums, state

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
FOLDERS = sorted(file.parent for file in (ROOT / "results" / "compare").glob(f"*/{RECORDS}"))
SUITES = sorted(file for folder in FOLDERS for file in folder.glob("*.yaml"))


def test_there_are_some() -> None:
    assert len(FOLDERS) >= 3 and len(SUITES) >= 5


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_record_can_be_read_and_has_its_scores(folder: Path) -> None:
    records = list(read_records(folder / RECORDS))
    assert records and all(record.failure is None for record in records)
    assert len({record.key for record in records}) == len(records)


@pytest.mark.parametrize("suite", sorted((ROOT / "experiments" / "compare").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_suite_to_run_next_treats_all_methods_alike(suite: Path) -> None:
    """The same grid is the suite's own; no method has settings that the others lack."""
    loaded = load_suite(suite)
    assert len(loaded.suite.rate_factors) == 5
    assert not [method.name for method in loaded.methods.values() if method.training]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize("suite", SUITES, ids=lambda file: file.stem)
def test_a_table_is_what_its_records_say(suite: Path) -> None:
    loaded = load_suite(suite)
    store = Store(suite.parent, loaded, checksums(loaded, SHARED))
    summary = summarise(loaded, state(store)[1])
    assert not summary.missing
    assert markdown(summary) == suite.with_suffix(".md").read_text(encoding="utf-8")
