"""Commands that use a trained adapter: evaluate, generate, chat, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixmemory_cli.common import (
    AdapterArgument,
    AdapterOption,
    BaseOption,
    DrawSeedOption,
    TemperatureOption,
    TopPOption,
    check_room_for,
    one_adapter,
    path,
    put,
    ready,
)


def generate(
    prompt: Annotated[str, typer.Option(help="What a row's prompt, text or question would be; \\n is a new line.")],
    adapter: AdapterArgument = None,
    adapter_: AdapterOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    seed: DrawSeedOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt to the model as it is.")] = False,
    model: BaseOption = None,
) -> None:
    """Answer one prompt with a trained adapter, and with the base model for comparison.

    The prompt is rendered as the rows were in training (chat template, or text and label).

    \b
    Example: prefixmemory generate tickets-memory --prompt 'my line is dead since this morning'
    Example: prefixmemory generate tickets-memory --prompt 'once upon a time' --temperature 0.8 --top-p 0.9 --seed 1
    """
    from rich.console import Console

    from prefixmemory.adapters.loading import load_adapter
    from prefixmemory.errors import PrefixMemoryError
    from prefixmemory.progress import say_loading
    from prefixmemory.rows.encoding import encode_prompt
    from prefixmemory.rows.rendering import render_prompt
    from prefixmemory.scoring.generation import Sampling, answers, room_for_answer

    ready()
    name = one_adapter(adapter, adapter_)
    if not prompt.strip():
        raise PrefixMemoryError("The prompt is empty. Give a text to continue: --prompt 'Text: my line is dead'.")
    check_tokens(max_new_tokens)
    sampling = Sampling(temperature, top_p, seed)
    say_loading(Console(stderr=True), f"{name} and its base model")
    loaded = load_adapter(name, model)
    kind, given = "" if raw else loaded.row_format, loaded.chat_template_kwargs
    text = render_prompt(prompt.replace("\\n", "\n"), kind, loaded.tokenizer, given)

    longest = room_for_answer(loaded.model, len(encode_prompt(text, loaded.tokenizer)), max_new_tokens)

    def answer() -> str:
        return answers(loaded.model, loaded.tokenizer, [text], longest, one_line=False, sampling=sampling)[0]

    with loaded.model.disable_adapter():
        base = answer()
    title = "with memory:" if loaded.is_memory else "adapted:    "
    put(f"base model:  {base}\n{title} {answer()}")


def evaluate(
    adapter: AdapterArgument = None,
    adapter_: AdapterOption = None,
    data: Annotated[str | None, typer.Option(help="Test rows: a file, or the id of a data set of the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "test",
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas: hellaswag,arc_easy.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(parser=path, help="Folder with tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Score only this many rows (of each task).")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 32,
    output: Annotated[
        Path | None,
        typer.Option(parser=path, help="New JSON file for the figures, and the answers to rows with labels."),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Add the figures to run.json and card.")] = False,
    model: BaseOption = None,
) -> None:
    """Score a trained adapter beside its base model, on rows of your own or on tasks of lm-evaluation-harness.

    An adapter whose logits equal the base model's is refused: its scores would be the base model's.

    \b
    Example: prefixmemory evaluate tickets-memory --data tickets-test.jsonl
    Example: prefixmemory evaluate tickets-memory --tasks tickets --include-path my-tasks --limit 4
    """
    from rich.console import Console

    from prefixmemory.adapters.evaluate import (
        Scores,
        evaluate_harness,
        evaluate_rows,
        refuse_untrained,
        rows_to_score,
        save_metrics,
    )
    from prefixmemory.adapters.hub import adapter_folder
    from prefixmemory.adapters.loading import load_adapter, read_record
    from prefixmemory.errors import PrefixMemoryError
    from prefixmemory.files.records import write_json
    from prefixmemory.progress import say_loading
    from prefixmemory.rows.data import sample

    ready()
    name = one_adapter(adapter, adapter_)
    if (data is None) == (tasks is None):
        raise PrefixMemoryError("Give either --data FILE, or --tasks NAME,NAME of lm-evaluation-harness.")
    if include_path is not None and tasks is None:
        raise PrefixMemoryError("--include-path is where --tasks are looked for. Give --tasks too, or leave it out.")
    if limit is not None and limit < 1:
        raise PrefixMemoryError(f"limit={limit} is out of range: give a number above 0.")
    if batch_size < 1:
        raise PrefixMemoryError(f"batch_size={batch_size} is out of range: give a number above 0.")
    check_tokens(max_new_tokens)
    if output is not None and output.exists():
        raise PrefixMemoryError(f"{output} exists already. Give another name; nothing is overwritten.")
    if output is not None:
        check_room_for(output)
    folder = adapter_folder(name)
    if save and not path(name).is_dir():
        raise PrefixMemoryError("--save writes into the adapter's folder; this one is on the Hub. Leave it out.")
    rows = None if data is None else sample(rows_to_score(read_record(folder), data, split), None, limit, seed=0)
    console = Console(stderr=True)
    say_loading(console, f"{name} and its base model")
    loaded = load_adapter(name, model)
    refuse_untrained(loaded)
    scores: Scores
    if rows is not None:
        scores = evaluate_rows(loaded, rows, str(data), batch_size, max_new_tokens, console)
    else:
        scores = evaluate_harness(loaded, str(tasks).split(","), include_path, limit, batch_size)
    put(scores.shown())
    if output is not None:
        write_json(output, scores.record())
    if save:
        save_metrics(loaded, scores)


def chat(
    adapter: AdapterArgument = None,
    adapter_: AdapterOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = None,
    seed: DrawSeedOption = None,
    model: BaseOption = None,
) -> None:
    """Talk with a trained adapter; answers appear as they are written.

    In the chat: /base switches the adapter off and on, /scale 0.5 changes a memory's scale, /reset forgets the
    conversation, /quit (or ctrl-D) ends it.

    \b
    Example: echo 'my line is dead' | prefixmemory chat tickets-memory
    """
    from rich.console import Console

    from prefixmemory.adapters.chat import chat as run
    from prefixmemory.adapters.loading import load_adapter
    from prefixmemory.progress import say_loading
    from prefixmemory.scoring.generation import Sampling

    ready()
    name = one_adapter(adapter, adapter_)
    check_tokens(max_new_tokens)
    sampling = Sampling(temperature, top_p, seed)
    say_loading(Console(stderr=True), f"{name} and its base model")
    run(load_adapter(name, model), max_new_tokens, sampling)


def push(
    to: Annotated[str, typer.Option(help="Hub id: user/name.")],
    adapter: AdapterArgument = None,
    adapter_: AdapterOption = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a trained adapter to the Hub, with a model card made from its run record.

    \b
    Example: prefixmemory push tickets-memory --to my-name/tickets-memory
    """
    from prefixmemory.adapters.hub import push_adapter

    ready()
    put(f"Uploaded to {push_adapter(path(one_adapter(adapter, adapter_)), to, private=private)}")


def check_tokens(max_new_tokens: int) -> None:
    """Refuse an answer of no tokens."""
    from prefixmemory.errors import PrefixMemoryError

    if max_new_tokens < 1:
        raise PrefixMemoryError(f"max_new_tokens={max_new_tokens} is out of range: give a number above 0.")
