"""The command line. Errors are one line on stderr and exit code 1 (2 for a wrong option); ctrl-C is 130."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from prefixmemory.errors import PrefixMemoryError

app = typer.Typer(
    help="PrefixMemory-Tuning: a trainable memory outside the softmax of every attention head.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished run once the new one is complete.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the trained memory.")] = Path("northline-memory"),
    seed: Annotated[int, typer.Option(help="Seed of the training run.")] = 0,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; default: the recipe's.")] = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
) -> None:
    """Train a memory for SmolLM2-135M on the data that ships with the package, and show what it changed.

    Example: prefixmemory quickstart --output my-first-memory
    """
    from prefixmemory.quickstart import quickstart as run
    from prefixmemory.training.recipe import TrainingSettings

    _quiet()
    with _resumable(output):
        run(output, TrainingSettings(**_given(seed=seed, learning_rate=learning_rate)), overwrite, resume, Console())


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Base model: a folder, a .gguf file or a Hub id.")],
    data: Annotated[Path, typer.Option(help="JSONL file: prompt+completion, messages, or text+label.")],
    output: Annotated[Path, typer.Option(help="Folder for the trained memory; must not hold a run yet.")],
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; default: the recipe's.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row in tokens; prompts lose their beginning.")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of order and start values.")] = None,
    feature_map: Annotated[str | None, typer.Option(help="φ: elu, gelu, relu, silu, identity, softmax, mlp.")] = None,
    normalize: Annotated[str | None, typer.Option(help="none, query_rms or feature_l2.")] = None,
    query: Annotated[str | None, typer.Option(help="content (before rotation) or rotary.")] = None,
    rank: Annotated[int | None, typer.Option(help="M = A·B of this rank; default: a full memory.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32 or bfloat16.")] = "auto",
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
) -> None:
    """Train a memory for a model of your own on data of your own.

    Example: prefixmemory train --model HuggingFaceTB/SmolLM2-135M-Instruct --data tickets.jsonl --output tickets-memory
    """
    from prefixmemory.base_models import Dtype, load_model, load_tokenizer
    from prefixmemory.config import PrefixMemoryConfig
    from prefixmemory.errors import check_choice
    from prefixmemory.training.recipe import TrainingSettings
    from prefixmemory.training.rows import read_rows
    from prefixmemory.training.run import Output, run_training

    _quiet()
    console = Console()
    # Everything that can be refused without the model is refused before the model is loaded.
    check_choice("dtype", dtype, ("auto", "float32", "bfloat16"))
    settings = TrainingSettings(
        **_given(learning_rate=learning_rate, epochs=epochs, batch_size=batch_size, max_length=max_length,
                 save_steps=save_steps, seed=seed)
    )  # fmt: skip
    config = PrefixMemoryConfig(
        task_type="CAUSAL_LM", **_given(feature_map=feature_map, normalize=normalize, query=query, rank=rank)
    )
    Output(output).check(overwrite, resume)
    rows = read_rows(data)
    with _resumable(output):
        tokenizer = load_tokenizer(model)
        base = load_model(model, cast(Dtype, dtype))
        record = run_training(
            base, model, tokenizer, rows, Output(output), settings, config, resume, overwrite, console
        )  # fmt: skip
    print(
        f"Trained {record['trainable_parameters']:,} parameters on {len(rows)} rows in "
        f"{record['train_seconds']:.0f} s, loss {record['train_loss']:.3f}. The memory lies in {output}."
    )


@app.command()
def generate(
    adapter: Annotated[Path, typer.Option(help="Folder of a trained memory.")],
    prompt: Annotated[str, typer.Option(help="What a row's prompt, text or question would be; \\n is a new line.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt to the model as it is.")] = False,
) -> None:
    """Answer one prompt with a trained memory, and with the base model for comparison.

    The prompt is rendered as the rows were in training (chat template, or text and label).

    Example: prefixmemory generate --adapter northline-memory --prompt 'my line is dead since this morning'
    """
    from peft import PeftModel

    from prefixmemory.base_models import fast_dtype, load_model, load_tokenizer
    from prefixmemory.config import PrefixMemoryConfig
    from prefixmemory.training.evaluation import answers
    from prefixmemory.training.rows import render_prompt
    from prefixmemory.training.run import RECORD

    _quiet()
    if not prompt.strip():
        raise PrefixMemoryError("The prompt is empty. Give a text to continue: --prompt 'Text: my line is dead'.")
    if max_new_tokens < 1:
        raise PrefixMemoryError(f"max_new_tokens={max_new_tokens} is out of range: give a number above 0.")
    if not adapter.is_dir():
        raise PrefixMemoryError(f"{adapter} does not exist. Give the folder that `prefixmemory train` wrote.")
    config = PrefixMemoryConfig.from_pretrained(str(adapter))
    if not config.base_model_name_or_path:
        raise PrefixMemoryError(
            f"{adapter}/adapter_config.json does not name its base model. Write it into base_model_name_or_path."
        )
    name = str(config.base_model_name_or_path)
    tokenizer = load_tokenizer(name)
    model: Any = PeftModel.from_pretrained(load_model(name, fast_dtype()), str(adapter))
    record = adapter / RECORD
    trained_on = json.loads(record.read_text(encoding="utf-8")).get("row_format", "") if record.is_file() else ""
    text = render_prompt(prompt.replace("\\n", "\n"), "" if raw else trained_on, tokenizer)
    with model.disable_adapter():
        base = answers(model, tokenizer, [text], max_new_tokens)[0]
    print(f"base model:  {base}\nwith memory: {answers(model, tokenizer, [text], max_new_tokens)[0]}")


@app.command(hidden=True)
def remeasure(adapter: Path, out: Path) -> None:
    """Second half of the quickstart, run by it in a new process."""
    from prefixmemory.quickstart import remeasure as run

    _quiet()
    run(adapter, out)


def _given(**values: Any) -> dict[str, Any]:
    """The options that were given, so that defaults live in one place."""
    return {name: value for name, value in values.items() if value is not None}


def _quiet() -> None:
    from prefixmemory.training.run import quiet_libraries

    quiet_libraries()


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    """Turn an interrupted run into the message that says how to go on, and exit code 130."""
    from prefixmemory.training.recipe import Interrupted
    from prefixmemory.training.run import Output, interrupted_message

    try:
        yield
    except Interrupted:
        words = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
        print(interrupted_message(Output(output), shlex.join(["prefixmemory", *words])), file=sys.stderr)
        raise SystemExit(130) from None
    except KeyboardInterrupt:  # typer would exit without a word
        kept = Output(output).partial
        where = f" What was done until the last checkpoint is kept in {kept}." if kept.is_dir() else ""
        print(f"Stopped.{where}", file=sys.stderr)
        raise SystemExit(130) from None


def main() -> None:
    """Entry point: user errors become one line on stderr."""
    # A user of the command line works offline or with the Hub; either way tokenizers need no thread pool here.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except PrefixMemoryError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
