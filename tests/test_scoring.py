"""Scores equal computations that share no code with them, and hand-made cases."""

from __future__ import annotations

import math
import random
import re
import string
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.functional import log_softmax

import tiny
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.rendering import Example, render
from prefixmemory.rows.rows import Row, check_row
from prefixmemory.scoring.generation import repeated
from prefixmemory.scoring.likelihood import likelihoods
from prefixmemory.tasks import Task, scoring
from prefixmemory.tasks.metrics import bleu, last_number, rouge_l, squad_exact_match, squad_f1
from prefixmemory.tasks.outputs import alpaca_eval, prompts
from prefixmemory.tasks.scoring import Scored, score
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.methods import attach, method_config
from prefixmemory.training.settings import TrainingSettings

pytestmark = [
    # TRL 1.16 switches gradient checkpointing on and off under the names that transformers 5.23 deprecates.
    pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning"),
    # Methods that prepend virtual tokens count positions on their own.
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning"),
]

TOKENIZER = tiny.tokenizer()


def rows_of(*fields: dict[str, Any]) -> list[Row]:
    return [check_row(f"rows.jsonl, line {i}", one) for i, one in enumerate(fields, start=1)]


def task(scoring: str, **fields: Any) -> Task:
    fields.setdefault("max_new_tokens", 6)
    if scoring == "preference":
        fields.setdefault("training", {"objective": "dpo"})
    return Task("mine", 1, "", "CC0", scoring, folder="mine", **fields)  # type: ignore[arg-type]


METHODS: dict[str, Callable[[], nn.Module]] = {
    "base": tiny.talker,
    "memory": lambda: tiny.with_memory(tiny.talker()),
    "lora": lambda: _noisy(LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2)),
    "prompt_tuning": lambda: _noisy(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "prefix_tuning": lambda: _noisy(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
}


def _noisy(config: PeftConfig) -> PeftModel:
    model = get_peft_model(tiny.talker(), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def log_likelihood(model: nn.Module, prompt: str, completion: str) -> tuple[float, int]:
    """Of the tokens of ``completion``, one row alone, without padding; and their number."""
    ids, answer = TOKENIZER(prompt + completion)["input_ids"], TOKENIZER(completion)["input_ids"]
    with torch.no_grad():
        scores = log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -len(answer) - 1 : -1], -1)
    return float(scores[range(len(answer)), answer].sum()), len(answer)


def asked(text: str) -> str:
    return f"<|user|>{text}<eos><|assistant|>"


