"""The invocation that recipes find by themselves: in every prompt as it is rendered, and nowhere wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, invocation_tokens
from prefixmemory.adapters.evaluate import refuse_untrained
from prefixmemory.adapters.loading import Adapter
from prefixmemory.models.loading import load_tokenizer, smollm2
from prefixmemory.rows.distractors import Distractors
from prefixmemory.rows.encoding import begins, encode_prompt, tokenize
from prefixmemory.rows.invocation import check_invoked, settle
from prefixmemory.rows.rendering import Example, render
from prefixmemory.scoring.generation import answers
from prefixmemory.scoring.likelihood import likelihoods
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.methods import attach, method_config
from prefixmemory.training.settings import TrainingSettings
from prefixmemory.tuner.active_tokens import speaking
from tokenizers_of_all_kinds import ALL, build

TEXTS = [{"text": "Where is my card?", "label": "card"}, {"text": "Lost it (yesterday)", "label": "lost"}]
TALKS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {
        "messages": [
            {"role": "user", "content": "Hi, you"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
        ]
    },
]
PROMPTS = [{"prompt": "Add 1 and 1.", "completion": "2"}, {"prompt": "And 2, 3?", "completion": "5"}]


def rows_of(rows, tokenizer):
    return tokenize(render(rows, tokenizer), tokenizer, 512)


@pytest.mark.parametrize("rows", [TEXTS, TALKS, PROMPTS], ids=["text", "messages", "prompt"])
def test_answer_begins_with_the_last_tokens_of_every_prompt(rows):
    tokenizer = tiny.tokenizer()
    found = invocation_tokens("answer", tokenizer, "text" if rows is TEXTS else None)
    for tokens in rows_of(rows, tokenizer):
        assert tokens.prompt[-len(found) :] == found
        assert begins(tokens.prompt + tokens.completion, found) == len(tokens.prompt) - len(found)


@pytest.mark.parametrize("rows", [TEXTS, TALKS, PROMPTS], ids=["text", "messages", "prompt"])
def test_question_begins_in_front_of_the_last_question(rows):
    tokenizer = tiny.tokenizer()
    found = invocation_tokens("question", tokenizer, "text" if rows is TEXTS else None)
    for row, tokens in zip(rows, rows_of(rows, tokenizer), strict=True):
        question = row["text"] if rows is TEXTS else row["messages"][-2]["content"] if rows is TALKS else row["prompt"]
        place = begins(tokens.prompt + tokens.completion, found)
        written = tokenizer.decode(tokens.prompt[place + len(found) :])
        assert written.strip().startswith(question), written


ODD = ("\n\nHuman: Hi\n\n", "\nHi", " Hi ", "Hi\n", "(1) Hi", "\tHi", "1", "¿Qué?")


def test_a_question_may_begin_and_end_with_what_its_tokenizer_joins_with_the_header():
    """SmolLM2 writes a line break behind "user", and one token for it and a line break in front of the question."""
    if not smollm2().endswith(".gguf"):
        pytest.skip("the packaged model is not installed")
    tokenizer = load_tokenizer(smollm2())
    for name, kind in (("question", None), ("answer", None), ("question", "text"), ("answer", "text")):
        found = invocation_tokens(name, tokenizer, kind)
        for asked in ODD:
            row = {"text": asked, "label": "x"} if kind else {"prompt": asked, "completion": "x"}
            (tokens,) = rows_of([row], tokenizer)
            place = begins(tokens.prompt + tokens.completion, found)
            assert place is not None, (name, kind, asked)
            behind = tokenizer.decode(tokens.prompt[place:])
            assert (asked.strip() in behind) == (name == "question")
            assert "system" not in behind
    header = tokenizer("<|im_end|>\n<|im_start|>user\n")["input_ids"]
    (tokens,) = rows_of([{"prompt": ODD[0], "completion": "x"}], tokenizer)
    assert begins(tokens.prompt, header) is None  # or the check says nothing


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_every_kind_of_tokenizer_has_them(kind):
    """In rows with text and label, and in conversations where there is a template; in front of the answer, at most a
    blank further."""
    tokenizer = build(kind)
    for rows, name in ((TEXTS, "text"), *([(TALKS, None)] if kind.template != "none" else [])):
        found = invocation_tokens("answer", tokenizer, name)
        if kind.algorithm == "Metaspace BPE" and name == "text":
            with pytest.raises(PrefixMemoryError, match="no tokens mark the place"):  # ":" alone, as behind "Label"
                invocation_tokens("question", tokenizer, name)
            question = []
        else:
            question = invocation_tokens("question", tokenizer, name)
        for tokens in rows_of(rows, tokenizer):
            ids = tokens.prompt + tokens.completion
            assert begins(ids, found) == len(tokens.prompt) - len(found)
            assert not question or begins(ids, question) < begins(ids, found)


def test_prompts_of_generation_end_as_those_of_training():
    tokenizer = tiny.tokenizer()
    found = invocation_tokens("answer", tokenizer, "text")
    assert encode_prompt("Text: Anything\nLabel:", tokenizer)[-len(found) :] == found


@pytest.mark.parametrize("name", ["answer", "question"])
def test_prompts_without_a_template_have_nothing_in_common(name):
    with pytest.raises(PrefixMemoryError, match=r"there is no chat template.*invocation_tokens of your own"):
        invocation_tokens(name, tiny.tokenizer(chat=False))


def test_the_last_occurrence_counts_in_plain_python_as_in_tensors():
    ids = [3, 5, 7, 5, 7, 9, 5]
    assert begins(ids, [5, 7]) == 3 and begins(ids, [5]) == 6 and begins(ids, [7, 5, 9]) is None
    assert speaking(torch.tensor([ids]), (5, 7))[1].tolist() == [3]


def test_a_job_gives_its_config_the_tokens():
    config, tokenizer = PrefixMemoryConfig(active_from="answer"), tiny.tokenizer()
    job = TrainingJob("base", tokenizer, TEXTS, config)
    assert job.config.invocation_tokens == invocation_tokens("answer", tokenizer, "text") == job.invocation
    assert len(job.tokens) == 2


def test_tokens_that_are_given_stay():
    config = PrefixMemoryConfig(active_from="question", invocation_tokens=[9])
    settle(config, tiny.tokenizer(), TEXTS)
    assert config.invocation_tokens == [9]


def test_auto_is_the_question_or_the_start_and_needs_the_rows():
    with pytest.raises(PrefixMemoryError, match=r"active_from='auto' says where.*give active_from='question' and"):
        attach(tiny.build(), PrefixMemoryConfig(active_from="auto"))
    for rows, found in ((TEXTS, "question"), ([*TEXTS, *TALKS], "start")):
        config = PrefixMemoryConfig(active_from="auto")
        settle(config, tiny.tokenizer(), rows)
        assert config.active_from == found and bool(config.invocation_tokens) == (found == "question")
        attach(tiny.build(), config)


def test_an_activated_lora_of_peft_finds_its_tokens_by_the_same_names():
    tokenizer, section = tiny.tokenizer(), {"name": "lora", "target_modules": ["q_proj"]}
    job = TrainingJob("base", tokenizer, TEXTS, method_config({**section, "alora_invocation_tokens": "answer"}))
    assert job.config.alora_invocation_tokens == job.invocation == invocation_tokens("answer", tokenizer, "text")
    assert TrainingJob("base", tokenizer, TEXTS, method_config(section)).invocation is None
    model = attach(tiny.build(), job.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    ids = torch.tensor([job.tokens[0].prompt + job.tokens[0].completion])
    place = begins(ids[0].tolist(), job.invocation)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    assert torch.equal(logits[:, :place], base[:, :place]) and (logits - base)[:, place:].abs().amin(dim=1).max() > 0
    with pytest.raises(PrefixMemoryError, match=r"method\.alora_invocation_tokens='anser'.*'answer'\?"):
        method_config({**section, "alora_invocation_tokens": "anser"})


def test_a_kind_of_rows_that_there_is_not_is_refused():
    """It would be taken for a conversation."""
    with pytest.raises(PrefixMemoryError, match=r"kind='txt' is not known.*'text'"):
        invocation_tokens("answer", tiny.tokenizer(), "txt")


def test_kinds_of_rows_with_other_tokens_are_refused_together():
    with pytest.raises(PrefixMemoryError, match="has other tokens in rows with text and label than in conversations"):
        settle(PrefixMemoryConfig(active_from="answer"), tiny.tokenizer(), [*TEXTS, *TALKS])


@pytest.mark.parametrize("front", [None, Distractors(share=1.0, tokens=20)])
def test_a_row_that_is_cut_keeps_the_tokens_from_which_on_it_speaks(front):
    """The rest of a question is a question; what stands in front of it is cut first."""
    tokenizer = tiny.tokenizer()
    long = {"text": "word " * 40, "label": "card"}
    settings = TrainingSettings(max_length=60, distractors=front)
    job = TrainingJob("base", tokenizer, [TEXTS[0], long], PrefixMemoryConfig(active_from="question"), settings)
    whole = TrainingJob("base", tokenizer, [long], PrefixMemoryConfig(active_from="question")).tokens[0]
    tokens = job.tokens_of(0)[1]
    first, spoken = begins(tokens.prompt, job.invocation), len(job.invocation)
    assert tokens.cut and len(tokens) == 60 and tokens.completion == whole.completion
    assert first == begins(whole.prompt, job.invocation) < 2  # behind a beginning-of-sequence token, if there is one
    rest = tokens.prompt[first + spoken :]
    assert rest == whole.prompt[-len(rest) :] and len(rest) > 10
    ids = torch.tensor([tokens.prompt])
    assert speaking(ids, tuple(job.invocation))[1].tolist() == [first]


@pytest.mark.filterwarnings("error:The invocation tokens:UserWarning")
def test_a_prompt_that_is_cut_for_the_model_is_scored_with_its_memory():
    """What is left of it is the question's end."""
    model, tokenizer = tiny.build(), tiny.tokenizer()
    config = method_config({"active_from": "question"})
    settle(config, tokenizer, TEXTS)
    adapted = attach(model, config)
    tiny.randomize(adapted, std=0.5)
    long = render([{"text": "word " * 400, "label": "card"}], tokenizer)
    (found,) = likelihoods(adapted, tokenizer, long)
    with adapted.disable_adapter():
        (silent,) = likelihoods(adapted, tokenizer, long)
    assert found.cut and abs(found.nats - silent.nats) > 1e-3


