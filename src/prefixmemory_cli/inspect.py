"""``prefixmemory inspect``: instruments that explain an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from prefixmemory_cli.common import BaseOption, check_room_for, given, path, put, ready


def inspect(
    adapters: Annotated[
        list[str], typer.Argument(help="Trained adapters: folders, or Hub ids; several are laid side by side.")
    ],
    output: Annotated[Path, typer.Option(parser=path, help="New folder for the JSON files, the figures and the page.")],
    what: Annotated[str, typer.Option(help="tradeoff, spectrum, shift, readout, long-input or all.")] = "all",
    text: Annotated[
        Path | None,
        typer.Option(parser=path, help="UTF-8 text to look at; default: messages of the Northline data set."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Longest input of the trade-off in tokens; default: up to 4,096.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of the text for the other instruments; default: up to 1,024.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Ablate this many heads, those with the largest memories; default: 16.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Rows that long-input answers (default: Northline) and ablations measure (default: the text)."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use this many of these rows; default: 64.")] = None,
    context: Annotated[
        Path | None,
        typer.Option(parser=path, help="UTF-8 text that long-input prepends; default: an essay on lighthouses."),
    ] = None,
    context_lengths: Annotated[
        str | None, typer.Option(help="Its lengths in tokens, with commas; default: 0,256,1024,4000.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, auto or bfloat16; in bfloat16 rounding shows among small eigenvalues.")
    ] = "float32",
    model: BaseOption = None,
) -> None:
    """Explain trained adapters: JSON, figures for a paper, and a page to look at them.

    tradeoff: the share of attention that a prefix takes, or what a memory adds, against the length of the input.
    spectrum: in how many directions the adapter changes what attention answers (any PEFT method).
    shift: how far it moves the attention maps. readout: the tokens that a memory speaks for, the heads that matter.
    long-input: what accuracy is left behind unrelated text.

    \b
    Example: prefixmemory inspect tickets-memory --output tickets-inspected
    Example: prefixmemory inspect tickets-memory --what tradeoff --output tickets-tradeoff
    Example: prefixmemory inspect tickets-memory --what long-input --data tickets-test.jsonl --output tickets-long
    """
    from functools import partial

    from rich.console import Console

    from prefixmemory.adapters.evaluate import completion_loss, rows_to_score, uninvoked
    from prefixmemory.adapters.hub import adapter_folder
    from prefixmemory.adapters.loading import Adapter, load_adapter, read_record
    from prefixmemory.analysis import figures
    from prefixmemory.analysis import inspection as ins
    from prefixmemory.errors import PrefixMemoryError, check_choice
    from prefixmemory.memories.checkpoint import check_config_file, check_weights_file
    from prefixmemory.models.loading import Dtype
    from prefixmemory.progress import say
    from prefixmemory.rows.data import sample
    from prefixmemory.rows.rendering import render

    ready()
    check_choice("dtype", dtype, get_args(Dtype))
    asked = given(length=length, tokens=tokens, heads=heads, limit=limit, context=context)
    ins.check_read(what, [*asked, *given(text=text, data=data, context_lengths=context_lengths)])
    limit = ins.Settings.limit if limit is None else limit
    console = Console(stderr=True)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PrefixMemoryError(f"{output} exists already. Give another name; nothing is overwritten.")
    if limit < 1:
        raise PrefixMemoryError(f"limit={limit} is out of range: give a number above 0.")
    if len(set(adapters)) < len(adapters):
        raise PrefixMemoryError("The same adapter is given twice. Give each once.")

    rows_of = {}
    if data is not None:
        for name, label in zip(adapters, ins.labels(adapters), strict=True):
            rows = rows_to_score(read_record(adapter_folder(name)), data, "test")
            rows_of[label] = sample(rows, None, limit, seed=0)

    def loss_of(adapter: Adapter) -> Callable[[], float]:
        examples = render(rows_of[adapter.name], adapter.tokenizer)
        uninvoked(adapter, examples)
        return lambda: completion_loss(adapter, examples, 16, lambda count: None)

    settings = ins.Settings(
        what=what,
        text=None if text is None else _read(text),
        loss=None if data is None else loss_of,
        rows=None if data is None else lambda adapter: rows_of[adapter.name],
        in_front=None if context_lengths is None else _numbers(context_lengths),
        **asked,
    )
    figures.check_matplotlib()
    check_room_for(output)
    for name in adapters:  # before the first is measured
        config = check_config_file(folder := adapter_folder(name), any_method=True)
        check_weights_file(folder, config.get("weights_sha256"))
    found = {}
    for name, label in zip(adapters, ins.labels(adapters), strict=True):
        adapter = ins.renamed(load_adapter(name, model, cast(Dtype, dtype)), label)
        found[label] = ins.inspect(adapter, settings, partial(say, console))
    conditions = {
        "adapters": adapters,
        "text": "Northline, test messages" if text is None else text.name,
        "dtype": dtype,
        "rows of ablations": "the text" if data is None else f"{Path(data).name}, {limit} at most",
        "rows of long-input": f"{'Northline, test' if data is None else Path(data).name}, {limit} at most",
        "text in front": "essay on lighthouses, of the package" if context is None else context.name,
    }
    for file in ins.write(found, conditions, output):
        put(file)


def _numbers(text: str) -> list[int]:
    from prefixmemory.errors import PrefixMemoryError

    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise PrefixMemoryError(
            f"context-lengths={text!r} is no list of numbers: give them with commas, such as 0,256,1024."
        ) from error


def _read(file: Path) -> str:
    from prefixmemory.errors import PrefixMemoryError
    from prefixmemory.files.pipes import read_text

    try:
        return read_text(file)
    except (OSError, ValueError) as error:
        raise PrefixMemoryError(f"The text {file} cannot be read ({error}). Give a UTF-8 text file.") from error
