"""A saved memory as a server holds it: two factors for each layer, whatever it was made of.

A memory whose output is φ(q)ᵀM, with M fixed, is served; what is not is refused, with the reason (:func:`why_not`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from prefixmemory._shapes import Float
from prefixmemory.attention.feed_forward import is_in_block
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.memories import checkpoint
from prefixmemory.memories.config import PrefixMemoryConfig
from prefixmemory.memories.feature_maps import FEATURE_MAPS
from prefixmemory.memories.matrix import Normalize
from prefixmemory.memories.prefix import PrefixVectors
from prefixmemory.memories.registry import MemorySite

#: A tensor of a saved memory: the attention module's name, and the tensor's own.
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.prefix_memory\.prefix_memory_bank\.(?P<tensor>.+)")
#: In a server's environment: 1 makes slots beside feed-forward blocks, too.
FEED_FORWARD = "PREFIXMEMORY_FEED_FORWARD"
#: The sizes of slots that vLLM makes.
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
#: Holds a memory's tensors.
FILE = "adapter_model.safetensors"
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

    def of_part(self, inputs: Tensor, outputs: Tensor) -> ServedLayer:
        """For a process that has these of the numbers that a projection reads and returns; the mean is zero there."""
        return ServedLayer(self.A[:, inputs], self.B[:, :, outputs], None, self.manner)


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
    """The heads' memories of the adapter saved in ``folder``, by the layer's number in the model.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        sizes: of the served model's heads.
        layers: how many layers it has.
        max_rank: the largest rank that the server has room for.

    Raises:
        PrefixMemoryError: it is damaged, is for another model, cannot be served, or is larger than ``max_rank``.
    """
    config, file = read_config(folder), folder / FILE
    served: dict[int, ServedLayer] = {}
    for module, tensors in _tensors(file).items():
        number, path = place_of(module)
        if config.feed_forward is not None and is_in_block(path):
            continue
        where = f"{file}, {module}"
        if number is None or number in served or number >= layers:
            raise PrefixMemoryError(
                f"{where}: the served model has {layers} layers, each with one self-attention, and this is none of "
                "them. Serve it with the model that it was trained on."
            )
        served[number] = _layer(config.of_module(module), tensors, sizes, max_rank, where)
    return served


def read_blocks(folder: Path, max_rank: int) -> dict[str, ServedLayer]:
    """The memories in feed-forward blocks of the adapter saved in ``folder``, by the projection's name in transformers;
    to them, it is one head whose query is what it reads.

    Raises:
        PrefixMemoryError: it is damaged, cannot be served, or is larger than ``max_rank``.
    """
    config, file = read_config(folder), folder / FILE
    served: dict[str, ServedLayer] = {}
    if config.feed_forward is None:
        return served
    for module, tensors in _tensors(file).items():
        number, path = place_of(module)
        if not is_in_block(path):
            continue
        if number is None:
            raise PrefixMemoryError(
                f"{file}, {module}: its name has no single number of a layer, so that a server cannot tell where it "
                "stands. Use the memory through transformers."
            )
        own = config.of_module(module, in_feed_forward=True)
        A, B = (tensors[name].float() if name in tensors else None for name in ("A", "B"))
        fits = A is not None and B is not None and A.ndim == B.ndim == 3 and len(A) == len(B) == 1
        if not fits or cast(Tensor, A).shape[2] != cast(Tensor, B).shape[1]:
            raise PrefixMemoryError(
                f"{file}, {module}: the tensors {sorted(tensors)} are not those of its config. Copy the folder again "
                "from where the adapter was saved."
            )
        A, B = cast(Tensor, A), cast(Tensor, B)
        if A.shape[2] > max_rank:
            raise _too_large(A.shape[2], max_rank, f"{file}, {module}")
        limit = cast(float | None, own.output_limit)
        served[module] = ServedLayer(A, B, None, Manner("identity", "none", False, limit, own.scale, A.shape[2]))
    return served


def has_room_for_blocks() -> bool:
    """Whether the server makes slots beside feed-forward blocks.

    Raises:
        PrefixMemoryError: the environment gives the variable another value than 0 or 1.
    """
    value = os.environ.get(FEED_FORWARD, "0")
    if value not in ("0", "1"):
        raise PrefixMemoryError(f"{FEED_FORWARD}={value!r} is not known: give 1 or 0.")
    return value == "1"


def check_blocks(blocks: Mapping[str, ServedLayer], width: int | None, folder: Path) -> None:
    """Refuse memories in feed-forward blocks that a server has no slots for.

    Args:
        blocks: of the memory in ``folder``.
        width: of the served model's hidden states, which each projection reads or returns; ``None``: not known.

    Raises:
        PrefixMemoryError: says which, and what to do.
    """
    if not blocks:
        return
    for module, layer in blocks.items():
        if width is not None and width not in (layer.A.shape[1], layer.B.shape[2]):
            raise PrefixMemoryError(
                f"{folder}, {module}: a memory that reads {layer.A.shape[1]} numbers and returns {layer.B.shape[2]} is "
                f"none of the served model, whose hidden states have {width} numbers. Serve it with the model that it "
                "was trained on."
            )
    if not has_room_for_blocks():
        raise PrefixMemoryError(
            f"{folder} has memories in feed-forward blocks, and the server made no slots for them. Start it with "
            f"{FEED_FORWARD}=1 in its environment; `prefixmemory serve` with --feed-forward."
        )


def _tensors(file: Path) -> dict[str, dict[str, Tensor]]:
    """Those of each module."""
    if not file.is_file():
        raise PrefixMemoryError(f"{file} is missing. Copy it from where the adapter was saved.")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(file).items():
        parts = _NAME.fullmatch(name)
        if parts is None:
            raise PrefixMemoryError(f"{file} holds {name!r}, which is no part of a memory. Save the adapter again.")
        found.setdefault(parts["module"], {})[parts["tensor"]] = tensor
    for tensors in found.values():
        checkpoint.check_numbers(tensors, tensors)
    return found


def place_of(module: str) -> tuple[int | None, str]:
    """The number of a module's layer, and its name within the layer; ``None``: it has none, or several."""
    parts = module.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    if len(numbers) != 1:
        return None, module
    return int(parts[numbers[0]]), ".".join(parts[numbers[0] + 1 :])


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
    mean = tensors.get("mean")
    if (mean is None) == (config.normalize == "feature_mean"):
        what = "needs a mean" if mean is None else "has no mean"
        raise PrefixMemoryError(
            f"{where}: normalize={config.normalize!r} {what}, and the tensors are {sorted(tensors)}. Copy the folder "
            "again from where the adapter was saved."
        )
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
        raise _too_large(rank, max_rank, where)
    return (left[..., :max_rank] * sizes[:, None, :max_rank]).to(A.dtype), right[:, :max_rank].to(B.dtype)


