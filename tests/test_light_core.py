"""The method needs torch, transformers, peft, safetensors and huggingface_hub only; the rest are extras."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import tiny
from prefixmemory import PrefixMemoryConfig
from processes import run_python

ROOT = Path(__file__).parent.parent
CORE = {"torch", "transformers", "peft", "safetensors", "huggingface_hub"}
OPTIONAL = ("accelerate", "datasets", "jaxtyping", "matplotlib", "pydantic", "rich", "trl", "typer", "yaml")

#: Names no class of ours but the config, as the README does.
TRAIN = """
import sys, torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from prefixmemory import PrefixMemoryConfig

torch.manual_seed(0)
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
model = get_peft_model(LlamaForCausalLM.from_pretrained("base"), PrefixMemoryConfig(task_type="CAUSAL_LM"))
tokens = torch.arange(32)[None]
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(2):  # of M = A·B, B moves in the first step
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step(), optimizer.zero_grad()
model.save_pretrained("memory")
again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "memory")
with torch.no_grad():
    trained, loaded = model.eval()(tokens).logits, again.eval()(tokens).logits
    with again.disable_adapter():
        base = again(tokens).logits
assert torch.equal(trained, loaded) and not torch.equal(loaded, base)
print("trained")
"""


def run(code: str, folder: Path) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return run_python("-c", code, folder=folder, PYTHONPATH=path)


def test_a_memory_is_trained_saved_and_loaded_by_the_core_alone(tmp_path):
    assert run(f"from refusal import refuse; refuse(*{OPTIONAL})\n{TRAIN}", tmp_path) == "trained\n"


def test_a_package_that_is_refused_cannot_be_imported(tmp_path):
    # Else the test before this one refused nothing.
    with pytest.raises(AssertionError, match="No module named 'pydantic'"):
        run("from refusal import refuse; refuse('pydantic'); import prefixmemory.training.recipe", tmp_path)


def test_an_adapter_is_loaded_by_its_folder_alone(tmp_path):
    tiny.save_tiny(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "memory")
    load = "import prefixmemory; adapter = prefixmemory.load_adapter('memory'); print(adapter.is_memory)"
    assert run(f"from refusal import refuse; refuse(*{OPTIONAL})\n{load}", tmp_path) == "True\n"


def test_the_package_requires_the_core_alone():
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {line.partition(">")[0] for line in required} == CORE
