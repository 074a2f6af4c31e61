"""``prefixmemory serve``: many memories behind one OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixmemory_cli.common import BaseOption, path


def serve(
    context: typer.Context,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="<NAME=PATH>", help="A memory or a LoRA, and the name to ask for it; may be repeated."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(parser=path, help="Load further adapters from it while the server runs.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Adapters that one batch may hold; default: all, 8 more with --folder.")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(help="Of any adapter; default: the largest of those given.")] = None,
    lora: Annotated[bool, typer.Option("--lora", help="Make room for LoRAs that are loaded later.")] = False,
    feed_forward: Annotated[
        bool,
        typer.Option("--feed-forward", help="Make room for memories in feed-forward blocks that are loaded later."),
    ] = False,
    without_vllm: Annotated[
        bool, typer.Option("--without-vllm", help="Serve one memory of any kind with `transformers serve`.")
    ] = False,
    model: BaseOption = None,
) -> None:
    """Serve a base model and many memories with vLLM, over HTTP.

    A request names the adapter as its model. The base model may also be given as the first word. Options that are not
    listed here go to vLLM, or to `transformers serve`, as they are.

    \b
    Example: prefixmemory serve --adapter tickets=tickets-memory --port 8000
    Example: prefixmemory serve --adapter tickets=tickets-memory --adapter same=tickets-memory --folder .
    """
    from prefixmemory.errors import PrefixMemoryError
    from prefixmemory.serving.server import launch
    from prefixmemory.serving.without_vllm import serve_one

    more = list(context.args)
    if more and not more[0].startswith("-"):
        if model is not None:
            raise PrefixMemoryError(f"Two base models are named, {more[0]!r} and --model {model!r}. Give one.")
        model = more.pop(0)
    adapters: dict[str, str] = {}
    for word in adapter or []:
        name, equals, place = word.partition("=")
        if not (name and equals and place):
            raise PrefixMemoryError(f"--adapter {word!r} has no name: give NAME=PATH, such as tickets=tickets-memory.")
        if name in adapters:
            raise PrefixMemoryError(f"--adapter names {name!r} twice. Give each adapter a name of its own.")
        adapters[name] = str(path(place))
    if without_vllm:
        if len(adapters) != 1 or folder or slots or max_rank or lora or feed_forward:
            raise PrefixMemoryError(
                "--without-vllm serves one memory: give one --adapter, and none of --folder, --slots, --max-rank, "
                "--lora and --feed-forward."
            )
        serve_one(*next(iter(adapters.items())), model, more)
        return
    launch(
        model, adapters, folder=folder, slots=slots, max_rank=max_rank, lora=lora, feed_forward=feed_forward, more=more
    ).start()
