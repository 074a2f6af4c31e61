"""Figures of what the instruments measured, to go into a paper: one function per instrument.

Adapters are told apart by colour (Okabe and Ito's palette, safe for colour-blind readers), line style and marker.
Matplotlib is imported when a figure is made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch

from prefixmemory.analysis.long_input import LongInput
from prefixmemory.analysis.readout import Heads
from prefixmemory.analysis.shift import Shift
from prefixmemory.analysis.spectrum import Spectrum
from prefixmemory.analysis.tradeoff import Tradeoff
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.records import replacing

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 7,
}
LENGTH = "input length (tokens)"
IN_FRONT = "unrelated text in front (tokens)"
LAYER = "layer (index)"
VALUE = {
    "share": "α, share of attention on the prefix",
    "ratio": "‖added‖ / ‖attention output‖",
}
#: Bands around more lines than these hide each other.
BANDS = 3


def check_matplotlib() -> None:
    """Refuse to go on without matplotlib.

    Raises:
        PrefixMemoryError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PrefixMemoryError(
            "Figures need matplotlib, which is not installed: pip install 'prefixmemory[analysis]'."
        ) from error


def save(figure: Any, file: Path) -> None:
    """Write a figure as PNG, 300 dots an inch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=300, format="png")


def _panels(count: int, rows: int = 1) -> tuple[Any, list[Any]]:
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(3.5 * count, 2.6 * rows), layout="constrained")
        axes = figure.subplots(rows, count, squeeze=False)
    return figure, list(axes.flat)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINES[index % len(LINES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linewidth": 1.3,
        "markersize": 3.5,
    }


def _named(label: str) -> str:
    """A label as matplotlib shows it: ``$`` would begin a formula, and ``_`` keep it out of the legend."""
    shown = label.replace("$", r"\$")
    return f"\u200a{shown}" if shown.startswith("_") else shown


def _line(axis: Any, x: Sequence[int], values: Sequence[Sequence[float]], index: int, label: str, band: bool) -> None:
    """The mean of each of ``values`` over ``x``, and a band from their 10th to their 90th percentile."""
    table = [torch.tensor(value) for value in values]
    axis.plot(x, [float(value.mean()) for value in table], label=_named(label), **_style(index))
    if band:
        low, high = ([float(value.quantile(q)) for value in table] for q in (0.1, 0.9))
        axis.fill_between(x, low, high, color=COLOURS[index % len(COLOURS)], alpha=0.15, linewidth=0)


def _finish(axis: Any, title: str, x: str, y: str, legend: bool = True) -> None:
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    if legend and len(axis.get_legend_handles_labels()[1]) > BANDS:
        # beside the lines, which it would hide
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7)
    elif legend:
        axis.legend(frameon=False, fontsize=7)


def _tokens_axis(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.tick_params(axis="x", labelrotation=45 if len(ticks) > 6 else 0)
    axis.minorticks_off()


def _log_axis(axis: Any) -> None:
    """A log scale with plain numbers, whether it spans a part of a decade or many."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels the ticks that matplotlib would label, but 0.6 for 6e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.yaxis.set_minor_formatter(Plain(minor_thresholds=(1, 0.4)))


def _layer_axis(axis: Any) -> None:
    axis.xaxis.get_major_locator().set_params(integer=True)


def _spread(lines: Sized) -> str:
    return "\nband: 10th to 90th percentile" if len(lines) <= BANDS else ""


