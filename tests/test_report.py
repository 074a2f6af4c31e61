"""Reports of comparisons at every stage: what they say, and that they never stand in the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import call
from compared import failed, final, finals, made_suite, nats, scored, tries, write_suite
from prefixmemory.compare.markdown import markdown
from prefixmemory.compare.records import Record, Run
from prefixmemory.compare.report import outcome, write_report
from prefixmemory.compare.runs import planned, rates
from prefixmemory.compare.store import Store
from prefixmemory.compare.suite import Loaded, load_suite
from prefixmemory.compare.summarise import summarise
from prefixmemory.compare.summary import digits_of
from prefixmemory.compare.work import checksums
from prefixmemory.compare.work import line as line_about

HIT, MISS = 100.0, 0.0
Records = dict[Run, Record]
Stage = Callable[[Loaded], Records]


def base_alone(loaded: Loaded) -> Records:
    return finals(loaded, "north", "base", [[HIT, MISS, MISS, MISS]], {})


def only_rates(loaded: Loaded) -> Records:
    return tries(loaded, "north", "lora-attention", [50, 80, 60])


def some_rates_failed(loaded: Loaded) -> Records:
    records = tries(loaded, "north", "lora-attention", [50, 80, 60])
    return {run: failed(run) if i else record for i, (run, record) in enumerate(records.items())}


def every_rate_failed(loaded: Loaded) -> Records:
    return base_alone(loaded) | {run: failed(run) for run in only_rates(loaded)}


def one_final_run(loaded: Loaded) -> Records:
    records = only_rates(loaded)
    made = finals(loaded, "north", "lora-attention", [[HIT, HIT, MISS, MISS]] * 3, records)
    return records | dict(list(made.items())[:1])


def a_method_without_records(loaded: Loaded) -> Records:
    records = {run: r for run, r in whole(loaded).items() if run.method != "prefixmemory"}
    return records


def final_runs_failed(loaded: Loaded) -> Records:
    return {run: failed(run, "a | b") if run.stage == "final" else record for run, record in whole(loaded).items()}


def scores_without_a_number(loaded: Loaded) -> Records:
    nan = scored([math.nan] * 4)
    return {run: replace(r, test=nan) if run.stage == "final" else r for run, r in whole(loaded).items()}


def whole(loaded: Loaded) -> Records:
    records: Records = {}
    for task in loaded.tasks:
        for method, own in loaded.methods.items():
            if own.is_trained:
                records |= tries(loaded, task, method, [50, 80, 60])
            seeds = 1 if method == "base" else 3
            records |= finals(loaded, task, method, [[HIT, MISS, HIT, MISS]] * seeds, records)
    return records


STAGES: dict[Stage, list[str]] = {
    base_alone: ["25.0 [0.0, 66.7] (25.0), 1 seed |", "No learning rate has been tried", "Not complete: base (1 of 2"],
    only_rates: ["No run has been scored.", "50.0 / 80.0 / 60.0", "**23 runs of this suite are missing**"],
    some_rates_failed: ["50.0 / – / –", "1 failed", "**2 runs failed**", "| rate | 0.003 | 0 | OutOfMemoryError: CUDA"],
    every_rate_failed: ["not run: every learning rate failed", "**3 runs failed**", "25.0 ["],
    one_final_run: ["**1 of 3 seeds** at 0.003", "No method is complete.", "intervals are over rows alone"],
    a_method_without_records: ["lora-attention − base | +0.0", "prefixmemory (0 of 6 runs)", "| 6 | not run yet |"],
    final_runs_failed: ["No run has been scored.", "a \\| b", "**14 runs failed**"],
    scores_without_a_number: ["its score is nan", "**14 runs failed**", "No run has been scored."],
    whole: ["| lora-attention | 50.0 [", "0 of 6 |", "50.0 / 50.0 / 50.0*"],
}


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_the_command_reports_at_every_stage(stage: Stage, tmp_path: Path) -> None:
    file = write_suite(tmp_path)
    loaded = load_suite(file)
    store = Store(tmp_path / "out", loaded, checksums(loaded, None))
    records = stage(loaded)
    for run, record in records.items():
        store.write(replace(record, key=store.key(run)))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.jsonl")}
    said = call("compare", file, "--output", tmp_path / "out", "--report").success
    written = [tmp_path / "out" / f"made-by-hand{suffix}" for suffix in (".json", ".md", ".html")]
    assert said.split() == [str(path) for path in written]
    text = written[1].read_text()
    for words in STAGES[stage]:
        assert words in text, text
    assert ("missing**" in text) == (stage not in (whole, final_runs_failed, scores_without_a_number))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    summary = json.loads(written[0].read_text(), parse_constant=refuse)
    assert summary["conditions"]["records"] == len(records)
    assert {path: path.read_bytes() for path in before} == before
    assert not (tmp_path / "out" / "work").exists()  # nothing was run


def test_without_a_record_there_is_nothing_to_report(tmp_path: Path) -> None:
    file = write_suite(tmp_path)
    refusal = call("compare", file, "--output", tmp_path / "out", "--report").refusal
    assert "holds no records of" in refusal and "without --report" in refusal


def test_records_of_another_suite_are_not_reported(tmp_path: Path) -> None:
    """The control of the stages: a record counts by what decides it, not by lying there."""
    loaded = load_suite(write_suite(tmp_path))
    store = Store(tmp_path / "out", loaded, checksums(loaded, None))
    for run, record in base_alone(loaded).items():
        store.write(replace(record, key=store.key(run)))
    file = write_suite(tmp_path, test_rows=3)
    assert "holds no records of" in call("compare", file, "--output", tmp_path / "out", "--report").refusal


def test_the_report_is_named_after_its_suite_whatever_the_name(tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, name="v1.2")
    files = write_report(tmp_path, summarise(loaded, whole(loaded)))
    assert [file.name for file in files] == ["v1.2.json", "v1.2.md", "v1.2.html"]
    assert files[1].read_text().startswith("# v1.2\n")
    assert not list(tmp_path.glob(".*.tmp"))


def test_every_number_of_the_tables_is_that_of_the_summary(tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, every_rate=["lora-attention"], long_input=[300])
    records = whole(loaded)
    low, _, high = rates(loaded, loaded.methods["lora-attention"])
    for task in loaded.tasks:
        for rate, points in ((low, [HIT, MISS, MISS, MISS]), (high, [MISS] * 4)):
            for seed in (0, 1, 2):
                run = Run(task, "lora-attention", "final", rate, seed, chosen=False)
                records[run] = final(run, points)
    assert set(records) == set(planned(loaded, records))
    for run, record in records.items():
        if run.stage == "final" and run.chosen:
            behind = {"0": scored([HIT, HIT]), "300": scored([HIT, MISS])}
            records[run] = replace(record, long_input=behind, transfer={"xquad_en": scored([10.0, 30.0])})
    text = markdown(summarise(loaded, records))
    for line in (
        "| lora-attention | 50.0 [",
        "| north | lora-attention | 50.0 / 80.0 / 60.0 | 25.0 / 25.0 / 25.0 | 50.0 / 50.0 / 50.0* | 0.0 / 0.0 / 0.0 "
        "| 6 of 9 |",
        "| lora-attention | 25.0 at 0.33 × / 50.0 at 1 × / 0.0 at 3 × | -50.0 | north -50.0; south -50.0 | 12 of 18 |",
        "| prefixmemory | 100.0 | 50.0 (-50.0 [",
        "| 20.0 [10.0, 30.0] | 3.500 | +0.000 |",
        "| prefixmemory − lora-attention | +0.0 [+0.0, +0.0] | 2 |",
        "| prefixmemory | 1,105,920 | 4.4 MB | 12.0 | 5.00 | 0.50 | – |",
        "- seeds: 0, 1, 2",
        "- commits: c0ffee",
    ):
        assert line in text, line
    assert "failed" not in text and "missing" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_names_and_messages_cannot_break_a_table(tmp_path: Path) -> None:
    loaded = made_suite(tmp_path)
    records = {run: failed(run, "first | second\nthird") for run in only_rates(loaded)}
    line = next(line for line in markdown(summarise(loaded, records)).splitlines() if "OutOfMemory" in line)
    assert line.endswith("OutOfMemoryError: first \\| second third |")


def test_nats_have_three_digits_behind_the_point(tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, scoring="loss", methods=["lora-attention", "prefixmemory"], long_input=[300])
    summary = summarise(loaded, nats(loaded))
    text = markdown(summary)
    for line in (
        "| lora-attention | -0.132 [-0.133, -0.131] (-0.133), 3 seeds at",
        "| prefixmemory | -0.124 [-0.125, -0.123] | -0.125 |",
        "| prefixmemory − lora-attention | +0.008 [+0.008, +0.008] | 2 |",
        "| north | prefixmemory | -0.520 / -0.511 / -0.530 | – | -0.123 / -0.124 / -0.125* | – |",
        "| prefixmemory | -0.123 | -0.129 (-0.006",
    ):
        assert line in text, text
    assert outcome(summary)[0] == "lora-attention: -0.132 [-0.133, -0.131]"
    run, record = next(iter(nats(loaded).items()))
    assert ", 9 s" in (said := line_about(run, record, 9.0, digits_of("loss"))) and "-0.520" in said


def test_an_average_of_percent_has_one_digit_beside_a_task_in_nats(tmp_path: Path) -> None:
    file = write_suite(tmp_path, methods=["base"], tasks=["north", "essay"])
    (tmp_path / "essay.yaml").write_text((tmp_path / "essay.yaml").read_text().replace("exact_match", "loss"))
    loaded = load_suite(file)
    north, essay = (Run(task, "base", "final", None, 0) for task in ("north", "essay"))
    records = {north: final(north, [HIT, MISS]), essay: final(essay, [], test=scored([-3.0], score=-3.514))}
    text = markdown(summarise(loaded, records))
    assert "| base | 50.0 [" in text and "(50.0), 1 seed | -3.514 (-3.514), 1 seed |" in text


def test_where_there_is_one_rate_nothing_chose_it(tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, methods=["base", "lora-attention"], rate_factors=[1.0])
    records = {run: final(run, [HIT, MISS, MISS, MISS]) for run in planned(loaded, {})}
    assert {run.stage for run in records} == {"final"}
    text = markdown(summarise(loaded, records))
    assert "learning rates: 1 a method, its own" in text and "`*`" in text
    assert "25.0 / 25.0 / 25.0" in text and "25.0*" not in text
