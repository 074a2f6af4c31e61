"""One memory behind ``transformers serve``, which takes a folder that holds base model and adapter."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from huggingface_hub import snapshot_download
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.utils.import_utils import is_serve_available

from prefixmemory.adapters.hub import adapter_folder
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import read_object
from prefixmemory.files.names import check_name
from prefixmemory.serving.server import served_model
from prefixmemory.tuner.activation import PACKED


def serve_one(name: str, adapter: str, model: str | None = None, more: Sequence[str] = ()) -> None:
    """Run transformers' OpenAI-compatible server in this process, until it is stopped.

    Args:
        name: to ask for; the server knows no other.
        adapter: a folder or Hub id.
        model: a folder, a Hub id, or a GGUF file, which is unpacked first; ``None``: what the adapter names.
        more: options of ``transformers serve``.

    Raises:
        PrefixMemoryError: there is no such adapter, it names no base model, it waits for its invocation and continuous
            batching is asked for, or what the server needs is not installed.
    """
    check_name("adapter", name)
    folder = adapter_folder(adapter)
    config = read_object(folder / CONFIG_NAME, "Copy it from where the adapter was saved.")
    model = model or cast(str | None, config.get("base_model_name_or_path"))
    if not model:
        raise PrefixMemoryError("No base model is named. Give it first: prefixmemory serve MODEL --adapter NAME=PATH")
    if "--continuous-batching" in more and config.get("active_from", "start") != "start":
        raise PrefixMemoryError(PACKED)
    if not is_serve_available():
        raise PrefixMemoryError("transformers serve needs more packages: pip install 'transformers[serving]'")
    from transformers.cli.transformers import app

    base = Path(served_model(model))
    with tempfile.TemporaryDirectory() as made:
        both = Path(made) / name
        both.mkdir()
        files = (base if base.is_dir() else Path(snapshot_download(str(base)))).iterdir()
        for file in (*files, folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME):
            (both / file.name).symlink_to(file.resolve())
        os.chdir(made)  # the server calls a model by its path
        app(["serve", name, *more])
