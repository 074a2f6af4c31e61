"""Unrelated text in front of a share of the training rows."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from peft import LoraConfig
from torch.utils.data import DataLoader

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.compare.runs import key
from prefixmemory.compare.suite import load_suite
from prefixmemory.rows.distractors import NOTES, Distractors
from prefixmemory.rows.encoding import Tokens
from prefixmemory.rows.unrelated_text import ESSAY
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.loop import completion_trainer, fit, training_arguments
from prefixmemory.training.methods import attach
from prefixmemory.training.plan import plan_of
from prefixmemory.training.recipe import load_recipe
from prefixmemory.training.record import plan_of_run
from prefixmemory.training.sampler import EpochRows, EpochSampler
from prefixmemory.training.settings import TrainingSettings

ROWS = [{"text": f"line {i}" + " again" * (i % 3), "label": "abc"[i % 3]} for i in range(20)]
PAIRS = [{"prompt": f"how is {i}?", "chosen": "fine", "rejected": "bad" * (1 + i % 3)} for i in range(8)]


def job(distractors: Distractors | None, rows=ROWS, config=None, **settings) -> TrainingJob:
    made = TrainingSettings(distractors=distractors, **settings)
    config = config or PrefixMemoryConfig(task_type="CAUSAL_LM")
    return TrainingJob("base", tiny.tokenizer(), rows, config, made, validation=rows[:4])


def text_of(job: TrainingJob, epoch: int = 0) -> list[str]:
    return [job.tokenizer.decode(one.prompt) for one in job.tokens_of(epoch)]


def in_front(with_text: TrainingJob, epoch: int = 0) -> list[str]:
    """What stands before each prompt, once the prompts themselves are seen to be the same."""
    plain = text_of(job(None, with_text.rows, objective=with_text.settings.objective))
    found = text_of(with_text, epoch)
    assert all(long.endswith(short) for long, short in zip(found, plain, strict=True))
    return [long[: len(long) - len(short)] for long, short in zip(found, plain, strict=True)]


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A file of letters that stand in no row."""
    (tmp_path / "front.txt").write_text("xyzvwuk " * 40)
    return str(tmp_path / "front.txt")


def test_a_share_of_the_rows_stands_behind_passages_of_the_text(text):
    fronts = in_front(job(Distractors(0.25, 30, text)))
    behind = [front for front in fronts if front]
    assert len(behind) == 5 and len(set(behind)) == 5
    source = Path(text).read_text()
    assert all(front.endswith("\n\n") and front[:-2] in source and len(front) <= 32 for front in behind)


def test_answers_are_as_they_were_and_validation_rows_stand_behind_nothing(text):
    plain, distracted = job(None), job(Distractors(1.0, 30, text))
    assert [one.completion for one in plain.tokens] == [one.completion for one in distracted.tokens_of(0)]
    assert plain.validation_tokens == distracted.validation_tokens
    assert all(in_front(distracted))  # and training rows do


def test_the_seed_draws_rows_and_passages(text):
    one, again, other = (text_of(job(Distractors(0.5, 30, text), seed=seed)) for seed in (1, 1, 2))
    assert one == again and one != other


def test_every_epoch_draws_anew_and_resumes_as_it_was(text):
    one = job(Distractors(0.5, 30, text), seed=1)
    fronts = [in_front(one, epoch) for epoch in range(8)]
    assert all(sum(map(bool, front)) == 10 for front in fronts)
    assert fronts == [in_front(job(Distractors(0.5, 30, text), seed=1), epoch) for epoch in range(8)]
    rows = list(zip(*fronts, strict=True))
    assert all("" in row and any(row) for row in rows)  # each is met both ways
    assert sum(len(set(row)) > 3 for row in rows) > 10  # most of them behind several passages


def test_no_epoch_has_a_row_longer_than_the_model_reads(text):
    plain, with_text = job(None).longest, job(Distractors(1.0, 100, text), max_length=10_000)
    assert all(len(one) <= with_text.longest for epoch in range(5) for one in with_text.tokens_of(epoch))
    assert plain + 50 < with_text.longest < plain + 120


