"""Turning one context method into another: along the paper's path, and from PEFT's Prefix-Tuning.

Each function adds an adapter to a model that then has it loaded like any other: ``save_pretrained`` saves it,
``PeftModel.from_pretrained`` loads it, and training goes on from it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixmemory._shapes import Float
from prefixmemory.attention.interface import OBSERVERS
from prefixmemory.errors import PrefixMemoryError, did_you_mean
from prefixmemory.memories.checkpoint import check_config_file
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.matrix import MatrixMemory
from prefixmemory.memories.prefix import PrefixVectors
from prefixmemory.tuner.in_attention import InAttention
from prefixmemory.tuner.in_feed_forward import InFeedForward
from prefixmemory.tuner.layers import attention_layers, memory_layers

# Along the path: step 1 or 2 -> step 3 -> step 4


@torch.no_grad()
def kernel_from_prefix(model: PeftModel, adapter: str, new_adapter: str, feature_map: str = "elu") -> None:
    """Add ``new_adapter``: the same prefix vectors, read outside the softmax through a feature map (step 3).

    The output changes, since φ(q)·φ(k) is not exp(q·k/√D); it is a start for training. Vectors that were trained
    through an MLP are taken as they came out of it. A prefix inside the softmax was compared with rotated queries,
    and goes on being so.

    Args:
        model: holds ``adapter``.
        adapter: prefix vectors, inside the softmax or outside.
        new_adapter: name of the new adapter.
        feature_map: φ of the new adapter.

    Raises:
        PrefixMemoryError: ``adapter`` has no prefix vectors, or a name is wrong.
    """
    old = _prefix_config(model, adapter)
    inside = old.placement == "inside"
    config = replace(
        old,
        placement="outside",
        similarity="feature_map",
        feature_map=feature_map,
        query="rotary" if inside else old.query,
        reparameterize=None,
        feature_dim=old.feature_dim if feature_map == old.feature_map else None,
        output_limit=None if inside else old.output_limit,
        weights_sha256=None,
    )
    for source, target in _added(model, adapter, new_adapter, config):
        vectors, new = cast(PrefixVectors, source), cast(PrefixVectors, target)
        keys, values = vectors.vectors()
        new.keys.copy_(keys)
        new.values.copy_(values)


@torch.no_grad()
def memory_from_prefix(model: PeftModel, adapter: str, new_adapter: str, share_heads: bool = False) -> None:
    """Add ``new_adapter``: a free, full memory that starts at B of the kernel form, M = Σ_p φ(k_p)v_pᵀ (step 4).

    The output of the new memory is that of the kernel form without its normaliser: exactly the same where ``adapter``
    has ``normalizer=False``. For prefix vectors inside the softmax, or with an exact one, call
    :func:`kernel_from_prefix` first.

    Args:
        model: holds ``adapter``.
        adapter: prefix vectors in kernel form.
        new_adapter: name of the new adapter.
        share_heads: one memory per key/value group. ``False``: one per query head; those of a group start equal and
            may then go their own ways.

    Raises:
        PrefixMemoryError: ``adapter`` is not in kernel form, or a name is wrong.
    """
    old = _prefix_config(model, adapter)
    if old.similarity != "feature_map":
        raise PrefixMemoryError(
            f"Adapter {adapter!r} has similarity={old.similarity!r}, so it has no B for a memory to start at. Call "
            "kernel_from_prefix first, and convert the adapter that it adds."
        )
    config = replace(
        old, memory="auto", prefix_length=None, similarity=None, rank=None, normalizer=False, reparameterize=None,
        share_heads=share_heads, weights_sha256=None,
    )  # fmt: skip
    for source, target in _added(model, adapter, new_adapter, config):
        vectors, memory = cast(PrefixVectors, source), cast(MatrixMemory, target)
        repeat = memory.groups // vectors.groups
        memory.M.copy_(vectors.kernel()[0].repeat_interleave(repeat, dim=0))
        assert vectors.feature_map is not None
        parameters = vectors.feature_map.state_dict()  # one set per memory
        memory.feature_map.load_state_dict({n: p.repeat_interleave(repeat, dim=0) for n, p in parameters.items()})


def _prefix_config(model: PeftModel, adapter: str) -> PrefixMemoryConfig:
    config = model.peft_config.get(adapter)
    if config is None:
        raise PrefixMemoryError(
            f"There is no adapter {adapter!r}.{did_you_mean(adapter, model.peft_config)} "
            f"Loaded: {', '.join(model.peft_config)}."
        )
    if not isinstance(config, PrefixMemoryConfig) or config.prefix_length is None:
        raise PrefixMemoryError(
            f"Adapter {adapter!r} has no prefix vectors to convert. Give one with prefix_length, or convert a PEFT "
            "PREFIX_TUNING checkpoint with prefix_from_peft."
        )
    return config


def _added(
    model: PeftModel, adapter: str, new_adapter: str, config: PrefixMemoryConfig
) -> list[tuple[nn.Module, nn.Module]]:
    """Add ``new_adapter`` to the layers of ``adapter``; what each attention layer holds of both."""
    if new_adapter in model.peft_config:
        raise PrefixMemoryError(f"The adapter name {new_adapter!r} is taken. Delete it first, or choose another.")
    for name in ("modules_to_save", "trainable_token_indices"):
        if value := getattr(config, name):
            raise PrefixMemoryError(
                f"Adapter {adapter!r} has {name}={value!r}, which would not be converted. Convert an adapter without "
                "them."
            )
    model.add_adapter(new_adapter, config)
    layers = [layer for layer in memory_layers(model) if adapter in layer.prefix_memory_bank]
    for layer in layers:
        layer.set_scale(new_adapter, layer.scale[adapter])
        if adapter in layer.prefix_memory_mixing:
            layer.prefix_memory_mixing[new_adapter].load_state_dict(layer.prefix_memory_mixing[adapter].state_dict())
        if isinstance(layer, InFeedForward):  # stays as it is
            layer.memory(new_adapter).load_state_dict(layer.memory(adapter).state_dict())
    return [(layer.memory(adapter), layer.memory(new_adapter)) for layer in layers if isinstance(layer, InAttention)]


# From PEFT's Prefix-Tuning


@torch.no_grad()
def prefix_from_peft(
    source: str | os.PathLike[str] | PeftModel,
    base_model: PreTrainedModel,
    adapter: str = "default",
    shifted_positions: bool = False,
) -> PeftModel:
    """Give ``base_model`` the prefix of a PEFT ``PREFIX_TUNING`` adapter, as an adapter inside the softmax.

    PEFT passes the prefix as a cache, which moves the input p positions on; here it stays where it is. So where keys
    are rotated by position, the prefix's are turned back by p, and logits stay those of PEFT. That it is right is
    tried on ``base_model`` itself. A sliding window, which PEFT's prefix leaves when the text grows longer than it,
    never hides ours.

    Args:
        source: folder of a saved adapter, or a model that holds it. ``prefix_projection=True`` is read too: what the
            MLP makes of the embeddings is taken.
        base_model: the model that the prefix was trained for.
        adapter: its name in ``source``, if that is a model, and in the result.
        shifted_positions: copy the keys as they are; then logits are those of PEFT if every call is given
            ``position_ids`` that begin at p. The only way for models that learn a vector for each position.

    Returns:
        ``base_model`` with the adapter; ``save_pretrained`` saves it as any other.

    Raises:
        PrefixMemoryError: ``source`` is no PREFIX_TUNING adapter, its sizes are not those of ``base_model``, or the
            positions of ``base_model`` cannot be turned back.
    """
    config, flat, trained = _read_peft(source, adapter)
    if config.num_transformer_submodules != 1:
        raise PrefixMemoryError("A prefix of an encoder-decoder model cannot be converted: it holds two prefixes.")
    length, heads, layers = config.num_virtual_tokens, config.num_attention_heads, config.num_layers
    by_layer = flat.view(length, layers, 2, heads, -1).permute(1, 2, 3, 0, 4)  # [layers, 2, heads, length, dim]
    ours = PrefixMemoryConfig(
        task_type=config.task_type, placement="inside", prefix_length=length,
        modules_to_save=list(dict.fromkeys(config.modules_to_save or ())) or None,
    )  # fmt: skip
    model = cast(PeftModel, get_peft_model(base_model, ours, adapter_name=adapter))
    try:
        _check_sizes(model, by_layer)
        _take_modules(model, adapter, trained, _name(source))
        turned = None if shifted_positions else turns(model, length)
    except Exception:
        model.unload()
        raise
    for number, layer in enumerate(attention_layers(model)):
        memory = cast(PrefixVectors, layer.memory(adapter))
        keys, values = by_layer[number].to(memory.keys)
        memory.keys.copy_(keys if turned is None else turn_back(layer, keys, turned[number]))
        memory.values.copy_(values)
    return model


def _check_sizes(model: PeftModel, by_layer: Float[Tensor, "l two g p d"]) -> None:
    layers, _, heads, _, dim = by_layer.shape
    sites = [layer.site for layer in attention_layers(model)]
    if len(sites) != layers or {(s.kv_heads, s.head_dim, s.value_dim) for s in sites} != {(heads, dim, dim)}:
        raise PrefixMemoryError(
            f"The prefix has {layers} layers of {heads} key/value heads of size {dim}; "
            f"{type(model.get_base_model()).__name__} has {len(sites)} layers, the first of {sites[0].kv_heads} heads "
            f"of size {sites[0].head_dim}, or layers that differ. Give the model that the prefix was trained for."
        )


def _take_modules(model: PeftModel, adapter: str, trained: dict[str, Tensor], source: str) -> None:
    """Give ``model`` the modules of the base model that were trained beside the prefix, such as a head for classes."""
    base: Any = model.get_base_model()
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    for name, module in base.named_modules():
        is_trained = isinstance(module, ModulesToSaveWrapper)
        if not is_trained and module not in embeddings:
            continue
        start = f"base_model.{name}."
        state = {key.removeprefix(start): trained.pop(key) for key in list(trained) if key.startswith(start)}
        if is_trained and state:  # else PEFT's copy of what the base model has, where its vocabulary was resized
            try:
                module.modules_to_save[adapter].load_state_dict(state)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise PrefixMemoryError(
                    f"{source} holds another {name!r} than {type(base).__name__} ({reason}). Give the model that the "
                    "prefix was trained for."
                ) from error
    if trained:
        raise PrefixMemoryError(
            f"{source} holds {min(trained)!r}, which has no place in {type(base).__name__}. Give the model that the "
            "prefix was trained for."
        )


def _read_peft(
    source: str | os.PathLike[str] | PeftModel, adapter: str
) -> tuple[PrefixTuningConfig, Tensor, dict[str, Tensor]]:
    """The config, the prefix as PEFT lays it out: ``[length, layers * 2 * kv_heads * head_dim]``, and what was trained
    beside it."""
    config: Any
    if isinstance(source, PeftModel):
        config = source.peft_config.get(adapter)
    else:
        check_config_file(Path(source), any_method=True)
        config = PeftConfig.from_pretrained(str(source))
    if config is None or config.peft_type != PeftType.PREFIX_TUNING:
        found = "no adapter of this name" if config is None else f"peft_type={config.peft_type.value!r}"
        raise PrefixMemoryError(f"{adapter!r} of {_name(source)} has {found}, not 'PREFIX_TUNING'.")
    if isinstance(source, PeftModel):
        weights = get_peft_model_state_dict(source, adapter_name=adapter, save_embedding_layers=False)
    else:
        weights = load_peft_weights(str(source), device="cpu")
    if "prompt_embeddings" not in weights:
        raise PrefixMemoryError(f"{_name(source)} holds no prompt_embeddings. Copy it again from where it was saved.")
    prefix = weights.pop("prompt_embeddings")
    return config, prefix, weights


def _name(source: str | os.PathLike[str] | PeftModel) -> str:
    return type(source).__name__ if isinstance(source, PeftModel) else str(source)


Turn = tuple[Tensor, Tensor] | None


def turn_back(layer: InAttention, keys: Float[Tensor, "g p d"], turn: Turn) -> Float[Tensor, "g p d"]:
    """Keys as they were before the rotation ``turn``; ``None`` is no rotation."""
    if turn is None:
        return keys
    cos, sin = turn
    return cast(Tensor, _rotate(layer, keys[None], cos, -sin))[0].to(keys.dtype)


def turns(model: PeftModel, by: int) -> list[Turn]:
    """For every memory layer, the cosines and sines by which its attention turns a key that moves ``by`` positions.

    Found by looking: one token is run at position 0 and at position ``by``. Its keys must differ by that rotation and
    by nothing else.

    Raises:
        PrefixMemoryError: they do not.
    """
    layers = attention_layers(model)
    (start, _), (moved, embeddings) = (_look(model, layers, position) for position in (0, by))
    found: list[Turn] = []
    for number, layer in enumerate(layers):
        first, second = start[number], moved[number]
        if torch.equal(first, second):
            found.append(None)  # this layer does not know positions
            continue
        turn = _unit(embeddings[number])
        turned = None if turn is None else _rotate(layer, first, *turn)
        tolerance = max(1e-4, 8 * torch.finfo(second.dtype).eps) * float(second.abs().max())
        if turned is None or not torch.allclose(turned.to(second.dtype), second, atol=tolerance, rtol=0):
            raise PrefixMemoryError(
                f"{type(layer.site.core).__name__} does not rotate its keys by position, or not in a known way, "
                "so PEFT's prefix, which moves the input p positions on, has no equal here. Use "
                "shifted_positions=True, and give every call position_ids that begin at p."
            )
        found.append(turn)
    if all(turn is None for turn in found):
        raise PrefixMemoryError(
            f"The keys of {type(model.get_base_model()).__name__} are the same at every position: it is told positions "
            "by a bias on the scores, if at all, which PEFT's prefix takes part in and ours does not. It cannot be "
            "converted."
        )
    return found


def _unit(embeddings: Any) -> Turn:
    """Cosines and sines without the factor that some models put on them (YaRN, LongRoPE)."""
    if not (isinstance(embeddings, tuple) and len(embeddings) == 2 and all(isinstance(e, Tensor) for e in embeddings)):
        return None
    cos, sin = (e.float() for e in embeddings)
    size = torch.hypot(cos, sin)
    return cos / size, sin / size


def _rotate(layer: InAttention, keys: Float[Tensor, "1 g p d"], cos: Tensor, sin: Tensor) -> Tensor | None:
    """Keys turned by the function of the model's own file; ``None`` if it has none. Some turn the first part only."""
    apply = getattr(sys.modules[type(layer.site.core).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return None
    first, rest = keys.float().tensor_split([cos.shape[-1]], dim=-1)
    return torch.cat([apply(first, first, cos, sin)[1], rest.float()], dim=-1)


def _look(model: PeftModel, layers: list[InAttention], position: int) -> tuple[list[Tensor], list[Any]]:
    """The key of one token at a position as each layer's attention sees it, and the layer's cosines and sines."""
    keys: dict[Any, Tensor] = {}
    embeddings: dict[Any, Any] = {}

    def take_embeddings(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings[module] = kwargs.get("position_embeddings")

    def take_key(module: Any, query: Tensor, key: Tensor, *rest: Any) -> None:
        keys[module] = key

    cores = [layer.site.core for layer in layers]
    handles = [core.register_forward_pre_hook(take_embeddings, with_kwargs=True) for core in cores]
    device = model.get_base_model().get_input_embeddings().weight.device
    token, at = torch.full((1, 1), 3, device=device), torch.full((1, 1), position, device=device)
    was_training = model.training
    model.eval()
    OBSERVERS.append(take_key)
    try:
        with model.disable_adapter():
            model.get_base_model()(input_ids=token, position_ids=at, use_cache=False)
    finally:
        OBSERVERS.remove(take_key)
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [keys[core] for core in cores], [embeddings[core] for core in cores]
