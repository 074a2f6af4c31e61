"""The README's first snippet and its command lines are run as they stand, on a tiny base model."""

import re
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from close import close_logits, same_parameters
from command_line import call_line, code_blocks, jsonl
from tiny import save_tiny

README = Path(__file__).parent.parent / "README.md"


def test_the_snippet_trains_saves_and_loads(tmp_path, monkeypatch):
    snippet = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL).group(1)
    base = save_tiny(tmp_path / "base")
    snippet = snippet.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(base))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)

    batch = names["batch"]
    with torch.no_grad():
        trained = names["model"](**batch).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        before = plain(**batch).logits
        loaded = PeftModel.from_pretrained(plain, "my-memory").eval()
        close_logits(loaded(**batch).logits, trained)
    same_parameters(loaded, names["model"])
    assert (trained - before).abs().max() > 1e-3


def test_the_two_commands_are_those_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE):
        assert f"\n{command}:" in makefile


def test_the_command_lines_take_ones_own_data_from_recipe_to_chat(tmp_path, monkeypatch):
    (block,) = [body for _, body in code_blocks(README.read_text(encoding="utf-8")) if body.startswith("prefixmemory")]
    copy, dry_run, train, evaluate, chat = block.splitlines()
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    rows = [{"text": f"line {i} is dead", "label": "abc"[i % 3]} for i in range(24)]
    jsonl(tmp_path / "mine.jsonl", rows)
    jsonl(tmp_path / "tickets-test.jsonl", rows[:6])

    call_line(copy).success  # noqa: B018
    recipe = Path("tickets.yaml")
    edited = recipe.read_text()  # "edit it: model, data, learning rate"
    for field, theirs, ours in (
        ("model", "smollm2", "base"),
        ("train", "train.jsonl", "mine.jsonl"),
        ("learning_rate", "3e-3", "1e-3"),
    ):
        assert f"{field}: {theirs}" in edited
        edited = edited.replace(f"{field}: {theirs}", f"{field}: {ours}")
    recipe.write_text(edited)

    plan = call_line(dry_run).success
    assert "24 to train on" in plan
    for told in ("modules ", "trainable parameters", "memory "):  # "layers, parameters, memory that it needs"
        assert told in plan
    assert not Path("classification-memory").exists()
    assert "on 24 rows" in call_line(train).success
    (lora,) = re.findall(r"# LoRA: (--method lora .*)", train)
    assert "Trained" in call_line(train.replace("#", f"{lora} #")).success
    assert Path("tickets-lora", "run.json").is_file() and Path("classification-memory", "run.json").is_file()
    assert "rows 6" in call_line(evaluate).success
    assert call_line(chat, stdin="my line is dead\n").success.strip()


def test_the_lines_for_machines_without_a_network_give_what_the_snippet_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("prefixmemory.models.loading.smollm2", lambda: str(save_tiny(tmp_path / "base")))
    (lines,) = [body for _, body in code_blocks(README.read_text(encoding="utf-8")) if "smollm2()" in body]
    names: dict = {}
    exec(compile(lines, "README.md", "exec"), names)
    batch = names["tokenizer"]("Text: my line is dead", return_tensors="pt")
    assert torch.isfinite(names["model"](**batch).logits).all()
