"""Readers: JSON, CSV and Parquet files, and data sets of the Hub, each as the fields of rows and where they stand."""

from __future__ import annotations

import csv
import json
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from io import BufferedReader, BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import parse_json
from prefixmemory.files.names import exists
from prefixmemory.files.pipes import read_pipe
from prefixmemory.rows.rows import EXPECTED

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
#: How files begin that people take for rows.
_PACKED = {b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip (or a spreadsheet)", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2"}

#: In bytes; a long book has a tenth of it.
LONGEST_ROW = 10_000_000
_TOO_LONG = f"No row is as long as that. Is it one row a line? {EXPECTED}"

Fields = Iterator[tuple[str, dict[str, Any]]]


def hub_id(source: str | Path) -> str | None:
    """``source`` if it is the id of a Hub data set rather than a file."""
    is_file = Path(source).suffix in SUFFIXES or exists(source)
    return None if is_file or not _HUB_ID.fullmatch(str(source)) else str(source)


def fields_of(source: str | Path, split: str, subset: str | None) -> Fields:
    """Place and fields of each row of a file (or pipe), or of a Hub data set.

    Raises:
        PrefixMemoryError: nothing can be read there, or not to the end; the message names the line.
    """
    name = hub_id(source)
    if name is not None:
        return _from_hub(name, split, subset)
    file = Path(source).expanduser()
    if not exists(file) or file.is_dir():
        problem = "is a folder" if exists(file) else "does not exist"
        raise PrefixMemoryError(
            f"The data file {file} {problem}. Give the path of a JSONL file (or {', '.join(SUFFIXES[1:])}), or the id "
            f"of a data set of the Hub. {EXPECTED}"
        )
    readers = {".csv": _from_csv, ".tsv": _from_csv, ".parquet": _from_parquet}
    return readers.get(file.suffix, _from_json)(file)


def _open(file: Path) -> BufferedReader | BytesIO:
    """The bytes of a file; of a pipe (``/dev/stdin``, ``<(command)``) all at once, since it cannot be read twice."""
    return file.open("rb") if file.is_file() else BytesIO(read_pipe(file))


def _open_text(file: Path) -> BufferedReader | BytesIO:
    """The bytes of a text in UTF-8, without a byte order mark; UTF-16, as Excel writes it, is recoded."""
    stream = _open(file)
    start = stream.read(1024)
    stream.seek(0)
    if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        with stream:
            try:
                return BytesIO(stream.read().decode("utf-16").encode())
            except UnicodeError as error:
                raise PrefixMemoryError(f"{file}: not complete UTF-16 ({error}). Was the file cut off?") from error
    if start.startswith(BOM_UTF8):
        stream.seek(len(BOM_UTF8))
    packed = next((name for mark, name in _PACKED.items() if start.startswith(mark)), None)
    if packed or b"\0" in start:
        stream.close()
        what = f"is packed as {packed}: unpack it" if packed else "holds binary data, and no text: save it as UTF-8"
        raise PrefixMemoryError(f"The data file {file} {what}, or give a file of another kind. {EXPECTED}")
    return stream


