"""``written_answers`` of a suite: answers that a judge can score, one file a final run."""

from __future__ import annotations

import json

import yaml

from command_line import call, jsonl, save_talker
from prefixmemory.compare.records import RECORDS, Run, read_records
from prefixmemory.compare.runs import key
from prefixmemory.compare.suite import load_suite

ROWS = [{"instruction": f"Say {word} twice.", "output": f"{word} {word}"} for word in ["one", "two", "six", "ten"]]
TASK = {
    "name": "saying",
    "version": 1,
    "description": "Saying a word twice.",
    "licence": "ours",
    "scoring": "loss",
    "train": "train.jsonl",
    "test": "test.jsonl",
    "max_new_tokens": 5,
}
SUITE = {
    "name": "tiny",
    "model": "base",
    "dtype": "float32",
    "tasks": ["saying.yaml"],
    "methods": ["base", "prefixmemory", {"use": "in-context", "shots": 1}],
    "seeds": [3],
    "rate_factors": [1],
    "validation_rows": 1,
    "test_rows": 4,
    "training": {"epochs": 1, "batch_size": 2},
}


def write(folder, **changes):
    folder.mkdir(exist_ok=True)
    if not (folder / "base").exists():
        save_talker(folder / "base")
    jsonl(folder / "train.jsonl", ROWS)
    jsonl(folder / "test.jsonl", ROWS)
    (folder / "saying.yaml").write_text(yaml.safe_dump(TASK))
    suite = folder / "suite.yaml"
    suite.write_text(yaml.safe_dump({**SUITE, "model": str(folder / "base"), **changes}))
    return suite


def test_final_runs_leave_answers_that_alpaca_eval_reads(tmp_path):
    assert (answer := call("compare", write(tmp_path, written_answers=3))).code == 0, answer.err
    files = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "tiny" / "outputs").iterdir()}
    finals = {record.key for record in read_records(tmp_path / "tiny" / RECORDS) if record.run.stage == "final"}
    assert {name.rpartition("-")[2] for name in files} == finals and len(files) == 3
    asked = {row["instruction"] for row in ROWS}
    for name, rows in files.items():
        assert len(rows) == 3 and len({row["instruction"] for row in rows} & asked) == 3
        assert all(row.keys() == {"instruction", "output", "generator", "dataset"} for row in rows)
        assert {row["generator"] for row in rows} == {f"{name.split('-final')[0].removeprefix('saying-')}, seed 3"}
        assert {row["dataset"] for row in rows} == {"saying"} and any(row["output"] for row in rows)
    said = {name.split("-final")[0]: [row["output"] for row in rows] for name, rows in files.items()}
    assert said["saying-base"] != said["saying-in-context"]  # which has an example in front


def test_nothing_is_written_unless_asked_for_and_only_then_the_key_changes(tmp_path):
    assert (answer := call("compare", write(tmp_path / "without", methods=["base"]))).code == 0, answer.err
    assert not (tmp_path / "without" / "tiny" / "outputs").exists()

    def name(**changes):
        return key(
            load_suite(write(tmp_path / "keys", **changes)), Run("saying", "base", "final", None, 3), {"saying": ""}
        )

    assert name() == name(written_answers=0) != name(written_answers=3) != name(written_answers=2)
