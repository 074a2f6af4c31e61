"""``prefixmemory generate`` asks the question as the rows asked it in training."""

import json

import pytest
from tokenizers.processors import TemplateProcessing

import tiny
from prefixmemory.rows.encoding import encode_prompt
from prefixmemory.rows.rendering import render, render_prompt
from prefixmemory.rows.rows import row_format
from prefixmemory_cli import main

ROWS = {
    "text": {"text": "hello", "label": "greeting"},
    "prompt": {"prompt": "hello", "completion": "hi there"},
    "messages": {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]},
}


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_is_rendered_as_in_training(name, chat):
    if name == "messages" and not chat:
        pytest.skip("conversations need a chat template")
    tokenizer = tiny.tokenizer(chat=chat)
    assert row_format([ROWS[name]]) == name
    assert render_prompt("hello", name, tokenizer) == render([ROWS[name]], tokenizer)[0].prompt
    assert render_prompt("hello", "", tokenizer) == "hello"


@pytest.mark.parametrize("name", ROWS)
def test_generate_asks_as_the_rows_of_the_run_did(name, tmp_path, monkeypatch, capsys):
    base = tiny.save_tiny(tmp_path / "base")
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps(ROWS[name]) + "\n") * 8)
    asked = []

    def run(*words):
        monkeypatch.setattr("sys.argv", ["prefixmemory", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code in (0, None), capsys.readouterr().err

    def answers(model, tokenizer, prompts, max_new_tokens, one_line, sampling):
        asked.extend(prompts)
        said = f"{len(asked)} asked\nand answered"
        return [said.splitlines()[0] if one_line else said]

    folder = tmp_path / "memory"
    run("train", "--model", base, "--data", data, "--output", folder, "--epochs", 1)
    monkeypatch.setattr("prefixmemory.scoring.generation.answers", answers)
    question = ["generate", "--adapter", folder, "--prompt", "hello"]
    run(*question)
    run(*question, "--raw")
    trained_on = render([ROWS[name]], tiny.tokenizer())[0].prompt
    assert asked == [trained_on, trained_on, "hello", "hello"]  # base model and memory, each time
    assert trained_on != "hello"
    assert "base model:  1 asked\nand answered\nwith memory: 2 asked\nand answered\n" in capsys.readouterr().out


def test_a_prompt_begins_with_one_bos_also_where_the_chat_template_writes_it():
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    written = render_prompt("hello", "messages", tokenizer)
    assert tokenizer(written)["input_ids"].count(tokenizer.bos_token_id) == 2  # what plain tokenizing would give
    assert encode_prompt(written, tokenizer).count(tokenizer.bos_token_id) == 1
    assert encode_prompt("hello", tokenizer).count(tokenizer.bos_token_id) == 1