def tradeoff_figure(found: Mapping[str, Tradeoff]) -> Any:
    """The trade-off of each adapter against input length and by layer; against prefix length where these differ."""
    kinds = [kind for kind in ("share", "ratio") if any(data.quantity == kind for data in found.values())]
    prefixes = sorted({data.prefix_length for data in found.values() if data.prefix_length is not None})
    figure, axes = _panels(3 if len(prefixes) > 1 else 2, rows=len(kinds))
    columns = len(axes) // len(kinds)
    for row, kind in enumerate(kinds):
        by_length, by_layer, *rest = axes[row * columns : (row + 1) * columns]
        for axis in rest:
            if kind == "share":
                _by_prefix(axis, found, prefixes)
            else:
                figure.delaxes(axis)
        ours = [(i, label, data) for i, (label, data) in enumerate(found.items()) if data.quantity == kind]
        for index, label, data in ours:
            heads = [[value for layer in values for value in layer] for values in data.values]
            _line(by_length, data.lengths, heads, index, label, len(ours) <= BANDS)
            _line(by_layer, range(len(data.layers)), data.values[-1], index, label, len(ours) <= BANDS)
        _tokens_axis(by_length, sorted({length for _, _, data in ours for length in data.lengths}))
        spread = _spread(ours)
        longest = " and ".join(f"{length:,}" for length in sorted({data.lengths[-1] for _, _, data in ours}))
        _finish(by_length, f"mean over layers and heads{spread}", LENGTH, VALUE[kind])
        _finish(by_layer, f"mean over heads at {longest} tokens{spread}", LAYER, VALUE[kind], legend=False)
        _layer_axis(by_layer)
        for axis in (by_length, by_layer):
            _log_axis(axis)
    return figure


def _by_prefix(axis: Any, found: Mapping[str, Tradeoff], prefixes: list[int]) -> None:
    """α against prefix length, one line for each of up to four input lengths."""
    points: dict[int, dict[int, list[float]]] = {}
    for data in found.values():
        for length, values in zip(data.lengths, data.values, strict=True):
            if data.prefix_length is not None:
                mean = float(torch.tensor(values).mean())
                points.setdefault(length, {}).setdefault(data.prefix_length, []).append(mean)
    lengths = sorted(points)
    picked = sorted({lengths[round(i * (len(lengths) - 1) / 3)] for i in range(4)})
    for index, length in enumerate(picked):
        line = sorted(points[length].items())
        y = [sum(values) / len(values) for _, values in line]
        axis.plot([p for p, _ in line], y, label=f"{length:,} tokens", **_style(index))
    _tokens_axis(axis, prefixes)
    _log_axis(axis)
    _finish(axis, "mean over layers and heads", "prefix length (vectors)", VALUE["share"])


def spectrum_figure(found: Mapping[str, Spectrum]) -> Any:
    """Decay of the eigenvalues of each adapter's bias, and its effective rank by layer."""
    figure, (decay, rank) = _panels(2)
    for index, (label, data) in enumerate(found.items()):
        shares = []
        for values in data.eigenvalues:
            total = sum(values)
            if total > 0:
                shares.append([value / total for value in values])
        if not shares:  # the same bias for all tokens
            continue
        n = range(1, len(shares[0]) + 1)
        by_index = list(zip(*shares, strict=True))
        # noise of rounding, 1e-9 of the whole and less, would stretch the axis
        kept = [i for i in range(len(n)) if sum(by_index[i]) / len(by_index[i]) > 1e-9]
        x, y = [n[i] for i in kept], [by_index[i] for i in kept]
        table = [torch.tensor(value) for value in y]
        style = {**_style(index), "marker": ""}
        decay.plot(x, [float(value.mean()) for value in table], label=_named(label), **style)
        if len(found) <= BANDS:
            low, high = ([max(float(value.quantile(q)), 1e-12) for value in table] for q in (0.1, 0.9))
            decay.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        rank.plot(range(len(data.layers)), data.effective_rank, label=_named(label), **_style(index))
    decay.set_xscale("log")
    decay.set_yscale("log")
    spread = _spread(found)
    _finish(decay, f"mean over layers{spread}", "index of the eigenvalue", "eigenvalue / sum of eigenvalues")
    rank.set_ylim(bottom=0)
    _layer_axis(rank)
    tokens = sorted({data.tokens for data in found.values()})
    shown = " and ".join(f"{n:,}" for n in tokens)
    _finish(rank, f"covariance over {shown} tokens", LAYER, "effective rank (directions)", legend=False)
    return figure


