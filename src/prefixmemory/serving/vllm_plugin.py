"""vLLM's entry point: ``prefixmemory`` in the group ``vllm.general_plugins``, called in every process of a server.

Nothing of vLLM is edited: its manager of LoRA models is replaced by one that holds memories too, and some of its
functions are wrapped (``NEEDED``). They are no public interface, so each is looked for by name and signature first, and
a version that has others is refused in one sentence.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, cast

from prefixmemory.errors import PrefixMemoryError

#: The versions that it was tested with.
TESTED = ("0.32",)
_MARK = "_by_prefixmemory"

#: What is replaced or wrapped: module, dotted name, and parameters that it must have.
NEEDED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._manager_cls", ()),
    ("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter", ("lora_request",)),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._create_lora_modules", ()),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._create_merged_loras_inplace", ("lora_model",)),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager._get_lora_layer_weights", ("lora_model", "module_name")),
    ("vllm.lora.model_manager", "LRUCacheLoRAModelManager.register_module", ("module_name", "module")),
    ("vllm.lora.layers", "BaseLayerWithLoRA.create_lora_weights", ("max_loras", "lora_config", "model_config")),
    ("vllm.lora.utils", "_all_lora_classes", ()),
    *(("vllm.model_executor.layers.linear", name, ())
      for name in ("LinearBase", "ColumnParallelLinear", "RowParallelLinear")),
    ("vllm.distributed", "tensor_model_parallel_all_reduce", ("input_",)),
    ("vllm.exceptions", "VLLMValidationError", ()),
    ("vllm.lora.resolver", "LoRAResolver.resolve_lora", ("base_model_name", "lora_name")),
    ("vllm.lora.utils", "get_adapter_absolute_path", ("lora_path",)),
    ("vllm.lora.utils", "replace_submodule", ("model", "module_name", "new_module")),
    ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin._set_active_loras",
     ("prompt_lora_mapping", "token_lora_mapping", "lora_requests", "mapping_type")),
    ("vllm.v1.worker.gpu_input_batch", "InputBatch.add_request", ("request",)),
    ("vllm.v1.worker.gpu_input_batch", "InputBatch.remove_request", ("req_id",)),
    ("vllm.v1.worker.gpu_input_batch", "InputBatch.make_lora_inputs", ("num_scheduled_tokens", "num_sampled_tokens")),
    ("vllm.v1.worker.gpu.lora_utils", "LoraState.remove_request", ("req_id",)),
    ("vllm.v1.worker.gpu.lora_utils", "LoraState.make_lora_inputs", ("req_ids", "idx_mapping", "num_scheduled_tokens")),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.add_requests", ("scheduler_output",)),
    ("vllm.v1.core.kv_cache_utils", "generate_block_hash_extra_keys",
     ("request", "start_token_idx", "end_token_idx", "start_mm_idx")),
    ("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", ("request_id", "prompt", "lora_request")),
    *((f"vllm.v1.engine.{module}", f"{owner}.{name}", parameters)
      for module, owner in (("llm_engine", "LLMEngine"), ("async_llm", "AsyncLLM"))
      for name, parameters in (("add_lora", ("lora_request",)), ("remove_lora", ("lora_id",)),
                               ("pin_lora", ("lora_id",)), ("list_loras", ()))),
    ("vllm.config.lora", "LoRAConfig.compute_hash", ()),
)  # fmt: skip


def register() -> None:
    """Teach vLLM memories; a second call does nothing.

    Raises:
        PrefixMemoryError: this version of vLLM is not one that it can be taught to.
    """
    import vllm

    if getattr(vllm, _MARK, False):
        return
    check_vllm(vllm.__version__)
    vllm.__dict__[_MARK] = True

    from vllm.lora import utils, worker_manager

    from prefixmemory.serving import vllm_blocks, vllm_layers, vllm_manager, vllm_resolver

    vllm_layers.register_operations()
    vllm_blocks.register_operation()
    known: Any = utils._all_lora_classes
    utils._all_lora_classes = type(known)([*known, vllm_layers.MemoryAttention])
    worker_manager.LRUCacheWorkerLoRAManager._manager_cls = vllm_manager.MemoryModelManager
    vllm_resolver.register_resolver()
    _wrap_worker()
    _wrap_runners()
    _wrap_intake()
    _wrap_cache()


def check_vllm(version: str) -> None:
    """Refuse a vLLM that lacks something of what is replaced or wrapped, or has it with other parameters.

    Raises:
        PrefixMemoryError: names the first such thing, and the versions that were tested.
    """
    for module, name, parameters in NEEDED:
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            problem = f"has no {module}.{name}"
        else:
            lacking = set(parameters) - set(inspect.signature(found).parameters) if parameters else ()
            problem = f"has {module}.{name} without the parameter {min(lacking)}" if lacking else ""
        if problem:
            raise PrefixMemoryError(
                f"prefixmemory cannot serve memories with vLLM {version}, which {problem}. It was tested with "
                f"{', '.join(TESTED)}: install one of these, or a newer prefixmemory; VLLM_PLUGINS='' serves without."
            )


def _wrapped(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, wraps(original)(make(original)))


def _wrap_worker() -> None:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager

    from prefixmemory._version import __version__
    from prefixmemory.serving.served import has_room_for_blocks
    from prefixmemory.serving.store import is_memory

    def load(original: Callable[..., Any]) -> Callable[..., Any]:
        def _load_adapter(self: Any, lora_request: Any) -> Any:
            folder = Path(get_adapter_absolute_path(lora_request.lora_path))
            if not is_memory(folder):
                return original(self, lora_request)
            return self._adapter_manager.load_memory(folder, lora_request.lora_int_id)

        return _load_adapter

    # what vLLM compiled without us is another graph
    def compute_hash(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self: f"{original(self)}-prefixmemory-{__version__}-{int(has_room_for_blocks())}"

    _wrapped(WorkerLoRAManager, "_load_adapter", load)
    _wrapped(LoRAConfig, "compute_hash", compute_hash)


def _wrap_runners() -> None:
    """Both of vLLM's model runners say which adapter each token has; from where on and how loud it speaks is added."""
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from prefixmemory.serving.vllm_manager import MemoryModelManager
    from prefixmemory.serving.vllm_requests import PLAIN, Speech, marked, speech_of

    def speeches_in(holder: Any) -> dict[str, Speech]:
        return cast(dict[str, Speech], holder.__dict__.setdefault("_memory_speeches", {}))

    def add_to_batch(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_request(self: Any, request: Any) -> Any:
            speech = speech_of(request.lora_request, request.prompt_token_ids, request.sampling_params)
            speeches_in(self)[request.req_id] = speech
            return original(self, request)

        return add_request

    def remove(original: Callable[..., Any]) -> Callable[..., Any]:
        def remove_request(self: Any, req_id: str) -> Any:
            speeches_in(self).pop(req_id, None)
            return original(self, req_id)

        return remove_request

    def of_batch(original: Callable[..., Any]) -> Callable[..., Any]:
        def make_lora_inputs(self: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any) -> Any:
            prompt, tokens, requests = original(self, num_scheduled_tokens, num_sampled_tokens)
            speeches = [speeches_in(self)[request] for request in self.req_ids]
            computed = self.num_computed_tokens_cpu[: len(speeches)]
            return prompt, marked(tokens, speeches, computed, num_scheduled_tokens), requests

        return make_lora_inputs

    def add_new(original: Callable[..., Any]) -> Callable[..., Any]:
        def add_requests(self: Any, scheduler_output: Any) -> None:
            original(self, scheduler_output)
            self.lora_state._memory_states = self.req_states
            for new in scheduler_output.scheduled_new_reqs:
                prompt = new.prefill_token_ids[: new.prompt_len]
                speeches_in(self.lora_state)[new.req_id] = speech_of(new.lora_request, prompt, new.sampling_params)

        return add_requests

    def of_state(original: Callable[..., Any]) -> Callable[..., Any]:
        def make_lora_inputs(self: Any, req_ids: Any, idx_mapping: Any, num_scheduled_tokens: Any) -> Any:
            prompt, tokens, requests = original(self, req_ids, idx_mapping, num_scheduled_tokens)
            speeches = [speeches_in(self).get(request, PLAIN) for request in req_ids]
            if all([speech == PLAIN for speech in speeches]):  # warming up, it has no states yet
                return prompt, tokens, requests
            computed = self._memory_states.num_computed_tokens_np[idx_mapping]
            return prompt, marked(tokens, speeches, computed, num_scheduled_tokens), requests

        return make_lora_inputs

    def activate(original: Callable[..., Any]) -> Callable[..., Any]:
        def _set_active_loras(
            self: Any, prompt_lora_mapping: Any, token_lora_mapping: Any, lora_requests: Any, *rest: Any, **named: Any
        ) -> None:
            original(self, prompt_lora_mapping, token_lora_mapping, lora_requests, *rest, **named)
            manager = self.lora_manager._adapter_manager
            if isinstance(manager, MemoryModelManager):
                marks = (getattr(token_lora_mapping, name, None) for name in ("silent", "scales"))
                manager.point(tuple(token_lora_mapping), *marks)

        return _set_active_loras

    _wrapped(InputBatch, "add_request", add_to_batch)
    _wrapped(InputBatch, "remove_request", remove)
    _wrapped(InputBatch, "make_lora_inputs", of_batch)
    _wrapped(GPUModelRunner, "add_requests", add_new)
    _wrapped(LoraState, "remove_request", remove)
    _wrapped(LoraState, "make_lora_inputs", of_state)
    _wrapped(LoRAModelRunnerMixin, "_set_active_loras", activate)


def _wrap_intake() -> None:
    """What takes requests in, before the engine has them: in the process that called, or that serves HTTP."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    from prefixmemory.serving.vllm_requests import Intake, RefusedRequest

    def intake_of(processor: Any) -> Intake:
        if "_memories" not in processor.__dict__:
            processor._memories = Intake(processor.vllm_config)
        return cast(Intake, processor.__dict__["_memories"])

    def process(original: Callable[..., Any]) -> Callable[..., Any]:
        def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            try:
                intake_of(self).take(request)
            except PrefixMemoryError as error:
                raise RefusedRequest(str(error)) from error
            return request

        return process_inputs

    def add(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, lora_request: original(self, intake_of(self.input_processor).exchanged(lora_request))

    def by_number(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, lora_id: original(self, intake_of(self.input_processor).numbers.get(lora_id, lora_id))

    def asked(self: Any, found: set[int]) -> set[int]:
        back = {number: name for name, number in intake_of(self.input_processor).numbers.items()}
        return {back.get(number, number) for number in found}

    def listed(original: Callable[..., Any]) -> Callable[..., Any]:
        if inspect.iscoroutinefunction(original):

            async def list_loras_async(self: Any) -> set[int]:
                return asked(self, await original(self))

            return list_loras_async
        return lambda self: asked(self, original(self))

    _wrapped(InputProcessor, "process_inputs", process)
    for owner in (LLMEngine, AsyncLLM):
        _wrapped(owner, "add_lora", add)
        _wrapped(owner, "remove_lora", by_number)
        _wrapped(owner, "pin_lora", by_number)
        _wrapped(owner, "list_loras", listed)


def _wrap_cache() -> None:
    from vllm.v1.core import kv_cache_utils

    from prefixmemory.serving.vllm_requests import keys_of_blocks

    original = kv_cache_utils.generate_block_hash_extra_keys
    keyed = wraps(original)(keys_of_blocks(original))
    for name, module in list(sys.modules.items()):  # those that imported it by name too
        if name.startswith("vllm.") and getattr(module, "generate_block_hash_extra_keys", None) is original:
            module.generate_block_hash_extra_keys = keyed  # type: ignore[attr-defined]