def test_a_row_that_lost_its_question_is_named():
    tokenizer = tiny.tokenizer()
    long = {"text": "word " * 40, "label": "card"}
    config = PrefixMemoryConfig(active_from="question")
    short = TrainingJob("base", tokenizer, [long], config)
    room = len(short.tokens[0].completion) + len(short.invocation) - 1
    job = TrainingJob("base", tokenizer, [long], config, TrainingSettings(max_length=room))
    with pytest.raises(PrefixMemoryError, match=r"Row 1: the tokens .* are not in it.*raise max_length"):
        _ = job.tokens


def test_one_config_serves_several_jobs():
    """Rows that give no common tokens would otherwise have every later job speak from the start."""
    tokenizer, config = tiny.tokenizer(), PrefixMemoryConfig(active_from="auto")
    mixed, texts = (TrainingJob("base", tokenizer, rows, config) for rows in (TEXTS + TALKS[:1], TEXTS))
    assert [job.config.active_from for job in (mixed, texts)] == ["start", "question"]
    assert texts.invocation and mixed.invocation is None
    assert config.active_from == "auto" and config.invocation_tokens is None


def test_several_rows_are_counted():
    tokenizer = tiny.tokenizer()
    tokens = rows_of(TEXTS, tokenizer)
    check_invoked(tokens, tokens[0].prompt[:1], ["Row 1", "Row 2"])
    with pytest.raises(PrefixMemoryError, match="Row 1 and 1 more: "):
        check_invoked(tokens, [1, 1, 1, 1], ["Row 1", "Row 2"])


