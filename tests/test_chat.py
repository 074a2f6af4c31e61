"""``prefixmemory chat`` from a pipe, and ``generate``: what the model is asked, and who answers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from command_line import call, jsonl, save_talker
from prefixmemory.adapters.chat import chat
from prefixmemory.adapters.loading import load_adapter
from prefixmemory.tuner.layers import set_scale

TOKENIZER = tiny.tokenizer()
ROWS = {
    "questions": [{"prompt": f"why {i}?", "completion": "so" + "!" * (i % 3)} for i in range(12)],
    "tickets": [{"text": f"line {i} is dead", "label": "abc"[i % 3]} for i in range(12)],
}
START = ("--set", "method.active_from=start", "--set", "method.feed_forward=null")
#: Adapter, base model, rows that it was trained on, options.
ADAPTERS = {
    "memory": ("base", "questions", START),
    "waiting": ("base", "questions", ("--set", "method.active_from=question")),
    "lora": ("base", "questions", ("--method", "lora", "--learning-rate", 1e-3)),
    "labels": ("base", "tickets", START),
    "plain": ("bare", "questions", ()),
}
TOKENS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_talker(folder / "base")
    save_talker(folder / "bare")
    tiny.tokenizer(chat=False).save_pretrained(folder / "bare")
    (folder / "bare" / "chat_template.jinja").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, rows in ROWS.items():
            jsonl(folder / f"{name}.jsonl", rows)
        for name, (base, rows, words) in ADAPTERS.items():
            rank = (
                () if "lora" in words else ("--set", "method.rank=null")
            )  # its answers differ more than those of rank 8
            common = ("--data", f"{rows}.jsonl", "--output", name, "--learning-rate", 0.05, "--epochs", 6, *rank)
            call("train", "--model", base, "--dtype", "float32", *common, *words).success  # noqa: B018
    return folder


@pytest.fixture(autouse=True)
def place(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    monkeypatch.setattr("prefixmemory.adapters.loading.fast_dtype", lambda: "float32")
    return made


class Oracle:
    """Who answers what, written out: greedy answers of base model and adapter to a prompt that is rendered already."""

    def __init__(self, adapter: str) -> None:
        base = AutoModelForCausalLM.from_pretrained("base").eval()
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), adapter).eval()
        self.models = {"base": base, "adapter": adapted}

    def __call__(self, who: str, prompt: str) -> str:
        ids = TOKENIZER(prompt)["input_ids"]
        length = len(ids)
        while len(ids) < length + TOKENS and ids[-1] != TOKENIZER.eos_token_id:
            with torch.no_grad():
                ids.append(int(self.models[who](input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        return TOKENIZER.decode(ids[length:], skip_special_tokens=True).strip()


def talk(adapter: str, *lines: str, end: str = "\n") -> list[str]:
    """What the chat printed for these lines, piped into it; the streamer's own blanks are not told apart."""
    answer = call("chat", "--adapter", adapter, "--max-new-tokens", TOKENS, stdin="\n".join(lines) + end)
    assert answer.remarks == ""
    return [line.strip() for line in answer.success.splitlines()]


def asked(*messages: str) -> str:
    """A conversation as the chat template writes it, user and assistant in turn, up to the next answer."""
    roles = ("user", "assistant")
    return "".join(f"<|{roles[i % 2]}|>{text}<eos>" for i, text in enumerate(messages)) + "<|assistant|>"


@pytest.mark.parametrize("adapter", ["memory", "lora"])
def test_what_was_said_is_remembered(adapter):
    oracle = Oracle(adapter)
    first = oracle("adapter", asked("hello"))
    second = oracle("adapter", asked("hello", first, "and then?"))
    third = oracle("adapter", asked("hello", first, "and then?", second, "hello"))
    assert talk(adapter, "hello", "and then?", "hello") == [first, second, third]
    # the history matters here
    assert len({first, second, third}) == 3 and second != oracle("adapter", asked("and then?"))


