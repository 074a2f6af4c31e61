"""A suite: tasks, methods, seeds and budget of one comparison, as one YAML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from prefixmemory.compare.method import Method, load_method
from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.files.names import check_name
from prefixmemory.files.yaml_files import Source, blamed_path, read_yaml, typed
from prefixmemory.models.loading import Dtype
from prefixmemory.tasks import Task, load_task, shipped_tasks
from prefixmemory.training.settings import TrainingSettings

#: Fraction of the steps in which the learning rate rises, where neither suite nor task nor method says otherwise. The
#: default of ``TrainingSettings`` is the default memory's own.
WARMUP = 0.1
#: A task or a method in a suite: its name (or file), or a mapping of ``use:`` and the fields to change.
Entry = str | dict[str, Any]


@dataclass(frozen=True)
class Suite:
    """What a suite's YAML file says.

    Args:
        name: names the folder of its records.
        model: base model, as in a recipe.
        tasks: shipped tasks by name, YAML files, or ``{use: NAME, field: value}``.
        methods: the same, for methods.
        seeds: of the final runs; the first one also tries the learning rates.
        description: what the suite is, for the report.
        rate_factors: candidates for the learning rate, as multiples of the method's own; the same number for all.
        every_rate: methods whose final runs are made at every candidate, not at the chosen one only.
        validation_rows: rows by which the learning rate is chosen.
        test_rows: rows of the score.
        long_input: tokens of unrelated text before the test rows.
        long_input_rows: test rows that are scored behind long inputs.
        transfer_rows: rows of each task of ``transfers_to`` on which adapters are scored; 0: none.
        written_answers: test rows of each task with free answers (``loss``, ``preference``) that every final
            run answers for a judge, in AlpacaEval's format, below ``outputs``; 0: none.
        training: settings of all runs, over the defaults (but for a warm-up of 0.1); tasks and methods may have their
            own over these.
        dtype: of the base model.
        attention: as transformers' ``attn_implementation``, in training; ``None``: the model's default.
        launcher: command that starts each training run, such as ``[accelerate, launch, --num_processes, "2"]``.
    """

    name: str
    model: str
    tasks: list[Entry]
    methods: list[Entry]
    seeds: list[int]
    description: str = ""
    rate_factors: list[float] = field(default_factory=lambda: [1 / 3, 1.0, 3.0])
    every_rate: list[str] = field(default_factory=list)
    validation_rows: int = 50
    test_rows: int = 200
    long_input: list[int] = field(default_factory=list)
    long_input_rows: int = 50
    transfer_rows: int = 0
    written_answers: int = 0
    training: dict[str, Any] = field(default_factory=dict)
    dtype: Dtype = "auto"
    attention: str | None = None
    launcher: list[str] | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name)
        for name in ("tasks", "methods", "seeds", "rate_factors"):
            if not getattr(self, name):
                raise PrefixMemoryError(f"{name} is empty: give at least one.")
        if len(set(self.seeds)) < len(self.seeds):
            raise PrefixMemoryError(f"seeds={self.seeds} holds one twice: each run has its own.")
        for name in ("validation_rows", "test_rows", "long_input_rows"):
            if getattr(self, name) < 1:
                raise PrefixMemoryError(f"{name}={getattr(self, name)} is out of range: give a number above 0.")
        if any(factor <= 0 for factor in self.rate_factors):
            raise PrefixMemoryError(f"rate_factors={self.rate_factors} holds one that is not above 0.")
        if len(set(self.rate_factors)) < len(self.rate_factors):
            raise PrefixMemoryError(f"rate_factors={self.rate_factors} holds one twice.")
        if any(tokens < 1 for tokens in self.long_input):
            raise PrefixMemoryError(f"long_input={self.long_input} holds one below 1; 0 tokens are always scored.")


@dataclass(frozen=True)
class Loaded:
    """A suite with its tasks and methods read and checked."""

    suite: Suite
    tasks: dict[str, Task]
    methods: dict[str, Method]

    def task(self, name: str) -> Task:
        """The suite's task ``name``, or the shipped one: adapters are scored on others' tasks, too."""
        return self.tasks.get(name) or load_task(name)

    def settings(self, task: Task, method: Method, learning_rate: float, seed: int) -> TrainingSettings:
        """How a run of ``method`` on ``task`` is trained."""
        own = {"warmup": WARMUP, **self.suite.training, **task.training, **method.training}
        given = {**own, "learning_rate": learning_rate, "seed": seed}
        return typed(TrainingSettings, given, Source(None, {}, {}), "training", "training")


def load_suite(file: Path) -> Loaded:
    """Read a suite and everything it names.

    Raises:
        PrefixMemoryError: names file, line and field.
    """
    hint = "suite: docs/guides/compare.md shows one."
    content, lines = read_yaml(file, hint, "a suite is a mapping with name, model, tasks, methods and seeds")
    source = Source(file, lines, {})
    suite = typed(Suite, content, source, "a suite")
    tasks = _named("tasks", suite.tasks, load_task, file.parent, source)
    methods = _named("methods", suite.methods, load_method, file.parent, source)
    for name in suite.every_rate:
        if name not in methods:
            raise source.error("every_rate", f"every_rate names {name!r}, which is none of the suite's methods.")
    for task in tasks.values():
        for other in task.transfers_to:
            if other not in tasks and other not in shipped_tasks():
                hint = did_you_mean(other, [*tasks, *shipped_tasks()])
                raise source.error("tasks", f"{task.name}.transfers_to names {other!r}, which is no task.{hint}")
    loaded = Loaded(suite, tasks, methods)
    _check_training(loaded, source)
    return loaded


def _named(field: str, entries: list[Entry], load: Callable[..., Any], beside: Path, source: Source) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in entries:
        changes: Mapping[str, Any] = {}
        if isinstance(entry, dict):
            if "use" not in entry:
                raise source.error(field, f"{field}: an entry with fields needs use: NAME, the one that it changes.")
            changes = {name: value for name, value in entry.items() if name != "use"}
        loaded = load(entry["use"] if isinstance(entry, dict) else entry, changes, beside)
        if loaded.name in found:
            raise source.error(field, f"{field} holds {loaded.name!r} twice. Give one of them another name.")
        found[loaded.name] = loaded
    return found


def _check_training(loaded: Loaded, source: Source) -> None:
    """Refuse settings that TrainingSettings would refuse, before anything runs."""
    known = {f.name for f in fields(TrainingSettings)} - {"learning_rate", "seed"}
    sections = [loaded.suite.training, *(t.training for t in loaded.tasks.values())]
    for section in [*sections, *(m.training for m in loaded.methods.values())]:
        for name in section:
            if name not in known:
                why = "the protocol sets it" if name in ("learning_rate", "seed") else "there is no such setting"
                hint = did_you_mean(name, known)
                raise source.error("training", f"training.{name}: {why}.{hint} There are: {', '.join(sorted(known))}.")
    for task in loaded.tasks.values():
        for method in loaded.methods.values():
            try:
                settings = loaded.settings(task, method, method.learning_rate or 1.0, 0)
            except PrefixMemoryError as error:
                raise source.error(blamed_path("training", str(error)), str(error)) from None
            if settings.keeps_best:
                raise source.error(
                    "training",
                    "training: keep_best and patience go by a validation loss, and a comparison's validation rows "
                    "choose the learning rate. Leave them out.",
                )
            if task.per_label is not None and (method.shots or 0) > task.per_label:
                raise source.error(
                    "methods",
                    f"{method.name}: shots={method.shots} examples of each label, and {task.name} has {task.per_label} "
                    "(per_label). Lower one or raise the other.",
                )
