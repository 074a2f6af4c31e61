"""The edge of prompt and answer, for tokenizers of every kind: training, scoring and answering see the same tokens."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import tiny
from command_line import call, jsonl
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.rows.collator import padding_id
from prefixmemory.rows.encoding import Tokens, encode_prompt, tokenize
from prefixmemory.rows.rendering import Example, render, render_prompt
from prefixmemory.scoring.generation import answers, end_tokens
from prefixmemory.scoring.likelihood import likelihoods
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.settings import TrainingSettings
from tokenizers_of_all_kinds import ALL, Kind, build

ROWS: dict[str, dict[str, Any]] = {
    "label": {"text": "my line is dead", "label": "no connection"},
    "question": {"prompt": "why is it so?", "completion": "so it is"},
    "question, line break": {"prompt": "Question: who won?\nAnswer:\n\n", "completion": "they did"},
    "question, blank": {"prompt": "Question: who won?\nAnswer: ", "completion": "yo, they did"},
    "answer, blank": {"prompt": "Question: who won?\nAnswer:", "completion": " they did, 3 to 1."},
}
PLAIN = Kind("byte-level BPE", False, False, True, "none")
IDS = [f"{k.algorithm}, bos {k.adds_bos:d}, eos {k.adds_eos:d}, pad {k.has_pad:d}, template: {k.template}" for k in ALL]
every_kind = pytest.mark.parametrize("kind", ALL, ids=IDS)


def trained(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_length: int = 1000) -> Tokens:
    """What training sees of ``row``."""
    config, settings = PrefixMemoryConfig(task_type="CAUSAL_LM"), TrainingSettings(max_length=max_length)
    (tokens,) = TrainingJob("base", tokenizer, [row], config, settings).tokens
    return tokens


def of_whole_text(text: str, kind: Kind, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of a rendered text, by the tokenizers library alone."""
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    bos = tokenizer.bos_token_id
    return [bos, *ids] if kind.adds_bos and ids[0] != bos else ids


@every_kind
def test_training_sees_the_ids_of_the_whole_text(kind):
    tokenizer = build(kind)
    for row in ROWS.values():
        (example,) = render([row], tokenizer)
        tokens = trained(row, tokenizer)
        assert tokens.prompt + tokens.completion == of_whole_text(example.prompt + example.completion, kind, tokenizer)


@every_kind
def test_the_last_trained_token_ends_the_answer_and_is_the_only_one_that_does(kind):
    tokenizer = build(kind)
    ends = end_tokens(tiny.build(), tokenizer)
    for row in ROWS.values():
        *answer, last = trained(row, tokenizer).completion
        assert last in ends and not set(answer) & set(ends)


@every_kind
def test_generation_starts_where_the_trained_prompt_ended(kind):
    tokenizer = build(kind)
    for row in ROWS.values():
        name, asked = ("text", row["text"]) if "text" in row else ("prompt", row["prompt"])
        written = encode_prompt(render_prompt(asked, name, tokenizer), tokenizer)
        tokens = trained(row, tokenizer)
        assert written == tokens.prompt
        answer = tokenizer.decode(tokens.completion, skip_special_tokens=True)
        expected = row.get("label") or row["completion"]
        assert answer.strip().replace(" ", "") == expected.strip().replace(" ", "")  # nothing of the prompt is in it


@every_kind
def test_scoring_reads_the_same_tokens_as_training(kind):
    tokenizer, model = build(kind), _model()
    row = ROWS["label"]
    (example,) = render([row], tokenizer)
    tokens = trained(row, tokenizer)
    (found,) = likelihoods(model, tokenizer, [example])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens.prompt + tokens.completion])).logits[0].log_softmax(-1)
    places = range(len(tokens.prompt) - 1, len(tokens) - 1)
    expected = sum(float(logits[i, token]) for i, token in zip(places, tokens.completion, strict=True))
    assert found.nats == pytest.approx(expected, abs=1e-4) and found.tokens == len(tokens.completion)


