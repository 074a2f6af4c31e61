"""All benchmarks of one machine, one after another: a record of them, and the figures.

    python -m benchmarks            # or: make bench. About 40 minutes of one core
    python -m benchmarks --quick    # tiny shapes, a minute: whether it all runs

``--device cuda`` measures a card. Each can be run alone, with options of its own: ``python -m benchmarks.overhead``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import adapters, figures, length, measuring, overhead
from benchmarks.shapes import MEMORY

from prefixmemory.files.records import provenance, write_json, write_text

PARTS: dict[str, Any] = {"overhead": overhead, "adapters": adapters, "length": length}
DOCUMENT = measuring.ROOT / "docs" / "benchmarks.md"
#: In ``DOCUMENT``, what stands behind it is written here.
MARK = "<!-- from here on written by python -m benchmarks -->\n"
OURS = ("overhead", "ratios", "this checkout", MEMORY)
ROWS, LOADING = ("adapters", "rows", f"{MEMORY}, 8 rows"), ("adapters", "loading")
#: What is aimed at: at most so much, and where in the record it is.
AIMS: dict[str, tuple[float, tuple[str, ...]]] = {
    "training step": (1.03, (*OURS, "training step")),
    "prefill": (1.04, (*OURS, "prefill")),
    "decoding": (1.08, (*OURS, "decode 1")),
    "decoding, compiled": (1.08, (*OURS, "decode 1, compiled")),
    "decoding, 8 rows": (1.04, (*OURS, "decode 8")),
    "hooks alone, decoding": (1.02, (*OURS[:3], "hooks alone (scale 0)", "decode 1")),
    "8 rows with 8 adapters, decoding, ratio to one adapter": (1.15, (*ROWS, "decode, each")),
    "the same, prefill": (1.15, (*ROWS, "prefill, each")),
    "switching, one adapter loaded, ms": (5, (*LOADING, f"{MEMORY}, n=1", "switch, ms")),
    "switching, 64 loaded, ms": (5, (*LOADING, f"{MEMORY}, n=64", "switch, ms")),
    "loading the first adapter, ratio to reading its file": (2, (*LOADING, f"{MEMORY}, n=1", "load / read")),
    "loading the 64th": (2, (*LOADING, f"{MEMORY}, n=64", "load / read")),
}


def aims(record: Mapping[str, Any]) -> str:
    """A table of what is aimed at and what was found."""
    rows = {}
    for name, (bound, path) in AIMS.items():
        found: Any = record
        for key in path:
            found = found.get(key, {})
        if found != {}:
            rows[name] = {"aim, at most": bound, "found": found}
    return measuring.table("the default memory", rows)


def write_document(record: Mapping[str, Any], tables: str) -> None:
    """Put aims and tables into ``docs/benchmarks.md``."""
    text, mark, _ = DOCUMENT.read_text(encoding="utf-8").partition(MARK)
    said = f"Commit {str(record['commit'])[:7]}, {record['hardware']}, torch {record['versions']['torch']}."
    write_text(DOCUMENT, f"{text}{mark}\n{said}\n\n{aims(record)}\n{tables.strip()}\n")


def main() -> None:
    parser = measuring.options(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="leave the others out")
    parser.add_argument("--compiled", action="store_true", help="decode with compiled models too")
    parser.add_argument("--images", type=Path, help="folder for the figures")
    chosen = parser.parse_args()
    made_with = provenance()  # now: the checkout may be another one in the end
    record: dict[str, Any] = {"options": {}, **made_with}
    tables = ""
    for name in chosen.only:
        part = PARTS[name]
        arguments = ["--device", chosen.device, "--seed", str(chosen.seed), "--impl", chosen.impl]
        for option in ("dtype", "shape", "rounds"):
            if getattr(chosen, option) != parser.get_default(option):
                arguments += [f"--{option}", str(getattr(chosen, option))]
        arguments += ["--quick"] * chosen.quick + ["--compiled"] * (chosen.compiled and name == "overhead")
        own = part.options(arguments)
        record["options"][name] = {key: value for key, value in vars(own).items() if not isinstance(value, Path)}
        record[name] = part.measure(own)
        tables += part.tables(record[name]) + "\n"
    print(aims(record), tables, sep="\n")
    scratch = Path("runs/bench") if chosen.quick else None
    write_json(chosen.output or (scratch or measuring.RESULTS) / "bench.json", record)
    images = chosen.images or scratch or measuring.ROOT / "docs" / "images"
    if "overhead" in record:
        figures.ratios(record, images / "benchmarks.png")
    if "length" in record:
        figures.length(record, images / "length.png")
    if scratch is None and chosen.output is None:
        write_document(record, tables)


if __name__ == "__main__":
    main()
