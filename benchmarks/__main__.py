"""All benchmarks of one machine, one after another: a record of them, and the figures.

    python -m benchmarks            # or: make bench. About 40 minutes of one core
    python -m benchmarks --quick    # tiny shapes, a minute: whether it all runs

``--device cuda`` measures a card. Each can be run alone, with options of its own: ``python -m benchmarks.overhead``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import adapters, figures, length, measuring, overhead

from prefixmemory.files.records import provenance, write_json

PARTS: dict[str, Any] = {"overhead": overhead, "adapters": adapters, "length": length}


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
