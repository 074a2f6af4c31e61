"""``prefixmemory compare``: the protocol, the store, and what survives a kill, two starts at once and a failed run."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import get_peft_model

import compared
import tiny
from close import close_figures
from command_line import call, jsonl, save_talker
from prefixmemory import PrefixMemoryConfig
from prefixmemory.compare import engines
from prefixmemory.compare import runs as plan
from prefixmemory.compare.engines import one_worker
from prefixmemory.compare.method import load_method, shipped_methods
from prefixmemory.compare.records import RECORDS, Record, Run, read_records
from prefixmemory.compare.runs import chosen_rate, key, planned, total
from prefixmemory.compare.store import Store
from prefixmemory.compare.suite import Loaded, load_suite
from prefixmemory.compare.work import checksums
from prefixmemory.compare.worker import Worker
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.tasks.scoring import score
from prefixmemory.tuner.plan import Step

pytestmark = [
    # PEFT's methods with virtual tokens count positions on their own.
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning"),
]

LABELS = ("a", "b", "c")
TRAIN = [{"text": f"row {i} of {LABELS[i % 3]}", "label": LABELS[i % 3]} for i in range(30)]
TEST = [{"text": f"test {i} of {LABELS[i % 3]}", "label": LABELS[i % 3]} for i in range(9)]
TASK = {
    "name": "letters",
    "version": 1,
    "description": "Letters.",
    "licence": "ours",
    "train": "train.jsonl",
    "test": "test.jsonl",
    "per_label": 2,
}
LORA = {"use": "lora-attention", "name": "lora", "adapter": {"name": "lora", "r": 2, "target_modules": ["q_proj"]}}
SUITE: dict[str, Any] = {
    "name": "tiny",
    "model": "base",
    "dtype": "float32",
    "tasks": ["letters.yaml"],
    "methods": ["base", "in-context", LORA, "prefixmemory"],
    "seeds": [3, 4],
    "rate_factors": [1, 10],
    "validation_rows": 6,
    "test_rows": 9,
    "training": {"epochs": 2, "batch_size": 3},
}


def write(folder: Path, **changes: Any) -> Path:
    """A suite with its task, its rows and its base model in ``folder``."""
    if not (folder / "base").exists():
        save_talker(folder / "base")
    jsonl(folder / "train.jsonl", TRAIN)
    jsonl(folder / "test.jsonl", TEST)
    (folder / "letters.yaml").write_text(yaml.safe_dump(TASK))
    suite = folder / "suite.yaml"
    # the model is named as from anywhere: other processes work elsewhere
    suite.write_text(yaml.safe_dump({**SUITE, "model": str(folder / "base"), **changes}))
    return suite


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A suite that has been run, and what the command said."""
    folder = tmp_path_factory.mktemp("compare")
    answer = call("compare", write(folder), "--keep-adapters")
    assert answer.code == 0, answer.err
    return folder, answer.err


def records(folder: Path) -> dict[str, Record]:
    return {record.key: record for record in read_records(folder / "tiny" / RECORDS)}


def scores(folder: Path) -> dict[str, Any]:
    """Everything of the records that does not depend on the clock."""
    return {name: scores_of(record) for name, record in records(folder).items()}


def scores_of(record: Record) -> Any:
    return record.run, record.validation, record.test, record.training and record.training.loss


def loaded_store(suite: Path) -> Store:
    loaded = load_suite(suite)
    return Store(suite.parent / loaded.suite.name, loaded, checksums(loaded, None))


# The protocol


def test_every_run_has_a_record_with_its_conditions(made):
    folder, said = made
    found = records(folder)
    loaded = load_suite(folder / "suite.yaml")
    # base once, in-context twice, two methods with two rates tried and two seeds each
    assert len(found) == total(loaded) == 1 + 2 + 2 * (2 + 2)
    assert said.count("(rate)") == 4 and said.count("(final)") == 7
    for record in found.values():
        assert record.made_with.versions["torch"] and record.made_with.hardware and record.failure is None
        assert (record.validation is not None) == (record.run.stage == "rate") == (record.test is None)
        if record.kind == "adapter":
            assert record.training.settings["learning_rate"] == record.run.learning_rate
            assert record.training.settings["seed"] == record.run.seed and record.training.rows == 6
            assert record.training.file_bytes > record.training.trainable_parameters > 0
    runs = [record.run for record in found.values()]
    assert {run.seed for run in runs if run.stage == "rate"} == {3}
    assert {run.seed for run in runs if run.method == "prefixmemory" and run.stage == "final"} == {3, 4}