def _from_json(file: Path) -> Fields:
    """JSON Lines, or one array of rows."""
    with _open_text(file) as stream:
        begins = stream.tell()
        first = next((line for line in _lines_of(file, stream) if line.strip()), b"").strip()
        stream.seek(begins)
        if first.startswith(b"["):
            yield from _from_array(file, stream.read())
            return
        # bytes: a cut-off last line may end within a character
        for number, line in enumerate(_lines_of(file, stream), start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = parse_json(line.decode())
            except ValueError as error:  # no JSON, no UTF-8, a number of thousands of digits
                if line.strip() == first:
                    stream.seek(begins)
                    _refuse_no_rows(file, first, stream.read())
                raise PrefixMemoryError(
                    f"{where}: not complete JSON ({_json_problem(error)}). Was the file cut off? {EXPECTED}"
                ) from error
            yield where, _object(where, row)


def _lines_of(file: Path, stream: BufferedReader | BytesIO) -> Iterator[bytes]:
    """The lines of a file; an array of rows may be one line."""
    number = 0
    while line := stream.readline(LONGEST_ROW):
        number += 1
        if len(line) == LONGEST_ROW and not line.lstrip().startswith(b"["):
            raise PrefixMemoryError(f"{file}, line {number}: has more than {LONGEST_ROW // 1_000_000} MB. {_TOO_LONG}")
        yield line


def _from_array(file: Path, content: bytes) -> Fields:
    try:
        rows = parse_json(content.decode())
    except ValueError as error:
        line = getattr(error, "lineno", None) or content[: getattr(error, "start", 0)].count(b"\n") + 1
        raise PrefixMemoryError(
            f"{file}, line {line}: begins as a JSON array and is not one to the end ({_json_problem(error)}). Was the "
            f"file cut off? {EXPECTED}"
        ) from error
    for number, row in enumerate(rows, start=1):
        where = f"{file}, row {number}"
        yield where, _object(where, row)


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise PrefixMemoryError(f"{where}: holds {type(row).__name__}, not an object. {EXPECTED}")
    return row


def _refuse_no_rows(file: Path, first: bytes, content: bytes) -> None:
    """Name what a file is whose first line is no row: one object over many lines, or no JSON at all."""
    if not first.startswith(b"{"):
        start = first[:40].decode(errors="replace")
        raise PrefixMemoryError(
            f"{file} begins with {start!r}, which is no JSON. A file that is not called .csv, .tsv or .parquet is read "
            f"as JSON, one row per line or an array of rows. {EXPECTED}"
        )
    try:
        whole = parse_json(content)
    except ValueError:
        return
    raise PrefixMemoryError(
        f"{file} is one JSON object over several lines, with the fields {sorted(whole)}. Write one row per line, or an "
        f"array of rows: [row, row]. {EXPECTED}"
    )


def _json_problem(error: ValueError) -> str:
    """What json says, without its own count of lines: there may be one JSON document a line."""
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)


def _from_csv(file: Path) -> Fields:
    csv.field_size_limit(LONGEST_ROW)  # 128 KiB by default; a long document is no mistake
    # What is not UTF-8 becomes surrogates and is found in its row; a decoder that refuses it has read further ahead.
    with TextIOWrapper(_open_text(file), encoding="utf-8", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        begins = 1  # a quoted cell may span lines: where a row begins, not where it ends
        header: list[str] = []
        try:
            for cells in reader:
                where, begins = f"{file}, line {begins}", reader.line_num + 1
                if _NOT_UTF8.search("".join(cells)):
                    raise PrefixMemoryError(f"{where}: not UTF-8. Save the file as UTF-8.")
                if not header:
                    header = cells
                    if len(set(header)) < len(header):
                        raise PrefixMemoryError(f"{where}: two columns have the same name: {header}. Rename one.")
                elif cells:
                    if len(cells) != len(header):
                        raise PrefixMemoryError(
                            f"{where}: has {len(cells)} cells where the header has {len(header)}. "
                            "Is a comma or a quotation mark missing?"
                        )
                    yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise PrefixMemoryError(
                f"{file}, line {begins}: not readable as CSV ({error}). Is a quotation mark missing?"
            ) from error


def _from_parquet(file: Path) -> Fields:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        number = 0
        with _open(file) as stream:
            for batch in ParquetFile(stream).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", _without_nulls(row)
    except (ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise PrefixMemoryError(
            f"{file} cannot be read as Parquet ({first_line}). Was it cut off, or does a column hold what Python has "
            "no values for, such as dates beyond the year 9999?"
        ) from error


def _from_hub(name: str, split: str, subset: str | None) -> Fields:
    from datasets import ClassLabel, load_dataset

    try:
        dataset: Any = load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises whatever its many backends raise
        first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise PrefixMemoryError(
            f"{name!r} is no file here, and loading it as a data set of the Hub failed: {first_line}. Give the path of "
            "a .jsonl, .csv or .parquet file, or mend id, subset or split (and the network)."
        ) from error
    names = {key: feature for key, feature in dataset.features.items() if isinstance(feature, ClassLabel)}
    for number, row in enumerate(dataset, start=1):
        for key, feature in names.items():
            if row[key] in range(feature.num_classes):  # -1 or nothing where a test split hides its labels
                row[key] = feature.int2str(row[key])
        yield f"{name} ({split}), row {number}", _without_nulls(row)


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` without what is null within its lists and objects: Arrow gives each object the fields of all rows'."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, list):
            return [cleaned(one) for one in value]
        if isinstance(value, dict):
            return {name: cleaned(one) for name, one in value.items() if one is not None}
        return value

    return {name: cleaned(value) for name, value in row.items()}
