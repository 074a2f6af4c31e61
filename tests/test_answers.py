"""Answers and likelihoods mean what they say, whatever model, tokenizer and adapter bring along."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GenerationConfig

import tiny
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.encoding import behind, encode_prompts, tokenize
from prefixmemory.rows.invocation import invocation_tokens
from prefixmemory.rows.rendering import Example, render
from prefixmemory.rows.rows import Row, check_row
from prefixmemory.scoring.generation import AnswersIn, Sampling, accuracy, answers
from prefixmemory.scoring.likelihood import likelihoods
from prefixmemory.tasks import Task
from prefixmemory.tasks.scoring import room_for_answers, score
from tokenizers_of_all_kinds import Kind, build

TOKENIZER = tiny.tokenizer()
PROMPTS = [f"Text: {text}\nLabel:" for text in ("one", "two words", "3")]
#: Examples in front of a prompt, whose answers are asked for as its own is.
EXAMPLES = "Text: zero\nLabel: none\n\nText: a\nLabel: some\n\n"


def said(model: nn.Module, **more: Any) -> list[str]:
    return answers(model, TOKENIZER, PROMPTS, max_new_tokens=8, one_line=False, **more)


def test_greedy_answers_are_the_likeliest_whatever_the_model_comes_with():
    model, free = tiny.talker(), tiny.talker()
    model.generation_config = GenerationConfig(
        repetition_penalty=1.8, num_beams=3, no_repeat_ngram_size=2, do_sample=True, temperature=5.0,
        encoder_repetition_penalty=5.0,
    )  # fmt: skip
    assert said(model) == said(free)
    found = model.generate(input_ids=torch.tensor([TOKENIZER(PROMPTS[0])["input_ids"]]), max_new_tokens=8)
    assert TOKENIZER.decode(found[0], skip_special_tokens=True) != PROMPTS[0] + said(free)[0]  # the control


def test_a_seed_is_one_of_all_prompts():
    """Equal prompts in different batches draw different answers."""
    drawn = answers(tiny.talker(), TOKENIZER, PROMPTS[:1] * 4, 8, batch_size=1, sampling=Sampling(5.0, seed=1))
    again = answers(tiny.talker(), TOKENIZER, PROMPTS[:1] * 4, 8, batch_size=1, sampling=Sampling(5.0, seed=1))
    assert drawn == again and len(set(drawn)) > 1


def test_a_model_that_trains_trains_on_where_something_is_refused():
    model = tiny.build().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(PrefixMemoryError):
        answers(model, TOKENIZER, PROMPTS, max_new_tokens=8, context="word " * 1000)
    with pytest.raises(PrefixMemoryError):
        likelihoods(model, TOKENIZER, [Example("a", "word " * 1000)])
    assert [module.training for module in model.modules()] == modes
    said(model)
    assert [module.training for module in model.modules()] == modes


def test_answers_are_compared_as_they_were_written(monkeypatch):
    """Some tokenizers clean their texts up: a blank in front of a full stop would be gone."""
    tokenizer = tiny.tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    ids = tokenizer("yes . no", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "yes. no"  # the control
    model = tiny.talker()
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], dim=1)
    )
    assert answers(model, tokenizer, ["a", "b"]) == ["yes . no"] * 2


def waiting(kind: str, name: str) -> nn.Module:
    """An adapter that speaks from the last ``name`` on."""
    tokens = invocation_tokens(name, TOKENIZER, "text")
    if kind == "memory":
        return tiny.with_memory(tiny.talker(), **tiny.DEFAULT, active_from=name, invocation_tokens=tokens)
    model = get_peft_model(
        tiny.talker(),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=tokens),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    return model.eval()


@pytest.mark.parametrize("kind", ["memory", "activated LoRA"])
@pytest.mark.parametrize("name", ["answer", "question"])
def test_an_adapter_waits_for_the_last_invocation_behind_examples_that_hold_it(kind, name):
    """What all prompts begin with is read once, and holds invocations, of which none is the last."""
    model = waiting(kind, name)
    expected, examples = [], [Example(prompt, " yes") for prompt in PROMPTS]
    for prompt in PROMPTS:
        (ids,) = encode_prompts([EXAMPLES + prompt], TOKENIZER)
        whole = torch.tensor([ids])
        written = model.generate(
            input_ids=whole, attention_mask=torch.ones_like(whole), max_new_tokens=8, do_sample=False,
            eos_token_id=TOKENIZER.eos_token_id, pad_token_id=TOKENIZER.pad_token_id,
        )  # fmt: skip
        expected.append(TOKENIZER.decode(written[0, len(ids) :], skip_special_tokens=True).strip())
    assert said(model, context=EXAMPLES) == expected
    behind_all = [Example(EXAMPLES + one.prompt, one.completion) for one in examples]
    for found, right in zip(
        likelihoods(model, TOKENIZER, examples, context=EXAMPLES),
        likelihoods(model, TOKENIZER, behind_all),
        strict=True,
    ):
        assert abs(found.nats - right.nats) < 1e-4
    model.set_adapter("default")
    with model.disable_adapter():
        base = likelihoods(model, TOKENIZER, behind_all)
    assert any(
        abs(a.nats - b.nats) > 1e-2 for a, b in zip(base, likelihoods(model, TOKENIZER, behind_all), strict=True)
    )


def test_a_beginning_of_sequence_token_stands_first_and_nowhere_else():
    tokenizer = build(Kind("byte-level BPE", True, False, True, "no end"))  # its template writes one too
    rows = [check_row("a", {"prompt": "who won?", "completion": "they did"})]
    (example,) = render(rows, tokenizer)
    assert example.prompt.startswith("<s>")
    (ids,) = encode_prompts([behind("A text.\n\n", example.prompt, tokenizer)], tokenizer)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    (plain,) = encode_prompts(["A text.\n\n" + example.prompt], tokenizer)
    assert plain.count(tokenizer.bos_token_id) == 2  # the control
    assert behind("", example.prompt, tokenizer) == example.prompt
    # one that no tokenizer adds is the template's own, such as ChatML's
    own = build(Kind("byte-level BPE", False, False, True, "no end"))
    assert behind("A text.\n\n", "<s>a", own) == "A text.\n\n<s>a"


def short(positions: int) -> nn.Module:
    model = tiny.talker()
    model.config.max_position_embeddings = positions
    return model


def test_a_text_in_front_that_the_model_cannot_read_is_refused():
    model, front = short(40), "x" * 30 + "\n\n"
    for ask in (
        lambda: answers(model, TOKENIZER, PROMPTS, 4, context=front),
        lambda: likelihoods(model, TOKENIZER, [Example(prompt, " yes") for prompt in PROMPTS], context=front),
    ):
        with pytest.raises(
            PrefixMemoryError, match="reads 40 tokens at most, and a row is longer with the text in front"
        ):
            ask()
    assert len(answers(model, TOKENIZER, PROMPTS, 4, context="x\n\n")) == len(PROMPTS)  # the control


def test_a_prompt_that_is_too_long_loses_its_beginning_as_in_training():
    model, prompt = short(40), "y" * 60 + "\nLabel:"
    assert answers(model, TOKENIZER, [prompt], 8) == answers(tiny.talker(), TOKENIZER, [prompt[-32:]], 8)


def exact(scoring: str = "exact_match") -> Task:
    return Task("mine", 1, "", "CC0", scoring, folder="mine")  # type: ignore[arg-type]


def rows_of(*fields: dict[str, Any]) -> list[Row]:
    return [check_row("a", one) for one in fields]


def test_answers_have_room_for_the_longest_right_one():
    long = "a" * 50
    labels = rows_of({"text": "t", "label": "ab"}, {"text": "t", "label": "abcd"})
    assert room_for_answers(exact(), labels, TOKENIZER) == len(" abcd") + 1
    assert room_for_answers(exact(), rows_of({"prompt": "p", "completion": long}), TOKENIZER) == 52
    # a column that is no answer says nothing
    assert room_for_answers(exact(), rows_of({"prompt": "p", "completion": "c", "label": 3}), TOKENIZER) == 32
    for scoring in ("reading", "text", "number"):
        assert room_for_answers(exact(scoring), rows_of({"prompt": "p", "completion": long}), TOKENIZER) == 52
    several = {"prompt": "p", "completion": "c", "references": ["a" * 70, "b"], "answers": ["a" * 60]}
    assert room_for_answers(exact("text"), rows_of(several), TOKENIZER) == 72
    assert room_for_answers(exact("reading"), rows_of(several), TOKENIZER) == 62


# What a chat template writes in front of answers

THOUGHT, OPENED = "<think>\n\n</think>\n\n", "\n</think>\n\n"
CHANNEL = "<|channel|>final<|message|>"
OPENINGS = {  # of Qwen 3, Qwen 3.6 (whose prompt begins the thought), GLM 4.5, gpt-oss, and of simpler ones
    "a thought": (THOUGHT, ["<think>\nParis? </think>\n\n"]),
    "a thought that the prompt began": (OPENED, ["Paris? Or not.</think>"]),
    "an empty thought": ("\n<think></think>\n", ["<think>Paris?</think>"]),
    "a channel": (
        CHANNEL,
        ["<|channel|>analysis<|message|>Paris?<|end|><|start|>assistant<|channel|>final<|message|>"],
    ),
    "a word": ("Answer: ", []),
    "a role": ("<|start|>assistant\n", []),
    "a mark that answers may have": ("<answer>", []),
}


def opening(text: str) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "m['content']", f"({text!r} if m['role'] == 'assistant' else '') + m['content']"
    )
    return tokenizer


@pytest.mark.parametrize("name", OPENINGS)
def test_the_opening_of_a_template_is_no_part_of_an_answer(name):
    written, others = OPENINGS[name]
    tokenizer = opening(written)
    (example,) = render(rows_of({"prompt": "Where?", "completion": "Paris"}), tokenizer)
    assert example.completion == f"{written}Paris<eos>"  # it is learned

    def read(text: str) -> str:
        return AnswersIn(tokenizer)(torch.tensor(tokenizer(f"{text}<eos>", add_special_tokens=False)["input_ids"]))

    for front in (written, *others):
        assert read(f"{front}Paris\nor so") == "Paris\nor so"
    assert read("Paris, <b>France</b>") == "Paris, <b>France</b>"  # where it writes none
    tags = "The tag is </think>, or <answer> in HTML."
    assert read(written + tags) == tags
    if name != "a thought that the prompt began":
        assert read(tags) == tags
    rows = rows_of({"prompt": "Where?", "completion": "a" * 40})
    front = len(tokenizer(written.strip(), add_special_tokens=False)["input_ids"])
    assert room_for_answers(exact(), rows, tokenizer) == 1 + len(" " + "a" * 40) + front


def test_a_model_that_writes_what_it_learned_is_right(monkeypatch):
    """Else every model would have 0 % where a template opens answers."""
    tokenizer = opening(THOUGHT)
    model, rows = tiny.build(), rows_of({"prompt": "Where?", "completion": "Paris"})
    model.resize_token_embeddings(len(tokenizer))
    (tokens,) = tokenize(render(rows, tokenizer), tokenizer, 1000)
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([tokens.completion])], 1)
    )
    assert score(model, tokenizer, exact(), rows).score == 100
    assert score(model, tokenizer, exact("reading"), rows).answers == ["Paris"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_accent_is_the_same_letter_however_it_is_encoded(form):
    """Qwen's tokenizers write what is composed, files of macOS what is not."""
    said = unicodedata.normalize("NFC", "café")
    assert accuracy([said], [unicodedata.normalize(form, "café")]) == 100
    assert accuracy([said], ["cafe"]) == 0
