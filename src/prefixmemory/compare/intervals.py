"""Bootstrap intervals over seeds and rows, for scores and for paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
Array = NDArray[np.float64]
#: seed -> points of the rows, the same rows in the same order for every seed.
Points = Mapping[int, Array]
Interval = tuple[float, float]


def interval(tasks: Sequence[Points], alike: Sequence[tuple[int, int]] | None = None) -> Interval | None:
    """Percentile bootstrap of the mean over tasks of the mean over seeds and rows.

    Seeds are drawn with replacement, and rows, the same rows for all seeds of a task, for they are the same rows. Of n
    seeds (rows), n - 1 are drawn: the variance of the means so drawn is then that of the mean, which n draws
    underestimate by the factor (n - 1) / n, a third with three seeds. Where rows and seeds interact, the interval is
    on the wide side.

    Args:
        tasks: for each task its points. One seed: the interval tells of the rows alone; one row: of the seeds alone.
        alike: for each task a number for its seeds and one for its rows; what has the same number is drawn together,
            being the same seeds (rows). By default no two tasks share any.

    Returns:
        Both ends; ``None`` where a task has a single point, which tells nothing about its spread.
    """
    if any(sum(map(len, points.values())) < 2 for points in tasks):
        return None
    means: Array = np.zeros(RESAMPLES)
    for points, streams in zip(tasks, alike or [(place, place) for place in range(len(tasks))], strict=True):
        table = np.stack(list(points.values()))  # [seeds, rows]
        seeds, rows = (_weights(count, streams[axis], axis) for axis, count in enumerate(table.shape))
        means += ((seeds @ table) * rows).sum(axis=1) / len(tasks)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean(tasks: Sequence[Points]) -> float:
    """Mean over tasks of the mean over seeds and rows."""
    return float(np.mean([np.mean(list(points.values())) for points in tasks]))


def difference(a: Points, b: Points, a_has_no_seeds: bool = False, b_has_no_seeds: bool = False) -> dict[int, Array]:
    """``a - b``, row by row, for each seed that both have.

    Args:
        a, b: points of the same rows.
        a_has_no_seeds: ``a`` answers the same whatever the seed; its one run stands against every seed of ``b``.
        b_has_no_seeds: the same of ``b``.
    """
    if a_has_no_seeds and not b_has_no_seeds:
        a = dict.fromkeys(b, next(iter(a.values())))
    if b_has_no_seeds and not a_has_no_seeds:
        b = dict.fromkeys(a, next(iter(b.values())))
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


@lru_cache(maxsize=64)
def _weights(count: int, *stream: int) -> Array:
    """How much each of ``count`` things weighs in each resample, ``[resamples, count]``; they sum to 1.

    Another ``stream``, other draws; the same one gives the same draws again, which are kept, for they take time.
    """
    draws = max(count - 1, 1)
    rng = np.random.default_rng(stream)
    weights: Array = rng.multinomial(draws, np.full(count, 1 / count), size=RESAMPLES) / draws
    return weights
