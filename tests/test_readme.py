"""The README's first snippet is run as it stands, on a tiny base model."""

import re
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

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
        loaded = PeftModel.from_pretrained(plain, "my-memory").eval()(**batch).logits
    assert torch.equal(loaded, trained)
    assert (trained - before).abs().max() > 1e-3


def test_the_two_commands_are_those_of_the_makefile():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE):
        assert f"\n{command}:" in makefile
