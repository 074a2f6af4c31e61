"""Every trainer on a tiny model: the pieces that test_trainers.py, test_reference.py and test_rl.py put together."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import tiny
from prefixmemory import PrefixMemoryConfig

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # ORPO, CPO and online DPO are experimental in TRL 1.16

STEPS = 5
IDS = tiny.tokens(rows=4, length=12)
_PAIRS = [{"prompt": f"line {i} is dead", "chosen": " no connection", "rejected": " a refund"} for i in range(4)]
#: One batch of four rows, met in every step.
ROWS: dict[str, list[dict[str, Any]]] = {
    "trainer": [{"input_ids": row, "labels": row} for row in IDS.tolist()],
    "sft": [{"prompt": f"line {i} is dead", "completion": " no connection"} for i in range(4)],
    "kto": [
        {"prompt": row["prompt"], "completion": row[which], "label": which == "chosen"}
        for row in _PAIRS[:2]
        for which in ("chosen", "rejected")
    ],
    "prompts": [{"prompt": row["prompt"]} for row in _PAIRS],
    "pairs": _PAIRS,
}
_SAMPLED: dict[str, Any] = dict(num_generations=4, max_completion_length=8)

#: Module and names of config and trainer, data, further arguments.
TRL: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "sft": ("trl", "SFT", "sft", {}),
    "dpo": ("trl", "DPO", "pairs", {}),
    "kto": ("trl", "KTO", "kto", {}),
    "reward": ("trl", "Reward", "pairs", {}),
    "grpo": ("trl", "GRPO", "prompts", _SAMPLED),
    "rloo": ("trl", "RLOO", "prompts", _SAMPLED),
    "distillation": ("trl", "Distillation", "prompts", dict(max_completion_length=8)),
    "orpo": ("trl.experimental.orpo", "ORPO", "pairs", {}),
    "simpo": ("trl.experimental.cpo", "CPO", "pairs", dict(loss_type="simpo", cpo_alpha=0.0)),
    "online_dpo": ("trl.experimental.online_dpo", "OnlineDPO", "prompts", dict(max_new_tokens=8)),
}
SAMPLING = ("grpo", "rloo", "distillation", "online_dpo")


def lower_case(completions: list[str], **columns: Any) -> list[float]:
    """A reward: the share of lower-case letters."""
    return [sum(letter.islower() for letter in text) / 8 for text in completions]


def load(base: Path, kind: str = "sft") -> PreTrainedModel:
    if kind == "reward":
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(base)


def make_trainer(
    kind: str,
    base: Path,
    output: Path,
    model: PreTrainedModel | PeftModel | None = None,
    peft_config: PeftConfig | None = None,
    **changed: Any,
) -> Any:
    """A trainer with a memory.

    Args:
        kind: ``trainer``, or one of TRL's.
        base: folder of the base model.
        output: folder for checkpoints.
        model: ``None`` loads the base model; a PEFT model is trained as it is.
        peft_config: ``None`` for a memory.
        changed: ``ref_model`` of the trainer; further arguments of its config, or changed ones.
    """
    model = load(base, kind) if model is None else model
    if peft_config is None and not isinstance(model, PeftModel):
        peft_config = PrefixMemoryConfig(task_type="SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
    common: dict[str, Any] = dict(
        output_dir=str(output), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=0.05,
        lr_scheduler_type="constant", logging_steps=1, save_steps=STEPS, report_to="none", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    if kind == "trainer":
        adapted = model if isinstance(model, PeftModel) else get_peft_model(model, peft_config)
        arguments = TrainingArguments(**{**common, **changed})
        return Trainer(model=adapted, args=arguments, train_dataset=Dataset.from_list(ROWS[kind]))
    module, name, rows, further = TRL[kind]
    library = importlib.import_module(module)
    more: dict[str, Any] = {name: changed.pop(name) for name in ("ref_model",) if name in changed}
    if kind in ("grpo", "rloo", "online_dpo"):
        more["reward_funcs"] = lower_case
    if kind == "distillation":
        more["teacher_model"] = tiny.build(seed=5)
    # bf16 is the default of TRL's configs where the machine has it
    arguments = getattr(library, f"{name}Config")(**{**common, "bf16": False, **further, **changed})
    return getattr(library, f"{name}Trainer")(
        model=model, args=arguments, train_dataset=Dataset.from_list(ROWS[rows]), peft_config=peft_config,
        processing_class=AutoTokenizer.from_pretrained(base), **more,
    )  # fmt: skip
