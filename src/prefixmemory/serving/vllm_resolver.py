"""Adapters that a request names and nobody loaded: found in the server's folder, as ``FOLDER/NAME``."""

from __future__ import annotations

import os
from pathlib import Path

from peft.utils import CONFIG_NAME
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.names import check_name
from prefixmemory.serving.store import FOLDERS


class MemoryResolver(LoRAResolver):
    """vLLM's own resolver takes nothing but LoRA.

    Args:
        folder: holds a folder for each adapter.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """A request for the adapter of that name; ``None``: there is none."""
        try:
            check_name("adapter", lora_name)
        except PrefixMemoryError:
            return None
        folder = self.folder / lora_name
        if not (folder / CONFIG_NAME).is_file():
            return None
        return LoRARequest(lora_name, 1, str(folder))  # vLLM numbers it


def register_resolver() -> None:
    """Let vLLM look for memories in the first of the folders that adapters are served from, if any is named."""
    folders = [folder for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]
    if folders:
        LoRAResolverRegistry.register_resolver("prefixmemory", MemoryResolver(Path(folders[0])))
