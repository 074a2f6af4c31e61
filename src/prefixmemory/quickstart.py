"""``prefixmemory quickstart``: the whole path on a real model and real text, in a few minutes without a GPU."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixmemory.errors import PrefixMemoryError, for_terminal
from prefixmemory.files.records import RECORD, write_json
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.models.loading import fast_attention, fast_dtype, load_model, load_tokenizer, smollm2
from prefixmemory.progress import progress_bar, say
from prefixmemory.rows.data import northline
from prefixmemory.rows.rendering import classification_prompt
from prefixmemory.rows.rows import Rows, labels_of
from prefixmemory.scoring.generation import accuracy, answers
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.methods import RECOMMENDED, method_config
from prefixmemory.training.output import Output
from prefixmemory.training.run import run_training
from prefixmemory.training.settings import TrainingSettings

MAX_LABEL_TOKENS = 6
SHOWN = 6


def measure(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    console: Console,
    title: str,
    labels: list[str] | None = None,
    context: str = "",
) -> list[str]:
    """The model's answers to ``rows``, with a progress bar."""
    prompts = [classification_prompt(row["text"], labels) for row in rows]
    with progress_bar(console) as bar:
        task = bar.add_task(title, total=len(prompts))
        return answers(
            model, tokenizer, prompts, MAX_LABEL_TOKENS, context=context, progress=lambda n: bar.advance(task, n)
        )


def one_example_per_label(rows: Rows) -> str:
    """In-context examples for the base model: the first training row of each label."""
    first = {row["label"]: row["text"] for row in reversed(rows)}
    return "".join(f"{classification_prompt(text)} {label}\n\n" for label, text in sorted(first.items()))


def remeasure(adapter: Path, out: Path) -> None:
    """In a new process: load base model and adapter from disk, answer the test rows, write the answers to ``out``."""
    config = PrefixMemoryConfig.from_pretrained(str(adapter))
    name = str(config.base_model_name_or_path)
    tokenizer = load_tokenizer(name)
    model: Any = PeftModel.from_pretrained(load_model(name, fast_dtype(), fast_attention()), str(adapter))
    found = measure(model, tokenizer, northline("test"), Console(stderr=True), "measuring again in a new process")
    write_json(out, {"answers": found, "peak_memory_mib": peak_memory_mib()})


def peak_memory_mib() -> int:
    """Largest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def quickstart(
    folder: Path, settings: TrainingSettings, overwrite: bool, resume: bool, console: Console, again: bool = True
) -> dict[str, Any]:
    """Measure, train, save, reload in a new process, measure again, show. Returns the figures.

    Args:
        folder: where the adapter goes.
        settings: training settings.
        overwrite: replace a finished run in ``folder``.
        resume: go on with an interrupted one.
        console: where to print.
        again: measure the saved adapter in a new process (otherwise in this one, from disk all the same).
    """
    output = Output(folder)
    with output.held(overwrite, resume):
        return _quickstart(output, settings, overwrite, resume, console, again)


def _quickstart(
    output: Output, settings: TrainingSettings, overwrite: bool, resume: bool, console: Console, again: bool
) -> dict[str, Any]:
    folder = output.folder
    started = time.monotonic()
    train_rows, test_rows = northline("train"), northline("test")
    expected = [row["label"] for row in test_rows]
    name = smollm2()
    say(console, f"Base model: SmolLM2-135M-Instruct ({name})")
    console.print(
        f"Task: {len(labels_of(test_rows))} intents of a telephone company's customers, {len(train_rows)} training and "
        f"{len(test_rows)} test sentences; right means the exact label."
    )
    tokenizer = load_tokenizer(name)
    model = load_model(name, fast_dtype(), fast_attention())

    base = measure(model, tokenizer, test_rows, console, "base model, labels listed", labels_of(test_rows))
    shots = one_example_per_label(train_rows)
    few_shot = measure(model, tokenizer, test_rows, console, "base model, one example a label", context=shots)

    job = TrainingJob(name, tokenizer, train_rows, method_config(RECOMMENDED), settings)
    record = run_training(model, job, output, resume, overwrite, console)
    figures_file = folder / ".reloaded.json.tmp"
    if again:
        command = [sys.executable, "-m", "prefixmemory_cli", "remeasure", str(folder), str(figures_file)]
        done = subprocess.run(command, check=False)
        if done.returncode != 0:
            raise PrefixMemoryError(f"Measuring the saved adapter in a new process failed; see above. {command}")
    else:
        remeasure(folder, figures_file)
    reloaded = json.loads(figures_file.read_text(encoding="utf-8"))
    figures_file.unlink()
    adapted: list[str] = reloaded["answers"]

    figures = {
        "seed": settings.seed,
        "learning_rate": settings.learning_rate,
        "accuracy_base": accuracy(base, expected),
        "accuracy_base_one_example_a_label": accuracy(few_shot, expected),
        "accuracy_adapted": accuracy(adapted, expected),
        "trainable_parameters": record["trainable_parameters"],
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "train_seconds": record["train_seconds"],
        "total_seconds": round(time.monotonic() - started, 1),
        "peak_memory_mib": max(peak_memory_mib(), reloaded["peak_memory_mib"]),
    }
    write_json(folder / RECORD, {**record, "quickstart": figures})
    _show(figures, test_rows, base, adapted, folder, console)
    return figures


def _show(
    figures: dict[str, Any],
    rows: Rows,
    base: list[str],
    adapted: list[str],
    folder: Path,
    console: Console,
) -> None:
    examples = Table(title="A few test sentences", title_justify="left")
    for column in ("sentence", "base model", "with memory", "right"):
        examples.add_column(column, overflow="fold")
    for row, before, after in list(zip(rows, base, adapted, strict=True))[:SHOWN]:
        examples.add_row(*map(escape, (row["text"], for_terminal(before[:40]), for_terminal(after), row["label"])))
    console.print(examples)

    table = Table(title="PrefixMemory quickstart", title_justify="left", show_header=False)
    for title, value in (
        ("accuracy, base model with the labels listed", f"{figures['accuracy_base']:.1f} %"),
        ("accuracy, base model with one example a label", f"{figures['accuracy_base_one_example_a_label']:.1f} %"),
        ("accuracy with memory, reloaded in a new process", f"{figures['accuracy_adapted']:.1f} %"),
        ("trainable parameters", f"{figures['trainable_parameters']:,}"),
        ("adapter file", f"{figures['adapter_bytes'] / 2**20:.1f} MiB"),
        ("training", f"{figures['train_seconds']:.0f} s"),
        ("everything", f"{figures['total_seconds']:.0f} s"),
        ("peak memory", f"{figures['peak_memory_mib']:,} MiB"),
    ):
        table.add_row(title, value)
    console.print(table)
    for line in (
        f"The memory lies in {folder}. Ask it, or train one on your own data, one JSON object a line",
        '({"text", "label"}, {"prompt", "completion"} or {"messages"}):',
        f"  prefixmemory generate --adapter {folder} --prompt 'my line is dead since this morning'",
        "  prefixmemory train --model MODEL --data FILE.jsonl --output FOLDER",
    ):
        say(console, line)
