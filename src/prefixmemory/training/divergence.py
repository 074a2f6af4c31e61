"""A run that diverges ends with one line, and leaves no adapter of NaN."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefixmemory.errors import PrefixMemoryError


class StopDiverged(TrainerCallback):
    """Ends a run whose trained numbers are no longer finite: all further steps would be lost."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look, as often as the loss is logged, which hides losses that are NaN."""
        if _diverged(kwargs["model"], args.device):
            control.should_training_stop = True


def check_converged(trainer: Trainer) -> None:
    """Refuse what a run has diverged to.

    Raises:
        PrefixMemoryError: a trained number is NaN or infinite.
    """
    if _diverged(trainer.model, trainer.args.device):
        raise PrefixMemoryError(
            f"Training diverged: after step {trainer.state.global_step} of {trainer.state.max_steps}, trained numbers "
            f"are NaN or infinite, so no adapter was saved. Lower learning_rate={trainer.args.learning_rate:g}, and "
            "start afresh."
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
