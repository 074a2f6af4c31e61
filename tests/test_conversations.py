"""Conversations: everything that a row holds reaches the model, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from prefixmemory import PrefixMemoryError
from prefixmemory.rows.rendering import Example, render
from prefixmemory.rows.rows import Row, check_row

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
