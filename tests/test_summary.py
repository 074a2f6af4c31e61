"""Figures of a comparison, against records whose right figures are known."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compared import failed, final, finals, made_suite, scored, tried, tries, write_suite
from prefixmemory.compare.intervals import Points, difference, interval, mean
from prefixmemory.compare.records import Provenance, Record, Run
from prefixmemory.compare.runs import planned, rates, total
from prefixmemory.compare.suite import Loaded, load_suite
from prefixmemory.compare.summarise import summarise
from prefixmemory.compare.summary import Estimate, Incomplete, MissingRuns, Summary

HIT, MISS = 100.0, 0.0


def rows(*seeds: list[float]) -> dict[int, np.ndarray]:
    return {seed: np.array(points) for seed, points in enumerate(seeds)}


# Intervals


def test_an_interval_of_two_seeds_reaches_from_one_to_the_other() -> None:
    assert interval([rows([10.0], [30.0])]) == (10.0, 30.0)
    assert mean([rows([10.0], [30.0])]) == 20.0
    assert interval([rows([50.0, 50.0], [50.0, 50.0])]) == (50.0, 50.0)


@pytest.mark.parametrize("by_seed", [False, True])
def test_one_fewer_is_drawn_than_there_are(by_seed: bool) -> None:
    """Three of four, of which one has 100: two or more hundreds come up in 10 of 64 draws, three in one of 64."""
    points = [0.0, 0.0, 0.0, 100.0]
    table = rows(*([point] for point in points)) if by_seed else rows(points)
    assert interval([table]) == pytest.approx((0.0, 200 / 3))


def test_a_single_point_has_no_interval() -> None:
    assert interval([rows([10.0])]) is None
    assert interval([rows([10.0, 20.0]), rows([10.0])]) is None  # nor has an average that holds one


def test_what_is_shared_is_drawn_once() -> None:
    """Two tasks on the same rows spread as one of them, on rows of their own as an average of two."""
    points = rows(np.random.default_rng(0).normal(size=200).tolist())
    alone, same = width([points]), np.diff(interval([points, points], [(0, 0), (1, 0)])).item()
    assert same == pytest.approx(alone) and width([points, points]) == pytest.approx(alone / 2**0.5, rel=0.1)


def width(tasks: list[Points]) -> float:
    low, high = interval(tasks) or (0.0, 0.0)
    return high - low


@pytest.mark.parametrize("by_seed", [False, True])
def test_its_width_is_that_of_the_normal_distribution_where_it_holds(by_seed: bool) -> None:
    points = np.random.default_rng(3).normal(50, 10, size=40)
    expected = 2 * 1.96 * points.std(ddof=1) / math.sqrt(40)
    table = rows(*([p] for p in points)) if by_seed else rows(list(points))
    assert width([table]) == pytest.approx(expected, rel=0.06)
    # of four such tasks half as wide, for they are drawn apart
    assert width([table] * 4) == pytest.approx(expected / 2, rel=0.06)


def test_seeds_that_answer_alike_do_not_make_it_narrower() -> None:
    """They are scored on the same rows: six times the same answers say no more than once. Control: other rows do."""
    rng = np.random.default_rng(5)
    points = list(rng.normal(50, 10, size=50))
    assert interval([rows(*[points] * 6)]) == pytest.approx(interval([rows(points)]), abs=1e-9)
    assert width([rows(*(list(rng.normal(50, 10, size=50)) for _ in range(6)))]) < 0.9 * width([rows(points)])


def _covered(seeds: bool, repeats: int = 150) -> float:
    """How often the interval of an average over four tasks holds the truth, where seeds differ by 12 points."""
    found = 0
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        tasks = []
        for _ in range(4):
            likely = 0.5 + rng.normal(0, 0.12, (3, 1)) + rng.uniform(-0.3, 0.3, (1, 40))
            points = 100.0 * (rng.random((3, 40)) < np.clip(likely, 0, 1))
            tasks.append(dict(enumerate(points)) if seeds else {0: points.reshape(-1)})
        low, high = interval(tasks) or (0.0, 0.0)
        found += low <= 50.0 <= high  # all is symmetric around a half
    return found / repeats


def test_of_a_hundred_intervals_about_95_hold_the_truth_even_with_three_seeds() -> None:
    assert 0.92 <= _covered(seeds=True) <= 0.99
    assert _covered(seeds=False) < 0.7  # the control: rows alone are far too sure


def test_differences_are_paired_by_row_and_seed() -> None:
    rng = np.random.default_rng(1)
    a = rows(*(list(rng.normal(50, 30, size=60)) for _ in range(3)))
    b = {seed: points - 5 for seed, points in a.items()}
    assert interval([difference(a, b)]) == pytest.approx((5.0, 5.0))
    unpaired = {seed: rng.permutation(points) for seed, points in b.items()}
    assert width([difference(a, unpaired)]) > 5  # the control: the same points in another order
    assert difference({1: a[1]}, b).keys() == {1}
    assert difference({7: a[1]}, b) == {}


def test_what_has_no_seeds_stands_against_every_seed() -> None:
    base, other = {0: np.array([100.0, 0.0])}, rows([100.0, 100.0], [0.0, 0.0])
    found = difference(base, other, a_has_no_seeds=True)
    assert {seed: list(points) for seed, points in found.items()} == {0: [0.0, -100.0], 1: [100.0, 0.0]}
    assert difference(base, other).keys() == {0}


# Summaries


Records = dict[Run, Record]
VALIDATION = {"lora-attention": [50, 80, 60], "prefixmemory": [70, 60, 0]}  # at a third, once and three times its rate


def whole(loaded: Loaded) -> Records:
    """All records: the base model right on two rows of four, LoRA on 3 / 3 / 1, PrefixMemory on 4 / 3 / 2 of them."""
    hits = {
        "base": [[HIT, HIT, MISS, MISS]],
        "lora-attention": [[HIT, HIT, HIT, MISS], [HIT, HIT, HIT, MISS], [HIT, MISS, MISS, MISS]],
        "prefixmemory": [[HIT, HIT, HIT, HIT], [HIT, HIT, HIT, MISS], [HIT, HIT, MISS, MISS]],
    }
    records: Records = {}
    for task in loaded.tasks:
        for method, own in loaded.methods.items():
            if own.is_trained:
                records |= tries(loaded, task, method, VALIDATION[method])
            records |= finals(loaded, task, method, hits[method], records)
    return records


def of(summary: Summary, what: str, **wanted: str) -> Any:
    """The one entry of a list that has these values."""
    (found,) = [
        one for one in getattr(summary, what) if all(getattr(one, name) == value for name, value in wanted.items())
    ]
    return found


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return made_suite(tmp_path)


def test_a_cell_holds_mean_worst_seed_and_collapsed_runs(loaded: Loaded) -> None:
    cell = of(summarise(loaded, whole(loaded)), "cells", task="north", method="lora-attention")
    assert (cell.seeds, cell.scores, cell.planned_seeds) == ([0, 1, 2], [75.0, 75.0, 25.0], 3)
    assert cell.mean == pytest.approx(175 / 3) and cell.worst == 25.0
    assert cell.low < cell.mean < cell.high
    assert cell.collapsed == 1  # 25 of the base model's 50; the worst run of PrefixMemory equals it
    assert of(summarise(loaded, whole(loaded)), "cells", task="north", method="prefixmemory").collapsed == 0
    assert of(summarise(loaded, whole(loaded)), "cells", task="north", method="base").collapsed is None
    assert cell.rows == 4 and cell.learning_rate == loaded.methods["lora-attention"].learning_rate


def test_nothing_can_collapse_below_a_base_model_that_was_not_run(tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, methods=["lora-attention", "prefixmemory"])
    summary = summarise(loaded, whole(loaded))
    assert [cell.collapsed for cell in summary.cells] == [None] * 4
    assert [one.collapsed for one in summary.averages] == [None] * 2
    assert {one.below_base for one in summary.rates} == {None}


def test_averages_are_over_tasks_and_of_methods_that_have_everything(loaded: Loaded) -> None:
    records = whole(loaded)
    south = Run("south", "prefixmemory", "final", rates(loaded, loaded.methods["prefixmemory"])[0], 0)
    records[south] = final(south, [MISS] * 4)
    average = of(summarise(loaded, records), "averages", method="prefixmemory")
    assert average.mean == pytest.approx((225 / 3 + 125 / 3) / 2)
    assert (average.worst, average.collapsed, average.runs, average.tasks) == (0.0, 1, 6, 2)
    assert average.trainable_parameters == 1_105_920
    del records[south]
    summary = summarise(loaded, records)
    assert [one.method for one in summary.averages] == ["base", "lora-attention"]
    assert summary.incomplete == [Incomplete("prefixmemory", scored=5, runs=6)]
    assert summary.missing == [MissingRuns("south", "prefixmemory", 1, "not run yet")]
    assert of(summary, "cells", task="south", method="prefixmemory").planned_seeds == 3


def test_differences_are_over_what_both_have_and_turn_around(loaded: Loaded) -> None:
    records = whole(loaded)
    found = of(summarise(loaded, records), "differences", a="prefixmemory", b="lora-attention")
    assert found.mean == pytest.approx((25 + 0 + 25) / 3) and found.tasks == ["north", "south"]
    assert found.by_task["north"].seeds == [0, 1, 2]
    back = of(summarise(loaded, records), "differences", a="lora-attention", b="prefixmemory")
    assert (back.mean, back.low, back.high) == (-found.mean, -found.high, -found.low)
    to_base = of(summarise(loaded, records), "differences", a="lora-attention", b="base")
    assert to_base.mean == pytest.approx(175 / 3 - 50)  # one run of the base model, against each seed


def test_seeds_are_never_paired_with_other_seeds(loaded: Loaded) -> None:
    """LoRA has seed 0 alone: PrefixMemory's seeds 1 and 2 have no partner. Only the base model stands for all seeds."""
    records = {run: r for run, r in whole(loaded).items() if run.method != "lora-attention" or run.seed == 0}
    summary = summarise(loaded, records)
    found = of(summary, "differences", a="prefixmemory", b="lora-attention")
    assert found.mean == 25.0 and found.by_task["north"].seeds == [0]
    assert of(summary, "differences", a="prefixmemory", b="base").by_task["north"].seeds == [0, 1, 2]
    assert any("lora-attention there is one seed" in note for note in summary.notes)
    assert not any("there is one seed" in note for note in summarise(loaded, whole(loaded)).notes)


