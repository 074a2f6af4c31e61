"""``prefixmemory recipes``: list, copy and validate the YAML files that say what to train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixmemory.cli.common import quiet

app = typer.Typer(help="Recipes: YAML files that say what to train.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def ls() -> None:
    """List the recipes that ship with the package.

    \b
    Example: prefixmemory recipes ls
    """
    from prefixmemory.training.recipe import shipped, summary

    for name, file in shipped().items():
        print(f"{name:16}{summary(file.read_text(encoding='utf-8'))}")


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="Name of a recipe, as `recipes ls` lists it.")],
    to: Annotated[Path, typer.Argument(help="New file.")],
) -> None:
    """Copy a recipe, to edit and to keep.

    \b
    Example: prefixmemory recipes cp classification my-tickets.yaml
    """
    from prefixmemory.training.recipe import copy_recipe

    copy_recipe(name, to)
    print(f"Copied to {to}. Edit it, check it with: prefixmemory recipes validate {to}, then: prefixmemory train {to}")


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="A recipe.")],
) -> None:
    """Check a recipe and every row of its data, without loading a model.

    \b
    Example: prefixmemory recipes validate tickets.yaml
    """
    from prefixmemory.training.job import rows_of
    from prefixmemory.training.recipe import load_recipe

    quiet()
    recipe = load_recipe(file)
    rows, validation = rows_of(recipe)
    held_out = f", {len(validation):,} for validation" if validation else ""
    print(f"{file} is valid: {len(rows):,} rows to train on{held_out}.")
