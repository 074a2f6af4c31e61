"""The record of a run, ``run.json``: what was run, and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import Any, TypedDict, cast

from transformers import PreTrainedModel

from prefixmemory.files.records import Provenance
from prefixmemory.rows.rows import Rows, row_format
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.methods import choices, method_name


class Plan(TypedDict):
    """What is going to be run: what a run that is resumed must have in common with the interrupted one."""

    base_model: str
    method: str
    config: dict[str, Any]
    settings: dict[str, Any]
    rows: int
    row_format: str
    chat_template_kwargs: dict[str, Any]
    rows_cut: int
    rows_sha256: str
    validation_sha256: str | None
    distractors_sha256: str | None
    dtype: str
    attention: str | None
    quantization: str | None
    processes: int


class RunRecord(Plan, Provenance, total=False):
    """A plan, its outcome (times in seconds), where it ran, and what read the memory (``kernels/impl.py``)."""

    data: dict[str, Any]
    train_loss: float
    validation_loss: float
    train_seconds: float
    trainable_parameters: int
    memory_read: str


def plan_of_run(job: TrainingJob, model: PreTrainedModel) -> Plan:
    """The plan of ``job``, as it will be read back: sets become lists."""
    plan: Plan = {
        "base_model": job.base_model,
        "method": method_name(job.config),
        "config": choices(job.config),
        "settings": asdict(job.settings),
        "rows": len(job.rows),
        "row_format": row_format(job.rows),
        "chat_template_kwargs": _given_in_all(job.rows),
        "rows_cut": job.rows_cut,
        "rows_sha256": checksum(job.rows),
        "validation_sha256": checksum(job.validation) if job.validation else None,
        "distractors_sha256": None if (front := job.settings.distractors) is None else front.checksum(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": getattr(model.config, "_attn_implementation", None),
        "quantization": job.quantization,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),  # each takes batch_size rows a step
    }
    as_read = json.dumps(plan, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    return cast(Plan, json.loads(as_read))


def _given_in_all(rows: Rows) -> dict[str, Any]:
    """The ``chat_template_kwargs`` on which all rows agree: a question is asked with them, too.

    Rows of messages alone have them; in others it is a column that means nothing.
    """
    if row_format(rows) != "messages":
        return {}
    first = rows[0].get("chat_template_kwargs") or {}
    return dict(first) if all((row.get("chat_template_kwargs") or {}) == first for row in rows) else {}


def checksum(rows: Rows) -> str:
    """Of rows as they were read; Parquet holds dates and bytes beside texts."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True, default=str).encode()).hexdigest()
