"""The command line of vLLM's OpenAI-compatible server for a base model and its adapters."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from filelock import FileLock
from peft.utils import CONFIG_NAME

from prefixmemory.adapters.hub import adapter_folder
from prefixmemory.errors import PrefixMemoryError, check_positive_integer
from prefixmemory.files.json_text import read_object
from prefixmemory.files.names import check_name
from prefixmemory.memories.peft_type import PREFIX_MEMORY
from prefixmemory.models.loading import full_name, load_model, load_tokenizer
from prefixmemory.serving.served import FEED_FORWARD, rank_of, slot_size
from prefixmemory.serving.store import FOLDERS, NO_LORA

#: Slots for adapters that are loaded later.
SPARE = 8

INSTALL = (
    "vLLM is not installed. On a GPU: pip install 'prefixmemory[vllm]'; on a CPU, docs/guides/serving.md says how. It "
    "wants an environment of its own, with transformers before 5.20."
)


@dataclass(frozen=True)
class Launch:
    """A server that can be started.

    Attributes:
        arguments: of ``python``.
        environment: variables that it needs beside the caller's.
    """

    arguments: list[str]
    environment: dict[str, str]

    def start(self) -> None:
        """Become the server; does not return."""
        os.execve(sys.executable, [sys.executable, *self.arguments], {**os.environ, **self.environment})


def launch(
    model: str | None,
    adapters: Mapping[str, str],
    *,
    folder: Path | None = None,
    slots: int | None = None,
    max_rank: int | None = None,
    lora: bool = False,
    feed_forward: bool = False,
    more: Sequence[str] = (),
) -> Launch:
    """A server for ``model`` and ``adapters``.

    Args:
        model: a folder, a Hub id, or a GGUF file, which is unpacked first; ``None``: what the first adapter names.
        adapters: folders or Hub ids of memories and LoRAs by the name under which they are asked for.
        folder: further adapters are loaded from it while the server runs; ``None``: none are.
        slots: how many adapters one batch may hold; ``None``: all of ``adapters``, and 8 more with a ``folder``.
        max_rank: of memories and LoRAs; ``None``: the largest of ``adapters``.
        lora: make room for LoRA too, if none of ``adapters`` is one and some may be loaded later.
        feed_forward: make room for memories in feed-forward blocks too, if none of ``adapters`` has some and one that
            is loaded later may.
        more: options for vLLM.

    Raises:
        PrefixMemoryError: vLLM is missing, or an adapter cannot be served.
    """
    if find_spec("vllm") is None:
        raise PrefixMemoryError(INSTALL)
    check_positive_integer("slots", slots)
    check_positive_integer("max_rank", max_rank)
    if folder is not None and not folder.is_dir():
        raise PrefixMemoryError(
            f"{folder} is no folder. Make it, and put adapters into it, each in a folder of its own."
        )
    folders, ranks, base, blocks = {}, [8], None, feed_forward
    for name, place in adapters.items():
        check_name("adapter", name)
        folders[name] = adapter_folder(place)
        config = read_object(folders[name] / CONFIG_NAME, "Copy it from where the adapter was saved.")
        base = base or config.get("base_model_name_or_path")
        is_memory = config.get("peft_type") == PREFIX_MEMORY.value
        lora = lora or not is_memory
        if config.get("alora_invocation_tokens"):
            raise PrefixMemoryError(f"{name}: vLLM serves no activated LoRA. Use it through transformers.")
        blocks = blocks or (is_memory and config.get("feed_forward") is not None)
        ranks.append(rank_of(folders[name]) if is_memory else int(config.get("r", 8)))
    model = model or cast(str | None, base)
    if not model:
        raise PrefixMemoryError("No base model is named. Give it first: prefixmemory serve MODEL --adapter NAME=PATH")
    rank = max_rank or max(ranks)
    # one more beside LoRA: vLLM 0.32 gives the base model's requests the weights of the last slot on a CPU
    count = slots or max(1, len(adapters) + (SPARE if folder is not None else 0)) + int(lora)
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", served_model(model), "--enable-lora"]
    arguments += ["--served-model-name", *_names(model, folders), "--max-loras", str(count)]
    arguments += ["--max-lora-rank", str(slot_size(rank))]
    if not lora:
        arguments += ["--lora-target-modules", NO_LORA]
    if adapters:
        modules = [json.dumps({"name": name, "path": str(place)}) for name, place in folders.items()]
        arguments += ["--lora-modules", *modules]
    environment = {FEED_FORWARD: "1"} if blocks else {}
    if folder is not None:
        allowed = [str(folder.resolve()), *(str(place.resolve()) for place in folders.values())]
        environment |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", FOLDERS: os.pathsep.join(allowed)}
    return Launch([*arguments, *more], environment)


def _names(model: str, adapters: Collection[str]) -> list[str]:
    """Those that the base model is asked for by: as it was given, and a path by its last part, unless one has it."""
    if not Path(model).exists():
        return [model]
    short = Path(model).stem if model.endswith(".gguf") else Path(model).resolve().name
    return [model] if short in adapters else [short, model]


def served_model(model: str) -> str:
    """A folder or Hub id that vLLM can load; a GGUF file is unpacked into the cache of the user, once."""
    name = full_name(model)
    if not name.endswith(".gguf"):
        return name
    file = Path(name)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "prefixmemory"
    status = file.stat()
    folder = cache / f"{file.stem}-{status.st_size}-{status.st_mtime_ns}"
    if (folder / "config.json").is_file():
        return str(folder)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # another server may be unpacking it: wait for that
        if not (folder / "config.json").is_file():
            print(f"Unpacking {file.name} into {folder}, once", file=sys.stderr, flush=True)
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
            try:
                load_tokenizer(name).save_pretrained(partial)
                load_model(name, "bfloat16").save_pretrained(partial)
                partial.replace(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return str(folder)