def job_of(rows, objective="sft", max_length=512, **config):
    settings = TrainingSettings(objective=objective, max_length=max_length)
    return TrainingJob("base", tiny.tokenizer(), rows, PrefixMemoryConfig(**config), settings)


@pytest.mark.parametrize(("active_from", "count"), [("question", 2), ("answer", 0), ("start", 0)])
def test_texts_that_bring_the_invocation_are_counted_and_told_of(active_from, count):
    own = [{"text": f"Title: Oak\nText: {text}", "label": "plant"} for text in ("A tree.", "It has acorns.")]
    job = job_of([*TEXTS, *own], active_from=active_from)
    assert job.invoked_again == (count, 0) and len(job.invoked_again_messages) == bool(count)
    if count:
        assert "Rows whose question brings 'Text: ' of its own: 2." in job.invoked_again_messages[0]
        ids = job.tokens[2].prompt
        assert speaking(torch.tensor([ids]), tuple(job.invocation))[1].item() > 0  # what the message says


def test_questions_of_every_kind_of_rows_are_counted():
    tokenizer = tiny.tokenizer()
    asked = f"What does {tokenizer.decode(invocation_tokens('question', tokenizer))} mean?"
    conversation = [{"role": "user", "content": asked}, {"role": "assistant", "content": "A question."}]
    kinds = {
        "prompt": ({"prompt": asked, "completion": "A question."}, "sft"),
        "instruction": ({"instruction": asked, "output": "A question."}, "sft"),
        "messages": ({"messages": conversation}, "sft"),
        "turns": ({"messages": [*TALKS[0]["messages"], *conversation]}, "sft"),
        "preference": ({"prompt": asked, "chosen": "A question.", "rejected": "No."}, "dpo"),
        "judged": ({"prompt": asked, "completion": "A question.", "label": True}, "kto"),
    }
    for kind, (row, objective) in kinds.items():
        other = {name: value if isinstance(value, list | bool) else "Well?" for name, value in row.items()}
        rows = TALKS if "messages" in row else [other]
        assert job_of([row], objective, active_from="question").invoked_again == (1, 0), kind
        assert job_of(rows, objective, active_from="question").invoked_again == (0, 0), kind


