"""What PEFT's users know from LoRA: works with a memory, or is refused by name with what to do instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from torch import Tensor

import tiny
from close import close_logits
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


@pytest.mark.parametrize(
    ("field", "value", "instead"),
    [
        ("layer_replication", [[0, 2], [1, 2]], "Build the model with its layers repeated"),
        ("alpha_pattern", {"layers.0": 4}, "Give scale_pattern"),
        ("ensure_weight_tying", True, "Leave tied modules out"),
    ],
)
def test_a_field_of_lora_is_refused_by_name_with_what_to_do_instead(field, value, instead):
    with pytest.raises(PrefixMemoryError, match=rf"has no field '{field}': .*{instead}"):
        PrefixMemoryConfig(**{field: value})


@pytest.mark.parametrize("fields", [{}, dict(placement="inside", prefix_length=3)], ids=["outside", "inside"])
def test_rescale_adapter_scale_is_set_scale_for_a_while(fields):
    model = tiny.with_memory(tiny.build(), **fields)
    before = logits(model)
    model.set_scale(0.5)
    expected = logits(model)
    model.set_scale(1.0)
    with rescale_adapter_scale(model, 0.5):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)
    assert not torch.equal(before, expected)


def test_rescale_adapter_scale_refuses_a_negative_scale_inside_the_softmax():
    model = tiny.with_memory(tiny.build(), placement="inside", prefix_length=3)
    with pytest.raises(PrefixMemoryError, match="inside the softmax, give 0 or more"), rescale_adapter_scale(model, -1):
        pass


def test_rescale_adapter_scale_still_refuses_a_model_without_adapters():
    with pytest.raises(ValueError, match="scaling is only supported"), rescale_adapter_scale(tiny.build(), 0.5):
        pass


LORA = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)


def test_a_mixed_model_says_what_to_do():
    with pytest.raises(PrefixMemoryError, match="Give the model its LoRA first"):
        get_peft_model(tiny.build(), PrefixMemoryConfig(), mixed=True)
    mixed = get_peft_model(tiny.build(), LORA, mixed=True)
    with pytest.raises(PrefixMemoryError, match="Give the model its LoRA first"):
        mixed.add_adapter("memory", PrefixMemoryConfig())
    assert logits(mixed).isfinite().all()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute in the model")
def test_a_memory_beside_a_lora_answers_learns_and_is_saved_by_itself(tmp_path: Path):
    def with_lora() -> torch.nn.Module:
        model = tiny.build()
        torch.manual_seed(3)
        return inject_adapter_in_model(LORA, model, "lora").eval()

    lora_alone = logits(with_lora())
    model = tiny.with_memory(with_lora())
    both = logits(model)
    assert (both - lora_alone).abs().max() > 1e-3
    assert (both - logits(tiny.with_memory(tiny.build()))).abs().max() > 1e-3
    model.set_scale(0.0)
    close_logits(logits(model), lora_alone)
    model.set_scale(1.0)
    with model.disable_adapter():  # PEFT switches every adapter layer of the model, the LoRA's too
        close_logits(logits(model), logits(tiny.build()))
    close_logits(logits(model), both)
    model.train()
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lora_A" in name for name in learns) and any("prefix_memory" in name for name in learns)
    model.eval().save_pretrained(tmp_path)
    close_logits(logits(PeftModel.from_pretrained(with_lora(), tmp_path)), both)
