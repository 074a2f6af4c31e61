"""PrefixMemoryConfig: every choice of the method as a typed, validated field."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import peft
from packaging.version import InvalidVersion, Version
from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

import prefixmemory.memories.matrix  # the built-in memories register themselves
import prefixmemory.memories.prefix  # noqa: F401
from prefixmemory._version import __version__
from prefixmemory.errors import (
    PrefixMemoryError,
    UnknownFieldError,
    check_choice,
    check_number,
    check_positive_integer,
    did_you_mean,
)
from prefixmemory.memories import checkpoint
from prefixmemory.memories.feature_maps import FEATURE_MAPS
from prefixmemory.memories.matrix import MatrixMemory, Normalize
from prefixmemory.memories.mixing import MixingKind
from prefixmemory.memories.patterns import check_patterns
from prefixmemory.memories.peft_type import PREFIX_MEMORY
from prefixmemory.memories.prefix import Placement, Similarity
from prefixmemory.memories.registry import AUTO, MEMORY_FIELDS, MemoryKind, memory_kind

#: Fields of PEFT's other methods that a memory does not have, and what to do instead.
NOT_HERE = {
    "layer_replication": "a memory hangs in layers that are there. Build the model with its layers repeated, then add "
    "the memory",
    "alpha_pattern": "a memory has no alpha. Give scale_pattern, the factor itself for each layer",
    "ensure_weight_tying": "modules_to_save makes copies, which are not tied. Leave tied modules out of it",
}

#: Fields that may have another value in some modules.
PATTERNS = ("rank", "scale", "output_limit")

Query = Literal["content", "rotary"]
Auto = Literal["auto"]
ActiveFrom = Literal["start", "invocation", "question", "answer", "auto"]


@dataclass
class PrefixMemoryConfig(PeftConfig):
    """PrefixMemory-Tuning: every attention head adds scale·φ(q)ᵀM to its output (arXiv 2506.13674, step 4).

    Fields left at ``auto`` follow from the others. They are resolved when the config is made, and saved as resolved; a
    value that means nothing to the memory that is asked for is refused. Why the defaults are what they are:
    ``docs/defaults.md``. How each field relates to the paper: ``docs/paper.md``.

    Args:
        feature_map: φ: ``elu``, ``gelu``, ``relu``, ``silu``, ``identity``, ``softmax``, ``mlp`` (trainable), or a
            name registered with :func:`prefixmemory.register_feature_map`.
        feature_dim: D_φ, for maps that let it be chosen (``mlp``); ``None`` means the head dimension.
        normalize: what is done to φ(q). ``feature_mean`` subtracts its mean over the first batch, padding included, a
            fixed vector that is taken before the first training step (or by :func:`prefixmemory.calibrate`) and saved
            with the memory: most of φ(q) is the same for every token (60 to 81 % of its energy in SmolLM2), and a
            memory that learns from that says the same to all texts (``docs/LOG.md``). ``none`` (the paper's form)
            leaves φ(q) as it is, ``query_rms`` brings q to unit root-mean-square before φ, ``feature_l2`` divides φ(q)
            by its Euclidean norm (a full memory of the paper's form then wants 3e-3 instead of 3e-4).
        query: ``content`` reads the query before rotary position embedding (after the q-norm where the model has
            one), ``rotary`` reads the query that attention sees. ``auto``: ``content``; inside the softmax ``rotary``,
            which is all that there is.
        rank: r for M = A·B with A ``[D_φ, r]`` and B ``[r, D]``, or ``None`` for a full M, which with
            ``normalize="none"`` and without a limit is the paper's form, and wants a learning rate of about 3e-4. The
            default is 8, a quarter of the parameters at a head dimension of 64. With the other defaults, a full M wants
            2e-3; it scored 4 points more on short inputs, and lost more behind long ones (``docs/defaults.md``).
            Prefix vectors have none, and registered memories only if they ask for it: elsewhere it is ``None``.
        feed_forward: r of further memories beside each projection of the feed-forward blocks: x·A·B, with x what the
            projection reads, A ``[in, r]`` and B ``[r, out]``; a block that is nothing but experts has one as a whole.
            Layers that hold no attention which gets a memory have none there either, unless no layer of the model holds
            both (Nemotron-H). ``None``: none, the paper's form.
        feed_forward_limit: as ``output_limit``, in lengths of what the projection itself returns. ``auto``: 0.5 where
            ``feed_forward`` is given.
        output_limit: c, the length that no memory output a reaches, in lengths of the head's own output o. Short ones
            pass as they are, longer ones are shortened smoothly: a / √(1 + |a|² / (c·|o|)²). So no step of training
            drowns what the model says by itself (``docs/LOG.md``). ``scale`` multiplies what is left, and each of
            several active memories is limited on its own. ``None``: no limit, the paper's form. ``auto``: 0.5 for a
            free memory, what a registered memory names, else ``None``. With ``mixing`` and inside the softmax it must
            be ``None``.
        share_heads: one memory per key/value group instead of one per query head.
        placement: ``outside`` the softmax (a memory), or ``inside``, where the prefix's keys compete with the input's
            (Prefix-Tuning, step 1).
        prefix_length: ``None`` for a free memory M (step 4), or p for p trainable keys and values per key/value head
            (steps 1 to 3).
        similarity: how prefix vectors are compared with queries: ``softmax``, exactly (outside: over the prefix alone,
            step 2), or ``feature_map``, φ(q)ᵀB (step 3). ``auto``: ``softmax`` inside, ``feature_map`` outside.
        normalizer: divide φ(q)ᵀB by φ(q)ᵀn (step 3).
        mixing: ``none`` adds the memory output a to the head's output o; ``fixed`` gives λ·o + (1 − λ)·a; ``layer`` and
            ``head`` learn λ, one per layer or one per head. Works for every memory outside the softmax.
        mix: λ, or the start value of a learned one, in (0, 1). ``auto``: 0.5 where ``mixing`` asks for one; without
            ``mixing`` it is refused.
        reparameterize: width of the MLP through which prefix vectors are trained (Li and Liang, 2021); ``None``: none.
        memory: name of a registered memory: ``matrix`` (the free memory M), ``prefix`` (prefix vectors), or one
            registered with :func:`prefixmemory.register_memory`. ``auto``: ``prefix`` with a ``prefix_length``, else
            ``matrix``.
        memory_options: keyword arguments for a custom memory's class: numbers, texts, truth values.
        scale: a factor on the memory output; :func:`prefixmemory.set_scale` changes it at run time.
        head_scale: a further factor on what memories in the heads say, and not those in feed-forward blocks; it stays
            what it is at run time. ``auto``: 0.25 for a free memory with ``feed_forward`` and without ``mixing``, since
            heads that learn as fast as the blocks beside them overfit (``docs/defaults.md``), else 1. Inside the
            softmax it must be 1.
        active_from: from which token of a sequence on the memory speaks; before it the model is the base model, bit for
            bit. ``start`` (the paper): from the first. ``invocation``: from the last place in the sequence where
            ``invocation_tokens`` begin. ``question``, ``answer``: the same with the tokens that introduce the last
            question, or end the prompt; recipes find them, elsewhere :func:`prefixmemory.invocation_tokens` does.
            ``auto``, in recipes: ``question``, where the rows show where it begins, else ``start``.
            :func:`prefixmemory.activation` overrides it in a call.
        invocation_tokens: ids of these tokens.
        strict_invocation: whether a sequence without them is an error; else the base model answers it, with a warning.
            In training it always is.
        dropout: probability of dropping an entry of φ(q) in training.
        target_modules: names of attention modules, and with ``feed_forward`` of projections (suffixes, or one regular
            expression over the full name), as in PEFT. ``None`` means every softmax self-attention of the model, and
            the blocks beside it; of a model that also sees or hears, those of its text part.
        exclude_modules: names of modules to leave alone.
        layers_to_transform: layer index or indices to adapt; others are left alone.
        layers_pattern: name of the list that holds the layers, when it is not found by itself.
        rank_pattern, scale_pattern, output_limit_pattern: another ``rank``, ``scale`` or ``output_limit`` for some
            modules, by the end of their names or a regular expression for it, as PEFT's ``rank_pattern``:
            ``{"layers.0.self_attn": 16}``. The first that fits counts; one that fits none is refused.
        modules_to_save: further modules to train and save in full, as in PEFT.
        trainable_token_indices: ids of tokens whose input embeddings learn too, as in PEFT.
        base_model_fingerprint: written by ``get_peft_model``: a sample of the base model's input embeddings, by
            which loading refuses another base model. Set it to ``None`` to load onto another model on purpose.
        resized_vocabulary: written when saving: number of rows of the embeddings, where PEFT saved them since they had
            been resized; without it, a file with embeddings is refused.
        prefixmemory_version: of the package that made the config.
        weights_sha256: written when saving: checksum of the weights file, by which loading refuses a damaged one.
    """

    memory: str = AUTO
    memory_options: dict[str, Any] | None = None
    feature_map: str | None = AUTO
    feature_dim: int | Auto | None = AUTO
    normalize: Normalize | Auto = AUTO
    query: Query | Auto = AUTO
    rank: int | Auto | None = AUTO
    feed_forward: int | None = None
    feed_forward_limit: float | Auto | None = AUTO
    output_limit: float | Auto | None = AUTO
    share_heads: bool | Auto = AUTO
    placement: Placement | Auto = AUTO
    prefix_length: int | Auto | None = AUTO
    similarity: Similarity | Auto | None = AUTO
    normalizer: bool | Auto = AUTO
    reparameterize: int | Auto | None = AUTO
    mixing: MixingKind = "none"
    mix: float | Auto | None = AUTO
    scale: float = 1.0
    head_scale: float | Auto = AUTO
    active_from: ActiveFrom = "start"
    invocation_tokens: list[int] | None = None
    strict_invocation: bool = False
    dropout: float | Auto = AUTO
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int | None] | None = None
    scale_pattern: dict[str, float] | None = None
    output_limit_pattern: dict[str, float | None] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    base_model_fingerprint: list[float | None] | None = field(default=None, repr=False)
    weights_sha256: str | None = field(default=None, repr=False)
    resized_vocabulary: int | None = field(default=None, repr=False)
    prefixmemory_version: str | None = field(default=None, repr=False)

    def __new__(cls, *args: Any, **kwargs: Any) -> PrefixMemoryConfig:
        """Refuse unknown fields."""
        # Checked here, before the generated __init__, so that a typo gets a suggestion. PEFT turns Python's own
        # TypeError for an unknown field of a saved config into a warning, and drops the field.
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name in NOT_HERE:
                raise UnknownFieldError(f"PrefixMemoryConfig has no field {name!r}: {NOT_HERE[name]}.")
            if name not in known:
                if not did_you_mean(name, known) and _is_of_a_newer_peft(kwargs):
                    raise TypeError(f"PrefixMemoryConfig got an unexpected keyword argument {name!r}")
                raise UnknownFieldError(
                    f"PrefixMemoryConfig has no field {name!r}.{did_you_mean(name, known)} "
                    "If a newer prefixmemory wrote it, upgrade with `pip install -U prefixmemory`."
                )
        return cast(PrefixMemoryConfig, super().__new__(cls))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PREFIX_MEMORY
        was_saved = self.prefixmemory_version is not None
        self.prefixmemory_version = self.prefixmemory_version or __version__
        # Not a field: read from a file whose tensors are not loaded yet, so that a refusal takes the adapter with it.
        self.awaits_weights = self.weights_sha256 is not None
        self._check_values()
        self._check_targets()
        if self.memory == AUTO:
            self.memory = "matrix" if self.prefix_length in (None, AUTO) else "prefix"
        kind = self.kind
        if kind.says("is_builtin"):
            if self.memory_options is not None:
                raise PrefixMemoryError(
                    f"memory_options={self.memory_options!r} needs memory: they are arguments of a registered memory."
                )
        else:
            kind.check_options(self.memory_options)
        if (settle := kind.says("settle")) is not None:
            settle(self)
        kind.settle(self)
        if self.query == AUTO:
            self.query = "rotary" if self.placement == "inside" else "content"
        elif self.query == "content" and self.placement == "inside":
            raise PrefixMemoryError(
                "query='content' needs placement='outside': inside the softmax, a prefix meets the query that "
                "attention sees. Leave query out."
            )
        if self.feature_map is None and kind.says("is_builtin") and self.similarity != "softmax":
            check_choice("feature_map", None, FEATURE_MAPS)
        self._settle_combination(kind)
        self._settle_head_scale(kind, was_saved)
        if self.feed_forward is None and self.feed_forward_limit not in (AUTO, None):
            raise PrefixMemoryError(
                f"feed_forward_limit={self.feed_forward_limit!r} needs feed_forward: without it, it limits nothing."
            )
        if self.feed_forward_limit == AUTO:
            self.feed_forward_limit = None if self.feed_forward is None else MatrixMemory.output_limit

    @property
    def kind(self) -> MemoryKind:
        """The registered memory that the config asks for."""
        return memory_kind(self.memory)

    def _check_values(self) -> None:
        """Refuse values that no memory takes."""

        def given(name: str) -> Any:
            value = getattr(self, name)
            return None if value == AUTO else value

        choices = {"feature_map": FEATURE_MAPS, "normalize": get_args(Normalize), "placement": get_args(Placement)}
        for name, known in choices.items():
            if getattr(self, name) not in (AUTO, MEMORY_FIELDS[name]):
                check_choice(name, getattr(self, name), known)
        if given("similarity") is not None:
            check_choice("similarity", self.similarity, get_args(Similarity))
        if self.query != AUTO:
            check_choice("query", self.query, get_args(Query))
        check_choice("mixing", self.mixing, get_args(MixingKind))
        check_number("scale", self.scale)
        if self.head_scale != AUTO:
            check_number("head_scale", self.head_scale, 1e-6, 1e6, "a number above 0")
        self._check_activation()
        if self.mix not in (AUTO, None):
            check_number("mix", self.mix, 1e-6, 1.0, "a share in (0, 1)")
        if self.dropout != AUTO:
            check_number("dropout", self.dropout, 0.0, 1.0, "a probability in [0, 1)")
        for name in ("output_limit", "feed_forward_limit"):
            if given(name) is not None:
                check_number(name, getattr(self, name), 1e-6, 1e6, "a number above 0, or None")
        for name in ("rank", "feed_forward", "feature_dim", "prefix_length", "reparameterize"):
            check_positive_integer(name, given(name))
        for name in ("share_heads", "normalizer"):
            if getattr(self, name) not in (True, False, AUTO):
                raise PrefixMemoryError(f"{name}={getattr(self, name)!r} is no truth value: give true or false.")

    def _check_activation(self) -> None:
        check_choice("active_from", self.active_from, get_args(ActiveFrom))
        if not isinstance(self.strict_invocation, bool):
            raise PrefixMemoryError(
                f"strict_invocation={self.strict_invocation!r} is no truth value: give true or false."
            )
        tokens = self.invocation_tokens
        if tokens is not None:
            whole = isinstance(tokens, list | tuple) and all(type(token) is int and token >= 0 for token in tokens)
            if not whole or not tokens:
                raise PrefixMemoryError(f"invocation_tokens={tokens!r} is no list of token ids: give whole numbers.")
            self.invocation_tokens = list(tokens)
        if self.active_from in ("start", AUTO) and (tokens is not None or self.strict_invocation):
            name = "invocation_tokens" if tokens is not None else "strict_invocation"
            means = "may mean" if self.active_from == AUTO else "means"
            raise PrefixMemoryError(
                f"{name}={getattr(self, name)!r} needs active_from='invocation', 'question' or 'answer': with "
                f"{self.active_from!r} it {means} nothing."
            )
        if self.active_from == "invocation" and tokens is None:
            raise PrefixMemoryError(
                "active_from='invocation' needs invocation_tokens: the ids of the tokens from which on it speaks."
            )

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        check_patterns(self)
        for name in (f"{name}_pattern" for name in PATTERNS):
            if not isinstance(getattr(self, name) or {}, dict):
                raise PrefixMemoryError(
                    f"{name}={getattr(self, name)!r} is no mapping: give values by names of modules, such as "
                    f"{name}={{'layers.0.self_attn': ...}}."
                )
        self.layers_pattern = self.layers_pattern or None  # an empty one means none, as in PEFT
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise PrefixMemoryError(
                f"layers_pattern={self.layers_pattern!r} needs layers_to_transform: give the layer indices too."
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise PrefixMemoryError(
                f"layers_to_transform={self.layers_to_transform!r} does not work with the regular expression "
                f"target_modules={self.target_modules!r}: give a list of names, or select the layers in the expression."
            )

    def _settle_combination(self, kind: MemoryKind) -> None:
        """How the memory's output joins the head's own: limited, or mixed with it."""
        if self.mixing == "none":
            if self.mix not in (AUTO, None):
                raise PrefixMemoryError(f"mix={self.mix!r} needs mixing: without it nothing is mixed.")
            self.mix = None
        elif self.mix in (AUTO, None):
            self.mix = 0.5
        if self.output_limit == AUTO:
            self.output_limit = kind.says("output_limit") if self.mixing == "none" else None
        elif self.output_limit is not None and self.mixing != "none":
            raise PrefixMemoryError(
                f"output_limit={self.output_limit!r} needs mixing='none': where λ mixes, λ sets the memory's share."
            )

    def _settle_head_scale(self, kind: MemoryKind, was_saved: bool) -> None:
        if self.head_scale == AUTO:  # what was saved without one had learned at 1
            is_free = kind is memory_kind("matrix") and self.mixing == "none" and not was_saved
            self.head_scale = 0.25 if is_free and self.feed_forward is not None else 1.0
        elif self.head_scale != 1 and self.placement == "inside":
            raise PrefixMemoryError(
                f"head_scale={self.head_scale!r} needs placement='outside': inside the softmax, use scale."
            )

    def of_module(self, name: str, in_feed_forward: bool = False) -> PrefixMemoryConfig:
        """The config of the memory of one module: this one, but for what a pattern says of its name; in a feed-forward
        block, that of a free memory with two factors, which reads its query as it is.

        Raises:
            PrefixMemoryError: a pattern gives a value that the field refuses.
        """
        chosen: dict[str, Any] = {}
        for field_name in PATTERNS:
            pattern = getattr(self, f"{field_name}_pattern") or {}
            key = get_pattern_key(list(pattern), name)
            if key in pattern:
                chosen[field_name] = pattern[key]
        if not in_feed_forward:
            return replace(self, **chosen) if chosen else self
        own = {
            "feature_map": "identity",
            "normalize": "none",
            "rank": self.feed_forward,
            "output_limit": self.feed_forward_limit,
            "scale": self.scale,
            "dropout": self.dropout,
            "active_from": self.active_from,
            "invocation_tokens": self.invocation_tokens,
            "strict_invocation": self.strict_invocation,
        }
        found = PrefixMemoryConfig(**{**own, **chosen})
        if found.rank is None:
            raise PrefixMemoryError(
                f"rank_pattern gives {name!r} no rank: a memory in a feed-forward block has two factors. Give a number."
            )
        return found

    def unused_pattern(self, names: Iterable[str]) -> str | None:
        """The first of the patterns that fits none of the modules ``names``."""
        found = list(names)
        for field_name in PATTERNS:
            for key in getattr(self, f"{field_name}_pattern") or ():
                if not any(get_pattern_key([key], name) == key for name in found):
                    return f"{field_name}_pattern={{{key!r}: ...}}"
        return None

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
        self.resized_vocabulary = checkpoint.embedding_rows(Path(save_directory)) if written else None
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
            hub = cls._split_kwargs(kwargs)[0]
            checkpoint.check_hub_weights(str(pretrained_model_name_or_path), subfolder, config.weights_sha256, hub)
        config.awaits_weights = True
        return config


def _is_of_a_newer_peft(saved: dict[str, Any]) -> bool:
    """Whether unknown fields of a file are PEFT's: a newer PEFT wrote it, with a prefixmemory no newer than this."""
    try:
        return Version(str(saved.get("peft_version"))) > Version(peft.__version__) and Version(
            str(saved.get("prefixmemory_version"))
        ) <= Version(__version__)
    except InvalidVersion:
        return False