def read_in_training(one: TrainingJob, folder: Path, resume: bool = False) -> list[str]:
    """The texts that training reads, in its order."""
    model = attach(tiny.build(), one.config)
    read: list[str] = []

    def look(module, args, kwargs):
        if module.training:  # the pass that takes the means is not
            batch = zip(kwargs["input_ids"], kwargs["attention_mask"].bool(), strict=True)
            read.extend(written(one, ids[mask]) for ids, mask in batch)

    model.get_base_model().register_forward_pre_hook(look, with_kwargs=True)
    arguments = training_arguments(one.settings, folder, evaluates=False) | {"save_total_limit": None}
    fit(completion_trainer(model, one.tokenizer, one.tokens_of, [], arguments), one.settings, resume)
    return read


def written(one: TrainingJob, ids) -> str:
    return one.tokenizer.decode(ids, skip_special_tokens=True)


def test_the_trainer_reads_the_rows_of_its_epoch_and_goes_on_with_them(text, tmp_path):
    one = job(Distractors(0.5, 30, text), epochs=3, batch_size=4, save_steps=7)
    read = read_in_training(one, tmp_path)
    epochs = [sorted(written(one, row.prompt + row.completion) for row in one.tokens_of(epoch)) for epoch in range(3)]
    assert [sorted(read[start : start + 20]) for start in (0, 20, 40)] == epochs
    assert epochs[0] != epochs[1] != epochs[2]
    for step in (14, 15):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert read_in_training(one, tmp_path, resume=True) == read[4 * 7 :]  # from the midst of the second epoch on


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_that_go_on_in_mid_epoch_read_each_row_once(processes):
    def rows_of(epoch: int) -> list[Tokens]:
        return [Tokens([1000 * epoch + i] * (1 + (7 * i + 3 * epoch) % 11), [1]) for i in range(24)]

    def loader(process: int):
        rows = EpochRows(rows_of)
        sampler = EpochSampler(2, rows, 0)
        batches = DataLoader(rows, 2, sampler=sampler, collate_fn=lambda batch: [one["input_ids"][0] for one in batch])
        return prepare_data_loader(
            batches, num_processes=processes, process_index=process, put_on_device=False, device=torch.device("cpu")
        )

    whole, behind = [], []
    for process in range(processes):
        unbroken = loader(process)
        list(unbroken)
        unbroken.set_epoch(1)
        whole.append(list(unbroken))
        going_on = skip_first_batches(loader(process), 3)
        going_on.set_epoch(1)
        behind.append(list(going_on))
    assert behind == [batches[3:] for batches in whole]
    assert sorted(row for batches in whole for batch in batches for row in batch) == list(range(1000, 1024))


def test_a_dry_run_refuses_what_the_run_refuses(tmp_path, text):
    folder = tmp_path / "model"
    tiny.build().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def plan(distractors: str):
        file = tmp_path / "recipe.yaml"
        file.write_text(
            f"model: {folder}\noutput: {tmp_path}/y\ndata: {{train: {tmp_path}/rows.jsonl}}\n"
            f"training:\n  distractors: {distractors}\n"
        )
        return plan_of(load_recipe(file))

    assert plan(f"{{file: {text}, tokens: 30}}").rows == 20
    with pytest.raises(PrefixMemoryError, match=r"distractors\.tokens=5000, and the text has"):
        plan(f"{{file: {text}, tokens: 5000}}")


def test_every_method_reads_the_same(text):
    memory = job(Distractors(0.5, 30, text))
    assert text_of(memory) == text_of(job(Distractors(0.5, 30, text), config=LoraConfig(task_type="CAUSAL_LM")))


def test_a_row_that_fits_is_never_cut_for_a_passage(text):
    longest = job(None).longest
    tight = job(Distractors(1.0, 100, text), max_length=longest + 12)
    assert tight.rows_cut == 0 and tight.longest == longest + 12
    assert all(len(one) <= longest + 12 and not one.cut for epoch in range(5) for one in tight.tokens_of(epoch))
    lengths = [len(front) for front in in_front(tight)]
    assert max(lengths) > 2 and min(lengths) < max(lengths)


def test_the_answers_of_a_pair_share_the_passage(text):
    pytest.importorskip("trl")
    pairs = job(Distractors(0.5, 30, text), PAIRS, objective="dpo")
    prompts = text_of(pairs)
    assert prompts[::2] == prompts[1::2] and sum(map(bool, in_front(pairs)[::2])) == 4


