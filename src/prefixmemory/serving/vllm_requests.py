"""A request on its way: which memory it names, from which token on this speaks, and which cached blocks it may share.

In the engine's process, the adapter that a request names is exchanged for the memory of the store that lies at its path
(:mod:`prefixmemory.serving.store`), so that vLLM's own keys of cached blocks, which hold name and path, go by contents.
Blocks wholly before the memory speaks are keyed as the base model's. In workers, tokens before it are left silent.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.serving.store import NEVER, Held, Store, is_memory, last_occurrence
from prefixmemory.serving.served import read_config

#: Folders within which adapters must lie, separated as in PATH.
FOLDERS = "PREFIXMEMORY_ADAPTER_FOLDERS"
#: In a request's ``vllm_xargs`` (over HTTP) or ``extra_args`` (``SamplingParams``): another scale than the config's.
SCALE = "memory_scale"
#: How the store's memories are named; the colon keeps names of users apart.
NAME = "prefixmemory:{}"


class Engine:
    """The memories of one engine."""

    def __init__(self, nodes: int = 1) -> None:
        folders = os.environ.get(FOLDERS)
        allowed = None if folders is None else [Path(folder) for folder in folders.split(os.pathsep) if folder]
        self.store = Store(copied=nodes == 1, allowed=allowed)
        self.numbers: dict[int, int] = {}  # of the store's memories, by the caller's

    def exchanged(self, asked: LoRARequest | None, scale: float | None = None) -> LoRARequest | None:
        """The request for what lies at the path that ``asked`` names; what is no memory stays as it is.

        Raises:
            PrefixMemoryError: it is damaged, cannot be served, or lies outside of the allowed folders.
        """
        if asked is None or asked.lora_name.startswith(NAME.format("")):
            return asked
        folder = Path(get_adapter_absolute_path(asked.lora_path))
        self.store.check_allowed(folder)
        if not is_memory(folder):
            if scale is not None:
                raise PrefixMemoryError(f"{SCALE}={scale!r} is for memories, and {asked.lora_name!r} is none.")
            return asked
        if scale == 0:
            return None
        held = self.store.hold(folder, scale)
        if scale is None:
            self.numbers[asked.lora_int_id] = held.number
        return LoRARequest(NAME.format(held.content), held.number, str(held.folder), asked.base_model_name)

    def check(self, request: Any) -> None:
        """Refuse a request whose memory could not be found to speak or be silent.

        Raises:
            PrefixMemoryError: its prompt has no token ids or goes on later, or lacks what a strict memory needs.
        """
        held = self.held(request.lora_request)
        if held is None or held.invocation is None:
            return
        if request.prompt_token_ids is None or getattr(request, "resumable", False):
            raise PrefixMemoryError(
                "A memory that speaks from an invocation on needs a prompt of tokens that is given as a whole."
            )
        held.first_active(request.prompt_token_ids)

    def held(self, request: LoRARequest | None) -> Held | None:
        """The store's memory of an exchanged request."""
        return None if request is None else self.store.by_number.get(request.lora_int_id)


def scale_of(request: Any) -> float | None:
    """The scale that a request asks for."""
    extra = getattr(request.sampling_params, "extra_args", None) or {}
    return extra.get(SCALE)


def keys_of_blocks(original: Callable[..., Any], held: Callable[[Any], Held | None]) -> Callable[..., Any]:
    """vLLM's keys of a cached block, but for blocks before a request's memory speaks: those have the base model's."""

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, following = original(request, start_token_idx, end_token_idx, start_mm_idx)
        memory = held(request.lora_request)
        if keys is None or memory is None or memory.invocation is None or request.prompt_token_ids is None:
            return keys, following
        if getattr(request, "_memory_from", None) is None:
            request._memory_from = place_in(request.prompt_token_ids, memory.invocation)
        if end_token_idx <= request._memory_from:
            keys = tuple(key for key in keys if key[0] != "lora") or None
        return keys, following

    return generate_block_hash_extra_keys


def place_in(prompt: list[int], invocation: tuple[int, ...]) -> int:
    """From which token on a memory speaks."""
    place = last_occurrence(prompt, invocation)
    return NEVER if place is None else place


@lru_cache(maxsize=4096)
def invocation_at(path: str) -> tuple[int, ...] | None:
    """The invocation of the memory in a folder of the store, which does not change; ``None``: it speaks everywhere."""
    if not is_memory(Path(path)):
        return None
    tokens = read_config(Path(path)).invocation_tokens
    return tuple(tokens) if tokens else None


class Silent(tuple[int, ...]):
    """The number of each token's adapter, as vLLM's runners hand them on, and on which tokens none speaks."""

    where: np.ndarray | None = None


def silent_before(adapters: tuple[int, ...], firsts: list[int], computed: Any, scheduled: Any) -> Silent:
    """Mark the tokens of a step on which the memory of their request does not speak yet.

    Args:
        adapters: the number of each token's adapter.
        firsts: of each request, the first token on which it speaks.
        computed: how many tokens of each are computed already.
        scheduled: how many of each are in this step.
    """
    marked = Silent(adapters)
    if any(firsts):
        rest = [np.arange(before, before + count) < first
                for first, before, count in zip(firsts, computed, scheduled, strict=True)]  # fmt: skip
        marked.where = np.concatenate(rest)
    return marked
