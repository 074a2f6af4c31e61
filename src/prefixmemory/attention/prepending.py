"""Inside the softmax: prefix keys and values beside the input's, in every attention backend of transformers.

Step 1 of ``reference.py``. The prefix is prepended to keys and values when the attention function is called, after
rotation and after the cache was read, so that it never lies in a cache: gradient checkpointing, static caches, left
padding and several adapters in one batch need nothing of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixmemory.errors import PrefixMemoryError


@dataclass(frozen=True)
class Prefix:
    """What is prepended to the input's keys and values.

    Attributes:
        keys, values: ``[1 or batch, kv_heads, length, dim]``.
        score_bias: ``[1 or batch, length]``, what is added to a prefix key's score: the logarithm of the adapter's
            scale, ``-inf`` where a row has no such key. ``None``: nothing.
    """

    keys: Tensor
    values: Tensor
    score_bias: Tensor | None

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
    is_causal: bool | None = None,
    counts_from_end: bool = False,
) -> tuple[Tensor, Tensor, Any]:
    """Keys, values and mask with ``prefix`` prepended.

    Args:
        prefix: the prefix.
        module: the attention module, which says whether it is causal.
        query, key, value: as the attention function receives them, ``[batch, heads, tokens, dim]``.
        mask: as the attention function receives it: ``None``, ``[batch or 1, 1, queries, keys]`` (bool, or added to the
            scores), ``[batch, keys]`` (flash attention) or a ``BlockMask`` (flex attention).
        is_causal: what the call says about causality; ``None``: the module decides.
        counts_from_end: whether the attention function, when it is causal without a mask, lets the last query see the
            last key (flash attention) rather than the first query the first key (torch's).
    """
    batch = key.shape[0]
    keys = torch.cat([prefix.keys.to(key.dtype).expand(batch, -1, -1, -1), key], dim=2)
    values = torch.cat([prefix.values.to(value.dtype).expand(batch, -1, -1, -1), value], dim=2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None:
        mask = _made_explicit(prefix, query, key, bool(causal), counts_from_end)
    return keys, values, None if mask is None else _with_prefix(prefix, query, mask)


def _made_explicit(prefix: Prefix, query: Tensor, key: Tensor, causal: bool, counts_from_end: bool) -> Tensor | None:
    """What "no mask" means, as a mask: torch would count from the first key, which is the prefix's now."""
    batch, queries, keys = key.shape[0], query.shape[2], key.shape[2]
    if prefix.score_bias is None and (not causal or queries == 1 or counts_from_end):
        return None
    if counts_from_end:
        return torch.ones(batch, keys, dtype=torch.long, device=key.device)
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=key.device)
    return allowed.tril() if causal and queries > 1 else allowed


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
        if not torch.any(torch.isfinite(prefix.score_bias) & (prefix.score_bias != 0)):
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
    if torch.any(torch.isfinite(prefix.score_bias) & (prefix.score_bias != 0)):
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
