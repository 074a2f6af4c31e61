"""A request on its way: which memory it names, from which token on and at which scale this speaks, and which cached
blocks it may share.

Where vLLM takes requests in, the adapter that one names is exchanged for a copy of the memory that lies at its path,
under the hash of its contents (:mod:`prefixmemory.serving.store`): what is wrong with it is said there, before the
engine has the request. The engine keys cached blocks by that hash, and those wholly before the memory speaks as the
base model's. Workers leave the tokens before it silent.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import CONFIG_NAME
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path

from prefixmemory.errors import PrefixMemoryError, check_number, did_you_mean
from prefixmemory.files.json_text import read_object
from prefixmemory.serving.served import HeadSizes, check_blocks, read_blocks, read_config, read_memory
from prefixmemory.serving.store import COPIES, FOLDERS, NO_LORA, Store, is_memory
from prefixmemory.tuner.active_tokens import NEVER, speaking

#: Below vLLM's own, which prints it.
logger = logging.getLogger(f"vllm.{__name__}")
#: In a request's ``vllm_xargs`` (over HTTP) or ``extra_args`` (``SamplingParams``): another scale than the config's.
SCALE = "memory_scale"
#: Of that scale, in either direction: far beyond it, half precision overflows.
LARGEST_SCALE = 100
#: Between an adapter's name and the hash of its contents.
OF_CONTENT = "@"


class RefusedRequest(VLLMValidationError, PrefixMemoryError):
    """A request that cannot be served; over HTTP, the client's error."""


class Intake:
    """The memories that the requests to one engine name.

    Args:
        config: vLLM's.
    """

    def __init__(self, config: Any) -> None:
        folders, copies = os.environ.get(FOLDERS), os.environ.get(COPIES)
        allowed = None if folders is None else [Path(folder) for folder in folders.split(os.pathsep) if folder]
        if config.parallel_config.nnodes > 1 and copies is None:
            raise PrefixMemoryError(
                f"The server runs on several machines, which load memories from copies: set {COPIES} to a folder that "
                "all of them see."
            )
        self._config = config
        self._store = Store(self._check, None if copies is None else Path(copies), allowed)
        self.numbers: dict[int, int] = {}  # of the store's memories, by the caller's
        self._missed: set[int] = set()  # those of which it was said that a prompt lacks their invocation

    def _check(self, folder: Path) -> None:
        """Refuse what a worker could not load, or would read wrongly."""
        if getattr(self._config.cache_config, "kv_sharing_fast_prefill", False):
            raise PrefixMemoryError(
                "With --kv-sharing-fast-prefill, later layers see some of a step's tokens, and memories would not know "
                "which. Start the server without it."
            )
        model, text = self._config.model_config, self._config.model_config.hf_text_config
        sizes = HeadSizes(
            text.num_attention_heads, model.get_total_num_kv_heads(), model.get_head_size(), model.get_head_size()
        )
        rank = self._config.lora_config.max_lora_rank
        read_memory(folder, sizes, text.num_hidden_layers, rank)
        check_blocks(read_blocks(folder, rank), getattr(text, "hidden_size", None), folder)

    def _check_lora(self, folder: Path, asked: LoRARequest) -> None:
        """Refuse what vLLM would fail at within a step, or take and leave out: the engine would end, or the base model
        answer."""
        if getattr(asked, "tensorizer_config_dict", None):
            return  # it lies elsewhere
        if not (folder / CONFIG_NAME).is_file():
            raise PrefixMemoryError(f"The adapter {asked.lora_name!r} is gone: {folder} has no {CONFIG_NAME}.")
        read_object(folder / CONFIG_NAME, f"The adapter {asked.lora_name!r} cannot be read.")
        if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin", "pt")):
            raise PrefixMemoryError(f"The adapter {asked.lora_name!r} has no weights in {folder}.")
        if self._config.lora_config.target_modules == [NO_LORA]:
            raise PrefixMemoryError(
                f"{asked.lora_name!r} is a LoRA, and the server was started without room for any. Start it with --lora."
            )

    def exchanged(self, asked: LoRARequest, scale: float | None = None) -> LoRARequest | None:
        """The request for what lies at the path that ``asked`` names; what is no memory stays as it is. ``None``: the
        base model, at a ``scale`` of 0.

        Raises:
            PrefixMemoryError: it is damaged, cannot be served, or lies outside of the allowed folders.
        """
        folder = Path(get_adapter_absolute_path(asked.lora_path))
        self._store.check_allowed(folder)
        if not is_memory(folder):
            if scale is not None:
                raise PrefixMemoryError(f"{SCALE}={scale!r} is for memories, and {asked.lora_name!r} is none.")
            self._check_lora(folder, asked)
            return asked
        if scale is not None:
            span = f"a number between -{LARGEST_SCALE} and {LARGEST_SCALE}"
            check_number(SCALE, scale, -LARGEST_SCALE, LARGEST_SCALE, span)
        held = self._store.hold(folder)
        if scale == 0:
            return None
        self.numbers[asked.lora_int_id] = held.number
        name = f"{asked.lora_name}{OF_CONTENT}{held.content}"
        return LoRARequest(name, held.number, str(held.folder), asked.base_model_name)

    def take(self, request: Any) -> None:
        """Exchange the adapter of a request to the engine.

        Raises:
            PrefixMemoryError: as :meth:`exchanged`; or its prompt has no token ids or is to go on later, or lacks what
                a strict memory needs.
        """
        scale = scale_in(request.sampling_params)
        if request.lora_request is None:
            if scale is not None:
                raise PrefixMemoryError(f"{SCALE}={scale!r} is for memories, and the base model is asked.")
            return
        request.lora_request = self.exchanged(request.lora_request, scale)
        if request.lora_request is None or not (invocation := invocation_of(request.lora_request)):
            return
        if request.prompt_token_ids is None or request.resumable:
            raise PrefixMemoryError(
                "A memory that speaks from an invocation on needs a prompt of tokens that is given as a whole."
            )
        if place_in(request.prompt_token_ids, invocation) != NEVER:
            return
        adapter, missing = request.lora_request, f"The invocation tokens {list(invocation)} are missing in the prompt"
        if _is_strict(adapter.lora_path):
            raise PrefixMemoryError(
                f"{missing}, and the memory has strict_invocation set. Write the prompt with the chat template that it "
                "was trained with."
            )
        if adapter.lora_int_id not in self._missed:
            self._missed.add(adapter.lora_int_id)
            name = adapter.lora_name.rpartition(OF_CONTENT)[0]
            logger.warning("%s: the base model answers, not the memory %r. This is said once.", missing, name)