def test_over_several_turns_a_memory_waits_for_the_last_question():
    said = ["hello", "so", "and then?"]
    ids = TOKENIZER(asked(*said))["input_ids"]
    place = len(TOKENIZER(asked(*said[:2]).removesuffix("<|assistant|>"))["input_ids"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "waiting").eval()
    with torch.no_grad():
        ours = model(input_ids=torch.tensor([ids])).logits[0]
        given = model(input_ids=torch.tensor([ids]), active=[place]).logits[0]
        with model.disable_adapter():
            base = model(input_ids=torch.tensor([ids])).logits[0]
    assert torch.equal(ours, given) and torch.equal(ours[:place], base[:place])
    assert not torch.equal(ours[place], base[place])
    oracle = Oracle("waiting")
    first = oracle("adapter", asked("hello"))
    assert talk("waiting", "hello", "and then?") == [first, oracle("adapter", asked("hello", first, "and then?"))]


def test_reset_forgets():
    oracle = Oracle("memory")
    first, again = oracle("adapter", asked("hello")), oracle("adapter", asked("and then?"))
    assert talk("memory", "hello", "/reset", "and then?") == [first, "Forgotten.", again]


@pytest.mark.parametrize("adapter", ["memory", "lora"])
def test_base_switches_the_adapter_off_and_on(adapter):
    oracle = Oracle(adapter)
    base, ours = oracle("base", asked("hello")), oracle("adapter", asked("hello"))
    assert base != ours
    assert talk(adapter, "/base", "hello", "/reset", "/base", "hello") == [
        "The base model answers.", base, "Forgotten.", "The adapter answers.", ours,
    ]  # fmt: skip


def test_scale_sets_the_scale_of_the_memory():
    oracle = Oracle("memory")
    whole, base = oracle("adapter", asked("hello")), oracle("base", asked("hello"))
    set_scale(oracle.models["adapter"], 3.0)
    triple = oracle("adapter", asked("hello"))
    assert len({whole, base, triple}) == 3
    said = talk("memory", "/scale 0", "hello", "/reset", "/scale 3", "hello", "/reset", "/scale 1", "hello")
    assert said == [
        "The memory's scale is 0.", base, "Forgotten.", "The memory's scale is 3.", triple, "Forgotten.",
        "The memory's scale is 1.", whole,
    ]  # fmt: skip


def test_a_wrong_command_is_one_line_and_the_chat_goes_on():
    said = talk("memory", "/foo", "/scale", "/scale much", "/scale nan", "/scale inf", "/Base", "hello")
    assert said[0] == said[5].replace("/Base", "/foo")
    assert said[0].startswith("error: /foo is no command. /base switches") and "/quit ends" in said[0]
    assert said[1].startswith("error: /scale : give a number") and said[2].startswith(
        "error: /scale much: give a number"
    )
    assert "scale=nan" in said[3] and "scale=inf" in said[4]
    assert said[6:] == [Oracle("memory")("adapter", asked("hello"))]  # and nothing of it was remembered


def test_an_adapter_that_is_no_memory_has_no_scale():
    assert talk("lora", "/scale 0.5") == ["error: /scale sets the scale of a memory, and lora is none."]


@pytest.mark.parametrize("last", ["/quit", "/exit", "  /quit  "])
def test_quit_ends_and_blank_lines_are_skipped(last):
    assert len(talk("memory", "", "hello", "   ", last, "never", "/foo")) == 1


@pytest.mark.parametrize("lines", [[], ["hello"]])
def test_the_end_of_the_input_ends_the_chat(lines):
    assert len(talk("memory", *lines, end="")) == len(lines)


def test_an_adapter_for_labels_is_asked_one_text_at_a_time_as_in_training():
    oracle = Oracle("labels")
    prompts = [f"Text: {text}\nLabel:" for text in ("my line is dead", "and my phone")]
    assert talk("labels", "my line is dead", "and my phone") == [oracle("adapter", prompt) for prompt in prompts]
    # and not by the chat template, which the tokenizer has
    assert oracle("adapter", asked("and my phone")) != oracle("adapter", prompts[1])


def test_without_a_chat_template_each_text_stands_alone():
    oracle = Oracle("plain")
    expected = [oracle("adapter", "hello"), oracle("adapter", "and then?")]
    assert talk("plain", "hello", "and then?") == expected and expected[0] != expected[1]


def test_a_temperature_draws_answers():
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        out = call("chat", "--adapter", "memory", "--max-new-tokens", 8, "--temperature", 5, stdin="hello\n").success
        answers.add(out)
    assert len(answers) > 2


COMMANDS = {"generate": (("--prompt", "hello"), ""), "chat": ((), "hello\n")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_seed_draws_the_same_answer_again(command):
    words, said = COMMANDS[command]

    def answer(*options: object) -> str:
        return call(command, "memory", *words, "--max-new-tokens", 8, *options, stdin=said).success

    greedy = answer()
    drawn = answer("--temperature", 5, "--seed", 1)
    assert answer("--temperature", 5, "--seed", 1) == drawn != greedy
    assert answer("--temperature", 5, "--seed", 2) != drawn
    assert answer("--temperature", 5, "--seed", 1, "--top-p", 1e-6) == greedy  # the likeliest token is all there is


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        (("--temperature", "nan"), "temperature=nan is out of range"),
        (("--temperature", 1, "--top-p", 0), "top_p=0.0 is out of range"),
        (("--temperature", 1, "--top-p", 1.5), "top_p=1.5 is out of range"),
        (("--temperature", 1, "--seed", -1), "seed=-1 is out of range"),
        (("--seed", 1), "seed=1 needs a temperature above 0"),
        (("--top-p", 0.5), "top_p=0.5 needs a temperature above 0"),
    ],
)
def test_options_of_the_draw_are_checked_before_anything_is_loaded(options, phrase):
    assert phrase in call("chat", "nowhere", *options).refusal


