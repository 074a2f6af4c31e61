"""From records to everything that the report shows; whole at every stage of a comparison."""

from __future__ import annotations

from collections.abc import Mapping

from prefixmemory.compare import account, by_task, over_tasks
from prefixmemory.compare.records import Record, Run
from prefixmemory.compare.suite import Loaded
from prefixmemory.compare.summary import MethodInfo, Summary


def summarise(loaded: Loaded, records: Mapping[Run, Record]) -> Summary:
    """What the report shows of ``records``."""
    finals = by_task.finals_of(loaded, records)
    cells = [by_task.cell(loaded, pair, finals) for pair in finals]
    pairs = [(task, method) for task in loaded.tasks for method in loaded.methods]
    curves = [point for pair in pairs for point in by_task.curve(loaded, pair, finals, records)]
    return Summary(
        conditions=account.conditions(loaded, records),
        notes=account.notes(loaded, cells, records),
        tasks=[account.described(loaded, task, cells) for task in loaded.tasks.values()],
        methods=[MethodInfo(method.name, method.kind, method.description) for method in loaded.methods.values()],
        cells=cells,
        rates=curves,
        robustness=over_tasks.robustness(loaded, curves),
        averages=over_tasks.averages(loaded, cells, finals),
        incomplete=over_tasks.incomplete(loaded, finals),
        differences=over_tasks.differences(loaded, finals),
        costs=over_tasks.costs(loaded, finals),
        failed=account.failed(records),
        missing=account.missing(loaded, records),
    )
