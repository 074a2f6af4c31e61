"""Inside the softmax: prefix keys and values beside the input's, in every attention backend of transformers.

Step 1 of ``reference.py``. The prefix is prepended to keys and values when the attention function is called, after
rotation and after the cache was read, so that it never lies in a cache: gradient checkpointing, static caches, left
padding and several adapters in one batch need nothing of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from prefixmemory.attention import families
from prefixmemory.errors import PrefixMemoryError

#: Keywords of attention functions that hold something for every key, ``[batch or 1, heads or 1, queries, keys]``, which
#: is added to its score.
BIASES = ("position_bias",)
#: Keywords that number keys, as kernels for sparse attention take them.
KEY_NUMBERS = ("indices", "block_indices")


@dataclass(frozen=True)
class Prefix:
    """What is prepended to the input's keys and values.

    Attributes:
        keys, values: ``[1 or batch, kv_heads, length, dim]``.
        score_bias: ``[1 or batch, length]``, what is added to a prefix key's score: the logarithm of the adapter's
            scale, ``-inf`` where a row has no such key. ``None``: nothing.
        scaled: whether ``score_bias`` holds logarithms too; known without a look at its values, which the host would
            wait for, and a compiled graph break at.
    """

    keys: Tensor
    values: Tensor
    score_bias: Tensor | None
    scaled: bool

    @property
    def length(self) -> int:
        """Number of prefix vectors."""
        return self.keys.shape[2]


def prepend_prefix(
    prefix: Prefix,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    keywords: Mapping[str, Any],
    implementation: str,
) -> tuple[Tensor, Tensor, Any, dict[str, Any]]:
    """Keys, values, mask and keywords of an attention function with ``prefix`` prepended.

    Args:
        prefix: the prefix.
        module: the attention module, which says whether it is causal.
        query, key, value: as the attention function receives them, ``[batch, heads, tokens, dim]``.
        mask: as the attention function receives it: ``None``, ``[batch or 1, 1, queries, keys]`` (bool, or added to the
            scores), ``[batch, keys]`` (flash attention) or a ``BlockMask`` (flex attention).
        keywords: what else it receives. ``is_causal`` says what a mask of ``None`` means, else the module does; a bias
            for each key is 0 for the prefix's.
        implementation: transformers' name of the attention function.

    Raises:
        PrefixMemoryError: the attention function is told of keys in a way that leaves no place for a prefix.
    """
    for name in KEY_NUMBERS:
        if keywords.get(name) is not None:
            raise PrefixMemoryError(
                f"A prefix inside the softmax cannot stand before the sparse keys of {type(module).__name__} with "
                f"attn_implementation={implementation!r}, which is given their numbers. Use 'sdpa' or 'eager'."
            )
    window = keywords.get("sliding_window")
    if "flash" in implementation and window is not None and prefix.length + key.shape[2] > window:
        raise PrefixMemoryError(
            f"A prefix inside the softmax would be left behind by the sliding window of {window} tokens with "
            f"attn_implementation={implementation!r}, which counts the window by itself. Use 'sdpa' or 'eager'."
        )
    if "flash" in implementation and _packed(keywords):
        raise PrefixMemoryError(
            "A prefix inside the softmax cannot be put before each of several sequences that are packed into one row "
            f"with attn_implementation={implementation!r}, as continuous batching packs them. Use 'sdpa' or 'eager'."
        )
    keywords = dict(keywords)
    if (cache := keywords.pop("cache", None)) is not None:  # of continuous batching: the prefix must not lie in it
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=keywords)
    batch = key.shape[0]
    keys, values = _of_as_many_heads(prefix.keys, key, module), _of_as_many_heads(prefix.values, value, module)
    for name in BIASES:  # no comprehension: torch.compile 2.13 breaks the graph at a := in one
        if (bias := keywords.get(name)) is not None:
            nothing = bias.new_zeros(*bias.shape[:3], prefix.length)
            keywords[name] = torch.cat([nothing, bias.expand(-1, -1, -1, key.shape[2])], dim=3)
    if mask is None:
        mask = _made_explicit(prefix, module, query, key, keywords.get("is_causal"), implementation)
    return (
        torch.cat([keys.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2),
        torch.cat([values.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2),
        None if mask is None else _with_prefix(prefix, query, mask),
        keywords,
    )


def _packed(keywords: Mapping[str, Any]) -> bool:
    """Whether a row holds several sequences: their lengths are given, or positions begin again within it."""
    if keywords.get("cu_seq_lens_k") is not None:
        return True
    positions = keywords.get("position_ids")
    is_one_row = isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[0] == 1
    return is_one_row and bool((cast(Tensor, positions).diff(dim=-1) < 0).any())


def _of_as_many_heads(vectors: Tensor, like: Tensor, module: nn.Module) -> Tensor:
    """The prefix's keys or values for as many heads as the input's have, ``[1 or batch, heads, length, dim]``."""
    times, rest = divmod(like.shape[1], vectors.shape[1])
    if times == 1 and not rest:
        return vectors
    if rest or not families.HEADS_OF_EACH_EXPERT.match(type(module).__name__):
        raise PrefixMemoryError(
            f"{type(module).__name__} attends to keys of {like.shape[1]} heads where its prefix has "
            f"{vectors.shape[1]}. Its forward is not one that prefixmemory knows; exclude it with exclude_modules."
        )
    return vectors.repeat(1, times, 1, 1)


def _made_explicit(
    prefix: Prefix, module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, implementation: str
) -> Tensor | None:
    """What "no mask" means, as a mask: torch would count from the first key, which is the prefix's now."""
    counts_from_end = "flash" in implementation  # of a causal mask, the last query sees the last key
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    batch, queries, keys = key.shape[0], query.shape[2], key.shape[2]
    hides = causal and queries > 1 and "eager" not in implementation  # which never makes a mask by itself
    if prefix.score_bias is None and (not hides or counts_from_end):
        return None
    if counts_from_end:
        return torch.ones(batch, keys, dtype=torch.long, device=key.device)
    mask = query.new_zeros(1, 1, queries, keys)  # added to the scores, which every other function understands
    return mask.masked_fill(mask.new_ones(queries, keys).triu(1).bool(), torch.finfo(mask.dtype).min) if hides else mask


