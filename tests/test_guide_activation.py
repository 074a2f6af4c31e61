"""The command and the Python blocks of docs/guides/activation.md run as they stand, on a tiny base model."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import prefixmemory
import tiny
from close import close_logits
from command_line import call, call_line, code_blocks, jsonl
from prefixmemory import PrefixMemoryConfig
from prefixmemory.rows.collator import collator
from prefixmemory.rows.encoding import tokenize
from prefixmemory.rows.rendering import render

TEXT = (Path(__file__).parent.parent / "docs" / "guides" / "activation.md").read_text(encoding="utf-8")
BLOCKS = code_blocks(TEXT)
ROWS = [{"text": f"line {i} is dead", "label": "abc"[i % 3]} for i in range(24)]
TOKENIZER = tiny.tokenizer()


def run(start: str, names: dict[str, Any]) -> dict[str, Any]:
    """The Python block that begins so."""
    (block,) = [body for language, body in BLOCKS if language == "python" and body.startswith(start)]
    names |= {"model": names.get("model"), "tokenizer": TOKENIZER, "copy": copy}
    exec(compile(block, "activation.md", "exec"), names)
    return names


def test_no_block_is_left_out():
    kinds = [(language, body.split()[0]) for language, body in BLOCKS]
    python = [("python", word) for word in ("import", "model(input_ids=ids,", "with", "from")]
    assert kinds == [("", "prefixmemory"), *python]  # each has a test below


def test_the_recipe_finds_the_tokens_and_marks_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = tiny.save_tiny(tmp_path / "base")
    jsonl(tmp_path / "rows.jsonl", ROWS)
    recipe = f"model: {base}\ndata: {{train: rows.jsonl}}\noutput: tickets-memory\nmethod: {{name: prefix_memory}}\n"
    Path("tickets.yaml").write_text(recipe)
    marked = call_line(BLOCKS[0][1].strip()).success
    assert re.search(r"is dead⟦.*a<eos>⟧", marked)
    assert "⟦" not in call("train", "tickets.yaml", "--dry-run").success
    (lora,) = re.findall(r"`method: (\{name: lora.*?\})`", TEXT)
    Path("tickets.yaml").write_text(recipe.replace("{name: prefix_memory}", lora))
    call("train", "tickets.yaml", "--learning-rate", "1e-3", "--dry-run").success  # noqa: B018


def test_texts_that_bring_the_tokens_are_told_of_in_run_and_dry_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save_tiny(tmp_path / "base")
    rows = [{"text": "Where is it?", "label": "a"}, {"text": "Title: Oak\nText: A tree.", "label": "b"}]
    jsonl(tmp_path / "rows.jsonl", rows)
    words = ["train", "--model", "base", "--data", "rows.jsonl", "--epochs", 1, "--output"]
    asked = ["--set", "method.active_from=question"]
    assert "question, the last one in 1 rows whose question brings" in call(*words, "new", *asked, "--dry-run").success
    assert call(*words, "new", *asked).remarks.startswith("Rows whose question brings 'Text: ' of its own: 1. ")
    start = ["--set", "method.active_from=start"]
    assert "whose question" not in call(*words, "other", *start, "--dry-run").success
    assert call(*words, "other", *start).remarks == ""


@pytest.fixture
def waiting() -> dict[str, Any]:
    """A model whose memory speaks from the answer on, as the guide's first block makes its config."""
    model = get_peft_model(tiny.talker(), run("import prefixmemory", {})["config"])
    tiny.randomize(model, std=3.0)
    return {"model": model.eval()}


def test_the_tokens_of_ones_own():
    (given,) = re.findall(r'`(active_from="invocation", invocation_tokens=.*?)`', TEXT)
    config = eval(f"PrefixMemoryConfig({given})", {"PrefixMemoryConfig": PrefixMemoryConfig, "tokenizer": TOKENIZER})
    assert TOKENIZER.decode(config.invocation_tokens) == "<question>"


def test_a_call_says_from_where(waiting):
    ids = tiny.tokens(rows=2, length=60)
    mask = torch.zeros(2, 60, dtype=torch.bool)
    mask[0, 12:], mask[1, 40:] = True, True
    run("model(input_ids=ids, active=mask)", waiting | {"ids": ids, "mask": mask, "prefixmemory": prefixmemory})
    model = waiting["model"]
    with torch.no_grad():
        spoken, by_number = model(input_ids=ids, active=mask).logits, model(input_ids=ids, active=[12, 40]).logits
        silent = model.get_base_model()(input_ids=ids, active=[99, 99]).logits
    close_logits(by_number, spoken)
    for row, first in enumerate((12, 40)):
        assert torch.equal(spoken[row, :first], silent[row, :first])
        assert not torch.equal(spoken[row, first], silent[row, first])


def test_one_text_for_many_adapters(waiting):
    model = waiting["model"]
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    tiny.randomize(model, "other", seed=5, std=3.0)
    document = tiny.tokens(rows=1, length=30)
    end = torch.tensor([list(model.peft_config["default"].invocation_tokens)])
    prompt = torch.cat((document, tiny.tokens(rows=1, length=5, seed=3), end), dim=1)
    said = {}

    class Model:
        """As the guide's, and keeps what is generated."""

        def __call__(self, **batch: Any) -> Any:
            return model(**batch)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def generate(self, **options: Any) -> None:
            said[model.active_adapter] = model.generate(**{**options, "max_new_tokens": 8, "do_sample": False})

    names = {"model": Model(), "document": document, "prompt": prompt, "adapters": ["default", "other"]}
    run("with model.disable_adapter():", names)
    for name, found in said.items():
        model.set_adapter(name)
        assert torch.equal(found, model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)), name
    assert not torch.equal(said["default"], said["other"])


def test_a_loop_of_ones_own_reads_the_front_without_gradients(waiting):
    model = waiting["model"].train()
    rows = [{"prompt": "a long text " * 9, "completion": "ab"[i % 2]} for i in range(2)]
    tokens = tokenize(render(rows, TOKENIZER), TOKENIZER, 400)
    batch = collator(model, TOKENIZER)([one.feature for one in tokens])
    loss = run("from prefixmemory.training.silent_front", {"model": model, "batch": batch})["loss"]
    torch.testing.assert_close(loss, model(**batch).loss)
