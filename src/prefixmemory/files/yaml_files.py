"""YAML files into dataclasses: every problem names the line, the field, and what is allowed there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from yaml.reader import ReaderError

from prefixmemory.errors import PrefixMemoryError, did_you_mean

T = TypeVar("T")
_adapter: Any = lru_cache(TypeAdapter)  # one takes as long to make as to check hundreds of values


#: Limits that no honest file meets: bytes, values (those that aliases repeat counted each time), mappings and lists
#: within each other, characters of a number.
LARGEST, MOST_VALUES, DEEPEST, LONGEST_NUMBER = 200_000, 10_000, 30, 40


class Loader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number (YAML 1.2), not a text (YAML 1.1, PyYAML); and within limits."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """A value and all within it."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise _refused(f"mappings and lists within each other, more than {DEEPEST} deep", self.peek_event())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """A value in Python's types."""
        if node.tag in _NUMBER_TAGS and len(node.value) > LONGEST_NUMBER:
            raise _refused(f"a number of more than {LONGEST_NUMBER} characters", node)
        try:
            if isinstance(node, yaml.ScalarNode):
                node.value.encode()
                if "\0" in node.value:
                    raise ValueError("a NUL character")
            return super().construct_object(node, deep)
        except (ValueError, OverflowError) as error:  # a date such as 2024-13-45
            raise _refused(f"{str(node.value)[:LONGEST_NUMBER]!r}: {error}", node) from error


_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _refused(problem: str, where: yaml.Node | yaml.Event) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _load(text: str) -> tuple[yaml.Node | None, Any]:
    """The nodes of a YAML text, and the same in Python's types.

    Raises:
        YAMLError: not valid YAML, or beyond the limits.
    """
    if len(text) > LARGEST:
        raise yaml.MarkedYAMLError(problem=f"it has more than {LARGEST:,} characters")
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        if _size(node, {}) > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"it has more than {MOST_VALUES:,} values, aliases written out")
        return node, loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: Any, known: dict[int, int | None]) -> int:
    """How many values ``node`` is, each alias (``*name``) counted as what it stands for."""
    if id(node) not in known:
        known[id(node)] = None
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for one in inner for part in (one if isinstance(one, tuple) else (one,))]
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    if (size := known[id(node)]) is None:
        raise _refused("an alias (*name) refers to what it stands in. Write it out", node)
    return size


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class Source:
    """Where each value of a file was written, for messages: line of the file, or option of the command line."""

    def __init__(self, file: Path | None, lines: dict[str, int], options: Mapping[str, str]) -> None:
        self.file, self.lines, self.options = file, lines, options

    def of(self, path: str) -> str:
        """``recipe.yaml, line 7``, or ``--learning-rate``."""
        for option, shown in self.options.items():
            if option.startswith(f"{path}."):  # an option for a field within what the problem is about
                return shown
        while path:
            if path in self.options:
                return self.options[path]
            if path in self.lines:
                return f"{self.file}, line {self.lines[path]}"
            path = path.rpartition(".")[0]
        return "" if self.file is None else f"{self.file}"

    def error(self, path: str, problem: str) -> PrefixMemoryError:
        """An error about ``path``."""
        where = self.of(path)
        return PrefixMemoryError(f"{where}: {problem}" if where else problem)


