"""Hand-made records of a comparison: suites whose right figures are known without running anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from prefixmemory.compare.records import Decoding, Failure, Provenance, Record, Run, Scores, Training
from prefixmemory.compare.runs import chosen_rate, rates, seeds_of
from prefixmemory.compare.suite import Loaded, load_suite

MADE_WITH = Provenance(
    commit="c0ffee", versions={"prefixmemory": "0.1.0", "torch": "2.13.0"}, hardware="a machine, 2 cores"
)
PARAMETERS = {"lora-attention": 460_800, "prefixmemory": 1_105_920, "prefix-tuning": 230_400, "lora-all-linear": 2e6}


def write_suite(
    folder: Path,
    tasks: Sequence[str] = ("north", "south"),
    methods: Sequence[str] = ("base", "lora-attention", "prefixmemory"),
    scoring: str = "exact_match",
    transfers_to: Sequence[str] = (),
    **fields: Any,
) -> Path:
    """A suite of tasks that are files beside it, with four rows each to train and to test."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "test"):
        rows = "".join(f'{{"text": "{name} row {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(8))
        (folder / f"{name}.jsonl").write_text(rows)
    for task in tasks:
        content = {
            "name": task,
            "version": 1,
            "description": f"What is {task}?",
            "licence": "none",
            "scoring": scoring,
            "train": "train.jsonl",
            "test": "test.jsonl",
            "transfers_to": list(transfers_to),
        }
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(content))
    suite = {
        "name": "made-by-hand",
        "description": "Records made by hand.",
        "model": "smollm2",
        "tasks": [f"{task}.yaml" for task in tasks],
        "methods": list(methods),
        "seeds": [0, 1, 2],
        "validation_rows": 2,
        "test_rows": 4,
        "training": {"epochs": 2},
        **fields,
    }
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(suite))
    return file


def made_suite(folder: Path, **fields: Any) -> Loaded:
    """As :func:`write_suite`, read."""
    return load_suite(write_suite(folder, **fields))


def scored(points: Iterable[float], **more: Any) -> Scores:
    """What scoring some rows leaves in a record; ``more`` replaces fields."""
    found = [float(point) for point in points]
    return Scores(**{"score": sum(found) / len(found), "points": found, **more})


def final(run: Run, points: Iterable[float], **more: Any) -> Record:
    """The record of a final run that was scored; ``more`` replaces fields."""
    own: dict[str, Any] = {"test": more.pop("test", None) or scored(points), "neutral_text": 3.5}
    if run.learning_rate is not None:
        own["training"] = Training(
            settings={"epochs": 2},
            trainable_parameters=int(PARAMETERS.get(run.method, 1)),
            file_bytes=int(PARAMETERS.get(run.method, 1)) * 4,
            rows=30,
            loss=0.5,
            seconds=12.0,
        )
        own["decoding"] = Decoding(tokens_a_second=20.0, base=40.0)
    return _record(run, **{**own, **more})


def tried(run: Run, score: float) -> Record:
    """The record of a run that tries a learning rate."""
    return _record(run, validation=scored([score, score]))


def failed(run: Run, message: str = "CUDA out of memory") -> Record:
    """The record of a run that failed."""
    return _record(run, error=Failure("OutOfMemoryError", message))


def _record(run: Run, **fields: Any) -> Record:
    return Record(
        key=str(run), run=run, suite="suite", base_model="base", kind="adapter", made_with=MADE_WITH, **fields
    )


def tries(loaded: Loaded, task: str, method: str, scores: Sequence[float]) -> dict[Run, Record]:
    """Records of all learning rates of a method, which reached ``scores`` on validation rows."""
    runs = [Run(task, method, "rate", rate, loaded.suite.seeds[0]) for rate in rates(loaded, loaded.methods[method])]
    return {run: tried(run, score) for run, score in zip(runs, scores, strict=True)}


def finals(
    loaded: Loaded, task: str, method: str, points: Sequence[Iterable[float]], records: dict[Run, Record], **more: Any
) -> dict[Run, Record]:
    """Records of the final runs at the rate that ``records`` choose, with ``points`` for each seed."""
    own = loaded.methods[method]
    rate = chosen_rate(loaded, loaded.tasks[task], own, records) if own.is_trained else None
    runs = [Run(task, method, "final", rate, seed) for seed in seeds_of(loaded, own)]
    return {run: final(run, found, **more) for run, found in zip(runs, points, strict=True)}


def nats(loaded: Loaded) -> dict[Run, Record]:
    """All tasks in nats a token: 0.123 of one method, 0.131 of the other."""
    found: dict[Run, Record] = {}
    for task in loaded.tasks:
        for method, score in (("lora-attention", -0.131), ("prefixmemory", -0.123)):
            found |= tries(loaded, task, method, [-0.52, -0.511, -0.53])
            for seed in (0, 1, 2):
                run = Run(task, method, "final", loaded.methods[method].learning_rate, seed)
                test = scored([-1.0, -2.0], score=score - seed / 1000)
                behind = {"0": scored([-1.0], score=-0.123), "300": scored([-1.0], score=-0.129)}
                found[run] = final(run, [], test=test, long_input=behind)
    return found