def test_tasks_without_a_common_seed_do_not_count(loaded: Loaded) -> None:
    records = {
        run: record
        for run, record in whole(loaded).items()
        if not (run.stage == "final" and run.task == "south" and (run.method == "lora-attention") == (run.seed == 0))
    }
    found = of(summarise(loaded, records), "differences", a="prefixmemory", b="lora-attention")
    assert found.tasks == ["north"] and list(found.by_task) == ["north"]


def test_the_final_runs_are_those_at_the_chosen_rate(tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, tasks=["north"], every_rate=["lora-attention"])
    low, middle, high = rates(loaded, loaded.methods["lora-attention"])
    records: Records = tries(loaded, "north", "lora-attention", [50, 80, 60])
    for rate, points in ((low, [MISS, MISS]), (middle, [HIT, MISS]), (high, [HIT, HIT])):  # the best is not chosen
        for seed in (0, 1, 2):
            run = Run("north", "lora-attention", "final", rate, seed, chosen=rate == middle)
            records[run] = final(run, points)
    records |= finals(loaded, "north", "base", [[HIT, MISS]], records)
    summary = summarise(loaded, records)
    cell = of(summary, "cells", method="lora-attention")
    assert cell.mean == 50.0 and cell.learning_rate == middle
    own = [one for one in summary.rates if one.method == "lora-attention"]
    assert [(o.test, o.validation, o.chosen, o.below_base) for o in own] == [
        (0.0, 50, False, 3), (50.0, 80, True, 0), (100.0, 60, False, 0),
    ]  # fmt: skip
    robust = of(summary, "robustness", method="lora-attention")
    assert robust.means == [0.0, 50.0, 100.0] and robust.worst_against_best == -100.0
    assert (robust.below_base, robust.runs) == (3, 9)
    del records[Run("north", "lora-attention", "final", high, 2, chosen=False)]
    assert summarise(loaded, records).robustness == []  # one seed is missing: nothing is said


