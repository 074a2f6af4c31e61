"""``prefixmemory train``: a recipe, options laid over it, and a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixmemory_cli.common import OverwriteOption, ResumeOption, path, put, ready, resumable

#: Options of the common cases, and the fields of a recipe that they set.
FIELDS = {
    "model": "model",
    "data": "data.train",
    "validation": "data.validation",
    "output": "output",
    "method": "method.name",
    "objective": "training.objective",
    "learning_rate": "training.learning_rate",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "gradient_accumulation": "training.gradient_accumulation",
    "scheduler": "training.scheduler",
    "limit": "data.limit",
    "max_length": "training.max_length",
    "save_steps": "training.save_steps",
    "seed": "training.seed",
    "feature_map": "method.feature_map",
    "normalize": "method.normalize",
    "query": "method.query",
    "rank": "method.rank",
    "dtype": "dtype",
    "quantization": "quantization",
    "report_to": "report_to",
}
#: Options whose value is a text, whatever it looks like; the others are read as in a recipe.
TEXTS = ("model", "data", "validation", "output")


def train(
    recipe: Annotated[
        Path | None, typer.Argument(parser=path, help="YAML recipe; without one, give --model, --data, --output.")
    ] = None,
    config: Annotated[Path | None, typer.Option(parser=path, help="The recipe, as an option.")] = None,
    model: Annotated[str | None, typer.Option(help="Base model: a folder, a .gguf file, a Hub id, or smollm2.")] = None,
    data: Annotated[
        str | None, typer.Option(help="A .jsonl, .csv, .tsv or .parquet file, or the id of a data set of the Hub.")
    ] = None,
    validation: Annotated[str | None, typer.Option(help="The same, for the validation loss.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the trained adapter; must not hold a run yet.")] = None,
    method: Annotated[str | None, typer.Option(help="prefix_memory, or another method of PEFT, such as lora.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="sft, dpo or simpo (preference pairs), or kto (good and bad answers).")
    ] = None,
    learning_rate: Annotated[str | None, typer.Option("--learning-rate", "--lr", help="Peak learning rate.")] = None,
    epochs: Annotated[str | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Rows per step.")] = None,
    gradient_accumulation: Annotated[
        str | None, typer.Option(help="Steps whose gradients make one step of the optimizer.")
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="cosine, linear or constant.")] = None,
    limit: Annotated[str | None, typer.Option(help="Train on this many of the rows.")] = None,
    max_length: Annotated[str | None, typer.Option(help="Longest row in tokens; prompts lose their beginning.")] = None,
    save_steps: Annotated[str | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[str | None, typer.Option(help="Seed of order and start values.")] = None,
    feature_map: Annotated[str | None, typer.Option(help="φ: elu, gelu, relu, silu, identity, softmax, mlp.")] = None,
    normalize: Annotated[str | None, typer.Option(help="feature_mean, none, query_rms or feature_l2.")] = None,
    query: Annotated[str | None, typer.Option(help="content (before rotation) or rotary.")] = None,
    rank: Annotated[str | None, typer.Option(help="M = A·B of this rank, by default 8; null: a full M.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto (the checkpoint's), float32 or bfloat16.")] = None,
    quantization: Annotated[str | None, typer.Option(help="bnb-4bit, bnb-8bit or torchao-int8.")] = None,
    report_to: Annotated[list[str] | None, typer.Option(help="tensorboard, trackio or wandb; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field of the recipe: --set training.warmup=0.05.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained and what memory it needs; write nothing.")
    ] = False,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
) -> None:
    """Train a memory, or another PEFT adapter, for a model of your own on data of your own.

    Options win over the recipe. `prefixmemory recipes ls` lists recipes to start from.

    \b
    Example: prefixmemory train --model HuggingFaceTB/SmolLM2-135M-Instruct --data tickets.jsonl --output tickets-memory
    Example: prefixmemory train tickets.yaml --learning-rate 1e-3 --set method.rank=16 --dry-run
    """
    arguments = locals()
    options = {name: arguments[name] for name in FIELDS if arguments[name] is not None}
    from rich.console import Console

    from prefixmemory.errors import PrefixMemoryError
    from prefixmemory.files.yaml_files import read_value
    from prefixmemory.progress import say
    from prefixmemory.training.output import Output
    from prefixmemory.training.plan import plan_of
    from prefixmemory.training.recipe import load_recipe
    from prefixmemory.training.run import first_process, run_recipe

    ready()
    overrides = {
        FIELDS[name]: read_value(value) if isinstance(value, str) and name not in TEXTS else value
        for name, value in options.items()
    }
    shown = {FIELDS[name]: f"--{name.replace('_', '-')}" for name in options}
    for assignment in set_ or []:
        path, separator, value = assignment.partition("=")
        if not separator or not path:
            raise PrefixMemoryError(f"--set {assignment}: write it as FIELD=VALUE, such as --set training.warmup=0.05.")
        if path in overrides:
            raise PrefixMemoryError(f"{path} is given twice: {shown[path]} and --set {assignment}. Leave one out.")
        overrides[path] = read_value(value)
        shown[path] = f"--set {path}"
    if recipe and config:
        raise PrefixMemoryError(f"{recipe} and --config {config} are two recipes. Give one.")
    checked = load_recipe(recipe or config, overrides, shown)
    if dry_run:
        say(Console(), plan_of(checked).shown())
        return
    with resumable(Path(checked.output)):
        record = run_recipe(checked, resume, overwrite, Console(stderr=True))
    if first_process():
        put(
            f"Trained {record['trainable_parameters']:,} parameters on {record['rows']:,} rows in "
            f"{record['train_seconds']:.0f} s, loss {record['train_loss']:.3f}. The adapter lies in "
            f"{Output(Path(checked.output)).folder}."
        )
