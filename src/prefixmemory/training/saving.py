"""Checkpoints by the clock, beside those by the step: a short run that is killed has not run for nothing."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class SaveByTime(TrainerCallback):
    """Asks for a checkpoint once the last one, or the begin, is ``seconds`` ago; a memory's is small."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.last = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start it again, whoever asked for the checkpoint."""
        self.last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint when it is time, all processes at the same step: it is written together."""
        is_time = time.monotonic() - self.last >= self.seconds
        if args.world_size > 1:
            of_all = torch.tensor(int(is_time), device=args.device)
            torch.distributed.all_reduce(of_all, op=torch.distributed.ReduceOp.MAX)
            is_time = bool(of_all)
        control.should_save |= is_time
