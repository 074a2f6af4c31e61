"""A saved memory as a server holds it: two factors for each layer, whatever it was made of.

A memory whose output is φ(q)ᵀM, with M fixed, is served; what is not is refused, with the reason (:func:`why_not`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from prefixmemory._shapes import Float
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories import checkpoint
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.feature_maps import FEATURE_MAPS
from prefixmemory.memories.matrix import Normalize
from prefixmemory.memories.prefix import PrefixVectors
from prefixmemory.memories.registry import MemorySite

#: A tensor of a saved memory: the attention module's name, and the tensor's own.
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.prefix_memory\.prefix_memory_bank\.(?P<tensor>.+)")
#: Singular values below this share of the largest are rounding errors.
_RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class HeadSizes:
    """The heads of the served model: query heads, key/value heads, sizes of a query and of a head's output."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class Manner:
    """How the memory of a layer is read.

    Attributes:
        feature_map, normalize: φ, and what is done to its argument or result, by their names in the config.
        rotary: whether q is the rotated query.
        limit: c; ``None``: no limit.
        scale: s.
        rank: r.
    """

    feature_map: str
    normalize: Normalize
    rotary: bool
    limit: float | None
    scale: float
    rank: int


@dataclass(frozen=True)
class ServedLayer:
    """What one attention module adds to its heads: s·limit((φ(q) − μ)ᵀAB).

    Attributes:
        A: ``[heads, head_dim, rank]``.
        B: ``[heads, rank, value_dim]``.
        mean: μ ``[heads, head_dim]``; ``None``: zero.
        manner: how it is read.
    """

    A: Float[Tensor, "h d r"]
    B: Float[Tensor, "h r v"]
    mean: Float[Tensor, "h d"] | None
    manner: Manner

    def of_heads(self, heads: slice) -> ServedLayer:
        """The part of some of the heads, for a process that computes these."""
        return ServedLayer(self.A[heads], self.B[heads], None if self.mean is None else self.mean[heads], self.manner)


def why_not(config: PrefixMemoryConfig) -> str | None:
    """Why a memory cannot be served; ``None``: it can."""
    if config.placement == "inside":
        return "placement='inside' changes the softmax, which a server's attention kernels compute"
    if config.memory not in ("matrix", "prefix"):
        return f"memory={config.memory!r} is code of its own"
    if config.similarity == "softmax" or config.normalizer:
        return "its output is divided by a sum over the prefix, so that it is no product φ(q)ᵀM"
    if config.mixing != "none":
        return f"mixing={config.mixing!r} takes from the head's own output"
    if config.feed_forward is not None:
        return f"feed_forward={config.feed_forward} stands outside of attention, where a server does not add yet"
    if config.feature_map not in served_maps():
        return f"feature_map={config.feature_map!r} has parameters of its own"
    for name in ("modules_to_save", "trainable_token_indices", "resized_vocabulary"):
        if getattr(config, name):
            return f"{name} is set, and the base model's other weights are shared by all requests"
    return None


def served_maps() -> list[str]:
    """Names of the feature maps without parameters, which alone are served."""
    return [name for name, factory in FEATURE_MAPS.items() if not isinstance(factory, type)]


def read_config(folder: Path) -> PrefixMemoryConfig:
    """The config of a saved memory that can be served.

    Raises:
        PrefixMemoryError: it is damaged, or cannot be served; says why.
    """
    config = PrefixMemoryConfig.from_pretrained(str(folder))
    if reason := why_not(config):
        raise PrefixMemoryError(f"{folder} cannot be served: {reason}. Use it through transformers.")
    return config