def test_the_rate_is_the_one_that_the_validation_rows_prefer(made):
    folder, _ = made
    for method in ("lora", "prefixmemory"):
        own = [record for record in records(folder).values() if record.run.method == method]
        tried = {r.run.learning_rate: r.validation.score for r in own if r.run.stage == "rate"}
        assert len(tried) == 2
        final = {r.run.learning_rate for r in own if r.run.stage == "final"}
        assert len(final) == 1 and tried[final.pop()] == max(tried.values())


def test_test_scores_play_no_part_in_the_choice(tmp_path):
    loaded = load_suite(write(tmp_path, methods=[LORA], rate_factors=[1, 3, 9]))
    task, method = loaded.tasks["letters"], loaded.methods["lora"]

    def tried(rate: float, score: float | None) -> dict[Run, Record]:
        run = Run("letters", "lora", "rate", rate, 3)
        return {run: compared.failed(run) if score is None else compared.tried(run, score)}

    low, middle, high = plan.rates(loaded, method)
    assert (low, middle, high) == pytest.approx([factor * method.learning_rate for factor in (1, 3, 9)])
    best = Run("letters", "lora", "final", middle, 3)
    found = tried(low, 5.0) | tried(middle, 4.0) | {best: compared.final(best, [99.0])}
    assert chosen_rate(loaded, task, method, found) == low
    equal = tried(low, 5.0) | tried(middle, 5.0) | tried(high, 5.0)
    assert chosen_rate(loaded, task, method, equal) == middle  # of equals, the one in the middle
    failed = tried(low, None) | tried(middle, None) | tried(high, 0.0)
    assert chosen_rate(loaded, task, method, failed) == high
    assert chosen_rate(loaded, task, method, {}) is None


def test_validation_rows_are_never_trained_on_and_test_rows_are_the_same_for_every_seed(tmp_path):
    task = load_suite(write(tmp_path)).tasks["letters"]
    one, other = task.split(None, 6, 5, seed=3), task.split(None, 6, 5, seed=4)
    assert one.test == other.test and one.validation == other.validation and one.train != other.train
    for split in (one, other):
        assert len(split.train) == 6 and len(split.test) == 5
        assert not {row["text"] for row in split.train} & {row["text"] for row in split.validation}
    assert {row["label"] for row in one.train} == set(LABELS)


def test_every_rate_scores_all_candidates_on_test_rows_and_marks_the_chosen_one(tmp_path):
    loaded = load_suite(write(tmp_path, every_rate=["lora"]))
    tries = {run: compared.tried(run, run.learning_rate or 0.0) for run in planned(loaded, {})}
    finals = [run for run in planned(loaded, tries) if run.stage == "final" and run.method == "lora"]
    assert len(finals) == 2 * 2 and sum(run.chosen for run in finals) == 2
    assert {run.learning_rate for run in finals if run.chosen} == {max(plan.rates(loaded, loaded.methods["lora"]))}
    assert total(loaded) == 1 + 2 + (2 + 4) + (2 + 2)


def test_in_context_examples_stand_in_front(made):
    folder, _ = made
    worker = Worker(loaded_store(folder / "suite.yaml"), None)
    task = worker.loaded.tasks["letters"]
    rows = task.split(None, 6, 9, 3).train
    assert worker.examples(task, rows, 1).count("Label:") == 3 and worker.examples(task, rows, 2).count("Label:") == 6
    for row in rows[:1]:
        assert f"Text: {row['text']}\nLabel: {row['label']}\n\n" in worker.examples(task, rows, 2)