def _with_prefix(prefix: Prefix, query: Tensor, mask: Any) -> Any:
    if not isinstance(mask, Tensor):
        return _block_mask(prefix, mask)
    if mask.ndim == 2:
        return torch.cat([_present(prefix, mask.shape[0], mask.dtype), mask], dim=1)
    rows = max(mask.shape[0], 1 if prefix.score_bias is None else prefix.score_bias.shape[0])
    shape = (rows, *mask.shape[1:3], prefix.length)
    if mask.dtype == torch.bool:
        if prefix.score_bias is None:
            return torch.cat([mask.new_ones(shape), mask.expand(rows, -1, -1, -1)], dim=3)
        if not prefix.scaled:
            present = torch.isfinite(prefix.score_bias)[:, None, None, :].expand(shape)
            return torch.cat([present, mask.expand(rows, -1, -1, -1)], dim=3)
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, lowest)
    bias = mask.new_zeros(shape)
    if prefix.score_bias is not None:
        lowest = torch.finfo(mask.dtype).min
        bias = prefix.score_bias.to(mask.dtype).clamp(min=lowest)[:, None, None, :].expand(shape)
    return torch.cat([bias, mask.expand(rows, -1, -1, -1)], dim=3)


def _present(prefix: Prefix, rows: int, dtype: torch.dtype) -> Tensor:
    """Which prefix keys a row has, ``[rows, length]``, for masks that can only leave keys out."""
    if prefix.score_bias is None:
        return torch.ones(rows, prefix.length, dtype=dtype, device=prefix.keys.device)
    if prefix.scaled:
        raise PrefixMemoryError(
            "A prefix inside the softmax cannot be given another scale than 0 or 1 with this attention backend, which "
            "takes no bias. Use attn_implementation='sdpa' or 'eager'."
        )
    return torch.isfinite(prefix.score_bias).to(dtype).expand(rows, -1)


def _block_mask(prefix: Prefix, mask: Any) -> Any:
    """A flex attention mask with the prefix prepended."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch, heads = mask.shape[:2]
    queries, keys = mask.seq_lengths
    length, present = prefix.length, _present(prefix, batch, torch.bool)
    return create_block_mask(
        lambda b, h, q, k: torch.where(  # torch looks at its signature, which the tests' type checks would hide
            k < length,
            present[b, k.clamp(max=length - 1)],
            mask.mask_mod(b, h, q, (k - length).clamp(min=0)),
        ),
        batch,
        heads,
        queries,
        keys + length,
        device=prefix.keys.device,
    )