def test_failed_runs_are_told_and_leave_no_average(loaded: Loaded) -> None:
    records = whole(loaded)
    rate = rates(loaded, loaded.methods["prefixmemory"])[0]
    broken = [Run("north", "prefixmemory", "final", rate, seed) for seed in (1, 2)]
    records[broken[0]] = failed(broken[0])
    records[broken[1]] = final(broken[1], [math.nan] * 4)  # trained to pieces: no score either
    summary = summarise(loaded, records)
    assert [(one.seed, one.type) for one in summary.failed] == [(1, "OutOfMemoryError"), (2, "NoNumber")]
    assert of(summary, "cells", task="north", method="prefixmemory").scores == [100.0]
    assert summary.incomplete == [Incomplete("prefixmemory", scored=4, runs=6)]
    assert summary.missing == []
    point = of(summary, "rates", task="north", method="prefixmemory", learning_rate=rate)
    assert point.failed == 2 and point.tests == [100.0]


def test_a_rate_whose_score_is_no_number_is_never_chosen(loaded: Loaded) -> None:
    records = tries(loaded, "north", "prefixmemory", [math.nan, 20, math.nan])
    _, middle, _ = rates(loaded, loaded.methods["prefixmemory"])
    made = {run.learning_rate for run in planned(loaded, records) if run.stage == "final" and run.learning_rate}
    assert made == {middle}
    assert [one.chosen for one in summarise(loaded, records).rates if one.method == "prefixmemory"][:3] == [
        False, True, False,
    ]  # fmt: skip


