"""What reads memories: PyTorch's operations (``read.py``) or one Triton kernel (``triton_read.py``).

A choice of the process, not of an adapter: it is about the machine. :func:`set_impl`, or the environment variable
``PREFIXMEMORY_IMPL``:

- ``auto``: Triton on the kinds of device where it has been measured (``TRUSTED``: none yet), else PyTorch;
- ``torch``: PyTorch;
- ``triton``: Triton, and an error with the reason where it cannot.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, cast, get_args

import torch
from packaging.version import Version
from torch import Tensor

from prefixmemory._shapes import Float
from prefixmemory.errors import PrefixMemoryError, check_choice
from prefixmemory.kernels.read import FeatureMapFn

Impl = Literal["auto", "torch", "triton"]

#: What the kernel knows, in the order by which it counts them.
KINDS = ("elu", "gelu", "relu", "silu", "identity", "softmax")
NORMS = ("none", "query_rms", "feature_l2")
#: Kinds of device whose memories Triton reads by itself. "cuda" belongs here once tests and benchmark have run on one.
TRUSTED: frozenset[str] = frozenset()
#: Whether Triton interprets its kernels, which it too asks once.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OLDEST = "3.4"


def _missing() -> str | None:
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    return None if Version(installed) >= Version(_OLDEST) else f"triton {installed} is older than {_OLDEST}"


_MISSING = _missing()
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Of a head's M, A or B. It takes twice as much of a multiprocessor's shared memory, of which some cards have 99 KiB.
_MOST_BYTES = 32 * 1024


@dataclass(frozen=True)
class Product:
    """A memory that is nothing but a product with features.

    Attributes:
        factors: ``(M,)`` or ``(A, B)``, as in :func:`~prefixmemory.kernels.read.memory_output`.
        phi: φ.
        mean: μ. Factors and means of several memories stand along a first axis.
        form: the names of its map and normalisation in the config, where the kernel knows both (``KINDS``, ``NORMS``)
            and φ has no parameters; ``None``: PyTorch computes the features, and the kernel reads those.
    """

    factors: tuple[Tensor, ...]
    phi: FeatureMapFn
    mean: Float[Tensor, "*s g f"] | None = None
    form: tuple[str, str] | None = None

    def is_like(self, other: Product) -> bool:
        """Whether they differ in numbers alone: one φ serves both, and their tensors can be stacked."""
        mine, theirs = [*self.factors, self.mean], [*other.factors, other.mean]
        return (
            self.form is not None and self.form == other.form and [_kind(x) for x in mine] == [_kind(x) for x in theirs]
        )


def known(feature_map: str, normalize: str = "none") -> tuple[str, str] | None:
    """The form of a product with this φ."""
    return (feature_map, normalize) if feature_map in KINDS else None


def _kind(x: Tensor | None) -> object:
    return None if x is None else (x.shape, x.dtype, x.device)


_impl = cast(Impl, os.environ.get("PREFIXMEMORY_IMPL", "auto"))  # looked at when a memory is read


def set_impl(impl: Impl) -> None:
    """Choose what reads memories, in this process.

    Raises:
        PrefixMemoryError: no such choice.
    """
    global _impl
    check_choice("impl", impl, get_args(Impl))
    _impl = impl


def fused(product: Product | str | None, *like: Tensor) -> bool:
    """Whether the Triton kernel reads it.

    Args:
        product: the memory, or the reason why it is no mere product; ``None``: it wants to be asked.
        like: tensors that would be read beside it.

    Raises:
        PrefixMemoryError: ``triton`` was asked for, and cannot; says why.
    """
    if product is None or not _is_asked(like[0].device.type):
        return False
    found = _covered(product, like)
    if isinstance(found, str) and _impl == "triton":
        raise PrefixMemoryError(f"impl='triton' cannot read this memory: {found}. Give impl='auto'.")
    return isinstance(found, Product)


def serves(device: str) -> bool:
    """Whether the Triton kernel reads a server's memories on such a device.

    Raises:
        PrefixMemoryError: ``triton`` was asked for, and cannot; says why.
    """
    reason = why_not(device)
    if _impl == "triton" and reason is not None:
        raise PrefixMemoryError(f"impl='triton' cannot serve memories: {reason}. Give impl='auto'.")
    return _is_asked(device) and reason is None


def _is_asked(device: str) -> bool:
    if _impl == "auto":
        return device in TRUSTED
    if _impl != "torch" and _impl != "triton":
        check_choice("PREFIXMEMORY_IMPL", _impl, get_args(Impl))
    return _impl == "triton"


def said(product: Callable[[], Product | str | None], like: Tensor) -> str:
    """``triton``, or ``torch`` with the reason, for records."""
    if _impl == "torch":
        return "torch (chosen)"
    if not _is_asked(like.device.type):
        return f"torch (on {like.device.type})"
    found = _covered(product() or "hooks wait for it to be called", (like,))
    return "triton" if isinstance(found, Product) else f"torch ({found})"


def _covered(product: Product | str, like: tuple[Tensor, ...]) -> Product | str:
    """The product, or why the kernel cannot read it."""
    if isinstance(product, str):
        return product
    tensors = (*like, *product.factors)
    if wrong := [x.dtype for x in tensors if x.dtype not in _DTYPES]:
        return f"the kernel takes no {str(wrong[0]).removeprefix('torch.')}"
    if len({x.device for x in tensors}) > 1:
        return "it lies on another device"
    size = max(padded(x.shape[-2]) * padded(x.shape[-1]) * x.element_size() for x in product.factors)
    if size > _MOST_BYTES:
        return (
            f"a factor of {size // 1024} KiB a head, padded, is too large for the kernel; give a lower rank, and no "
            "feed_forward"
        )
    return why_not(tensors[0].device.type) or product


def padded(size: int) -> int:
    """The least size of a tile that holds ``size`` and that tensor cores take."""
    return max(16, 1 << (size - 1).bit_length())


def why_not(device: str) -> str | None:
    """Why Triton cannot work on such a device; ``None``: it can."""
    if _MISSING is not None:
        return _MISSING
    if device != "cuda" and not INTERPRETED:
        return f"it lies on {device}, where only Triton's interpreter (TRITON_INTERPRET=1) works"
    return None
