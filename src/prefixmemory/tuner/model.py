"""PrefixMemoryModel: the PEFT lifecycle of memories."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from prefixmemory.attention.discovery import find_site, find_sites, in_encoder, left_out, skipped_attention
from prefixmemory.attention.feed_forward import FeedForwardSite, feed_forward_site, find_feed_forward
from prefixmemory.attention.interface import check_inside, check_interface, install_tap
from prefixmemory.attention.sites import CHILD, AttentionSite
from prefixmemory.errors import PrefixMemoryError, check_choice, did_you_mean
from prefixmemory.memories import checkpoint
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.registry import AUTO, MemorySite, check_start, is_inside, queries_of
from prefixmemory.models.quantization import keep_trainable
from prefixmemory.tuner import weighted_adapter
from prefixmemory.tuner.activation import PACKED, activation, generating
from prefixmemory.tuner.calibration import FirstBatch
from prefixmemory.tuner.calls import RowAdapters, model_call, row_adapters, thread
from prefixmemory.tuner.discarding import discard
from prefixmemory.tuner.in_attention import InAttention
from prefixmemory.tuner.in_feed_forward import InFeedForward
from prefixmemory.tuner.layer import BASE_MODEL, WHY_NOT_MERGED, PrefixMemoryLayer
from prefixmemory.tuner.layers import attention_layers, check_intact, listen, memory_layers, named_modules, set_scale
from prefixmemory.tuner.offloading import put_aside, put_back
from prefixmemory.tuner.targets import (
    check_adapter_name,
    check_targets,
    forget_found,
    is_target,
    note_found,
    shortest_names,
)
from prefixmemory.tuner.tensor_names import bare, embeddings_of, stored_name, tensors_of, unwrapped
from prefixmemory.tuner.tensor_parallel import HeadShare, head_share, same_start

logger = logging.getLogger(__name__)

#: Why a memory that does not speak from the start has no place there.
ENCODER = "it belongs to the encoder, and from where a memory speaks is counted in the decoder"


class PrefixMemoryModel(BaseTuner):
    """A base model with memories. Made by ``get_peft_model``; methods are reachable on the ``PeftModel``."""

    prefix = "prefix_memory_"
    tuner_layer_cls = PrefixMemoryLayer
    peft_config: dict[str, PrefixMemoryConfig]

    # Creating

    def _prepare_adapter_config(
        self, peft_config: PrefixMemoryConfig, model_config: dict[str, Any]
    ) -> PrefixMemoryConfig:
        """Check the config against the live model before anything is added to it, and fill in what it left open."""
        replace(peft_config)  # values may have been set since it was made
        forget_found(peft_config)
        present, targets = checkpoint.fingerprint(self.model), peft_config.target_modules
        saved = peft_config.base_model_fingerprint
        if saved is None:
            peft_config.base_model_fingerprint = present
        elif present is not None and not checkpoint.same_base_model(saved, present):
            raise PrefixMemoryError(
                f"This adapter was made for another base model ({peft_config.base_model_name_or_path!r}), not for this "
                f"{type(self.model).__name__} ({getattr(self.model, 'name_or_path', '')!r}). Load that model; to use "
                "the adapter here all the same, pass a config with base_model_fingerprint=None."
            )
        if peft_config.active_from != "start" and peft_config.invocation_tokens is None:
            asked = peft_config.active_from
            place = "question" if asked == AUTO else asked
            raise PrefixMemoryError(
                f"active_from={asked!r} says where, and a recipe finds the tokens there; elsewhere give "
                f"active_from={place!r} and invocation_tokens: prefixmemory.invocation_tokens({place!r}, tokenizer) "
                "finds them."
            )
        attention = find_sites(self.model)
        feed_forward = {} if peft_config.feed_forward is None else find_feed_forward(self.model, attention)
        sites = {**attention, **feed_forward}
        if peft_config.target_modules is None:
            others = left_out(self.model, sites)
            if peft_config.active_from != "start":
                others |= dict.fromkeys(in_encoder(self.model, sites), ENCODER)
            chosen = [name for name in sites if name not in others]
            peft_config.target_modules = shortest_names(chosen, self.model)
            in_attention = [name for name in chosen if name in attention]
            others = {name: reason for name, reason in others.items() if name in attention}
            for name, reason in skipped_attention(self.model, in_attention, others).items():
                logger.warning("No memory in %s: %s.", name, reason)
        check_targets(peft_config, attention, feed_forward, self.model)
        note_found(peft_config, base_model_fingerprint=saved, target_modules=targets)
        keep_trainable(self.model, inference=bool(peft_config.inference_mode))
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PrefixMemoryConfig, key: str) -> Any:
        return is_target(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: PrefixMemoryConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = getattr(target, CHILD, None)
        site = find_site(target) if layer is None else layer.site
        if site is None and peft_config.feed_forward is not None:
            site = feed_forward_site(target, parent, target_name)
        if isinstance(site, FeedForwardSite) and peft_config.feed_forward is None:
            site = None
        if site is None:  # state_dict= may name any module
            raise PrefixMemoryError(
                f"{current_key} is not a softmax attention: the tensors were made for another model, or for a config "
                "with feed_forward."
            )
        encodes = bool(in_encoder(self.model, [current_key]))
        if encodes and peft_config.active_from != "start":
            discard(self.model, adapter_name)
            raise PrefixMemoryError(
                f"active_from={peft_config.active_from!r} cannot be had in {current_key}: {ENCODER}. Leave it out of "
                "target_modules, or use active_from='start'."
            )
        try:  # before anything is attached: the memory may be refused, and takes the half-made adapter with it
            share = self._share(current_key, site) if layer is None else layer.share
            place = self._place(site, adapter_name, layer)
            own = peft_config.of_module(current_key, isinstance(site, FeedForwardSite))
            memory = own.kind.build(own, place)
            if not own.kind.says("is_builtin"):
                others = (parameter for other in memory_layers(self.model) for parameter in other.parameters())
                check_start(own.kind, memory, place, others)
            if share is not None:
                share.check(memory, own.mixing)
            inside = is_inside(memory)
            if isinstance(site, AttentionSite) and (inside or "rotary" in queries_of(memory, own.query)):
                check_inside(current_key, site) if inside else check_interface(current_key, site, "query='rotary'")
                install_tap()
        except PrefixMemoryError:
            discard(self.model, adapter_name)
            raise
        if layer is None:
            layer = InFeedForward(site) if isinstance(site, FeedForwardSite) else InAttention(site, share)
            layer.in_encoder = encodes
        layer.update_layer(adapter_name, memory, own, place)

    def _share(self, name: str, site: AttentionSite | FeedForwardSite) -> HeadShare | None:
        if isinstance(site, AttentionSite):
            return head_share(self.model, name, site)
        if (getattr(self.model, "_tp_size", None) or 1) > 1:
            raise PrefixMemoryError(
                f"{name} may be divided among tensor-parallel processes, where a memory of feed-forward blocks cannot "
                "be read. Leave feed_forward out, or load the model without tp_plan."
            )
        return None

    def _place(
        self, site: AttentionSite | FeedForwardSite, adapter_name: str, layer: PrefixMemoryLayer | None
    ) -> MemorySite:
        """What the class of a memory is told of ``site``."""
        if isinstance(site, FeedForwardSite):
            return MemorySite(1, 1, site.reads, site.returns)
        layers = attention_layers(self.model)
        holders = (other for other in layers if adapter_name in other.prefix_memory_bank)
        holder = next(holders, None)
        first = () if holder is None or holder is layer else (holder.memory(adapter_name),)
        return MemorySite(site.heads, site.kv_heads, site.head_dim, site.value_dim, site.scaling, first)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in PEFT. ``state_dict`` may say which attention modules are targeted."""
        if state_dict is not None:
            # PEFT takes what stands before ".prefix_memory_" for the targeted module; ours is one level up.
            inner, outer = f".{CHILD}.{self.prefix}", f".{self.prefix}"
            state_dict = {key.replace(inner, outer): value for key, value in state_dict.items()}
        check_adapter_name(adapter_name, self.model)
        super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        listen(self.model)
        layers = self._layers_of(adapter_name)
        same_start(self.model, (layer.memory(adapter_name) for layer in layers))
        if any(getattr(layer.memory(adapter_name), "mean", None) is not None for layer in layers):
            FirstBatch(self.model, adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT, whose own walks through all modules twice, those of adapters that rest among them.

        Raises:
            PrefixMemoryError: there is no adapter of that name.
        """
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            if name not in self.peft_config:
                hint = did_you_mean(name, self.peft_config)
                raise PrefixMemoryError(f"There is no adapter {name!r}.{hint} Loaded: {', '.join(self.peft_config)}.")
        if any(isinstance(module, AuxiliaryTrainingWrapper) for _, module in named_modules(self.model)):
            super().set_adapter(adapter_name, inference_mode)
            return
        for layer in memory_layers(self.model):
            layer.set_adapter(adapter_name, inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT, whose layers each choose what is active behind an active one: the whole model has one answer."""
        left = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            self.set_adapter(left or [*self.peft_config][:1])

    # Running

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT opens this around forward and generate; here ``adapter_names=`` picks an adapter for each row."""
        names: Sequence[str] | None = kwargs.get("adapter_names")
        if names is None:
            with self._said(kwargs), model_call(None):
                yield
            return
        if self.model.training:
            raise PrefixMemoryError(
                "adapter_names cannot be given in training mode: gradient checkpointing would recompute without it. "
                "Call model.eval() first."
            )
        layers = memory_layers(self.model)
        known = {name for layer in layers for name in layer.prefix_memory_bank} | {BASE_MODEL}
        for name in names:
            if name not in known:
                raise PrefixMemoryError(
                    f"adapter_names has {name!r}, which is not loaded.{did_you_mean(name, known)} "
                    f"Loaded: {', '.join(sorted(known))}."
                )
        for module in self.model.modules():
            hooks = module._forward_pre_hooks  # it stays there: other threads may be calling
            if isinstance(module, AuxiliaryTrainingWrapper) and _pass_adapter_names not in hooks.values():
                module.register_forward_pre_hook(_pass_adapter_names, with_kwargs=True)
        rows = RowAdapters(names, layers)
        self._check_rows(rows, args, kwargs)  # PeftModel itself calls the base model past our forward
        with self._said(kwargs), model_call(rows):
            yield

    def _said(self, kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """``active`` of a call, said before the base model begins: where that is compiled, each of its frames forgets
        what it was told when it ends."""
        active = kwargs.get("active")
        return nullcontext() if active is None else activation(active)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass; with ``adapter_names``, their number must be that of the rows."""
        if (rows := row_adapters()) is not None:
            self._check_rows(rows, args, kwargs)
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, active: Tensor | Sequence[int] | None = None, **kwargs: Any) -> Any:
        """The base model's generation; with ``adapter_names``, beams and return sequences share their row's.

        ``active`` says on which tokens memories speak, see :func:`prefixmemory.activation`.
        """
        if (rows := row_adapters()) is not None:
            self._check_rows(rows, args, kwargs)
            rows.beams = self._rows_per_prompt(args[1] if len(args) > 1 else kwargs.get("generation_config"), kwargs)
        model, layers = cast(Any, self.model), memory_layers(self.model)
        given = (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"))
        prompt = next((value for value in given if value is not None), None)
        with ExitStack() as stack:
            if active is not None:
                stack.enter_context(activation(active))
            elif layers and not model.config.is_encoder_decoder and isinstance(prompt, Tensor) and prompt.ndim == 2:
                stack.enter_context(generating(layers[0].listener, prompt))
            return model.generate(*args, **kwargs)

    def _check_rows(self, rows: RowAdapters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a batch that has another number of rows than there are names."""
        names = ("input_ids", "inputs_embeds", "inputs", getattr(self.model, "main_input_name", "input_ids"))
        given = (*args[:1], *(kwargs.get(name) for name in names))
        batch = next((value.shape[0] for value in given if isinstance(value, Tensor) and value.ndim), None)
        if batch is not None:
            rows.check(batch)

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: Any = None,
        continuous_batching_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' continuous batching, which only logs what a forward pass raises: so it is refused before.

        Raises:
            PrefixMemoryError: an adapter for each row, a memory that does not speak from the start, or flash attention
                with a prefix inside the softmax.
        """
        plans = [layer.plan(None) for layer in memory_layers(self.model)]
        waiting = any(plan is not None and plan.waiting for plan in plans)
        if waiting or thread.given is not None or kwargs.pop("active", None) is not None:
            raise PrefixMemoryError(PACKED)
        if kwargs.get("adapter_names") is not None:
            raise PrefixMemoryError(
                "generate_batch packs all requests into one row, which has one adapter. Call it once for each adapter, "
                "after set_adapter, or give adapter_names to generate."
            )
        if any(config.placement == "inside" for config in self.peft_config.values()):
            if "flash" in cast(Any, self.model).config._attn_implementation:
                raise PrefixMemoryError(
                    "generate_batch with flash attention packs requests where a prefix inside the softmax cannot be "
                    "put before each. Call set_attn_implementation('sdpa') first."
                )
            from transformers import ContinuousBatchingConfig

            continuous_batching_config = deepcopy(continuous_batching_config) or ContinuousBatchingConfig()
            continuous_batching_config.auto_switch_to_flash = False
        return cast(Any, self.model).generate_batch(inputs, generation_config, continuous_batching_config, **kwargs)

    def _rows_per_prompt(self, given: Any, kwargs: dict[str, Any]) -> int:
        """How many rows generate() makes of each row that it is given, with the generation config ``given``."""
        own = getattr(self.model, "generation_config", None)

        def asked(name: str) -> int:
            return kwargs.get(name) or getattr(given, name, None) or getattr(own, name, None) or 1

        return max(asked("num_beams"), asked("num_return_sequences"))

    def set_scale(self, scale: float, adapter_name: str | None = None) -> None:
        """See :func:`prefixmemory.set_scale`."""
        set_scale(self.model, scale, adapter_name)

    # Combining

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter with the memory Σ wₙ·scaleₙ·Mₙ. Weights may be negative.

        Without an ``output_limit`` its output is exactly the weighted sum of theirs, since the read is linear in M.
        With one, which must be the same for all, the output of the summed memory is limited as one: it is not the
        sum of the limited outputs (``set_adapter([...])`` gives that). A scale that all share stays a scale, after
        the limit; scales that differ are multiplied into the memories, before it.

        Low-rank memories keep their factors: their ranks add up. So nothing is approximated, and PEFT's other
        ``combination_type``s, which do, are refused.

        Raises:
            PrefixMemoryError: another ``combination_type``, an adapter is not loaded, the name is taken, or the
                adapters read different features or have different limits (then they have no common sum; activate them
                together with ``set_adapter([...])`` instead).
        """
        check_choice("combination_type", combination_type, ("linear",))
        for name in adapters:
            if name not in self.peft_config:
                raise PrefixMemoryError(
                    f"There is no adapter {name!r}.{did_you_mean(name, self.peft_config)} "
                    f"Loaded: {', '.join(self.peft_config)}."
                )
        if adapter_name in self.peft_config:
            raise PrefixMemoryError(f"The adapter name {adapter_name!r} is taken. Delete it first, or choose another.")
        if not adapters or len(adapters) != len(weights):
            raise PrefixMemoryError(f"Got {len(adapters)} adapters and {len(weights)} weights: give one weight each.")
        configs = [self.peft_config[name] for name in adapters]
        weighted_adapter.check(adapters, configs, [self._layers_of(name) for name in adapters])

        config = deepcopy(configs[0])
        ranks = [c.rank for c in configs]
        config.rank = None if None in ranks else sum(cast(list[int], ranks))
        if config.feed_forward is not None:
            config.feed_forward = sum(cast(int, c.feed_forward) for c in configs)
        # One common scale stays a scale, so that the sum of one adapter with weight 1 is that adapter, bit for bit.
        scales = [self._layers_of(name)[0].scale[name] for name in adapters]
        config.scale = scales[0] if len(set(scales)) == 1 else 1.0
        factors = [w * (1.0 if s == config.scale else s) for w, s in zip(weights, scales, strict=True)]
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        try:
            for layer in self._layers_of(adapter_name):
                summed = cast(Any, layer.memory(adapter_name))
                summed.set_to_sum([layer.memory(name) for name in adapters], factors)
        except Exception:
            discard(self.model, adapter_name)
            raise

    def _layers_of(self, adapter_name: str) -> list[PrefixMemoryLayer]:
        return [layer for layer in memory_layers(self.model) if adapter_name in layer.prefix_memory_bank]

    # Taking away

    def _check_merge_allowed(self) -> None:
        raise PrefixMemoryError(WHY_NOT_MERGED)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for layer in memory_layers(self.model):
            layer.detach()
        # What is left are PEFT's own wrappers around modules_to_save: with none active, they give back the original.
        for module in self.model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                module.set_adapter([])
        return cast(nn.Module, super()._unload_and_optionally_merge(merge=False, **kwargs))

    # Saving and loading

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        stored = stored_name(key, adapter_name)
        return key if stored is None else unwrapped(stored)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PrefixMemoryConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """The memories among the tensors of a model. PEFT goes by the names of modules, which have ``WRAPPER``.

        Raises:
            PrefixMemoryError: the tensors hold some of the adapter's, and lack others.
        """
        check_intact(model)
        found = {key: tensor for key, tensor in state_dict.items() if stored_name(key, adapter_name) is not None}
        missing = tensors_of(model, adapter_name).keys() - {
            bare(stored_name(key, adapter_name) or key) for key in found
        }
        if found and missing:  # a process that does not write has none
            raise PrefixMemoryError(
                f"{min(missing)} is not among the tensors that are to be saved. Under DeepSpeed ZeRO-3, make the model "
                "after TrainingArguments or Accelerator; in a loop of your own, let every process call "
                "model.save_pretrained(folder, state_dict=accelerator.get_state_dict(model), is_main_process=...)."
            )
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PrefixMemoryConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """As in PEFT, after checking that the checkpoint is this adapter's: no key missing, extra or misshapen.

        A refused checkpoint takes its half-made adapter with it, so that the model stays as it was.
        """
        own = tensors_of(model, adapter_name)
        others: set[str] = set()
        embeddings = embeddings_of(model) if config.resized_vocabulary else []  # PEFT saves them then
        for path, module in model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) or module in embeddings:  # saved in full, or some rows
                others |= {bare(f"{path}.{name}") for name, _ in module.named_parameters()}
        try:
            found = {bare(key): tensor for key, tensor in state_dict.items()}
            expected = {stored: tensor for stored, (_, tensor) in own.items()}
            checkpoint.check_state_dict(found, expected, also_known=others)
        except PrefixMemoryError:
            if config.awaits_weights:  # an adapter that was there before stays
                discard(model, adapter_name)
            raise
        config.awaits_weights = False
        loaded = {own[bare(key)][0] if bare(key) in own else key: tensor for key, tensor in state_dict.items()}
        put_aside(model, loaded)
        return loaded

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in PEFT, which calls this last when it loads an adapter."""
        put_back(self.model)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)


def _pass_adapter_names(
    module: AuxiliaryTrainingWrapper, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tell a module saved in full which adapter each row uses; adapters without their own copy use the original."""
    rows = row_adapters()
    if rows is None:
        return None
    own = [name if name in module._adapters else BASE_MODEL for name in rows.names]
    return args, {**kwargs, "adapter_names": [n for n in own for _ in range(args[0].shape[0] // len(own))]}
