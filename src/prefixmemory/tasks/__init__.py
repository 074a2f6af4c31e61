"""Tasks: what a comparison trains and scores on. One YAML file per task; a custom one is one more."""

from prefixmemory.tasks.task import Task, load_task, shipped_tasks

__all__ = ["Task", "load_task", "shipped_tasks"]
