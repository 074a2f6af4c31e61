"""Files of records that processes append to: what a reader sees after a kill, and that no line is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.jsonl import append_line, read_lines


def lines(file: Path) -> list[object]:
    return [content for _, content in read_lines(file)]


def test_what_is_appended_is_read_in_its_order(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "records.jsonl"
    assert lines(file) == []
    contents = [{"a": 1}, {"text": "two\nlines \u2028 and a separator, é"}, {"a": float("inf")}]
    for content in contents:
        append_line(file, content)
    assert lines(file) == contents
    assert file.read_text(encoding="utf-8").count("\n") == 3


def test_an_unfinished_line_is_not_read_and_gives_way_to_the_next(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    append_line(file, {"a": 1})
    with file.open("ab") as stream:
        stream.write('{"a": 2, "text": "é'.encode()[:-1])  # in the middle of a letter
    assert lines(file) == [{"a": 1}]
    append_line(file, {"a": 3})
    assert lines(file) == [{"a": 1}, {"a": 3}]


def test_a_last_line_that_lacks_its_break_is_whole(tmp_path: Path) -> None:
    """The control of the unfinished one: editors leave files so."""
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}')
    assert lines(file) == [{"a": 1}, {"a": 2}]
    append_line(file, {"a": 3})
    assert lines(file) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_damaged_line_within_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(PrefixMemoryError, match=r"records\.jsonl, line 2 is damaged"):
        lines(file)


def test_processes_that_append_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    code = (
        "import sys; from pathlib import Path; from prefixmemory.files.jsonl import append_line\n"
        "for i in range(40): append_line(Path(sys.argv[1]), {'who': sys.argv[2], 'i': i, 'filler': 'x' * 20_000})"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(file), who]) for who in "abc"]
    assert [process.wait(timeout=300) for process in started] == [0, 0, 0]
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(one["who"], one["i"]) for one in found} == {(who, i) for who in "abc" for i in range(40)}
    assert len(found) == 120