def test_examples_are_of_each_label_and_no_end_token_is_asked_for_where_a_loss_is_scored(made):
    folder, _ = made
    worker = Worker(loaded_store(folder / "suite.yaml"), None)
    task = dataclasses.replace(worker.loaded.tasks["letters"], scoring="loss")
    split = task.split(None, 6, 9, 3)
    shots = worker.examples(task, split.train, 1)
    assert shots.count("Label:") == 3
    asked = worker.models.base, worker.models.tokenizer, task, split.test, "behind " + shots
    found = worker._score(worker.models.base, task, split.test, shots, front="behind ")
    assert found.points == pytest.approx(score(*asked, end="").points, abs=1e-3)
    assert found.points != pytest.approx(score(*asked).points, abs=1e-2)
    plain = worker._score(worker.models.base, task, split.test, "", front="behind ")
    assert plain.points == pytest.approx(score(*asked[:4], "behind ").points, abs=1e-3)


def test_decoding_is_timed_while_a_memory_speaks_though_no_invocation_was_read(made, monkeypatch):
    folder, _ = made
    worker = Worker(loaded_store(folder / "suite.yaml"), None)
    config = {"task_type": "CAUSAL_LM", "active_from": "invocation", "invocation_tokens": [5, 6]}
    model = get_peft_model(worker.models.base, PrefixMemoryConfig(**config))
    spoken: list[Any] = []
    monkeypatch.setattr(Step, "add_to", lambda self, onto, own, queries, active=None: [spoken.append(active), onto][1])
    assert worker._decoding(model).tokens_a_second > 0
    assert spoken and all(active is None for active in spoken)  # on all tokens


def test_a_full_run_trains_every_weight_and_leaves_the_base_as_it_was(tmp_path):
    suite = write(tmp_path, methods=["base", {"use": "full", "learning_rate": 0.01}], rate_factors=[1], seeds=[3])
    answer = call("compare", suite)
    assert answer.code == 0, answer.err
    found = {record.kind: record for record in records(tmp_path).values()}
    assert found["full"].training.trainable_parameters == sum(p.numel() for p in tiny.build().parameters())
    assert found["full"].test.answers != found["base"].test.answers
    launched = write(tmp_path, methods=["full"], rate_factors=[1], seeds=[3], launcher=["accelerate", "launch"])
    said = " ".join(call("compare", launched).err.split())
    assert "kind: full trains likelihoods (objective: sft) in one process only" in said
    again = tmp_path / "again"
    again.mkdir()
    call("compare", write(again, methods=["base"], seeds=[3])).success  # noqa: B018
    close_figures(next(iter(records(again).values())).test, found["base"].test)


def test_a_full_run_reads_the_text_that_stands_in_front_of_its_rows(tmp_path, monkeypatch):
    read: list[str] = []

    def fit(trainer, settings):
        read.extend(tiny.tokenizer().decode(row["input_ids"]) for row in trainer.train_dataset)
        return {"train_loss": 0.0}

    monkeypatch.setattr("prefixmemory.compare.models.fit", fit)
    training = {"epochs": 2, "batch_size": 3, "distractors": {"share": 1.0, "tokens": 20}}
    suite = write(tmp_path, methods=["full"], rate_factors=[1], seeds=[3], training=training)
    assert call("compare", suite).code == 0
    assert len(read) == 6 and all(not text.startswith("Text:") and "Text: row" in text for text in read)


def test_another_boundary_between_the_splits_is_another_task(tmp_path):
    loaded = load_suite(write(tmp_path))
    before = checksums(loaded, None)
    jsonl(tmp_path / "train.jsonl", [*TRAIN, TEST[0]])
    jsonl(tmp_path / "test.jsonl", TEST[1:])
    assert checksums(loaded, None) != before


def test_long_inputs_transfer_and_forgetting_are_scored_for_the_chosen_rate(tmp_path):
    other = {**TASK, "name": "other", "scoring": "exact_match"}
    suite = write(
        tmp_path,
        methods=["base", LORA],
        seeds=[3],
        every_rate=["lora"],
        tasks=[{"use": "letters.yaml", "transfers_to": ["other"]}, "other.yaml"],
        long_input=[16],
        long_input_rows=4,
        transfer_rows=5,
    )
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    assert call("compare", suite).code == 0
    for record in records(tmp_path).values():
        whole = record.run.stage == "final" and record.run.chosen
        assert bool(record.long_input) == (record.neutral_text is not None) == whole
        assert bool(record.transfer) == (whole and record.run.task == "letters")
        if whole:
            assert set(record.long_input) == {"0", "16"} and record.long_input["16"].rows == 4
            assert record.neutral_text > 0 and record.decoding.tokens_a_second > 0
        if record.transfer:
            assert record.transfer["other"].rows == 5