def test_the_notes_that_ship_have_no_sentence_of_the_essay_that_tests_put_in_front():
    def words(file: Path) -> set[tuple[str, ...]]:
        all_words = file.read_text(encoding="utf-8").lower().split()
        return {tuple(all_words[i : i + 6]) for i in range(len(all_words) - 5)}

    assert len(words(NOTES)) > 1000 and not words(NOTES) & words(ESSAY)
    assert words(ESSAY) & words(ESSAY)


def test_the_essay_itself_is_refused(tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(ESSAY.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(PrefixMemoryError, match=r"copy.txt' is the essay that tests put in front"):
        _ = job(Distractors(file=str(copy))).tokens_of(0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"share": 0.0}, r"distractors.share=0.0 is out of range: give a share in \(0, 1\]"),
        ({"share": 1.5}, "distractors.share=1.5 is out of range"),
        ({"tokens": 0}, "distractors.tokens=0 is out of range: give a number above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, said):
    with pytest.raises(PrefixMemoryError, match=said):
        Distractors(**fields)


def test_a_text_that_is_too_short_is_named(text):
    with pytest.raises(PrefixMemoryError, match=r"distractors\.tokens=5000, and the text has 320 tokens"):
        _ = job(Distractors(tokens=5000, file=text)).tokens_of(0)


def recipe(tmp_path: Path, distractors: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"model: x\noutput: y\ndata: {{train: z.jsonl}}\ntraining:\n  seed: 1\n  distractors: {distractors}\n"
    )
    return file


def test_a_recipe_names_them(tmp_path):
    settings = load_recipe(recipe(tmp_path, "{share: 0.3, tokens: 90}")).training
    assert settings.distractors == Distractors(0.3, 90)


@pytest.mark.parametrize("wrong", ["{shares: 0.3}", "{share: 2}", "{tokens: many}", "0.5"])
def test_a_wrong_recipe_is_one_line_that_names_field_and_line(tmp_path, wrong):
    with pytest.raises(PrefixMemoryError, match=r"recipe.yaml, line 6: .*distractors") as refused:
        load_recipe(recipe(tmp_path, wrong))
    assert "\n" not in str(refused.value)


def suite(tmp_path: Path, distractors: str) -> Path:
    file = tmp_path / "suite.yaml"
    method = f"{{use: lora-attention, training: {{distractors: {distractors}}}}}"
    file.write_text(f"name: s\nmodel: smollm2\ntasks: [banking77]\nmethods: [{method}]\nseeds: [0]\n")
    return file


def test_any_method_of_a_suite_has_them(tmp_path):
    loaded = load_suite(suite(tmp_path, "{tokens: 20}"))
    settings = loaded.settings(loaded.tasks["banking77"], loaded.methods["lora-attention"], 1e-3, 0)
    assert settings.distractors == Distractors(tokens=20)


@pytest.mark.parametrize("wrong", ["{shares: 0.3}", "{share: 2}", "7"])
def test_a_wrong_suite_is_refused_before_anything_runs(tmp_path, wrong):
    with pytest.raises(PrefixMemoryError, match="distractors"):
        load_suite(suite(tmp_path, wrong))


def test_the_text_is_a_part_of_what_a_run_is_known_by(tmp_path, text):
    model = tiny.build()
    one = plan_of_run(job(Distractors(file=text)), model)
    Path(text).write_text("another text " * 40)
    other = plan_of_run(job(Distractors(file=text)), model)
    assert one["distractors_sha256"] != other["distractors_sha256"]
    assert {**one, "distractors_sha256": ""} == {**other, "distractors_sha256": ""}
    assert plan_of_run(job(None), model)["distractors_sha256"] is None


def test_the_text_is_a_part_of_the_key_of_a_comparison(tmp_path, text):
    from prefixmemory.compare.records import Run

    run = Run("banking77", "lora-attention", "final", 1e-3, 0)

    def found() -> str:
        return key(load_suite(suite(tmp_path, f"{{file: {text}}}")), run, {"banking77": "rows"})

    one = found()
    assert one == found()
    Path(text).write_text("another text " * 40)
    assert one != found()
    plain = load_suite(suite(tmp_path, "null"))
    assert (
        dataclasses.asdict(plain.settings(plain.tasks["banking77"], plain.methods["lora-attention"], 1.0, 0))[
            "distractors"
        ]
        is None
    )