@pytest.mark.parametrize(
    "kind", [Kind(a, True, True, pad, "none") for a in ("byte-level BPE", "Unigram") for pad in (True, False)]
)
def test_an_answer_behind_a_context_is_that_of_the_whole_text(kind):
    tokenizer, model = build(kind), _model()
    context, prompts = "Question: who won?\nAnswer: they did.\n\n", ["Question: why?\nAnswer:", "so it is, and"]
    said = answers(model, tokenizer, prompts, 5, context=context, one_line=False)
    for prompt, text in zip(prompts, said, strict=True):
        ids = torch.tensor([encode_prompt(context + prompt, tokenizer)])
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False,
            pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        assert text == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _model() -> Any:
    config = copy.deepcopy(tiny.CONFIGS["llama_gqa"])
    config.vocab_size = 512
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().eval()


# Negative controls: what was done before gives other ids


def test_an_answer_by_itself_would_begin_a_new_word():
    tokenizer = build(Kind("Metaspace BPE", False, False, True, "its own end"))
    tokens = trained({"prompt": "why?", "completion": "yo"}, tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.completion)[0] == "y"
    alone = tokenizer("yo<|end|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁") and tokens.completion != alone


def test_plain_tokenizing_would_end_the_prompt():
    tokenizer = build(PLAIN._replace(adds_bos=True, adds_eos=True))
    assert tokenizer("why?")["input_ids"][-1] == tokenizer.eos_token_id
    tokens = trained({"prompt": "why?", "completion": " so"}, tokenizer)
    assert tokens.prompt[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in tokens.prompt
    assert tokens.completion.count(tokenizer.eos_token_id) == 1


def test_a_prompt_by_itself_would_end_in_other_tokens():
    tokenizer = build(PLAIN)
    for prompt in ("Answer:\n\n", "Answer: "):
        alone = tokenizer(prompt)["input_ids"]
        whole = tokenizer(f"{prompt}they")["input_ids"]
        assert whole[: len(alone)] != alone
        prompt_ids = encode_prompt(prompt, tokenizer)
        assert whole[: len(prompt_ids)] == prompt_ids and prompt_ids != alone


def test_a_word_of_prompt_and_answer_is_asked_for_as_it_is_trained():
    """Nothing of a prompt is lost where its last word and the answer are one token: an exception to the whole text."""
    tokenizer = build(PLAIN)
    whole = tokenizer("say yo")["input_ids"]
    (tokens,) = tokenize([Example("say y", "o</s>")], tokenizer, 100)
    assert tokens.prompt == encode_prompt("say y", tokenizer) == tokenizer("say y")["input_ids"]
    assert tokenizer.decode(tokens.completion) == "o</s>" and tokens.prompt + tokens.completion[:-1] != whole


def test_a_tokenizer_without_offsets_gives_the_same(monkeypatch):
    for kind in ALL[::5]:
        tokenizer = build(kind)
        expected = {name: trained(row, tokenizer) for name, row in ROWS.items()}
        with monkeypatch.context() as patch:
            patch.setattr(type(tokenizer), "is_fast", False)
            assert {name: trained(row, tokenizer) for name, row in ROWS.items()} == expected


# Cuts


@pytest.mark.parametrize("template", ["none", "no end"])  # added by the tokenizer; written by the template
def test_a_cut_prompt_keeps_its_first_token(template):
    tokenizer = build(PLAIN._replace(adds_bos=template == "none", template=template))
    row = {"prompt": "why is it so? " * 9, "completion": "so it is"}
    whole = trained(row, tokenizer)
    for length in (len(whole) - 1, 20):
        tokens = trained(row, tokenizer, length)
        assert tokens.cut and len(tokens) == length and tokens.completion == whole.completion
        assert tokens.prompt == [tokenizer.bos_token_id, *whole.prompt[-len(tokens.prompt) + 1 :]]
    assert not whole.cut and not trained(row, tokenizer, len(whole)).cut


def test_the_answers_of_a_pair_keep_the_same_prompt():
    tokenizer = build(PLAIN)
    row = {"prompt": "why is it so? " * 9, "chosen": "so", "rejected": "that is that, and so it is"}
    settings = TrainingSettings(objective="dpo", max_length=30)
    job = TrainingJob("base", tokenizer, [row], PrefixMemoryConfig(task_type="CAUSAL_LM"), settings)
    chosen, rejected = job.tokens
    assert chosen.prompt == rejected.prompt and len(rejected) == 30 > len(chosen)
    assert job.rows_cut == 1


# No end


def without_end(**more: str) -> PreTrainedTokenizerFast:
    tokenizer = build(PLAIN)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **more)