# The store


def test_a_second_start_runs_nothing(made):
    folder, _ = made
    before = (folder / "tiny" / RECORDS).read_bytes()
    answer = call("compare", folder / "suite.yaml", "--keep-adapters")
    assert answer.code == 0 and "seed" not in answer.err
    lines = [" ".join(line.split()) for line in answer.err.splitlines()]
    runs = len(records(folder))
    assert f"{runs} runs, {runs} of them done." in lines
    assert sum(line.startswith(("base: ", "in-context: ", "lora: ", "prefixmemory: ")) for line in lines) == 4
    assert (folder / "tiny" / RECORDS).read_bytes() == before


def test_other_weights_of_the_same_name_are_not_compared_with_what_stands_there(tmp_path):
    suite = write(tmp_path, methods=["base"])
    call("compare", suite).success  # noqa: B018
    before = (tmp_path / "tiny" / RECORDS).read_bytes()
    assert all(record.base_fingerprint for record in records(tmp_path).values())
    save_talker(tmp_path / "base", seed=1)
    suite = write(tmp_path, methods=["base", {**LORA, "learning_rate": 1e-6}])
    assert "methods would be compared on two base models" in call("compare", suite).refusal
    assert (tmp_path / "tiny" / RECORDS).read_bytes() == before
    save_talker(tmp_path / "base")
    call("compare", suite).success  # noqa: B018


def test_what_a_method_trains_of_the_base_model_itself_stays_its_own(tmp_path):
    """The runs of a worker share one base model."""
    own = {**LORA, "name": "own", "adapter": {**LORA["adapter"], "modules_to_save": ["lm_head"]}}
    worker = Worker(loaded_store(write(tmp_path, methods=["base", {**own, "learning_rate": 0.1}])), None)
    base, method = worker.models.base, worker.loaded.methods["own"]
    task = worker.loaded.tasks["letters"]
    modules, head = list(base.modules()), base.lm_head.weight.clone()
    rows = task.split(None, 6, 9, 3).train
    for _ in range(2):  # trained, then loaded
        with worker.models.trained(method, rows, worker.loaded.settings(task, method, 0.1, 3), tmp_path / "own") as (
            model,
            _,
        ):
            trained = model.get_base_model().lm_head.modules_to_save["default"].weight
            assert (trained - head).abs().max() > 1e-3
        assert list(base.modules()) == modules and torch.equal(base.lm_head.weight, head) and not base.training


def test_a_new_seed_runs_only_what_is_new(made, tmp_path):
    folder, _ = made
    made_before = set(records(folder))
    grown = write(tmp_path, seeds=[3, 4, 5], model=str(folder / "base"))
    store = loaded_store(grown)
    keys = {store.key(run): run for run in planned(store.loaded, {})}
    assert {key for key, run in keys.items() if run.seed != 5} <= made_before


def test_the_key_stands_for_everything_that_decides_a_run(tmp_path, monkeypatch):
    loaded = load_suite(write(tmp_path))
    run = Run("letters", "prefixmemory", "final", 3e-4, 3)
    data = {"letters": "rows"}
    one = key(loaded, run, data)

    def changed(**fields: Any) -> str:
        return key(dataclasses.replace(loaded, suite=dataclasses.replace(loaded.suite, **fields)), run, data)

    others = [
        key(loaded, dataclasses.replace(run, seed=4), data),
        key(loaded, run, {"letters": "other rows"}),
        changed(model="another"),
        changed(test_rows=8),
        changed(long_input=[5]),
        changed(training={"epochs": 3}),
        changed(validation_rows=7),
        changed(launcher=["accelerate", "launch"]),
    ]
    assert len({one, *others}) == 1 + len(others)
    assert changed(description="said otherwise", name="renamed", methods=["base"], seeds=[3]) == one
    monkeypatch.setattr(plan, "PROTOCOL", 2)
    assert key(loaded, run, data) != one


