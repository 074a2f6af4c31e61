"""Figures of the record that ``python -m benchmarks`` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.length import SECOND
from benchmarks.shapes import BARE, MEMORY

from prefixmemory.analysis.figures import COLOURS, LINES, MARKERS, STYLE, check_matplotlib, save

SHOWN = (MEMORY, "LoRA q, v r=8", "LoRA all linear r=16", "prefix tuning, 32 tokens")


def ratios(record: Mapping[str, Any], file: Path) -> None:
    """Measured ratios to the bare model, with their floors."""
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    overhead, said = record["overhead"], record["options"]["overhead"]
    found, floors = overhead["ratios"]["this checkout"], overhead["floors"]
    cases = [case for case in floors[MEMORY] if all(case in found[method] for method in SHOWN)]
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 2.8), layout="constrained")
        axes = figure.subplots()
        for number, method in enumerate(SHOWN):
            places = [place + 0.2 * (number - 1.5) for place in range(len(cases))]
            middle = [found[method][case]["median"] for case in cases]
            spread = [
                [abs(found[method][c][end] - found[method][c]["median"]) for c in cases] for end in ("low", "high")
            ]
            axes.bar(places, [m - 1 for m in middle], 0.18, bottom=1, color=COLOURS[number], label=method)
            axes.errorbar(places, middle, spread, fmt="none", ecolor="#333333", elinewidth=0.8)
            least = [floors[method][case] for case in cases]
            name = "floor: what it must cost" if number == 0 else None
            axes.hlines(least, [p - 0.09 for p in places], [p + 0.09 for p in places], "black", lw=2, label=name)
        axes.axhline(1, color="#333333", lw=0.8)
        axes.set_xticks(range(len(cases)), [_label(case, said) for case in cases])
        axes.set_ylabel("time, ratio to the base model")
        axes.grid(axis="x", visible=False)
        axes.legend(ncols=2, loc="upper right")
        axes.set_ylim(top=axes.get_ylim()[1] + 0.35 * (axes.get_ylim()[1] - 1))
        figure.supxlabel(
            f"{said['shape']} shape, random weights, {said['dtype']}, one thread of {record['hardware']}; "
            f"median and middle half of {said['rounds']} rounds", fontsize=6,
        )  # fmt: skip
    save(figure, file)


def _label(case: str, said: Mapping[str, Any]) -> str:
    if case.startswith("decode"):
        rows = int(case.split()[1])
        return f"decode\n{rows} row{'s' if rows > 1 else ''}, {said['front']} tokens in front"
    return f"{case}\n{said['tokens']} tokens"


def length(record: Mapping[str, Any], file: Path) -> None:
    """Reading, decoding and memory by the number of tokens in front."""
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    found, said = record["length"]["lengths"], record["options"]["length"]
    lengths = [int(number) for number in found]
    methods = [method for method in found[str(lengths[0])] if method != BARE]
    kinds = {
        "read, ratio to bare": "time to read the text,\nratio to the base model",
        "token, ratio to bare": "time per decoded token,\nratio to the base model",
        "beside": "held beside the text's\nkeys and values (MiB)",
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 3.2), layout="constrained")
        panels = figure.subplots(1, 3)
        for kind, axes in zip(kinds, panels, strict=True):
            for number, method in enumerate(methods):
                values = [_value(found[str(n)], method, kind) for n in lengths]
                if None not in values:
                    look = LINES[number % len(LINES)] + MARKERS[number]
                    axes.plot(lengths, values, look, color=COLOURS[number], label=method)
            if kind == "beside":
                cache = [found[str(n)][BARE]["cache, MiB"] for n in lengths]
                axes.plot(lengths, cache, color="#888888", label="the text's keys and values")
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            else:
                axes.axhline(1, color="#333333", lw=0.8)
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
            axes.set_title(kinds[kind], fontsize=8)
        panels[0].set_ylim(bottom=-0.05)
        panels[1].set_xlabel("tokens in front")
        handles, labels = panels[2].get_legend_handles_labels()
        extra = panels[0].get_legend_handles_labels()
        known = dict(zip(extra[1] + labels, extra[0] + handles, strict=True))
        figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=4)
        figure.suptitle(
            f"{record['length']['layers']} of {record['length']['of']} layers of the {said['shape']} shape, "
            f"{said['dtype']}, SDPA, one thread of {record['hardware']}; bytes for all layers", fontsize=6,
        )  # fmt: skip
    save(figure, file)


def _value(rows: Mapping[str, Any], method: str, kind: str) -> float | None:
    if kind != "beside":
        return rows[method].get(kind)
    if method == SECOND:
        return None
    return rows[method]["cache, MiB"] - rows[BARE]["cache, MiB"] + rows[method]["adapter, MiB"]