def test_runs_that_can_never_be_made_are_told_apart(loaded: Loaded) -> None:
    runs = [Run("north", "prefixmemory", "rate", rate, 0) for rate in rates(loaded, loaded.methods["prefixmemory"])]
    summary = summarise(loaded, {run: failed(run) for run in runs})
    mine = of(summary, "missing", task="north", method="prefixmemory")
    assert mine == MissingRuns("north", "prefixmemory", 3, "not run: every learning rate failed")
    assert of(summary, "missing", task="south", method="prefixmemory").why == "not run yet"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_what_is_missing_is_what_the_suite_has_and_the_records_have_not(loaded: Loaded, share: float) -> None:
    records = {run: r for run, r in whole(loaded).items() if random.Random(str(run)).random() < share}
    summary = summarise(loaded, records)
    assert sum(one.runs for one in summary.missing) == total(loaded) - len(records)
    assert (total(loaded) - len(records) == 0) == (share == 1.0)
    json.dumps(summary.plain(), allow_nan=False)


def test_the_order_of_the_records_does_not_matter(loaded: Loaded) -> None:
    items = list(whole(loaded).items())
    first = summarise(loaded, dict(items))
    random.Random(0).shuffle(items)
    assert summarise(loaded, dict(items)) == first


def test_a_score_of_all_rows_together_has_an_interval_over_seeds(tmp_path: Path) -> None:
    """BLEU is no mean over rows: its points are ROUGE-L, which must not stand beside it as its interval."""
    loaded = made_suite(tmp_path, scoring="text", methods=["lora-attention", "prefixmemory"], rate_factors=[1.0])
    records: Records = {}
    for task in loaded.tasks:
        for method, scores in (("lora-attention", [10.0, 12.0, 14.0]), ("prefixmemory", [20.0, 23.0, 24.0])):
            rate = loaded.methods[method].learning_rate
            for seed, score in enumerate(scores):
                run = Run(task, method, "final", rate, seed)
                test = scored([60.0, 70.0, 80.0, 90.0], score=score, metrics={"ROUGE-L (%)": 75.0})
                records[run] = final(run, [], test=test)
    summary = summarise(loaded, records)
    cell = of(summary, "cells", task="north", method="lora-attention")
    assert (cell.mean, cell.low, cell.high) == (12.0, 10.0, 14.0)
    assert cell.metrics == {"ROUGE-L (%)": 75.0}
    assert of(summary, "differences", a="prefixmemory", b="lora-attention").mean == pytest.approx(31 / 3)
    assert any(note.startswith("Intervals of north, south are over seeds alone") for note in summary.notes)