def read_memory(folder: Path, sizes: HeadSizes, layers: int, max_rank: int) -> dict[int, ServedLayer]:
    """The layers of the memory saved in ``folder``, by the layer's number in the model.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        sizes: of the served model's heads.
        layers: how many layers it has.
        max_rank: the largest rank that the server has room for.

    Raises:
        PrefixMemoryError: it is damaged, is for another model, cannot be served, or is larger than ``max_rank``.
    """
    config = read_config(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise PrefixMemoryError(f"{file} is missing. Copy it from where the adapter was saved.")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise PrefixMemoryError(f"{file} holds {name!r}, which is no part of a memory. Save the adapter again.")
        found.setdefault(parts["module"], {})[parts["tensor"]] = tensor
    served: dict[int, ServedLayer] = {}
    for module, tensors in found.items():
        where = f"{file}, {module}"
        checkpoint.check_numbers(tensors, tensors)
        number = _layer_number(module)
        if number is None or number in served or number >= layers:
            raise PrefixMemoryError(
                f"{where}: the served model has {layers} layers, each with one self-attention, and this is none of "
                "them. Serve it with the model that it was trained on."
            )
        served[number] = _layer(config.of_module(module), tensors, sizes, max_rank, where)
    return served


def _layer_number(module: str) -> int | None:
    numbers = [int(part) for part in module.split(".") if part.isdecimal()]
    return numbers[0] if len(numbers) == 1 else None


def _layer(
    config: PrefixMemoryConfig, tensors: Mapping[str, Tensor], sizes: HeadSizes, max_rank: int, where: str
) -> ServedLayer:
    A, B = _factors(config, tensors, sizes, where)
    groups, features, value_dim = A.shape[0], A.shape[1], B.shape[2]
    wrong = groups not in (sizes.heads, sizes.kv_heads) or features != sizes.head_dim or value_dim != sizes.value_dim
    if wrong or B.shape[:2] != (groups, A.shape[2]):
        raise PrefixMemoryError(
            f"{where}: a memory of {groups} heads of {features} and {value_dim} numbers does not fit the served "
            f"model's {sizes.heads} heads ({sizes.kv_heads} for keys) of {sizes.head_dim} and {sizes.value_dim}. Serve "
            "it with the model that it was trained on."
        )
    if A.shape[2] > max_rank:
        A, B = _smaller(A, B, max_rank, where)
    mean = tensors.get("mean") if config.normalize == "feature_mean" else None
    repeat = sizes.heads // groups
    # s·h·limit(a, c) = s·limit(h·a, h·c), so that a request's own scale takes the place of s alone
    head_scale, limit = cast(float, config.head_scale), cast(float | None, config.output_limit)
    return ServedLayer(
        A=A.repeat_interleave(repeat, dim=0),
        B=B.repeat_interleave(repeat, dim=0) * head_scale,
        mean=None if mean is None else mean.float().repeat_interleave(repeat, dim=0),
        manner=Manner(
            feature_map=cast(str, config.feature_map),
            normalize=cast(Normalize, config.normalize),
            rotary=config.query == "rotary",
            limit=None if limit is None else limit * head_scale,
            scale=config.scale,
            rank=A.shape[2],
        ),
    )


def _factors(
    config: PrefixMemoryConfig, tensors: Mapping[str, Tensor], sizes: HeadSizes, where: str
) -> tuple[Tensor, Tensor]:
    """A and B with M = AB, in float32; of a full M, B is the identity."""
    try:
        if config.memory == "prefix":
            keys, values = _vectors(config, tensors, sizes)
            feature_map = cast(Any, FEATURE_MAPS[cast(str, config.feature_map)])
            A = feature_map(keys).transpose(1, 2)
            if A.shape[2] <= A.shape[1]:
                return A, values
            matrix = A @ values
        elif config.rank is not None:
            return tensors["A"].float(), tensors["B"].float()
        else:
            matrix = tensors["M"].float()
    except (KeyError, RuntimeError, IndexError) as error:
        raise PrefixMemoryError(
            f"{where}: the tensors {sorted(tensors)} are not those of its config ({error}). Copy the folder again "
            "from where the adapter was saved."
        ) from error
    return matrix, torch.eye(matrix.shape[2]).expand(matrix.shape[0], -1, -1)


def _vectors(config: PrefixMemoryConfig, tensors: Mapping[str, Tensor], sizes: HeadSizes) -> tuple[Tensor, Tensor]:
    """Keys and values of prefix vectors, in float32."""
    if "keys" in tensors:
        return tensors["keys"].float(), tensors["values"].float()
    site = MemorySite(sizes.heads, sizes.kv_heads, sizes.head_dim, sizes.value_dim)
    memory = PrefixVectors(
        site, prefix_length=cast(int, config.prefix_length), reparameterize=cast(int, config.reparameterize),
        feature_map=config.feature_map,
    )  # fmt: skip
    memory.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    with torch.no_grad():
        keys, values = memory.vectors()
    return keys.detach(), values.detach()


def _smaller(A: Tensor, B: Tensor, max_rank: int, where: str) -> tuple[Tensor, Tensor]:
    """The same product with ``max_rank`` columns, if no head's matrix has a higher rank.

    Raises:
        PrefixMemoryError: one has.
    """
    left, sizes, right = torch.linalg.svd(A.double() @ B.double(), full_matrices=False)
    rank = int((sizes > _RANK_TOLERANCE * sizes.amax(dim=1, keepdim=True)).sum(dim=1).amax())
    if rank > max_rank:
        raise PrefixMemoryError(
            f"{where}: the memory has rank {rank}, and the server has room for {max_rank}. Start it with "
            f"--max-lora-rank {next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)}."
        )
    return (left[..., :max_rank] * sizes[:, None, :max_rank]).to(A.dtype), right[:, :max_rank].to(B.dtype)