def greedy(model: nn.Module, prompt: str, length: int = 6) -> str:
    """The likeliest text, one token at a time."""
    ids = TOKENIZER(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + length and ids[-1] != TOKENIZER.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return TOKENIZER.decode(ids[start:], skip_special_tokens=True)


def first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Put words into the model's mouth."""

    def put(*texts: str) -> None:
        def answers(*_: object, one_line: bool = True, **__: object) -> list[str]:
            return [first_line(text) if one_line else text.strip() for text in texts]

        monkeypatch.setattr("prefixmemory.tasks.scoring.answers", answers)

    return put


def scored(kind: str, rows: list[Row], model: nn.Module | None = None, **more: Any) -> Scored:
    return score(model or tiny.build(), TOKENIZER, task(kind), rows, **more)


# Numbers

NUMBERS = {
    "#### 24": "24", "24.0": "24", "1,024": "1024", "$5": "5", "$1,234.50 in all": "1234.5", "-3": "-3",
    "so 48-24=24.": "24", "the difference is 10-4": "4", "it fell to -$5": "-5", "−7 degrees": "-7",
    ".5 of them": "0.5", "first 3, then 4": "4", "24%": "24", "12,34": "34", "<<48/2=24>>24 items.\n#### 24": "24",
    "#### 18\n\nQuestion: what is 2+2?": "18", "####\n18": "18", "5 apples\n#### none": "5", "**72**": "72",
    "2e5": "200000", "1.5e-3": "0.0015", "3/4": "0.75", "x = -1/4.": "-0.25", "1/0": "1", "2e": "2",
    "The answer is 7. Thus 7.": "7", "version 1.2.3": "3", "1,000,000 stars": "1000000", "(-2)": "-2",
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS)
def test_the_result_is_found(text):
    assert last_number(text) == Fraction(NUMBERS[text])


@pytest.mark.parametrize("text", ["", "none", "####", "- . ,", "twelve"])
def test_a_text_without_a_number_has_no_result(text):
    assert last_number(text) is None


def test_numbers_are_compared_as_numbers(says):
    rows = rows_of(
        {"prompt": "a", "completion": "1+1=2\n#### 2", "answer": "2"},
        {"prompt": "b", "completion": "so 3", "answer": 1024},  # the field wins
        {"prompt": "c", "completion": "half of 10\n#### 5"},  # no field
        {"instruction": "d", "output": "7"},
        {"prompt": "e", "completion": "8"},
    )
    says("2.00", "that is 1,024", "#### 4", "none", "x\n8\n\n")
    found = scored("number", rows)
    assert found.points == [100.0, 100.0, 0.0, 0.0, 100.0] and found.score == 60.0
    assert found.answers[1] == "that is 1,024"


def test_a_row_whose_answer_has_no_number_is_named(says):
    says("1", "2")
    with pytest.raises(PrefixMemoryError, match=r"rows.jsonl, line 2: scoring='number'.*'none'"):
        scored("number", rows_of({"prompt": "a", "completion": "1"}, {"prompt": "b", "completion": "none"}))


# What a model writes


@pytest.mark.parametrize("name", ["base", "memory", "prompt_tuning"])
@pytest.mark.parametrize("context", ["", "1 2 3\n\n"])
def test_generated_answers_are_those_of_a_computation_token_by_token(name, context):
    model = METHODS[name]()
    texts = [greedy(model, context + asked(f"{i}{'?' * (i % 3)}")) for i in range(8)]
    said = [first_line(text) or "-" for text in texts]
    fields = [
        {"prompt": f"{i}{'?' * (i % 3)}", "completion": text if i % 2 else "no such text"}
        for i, text in enumerate(said)
    ]
    found = scored("exact_match", rows_of(*fields), model, context=context, batch_size=3)
    assert found.answers == [first_line(text) for text in texts]
    assert found.points == [0.0, 100.0] * 4 and found.score == 50.0
    whole = scored("number", rows_of(*({**one, "answer": 1} for one in fields)), model, context=context, batch_size=3)
    assert whole.answers == [text.strip() for text in texts]  # all lines


def test_the_task_says_how_long_an_answer_may_be():
    rows = rows_of({"prompt": "0", "completion": "x"})
    model = tiny.talker()
    found = score(model, TOKENIZER, task("number", max_new_tokens=3), [Row(rows[0], answer="1")], max_new_tokens=9)
    assert found.answers == [greedy(model, asked("0"), 3).strip()]
    found = score(model, TOKENIZER, task("number", max_new_tokens=None), [Row(rows[0], answer="1")], max_new_tokens=9)
    assert found.answers == [greedy(model, asked("0"), 9).strip()]


def test_the_right_answer_has_no_end_token_whatever_the_chat_template_writes_behind_it(says):
    """SmolLM2's template ends an answer with <|im_end|> and a new line."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'<eos>'", "'<eos>\n'")
    says("yes", "no")
    rows = rows_of({"prompt": "a", "completion": "yes"}, {"prompt": "b", "completion": " yes\n"})
    assert score(tiny.build(), tokenizer, task("exact_match"), rows).points == [100.0, 0.0]


# Reading


def official_normalize(text: str) -> str:
    """The steps of evaluate-v1.1.py, in its order."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1(said: str, right: str) -> float:
    words, expected = official_normalize(said).split(), official_normalize(right).split()
    left = list(expected)
    same = 0
    for word in words:
        if word in left:
            left.remove(word)
            same += 1
    return 2 * same / (len(words) + len(expected)) if same else 0.0


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("The cat.", "cat", 1, 1),
        ("the cat sat", "A cat sat down!", 0, 0.8),
        ("U.S.A.", "usa", 1, 1),
        ("another  one", "Another\tone", 1, 1),  # "an" within a word stays
        ("yes yes yes", "yes", 0, 0.5),
        ("308", "308 points", 0, 2 / 3),
        ("", "Rollo", 0, 0),
        ("the", "a", 1, 0),  # nothing is left of either: as the official script has it
        ("Denver Broncos", "Carolina Panthers", 0, 0),
    ],
)
def test_squad_by_hand(said, right, exact, f1):
    assert squad_exact_match(said, right) == exact and squad_f1(said, right) == pytest.approx(f1)


