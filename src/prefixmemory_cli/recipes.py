"""``prefixmemory recipes``: list, copy and validate the YAML files that say what to train."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from prefixmemory_cli.common import path, put, ready

app = typer.Typer(help="Recipes: YAML files that say what to train.", no_args_is_help=True, rich_markup_mode=None)


def shipped() -> dict[str, Path]:
    """The recipes of the package, by name; it is found and not imported, which would take seconds."""
    package = find_spec("prefixmemory")
    assert package is not None and package.origin is not None
    return {file.stem: file for file in sorted((Path(package.origin).parent / "recipes").glob("*.yaml"))}


@app.command()
def ls() -> None:
    """List the recipes that ship with the package.

    \b
    Example: prefixmemory recipes ls
    """
    for name, file in shipped().items():
        with file.open(encoding="utf-8") as lines:
            print(f"{name:16}{lines.readline().lstrip('# ').strip()}")


@app.command()
def cp(
    name: Annotated[str, typer.Argument(help="Name of a recipe, as `recipes ls` lists it.")],
    to: Annotated[Path, typer.Argument(parser=path, help="New file.")],
) -> None:
    """Copy a recipe, to edit and to keep.

    \b
    Example: prefixmemory recipes cp classification my-tickets.yaml
    """
    from prefixmemory.errors import PrefixMemoryError, did_you_mean
    from prefixmemory.files.records import write_text

    recipes = shipped()
    if name not in recipes:
        there_are = f"There are: {', '.join(recipes)}."
        raise PrefixMemoryError(f"There is no recipe {name!r}.{did_you_mean(name, recipes)} {there_are}")
    for folder in to.parents:
        if folder.is_file():
            raise PrefixMemoryError(f"{folder} is a file. Give a new file in a folder.")
    if to.exists():
        raise PrefixMemoryError(f"{to} exists already. Give another name; nothing is overwritten.")
    write_text(to, recipes[name].read_text(encoding="utf-8"))
    put(f"Copied to {to}. Edit it, check it with: prefixmemory recipes validate {to}, then: prefixmemory train {to}")


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(parser=path, help="A recipe.")],
) -> None:
    """Check a recipe and every row of its data, without loading a model.

    \b
    Example: prefixmemory recipes validate tickets.yaml
    """
    from prefixmemory.training.job import rows_of
    from prefixmemory.training.recipe import load_recipe

    ready()
    recipe = load_recipe(file)
    rows, validation = rows_of(recipe)
    held_out = f", {len(validation):,} for validation" if validation else ""
    put(f"{file} is valid: {len(rows):,} rows to train on{held_out}.")