def keys_of_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's keys of a cached block, but that a memory is known by its contents, and that blocks before it speaks have
    the base model's."""

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, following = original(request, start_token_idx, end_token_idx, start_mm_idx)
        adapter = request.lora_request
        if keys is None or adapter is None or OF_CONTENT not in adapter.lora_name or not _is_memory(adapter.lora_path):
            return keys, following
        rest = tuple(key for key in keys if key[0] != "lora")
        invocation = invocation_of(adapter)
        if invocation is not None:
            if getattr(request, "_memory_from", None) is None:
                request._memory_from = place_in(request.prompt_token_ids, invocation)
            if end_token_idx <= request._memory_from:
                return rest or None, following
        scale = scale_in(request.sampling_params)
        content, loud = adapter.lora_name.rpartition(OF_CONTENT)[2], "" if scale is None else repr(float(scale))
        return (("lora", content, loud), *rest), following

    return generate_block_hash_extra_keys


def scale_in(sampling: Any) -> float | None:
    """The scale that a request's sampling parameters ask for; ``None``: the memory's own.

    Raises:
        PrefixMemoryError: they ask for something else of a memory.
    """
    extra: dict[str, Any] = getattr(sampling, "extra_args", None) or {}
    unknown = next((name for name in extra if str(name).startswith("memory_") and name != SCALE), None)
    if unknown is not None:
        raise PrefixMemoryError(f"{unknown} is no option of a memory.{did_you_mean(str(unknown), [SCALE])}")
    return extra.get(SCALE)


def place_in(prompt: list[int], invocation: tuple[int, ...]) -> int:
    """The number of the first token on which a memory speaks, as in training; ``NEVER``: it stays silent."""
    return int(speaking(torch.tensor([prompt]), invocation)[1])


def invocation_of(adapter: LoRARequest | None) -> tuple[int, ...] | None:
    """The tokens from whose last occurrence on an exchanged adapter speaks; ``None``: it speaks everywhere."""
    if adapter is None or not _is_memory(adapter.lora_path):
        return None
    return _invocation_at(adapter.lora_path)


# What lies in a copy does not change; a path may be asked for once a token.
@lru_cache(maxsize=4096)
def _is_memory(path: str) -> bool:
    return is_memory(Path(path))


@lru_cache(maxsize=4096)
def _invocation_at(path: str) -> tuple[int, ...] | None:
    tokens = read_config(Path(path)).invocation_tokens
    return tuple(tokens) if tokens else None


@lru_cache(maxsize=4096)
def _is_strict(path: str) -> bool:
    return read_config(Path(path)).strict_invocation


@dataclass(frozen=True)
class Speech:
    """How the memory of a request speaks.

    Attributes:
        first: the number of the first token on which it does.
        scale: another one than its own; ``None``: its own.
    """

    first: int = 0
    scale: float | None = None


#: From the start, at the memory's own scale; no memory at all, too.
PLAIN = Speech()


def speech_of(adapter: LoRARequest | None, prompt: list[int] | None, sampling: Any) -> Speech:
    """How the memory of an exchanged request speaks, from its prompt and sampling parameters."""
    if adapter is None or not _is_memory(adapter.lora_path):
        return PLAIN
    invocation = _invocation_at(adapter.lora_path)
    return Speech(0 if invocation is None else place_in(prompt or [], invocation), scale_in(sampling))


class Marked(tuple[int, ...]):
    """The number of each token's adapter, as vLLM's runners hand them on, and what they do not know of a memory.

    Attributes:
        silent: bool ``[tokens]``, where none speaks; ``None``: nowhere.
        scales: ``[tokens]``, the scale asked for, NaN: the memory's own; ``None``: NaN everywhere.
    """

    silent: np.ndarray | None = None
    scales: np.ndarray | None = None


def marked(adapters: tuple[int, ...], speeches: Sequence[Speech], computed: Any, scheduled: Any) -> Marked:
    """Mark the tokens of a step.

    Args:
        adapters: the number of each token's adapter.
        speeches: of each request.
        computed: how many tokens of each are computed already.
        scheduled: how many of each are in this step.
    """
    found = Marked(adapters)
    if any([speech.first for speech in speeches]):
        silent = [np.arange(before, before + count) < speech.first
                  for speech, before, count in zip(speeches, computed, scheduled, strict=True)]  # fmt: skip
        found.silent = np.concatenate(silent)
    if any([speech.scale is not None for speech in speeches]):
        scales = [np.nan if speech.scale is None else speech.scale for speech in speeches]
        found.scales = np.repeat(np.array(scales, dtype=np.float32), scheduled)
    return found