def test_squad_is_that_of_the_official_script():
    draw = random.Random(0)
    words = ["the", "a", "an", "The", "cat,", "cat", "sat", "St.", "O'Neil", "1,000", "-", "Île", "an."]
    for _ in range(300):
        said, right = (" ".join(draw.choices(words, k=draw.randint(0, 6))) for _ in range(2))
        assert squad_f1(said, right) == pytest.approx(official_f1(said, right))
        assert squad_exact_match(said, right) == (official_normalize(said) == official_normalize(right))


def test_the_best_of_several_answers_counts(says):
    rows = rows_of(
        {"prompt": "a", "completion": "Rollo"},
        {"prompt": "b", "completion": "x", "answers": ["no", "big cat"]},
        {"prompt": "c", "completion": "x", "answers": {"text": ["dog"], "answer_start": [3]}},
    )
    says("rollo!", "cat", "the dog barks")
    found = scored("reading", rows)
    assert found.points == pytest.approx([100, 200 / 3, 200 / 3])
    assert found.score == pytest.approx(sum(found.points) / 3)
    assert found.metrics == {"exact match (%)": pytest.approx(100 / 3)}


@pytest.mark.parametrize("wrong", ["one", [], [1], {"texts": ["a"]}])
def test_answers_that_are_no_texts_are_named(says, wrong):
    says("x")
    with pytest.raises(PrefixMemoryError, match=r"rows.jsonl, line 1: 'answers' is .* must be a list of texts"):
        scored("reading", rows_of({"prompt": "a", "completion": "b", "answers": wrong}))


# Text


def ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu_by_hand(said: list[str], references: list[list[str]]) -> float:
    """Papineni et al. 2002, for texts of words and blanks: clipped counts, the length of the nearest reference."""
    right, total, length, nearest = [0] * 4, [0] * 4, 0, 0
    for text, several in zip(said, references, strict=True):
        words = text.split()
        length += len(words)
        nearest += min((abs(len(one.split()) - len(words)), len(one.split())) for one in several)[1]
        for n in range(1, 5):
            allowed: Counter[tuple[str, ...]] = Counter()
            for one in several:
                allowed |= ngrams(one.split(), n)
            counts = ngrams(words, n)
            right[n - 1] += sum(min(count, allowed[gram]) for gram, count in counts.items())
            total[n - 1] += sum(counts.values())
    brevity = min(1.0, math.exp(1 - nearest / length))
    return 100 * brevity * math.exp(sum(math.log(r / t) for r, t in zip(right, total, strict=True)) / 4)