def test_the_key_holds_the_other_tasks_that_an_adapter_is_scored_on(tmp_path):
    tasks = [{"use": "letters.yaml", "transfers_to": ["other"]}, {"use": "letters.yaml", "name": "other"}]
    loaded = load_suite(write(tmp_path, tasks=tasks, transfer_rows=5))
    run, data = Run("letters", "prefixmemory", "final", 3e-4, 3), {"letters": "rows", "other": "others"}

    def named(data: dict[str, str], loaded: Loaded = loaded, run: Run = run, **fields: Any) -> str:
        return key(dataclasses.replace(loaded, suite=dataclasses.replace(loaded.suite, **fields)), run, data)

    changed = {**data, "other": "changed"}
    other = dataclasses.replace(loaded.tasks["other"], version=2)
    raised = dataclasses.replace(loaded, tasks={**loaded.tasks, "other": other})
    assert len({named(data), named(changed), named(data, raised), named(data, seeds=[4, 3])}) == 4
    rate = dataclasses.replace(run, stage="rate")
    for same in ({"run": rate}, {"transfer_rows": 0}):  # controls: nothing is scored on others
        assert named(data, **same) == named(changed, **same)


@pytest.mark.parametrize(
    ("adapter", "rate", "name"),
    [
        ({}, 2e-3, "29a7b2466e"),
        ({"rank": 8}, 2e-3, "29a7b2466e"),
        ({}, 3e-4, "63492d5dd8"),
        ({"rank": None}, 2e-3, "6ff0a8c5d0"),
        ({"rank": None}, 3e-4, "be76519541"),
    ],
    ids=str,
)
def test_records_from_before_defaults_changed_are_found_again(tmp_path, adapter, rate, name):
    """The names are those that records had when a memory was full and had no limit, and warm-up was a tenth.

    They said normalize="none", as they must now: it was the default.
    """
    method = "prefixmemory" if adapter.get("rank", 8) else "full"
    assert key_of(tmp_path, method, rate, **adapter, output_limit=None, normalize="none") == name


def key_of(folder: Path, method: str, rate: float, **adapter: Any) -> str:
    own = {"use": "prefixmemory", "name": method, "adapter": {"name": "prefix_memory", **adapter}}
    return key_of_method(folder, own, rate)


def key_of_method(folder: Path, own: dict[str, Any], rate: float) -> str:
    loaded = load_suite(write(folder, methods=[{**own, "training": {"warmup": 0.1}}]))
    loaded = dataclasses.replace(loaded, suite=dataclasses.replace(loaded.suite, model="base"))
    (method,) = loaded.methods
    return key(loaded, Run("letters", method, "final", rate, 3), {"letters": "rows"})


def test_the_keys_of_memories_with_a_limit_are_new(tmp_path):
    def named(**adapter: Any) -> str:
        return key_of(tmp_path, "prefixmemory", 2e-3, **adapter)

    assert named() == named(**tiny.DEFAULT) == named(rank=tiny.DEFAULT["rank"])
    others = [{"output_limit": 0.37}, {"rank": None}, {"output_limit": None}, {"normalize": "none"}]
    assert len({named(), *(named(**other) for other in others)}) == 5


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("prefixmemory-full", "6ff0a8c5d0"),
        ("prefixmemory-published", "7e0371fa55"),
        ("prefix-inside", "16d4824976"),
        ("prefix-outside", "8898d37ed5"),
        ("prefix-kernel", "4c0975aa58"),
    ],
)
def test_shipped_methods_that_have_no_limit_keep_their_records(tmp_path, method, name):
    assert key_of_method(tmp_path, {"use": method}, 2e-3) == name


def test_a_failed_run_is_kept_and_tried_again_only_when_asked(tmp_path):
    bad = {"use": "lora-attention", "name": "bad", "adapter": {"name": "lora", "target_modules": ["no_such_module"]}}
    suite = write(tmp_path, methods=["base", bad], rate_factors=[1])
    answer = call("compare", suite)
    assert answer.code == 0 and answer.err.count("failed: PrefixMemoryError") == 2
    failed = [record for record in records(tmp_path).values() if record.run.method == "bad"]
    assert len(failed) == 2 and all("no_such_module" in record.failure.message for record in failed)
    assert "no_such_module" in (tmp_path / "tiny" / "tiny.md").read_text()
    again = call("compare", suite).err
    assert "2 runs failed: the report says why, --retry-failed tries them again." in again
    assert "failed: PrefixMemoryError" not in again
    assert call("compare", suite, "--retry-failed").err.count("failed: PrefixMemoryError") == 2


