"""A memory on a base model that accelerate keeps on disk in part: it stays resident, and answers as on a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from close import close_logits, same_parameters
from prefixmemory.tuner.layers import memory_layers

ON_DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu"),
    "model.layers.1": "disk",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": tiny.DEFAULT,
    "full": {},
    "inside": dict(placement="inside", prefix_length=3),
    "reparameterized": dict(placement="inside", prefix_length=3, reparameterize=4),
}
pytestmark = pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_that_is_loaded_onto_a_base_on_disk_stays_resident(tmp_path: Path, variant, low_cpu_mem_usage):
    tiny.save_tiny(tmp_path / "base")
    whole = tiny.with_memory(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **VARIANTS[variant])
    whole.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=ON_DISK, offload_folder=tmp_path / "offloaded"
    )
    # so little that PEFT, which dispatches again, puts more on disk
    model = PeftModel.from_pretrained(
        base, tmp_path / "adapter", max_memory={"cpu": "60KB"}, offload_folder=tmp_path / "again",
        low_cpu_mem_usage=low_cpu_mem_usage,
    )  # fmt: skip
    assert "disk" in model.hf_device_map.values()
    assert any(parameter.is_meta for parameter in base.parameters())
    expected = {name: p.detach() for name, p in whole.named_parameters() if "prefix_memory" in name}
    for _ in range(2):  # it is still there after a pass
        close_logits(logits(model), logits(whole))
        same_parameters({n: p.detach() for n, p in model.named_parameters() if n in expected}, expected)
    with model.disable_adapter():
        assert (logits(model) - logits(whole)).abs().max() > 1e-3
    assert not any(layer.put_aside for layer in memory_layers(model))


@pytest.mark.parametrize("where", ["disk", "cpu"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_that_is_offloaded_with_its_memory_answers_the_same(tmp_path: Path, variant, where):
    model = tiny.with_memory(tiny.build(), **VARIANTS[variant])
    expected = logits(model)
    if where == "disk":
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in memory_layers(model)[0].parameters())
    close_logits(logits(model), expected)
    close_logits(logits(model), expected)