def test_nats_and_percent_are_not_averaged(tmp_path: Path) -> None:
    file = write_suite(tmp_path, methods=["base"], tasks=["north", "essay"])
    (tmp_path / "essay.yaml").write_text((tmp_path / "essay.yaml").read_text().replace("exact_match", "loss"))
    loaded = load_suite(file)
    north, essay = (Run(task, "base", "final", None, 0) for task in ("north", "essay"))
    nats = scored([-3.0, -5.0], score=-3.5, metrics={"perplexity": 33.1})
    summary = summarise(loaded, {north: final(north, [HIT, MISS]), essay: final(essay, [], test=nats)})
    assert of(summary, "averages", method="base").mean == 50.0
    assert [(task.name, task.averaged) for task in summary.tasks] == [("north", True), ("essay", False)]
    assert any("leave out essay" in note for note in summary.notes)
    cell = of(summary, "cells", task="essay")
    assert (cell.mean, cell.low, cell.high) == (-3.5, None, None)  # one score of all rows: no interval


def test_long_inputs_are_compared_with_the_same_rows_behind_nothing(loaded: Loaded) -> None:
    records = whole(loaded)
    for run, record in records.items():
        if run.stage == "final":
            behind = {"0": scored([HIT, HIT, MISS]), "300": scored([HIT, HIT, MISS]), "1200": scored([HIT, MISS, MISS])}
            records[run] = replace(record, long_input=behind)
    average = of(summarise(loaded, records), "averages", method="prefixmemory").long_input
    assert list(average) == ["0", "300", "1200"]
    assert average["1200"].mean == pytest.approx(100 / 3)
    assert average["300"].change == Estimate(0.0, 0.0, 0.0)  # row by row the same
    assert average["1200"].change.mean == pytest.approx(-100 / 3)
    assert average["1200"].change.low < average["1200"].change.high <= 0.0
    assert of(summarise(loaded, whole(loaded)), "averages", method="prefixmemory").long_input == {}


def test_other_tasks_stand_beside_the_own_tasks_that_have_them(loaded: Loaded) -> None:
    records = whole(loaded)
    for run, record in records.items():
        if run.stage == "final" and run.task == "south":
            records[run] = replace(record, transfer={"xquad_en": scored([80.0, 40.0])})
    summary = summarise(loaded, records)
    assert of(summary, "cells", task="south", method="base").transfer["xquad_en"].mean == 60.0
    assert of(summary, "cells", task="south", method="base").transfer["xquad_en"].unit == "F1, %"
    transfer = of(summary, "averages", method="prefixmemory").transfer
    assert transfer.mean == 60.0 and transfer.own.mean == 75.0 and transfer.pairs == 1
    assert of(summarise(loaded, whole(loaded)), "averages", method="prefixmemory").transfer is None


def test_costs_are_of_all_final_runs(loaded: Loaded) -> None:
    records = whole(loaded)
    slow = next(run for run in records if run.method == "prefixmemory" and run.stage == "final")
    training = replace(records[slow].training, seconds=24.0)
    records[slow] = replace(records[slow], training=training, peak_memory_bytes=2**31)
    cost = of(summarise(loaded, records), "costs", method="prefixmemory")
    assert cost.train_seconds == 14.0 and cost.runs == 6
    assert cost.rows_a_second == pytest.approx((2.5 + 5 * 5.0) / 6)  # 60 rows in 24 seconds, and in 12
    assert cost.decoding == 0.5 and cost.peak_memory_bytes == 2**31
    base = of(summarise(loaded, records), "costs", method="base")
    assert base.trainable_parameters == 0 and base.rows_a_second is None and base.decoding is None


