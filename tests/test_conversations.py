"""Conversations: everything that a row holds reaches the model, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from prefixmemory import PrefixMemoryError
from prefixmemory.rows.chat_template import THOUGHTS
from prefixmemory.rows.invocation import questions
from prefixmemory.rows.rendering import Example, render
from prefixmemory.rows.rows import Row, check_row, with_one_answer

USER, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find", "arguments": {"x": 1}}}]}
FULL = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for d in documents or [] %}<doc>{{ d.text }}</doc>{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if think %}{{ '(think)' }}{% endif %}{% endif %}"
)
#: Knows system, user and assistant, and skips the rest.
STRICT = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|{{ m.role }}|>{{ m.content | trim }}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def rendered(row: dict[str, Any], template: str = FULL) -> Example:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    (example,) = render([check_row("rows.jsonl, line 7", row)], tokenizer)
    return example


def refused(row: dict[str, Any], template: str = FULL) -> str:
    with pytest.raises(PrefixMemoryError) as raised:
        rendered(row, template)
    assert str(raised.value).startswith("rows.jsonl, line 7: ")
    return str(raised.value)


# What goes to the template


@pytest.mark.parametrize("tools", [TOOLS, '[{"type": "function", "function": {"name": "find", "parameters": {}}}]'])
def test_tools_are_in_the_prompt(tools):
    example = rendered({"tools": tools, "messages": [USER, ANSWER]})
    assert example.prompt.startswith('<tools>[{"type": "function", "function": {"name": "find"')
    assert example.completion == "so.<eos>"


def test_documents_and_variables_go_to_the_template():
    row = {"documents": [{"text": "It rains."}], "messages": [USER, ANSWER]}
    assert rendered(row).prompt == "<doc>It rains.</doc><|user|>why?<eos><|assistant|>"
    thinking = FULL.replace(
        "<|{{ m.role }}|>", "<|{{ m.role }}|>{% if think and m.role == 'assistant' %}(think){% endif %}"
    )
    with_think = rendered({"messages": [USER, ANSWER], "chat_template_kwargs": {"think": True}}, thinking)
    assert with_think.prompt.endswith("<|assistant|>(think)") and with_think.completion == "so.<eos>"


def test_earlier_calls_of_tools_may_have_no_content():
    answer = {"role": "tool", "content": "it rains"}
    example = rendered({"tools": TOOLS, "messages": [USER, CALL, answer, ANSWER]})
    assert '<call>{"name": "find", "arguments": {"x": 1}}</call><eos><|tool|>it rains<eos>' in example.prompt
    assert rendered({"tools": TOOLS, "messages": [USER, CALL]}).completion.startswith("<call>")


def test_a_content_may_be_a_list_of_texts():
    parts = [{"type": "text", "text": "why"}, {"type": "text", "text": "?"}]
    row = check_row("", {"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert row["messages"] == [USER, ANSWER]


def test_what_a_parquet_file_fills_with_nothing_is_left_out():
    nothing = {"tool_calls": None, "name": None}
    row = {"messages": [{**USER, **nothing}, {**ANSWER, **nothing}], "tools": None, "documents": None}
    assert check_row("", row)["messages"] == [USER, ANSWER]
    assert rendered(row).prompt == "<|user|>why?<eos><|assistant|>"


# What would vanish


def test_a_message_that_the_template_skips_is_named():
    message = refused({"messages": [{"role": "human", "content": "so"}, ANSWER]}, STRICT)
    assert "leaves out message 1, of role 'human'" in message  # although "so" stands in the answer
    assert rendered({"messages": [USER, ANSWER]}, STRICT).prompt == "<|user|>why?<eos><|assistant|>"
    later = [USER, ANSWER, {"role": "tool", "content": "it rains"}, USER, ANSWER]
    assert "leaves out message 3, of role 'tool'" in refused({"messages": later}, STRICT)


def test_every_shape_of_a_conversation_is_checked():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = STRICT
    rows = [
        Row(messages=[USER, ANSWER]),
        Row(messages=[USER, ANSWER]),
        Row(messages=[{**USER, "role": "human"}, ANSWER]),
    ]
    with pytest.raises(PrefixMemoryError, match="Row 3: the model's chat template leaves out message 1"):
        render(rows, tokenizer)


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_that_the_template_does_not_write_are_named(name):
    row = {name: [{"text": "find", "function": {"name": "find"}}], "messages": [USER, ANSWER]}
    assert f"leaves out the {name}" in refused(row, STRICT)


def test_a_call_that_the_template_does_not_write_is_named():
    template = STRICT.replace("{{ m.content | trim }}", "{{ (m.content or '') | trim }}")
    message = refused({"messages": [USER, CALL, USER, ANSWER]}, template)
    assert "leaves out the call of 'find' in message 2" in message


def test_a_part_of_the_answer_that_the_template_drops_is_named():
    """As a template does that drops what was thought; in earlier turns that is its way."""
    template = STRICT.replace("m.content | trim", "m.content.split('</think>')[-1]")
    thought = {"role": "assistant", "content": "<think>hm</think>so."}
    assert "leaves out a part of the answer" in refused({"messages": [USER, thought]}, template)
    assert rendered({"messages": [USER, thought, USER, ANSWER]}, template).completion == "so.<eos>"


def test_a_template_that_fails_on_a_missing_content_is_one_line():
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<eos>' }}{% endfor %}"
    assert "refuses this conversation" in refused({"messages": [USER, CALL, USER, ANSWER]}, template)


# What is malformed

BAD = {
    "no text": (
        {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "url": "a"}]}]},
        "must be a list",
    ),
    "no content": ({"messages": [{"role": "user", "content": None}, ANSWER]}, "must be a list"),
    "a user that calls": ({"messages": [{**CALL, "role": "user"}, ANSWER]}, "must be a list"),
    "an empty answer": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "is empty"),
    "tools that are none": ({"messages": [USER, ANSWER], "tools": "find"}, "'tools' is a text, and no JSON"),
    "a tool alone": ({"messages": [USER, ANSWER], "tools": TOOLS[0]}, "'tools' must be a list of objects"),
    "an option": ({"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": True}}, "none of which is called"),
    "a template": ({"messages": [USER, ANSWER], "chat_template_kwargs": {"chat_template": "a"}}, "is called"),
    "no object": ({"messages": [USER, ANSWER], "chat_template_kwargs": "think"}, "'chat_template_kwargs' is 'think'"),
    "an unknown speaker": ({"conversations": [{"from": "bot", "value": "a"}] * 2}, "'from' is 'bot' in turn 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_malformed_is_named(name):
    row, phrase = BAD[name]
    assert phrase in refused(row)


# ShareGPT


def test_conversations_of_sharegpt_are_messages():
    said = [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "so."}]
    assert check_row("", {"conversations": said, "id": 3}) == {"messages": [USER, ANSWER], "id": 3}
    first = {"role": "system", "content": "Be brief."}
    assert check_row("", {"conversations": said, "system": "Be brief."})["messages"] == [first, USER, ANSWER]
    assert check_row("", {"conversations": [USER, ANSWER]})["messages"] == [USER, ANSWER]


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_system_text_beside_a_conversation_stands_in_front_of_it_once(field):
    first = {"role": "system", "content": "Be brief."}
    assert check_row("", {field: [USER, ANSWER], "system": "Be brief."})["messages"] == [first, USER, ANSWER]
    assert check_row("", {field: [first, USER, ANSWER], "system": "Be long."})["messages"] == [first, USER, ANSWER]
    assert check_row("", {field: [USER, ANSWER], "system": " "})["messages"] == [USER, ANSWER]


# What stands in front of one question


EARLIER = {"system": "Be brief.", "history": [["who?", "you."]]}
SAID = "<|system|>Be brief.<eos><|user|>who?<eos><|assistant|>you.<eos><|user|>why?<eos><|assistant|>"


@pytest.mark.parametrize("kind", ["instruction", "prompt"])
def test_a_system_text_and_a_history_stand_in_front_of_the_question(kind):
    """As LLaMA-Factory's files have them; there, most rows have empty ones."""
    names = ("instruction", "output") if kind == "instruction" else ("prompt", "completion")
    row = dict(zip(names, ("why?", "so."), strict=True))
    assert rendered({**row, **EARLIER}) == Example(SAID, "so.<eos>")
    assert rendered({**row, **EARLIER, "history": '[["who?", "you."]]'}).prompt == SAID  # as a table writes it
    assert rendered({**row, "system": " ", "history": []}).prompt == "<|user|>why?<eos><|assistant|>"
    assert questions(check_row("", {**row, **EARLIER})) == 2 and questions(check_row("", row)) == 1
    assert questions(check_row("", {"text": "a", "label": "b", "history": "none"})) == 1  # a mere column
    assert questions({"messages": [USER, ANSWER, USER, ANSWER]}) == 2
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    for name, value in EARLIER.items():
        with pytest.raises(PrefixMemoryError, match=f"Row 1 has a '{name}' beside its question, but"):
            render([check_row("", {**row, name: value})], tokenizer)
    assert render([check_row("", row)], tokenizer)[0].prompt == "why?"


