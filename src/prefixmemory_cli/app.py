"""Every command, one module a group of them."""

from __future__ import annotations

from typing import Annotated

import typer

from prefixmemory_cli import compare, inspect, quickstart, recipes, serve, train, use


def _version(wanted: bool | None) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"prefixmemory {version('prefixmemory')}")
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    version: Annotated[
        bool | None, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = None,
) -> None:
    """PrefixMemory-Tuning: a trainable memory outside the softmax of every attention head."""


app.command()(quickstart.quickstart)
app.command()(train.train)
app.command()(use.evaluate)
app.command()(compare.compare)
app.command()(use.generate)
app.command()(use.chat)
app.command()(inspect.inspect)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command()(use.push)
app.add_typer(recipes.app, name="recipes")
app.command(hidden=True)(quickstart.remeasure)