def test_a_row_that_is_cut_to_a_tail_with_the_tokens_is_counted():
    row = {"text": f"{'word ' * 40}Text: tail of it", "label": "card"}
    job = job_of([row], max_length=60, active_from="question")
    assert job.tokens[0].cut and job.invoked_again == (1, 0)


def test_tokens_of_ones_own_may_stand_in_the_template_more_than_once():
    tokenizer = tiny.tokenizer()
    header = invocation_tokens("question", tokenizer)[:1]
    rows = [{"prompt": "Hi", "completion": "Ho"}]
    assert job_of(rows, active_from="invocation", invocation_tokens=header).invoked_again_messages == []


@pytest.mark.parametrize(
    ("prompt", "objective", "count"), [("2+2? Answer:", "sft", 0), ("2+2?", "sft", 1), ("2+2? Answer:", "dpo", 1)]
)
def test_answers_that_move_where_the_memory_speaks_are_told_of(prompt, objective, count):
    """TRL gives the model whole rows, in which the last occurrence counts; in use the prompt's counts."""
    tokens = tiny.tokenizer()("Answer:", add_special_tokens=False)["input_ids"]
    brings = {"sft": {"completion": "Two. Answer: 4"}, "dpo": {"chosen": "Two. Answer: 4", "rejected": "5"}}
    other = {"sft": {"completion": "5"}, "dpo": {"chosen": "5", "rejected": "6"}}
    rows = [{"prompt": prompt, **brings[objective]}, {"prompt": "2+3? Answer:", **other[objective]}]
    job = job_of(rows, objective, active_from="invocation", invocation_tokens=tokens)
    assert job.invoked_again == (0, count) and len(job.invoked_again_messages) == bool(count)
    if count:
        assert job.invoked_again_messages[0].startswith("Answers that bring 'Answer:': 1. In training")
    row = job.tokens[0]
    places = [begins(ids, tokens) for ids in (row.prompt, row.prompt + row.completion)]
    assert job.speaks_from(row) == places[count]


