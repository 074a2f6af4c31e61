"""Training on preferences: DPO, KTO and SimPO, which run in TRL."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftType
from transformers import PreTrainedModel, Trainer

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.rows.encoding import Tokens
from prefixmemory.rows.rows import Rows, row_format
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.loop import on_one_gpu
from prefixmemory.training.settings import TrainingSettings


def check_trl(objective: str) -> None:
    """Refuse an objective that runs in TRL where that is not installed."""
    if find_spec("trl") is None:
        raise PrefixMemoryError(f"objective={objective!r} runs in TRL: pip install 'prefixmemory[trl]'.")


def preference_trainer(model: PreTrainedModel, job: TrainingJob, arguments: dict[str, Any]) -> Trainer:
    """A DPOTrainer, KTOTrainer or CPOTrainer (for SimPO) of TRL, on the job's own tokens.

    The reference model of DPO and KTO is ``model`` without the adapter; SimPO has none.

    Raises:
        PrefixMemoryError: TRL is not installed, or refuses model, method or settings.
    """
    settings = job.settings
    check_trl(settings.objective)
    kind, make, more = _simpo(job.config, settings) if settings.objective == "simpo" else _trl(settings)
    columns = {"dpo": _dpo_rows, "simpo": _simpo_rows, "kto": _kto_rows}[settings.objective]
    parts = ((job.rows, job.tokens_of(0)), (job.validation, job.validation_tokens))
    train, validation = (Dataset.from_list(columns(*part, settings)) if part[0] else None for part in parts)
    try:
        trainer: Trainer = make(
            model=model,
            args=on_one_gpu(kind(**arguments, beta=settings.reward_scale, **more)),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=job.tokenizer,
            peft_config=job.config,
        )
    except PrefixMemoryError:
        raise
    except ValueError as error:
        raise PrefixMemoryError(f"objective={settings.objective!r}: TRL refuses this run: {error}") from error
    return trainer


Classes = tuple[Any, Any, dict[str, Any]]  # of config and trainer, and further arguments of the config


def _trl(settings: TrainingSettings) -> Classes:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    config, trainer = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer)}[settings.objective]

    class OnTokens(trainer):  # type: ignore[misc, valid-type]
        """Takes rows that are tokens already: TRL would cut answers at their end, and drop rows with long prompts."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return config, OnTokens, {"max_length": None}


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


# Rows in the columns of TRL's trainers; the answers to one prompt stand one behind the other


def _dpo_rows(rows: Rows, tokens: list[Tokens], settings: TrainingSettings) -> list[dict[str, Any]]:
    return [
        {"prompt_ids": chosen.prompt, "chosen_ids": chosen.completion, "rejected_ids": rejected.completion}
        for chosen, rejected in zip(tokens[::2], tokens[1::2], strict=True)
    ]


def _simpo_rows(rows: Rows, tokens: list[Tokens], settings: TrainingSettings) -> list[dict[str, Any]]:
    found = []
    for row, *pair in zip(rows, tokens[::2], tokens[1::2], strict=True):
        columns: dict[str, Any] = {name: row[name] for name in ("prompt", "chosen", "rejected")}  # CPO logs them
        for name, answer in zip(("chosen", "rejected"), pair, strict=True):
            columns |= {f"{name}_{column}": ids for column, ids in answer.feature.items()}
            columns[f"{name}_attention_mask"] = [1] * len(answer)
        found.append(columns)
    return found


def _kto_rows(rows: Rows, tokens: list[Tokens], settings: TrainingSettings) -> list[dict[str, Any]]:
    """Each with the completion of another row of its batch, by which KTO measures how far it is from the base model."""
    if row_format(rows) == "judged":
        labels = [row["label"] for row in rows]
    else:  # pairs: all chosen answers, then all rejected ones, so that neighbours differ in their prompts
        tokens, labels = tokens[::2] + tokens[1::2], [True] * len(rows) + [False] * len(rows)
    found = []
    for start in range(0, len(tokens), settings.batch_size):
        batch = tokens[start : start + settings.batch_size]
        for i, (one, label) in enumerate(zip(batch, labels[start:], strict=False)):
            columns = {"prompt_ids": one.prompt, "completion_ids": one.completion, "label": label}
            found.append({**columns, "KL_completion_ids": batch[i - 1].completion})
    return found
