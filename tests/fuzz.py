"""Files that are spoilt at random: each is read, or refused by one of our own errors, and that within seconds.

``python tests/fuzz.py`` is the long run (``make fuzz``); test_fuzz.py does the same with few inputs. The number of an
input, with the seed, makes it again: ``--only KIND NUMBER`` shows its traceback.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a name that is none would be asked for on the network, again and again

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.adapters.loading import load_adapter, read_record
from prefixmemory.compare.suite import load_suite
from prefixmemory.rows.data import read_rows
from prefixmemory.rows.encoding import tokenize
from prefixmemory.rows.rendering import render
from prefixmemory.training.card import card_of
from prefixmemory.training.output import Output
from prefixmemory.training.recipe import load_recipe

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "run.json"
#: Seconds of computing that reading one file may take.
PATIENCE = 10

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 7, 10**5, 10**12, 10**40, -0.5, 1e-300, 1e300, float("inf"), float("nan"), "", "a",
    " ", "8", "auto", "\x00", "\x1b[31m", "\ud800", "é" * 50, "a" * 3000, "../../etc/passwd", "(a+)+b", "*", "[",
    "{0}", "{a.b}", "all-linear", "q_proj", "2024-13-45", [], [1], [None], [[]], ["a", 1], ["q_proj"], {}, {"a": 1},
    {"": []},
]  # fmt: skip
TOKENS = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"'", b"{", b"[", b"}", b"]", b":", b",", b"- ", b"  ",
    b"\t", b"&a ", b"*a", b"<<: ", b"!!binary ", b"!!python/object:os.system ", b"? ", b"| ", b"---\n", b"%YAML 9.9\n",
    b"\\ud800", b"\\u0000", b"NaN", b"1e999", b"9" * 400, b"[" * 200, b'{"a":' * 200, b"\x1b[2J", b"null", b"true",
]  # fmt: skip


def spoil_bytes(content: bytes, choice: random.Random) -> bytes:
    """One to four changes of bytes: some flipped, cut out, doubled, moved or put in; or the end cut off."""
    for _ in range(choice.randint(1, 4)):
        begin = choice.randrange(len(content) + 1)
        end = min(len(content), begin + choice.choice((1, 2, 5, 40)))
        kind = choice.randrange(6)
        if kind == 0 and begin < len(content):
            content = content[:begin] + bytes([content[begin] ^ (1 << choice.randrange(8))]) + content[begin + 1 :]
        elif kind == 1:
            content = content[:begin] + content[end:]
        elif kind == 2:
            content = content[:end] + content[begin:end] * choice.choice((1, 1, 50)) + content[end:]
        elif kind == 3:
            part, rest = content[begin:end], content[:begin] + content[end:]
            place = choice.randrange(len(rest) + 1)
            content = rest[:place] + part + rest[place:]
        elif kind == 4 and choice.random() < 0.3:
            content = content[:begin]
        else:
            content = content[:begin] + choice.choice(TOKENS) + content[begin:]
    return content


def spoil_value(content: Any, choice: random.Random) -> Any:
    """One to three values replaced, taken out or put in, anywhere in plain data."""
    content = copy.deepcopy(content)
    for _ in range(choice.randint(1, 3)):
        place = content
        while isinstance(place, dict | list) and place:
            key = choice.choice(list(place)) if isinstance(place, dict) else choice.randrange(len(place))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and choice.random() < 0.7:
                place = inner
                continue
            kind = choice.randrange(8)
            if kind == 0:
                del place[key]
            elif kind == 1 and isinstance(place, dict):
                place[str(choice.choice(NASTY))] = inner
            else:
                place[key] = copy.deepcopy(choice.choice(NASTY))
            break
    return content


@dataclass
class Bench:
    """Where inputs are made and tried: good files of each kind, and a folder for spoilt ones."""

    folder: Path
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tiny.save_tiny(self.folder / "base")
        memory = PrefixMemoryConfig(task_type="CAUSAL_LM")
        lora = LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"])
        for name, config in {"memory": memory, "lora": lora}.items():
            model = get_peft_model(tiny.build(), config)
            model.peft_config["default"].base_model_name_or_path = str(self.folder / "base")
            model.save_pretrained(self.folder / name)
            self.configs[name] = json.loads((self.folder / name / CONFIG).read_text())
            self.configs[name].pop("weights_sha256", None)
        (self.folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        self.tokenizer = tiny.tokenizer()
        self.spoilt = self.folder / "spoilt"

    def fresh(self) -> Path:
        """An empty folder."""
        shutil.rmtree(self.spoilt, ignore_errors=True)
        self.spoilt.mkdir()
        return self.spoilt

    # One method a kind: makes an input, and returns what reads it.

    def config(self, choice: random.Random) -> Callable[[], object]:
        """``adapter_config.json`` with other values, or other bytes."""
        method, folder = choice.choice(list(self.configs)), self.fresh()
        (folder / WEIGHTS).write_bytes((self.folder / method / WEIGHTS).read_bytes())
        good = self.configs[method]
        text = json.dumps(spoil_value(good, choice) if choice.random() < 0.7 else good).encode()
        (folder / CONFIG).write_bytes(text if choice.random() < 0.7 else spoil_bytes(text, choice))
        return lambda: load_adapter(str(folder))

    def weights(self, choice: random.Random) -> Callable[[], object]:
        """A safetensors file with another header, or other bytes."""
        method, folder = choice.choice(list(self.configs)), self.fresh()
        (folder / CONFIG).write_text(json.dumps(self.configs[method]))
        content = (self.folder / method / WEIGHTS).read_bytes()
        length = int.from_bytes(content[:8], "little")
        if choice.random() < 0.6:
            header = json.loads(content[8 : 8 + length])
            spoilt = json.dumps(self._spoil_header(header, choice)).encode()
            content = len(spoilt).to_bytes(8, "little") + spoilt + content[8 + length :]
        else:
            content = spoil_bytes(content, choice)
        (folder / WEIGHTS).write_bytes(content)
        return lambda: load_adapter(str(folder))

    def _spoil_header(self, header: dict[str, Any], choice: random.Random) -> dict[str, Any]:
        name = choice.choice([name for name in header if name != "__metadata__"])
        kinds = ["BOOL", "I64", "U8", "F16", "BF16", "F64", "F8_E4M3", "C64", "X"]
        kind = choice.randrange(4)
        if kind == 0:
            header[name]["dtype"] = choice.choice(kinds)
        elif kind == 1:
            header[choice.choice(["a", "", "base_model.model.model.embed_tokens.weight", "\x00"])] = header.pop(name)
        elif kind == 2:
            header[name]["shape"] = choice.choice([[], [0], [10**9, 10**9], header[name]["shape"][::-1]])
        else:
            header = spoil_value(header, choice)
        return header

    def record(self, choice: random.Random) -> Callable[[], object]:
        """``run.json`` with other values, or other bytes: of an adapter, and of an interrupted run."""
        folder = self.fresh()
        good = {
            "base_model": "a/b", "method": "prefix_memory", "config": {"rank": 8}, "settings": {"epochs": 3}, "rows": 4,
            "row_format": "text", "rows_sha256": "0", "dtype": "float32", "data": {"train": "rows.jsonl"},
            "train_loss": 1.0, "train_seconds": 3.0, "metrics": {"accuracy": {"value": 1.0, "base model": 0.5}},
            "versions": {"torch": "2"}, "quantization": None,
        }  # fmt: skip
        text = json.dumps(spoil_value(good, choice)).encode()
        for name in (RECORD, f"out.partial/{RECORD}"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(text if choice.random() < 0.6 else spoil_bytes(text, choice))

        def read() -> None:
            output = Output(folder / "out")
            try:
                card_of(folder, read_record(folder))
            finally:
                with output.held(overwrite=False, resume=True):
                    output.begin({"method": "prefix_memory"}, resume=True)

        return read

    def recipe(self, choice: random.Random) -> Callable[[], object]:
        """A recipe with other values, or other bytes."""
        file = self.fresh() / "recipe.yaml"
        good = {
            "model": "smollm2", "output": "out", "dtype": "auto", "report_to": [],
            "data": {"train": "rows.jsonl", "columns": {"prompt": "{a} {b}", "completion": "c"}, "limit": 3},
            "method": {"name": choice.choice(["prefix_memory", "lora"]), "target_modules": ["q_proj"]},
            "training": {"learning_rate": 1e-3, "epochs": 2, "warmup": 0.1, "seed": 1},
        }  # fmt: skip
        text = yaml.safe_dump(
            spoil_value(good, choice) if choice.random() < 0.6 else good, allow_unicode=False
        ).encode()
        file.write_bytes(text if choice.random() < 0.5 else spoil_bytes(text, choice))
        return lambda: load_recipe(file)

    def suite(self, choice: random.Random) -> Callable[[], object]:
        """A suite with other values, or other bytes."""
        file = self.fresh() / "suite.yaml"
        good = {
            "name": "mine", "model": "smollm2", "tasks": ["banking77"], "methods": ["prefix-inside"],
            "seeds": [0, 1],
        }  # fmt: skip
        text = yaml.safe_dump(spoil_value(good, choice) if choice.random() < 0.6 else good).encode()
        file.write_bytes(text if choice.random() < 0.5 else spoil_bytes(text, choice))
        return lambda: load_suite(file)

    def rows(self, choice: random.Random) -> Callable[[], object]:
        """Rows in JSON, CSV and Parquet."""
        suffix = choice.choice([".jsonl", ".json", ".csv", ".tsv", ".parquet"])
        file = self.fresh() / f"rows{suffix}"
        kinds: list[dict[str, Any]] = [
            {"prompt": "why?", "completion": "so."},
            {"text": "a", "label": "b"},
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": []},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"instruction": "a", "input": "b", "output": "c"},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"prompt": "a", "completion": "b", "label": True},
        ]
        good = [choice.choice(kinds)] * 3
        rows = spoil_value(good, choice) if choice.random() < 0.6 else good
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        if suffix == ".parquet":
            try:
                pq.write_table(pa.Table.from_pylist(rows), file)
            except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):  # no such file can be
                file.write_bytes(b"PAR1")
            if choice.random() < 0.2:
                file.write_bytes(file.read_bytes()[: choice.randrange(200)])
        else:
            if suffix == ".jsonl":
                text = "".join(json.dumps(row) + "\n" for row in rows)
            elif suffix == ".json":
                text = json.dumps(rows)
            else:
                between = "," if suffix == ".csv" else "\t"
                text = "\n".join(between.join(map(str, row)) for row in (rows[0], *(row.values() for row in rows)))
            content = text.encode(errors="surrogatepass")
            file.write_bytes(content if choice.random() < 0.5 else spoil_bytes(content, choice))

        def read() -> None:
            found = read_rows(file)
            if "prompt" in found[0] and "completion" in found[0]:
                tokenize(render(found, self.tokenizer), self.tokenizer, 100)

        return read


KINDS = ("config", "weights", "record", "recipe", "suite", "rows")


class TooLongError(BaseException):
    """Reading took more than ``PATIENCE`` seconds of computing; no ``except Exception`` holds it."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raise :class:`TooLongError` after this much computing, on however busy a machine."""

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(bench: Bench, kind: str, number: int, seed: int) -> str:
    """``read``, ``refused``, or what went wrong."""
    read = getattr(bench, kind)(random.Random(f"{seed} {kind} {number}"))
    try:
        with bounded(PATIENCE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except PrefixMemoryError:
        return "refused"
    except (Exception, TooLongError) as error:
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if "/prefixmemory/" in frame.filename]
        place = f" in {Path(places[-1].filename).name}, line {places[-1].lineno}" if places else ""
        return f"{kind} {number}: {type(error).__name__}{place}: {str(error)[:200]}"
    return "read"


def run(bench: Bench, inputs: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How many inputs of each kind were read and refused, and what went wrong with others."""
    counts: Counter[str] = Counter()
    failures = []
    for number in range(inputs):
        kind = KINDS[number % len(KINDS)]
        found = outcome(bench, kind, number, seed)
        if found in ("read", "refused"):
            counts[f"{kind} {found}"] += 1
        else:
            failures.append(found)
            print(found, file=sys.stderr, flush=True)
    return counts, failures


def main() -> None:
    """The long run, or one input again."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--inputs", type=int, default=5000)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--only", nargs=2, metavar=("KIND", "NUMBER"))
    given = words.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        if given.only:
            getattr(bench, given.only[0])(random.Random(f"{given.seed} {given.only[0]} {given.only[1]}"))()
            return
        started = time.monotonic()
        counts, failures = run(bench, given.inputs, given.seed)
    for name, count in sorted(counts.items()):
        print(f"{name:20}{count:6}")
    print(f"{given.inputs} inputs, seed {given.seed}, {len(failures)} failures, {time.monotonic() - started:.0f} s")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
