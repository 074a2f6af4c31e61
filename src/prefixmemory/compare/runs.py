"""Which runs a suite needs: first the learning rates on validation rows, then all seeds on test rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from prefixmemory.compare.method import Method
from prefixmemory.compare.records import Record, Run
from prefixmemory.compare.suite import Loaded
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.tasks import Task

#: Raised whenever a default or a way of scoring changes so that earlier records cannot stand beside new ones.
PROTOCOL = 1
_BY_LIKELIHOOD = ("loss", "preference")
#: Of the examples in their prompts; in the first records they were the first few, and the end token counted.
_EXAMPLES = "of each label, no end"


def rates(loaded: Loaded, method: Method) -> list[float]:
    """The candidates for the learning rate of ``method``, ascending."""
    return [float(f"{(method.learning_rate or 0) * factor:.3g}") for factor in sorted(loaded.suite.rate_factors)]


def key(loaded: Loaded, run: Run, data: Mapping[str, str]) -> str:
    """Ten digits that stand for everything that decides the record of ``run``.

    Args:
        loaded: its suite.
        run: the run.
        data: task -> checksum of its rows, also of the tasks that others transfer to.
    """
    suite, task, method = loaded.suite, loaded.tasks[run.task], loaded.methods[run.method]
    parts: dict[str, Any] = {
        **asdict(run),
        "protocol": PROTOCOL,
        "model": suite.model,
        "dtype": suite.dtype,
        "attention": suite.attention,
        "task": {name: getattr(task, name) for name in _DECIDING} | {"rows": data[run.task]},
        "method": {"kind": method.kind, "adapter": _adapter(method), "shots": method.shots},
        "settings": _chosen(loaded.settings(task, method, run.learning_rate or 1.0, run.seed)),
        "validation_rows": suite.validation_rows,
    }
    settings = loaded.settings(task, method, 1.0, run.seed)
    if settings.distractors is not None:
        parts |= {"distractors": settings.distractors.checksum()}
        if settings.objective == "sft":
            parts |= {"drawn": "in every epoch"}  # in the first records they were drawn once
    if task.scoring in _BY_LIKELIHOOD and method.shots:
        parts |= {"examples": _EXAMPLES}
    if suite.launcher is not None:  # its processes share the steps
        parts |= {"launcher": suite.launcher}
    if run.stage == "final":
        parts |= {"test_rows": suite.test_rows}
    if run.stage == "final" and run.chosen:
        parts |= {
            "long_input": sorted(suite.long_input),
            "long_input_rows": suite.long_input_rows,
            "transfer_rows": suite.transfer_rows,
            "transfers_to": task.transfers_to,
        }
        if suite.transfer_rows and task.transfers_to:
            others = [loaded.task(name) for name in task.transfers_to]
            deciding = [[[getattr(other, name) for name in _DECIDING], data[other.name]] for other in others]
            parts |= {"transfer": [deciding, suite.seeds[0]]}  # that seed draws the examples in their prompts
            if any(other.scoring in _BY_LIKELIHOOD for other in others):
                parts |= {"transferred examples": _EXAMPLES}
        if writes_answers(loaded, task):  # not always: older records have no such entry
            parts |= {"written_answers": suite.written_answers}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]


def writes_answers(loaded: Loaded, task: Task) -> bool:
    """Whether final runs of ``task`` leave answers for a judge: where answers are free, and the suite asks for some."""
    return loaded.suite.written_answers > 0 and task.scoring in ("loss", "preference")


_DECIDING = ("name", "version", "scoring", "per_label", "limit", "max_new_tokens")  # the rest decides the rows
#: Defaults of settings that have changed since records began, as they were: the key of an old record stays what it is.
_FIRST_DEFAULTS = {"learning_rate": 3e-4, "warmup": 0.1}


def _adapter(method: Method) -> dict[str, Any]:
    """The adapter's fields, with those of a memory whose defaults have changed, whether they are given or not."""
    if method.kind != "adapter" or not isinstance(config := method.config(), PrefixMemoryConfig):
        return method.adapter
    # the defaults of the first records
    once = {"rank": None, "output_limit": None, "normalize": "none", "feed_forward": None, "head_scale": 1.0}
    given = {name: value for name, value in method.adapter.items() if once.get(name, "") is not None}
    return given | {name: getattr(config, name) for name, old in once.items() if getattr(config, name) != old}


def _chosen(settings: Any) -> dict[str, Any]:
    """The fields that are not at their defaults, so that a new field leaves old records valid."""
    blank = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(settings)}
    blank |= _FIRST_DEFAULTS
    return {name: value for name, value in asdict(settings).items() if value != blank[name]}


def planned(loaded: Loaded, records: Mapping[Run, Record]) -> list[Run]:
    """All runs that are known to be needed: those of the final stage once their rates have been tried.

    They stand in the order in which they are worth most: rates first, then one seed of everything before the next,
    last what serves the curves over learning rates alone.
    """
    tries, finals = [], []
    for task in loaded.tasks.values():
        for method in loaded.methods.values():
            if not method.is_trained:
                finals += [Run(task.name, method.name, "final", None, seed) for seed in seeds_of(loaded, method)]
                continue
            candidates = rates(loaded, method)
            trying = [Run(task.name, method.name, "rate", rate, loaded.suite.seeds[0]) for rate in candidates]
            if len(candidates) == 1:  # nothing to choose
                trying, rate = [], candidates[0]
            else:
                tries += trying
                if not all(run in records for run in trying):
                    continue
                best = chosen_rate(loaded, task, method, records)
                if best is None:  # every rate failed
                    continue
                rate = best
            scored = candidates if method.name in loaded.suite.every_rate else [rate]
            finals += [
                Run(task.name, method.name, "final", candidate, seed, chosen=candidate == rate)
                for seed in loaded.suite.seeds
                for candidate in scored
            ]
    order = loaded.suite.seeds
    return tries + sorted(finals, key=lambda run: (not run.chosen, order.index(run.seed)))


def total(loaded: Loaded) -> int:
    """How many runs the suite has in all."""
    count = 0
    for method in loaded.methods.values():
        if method.is_trained:
            tried = len(loaded.suite.rate_factors)
            scored = tried if method.name in loaded.suite.every_rate else 1
            count += (tried if tried > 1 else 0) + scored * len(loaded.suite.seeds)
        else:
            count += len(seeds_of(loaded, method))
    return count * len(loaded.tasks)


def seeds_of(loaded: Loaded, method: Method) -> list[int]:
    """Seeds of the final runs of ``method``: one for the base model, which answers the same whatever the seed."""
    return loaded.suite.seeds[:1] if method.kind == "base" else loaded.suite.seeds


def chosen_rate(loaded: Loaded, task: Task, method: Method, records: Mapping[Run, Record]) -> float | None:
    """The candidate with the best validation score, of equals the one nearest the middle; ``None``: all failed."""
    found = []
    candidates = rates(loaded, method)
    for place, rate in enumerate(candidates):
        record = records.get(Run(task.name, method.name, "rate", rate, loaded.suite.seeds[0]))
        if record is not None and record.failure is None and record.validation is not None:
            from_middle = abs(place - (len(candidates) - 1) / 2)
            found.append((record.validation.score, -from_middle, rate))
    return max(found)[2] if found else None