def test_each_answer_of_a_pair_has_them_in_front():
    pair = check_row("", {"prompt": "why?", "chosen": "so.", "rejected": "no.", **EARLIER})
    assert [example.prompt for example in render(with_one_answer([pair]), _chat(FULL))] == [SAID, SAID]


@pytest.mark.parametrize(
    ("field", "value"), [("system", 3), ("history", "who?"), ("history", [["who?"]]), ("history", [["who?", None]])]
)
def test_what_is_no_earlier_turn_is_named(field, value):
    row = {"prompt": "why?", "completion": "so.", field: value}
    assert f"line 7: {field!r} is {value!r}; it must be" in refused(row)


# Arguments of calls, and thoughts


def _chat(template: str) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def calls(arguments: object) -> dict[str, Any]:
    call = {"function": {"name": "find", "arguments": arguments}}
    return {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}], "tools": TOOLS}


WRITES = {
    "objects": "{{ c.function.arguments | tojson }}",  # Qwen 2.5, Llama 3.1: JSON within JSON, given a text
    "texts": "{{ '' + c.function.arguments }}",  # DeepSeek: fails, given an object
    "either": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
    "whatever it gets": "{{ c.function.arguments }}",  # writes Python, given an object
}


@pytest.mark.parametrize("template", WRITES)
@pytest.mark.parametrize("given", ["object", "text"])
def test_the_arguments_of_a_call_are_json_once(template, given):
    arguments = {"city": "Paris"} if given == "object" else '{"city": "Paris"}'
    whole = FULL.replace("{{ c.function | tojson }}", "{{ c.function.name }}" + WRITES[template])
    row = calls(arguments)
    expected = '<call>find{"city": "Paris"}</call><eos>'
    assert rendered(row, whole).completion == expected
    said = [{"role": "user", "content": "Call it with {'city': 'Paris'}."}, *row["messages"]]
    assert rendered({**row, "messages": said}, whole).completion == expected
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments  # left as it was


def test_arguments_that_are_no_object_stay_as_they_are():
    assert '"arguments": "[1"' in rendered(calls("[1"), FULL).completion


@pytest.mark.parametrize("field", THOUGHTS)
def test_a_thought_that_the_template_does_not_write_is_named(field):
    row = {"messages": [USER, {**ANSWER, field: "hm"}]}
    assert f"leaves out the {field!r} of the answer" in refused(row)
    thinks = FULL.replace("<|{{ m.role }}|>", "<|{{ m.role }}|>{{ '(' + m.FIELD + ')' if m.FIELD }}")
    assert rendered(row, thinks.replace("FIELD", field)).completion == "(hm)so.<eos>"
    tokenizer, other = _chat(FULL), {"messages": [USER, ANSWER], "chat_template_kwargs": {field: True}}
    with pytest.raises(PrefixMemoryError, match="leaves out the"):  # although there is a variable of this name
        render([check_row("", other), check_row("", row)], tokenizer)
    earlier = {"messages": [USER, {**ANSWER, field: "hm"}, USER, ANSWER]}  # of earlier turns, templates drop it
    assert rendered(earlier).completion == "so.<eos>"
