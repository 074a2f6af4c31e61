"""What guards a saved adapter: checksum, keys and shapes, and the base model that it was made for."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import read_object
from prefixmemory.memories.peft_type import PREFIX_MEMORY

#: Names of embeddings, as PEFT knows them, that are saved beside an adapter.
EMBEDDINGS = re.compile(rf"(^|\.)({'|'.join(EMBEDDING_LAYER_NAMES)}|wte|word_embeddings)\.weight$")
FINGERPRINT_SIZE = 64
#: Of the vocabulary, by halves of the sample: what is sampled must not depend on its size, which grows when tokens are
#: added. Rows that a small vocabulary lacks are left out of comparisons.
FINGERPRINT_ROWS = (32, 512)
SAME_MODEL_COSINE = 0.95  # survives a change of dtype, quantisation or fine-tuning of the base; another model gives ~0


def weights_checksum(folder: Path) -> str | None:
    """SHA-256 of the adapter's weights file, or ``None`` when there is none."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_saved_whole(folder: Path) -> None:
    """Refuse a weights file just written without memories, with what one process holds of them, or beside an older
    one that would be loaded in its place."""
    file, pickled = folder / SAFETENSORS_WEIGHTS_NAME, folder / WEIGHTS_NAME
    if not file.is_file():
        return
    if pickled.is_file() and pickled.stat().st_mtime_ns > file.stat().st_mtime_ns:
        raise PrefixMemoryError(
            f"{pickled} was written beside {file.name} of an older save, which would be loaded in its place. Save into "
            "another folder, or without safe_serialization=False."
        )
    with safe_open(file, framework="pt") as tensors:
        whole = [0 not in tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  # no mapping
    if not (whole and all(whole)):
        raise PrefixMemoryError(
            f"{file} was written without the whole memories. If they are spread over processes, let every process call "
            "model.save_pretrained(folder, state_dict=accelerator.get_state_dict(model), is_main_process=...)."
        )


def embedding_rows(folder: Path) -> int | None:
    """How many rows the embeddings in a weights file have; ``None`` if there are none."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        names = [name for name in tensors.keys() if EMBEDDINGS.search(name)]  # noqa: SIM118  # no mapping
        return int(tensors.get_slice(names[0]).get_shape()[0]) if names else None


def check_config_file(folder: Path, any_method: bool = False) -> dict[str, Any]:
    """The config of a local adapter folder; refuses one that is missing, cut off, or of another PEFT method.

    Args:
        folder: the adapter folder.
        any_method: accept every PEFT method.
    """
    file = folder / CONFIG_NAME
    copy = "Copy it from where the adapter was saved, or train it again."
    if not file.is_file():
        raise PrefixMemoryError(f"{file} is missing: {folder} holds no adapter. {copy}")
    config = read_object(file, copy)
    found = config.get("peft_type")
    if found != PREFIX_MEMORY.value and not (any_method and found):
        raise PrefixMemoryError(
            f"{file} has peft_type={found!r}, not {PREFIX_MEMORY.value!r}. Give the folder of a memory."
        )
    return config


def check_weights_file(folder: Path, expected_sha256: str | None, hub_id: str | None = None) -> None:
    """Refuse an adapter folder whose weights are missing, truncated or not those that were saved.

    Args:
        folder: the adapter folder, or the one of the Hub's cache.
        expected_sha256: ``weights_sha256`` of its config.
        hub_id: where the folder was downloaded from.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        if expected_sha256 is None:
            return  # a config that was saved on its own
        raise PrefixMemoryError(f"{file} is missing. Copy it from where the adapter was saved, or train it again.")
    again = "Copy it again from where the adapter was saved."
    both = "Copy both files again; if you changed the weights on purpose, delete weights_sha256 from the config."
    if hub_id is not None:
        again = both = f"Load it with force_download=True; if that does not help, {hub_id!r} must be pushed again."
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise PrefixMemoryError(f"{file} is truncated or damaged ({error}). {again}") from error
    if expected_sha256 is not None and weights_checksum(folder) != expected_sha256:
        raise PrefixMemoryError(
            f"{file} is not the file that was saved: its SHA-256 differs from weights_sha256 in adapter_config.json. "
            f"{both}"
        )


def check_hub_weights(hub_id: str, subfolder: str | None, expected_sha256: str, options: Mapping[str, Any]) -> None:
    """Fetch the weights file of an adapter into the Hub's cache, where PEFT will find it, and check it.

    Args:
        hub_id: ``user/name``.
        subfolder: of the repository.
        expected_sha256: checksum from the config.
        options: of ``hf_hub_download`` (revision, token, ...).

    Raises:
        PrefixMemoryError: it is missing there, truncated or changed since it was saved.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = hf_hub_download(hub_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **options)
    except EntryNotFoundError as error:
        raise PrefixMemoryError(
            f"{hub_id!r} on the Hub has no {SAFETENSORS_WEIGHTS_NAME} beside its {CONFIG_NAME}, or the Hub "
            "cannot be reached. Check the network, or push the adapter again."
        ) from error
    check_weights_file(Path(file).parent, expected_sha256, hub_id)


def check_state_dict(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], also_known: Iterable[str]) -> None:
    """Compare the tensors of a checkpoint with those of the adapter: names, shapes, and what they hold.

    Args:
        found: tensors of the checkpoint.
        expected: tensors of the adapter in the model, under the names that a checkpoint uses.
        also_known: further names that may be in the checkpoint (modules saved in full, embeddings).

    Raises:
        PrefixMemoryError: missing, extra or misshapen tensors, or some that hold no numbers to compute with.
    """
    advice = "Was it saved with another config or for another base model? Load it onto the model it was trained on."
    for kind, names in (
        ("lacks", expected.keys() - found.keys()),
        ("has unknown", found.keys() - expected.keys() - set(also_known)),
    ):
        if names:
            raise PrefixMemoryError(
                f"The checkpoint {kind} {len(names)} of its {len(expected)} memory tensors, {min(names)!r} "
                f"for one. {advice}"
            )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise PrefixMemoryError(
                f"The checkpoint's {name!r} has shape {list(found[name].shape)}, the model needs "
                f"{list(tensor.shape)}. {advice}"
            )
    check_numbers(found, expected)


@torch.no_grad()
def check_numbers(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse integers, truth values and complex numbers where the adapter has real ones, and NaN or infinities.

    Values are looked at where this process holds them: not in parts of a tensor that is spread over processes, and not
    on the meta device.

    Args:
        found: tensors of a checkpoint.
        expected: those of the adapter, under the same names; what it does not have may be of any dtype.
    """
    for name, tensor in found.items():
        if name in expected and tensor.is_floating_point() != expected[name].is_floating_point():
            raise PrefixMemoryError(
                f"The checkpoint's {name!r} is of {tensor.dtype}, and the model needs {expected[name].dtype}. Copy it "
                "again from where the adapter was saved."
            )
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise PrefixMemoryError(
                f"The checkpoint's {name!r} holds NaN or infinities. Its training diverged: train it again with a "
                "lower learning rate. Or it was damaged: copy it again from where the adapter was saved."
            )


def _is_finite(tensor: Tensor) -> bool:
    is_here = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0
    if not is_here:
        return True
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # few operations know 8-bit floats
    return all(math.isfinite(end) for end in torch.stack(values.aminmax()).tolist())  # allocates nothing


@torch.no_grad()
def fingerprint(model: nn.Module) -> list[float | None] | None:
    """A sample of the input embeddings: enough to tell one base model from another, whatever its dtype.

    A value is ``None`` where the vocabulary has no such row. Returns ``None`` where the embeddings cannot be read (no
    embeddings, meta device, quantised). Where they are spread over processes, all of these must call it.
    """
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        weight = getattr(embeddings, "original_module", embeddings).weight  # not the copy of an adapter
    except (AttributeError, NotImplementedError):
        return None
    shape = getattr(weight, "ds_shape", weight.shape)  # DeepSpeed ZeRO-3 leaves no shape but this one
    plain = type(weight.data) is Tensor or _is_dtensor(weight)
    if weight.is_meta or len(shape) != 2 or not weight.is_floating_point() or not plain:
        return None
    generator = torch.Generator().manual_seed(0)
    few, more = (torch.randint(n, (FINGERPRINT_SIZE // 2,), generator=generator) for n in FINGERPRINT_ROWS)
    columns = torch.randint(shape[1], (FINGERPRINT_SIZE,), generator=generator).to(weight.device)
    rows = torch.cat([few, more]).to(weight.device)
    there = rows < shape[0]
    sample = _rows(weight, rows.where(there, 0)).gather(1, columns[:, None])[:, 0]
    values = zip(sample.float().tolist(), there.tolist(), strict=True)
    return [float(f"{value:.4g}") if is_there else None for value, is_there in values]


def _is_dtensor(weight: Tensor) -> bool:
    return type(weight.data).__name__ == "DTensor"  # by name: torch may have been built without torch.distributed


def _rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table, also of one that is spread over processes."""
    if _is_dtensor(weight):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = cast(DTensor, weight).device_mesh
        everywhere = DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return cast(DTensor, functional.embedding(everywhere, weight)).full_tensor()
    if hasattr(weight, "ds_shape"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight[rows]
    return weight[rows]


def same_base_model(saved: list[float | None], present: list[float | None]) -> bool:
    """Whether two fingerprints come from the same base model (or a fine-tuned, quantised or extended copy of it)."""
    pairs = [(x, y) for x, y in zip(saved, present, strict=False) if x is not None and y is not None]
    if len(saved) != len(present) or not pairs:
        return False
    a, b = torch.tensor(pairs).unbind(1)
    if torch.equal(a, b):
        return True  # also where all sampled values are zero
    return bool(torch.cosine_similarity(a, b, dim=0) > SAME_MODEL_COSINE)