def shift_figure(found: Mapping[str, Shift]) -> Any:
    """Jensen-Shannon distance of attention maps by layer; with the prefix as one more key where there is one."""
    beside = {label: data for label, data in found.items() if data.with_prefix is not None}
    figure, axes = _panels(2 if beside else 1)
    order = list(found)
    for label, data in found.items():
        _line(axes[0], range(len(data.layers)), data.distance, order.index(label), label, len(found) <= BANDS)
    spread = _spread(found)
    name = "Jensen-Shannon distance"
    _finish(axes[0], f"over the input's keys, mean over heads{spread}", LAYER, name)
    for label, data in beside.items():
        values = data.with_prefix or []
        _line(axes[1], range(len(data.layers)), values, order.index(label), label, len(found) <= BANDS)
    if beside:
        _finish(axes[1], f"with the prefix as one more key{spread}", LAYER, name)
    for axis in axes:
        axis.set_ylim(bottom=0)
        _layer_axis(axis)
    return figure


def readout_figure(found: Mapping[str, Heads]) -> Any:
    """Maps of layers and heads: norm of each memory, and what the loss gains by it."""
    figure, axes = _panels(2, rows=len(found))
    for index, (label, data) in enumerate(found.items()):
        left, right = axes[2 * index : 2 * index + 2]
        _map(figure, left, data.norms, f"{label}: Frobenius norm of M", "‖M‖", "cividis", centred=False)
        name = "rise of the loss (nats a token)"
        _map(figure, right, data.ablation.change, f"{label}: without the head's memory", name, "PuOr_r", centred=True)
    return figure


def _map(
    figure: Any, axis: Any, values: Sequence[Sequence[float | None]], title: str, unit: str, colours: str, centred: bool
) -> None:
    table = torch.tensor([[float("nan") if value is None else value for value in row] for row in values])
    known = table[~table.isnan()]
    most = float(known.abs().max()) if len(known) else 1.0
    bounds = {"vmin": -most, "vmax": most} if centred else {"vmin": 0.0, "vmax": most}
    axis.set_facecolor("#dddddd")  # not measured
    axis.grid(False)
    image = axis.imshow(table.numpy(), aspect="auto", cmap=colours, interpolation="nearest", **bounds)
    bar = figure.colorbar(image, ax=axis)
    bar.set_label(unit, size=8)
    bar.ax.tick_params(labelsize=7)
    _layer_axis(axis)
    axis.yaxis.get_major_locator().set_params(integer=True)
    _finish(axis, title, "head (index)", LAYER, legend=False)


def long_input_figure(found: Mapping[str, LongInput]) -> Any:
    """Accuracy of each adapter, and of its base model, behind unrelated text."""
    figure, (axis,) = _panels(1)
    for index, (label, data) in enumerate(found.items()):
        style = _style(index)
        axis.plot(data.lengths, data.accuracy, label=_named(label), **style)
        if len(found) <= BANDS:
            low, high = zip(*(interval(value, data.rows) for value in data.accuracy), strict=True)
            axis.fill_between(data.lengths, low, high, color=style["color"], alpha=0.15, linewidth=0)
    curves = {(tuple(data.lengths), tuple(data.base_accuracy)) for data in found.values()}
    for number, (lengths, values) in enumerate(sorted(curves)):  # adapters of one base model share its curve
        name = "base model" if number == 0 else "_"
        axis.plot(
            lengths, values, label=name, color="#777777", linestyle=":", marker="x", linewidth=1.3, markersize=3.5
        )
    ticks = sorted({length for data in found.values() for length in data.lengths})
    first = next((tick for tick in ticks if tick > 0), 1)
    axis.set_xscale("symlog", base=2, linthresh=first)  # a log axis has no place for 0
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.minorticks_off()
    axis.set_ylim(-2, 102)  # points at the ends are not cut
    rows = " and ".join(f"{count:,}" for count in sorted({data.rows for data in found.values()}))
    spread = "\nband: 95 % interval (Wilson)" if len(found) <= BANDS else ""
    _finish(axis, f"exact match of the label, {rows} rows{spread}", IN_FRONT, "accuracy (% of rows)")
    return figure


def interval(percent: float, rows: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval, in percent, of a fraction that was found in ``rows`` rows."""
    share = percent / 100
    middle = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    return 100 * (middle - half), 100 * (middle + half)