def test_a_score_that_is_no_number_is_tried_again_too_and_by_one_worker(tmp_path, monkeypatch):
    suite = write(tmp_path, methods=["base"], seeds=[3])
    call("compare", suite).success  # noqa: B018
    (sound,) = records(tmp_path).values()
    broken = dataclasses.replace(sound, test=dataclasses.replace(sound.test, score=float("nan")))
    store = loaded_store(suite)
    store.write(broken)
    load = Worker.load

    def loads_late(worker: Worker, records: Iterable[Record]) -> None:
        store.write(dataclasses.replace(broken, attempt=2))  # another worker has tried again meanwhile
        load(worker, records)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "load", loads_late)
        assert "seed 3" not in call("compare", suite, "--retry-failed").err
    assert "seed 3" in call("compare", suite, "--retry-failed").err
    (again,) = records(tmp_path).values()
    assert again.test == sound.test and again.attempt == 3


@pytest.mark.parametrize("retry_failed", [False, True])
def test_further_workers_are_told_whether_to_try_again(tmp_path, retry_failed, capsys):
    bad = {"use": "lora-attention", "name": "bad", "adapter": {"name": "lora", "target_modules": ["no_such_module"]}}
    suite = write(tmp_path, methods=[bad], rate_factors=[1], seeds=[3])
    call("compare", suite).success  # noqa: B018
    one_worker(suite, tmp_path / "tiny", None, retry_failed)  # what --workers and Ray start
    assert capsys.readouterr().err.count("failed: PrefixMemoryError") == retry_failed


def test_the_adapters_of_another_suite_in_the_same_folder_stay(made, tmp_path):
    folder, _ = made
    suite = write(tmp_path, model=str(folder / "base"), methods=["prefixmemory"], seeds=[3], rate_factors=[1])
    other = tmp_path / "tiny" / "work" / "adapters" / "of-another-suite"
    other.mkdir(parents=True)
    assert call("compare", suite).code == 0
    assert [file.name for file in other.parent.iterdir()] == [other.name]


def test_an_interrupted_comparison_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*args: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixmemory.compare.work._run_one", interrupted)
    answer = call("compare", write(tmp_path, methods=["base"]))
    assert answer.code == 130 and "Stopped. The records in" in answer.err
    assert "the same command goes on" in " ".join(answer.err.split())


def test_a_model_that_cannot_be_loaded_is_refused_before_any_run(tmp_path):
    refused = call("compare", write(tmp_path, model="smolm2")).refusal
    assert "'smolm2' cannot be loaded" in refused and "Did you mean 'smollm2'?" in refused
    assert not (tmp_path / "tiny" / RECORDS).exists()


def test_a_damaged_record_is_named(tmp_path):
    suite = write(tmp_path, methods=["base", "in-context"], seeds=[3])
    call("compare", suite).success  # noqa: B018
    file = tmp_path / "tiny" / RECORDS
    first, second = file.read_text().splitlines()
    file.write_text(f"{first}\n{second[:50]}\n")
    refusal = call("compare", suite).refusal
    assert f"{RECORDS}, line 2 is damaged" in refusal and refusal.endswith("Delete it; it will be run again.")
    file.write_text(f"{first}\n{second.replace('task', 'taks')}\n")
    assert f"{RECORDS}, line 2 is damaged (run.task: Field required)" in call("compare", suite).refusal


def test_a_line_that_a_kill_left_unfinished_is_run_again(tmp_path):
    suite = write(tmp_path, methods=["base", "in-context"], seeds=[3])
    call("compare", suite).success  # noqa: B018
    file, before = tmp_path / "tiny" / RECORDS, scores(tmp_path)
    written = file.read_text()
    file.write_text(written[: written.index("\n") + 50])
    assert call("compare", suite).err.count("seed 3") == 1
    assert scores(tmp_path) == before and len(file.read_text().splitlines()) == 2


# Several processes