def lcs(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence."""
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + lcs(one[:-1], other[:-1])
    return max(lcs(one[:-1], other), lcs(one, other[:-1]))


SAID = ["the blue spice is a cheap coffee shop near the river", "aromi serves fast food in the city centre"]
REFERENCES = [
    ["the blue spice is a coffee shop near the river", "near the river is a cheap coffee shop called blue spice"],
    ["aromi is a fast food place in the city centre", "aromi serves food", "in the centre aromi serves fast food"],
]


def test_bleu_is_that_of_the_paper():
    assert bleu(SAID, REFERENCES) == pytest.approx(bleu_by_hand(SAID, REFERENCES))
    assert bleu(SAID, [several[::-1] for several in REFERENCES]) == pytest.approx(bleu(SAID, REFERENCES))
    first = [several[:1] for several in REFERENCES]
    assert bleu(SAID, first) == pytest.approx(bleu_by_hand(SAID, first))
    assert bleu(SAID, first) < bleu(SAID, REFERENCES) - 1  # further references are seen


def test_a_perfect_answer_has_100(says):
    fields = [
        {"prompt": "a", "completion": several[0], "references": several}
        if i
        else {"prompt": "a", "completion": SAID[0]}
        for i, several in enumerate(REFERENCES)
    ]
    says(SAID[0], REFERENCES[1][2])
    found = scored("text", rows_of(*fields))
    assert found.score == pytest.approx(100) and found.points == pytest.approx([100, 100])
    assert found.metrics == {"ROUGE-L (%)": pytest.approx(100)}
    says("", "no idea")
    found = scored("text", rows_of(*fields))
    assert found.score < 1 and found.points == [0.0, 0.0]


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    found = rouge_l(SAID, REFERENCES)
    for text, several, value in zip(SAID, REFERENCES, found, strict=True):
        by_hand = [2 * lcs(text.split(), one.split()) / (len(text.split()) + len(one.split())) for one in several]
        assert value == pytest.approx(max(by_hand)) and max(by_hand) > min(by_hand) + 0.05


@pytest.mark.parametrize("module", ["sacrebleu", "rouge_score"])
def test_a_package_that_is_missing_is_named(says, monkeypatch, module):
    says("x")
    monkeypatch.setattr("prefixmemory.tasks.metrics.find_spec", lambda name: None if name == module else "there")
    with pytest.raises(
        PrefixMemoryError, match=rf"needs {module.replace('_', '-')}: pip install 'prefixmemory\[compare\]'"
    ):
        task("text").check_installed()
    with pytest.raises(PrefixMemoryError, match="pip install"):
        scored("text", rows_of({"prompt": "a", "completion": "b"}))
    task("loss").check_installed()  # needs neither


# Likelihood

#: Of unlike lengths, so that batches are padded; of several kinds, one a list.
QUESTIONS = [{"prompt": "why" + "?" * i, "completion": "so" + "!" * (i % 3)} for i in range(7)]
TICKETS = [{"text": f"line {i}" + " again" * (i % 3), "label": "abc"[i % 3] * (1 + i % 2)} for i in range(5)]


def rendered(row: dict[str, str]) -> tuple[str, str]:
    if "text" in row:
        return f"Text: {row['text']}\nLabel:", f" {row['label']}<eos>"
    return asked(row["prompt"]), f"{row['completion']}<eos>"


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("fields", [QUESTIONS, TICKETS], ids=["questions", "tickets"])
@pytest.mark.parametrize("context", ["", "once upon a time\n\n"])
def test_the_loss_is_that_of_an_independent_computation(name, fields, context):
    model = METHODS[name]()
    by_row = [log_likelihood(model, context + rendered(row)[0], rendered(row)[1]) for row in fields]
    found = scored("loss", rows_of(*fields), model, context=context, batch_size=3)
    loss = -sum(nats for nats, _ in by_row) / sum(tokens for _, tokens in by_row)
    assert found.score == pytest.approx(-loss, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.points == pytest.approx([nats / tokens for nats, tokens in by_row], rel=1e-5)
    assert abs(sum(found.points) / len(found.points) - found.score) > 1e-4  # longer completions weigh more in the score


def test_a_right_answer_may_end_otherwise_than_with_the_end_token():
    model, context = tiny.talker(), "Text: yes\nLabel: a\n\n"
    whole = [rendered(row) for row in TICKETS]
    by_row = [
        log_likelihood(model, context + prompt, answer.removesuffix("<eos>") + "\n\n") for prompt, answer in whole
    ]
    found = scored("loss", rows_of(*TICKETS), model, context=context, end="\n\n")
    assert found.points == pytest.approx([nats / tokens for nats, tokens in by_row], rel=1e-5)
    assert found.points != pytest.approx(scored("loss", rows_of(*TICKETS), model, context=context).points, rel=1e-3)


LABEL = TOKENIZER("Label:", add_special_tokens=False)["input_ids"]


def test_a_memory_that_waits_for_its_invocation_is_scored_behind_a_text_that_is_read_once():
    model = tiny.with_memory(tiny.talker(), active_from="invocation", invocation_tokens=LABEL)
    context = "once upon a time\n\n"
    found = scored("loss", rows_of(*TICKETS), model, context=context, batch_size=3)

    def by_row(model: nn.Module) -> list[float]:
        pairs = [log_likelihood(model, context + rendered(row)[0], rendered(row)[1]) for row in TICKETS]
        return [nats / tokens for nats, tokens in pairs]

    assert found.points == pytest.approx(by_row(model), rel=1e-5)
    with model.disable_adapter():
        assert found.points != pytest.approx(by_row(model), rel=1e-2)  # it does speak
    speaks_always = tiny.with_memory(tiny.talker())
    assert found.points != pytest.approx(by_row(speaks_always), rel=1e-2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("context", ["", "once upon a time\n\n"])
def test_a_text_that_all_prompts_begin_with_is_read_once(name, context):
    model = METHODS[name]()
    read: list[int] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    scored("loss", rows_of(*TICKETS), model, context=context, batch_size=1)
    alone = sum(len(TOKENIZER("".join(rendered(row)))["input_ids"]) for row in TICKETS)
    once = len(TOKENIZER(context)["input_ids"]) if context else 0
    assert sum(read) <= alone + once


def test_what_greedy_decoding_would_write_is_told_from_what_it_would_not():
    model = METHODS["memory"]()
    ids = TOKENIZER(asked("why?"))["input_ids"]
    with torch.no_grad():
        while len(ids) < 60 and ids[-1] != TOKENIZER.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    writes = TOKENIZER.decode(ids[len(TOKENIZER(asked("why?"))["input_ids"]) :])
    examples = [Example(asked("why?"), writes), Example(asked("why?"), writes[:-1] + "~"), Example(asked("why?"), "~")]
    found = likelihoods(model, TOKENIZER, examples, batch_size=2)
    assert [one.greedy for one in found] == [True, False, False]


def test_the_loss_does_not_depend_on_how_rows_are_batched(monkeypatch):
    model = METHODS["memory"]()
    whole = scored("loss", rows_of(*QUESTIONS), model)
    for limit in (1, 12):
        monkeypatch.setattr("prefixmemory.scoring.likelihood.TOKENS_A_BATCH", limit)
        parts = scored("loss", rows_of(*QUESTIONS), model)
        assert parts.points == pytest.approx(whole.points, rel=1e-5) and parts.score == pytest.approx(whole.score)


def test_behind_a_long_text_few_rows_copy_its_cache_at_once(monkeypatch):
    model, context = METHODS["memory"](), "a text in front of all\n\n"
    examples = [Example(asked(f"why {'so ' * i}?"), "yes") for i in range(5)]
    read: list[tuple[int, int]] = []

    def copied(cache, rows):
        read.append((rows, cache.get_seq_length()))
        return repeated(cache, rows)

    monkeypatch.setattr("prefixmemory.scoring.likelihood.repeated", copied)
    whole = likelihoods(model, TOKENIZER, examples, context=context)
    monkeypatch.setattr("prefixmemory.scoring.likelihood.CACHED_TOKENS", 2 * read[0][1] + 1)
    parts = likelihoods(model, TOKENIZER, examples, context=context)
    assert [rows for rows, _ in read] == [5, 2, 2, 1]
    assert [one.nats for one in parts] == pytest.approx([one.nats for one in whole], rel=1e-5)


@pytest.mark.parametrize("rows", [3, 1])
@pytest.mark.parametrize("name", ["question", "answer"])
def test_an_activated_lora_speaks_behind_a_text_that_was_read_before(name, rows):
    """PEFT looks for its invocation in the tokens of each pass alone; all rows may begin with it, or all of them."""
    texts = [{"text": question, "label": "yes"} for question in ("why 1?", "how old", "green")]
    section = {"name": "lora", "target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": name}
    job = TrainingJob("base", TOKENIZER, texts, method_config(section))
    model = attach(tiny.build(), job.config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    context, examples = f"a text\n\n{texts[0]['text']}\nText: of old\nLabel: no\n\n", render(texts, TOKENIZER)[:rows]
    found = [one.nats for one in likelihoods(model, TOKENIZER, examples, context=context)]
    whole = [Example(context + one.prompt, one.completion) for one in examples]
    assert found == pytest.approx([one.nats for one in likelihoods(model, TOKENIZER, whole)], rel=1e-5)
    with model.disable_adapter():
        base = [one.nats for one in likelihoods(model, TOKENIZER, whole)]
    assert all(abs(one - other) > 1e-3 for one, other in zip(found, base, strict=True))


def test_scoring_leaves_the_mode_of_the_model():
    for training in (True, False):
        model = METHODS["lora"]().train(training)
        scored("loss", rows_of(*QUESTIONS[:2]), model)
        assert model.training is training


# Preferences

PAIRS = [
    {"prompt": f"how is {i}?", "chosen": "fine" + "!" * (4 * (i % 3)), "rejected": "bad" * (1 + i % 4)}
    for i in range(9)
]


def pair_likelihoods(model: nn.Module) -> list[tuple[tuple[float, int], ...]]:
    return [
        tuple(log_likelihood(model, asked(row["prompt"]), f"{row[which]}<eos>") for which in ("chosen", "rejected"))
        for row in PAIRS
    ]


def share(margins: list[float]) -> float:
    return 100 * sum(margin > 0 for margin in margins) / len(margins)


@pytest.mark.parametrize("objective", ["dpo", "kto", "simpo"])
@pytest.mark.parametrize("name", ["memory", "lora", "prompt_tuning"])
def test_preferences_are_those_of_an_independent_computation(name, objective):
    model = METHODS[name]()
    ours, base = pair_likelihoods(model), pair_likelihoods(tiny.talker())
    by_token = [chosen[0] / chosen[1] - rejected[0] / rejected[1] for chosen, rejected in ours]
    rewards = [
        0.5 * ((one[0][0] - before[0][0]) - (one[1][0] - before[1][0])) for one, before in zip(ours, base, strict=True)
    ]
    settings = {"objective": objective, "beta": 0.5}
    found = score(model, TOKENIZER, task("preference", training=settings), rows_of(*PAIRS), batch_size=4)
    expected = by_token if objective == "simpo" else rewards
    assert found.points == [100.0 * (margin > 0) for margin in expected] and found.score == pytest.approx(
        share(expected)
    )
    assert found.metrics == {
        "likelihood accuracy (%)": pytest.approx(share(by_token)),
        "likelihood margin (nats a token)": pytest.approx(sum(by_token) / 9, rel=1e-4),
        "implicit reward accuracy (%)": pytest.approx(share(rewards)),
        "implicit reward margin (nats)": pytest.approx(sum(rewards) / 9, rel=1e-4),
    }
    assert [margin > 0 for margin in by_token] != [margin > 0 for margin in rewards]  # the two are told apart
    # how the run was trained wins over what the task says
    found = score(
        model,
        TOKENIZER,
        task("preference"),
        rows_of(*PAIRS),
        settings=TrainingSettings(**settings),  # type: ignore[arg-type]
    )
    assert found.score == pytest.approx(share(expected))
    if objective != "simpo":
        assert found.metrics["implicit reward margin (nats)"] == pytest.approx(sum(rewards) / 9, rel=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_a_model_without_adapter_is_scored_by_likelihood_alone(objective):
    model = tiny.talker()
    by_token = [chosen[0] / chosen[1] - rejected[0] / rejected[1] for chosen, rejected in pair_likelihoods(model)]
    found = score(model, TOKENIZER, task("preference", training={"objective": objective}), rows_of(*PAIRS))
    assert found.score == pytest.approx(share(by_token)) and set(found.metrics) == {
        "likelihood accuracy (%)", "likelihood margin (nats a token)",
    }  # fmt: skip


def test_an_adapter_that_changes_nothing_prefers_each_answer_in_half():
    model = tiny.with_memory(tiny.talker(), fill=False)
    found = score(model, TOKENIZER, task("preference"), rows_of(*PAIRS))
    assert found.points == [50.0] * 9 and found.metrics["implicit reward margin (nats)"] == 0.0


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_the_trainers_of_trl_count_the_same(tmp_path: Path, objective: str):
    pytest.importorskip("trl")
    from prefixmemory import PrefixMemoryConfig
    from prefixmemory.training.job import TrainingJob
    from prefixmemory.training.loop import training_arguments
    from prefixmemory.training.preferences import preference_trainer

    settings = TrainingSettings(objective=objective, learning_rate=0.02, epochs=2, batch_size=9)  # type: ignore[arg-type]
    config = PrefixMemoryConfig(task_type="CAUSAL_LM")
    job = TrainingJob("base", TOKENIZER, PAIRS[:6], config, settings, PAIRS)
    trainer = preference_trainer(tiny.talker(), job, training_arguments(settings, tmp_path, evaluates=True))
    trainer.train()
    theirs = trainer.evaluate()
    found = score(trainer.model, TOKENIZER, task("preference"), rows_of(*PAIRS), settings=settings)
    assert found.score == pytest.approx(100 * theirs["eval_rewards/accuracies"], abs=1e-3)
    margin = (
        found.metrics["implicit reward margin (nats)"]
        if objective == "dpo"
        else 2.0 * found.metrics["likelihood margin (nats a token)"]
    )
    assert margin == pytest.approx(theirs["eval_rewards/margins"], rel=1e-3) and abs(margin) > 1e-3


# AlpacaEval


def test_outputs_have_the_format_of_alpaca_eval():
    rows = rows_of(
        {"instruction": "Name a lake.", "output": "Como", "input": ""},
        {"instruction": "Translate.", "input": "Haus", "output": "house", "dataset": "koala"},
        {"prompt": "Why?", "chosen": "a", "rejected": "b"},
        {"prompt": "How?", "completion": "so"},
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I"}]},
    )
    found = alpaca_eval(rows, ["1", "2", "3", "4", "5"], "memory")
    assert found[0] == {"instruction": "Name a lake.", "output": "1", "generator": "memory", "dataset": "prefixmemory"}
    assert [one["instruction"] for one in found] == ["Name a lake.", "Translate.\n\nHaus", "Why?", "How?", "Who?"]
    assert [one["output"] for one in found] == list("12345") and found[1]["dataset"] == "koala"
    assert alpaca_eval(rows[:1], ["1"], "memory", "dolly")[0]["dataset"] == "dolly"
    with pytest.raises(ValueError, match="shorter"):
        alpaca_eval(rows, ["1"], "memory")


def test_prompts_of_every_kind_of_row():
    assert prompts(rows_of(*PAIRS[:2]), TOKENIZER) == [asked("how is 0?"), asked("how is 1?")]
    assert prompts(rows_of(QUESTIONS[1]), TOKENIZER) == [asked("why?")]
    assert prompts(rows_of(TICKETS[0]), TOKENIZER) == ["Text: line 0\nLabel:"]


def test_a_margin_that_is_no_number_is_no_preference():
    assert scoring._preferred([1.0, 0.0, -1.0]) == [100.0, 50.0, 0.0]
    assert math.isnan(scoring._preferred([math.nan])[0])


def test_an_answer_of_several_lines_is_compared_as_a_whole(says):
    poem = "roses are red\nviolets are blue\nand so on it goes"
    says(f"{poem}\n", f"{poem}\n")
    several = [{"prompt": "a", "completion": poem}] * 2
    assert scored("text", rows_of(*several)).score == pytest.approx(100)
    assert scored("reading", rows_of(*several)).score == pytest.approx(100)
    line = "roses are red, violets are blue"  # what is written behind one is no answer
    says(poem, f"{line}\nAsk me more.")
    for kind in ("text", "reading"):
        found = scored(kind, rows_of(several[0], {"prompt": "a", "completion": line}))
        assert found.points == pytest.approx([100, 100]) and found.answers == [poem, line]
