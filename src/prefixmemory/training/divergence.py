"""A run that diverges ends with one line, and leaves no adapter of NaN."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefixmemory.errors import PrefixMemoryError


class StopDiverged(TrainerCallback):
    """Ends a run whose trained numbers are no longer finite: all further steps would be lost.

    Attributes:
        step: at which that was seen.
    """

    step: int | None = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look, as often as the loss is logged, which hides losses that are NaN."""
        if _diverged(kwargs["model"], args.device):
            control.should_training_stop, self.step = True, state.global_step

    def check(self, trainer: Trainer) -> None:
        """Refuse what a run has diverged to, also where an earlier checkpoint was the best, and is what is there now.

        Raises:
            PrefixMemoryError: a trained number is, or was, NaN or infinite.
        """
        state = trainer.state
        if self.step is None and _diverged(trainer.model, trainer.args.device):
            self.step = state.global_step
        if self.step is not None:
            raise PrefixMemoryError(
                f"Training diverged: after step {self.step} of {state.max_steps}, trained numbers are NaN or infinite, "
                f"so no adapter was saved. Lower learning_rate={trainer.args.learning_rate:g}, and start afresh."
            )


def _diverged(model: nn.Module | None, device: torch.device) -> bool:
    """In any of the processes, of which each may hold a part."""
    trained = [] if model is None else [_here(p) for p in model.parameters() if p.requires_grad]
    lost = not all([bool(x.isfinite().all()) for x in trained])
    found: Any = reduce(torch.tensor(float(lost), device=device), "sum")
    return bool(found > 0)


def _here(parameter: Any) -> Tensor:
    """What of a parameter lies in this process."""
    part = getattr(parameter, "ds_tensor", parameter).detach()
    return part.to_local() if hasattr(part, "to_local") else part  # type: ignore[no-any-return]