def test_conditions_name_every_commit_and_version(loaded: Loaded) -> None:
    records = whole(loaded)
    other = next(iter(records))
    records[other] = replace(records[other], made_with=Provenance(commit="bad-dirty", versions={"torch": "2.12.0"}))
    conditions = summarise(loaded, records).conditions
    assert conditions["commits"] == ["bad-dirty", "c0ffee"]
    assert conditions["versions"]["torch"] == "2.12.0, 2.13.0"
    assert conditions["records"] == len(records) == total(loaded)


def test_training_settings_are_told_with_those_that_only_some_have(tmp_path: Path) -> None:
    longer = {"use": "prefixmemory", "training": {"warmup": 0.3}}
    loaded = made_suite(tmp_path, methods=["base", "lora-attention", longer])
    summary = summarise(loaded, whole(loaded))
    assert "warmup 0.1" in summary.conditions["training"]
    assert any("that a method has of its own: prefixmemory: warmup 0.3" in note for note in summary.notes)


def test_a_chosen_rate_at_the_end_of_the_candidates_is_told(loaded: Loaded) -> None:
    """PrefixMemory's is the lowest of three, LoRA's the middle one."""
    (note,) = [note for note in summarise(loaded, whole(loaded)).notes if "candidate" in note]
    assert "candidate for prefixmemory (north, south):" in note and "lora" not in note


def test_of_a_base_model_that_knows_nothing_the_one_with_examples_takes_the_place(tmp_path: Path) -> None:
    """Below 0 nothing can be: LoRA's 25 is a collapse below 50 with examples."""
    loaded = made_suite(tmp_path, methods=["base", "in-context", "lora-attention"])
    shots = [[HIT, HIT, HIT, MISS], [HIT, HIT, MISS, MISS], [HIT, MISS, MISS, MISS]]
    records: Records = {}
    for task in loaded.tasks:
        records |= finals(loaded, task, "base", [[MISS] * 4], records)
        records |= tries(loaded, task, "lora-attention", VALIDATION["lora-attention"])
        records |= finals(loaded, task, "lora-attention", [[HIT] * 4, [HIT, HIT, MISS, MISS], [MISS] * 4], records)
    assert of(summarise(loaded, records), "cells", task="north", method="lora-attention").collapsed is None
    records |= finals(loaded, "north", "in-context", shots, records)
    summary = summarise(loaded, records)
    assert of(summary, "cells", task="north", method="lora-attention").collapsed == 1
    assert of(summary, "cells", task="south", method="lora-attention").collapsed is None
    assert of(summary, "cells", task="north", method="in-context").collapsed is None
    assert any("gets nothing right on north, south" in note for note in summary.notes)
    assert not any(
        "gets nothing right" in note for note in summarise(made_suite(tmp_path), whole(made_suite(tmp_path))).notes
    )


def test_a_task_whose_rates_were_chosen_by_fewer_rows_is_told(tmp_path: Path) -> None:
    loaded = made_suite(tmp_path, validation_rows=5)
    (note,) = [note for note in summarise(loaded, whole(loaded)).notes if "fewer validation rows" in note]
    assert note.endswith("north (2 of 5), south (2 of 5).")
    enough = made_suite(tmp_path, validation_rows=2)
    assert not any("fewer validation rows" in note for note in summarise(enough, whole(enough)).notes)


def test_validation_scores_are_not_test_scores(loaded: Loaded) -> None:
    """With learning rates alone there is no cell, however good the rates look."""
    run = Run("north", "prefixmemory", "rate", rates(loaded, loaded.methods["prefixmemory"])[1], 0)
    summary = summarise(loaded, {run: tried(run, 99.0)})
    assert summary.cells == [] and summary.averages == [] and summary.differences == []
    assert [one.validation for one in summary.rates].count(99.0) == 1
