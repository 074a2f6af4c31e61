"""PrefixMemoryConfig: every choice of the method as a typed, validated field."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from prefixmemory.errors import PrefixMemoryError, check_choice, check_number, did_you_mean
from prefixmemory.memories import checkpoint
from prefixmemory.memories.feature_maps import FEATURE_MAPS
from prefixmemory.memories.peft_type import PREFIX_MEMORY
from prefixmemory.memories.registry import check_memory

Query = Literal["content", "rotary"]
Normalize = Literal["none", "query_rms", "feature_l2", "feature_mean"]
Placement = Literal["outside", "inside"]
Similarity = Literal["feature_map", "softmax"]
MixingKind = Literal["none", "fixed", "layer", "head"]

_ITS_OWN = "a registered memory brings its own way to answer; give it what it needs in memory_options"
_NO_KEYS = "a registered memory answers queries outside the softmax and has no prefix vectors"
#: Fields that mean nothing to a registered memory, and why.
OF_THE_PACKAGE = {
    **dict.fromkeys(("feature_map", "feature_dim", "normalize", "rank", "share_heads"), _ITS_OWN),
    **dict.fromkeys(("answer_limit", "dropout"), _ITS_OWN),
    **dict.fromkeys(("placement", "prefix_length", "similarity", "normalizer", "reparameterize"), _NO_KEYS),
}


@dataclass
class PrefixMemoryConfig(PeftConfig):
    """PrefixMemory-Tuning: every attention head adds scale·φ(q)ᵀM to its output (arXiv 2506.13674, step 4).

    Why the defaults are what they are: ``docs/LOG.md``. How each field relates to the paper: ``docs/paper.md``.

    Args:
        feature_map: φ: ``elu``, ``gelu``, ``relu``, ``silu``, ``identity``, ``softmax``, ``mlp`` (trainable), or a
            name registered with :func:`prefixmemory.register_feature_map`.
        feature_dim: D_φ, for maps that let it be chosen (``mlp``); ``None`` means the head dimension.
        normalize: what is done to φ(q). ``feature_mean`` subtracts its mean over the first batch that is trained on,
            padding included, a fixed vector that is saved with the memory: most of φ(q) is the same for every token (60
            to 81 % of its energy in SmolLM2), and a memory that learns from that says the same to all texts
            (``docs/LOG.md``). ``none`` (the paper's form) leaves φ(q) as it is, ``query_rms`` brings q to unit
            root-mean-square before φ, ``feature_l2`` divides φ(q) by its Euclidean norm (a full memory of the paper's
            form then wants 3e-3 instead of 3e-4).
        query: ``content`` reads the query before rotary position embedding (after the q-norm where the model has
            one), ``rotary`` reads the query that attention sees.
        rank: r for M = A·B with A ``[D_φ, r]`` and B ``[r, D]``, or ``None`` for a full M, which with
            ``normalize="none"`` and without a limit is the paper's form, and wants a learning rate of about 3e-4. The
            default is 8, a quarter of the parameters at a head dimension of 64. With the other defaults, a full M wants
            2e-3; it scored 4 points more on short inputs, and lost more behind long ones (``docs/comparison.md``).
            Prefix vectors and registered memories have none: there it is ``None``.
        answer_limit: c, the length that no answer of a free memory reaches, in lengths of the head's own output o.
            Short answers pass as they are, longer ones are shortened smoothly: answer / √(1 + |answer|² / (c·|o|)²).
            So no step of training drowns what the model says by itself (``docs/LOG.md``). ``scale`` multiplies what is
            left, and several active memories are limited each for itself. ``None``: no limit, the
            paper's form. It is ``None`` where λ mixes, for prefix vectors, and for registered memories.
        share_heads: one memory per key/value group instead of one per query head.
        placement: ``outside`` the softmax (a memory), or ``inside``, where the prefix's keys compete with the input's
            (Prefix-Tuning, step 1).
        prefix_length: ``None`` for a free memory M (step 4), or p for p trainable keys and values per key/value head
            (steps 1 to 3).
        similarity: how prefix vectors outside the softmax answer: ``softmax``, exactly, over the prefix (step 2), or
            ``feature_map``, φ(q)ᵀB (step 3). ``None``: the only one, or else ``feature_map``.
        normalizer: divide φ(q)ᵀB by φ(q)ᵀn (step 3).
        mixing: ``none`` adds the answer to the head's output o; ``fixed`` gives λ·o + (1 − λ)·answer; ``layer`` and
            ``head`` learn λ, one a layer or one a head.
        mix: λ, or the start value of a learned one, in (0, 1).
        reparameterize: width of the MLP through which prefix vectors are trained (Li and Liang, 2021); ``None``: none.
        memory: ``None``, or the name of a memory of one's own, registered with :func:`prefixmemory.register_memory`,
            in place of the free memory M.
        memory_options: keyword arguments for its class: numbers, texts, truth values.
        scale: the dose: a factor on the memory's answer; :func:`prefixmemory.set_scale` changes it at run time.
        dropout: probability of dropping an entry of φ(q) in training.
        target_modules: names of attention modules (suffixes, or one regular expression over the full name), as in
            PEFT. ``None`` means every softmax self-attention of the model, and of a model that also sees or hears,
            those of its text part.
        exclude_modules: names of attention modules to leave alone.
        layers_to_transform: layer index or indices to adapt; others are left alone.
        layers_pattern: name of the list that holds the layers, when it is not found by itself.
        modules_to_save: further modules to train and save in full, as in PEFT.
        base_model_fingerprint: written by ``get_peft_model``: a sample of the base model's input embeddings, by
            which loading refuses another base model. Set it to ``None`` to load onto another model on purpose.
        weights_sha256: written when saving: checksum of the weights file, by which loading refuses a damaged one.
    """

    feature_map: str = "elu"
    feature_dim: int | None = None
    normalize: Normalize = "feature_mean"
    query: Query = "content"
    rank: int | None = 8
    answer_limit: float | None = 0.5
    share_heads: bool = False
    placement: Placement = "outside"
    prefix_length: int | None = None
    similarity: Similarity | None = None
    normalizer: bool = False
    mixing: MixingKind = "none"
    mix: float = 0.5
    reparameterize: int | None = None
    memory: str | None = None
    memory_options: dict[str, Any] | None = None
    scale: float = 1.0
    dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    base_model_fingerprint: list[float] | None = field(default=None, repr=False)
    weights_sha256: str | None = field(default=None, repr=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> PrefixMemoryConfig:
        """Refuse unknown fields."""
        # Checked here, before the generated __init__, so that a typo gets a suggestion. PEFT would turn the
        # TypeError for an unknown field of a saved config into a warning and drop the field.
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                raise PrefixMemoryError(
                    f"PrefixMemoryConfig has no field {name!r}.{did_you_mean(name, known)} "
                    "If a newer prefixmemory wrote it, upgrade with `pip install -U prefixmemory`."
                )
        config = cast(PrefixMemoryConfig, super().__new__(cls))
        if "weights_sha256" in kwargs and "answer_limit" not in kwargs:  # a file from before there was a limit
            config.__dict__["_never_limited"] = True
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PREFIX_MEMORY
        # Not a field: read from a file whose tensors are not loaded yet, so that a refusal takes the adapter with it.
        self.awaits_weights = self.weights_sha256 is not None
        check_choice("feature_map", self.feature_map, FEATURE_MAPS)
        check_choice("normalize", self.normalize, get_args(Normalize))
        check_choice("query", self.query, get_args(Query))
        check_choice("placement", self.placement, get_args(Placement))
        if self.similarity is not None:
            check_choice("similarity", self.similarity, get_args(Similarity))
        check_choice("mixing", self.mixing, get_args(MixingKind))
        check_number("mix", self.mix, 1e-6, 1.0, "a share in (0, 1)")
        check_number("scale", self.scale)
        check_number("dropout", self.dropout, 0.0, 1.0, "a probability in [0, 1)")
        # Defaults of a free memory that is added; they go, so that the saved config of another is true.
        is_free = self.prefix_length is None and self.memory is None
        if not is_free and self.rank == type(self).rank:
            self.rank = None
        if not is_free and self.normalize == type(self).normalize:
            self.normalize = "none"
        never_limited = self.__dict__.pop("_never_limited", False) or not is_free or self.mixing != "none"
        if never_limited and self.answer_limit == type(self).answer_limit:
            self.answer_limit = None
        if self.answer_limit is not None:
            check_number("answer_limit", self.answer_limit, 1e-6, 1e6, "a number above 0, or None")
        for name in ("rank", "feature_dim", "prefix_length", "reparameterize"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value > 0):
                raise PrefixMemoryError(f"{name}={value!r} is out of range: give a positive integer, or None.")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise PrefixMemoryError(
                        f"{name}={value!r} is not a valid regular expression ({error}). "
                        f"Give a list of names, such as {name}=['self_attn'], or mend the expression."
                    ) from error
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise PrefixMemoryError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform: give the layer indices too."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise PrefixMemoryError(
                f"layers_to_transform={self.layers_to_transform!r} does not work with the regular expression "
                f"target_modules={self.target_modules!r}: give a list of names, or select the layers in the expression."
            )

        self._check_combination()
        if self.similarity is None and self.memory is None:
            self.similarity = "softmax" if self.placement == "inside" else "feature_map"

    def _check_combination(self) -> None:
        """Refuse choices that exclude each other, with the reason."""
        free, inside = self.prefix_length is None, self.placement == "inside"
        features = not inside and self.similarity != "softmax"

        def refuse(field: str, needs: str, why: str) -> None:
            raise PrefixMemoryError(f"{field}={getattr(self, field)!r} needs {needs}: {why}.")

        if self.memory is not None:
            check_memory(self.memory, self.memory_options)
            for name, why in OF_THE_PACKAGE.items():
                if getattr(self, name) not in (None, "none", getattr(type(self), name)):
                    refuse(name, f"memory=None, not {self.memory!r}", why)
            return
        if self.memory_options is not None:
            refuse("memory_options", "memory", "they are arguments of a registered memory")
        if inside and free:
            refuse("placement", "prefix_length", "a free memory has no keys that could compete inside the softmax")
        if free and self.similarity == "softmax":
            refuse("similarity", "prefix_length", "a free memory has no keys to compare the query with")
        if free and self.reparameterize is not None:
            refuse("reparameterize", "prefix_length", "it is a way to train prefix vectors")
        if free and self.normalizer:
            refuse("normalizer", "prefix_length", "a free memory absorbs the normaliser (step 4 of the paper)")
        if self.normalizer and not features:
            refuse("normalizer", "similarity='feature_map' outside the softmax", "a softmax is normalised already")
        if inside and self.similarity == "feature_map":
            refuse("similarity", "placement='outside'", "inside, prefix and input share one softmax")
        if inside and self.mixing != "none":
            refuse("mixing", "placement='outside'", "inside, the softmax itself sets the prefix's share")
        if inside and self.scale < 0:
            refuse("scale", "placement='outside'", "inside, the scale multiplies the prefix's weights in the softmax")
        if not free and self.rank is not None:
            refuse("rank", "prefix_length=None", "prefix vectors are p keys and values; p is their rank")
        if not free and self.answer_limit is not None:
            refuse("answer_limit", "prefix_length=None", "it is made for a free memory")
        if self.mixing != "none" and self.answer_limit is not None:
            refuse("answer_limit", "mixing='none'", "where λ mixes, λ sets the memory's share")
        if not free and self.share_heads:
            refuse("share_heads", "prefix_length=None", "prefix vectors are one set per key/value head anyhow")
        if not free and self.normalize != "none":
            refuse("normalize", "prefix_length=None", "only a free memory's features are normalised")
        if not free and self.dropout:
            refuse("dropout", "prefix_length=None", "it drops features of a free memory's queries")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json``, with the checksum of the weights file that lies beside it.

        Raises:
            PrefixMemoryError: the weights file holds no memory, as happens where processes hold a part each.
        """
        # PeftModel passes auto_mapping_dict and has written the weights before; transformers' own save_pretrained
        # does not, and writes them after, so that what lies there now is an older save.
        written = "auto_mapping_dict" in kwargs
        if written:
            checkpoint.check_saved_whole(Path(save_directory))
        self.weights_sha256 = checkpoint.weights_checksum(Path(save_directory)) if written else None
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PrefixMemoryConfig:
        """Read ``adapter_config.json`` from a folder or the Hub, and check the weights file beside it.

        Raises:
            PrefixMemoryError: the adapter is of another PEFT method, or its weights file is missing, truncated or
                changed since it was saved.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if folder.is_dir():
            checkpoint.check_config_file(folder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(config, PrefixMemoryConfig):  # from the Hub; PEFT makes the class that the file names
            raise PrefixMemoryError(
                f"{pretrained_model_name_or_path!r} has peft_type={config.peft_type.value!r}, not "
                f"{PREFIX_MEMORY.value!r}. Give the id of a memory."
            )
        if folder.is_dir():
            checkpoint.check_weights_file(folder, config.weights_sha256)
        elif config.weights_sha256 is not None:
            # into the Hub's cache, where PEFT finds it when it comes to the weights
            hub_id, options = str(pretrained_model_name_or_path), cls._split_kwargs(kwargs)[0]
            try:
                file = hf_hub_download(hub_id, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **options)
            except EntryNotFoundError as error:
                raise PrefixMemoryError(
                    f"{hub_id!r} on the Hub has no {SAFETENSORS_WEIGHTS_NAME} beside its {CONFIG_NAME}, or the Hub "
                    "cannot be reached. Check the network, or push the adapter again."
                ) from error
            checkpoint.check_weights_file(Path(file).parent, config.weights_sha256, hub_id)
        config.awaits_weights = True
        return config
