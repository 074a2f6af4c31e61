"""Training on preferences: DPO, KTO and SimPO, which run in TRL."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftType
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.collator import IGNORED, encode_prompt
from prefixmemory.rows.rows import Row, Rows, render
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
    """A DPOTrainer, KTOTrainer or CPOTrainer (for SimPO) of TRL.

    The reference model of DPO and KTO is ``model`` without the adapter; SimPO has none.

    Raises:
        PrefixMemoryError: TRL is not installed, or refuses model, method or settings.
    """
    check_trl(settings.objective)
    prepare = simpo_dataset if settings.objective == "simpo" else preference_dataset
    kind, make, more = _simpo(config, settings) if settings.objective == "simpo" else _trl(settings)
    try:
        trainer: Trainer = make(
            model=model,
            args=kind(**arguments, beta=settings.reward_scale, **more),
            train_dataset=prepare(rows, tokenizer, settings),
            eval_dataset=prepare(validation, tokenizer, settings) if validation else None,
            processing_class=tokenizer,
            peft_config=config,
        )
    except PrefixMemoryError:
        raise
    except ValueError as error:
        raise PrefixMemoryError(f"objective={settings.objective!r}: TRL refuses this run: {error}") from error
    if settings.objective != "simpo":
        trainer.train_dataset = _cut_prompts(trainer.train_dataset, settings.max_length)
        if validation:
            trainer.eval_dataset = _cut_prompts(trainer.eval_dataset, settings.max_length)
    return trainer


Classes = tuple[Any, Any, dict[str, Any]]  # of config and trainer, and further arguments of the config


def _trl(settings: TrainingSettings) -> Classes:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    classes = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}[settings.objective]
    # TRL would cut answers at their end, and drop rows with long prompts.
    return *classes, {"max_length": None}


def _simpo(config: PeftConfig, settings: TrainingSettings) -> Classes:
    """TRL has SimPO as a loss of its CPOTrainer, among what is experimental."""
    if config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING:
        raise PrefixMemoryError(
            f"method.name={str(config.peft_type.value).lower()!r} cannot be trained with objective='simpo': TRL's "
            "trainer does not leave out the logits of its virtual tokens. Use objective='dpo'."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        try:
            from trl.experimental.cpo import CPOConfig, CPOTrainer
        except ImportError as error:
            raise PrefixMemoryError(
                "objective='simpo' needs trl.experimental.cpo, which this TRL lacks: pip install 'prefixmemory[trl]'."
            ) from error

    class SimPOTrainer(CPOTrainer):
        """Takes rows that are tokens already: TRL's own would end chats twice, and cut answers, not prompts."""

        @staticmethod
        def tokenize_row(feature: Any, model: Any = None) -> Any:
            """``feature`` as it is."""
            return feature

    more = {
        "loss_type": "simpo",
        "cpo_alpha": 0.0,  # CPO's likelihood term is no part of SimPO
        "simpo_gamma": settings.reward_margin,
        "max_length": settings.max_length,
        "remove_unused_columns": False,  # the model knows none of them by name
    }
    return CPOConfig, SimPOTrainer, more


def simpo_dataset(rows: Rows, tokenizer: PreTrainedTokenizerBase, settings: TrainingSettings) -> Dataset:
    """Rows as tokens, the same as in ``sft`` and in scoring; a long prompt loses its beginning, for both answers."""
    examples = render(with_one_answer(rows), tokenizer)
    features = []
    for pair in zip(examples[::2], examples[1::2], strict=True):
        answers = [tokenizer(one.completion, add_special_tokens=False)["input_ids"] for one in pair]
        room = max(settings.max_length - max(map(len, answers)), 1)
        prompt = encode_prompt(pair[0].prompt, tokenizer)[-room:]
        feature: dict[str, Any] = {"prompt": pair[0].prompt}
        for name, ids in zip(("chosen", "rejected"), answers, strict=True):
            feature[name] = pair[name == "rejected"].completion
            feature[f"{name}_input_ids"] = prompt + ids
            feature[f"{name}_attention_mask"] = [1] * len(prompt + ids)
            feature[f"{name}_labels"] = [IGNORED] * len(prompt) + ids
        features.append(feature)
    return Dataset.from_list(features)


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