def start(suite: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prefixmemory", "compare", str(suite), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def test_a_killed_comparison_loses_at_most_the_run_in_flight(made, tmp_path):
    folder, _ = made
    suite = write(tmp_path, model=str(folder / "base"))
    file = tmp_path / "tiny" / RECORDS
    kept = b""
    for wanted in (2, 5):  # killed twice, while it is at work
        process = start(suite)
        deadline = time.monotonic() + 300
        while (file.read_bytes() if file.exists() else b"").count(b"\n") < wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        now = file.read_bytes()
        assert len(records(tmp_path)) >= wanted and now.startswith(kept)
        kept = now[: now.rindex(b"\n") + 1]
    answer = call("compare", suite, "--keep-adapters")
    assert answer.code == 0 and answer.err.count("seed") == len(scores(folder)) - kept.count(b"\n")
    close_figures(scores(tmp_path), scores(folder))


def test_two_starts_at_once_share_the_runs(made, tmp_path):
    folder, _ = made
    suite = write(tmp_path, model=str(folder / "base"))
    both = [start(suite, "--keep-adapters") for _ in range(2)]
    said = [process.communicate(timeout=500)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    lines = [line for text in said for line in text.splitlines() if "seed" in line]
    assert len(lines) == len(records(tmp_path)) == len(records(folder))
    close_figures(scores(tmp_path), scores(folder))


def test_workers_and_a_launcher_give_the_same_scores(made, tmp_path):
    folder, _ = made
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    suite = write(tmp_path, model=str(folder / "base"), launcher=launcher, methods=["base", "prefixmemory"], seeds=[3])
    answer = call("compare", suite, "--workers", 2)
    assert answer.code == 0, answer.err
    found = scores(tmp_path)
    assert len(found) == 4
    before = {score[0]: score for score in scores(folder).values()}  # by run
    for one in found.values():
        close_figures(one, before[one[0]])
    trained = [record.training for record in records(tmp_path).values() if record.training is not None]
    assert len(trained) == 3 and all(one.processes == 1 and one.made_with.hardware for one in trained)


def test_further_workers_get_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in engines._with_gpu(1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [engines._with_gpu(place)["CUDA_VISIBLE_DEVICES"] for place in (1, 2, 3)] == ["1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8")
    assert [engines._with_gpu(place)["CUDA_VISIBLE_DEVICES"] for place in (1, 2)] == ["GPU-8", "5"]


def test_workers_are_all_waited_for_before_one_is_blamed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/sh")  # -c runs the code, which no shell understands
    with (
        pytest.raises(PrefixMemoryError, match="A worker ended with"),
        engines.local(tmp_path, tmp_path, None, False, 2),
    ):
        pass


def test_workers_end_with_the_first(tmp_path, monkeypatch):
    """However it ends."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda words, env: started.append(popen(["sleep", "60"])) or started[-1])
    for error in (KeyboardInterrupt, PrefixMemoryError):
        with pytest.raises(error), engines.local(tmp_path, tmp_path, None, False, 2):
            raise error
    assert [process.poll() for process in started] == [-signal.SIGTERM] * 4


def test_ray_shares_the_runs(made, tmp_path):
    ray = pytest.importorskip("ray")
    folder, _ = made
    suite = write(tmp_path, model=str(folder / "base"))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        answer = call("compare", suite, "--engine", "ray", "--workers", 2)
    finally:
        ray.shutdown()
    assert answer.code == 0, answer.err
    close_figures(scores(tmp_path), scores(folder))


# What is refused


def test_every_shipped_method_can_be_read():
    assert {"base", "in-context", "lora-attention", "prefixmemory", "prefixmemory-published"} <= set(shipped_methods())
    for name in shipped_methods():
        assert load_method(name).name == name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sedes": [1]}, "suite.yaml, line"),
        ({"sedes": [1]}, "Did you mean 'seeds'?"),
        ({"tasks": ["leters"]}, "There is no task 'leters'."),
        ({"methods": ["lora-atention"]}, "Did you mean 'lora-attention'?"),
        ({"methods": ["lora-attention", "lora-attention"]}, "holds 'lora-attention' twice"),
        ({"methods": [{"name": "x"}]}, "needs use: NAME"),
        ({"methods": [{"use": "prefixmemory", "adapter": {"name": "prefix_memory", "rnak": 3}}]}, "rnak"),
        ({"methods": [{"use": "prefixmemory", "learning_rate": 0}]}, "learning_rate=0.0 is out of range"),
        ({"seeds": [1, 1]}, "holds one twice"),
        ({"seeds": []}, "seeds is empty"),
        ({"every_rate": ["lora"]}, "none of the suite's methods"),
        ({"training": {"epohcs": 3}}, "training.epohcs"),
        ({"training": {"epohcs": 3}}, "Did you mean 'epochs'?"),
        ({"training": {"seed": 3}}, "the protocol sets it"),
        ({"training": {"epochs": 0}}, "epochs=0 is out of range"),
        ({"training": {"epochs": "three"}}, "training.epochs='three'"),
        ({"training": {"epochs": True}}, "training.epochs=True: input should be a valid number"),
        ({"training": {"batch_size": 2.5}}, "training.batch_size=2.5"),
        ({"training": {"keep_best": True}}, "keep_best and patience go by a validation loss"),
        ({"training": {"patience": 2}}, "keep_best and patience go by a validation loss"),
        ({"training": {"beta": 0.1}}, "beta=0.1 needs objective='dpo', 'kto' or 'simpo'"),
        ({"seeds": [True, 2]}, "seeds=[True, 2]: input should be a valid number"),
        ({"validation_rows": True}, "validation_rows=True: input should be a valid number"),
        ({"methods": [{"use": "in-context", "shots": 3}]}, "shots=3 examples of each label, and letters has 2"),
        ({"rate_factors": [0]}, "rate_factors"),
        ({"rate_factors": [1, 1]}, "holds one twice"),
        ({"tasks": [{"use": "letters.yaml", "per_label": 10}]}, "leaves none for validation. Lower per_label"),
        ({"tasks": [{"use": "letters.yaml", "transfers_to": ["bankin77"]}]}, "Did you mean 'banking77'?"),
        ({"long_input": [0]}, "long_input"),
    ],
    ids=str,
)
def test_a_wrong_suite_is_refused_in_one_line(tmp_path, changes, said):
    if changes.get("every_rate"):
        changes = {**changes, "methods": ["base"]}
    assert said in call("compare", write(tmp_path, **changes)).refusal


NO_NAMES = {
    "up": "../up",
    "absolute": "/etc/passwd",
    "folder": "a/b",
    "backslash": "a\\b",
    "nul": "a\0b",
    "newline": "a\nb",
    "long": "x" * 300,
    "long in bytes": "é" * 79,
    "empty": "",
    "hidden": ".a",
    "option": "-a",
    "markup": "<script>",
}


@pytest.mark.parametrize("name", NO_NAMES.values(), ids=list(NO_NAMES))
@pytest.mark.parametrize("what", ["suite", "task", "method"])
def test_a_name_that_is_no_name_of_a_file_is_refused_where_it_is_read(tmp_path, what, name):
    changes = {
        "suite": {"name": name},
        "task": {"tasks": [{"use": "letters.yaml", "name": name}]},
        "method": {"methods": [{"use": "base", "name": name}]},
    }[what]
    suite = write(tmp_path, **changes)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PrefixMemoryError) as refused:
        load_suite(suite)
    said = str(refused.value)
    if "\0" in name:  # no text of a YAML file, whatever it is for
        assert said.startswith(f"{suite}, line") and "a NUL character" in said and said.count("\n") == 0
        return
    assert "cannot be the name of a file" in said and said.count("\n") == 0 and len(said) < 500
    assert said.startswith(f"{suite}, line" if what == "suite" else "name, which the suite changes")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["bbh_sports", "LoRA r=8", "v1.2", "é", "x" * 80, "prefixmemory+lora"])
def test_names_that_people_give_are_taken(tmp_path, name):
    """The control of those that are refused."""
    suite = write(tmp_path, name=name, methods=[{"use": "base", "name": name}])
    assert load_suite(suite).suite.name == name and list(load_suite(suite).methods) == [name]


def test_a_suite_without_records_has_no_report(tmp_path):
    assert "holds no records" in call("compare", write(tmp_path), "--report").refusal
    assert "--engine='slurm' is not known" in call("compare", write(tmp_path), "--engine", "slurm").refusal
    with pytest.raises(PrefixMemoryError, match=r"The suite .*missing\.yaml does not exist"):
        load_suite(tmp_path / "missing.yaml")