def rank_of(folder: Path) -> int:
    """The rank that the memory in ``folder`` needs in a server: that of its factors, or of its features where these
    are fewer; only the sizes of its tensors are read.

    Raises:
        PrefixMemoryError: it is damaged, or cannot be served.
    """
    config, ranks = read_config(folder), [1]  # which looks at the file, too
    with safe_open(folder / FILE, framework="pt") as tensors:
        sizes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118  # no mapping
    for name, size in sizes.items():
        parts = _NAME.fullmatch(name)
        # A [groups, features, rank], M [groups, features, value_dim], keys [groups, rank, features]
        if parts is None or len(size) != 3 or parts["tensor"] not in ("A", "M", "keys"):
            continue
        in_block = config.feed_forward is not None and is_in_block(place_of(parts["module"])[1])
        ranks.append(size[2] if in_block else min(size[1:]))
    if config.reparameterize is not None:  # its vectors are made when it is read
        ranks.append(min(cast(int, config.prefix_length), max(RANKS)))
    return max(ranks)


def _too_large(rank: int, max_rank: int, where: str) -> PrefixMemoryError:
    return PrefixMemoryError(
        f"{where}: the memory has rank {rank}, and the server has room for {max_rank}. Start it with "
        f"--max-rank {slot_size(rank)} (of vllm serve: --max-lora-rank)."
    )


def slot_size(rank: int) -> int:
    """The smallest of vLLM's slots that has room for ``rank``; ``rank`` itself, where none has, which vLLM refuses."""
    return next((size for size in RANKS if size >= rank), rank)
