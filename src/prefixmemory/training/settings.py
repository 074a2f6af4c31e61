"""How to train: one dataclass, the ``training:`` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from prefixmemory.errors import PrefixMemoryError, check_choice
from prefixmemory.rows.distractors import Distractors

Objective = Literal["sft", "dpo", "kto", "simpo"]
Scheduler = Literal["cosine", "linear", "constant"]
Precision = Literal["none", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainingSettings:
    """What a training run can be told; the defaults suit a :class:`PrefixMemoryConfig` of rank 8.

    Args:
        objective: ``sft`` (likelihood of completions), ``dpo`` or ``simpo`` (preference pairs), or ``kto`` (answers
            marked good or bad); all but the first run in TRL.
        learning_rate: peak of the schedule. The default is that of memories of rank 8 with a limit, in feed-forward
            blocks too or in heads alone (``docs/defaults.md``). The paper's form (``rank=None, normalize="none",
            output_limit=None``) wants 3e-4 and a warm-up of 0.1; other methods have rates of their own, LoRA about
            1e-3.
        epochs: passes over the data.
        batch_size: rows per step, on each device.
        gradient_accumulation: steps whose gradients make one optimizer step.
        scheduler: how the learning rate falls after its rise: ``cosine``, ``linear``, or ``constant`` (not at all).
        warmup: fraction of all steps in which the learning rate rises.
        weight_decay: of AdamW.
        max_grad_norm: length to which gradients are clipped.
        max_length: longest row in tokens, prompt and answer; prompts lose their beginning.
        mixed_precision: autocast of the forward pass; the memory itself stays in fp32.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        save_steps: optimizer steps between checkpoints, and between evaluations where there is validation data.
        save_minutes: minutes after which there is a checkpoint whatever the steps; ``None``: by step only.
        keep_best: leave the adapter of the checkpoint with the lowest validation loss, not the last one.
        patience: stop after this many evaluations without a lower validation loss; implies ``keep_best``.
        beta: strength of the tie to the base model in ``dpo`` and ``kto``, by default 0.1; in ``simpo``, which knows
            no base model, the factor of the mean log-likelihood of a token, by default 2.
        simpo_gamma: by how much the reward of the chosen answer shall exceed that of the rejected one, in ``simpo``;
            by default half of ``beta``.
        distractors: unrelated text in front of a share of the training rows, whatever the method; ``None``: none. See
            :class:`~prefixmemory.rows.distractors.Distractors`.
        seed: of order, start values, dropout and distractors.
    """

    objective: Objective = "sft"
    learning_rate: float = 3e-3
    epochs: int | float = 3
    batch_size: int = 8
    gradient_accumulation: int = 1
    scheduler: Scheduler = "cosine"
    warmup: float = 0.3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    mixed_precision: Precision = "none"
    gradient_checkpointing: bool = False
    save_steps: int = 100
    save_minutes: int | float | None = 2
    keep_best: bool = False
    patience: int | None = None
    beta: float | None = None
    simpo_gamma: float | None = None
    distractors: Distractors | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, get_args(Objective))
        check_choice("scheduler", self.scheduler, get_args(Scheduler))
        check_choice("mixed_precision", self.mixed_precision, get_args(Precision))
        if self.beta is not None and self.objective == "sft":
            raise PrefixMemoryError(f"beta={self.beta} needs objective='dpo', 'kto' or 'simpo'. Leave it out.")
        if self.simpo_gamma is not None and self.objective != "simpo":
            raise PrefixMemoryError(f"simpo_gamma={self.simpo_gamma} needs objective='simpo'. Leave it out.")
        above_zero = ["learning_rate", "epochs", "batch_size", "gradient_accumulation", "max_grad_norm", "max_length",
                      "save_steps"]  # fmt: skip
        for name in above_zero + [
            name for name in ("patience", "beta", "save_minutes") if getattr(self, name) is not None
        ]:
            if not 0 < getattr(self, name) < float("inf"):
                raise PrefixMemoryError(f"{name}={getattr(self, name)} is out of range: give a number above 0.")
        if self.objective == "kto" and self.batch_size < 2:
            raise PrefixMemoryError(f"batch_size={self.batch_size} is out of range: kto needs 2 rows or more a step.")
        for name in ("weight_decay", "simpo_gamma"):
            if not 0 <= (getattr(self, name) or 0.0) < float("inf"):
                raise PrefixMemoryError(f"{name}={getattr(self, name)} is out of range: give a number from 0 on.")
        if not 0 <= self.seed < 2**32:
            raise PrefixMemoryError(f"seed={self.seed} is out of range: give a number from 0 to 2**32 - 1.")
        if not 0 <= self.warmup < 1:
            raise PrefixMemoryError(f"warmup={self.warmup} is out of range: give a fraction of the steps in [0, 1).")

    @property
    def keeps_best(self) -> bool:
        """Whether the checkpoint with the lowest validation loss is what is kept in the end."""
        return self.keep_best or self.patience is not None

    @property
    def reward_scale(self) -> float:
        """``beta``, or its default for the objective."""
        return self.beta if self.beta is not None else 2.0 if self.objective == "simpo" else 0.1

    @property
    def reward_margin(self) -> float:
        """``simpo_gamma``, or its default."""
        return self.simpo_gamma if self.simpo_gamma is not None else self.reward_scale / 2
