"""Two processes that know each other only through a Hub: ``push`` fills it, ``load`` gets everything by id.

Started by test_hub.py with HF_ENDPOINT and an empty HF_HOME; results go to the file that is named last.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import tiny
from prefixmemory import PrefixMemoryConfig
from prefixmemory.adapters.hub import adapter_folder, push_adapter
from prefixmemory.training.card import write_model_card
from prefixmemory_cli import main

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "hub.md"
RECORD = {"base_model": "user/base", "rows": 350, "metrics": {"accuracy": {"value": 63.1, "rows": 350}}}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tiny.tokens(), use_cache=False).logits


def seen(model: nn.Module) -> dict[str, Any]:
    """What is compared between the processes: logits, and the tensors of the adapter that is active."""
    adapter = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return {"logits": logits(model), "adapter": {name: tensor.detach().clone() for name, tensor in adapter.items()}}


def base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained("user/base")


def python_blocks(text: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def command(line: str) -> tuple[int, str]:
    """Exit code and output of a command line."""
    sys.argv = shlex.split(line)
    with redirect_stdout(StringIO()) as output, redirect_stderr(output):
        try:
            main()
        except SystemExit as stopped:
            return int(stopped.code), output.getvalue()
    raise AssertionError("main returned")


def push() -> dict[str, Any]:
    tiny.build().push_to_hub("user/base")
    tiny.tokenizer().push_to_hub("user/base")
    found: dict[str, Any] = {"base": {"logits": logits(base_model())}}

    model = tiny.with_memory(base_model())
    found["memory"] = seen(model)
    folder = Path("memory")
    model.save_pretrained(folder)
    (folder / "README.md").unlink()  # PEFT's form
    write_model_card(folder, RECORD)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "optimizer.pt").write_bytes(b"not to be pushed")
    found["address"] = push_adapter(folder, "user/memory")
    found["peft's address"] = str(model.push_to_hub("user/by-peft"))

    tiny.randomize(model, seed=9)
    found["memory v2"] = seen(model)
    model.save_pretrained(folder)
    found["address of v2"] = push_adapter(folder, "user/memory", revision="v2")

    nested = get_peft_model(base_model(), PrefixMemoryConfig(task_type="CAUSAL_LM"), adapter_name="other")
    tiny.randomize(nested, "other", seed=5)
    found["nested"] = seen(nested)
    nested.push_to_hub("user/nested")

    lora = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    found["lora"] = seen(lora)
    lora.save_pretrained("lora")
    Path("lora", "README.md").unlink()
    push_adapter(Path("lora"), "user/lora")
    return found


def load() -> dict[str, Any]:
    def outcome(get: Callable[[], nn.Module]) -> Any:
        try:
            return seen(get())
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def auto(name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: AutoPeftModelForCausalLM.from_pretrained(name, **options)

    def onto_base(name: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: PeftModel.from_pretrained(base_model(), name, **options)

    def as_the_card_says(name: str) -> nn.Module:
        names: dict[str, Any] = {}
        exec(python_blocks(Path(hf_hub_download(name, "README.md")).read_text(encoding="utf-8")), names)
        return names["model"]

    def second_adapter() -> nn.Module:
        model = onto_base("user/by-peft")()
        model.load_adapter("user/memory", "second", revision="v2")
        model.set_adapter("second")
        return model

    def as_the_guide_says() -> nn.Module:
        model = PeftModel.from_pretrained(base_model(), "user/memory")
        model.save_pretrained("tickets-memory")
        Path("tickets-memory", "run.json").write_text("{}")
        guide = GUIDE.read_text(encoding="utf-8").replace("HuggingFaceTB/SmolLM2-135M-Instruct", "user/base")
        for line in re.search(r"```\n(prefixmemory .*?)```", guide, re.DOTALL)[1].splitlines():
            found["guide's commands"].append(command(line))
        names: dict[str, Any] = {}
        exec(python_blocks(guide), names)
        assert names["url"] == f"{os.environ['HF_ENDPOINT']}/user/tickets-memory"
        return names["model"]

    found = {
        "auto": outcome(auto("user/memory")),
        "onto base": outcome(onto_base("user/memory")),
        "pushed by peft": outcome(auto("user/by-peft")),
        "revision": outcome(onto_base("user/memory", revision="v2")),
        "auto, revision": outcome(auto("user/memory", revision="v2")),
        "subfolder": outcome(onto_base("user/nested", subfolder="other")),
        "second adapter": outcome(second_adapter),
        "card": outcome(lambda: as_the_card_says("user/memory")),
        "card of lora": outcome(lambda: as_the_card_says("user/lora")),
        "folder": outcome(lambda: onto_base(str(adapter_folder("user/memory", "v2")))()),
        "damaged": outcome(onto_base("user/damaged")),
        "cut off": outcome(onto_base("user/cut")),
        "without weights": outcome(onto_base("user/headless")),
        "config of v2": PrefixMemoryConfig.from_pretrained("user/memory", revision="v2").weights_sha256,
        "lora as a memory": "",
        "guide's commands": [],
    }
    try:
        PrefixMemoryConfig.from_pretrained("user/lora")
    except Exception as error:
        found["lora as a memory"] = f"{type(error).__name__}: {error}"
    untouched = base_model()
    for name in ("user/damaged", "user/cut"):
        try:
            PeftModel.from_pretrained(untouched, name)
        except ValueError:
            continue
    found["modules after a refusal"] = [name for name, _ in untouched.named_modules() if "prefix_memory" in name]
    found["guide"] = outcome(as_the_guide_says)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, file = sys.argv[1:]
    torch.save({"push": push, "load": load}[what](), file)
