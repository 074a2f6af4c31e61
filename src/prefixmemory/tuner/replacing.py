"""Loading an adapter over one that is there: ``load_adapter`` under a taken name, and PEFT's ``hotswap_adapter``.

Both keep the config and take new weights, so that the configs must be the same. Tensors are copied in place, means
included: a compiled model follows them without being compiled again.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, cast

import peft.utils.hotswap
import torch
from peft import PeftConfig, PeftModel
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.memories.checkpoint import check_state_dict, same_base_model
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.peft_type import PREFIX_MEMORY
from prefixmemory.tuner import weighted_adapter
from prefixmemory.tuner.discarding import discard
from prefixmemory.tuner.layers import memory_layers
from prefixmemory.tuner.model import PrefixMemoryModel
from prefixmemory.tuner.tensor_names import stored_name, tensors_of

#: What would change the answers of the same weights.
FIELDS = (
    "rank_pattern", "scale_pattern", "output_limit_pattern", "trainable_token_indices",
    "modules_to_save", "feed_forward", "mixing", "mix", *weighted_adapter.FIELDS, "rank", "scale",
)  # fmt: skip


def check_same_config(present: PrefixMemoryConfig, new: PrefixMemoryConfig, adapter_name: str) -> None:
    """Refuse weights whose config is not that of the adapter which is to take them.

    Raises:
        PrefixMemoryError: names the first difference.
    """
    # PeftModel.from_pretrained, which was given this config, or has just read it
    if present.awaits_weights and present.weights_sha256 == new.weights_sha256:
        return
    instead = f"Load it under another name, or delete_adapter({adapter_name!r}) first."
    cannot = f"The new adapter cannot be loaded over the adapter {adapter_name!r}"
    for name in FIELDS:
        ours, theirs = getattr(present, name), getattr(new, name)
        if name == "modules_to_save":  # PEFT lists the head of a classifier twice
            ours, theirs = sorted(set(ours or ())), sorted(set(theirs or ()))
        if ours != theirs:
            raise PrefixMemoryError(f"{cannot}: {name} is {theirs!r} there and {ours!r} here. {instead}")
    here, there = present.base_model_fingerprint, new.base_model_fingerprint
    if here is not None and there is not None and not same_base_model(there, here):
        raise PrefixMemoryError(
            f"{cannot}: it was made for another base model ({new.base_model_name_or_path!r}). Load that model first."
        )


def check_on_load() -> None:
    """Let ``PeftModel.load_adapter`` compare configs; it reads the new one only for a new name."""
    original = PeftModel.load_adapter

    @wraps(original)
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        present = self.peft_config.get(adapter_name)
        if isinstance(present, PrefixMemoryConfig):
            options, _ = self._split_kwargs(kwargs)
            check_same_config(present, PrefixMemoryConfig.from_pretrained(model_id, **options), adapter_name)
        return original(self, model_id, adapter_name, *args, **kwargs)

    PeftModel.load_adapter = load_adapter


def check_on_load_by_transformers() -> None:
    """Let ``load_adapter`` of transformers' models refuse what PEFT's refuses: by itself it reports, if anything."""
    original = PeftAdapterMixin.load_adapter

    @wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        present = set(getattr(self, "peft_config", ()))
        active = [(layer, cast(Any, layer).active_adapters[:]) for layer in memory_layers(self)]
        learned = any(parameter.requires_grad for layer, _ in active for parameter in layer.parameters())

        def new() -> list[str]:
            configs = getattr(self, "peft_config", {})
            return [n for n in configs if n not in present and isinstance(configs[n], PrefixMemoryConfig)]

        try:
            info = original(self, *args, **kwargs)
            for name in new():
                _check_loaded(self, name, info)
                self.peft_config[name].awaits_weights = False
        except BaseException:  # its half-made adapter goes, and what was active is so again
            for layer, names in active:
                if layer.active_adapters != names:
                    layer.set_adapter(names, inference_mode=not learned)
            for name in new():
                discard(self, name)
            self._hf_peft_config_loaded = bool(getattr(self, "peft_config", None))
            raise
        return info

    cast(Any, PeftAdapterMixin).load_adapter = load_adapter


def _check_loaded(model: nn.Module, adapter_name: str, info: Any) -> None:
    """Refuse an adapter by what transformers says of its loading."""
    own = tensors_of(model, adapter_name)
    lost = info.missing_keys | {key for key, *_ in info.mismatched_keys}
    found = {stored: tensor for stored, (key, tensor) in own.items() if key not in lost}
    found |= {stored_name(key, adapter_name) or key: torch.empty(0) for key in info.unexpected_keys}
    check_state_dict(found, {stored: tensor for stored, (_, tensor) in own.items()}, also_known=())


def teach_hotswap() -> None:
    """Let ``hotswap_adapter`` swap memories."""
    hotswap: Any = peft.utils.hotswap
    hotswap.CONFIG_KEYS_TO_CHECK[PREFIX_MEMORY] = []  # it looks at the active adapter's; ours are checked below
    swap, prepare = hotswap.hotswap_adapter_from_state_dict, hotswap._convert_scalings_to_tensor

    @wraps(swap)
    def hotswap_adapter_from_state_dict(
        model: nn.Module,
        state_dict: dict[str, Tensor],
        adapter_name: str,
        config: PeftConfig,
        parameter_prefix: str = "lora_",
    ) -> None:
        if not isinstance(config, PrefixMemoryConfig):
            swap(model, state_dict, adapter_name, config, parameter_prefix)
            return
        model = getattr(model, "_orig_mod", model)  # compiled
        adapters: dict[str, PeftConfig] = model.peft_config  # type: ignore[assignment]
        present = adapters.get(adapter_name)
        if not isinstance(present, PrefixMemoryConfig):
            raise PrefixMemoryError(
                f"There is no memory {adapter_name!r} to swap.{did_you_mean(adapter_name, adapters)} "
                f"Loaded: {', '.join(adapters)}."
            )
        check_same_config(present, config, adapter_name)
        bare = PrefixMemoryModel._remove_adapter_name_from_key
        set_peft_model_state_dict(model, {bare(k, adapter_name): t for k, t in state_dict.items()}, adapter_name)

    @wraps(prepare)
    def convert_scalings_to_tensor(model: nn.Module) -> bool:
        found = bool(prepare(model))
        if not found and memory_layers(model):
            raise PrefixMemoryError(
                "Memories need no prepare_model_for_compiled_hotswap, and cannot be padded to another rank: "
                "hotswap_adapter takes adapters of the same config. Leave the call out."
            )
        return found

    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict
    hotswap._convert_scalings_to_tensor = convert_scalings_to_tensor
