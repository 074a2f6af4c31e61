"""What is said while a user waits: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefixmemory.errors import for_terminal


def progress_bar(console: Console) -> Progress:
    """Bar with count, time taken and time left; shows nothing when ``console`` is no terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def say_loading(console: Console, what: str) -> None:
    """A line before a model is loaded, which takes its time."""
    say(console, for_terminal(f"Loading {what} ...", 500))


def say(console: Console, text: str) -> None:
    """A line of text that may hold names, labels or answers of others; rich would read markup in it."""
    console.print(for_terminal(text), markup=False, highlight=False, soft_wrap=True)


class LogLines(TrainerCallback):
    """Prints step, loss, speed and time left twice a minute: for logs, where a bar would be noise."""

    def __init__(self, console: Console, seconds: float = 30.0) -> None:
        self.console, self.seconds = console, seconds
        self.loss: float | None = None
        self.validation_loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.started = self.last_line = time.monotonic()
        self.first_step = state.global_step

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the losses."""
        logs = kwargs.get("logs") or {}
        if "loss" in logs:
            self.loss = float(logs["loss"])
        if "eval_loss" in logs:
            self.validation_loss = float(logs["eval_loss"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Print a line when it is time."""
        now = time.monotonic()
        if now - self.last_line < self.seconds:
            return
        self.last_line = now
        done, total = state.global_step, state.max_steps
        seconds = (now - self.started) / (done - self.first_step)
        loss = "" if self.loss is None else f", loss {self.loss:.3f}"
        validation = "" if self.validation_loss is None else f", validation loss {self.validation_loss:.3f}"
        left = _clock(seconds * (total - done))
        self.console.print(f"step {done}/{total}{loss}{validation}, {seconds:.2f} s a step, {left} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def show_progress(console: Console) -> TrainerCallback:
    """A bar in a terminal, lines elsewhere."""
    return RichProgress(console) if console.is_terminal else LogLines(console)


class RichProgress(TrainerCallback):
    """Shows steps, loss and time left while the Trainer runs."""

    def __init__(self, console: Console) -> None:
        self.bar = progress_bar(console)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the loss."""
        loss = (kwargs.get("logs") or {}).get("loss")
        if loss is not None:
            self.bar.update(self.task, description=f"training, loss {float(loss):.2f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.bar.stop()
