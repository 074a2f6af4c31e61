"""docs/guides/compare.md: its files and commands, in the order of the page, with a tiny model for SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from command_line import call_line, code_blocks, jsonl, save_talker
from prefixmemory.compare.method import load_method, shipped_methods
from prefixmemory.compare.records import read_records
from prefixmemory.tasks.task import SCORED_ROWS

PAGE = (Path(__file__).parent.parent / "docs" / "guides" / "compare.md").read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files, with more rows of the page's kind."""
    monkeypatch.chdir(tmp_path)
    save_talker(tmp_path / "base")
    blocks = code_blocks(PAGE)
    rows = [json.loads(line) for kind, text in blocks if kind == "json" for line in text.splitlines()]
    assert {row["label"] for row in rows} == {"repair", "delivery", "invoice"}
    for name, count in (("train", 15), ("test", 10)):
        jsonl(tmp_path / f"{name}.jsonl", [{**row, "text": f"{row['text']} {i}"} for i in range(count) for row in rows])
    task, suite, method = (text for kind, text in blocks if kind == "yaml")
    (tmp_path / "tickets.yaml").write_text(task)
    # the tiny model reads fewer tokens than the page's long input
    small = {"model: smollm2": "model: base", "long_input: [300]": "long_input: [30]"}
    for theirs, ours in small.items():
        assert theirs in suite
        suite = suite.replace(theirs, ours)
    (tmp_path / "suite.yaml").write_text(suite)
    (tmp_path / "memory.yaml").write_text(method)
    return tmp_path


def test_the_page_from_top_to_bottom(place):
    commands = [text.strip() for kind, text in code_blocks(PAGE) if kind == "bash"]
    assert len(commands) == 2 and commands[1] == f"{commands[0]} --report"
    for command in commands:
        answer = call_line(command)
        assert answer.code == 0, answer.err
        names = ["tickets-comparison/tickets-comparison" + suffix for suffix in (".json", ".md", ".html")]
        assert answer.out.split() == names
    summary = json.loads(Path(names[0]).read_text())
    assert not summary["missing"] and not summary["failed"]
    assert {cell["method"] for cell in summary["cells"]} == {"base", "rslora", "prefixmemory-blocks"}
    assert len(list(read_records(Path("tickets-comparison/records.jsonl")))) == 1 + 2 * (3 + 3)
    assert all("Six messages a team" in Path(name).read_text() for name in names[1:])


def test_a_method_of_ones_own_is_one_more_file(place):
    suite = yaml.safe_load(Path("suite.yaml").read_text())
    suite |= {"methods": ["memory.yaml"], "rate_factors": [1], "seeds": [0]}
    Path("suite.yaml").write_text(yaml.safe_dump(suite))
    assert call_line("prefixmemory compare suite.yaml").code == 0
    (record,) = read_records(Path("tickets-comparison/records.jsonl"))
    assert record.run.method == "memory-rank-2" and record.training.adapter["rank"] == 2


def test_the_page_names_all_methods_and_scorings():
    for name in [*shipped_methods(), *SCORED_ROWS]:
        assert f"`{name}`" in PAGE, name
    assert load_method("prefixmemory").learning_rate