def test_a_tokenizer_without_end_token_is_refused():
    with pytest.raises(PrefixMemoryError, match=r"Row 1: nothing says where the answer ends.*eos_token"):
        trained(ROWS["label"], without_end())
    tokens = trained(ROWS["label"], without_end(eos_token="</s>"))
    assert tokens.completion[-1] == build(PLAIN).eos_token_id


def test_a_chat_template_may_end_answers_where_the_tokenizer_has_no_end():
    tokenizer = without_end(additional_special_tokens=["<|end|>"])
    tokenizer.chat_template = build(PLAIN._replace(template="its own end")).chat_template
    assert tokenizer.decode(trained(ROWS["question"], tokenizer).completion) == "so it is<|end|>"
    with pytest.raises(PrefixMemoryError, match="nothing says where the answer ends"):
        trained(ROWS["label"], tokenizer)


def test_answers_need_neither_padding_nor_end():
    tokenizer = without_end()
    assert tokenizer.pad_token_id is None and padding_id(tokenizer) == 0
    model = _model()
    model.generation_config.eos_token_id = None
    said = answers(model, tokenizer, ["why?", "so it is, and that is"], 4, one_line=False)
    alone = [answers(model, tokenizer, [prompt], 4, one_line=False)[0] for prompt in ("why?", "so it is, and that is")]
    assert said == alone


def test_an_end_is_not_written_twice():
    tokenizer = build(PLAIN)
    tokens = trained({"prompt": "why?", "completion": " so</s>"}, tokenizer)
    assert tokens.completion.count(tokenizer.eos_token_id) == 1


# What a user is told


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_cut_rows_are_told_of_once_in_run_and_dry_run_and_in_the_record(tmp_path, monkeypatch, objective):
    if objective == "dpo":
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    tiny.save_tiny(tmp_path / "base")
    answer = {"chosen": "so", "rejected": "no"} if objective == "dpo" else {"completion": "so"}
    jsonl(tmp_path / "rows.jsonl", [{"prompt": "x" * (9 * i), **answer} for i in range(1, 5)])
    words = ["train", "--model", "base", "--data", "rows.jsonl", "--objective", objective, "--epochs", 1]
    words += ["--validation", "rows.jsonl", "--output"]  # so that each row counts twice
    told = "4 rows are longer than max_length=30 and lose the beginning of their prompt, system message included."
    run = call(*words, "cut", "--max-length", 30)
    assert run.code == 0 and run.remarks.splitlines() == [told]
    assert (
        "longest 30 tokens, 4 rows lose the beginning" in call(*words, "new", "--max-length", 30, "--dry-run").success
    )
    assert json.loads(Path("cut", "run.json").read_text())["rows_cut"] == 4
    whole = call(*words, "whole", "--max-length", 50)
    assert whole.code == 0 and whole.remarks == ""
    assert "lose" not in call(*words, "new", "--max-length", 50, "--dry-run").success
    assert json.loads(Path("whole", "run.json").read_text())["rows_cut"] == 0


def test_a_run_and_a_dry_run_tokenise_their_rows_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save_tiny(tmp_path / "base")
    jsonl(tmp_path / "rows.jsonl", [ROWS["question"]] * 3)
    counts = []

    def counted(examples: list[Example], *more: Any) -> list[Tokens]:
        counts.append(len(examples))
        return tokenize(examples, *more)

    monkeypatch.setattr("prefixmemory.training.job.tokenize", counted)
    for words in (("--dry-run",), ()):
        call("train", "--model", "base", "--data", "rows.jsonl", "--output", "new", *words).success  # noqa: B018
        assert [count for count in counts if count] == [3]
        counts.clear()
