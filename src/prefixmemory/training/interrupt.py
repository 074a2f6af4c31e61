"""Stopping a run from outside: by ctrl-C, or by the SIGTERM of Slurm, Kubernetes and ``kill``."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def say_to_stderr(text: str) -> None:
    """A line from where nothing may be raised: who reads it may be gone, such as ``| tee log`` of the same ctrl-C."""
    with suppress(OSError, RuntimeError):  # RuntimeError: a signal within another line
        print(text, file=sys.stderr, flush=True)


class Interrupted(Exception):
    """Training was stopped by a signal after a checkpoint was written.

    Attributes:
        exit_status: with which a shell expects the process to end: 130 after ctrl-C, 143 after SIGTERM.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class StopOnSignal(TrainerCallback):
    """On the first signal: finish the step, write a checkpoint, stop. A ctrl-C after that stops at once.

    Python hands signals to its main thread only; in any other one, stopping is left to the program.
    """

    def __init__(self) -> None:
        self.asked = 0  # number of the signal

    def __enter__(self) -> StopOnSignal:
        main = threading.current_thread() is threading.main_thread()
        self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS} if main else {}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked = number
        say_to_stderr("\nStopping after this step; ctrl-C again stops at once.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop once asked to, all processes at the same step: the checkpoint is written together."""
        if args.world_size > 1:
            asked = torch.tensor(self.asked, device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self.asked = int(asked)
        if self.asked:
            control.should_save = True
            control.should_training_stop = True
