"""Loading a trained adapter with its base model and tokenizer, from a folder or the Hub."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

import prefixmemory.tuner.registration
from prefixmemory.adapters.hub import adapter_folder
from prefixmemory.errors import PrefixMemoryError
from prefixmemory.files.json_text import read_object
from prefixmemory.files.records import RECORD
from prefixmemory.memories import checkpoint
from prefixmemory.memories.checkpoint import check_config_file
from prefixmemory.memories.patterns import check_patterns
from prefixmemory.memories.peft_type import PREFIX_MEMORY
from prefixmemory.models.loading import Dtype, fast_dtype, full_name, load_model, load_tokenizer
from prefixmemory.models.quantization import Quantization
from prefixmemory.rows.conversations import checked_variables
from prefixmemory.training.card import TASKS

prefixmemory.tuner.registration.register()


#: Tasks of models that write no text.
_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass(frozen=True)
class Adapter:
    """A base model with one trained adapter, ready to answer.

    Attributes:
        name: what the user called it.
        folder: where its files lie (for a Hub id: in the cache).
        model: base model with the adapter.
        tokenizer: of the base model.
        record: its ``run.json``, empty if it has none.
    """

    name: str
    folder: Path
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    record: dict[str, Any]

    @property
    def row_format(self) -> str:
        """Kind of the rows that it was trained on; empty if unknown."""
        return str(self.record.get("row_format", ""))

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """What the chat template was given in all of these rows."""
        return dict(self.record.get("chat_template_kwargs") or {})

    @property
    def is_memory(self) -> bool:
        """Whether it is a memory, rather than another PEFT method."""
        return bool(self.model.active_peft_config.peft_type == PREFIX_MEMORY)


def load_adapter(
    name: str, base_model: str | None = None, dtype: Dtype | None = None, quantization: Quantization | None = None
) -> Adapter:
    """Load the adapter ``name`` onto its base model, in evaluation mode.

    Args:
        name: a folder, or a Hub id.
        base_model: the base model, when it is not where the adapter's config says.
        dtype: of the base model; ``None``: as in training, or the fastest for this machine if that is unknown.
        quantization: as in :func:`~prefixmemory.models.loading.load_model`; ``None``: as in training.

    Raises:
        PrefixMemoryError: adapter or base model are missing, damaged, or do not belong together.
    """
    folder = adapter_folder(name)
    written = check_config_file(folder, any_method=True)
    checkpoint.check_weights_file(folder, None)
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():  # PEFT would look for a pickle, then on the Hub
        raise PrefixMemoryError(f"{folder / SAFETENSORS_WEIGHTS_NAME} is missing. Copy it from where it was saved.")
    config_file = folder / CONFIG_NAME
    _check_fields(config_file, written, folder / SAFETENSORS_WEIGHTS_NAME)
    with _about(config_file, "is no config that PEFT knows"):
        config: Any = PeftConfig.from_pretrained(str(folder))
        check_patterns(config)
    if (task := written.get("task_type")) in _HEADS:
        raise PrefixMemoryError(
            f"{name} was trained for {task}, and writes no text. Load it by PeftModel.from_pretrained on an "
            f"AutoModel{TASKS[task][0]}."
        )
    base_name = full_name(base_model or config.base_model_name_or_path or "")
    if not base_name:
        raise PrefixMemoryError(
            f"{config_file} does not name its base model. Give it with --model, or write it into "
            "base_model_name_or_path."
        )
    tokenizer = load_tokenizer(base_name)
    record = read_record(folder)
    if dtype is None:
        dtype = record["dtype"] if record.get("dtype") in get_args(Dtype) else fast_dtype()
    base = load_model(base_name, dtype, quantization=quantization or record.get("quantization"))
    with warnings.catch_warnings(), _about(config_file, f"or the weights beside it do not fit {base_name}"):
        # PEFT warns, and goes on with start values; a memory's tensors are checked by ourselves.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            model = PeftModel.from_pretrained(base, str(folder)).eval()
        except UserWarning as error:
            raise PrefixMemoryError(
                f"The weights in {folder} are not those of its {config.peft_type.value} config for {base_name}: "
                "tensors are missing. Copy the folder again from where the adapter was saved."
            ) from error
        if config.peft_type != PREFIX_MEMORY:
            _check_loaded(folder / SAFETENSORS_WEIGHTS_NAME, model)
    return Adapter(
        name=name,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        record=record,
    )


@contextmanager
def _about(file: Path, problem: str) -> Iterator[None]:
    """Have errors name the config that they are about. PEFT checks few fields, and fails where it uses them."""
    try:
        yield
    except PrefixMemoryError as error:
        raise error if str(file.parent) in str(error) else PrefixMemoryError(f"{file}: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise PrefixMemoryError(f"{file} {problem}: {type(error).__name__}: {reason}") from error


def _check_fields(file: Path, config: Mapping[str, Any], weights: Path) -> None:
    """Refuse what would be used before it is checked: a base model that is no name, and sizes that are none."""
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise PrefixMemoryError(f"{file}: base_model_name_or_path={base!r} is no name. Give that of the base model.")
    most = weights.stat().st_size  # a byte a number, and more numbers than any of its sizes
    for name in _SIZES:
        if isinstance(size := config.get(name), int) and size > most:
            raise PrefixMemoryError(
                f"{file}: {name}={size} is out of range: the weights beside it have {most:,} bytes."
            )


#: Fields that say how large an adapter is, which PEFT allocates before it looks at the weights.
_SIZES = (
    "r", "rank", "feature_dim", "prefix_length", "reparameterize", "num_virtual_tokens", "encoder_hidden_size",
    "num_layers", "token_dim", "adapter_len",
)  # fmt: skip


def _check_loaded(file: Path, model: PeftModel) -> None:
    """Refuse a file of another method that PEFT has read more from than the adapter, or what is no number.

    PEFT hands a file to ``load_state_dict``: a tensor with the name of one of the base model's replaces that.
    """
    found, expected = load_file(file), get_peft_model_state_dict(model)
    of_model = {name for names in (model.named_parameters(), model.named_buffers()) for name, _ in names}
    if replaced := (found.keys() - expected.keys()) & of_model:
        raise PrefixMemoryError(
            f"{file} holds {min(replaced)!r}, which is no part of the adapter and would replace weights of the base "
            "model. Save the adapter again without it, and do not trust who made the file."
        )
    checkpoint.check_numbers(found, expected)


def read_record(folder: Path) -> dict[str, Any]:
    """The ``run.json`` of an adapter folder; empty if it has none.

    Raises:
        PrefixMemoryError: it cannot be read.
    """
    file = folder / RECORD
    record = read_object(file, "Copy it again, or delete it.") if file.is_file() else {}
    for name, kind in _RECORD_TYPES.items():
        if not isinstance(value := record.get(name), kind | None):
            raise PrefixMemoryError(f"{file}: {name}={value!r} is not what a run writes. Copy it again, or delete it.")
    checked_variables(str(file), record.get("chat_template_kwargs"))
    return record


#: Of the fields of a record that commands go by.
_RECORD_TYPES: dict[str, Any] = {
    **dict.fromkeys(("config", "settings", "metrics", "versions"), dict),
    **dict.fromkeys(("base_model", "method", "row_format", "dtype", "quantization"), str),
    "data": dict | list | str,
}
