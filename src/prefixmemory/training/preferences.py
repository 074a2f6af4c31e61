"""Training on preferences: DPO and KTO, which run in TRL."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.training.rows import Row, Rows
from prefixmemory.training.settings import TrainingSettings

ANSWERS = ("chosen", "rejected", "completion")


def check_trl(objective: str) -> None:
    """Refuse an objective that runs in TRL where that is not installed."""
    if find_spec("trl") is None:
        raise PrefixMemoryError(f"objective={objective!r} runs in TRL: pip install 'prefixmemory[trl]'.")


def preference_trainer(
    model: PreTrainedModel,
    config: PeftConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    validation: Rows,
    settings: TrainingSettings,
    arguments: dict[str, Any],
) -> Trainer:
    """A DPOTrainer or KTOTrainer of TRL; the reference model is ``model`` without the adapter.

    Raises:
        PrefixMemoryError: TRL is not installed, or refuses model, method or settings.
    """
    check_trl(settings.objective)
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    kind, make = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}[settings.objective]
    try:
        trainer: Trainer = make(
            model=model,
            # TRL would cut answers at their end, and drop rows with long prompts.
            args=kind(**arguments, max_length=None, beta=settings.beta),
            train_dataset=preference_dataset(rows, tokenizer, settings),
            eval_dataset=preference_dataset(validation, tokenizer, settings) if validation else None,
            processing_class=tokenizer,
            peft_config=config,
        )
    except PrefixMemoryError:
        raise
    except ValueError as error:
        raise PrefixMemoryError(f"objective={settings.objective!r}: TRL refuses this run: {error}") from error
    trainer.train_dataset = _cut_prompts(trainer.train_dataset, settings.max_length)
    if validation:
        trainer.eval_dataset = _cut_prompts(trainer.eval_dataset, settings.max_length)
    return trainer


def _cut_prompts(dataset: Any, max_length: int) -> Any:
    """Tokenized rows whose prompts lose their beginning where prompt and answer are too long together."""

    def cut(row: Mapping[str, Any]) -> dict[str, Any]:
        longest = max(len(row[f"{name}_ids"]) for name in ANSWERS if f"{name}_ids" in row)
        return {"prompt_ids": row["prompt_ids"][-max(max_length - longest, 1) :]}

    return dataset.map(cut)


def with_one_answer(rows: Rows) -> list[Row]:
    """Each answer of each row as a row of its own, to see how long it is."""
    found = []
    for row in rows:
        for name in ANSWERS:
            if name in row:
                found.append(Row(prompt=row["prompt"], completion=row[name]))
                found[-1].where = getattr(row, "where", "")
    return found


def preference_dataset(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings) -> Dataset:
    """Rows in TRL's columns: conversations where the model has a chat template, else texts."""
    from trl import unpair_preference_dataset

    chats = getattr(tokenizer, "chat_template", None) is not None

    def said(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if chats else text

    def converted(row: Mapping[str, Any]) -> dict[str, Any]:
        answers = {name: said("assistant", row[name]) for name in ANSWERS if name in row}
        judgement = {"label": row["label"]} if "chosen" not in row else {}
        return {"prompt": said("user", row["prompt"]), **answers, **judgement}

    dataset = Dataset.from_list([converted(row) for row in rows])
    pairs_for_kto = settings.objective == "kto" and "chosen" in dataset.column_names
    return unpair_preference_dataset(dataset) if pairs_for_kto else dataset
