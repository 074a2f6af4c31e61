"""Columns that mean nothing to rows of a kind play no part in them, whatever their names."""

from __future__ import annotations

import pytest

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.rows.rendering import question_and_answer, render
from prefixmemory.rows.rows import answers_a_row, check_row, with_one_answer
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.preferences import _dpo_rows, _kto_rows
from prefixmemory.training.settings import TrainingSettings

PAIRS = [{"prompt": f"how is {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(4)]
JUDGED = [{"prompt": f"how is {i}?", "completion": f"so {i}", "label": i % 2 == 0} for i in range(4)]


def job(rows: list[dict[str, object]], objective: str) -> TrainingJob:
    settings = TrainingSettings(objective=objective, batch_size=2)  # type: ignore[arg-type]
    checked = [check_row(f"rows, line {i}", row) for i, row in enumerate(rows)]
    return TrainingJob("base", tiny.tokenizer(), checked, PrefixMemoryConfig(task_type="CAUSAL_LM"), settings)


def test_pairs_stay_pairs_beside_a_completion():
    wide = [{**row, "completion": "something else", "label": True} for row in PAIRS]
    assert answers_a_row(wide) == 2
    assert with_one_answer(wide) == with_one_answer(PAIRS) and len(with_one_answer(wide)) == 8
    one, other = job(PAIRS, "dpo"), job(wide, "dpo")
    made = [_dpo_rows(each.rows, each.tokens_of(0), each.settings) for each in (one, other)]
    assert made[0] == made[1] and len(made[0]) == len(PAIRS)
    text = one.tokenizer.decode(made[0][2]["rejected_ids"])
    assert "bad 2" in text  # the right one beside the right prompt


def test_judged_answers_stay_as_they_are_beside_a_chosen_one():
    wide = [{**row, "chosen": "another"} for row in JUDGED]
    one, other = job(JUDGED, "kto"), job(wide, "kto")
    made = [_kto_rows(each.rows, each.tokens_of(0), each.settings) for each in (one, other)]
    assert made[0] == made[1] and [row["label"] for row in made[0]] == [row["label"] for row in JUDGED]
    pairs = _kto_rows(PAIRS, job(PAIRS, "kto").tokens_of(0), TrainingSettings(objective="kto"))
    assert [row["label"] for row in pairs] == [True] * 4 + [False] * 4  # the control


def test_an_instruction_stays_one_beside_a_prompt():
    row = {"instruction": "add", "input": "1 and 2", "output": "3", "prompt": "### Instruction: add"}
    assert question_and_answer(row) == ("add\n\n1 and 2", "3")
    (example,) = render([check_row("a", row)], tiny.tokenizer(chat=False))
    assert example.prompt == "add\n\n1 and 2"
    both = {"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}
    assert question_and_answer(both) == ("p", "c")


@pytest.mark.parametrize("value", [0, float("nan"), ["a"], {"a": 1}])
def test_the_input_of_an_instruction_is_a_text_or_nothing(value):
    with pytest.raises(PrefixMemoryError, match=r"rows, line 3: 'input' is .*; it must be a text, or be left out"):
        check_row("rows, line 3", {"instruction": "add", "input": value, "output": "3"})
    for empty in ("", None):
        assert question_and_answer(check_row("a", {"instruction": "add", "input": empty, "output": "3"}))[0] == "add"
    assert check_row("a", {"prompt": "p", "completion": "c", "input": value})  # means nothing to other kinds