def read_yaml(file: Path, missing: str, expected: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Content of a YAML file, and the line of every key by its dotted path.

    Args:
        file: where it lies.
        missing: what to say after "The ... FILE does not exist.": the kind of file, then the hint.
        expected: what the file should hold, for one that is no mapping.
    """
    kind, _, hint = missing.partition(": ")
    if not file.is_file():
        problem = "is a folder" if file.is_dir() else "does not exist"
        raise PrefixMemoryError(f"The {kind} {file} {problem}. {hint}")
    if file.stat().st_size > LARGEST:
        raise PrefixMemoryError(f"{file} is larger than {LARGEST:,} bytes, as no such file is. {hint}")
    written = file.read_bytes()
    try:
        text = written.decode("utf-8")
    except UnicodeDecodeError as error:
        line = written.count(b"\n", 0, error.start) + 1
        raise PrefixMemoryError(f"{file}, line {line}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    try:
        root, content = _load(text)
    except ReaderError as error:  # a control character
        line = text.count("\n", 0, error.position) + 1
        raise PrefixMemoryError(f"{file}, line {line}: not valid YAML ({error.reason}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise PrefixMemoryError(f"{file}{where}: not valid YAML ({getattr(error, 'problem', error)}).") from error
    if not isinstance(content, dict):
        raise PrefixMemoryError(f"{file}: {expected}; this is none.")
    return content, _lines(file, root, "")


def shipped(folder: str) -> dict[str, Traversable]:
    """The YAML files in a folder of the package, such as ``recipes``, by name and in its order."""
    found = (entry for entry in (files("prefixmemory") / folder).iterdir() if entry.name.endswith(".yaml"))
    return {entry.name.removesuffix(".yaml"): entry for entry in sorted(found, key=lambda entry: entry.name)}


def find_yaml(name: str, folder: str, what: str, beside: Path | None = None) -> Path:
    """The file of the shipped ``what`` (a task, a method) called ``name``, or the path that ``name`` is.

    Args:
        name: a shipped one, or the path of a ``.yaml`` file.
        folder: of the package, where the shipped ones lie.
        what: for messages.
        beside: folder to which a path is relative; default: the current one.

    Raises:
        PrefixMemoryError: there is none of that name.
    """
    if name.endswith((".yaml", ".yml")):
        return ((beside or Path()) / name).resolve()
    known = shipped(folder)
    if name not in known:
        raise PrefixMemoryError(
            f"There is no {what} {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}; or give the path "
            "of a .yaml file of your own."
        )
    return Path(str(known[name]))


def _lines(file: Path, node: yaml.Node | None, prefix: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(key, yaml.ScalarNode):
            continue
        path, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if path in found:
            raise PrefixMemoryError(f"{file}, line {line}: {path} is given twice. Delete one.")
        found |= {path: line, **_lines(file, value, f"{path}.")}
    return found


def read_value(text: str) -> Any:
    """A value as it would be read from a file: ``8``, ``1e-3``, ``[q_proj, v_proj]``, ``elu``.

    Raises:
        PrefixMemoryError: not valid YAML.
    """
    try:
        return _load(text)[1]
    except yaml.YAMLError as error:
        shown = text if len(text) <= 80 else f"{text[:80]}…"
        raise PrefixMemoryError(f"{shown!r} is no value that YAML knows: put it in quotation marks.") from error


def put(content: dict[str, Any], path: str, value: Any, source: Source) -> None:
    """Lay ``value`` over ``content`` at a dotted path."""
    *sections, name = path.split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if not isinstance(inner, dict):
            raise source.error(path, f"{section} is {inner!r}, so {path} cannot be set in it.")
        content = inner
    content[name] = value


def typed(kind: type[T], content: Mapping[str, Any], source: Source, what: str, prefix: str = "") -> T:
    """``content`` as a ``kind``, a dataclass without sections of its own.

    Args:
        kind: the dataclass.
        content: its fields.
        source: where they were written.
        what: what the fields belong to, for messages, such as ``a task``.
        prefix: path of ``content`` in its file, such as ``training``.

    Raises:
        PrefixMemoryError: names the line, the field, and the nearest valid field or the allowed values.
    """
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    path = f"{prefix}." if prefix else ""
    for name in content:
        if name not in known:
            hint = did_you_mean(str(name), known) or f" There are: {', '.join(known)}."
            raise source.error(f"{path}{name}", f"{name} is no field of {what}.{hint}")
        check_no_switch(kind, name, content[name], source, f"{path}{name}")
    try:
        return cast(T, _adapter(kind).validate_python(dict(content)))
    except ValidationError as error:
        raise explained(error, source, set(known), prefix) from None


def check_no_switch(kind: type, name: str, value: Any, source: Source, path: str) -> None:
    """Refuse YAML's yes and no where a dataclass wants a number, or several; pydantic would take them for 1 and 0."""
    wanted = next((str(f.type) for f in fields(kind) if f.name == name), "")
    within = value if isinstance(value, list) else [value]
    if re.match(r"(list\[)?(int|float)", wanted) and any(isinstance(one, bool) for one in within):
        raise source.error(path, f"{path}={value!r}: input should be a valid number.")


def explained(
    error: ValidationError,
    source: Source,
    known: set[str],
    prefix: str = "",
    place: str = "file",
    options: Mapping[str, str] = MappingProxyType({}),
) -> PrefixMemoryError:
    """The first problem that pydantic found, in our words.

    Args:
        error: what it raised.
        source: where the values were written.
        known: names of fields, as opposed to the types that were tried.
        prefix: path of the values in their file.
        place: what the file is called where a field is missing.
        options: path -> option of the command line that may give it instead.
    """
    problems = error.errors()
    path = _path(problems[0], source, known, prefix)
    problem = [p for p in problems if _path(p, source, known, prefix) == path][-1]  # of "int or float", the wider one
    if problem["type"] == "missing":
        hint = f", or {options[path]}" if path in options else ""
        return source.error(path, f"{path} is missing: give it in the {place}{hint}.")
    if isinstance(raised := problem.get("ctx", {}).get("error"), PrefixMemoryError):
        blamed = blamed_path(path, str(raised))
        return source.error(blamed, f"{path}.{raised}" if path else str(raised))
    given = f"{path}={problem['input']!r}"
    if problem["type"] == "literal_error":
        allowed = re.findall(r"'([^']+)'", problem["ctx"]["expected"])
        hint = did_you_mean(str(problem["input"]), allowed)
        return source.error(path, f"{given} is not known.{hint} Choose one of: {', '.join(allowed)}.")
    return source.error(path, f"{given}: {problem['msg'][0].lower()}{problem['msg'][1:]}.")


def _path(problem: ErrorDetails, source: Source, known: set[str], prefix: str) -> str:
    """The field that pydantic complains about, without the names of the types that it tried."""
    path = prefix
    for part in problem["loc"]:
        longer = f"{path}.{part}".lstrip(".")
        path = longer if part in known or isinstance(part, int) or longer in source.lines else path
    return path


def blamed_path(section: str, message: str) -> str:
    """The path of the field with which our own messages begin: ``rank=0 is out of range``, ``columns.x is no ...``."""
    match = re.match(rf"(?:{section}\.)?([\w.]+)(?:=|: | is )", message)
    if match is None:
        return section
    return f"{section}.{match[1]}" if section else match[1]