@pytest.mark.parametrize("kind", ["memory", "activated LoRA"])
@pytest.mark.parametrize("context", ["", "Once upon a time there was an Answer: \n\n"])
def test_likelihoods_are_of_answers_written_behind_the_prompts_invocation(kind, context):
    """An answer that brings the tokens is as likely as while it is written token by token."""
    tokenizer = tiny.tokenizer()
    tokens = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    if kind == "memory":
        model = tiny.with_memory(tiny.build(), active_from="invocation", invocation_tokens=tokens)
    else:
        config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=tokens, init_lora_weights=False)
        model = get_peft_model(tiny.build(), config)
    examples = [Example("2+2? Answer:", " Two. Answer: 4"), Example("What is 2+3? Answer:", " 5")]
    found = likelihoods(model.eval(), tokenizer, examples, context=context)
    for one, example in zip(found, examples, strict=True):
        (row,) = tokenize([Example(context + example.prompt, example.completion)], tokenizer, 400)
        ids, place = torch.tensor([row.prompt + row.completion]), begins(row.prompt, tokens)
        said = {"active": [place]} if kind == "memory" else {"alora_offsets": [ids.shape[1] - place]}
        with torch.inference_mode():
            right, other = (model(input_ids=ids, **how).logits[0].log_softmax(-1) for how in (said, {}))
        places = torch.arange(len(row.prompt), ids.shape[1])
        assert one.nats == pytest.approx(right[places - 1, ids[0, places]].sum().item(), abs=1e-3)
        if "Answer:" in example.completion:  # what the row alone says differs
            assert abs(one.nats - other[places - 1, ids[0, places]].sum().item()) > 1e-2


@pytest.mark.parametrize("strict", [False, True])
def test_a_row_without_the_invocation_does_not_change_what_is_said_of_others(strict):
    tokenizer = tiny.tokenizer()
    tokens = tokenizer("Answer:", add_special_tokens=False)["input_ids"]
    where = {"active_from": "invocation", "invocation_tokens": tokens, "strict_invocation": strict}
    model = tiny.with_memory(tiny.build(), **where).eval()
    brings, lacks = Example("2+2? Answer:", " Two. Answer: 4"), Example("What is 2+3?", " 5")
    alone = likelihoods(model, tokenizer, [brings])[0].nats
    if strict:
        with pytest.raises(PrefixMemoryError, match="strict_invocation is set"):
            likelihoods(model, tokenizer, [brings, lacks])
        return
    together = likelihoods(model, tokenizer, [brings, lacks])
    assert together[0].nats == pytest.approx(alone, abs=1e-4)
    with model.disable_adapter():
        assert together[1].nats == pytest.approx(likelihoods(model, tokenizer, [lacks])[0].nats, abs=1e-4)


def test_what_looks_at_an_adapter_asks_it_everywhere_and_contexts_are_read_in_silence():
    """Texts that are no prompts have no invocation; a warning would be an error here."""
    tokenizer = tiny.tokenizer()
    fields = {**tiny.DEFAULT, "active_from": "answer"}
    model = tiny.with_memory(tiny.build(), **fields, invocation_tokens=invocation_tokens("answer", tokenizer, "text"))
    refuse_untrained(Adapter("mine", Path("mine"), model, tokenizer, {}))
    prompts = [f"Text: {row['text']}\nLabel:" for row in TEXTS]
    found = answers(model, tokenizer, prompts, max_new_tokens=6, context="Once upon a time.\n\n", one_line=False)
    ids = [encode_prompt("Once upon a time.\n\n" + prompt, tokenizer) for prompt in prompts]
    for written, one in zip(found, ids, strict=True):
        whole = model.generate(input_ids=torch.tensor([one]), max_new_tokens=6, do_sample=False, use_cache=False)
        assert written == tokenizer.decode(whole[0, len(one) :], skip_special_tokens=True).strip()
    with model.disable_adapter():
        assert found != answers(model, tokenizer, prompts, max_new_tokens=6, one_line=False)