class Terminal:
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_it_greets_and_ctrl_c_breaks_off_an_answer_only(place, monkeypatch, capsys):
    adapter = load_adapter("memory")
    first, oracle = "hello", Oracle("memory")
    lines = iter([first, "and then?", "hello again", "/quit"])
    prompts = []

    def read(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    generate = adapter.model.generate

    def interrupted(**options: object) -> object:
        if len(prompts) == 2:  # while "and then?" is answered
            raise KeyboardInterrupt
        return generate(**options)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr(adapter.model, "generate", interrupted)
    chat(adapter, TOKENS)
    answer = oracle("adapter", asked(first))
    assert prompts == ["> "] * 4
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert re.match(r"memory on \S*base\. /base switches the adapter off and on", said[0])
    # what was broken off was not remembered
    assert said[1:] == [answer, "", oracle("adapter", asked(first, answer, "hello again"))]


def test_generate_shows_base_model_and_adapter():
    for name, title in (("memory", "with memory:"), ("lora", "adapted:    ")):
        oracle = Oracle(name)
        words = ("generate", "--adapter", name, "--prompt", "hello", "--max-new-tokens", TOKENS)
        said = [oracle(who, asked("hello")) for who in ("base", "adapter")]
        assert call(*words).success == f"base model:  {said[0]}\n{title} {said[1]}\n"


def test_what_all_rows_gave_the_template_is_given_to_it_in_use(place):
    """As Qwen 3's enable_thinking: without it, the prompt would end otherwise than any in training."""
    given, thought = {"chat_template_kwargs": {"think": True}}, "(think)"
    shutil.copytree("base", "thinking")
    template = "('(think)' if think and m['role'] == 'assistant' else '') + m['content']"
    file = Path("thinking/chat_template.jinja")
    file.write_text(
        file.read_text()
        .replace("m['content']", template)
        .replace("'<|assistant|>'", "'<|assistant|>' + think * '(think)'")
    )
    rows = [{"messages": [{"role": "user", "content": f"why {i}?"}, {"role": "assistant", "content": "so"}], **given}
            for i in range(12)]  # fmt: skip
    jsonl(place / "thinking.jsonl", rows)
    words = ("--model", "thinking", "--dtype", "float32", "--learning-rate", 0.05, "--epochs", 6, *START)
    call("train", "--data", "thinking.jsonl", "--output", "thinks", *words, "--set", "method.rank=null").success  # noqa: B018
    oracle = Oracle("thinks")
    first = oracle("adapter", asked("hello") + thought)
    second = oracle("adapter", asked("hello", thought + first, "and then?") + thought)
    assert talk("thinks", "hello", "and then?") == [first, second]
    assert first != oracle("adapter", asked("hello"))  # the control
    said = call("generate", "--adapter", "thinks", "--prompt", "hello", "--max-new-tokens", TOKENS).success
    assert said.endswith(f"with memory: {first}\n")

    jsonl(place / "mixed.jsonl", [*rows, {**rows[0], "chat_template_kwargs": {"think": False}}])
    call("train", "--data", "mixed.jsonl", "--output", "mixes", *words).success  # noqa: B018
    records = [json.loads(Path(name, "run.json").read_text()) for name in ("thinks", "mixes")]
    assert [record["chat_template_kwargs"] for record in records] == [{"think": True}, {}]
    jsonl(
        place / "columns.jsonl", [{"prompt": "why?", "completion": "so", "chat_template_kwargs": {"tokenize": 1}}] * 4
    )
    call("train", "--data", "columns.jsonl", "--output", "columns", "--model", "base", *words[2:]).success  # noqa: B018
    record = json.loads(Path("columns/run.json").read_text())
    assert record["chat_template_kwargs"] == {}  # training did not give them, either
    Path("mixes/run.json").write_text(json.dumps({**records[1], "chat_template_kwargs": {"tokenize": True}}))
    assert "none of which is called" in call("generate", "--adapter", "mixes", "--prompt", "hello").refusal
