"""A workaround for slow vocabulary projections of frozen models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel


def _contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].contiguous(), *args[1:])


@contextmanager
def contiguous_logits_input(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Make what the output embeddings read contiguous while the context is open.

    With ``logits_to_keep`` they read a slice ``[B, K, hidden]``. torch (2.13) multiplies a slice that is not
    contiguous with a frozen matrix row by row of the batch, and copies the matrix once per row: a training step of
    the quickstart would take three times as long (``benchmarks/training_step.py``, docs/LOG.md).
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(_contiguous)
    try:
        yield
    finally:
        handle.remove()
