"""From which token on memories speak in a forward pass of the model. Before it, the model is the base model, bit for
bit.

It is worked out once for each pass (:class:`ModelPass`), and the attention layers ask for it; a silent token is not
read at all. What lies in a cache that the base model filled stays as it is, so that it can serve every adapter.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from prefixmemory.errors import PrefixMemoryError
from prefixmemory.tuner.active_tokens import (
    NEVER,
    ActiveTokens,
    Given,
    Invocation,
    Places,
    attended,
    from_mask,
    going_on,
    last_tokens,
    of_prompt,
    places,
    silent_rows,
    speaking,
    text_numbers,
)
from prefixmemory.tuner.calls import Groups, RowAdapters, row_adapters, thread

#: Under this name a cache holds where its sequences begin to speak.
OF_CACHE = "_prefix_memory_places"
#: Why a memory that waits for its invocation cannot be read in transformers' continuous batching.
PACKED = (
    "Continuous batching packs parts of many texts into one row, and does not say where in a text its invocation is. "
    "Use generate, or an adapter with active_from='start'."
)
#: Attributes of modules that hold the function which computes activations again in the backward pass.
CHECKPOINTING = ("_gradient_checkpointing_func", "checkpoint_fn")


class ModelPass:
    """One forward pass of a model.

    Attributes:
        listener: of that model.
        depth: how far within the model the module stands whose pass it is.
        outer: the pass in which this one was made, if any.
        given: whether the caller said where memories speak.
        places: where they begin, for the cache that the pass fills.
        cache: that cache, if the caller gave one.
        call: the call of an attention module in which the pass was made, if any.
        frame: where PyTorch runs the module, until the pass ends.
    """

    def __init__(self, listener: Listener, depth: int, outer: ModelPass | None) -> None:
        self.listener, self.depth, self.outer = listener, depth, outer
        self.given = False
        self.places: dict[Invocation, Places] = {}
        self.cache: Any = None
        self.call = thread.call
        self.frame = None if torch.compiler.is_compiling() else _frame_of_module()
        self.of_all: ActiveTokens | None = None
        self.of: dict[Invocation, ActiveTokens | None] = {}
        self.missing: dict[Invocation, Tensor] = {}  # of packed rows: those with a text that lacks it
        self._of_rows: dict[tuple[Invocation | None, str], ActiveTokens | None] = {}

    @property
    def was_broken_off(self) -> bool:
        """Whether it ended past its hook, as Ctrl-C ends it."""
        here, frame = sys._getframe(), self.frame
        while frame is not None and here is not frame:
            if here.f_back is None:
                return True
            here = here.f_back
        return False

    def active(self, invocation: Invocation | None) -> ActiveTokens | None:
        """The tokens on which a memory with this invocation speaks; ``None``: all."""
        if self.given:
            return self.of_all
        return None if invocation is None else self.of[invocation]

    def active_in(self, groups: Groups, name: str, span: slice, invocation: Invocation | None) -> ActiveTokens | None:
        """The same of the rows of adapter ``name`` alone, which are ``span`` of the sorted batch."""
        found, key = self.active(invocation), (invocation, name)
        if found is None:
            return None
        if key not in self._of_rows:
            mask = found.mask if groups.order is None else found.on(groups.device).index_select(0, groups.order)
            self._of_rows[key] = ActiveTokens.of(mask[span])
        return self._of_rows[key]


def _frame_of_module() -> FrameType | None:
    """Where PyTorch calls the module whose hook is at work."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != nn.Module.__module__:
        frame = frame.f_back
    return frame


def current_pass() -> ModelPass | None:
    """The innermost forward pass of the thread."""
    return cast("ModelPass | None", thread.model_pass)


def _unbroken_pass() -> ModelPass | None:
    """The same, behind the end of those that were broken off, and of the calls within them."""
    found = current_pass()
    while found is not None and found.was_broken_off:
        thread.call, found = found.call, found.outer
    thread.model_pass = found
    return found


@contextmanager
def activation(active: Tensor | Sequence[int]) -> Iterator[None]:
    """Say on which tokens memories speak, for every model that this thread calls within, also by ``generate``.

    A PEFT model's ``forward`` and ``generate`` take the same as a keyword: ``model(**batch, active=mask)``. It counts
    instead of every adapter's ``active_from``.

    Args:
        active: bool ``[rows, tokens]``, or the number of each row's first active token, ``[rows]``. Tokens are counted
            from 0 on from the beginning of the sequence, padding and what a cache holds included; behind a mask's end
            they are active.
    """
    before, thread.given = thread.given, Given(active)
    try:
        yield
    finally:
        thread.given = before


class _Prompt:
    """What a model generates from, and the cache that it goes on with from there."""

    def __init__(self, listener: Listener, ids: Tensor) -> None:
        self.listener, self.ids = listener, ids
        self.cache: Any = None

    def is_read(self, ids: Tensor | None, shape: tuple[int, int], past: Any, cache: Any) -> bool:
        """Whether a pass reads a part of it, and perhaps tokens behind it: guesses of assisted decoding, or what was
        generated without a cache. Others may go on meanwhile: of the negative prompt of classifier-free guidance, of
        what a stopping criterion asks; and what was given may be what follows a cache alone."""
        end = self.ids.shape[1]
        if not isinstance(past, int) or past >= end or self.cache not in (None, cache):
            return False
        if past + shape[1] > end and (ids is None or torch.compiler.is_compiling()):
            return False
        part = self.ids[:, past : past + shape[1]]
        if ids is not None and not torch.compiler.is_compiling():
            times, rest = divmod(len(ids), len(part))
            if rest or not torch.equal(part.to(ids.device).repeat_interleave(times, dim=0), ids[:, : part.shape[1]]):
                return False
        self.cache = cache
        return True


@contextmanager
def generating(listener: Listener, prompt: Tensor) -> Iterator[None]:
    """The model of ``listener`` generates from ``prompt``, which it may read in parts."""
    before, thread.prompt = thread.prompt, _Prompt(listener, prompt)
    try:
        yield
    finally:
        thread.prompt = before


@contextmanager
def unfinished_text() -> Iterator[None]:
    """What is read within is the beginning of a text: that no invocation is in it yet is no reason to warn."""
    before, thread.unfinished = thread.unfinished, True
    try:
        yield
    finally:
        thread.unfinished = before


class Listener:
    """Stands before a model that has memories, and works out where they speak in each forward pass; one a model.

    It stands also before the parts of the model that hold all memory layers, since some callers call such a part alone.
    """

    def __init__(self, holders: Sequence[nn.Module]) -> None:
        self.layers: list[Any] = []
        self.missed = False  # whether a prompt without the invocation was read, which is said once
        self._parameters = [list(inspect.signature(module.forward).parameters) for module in holders]
        self._handles = []
        for depth, module in enumerate(holders):
            self._handles += [
                module.register_forward_pre_hook(_Open(self, depth), with_kwargs=True),
                module.register_forward_hook(_Close(self, depth), always_call=True),
            ]

    def leave(self, layer: Any) -> None:
        """A layer is taken out of the model; with the last one, the listener is gone."""
        self.layers = [other for other in self.layers if other is not layer and not other.is_lost]
        if not self.layers:
            for handle in self._handles:
                handle.remove()

    def check(self) -> None:
        """Refuse a model that has lost a layer of an adapter which it still has.

        Raises:
            PrefixMemoryError: says where.
        """
        lost = [layer for layer in self.layers if layer.is_lost]
        if lost:
            held = {name for layer in self.layers if not layer.is_lost for name in layer.prefix_memory_bank}
            for layer in lost:
                if held & layer.prefix_memory_bank.keys():
                    raise PrefixMemoryError(
                        f"{layer.site.name} of {type(layer.site.parent).__name__} was replaced after its memory was "
                        "made, which is gone with it. Make the memory last: inject or merge LoRA first, and keep "
                        "modules_to_save outside of what has a memory."
                    )

    def open(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins; its keyword ``active`` is taken out."""
        outer = current_pass() if torch.compiler.is_compiling() else _unbroken_pass()
        if outer is not None and outer.listener is self and outer.depth < depth:
            return  # a part of a pass that is open
        if not torch.compiler.is_compiling():
            self.check()
        this = thread.model_pass = ModelPass(self, depth, outer)
        active, rows = kwargs.pop("active", None), row_adapters(*self.layers)
        given = thread.given if active is None else Given(active)
        if active is not None and thread.given is None and torch.compiler.is_compiling():
            raise PrefixMemoryError(
                "A compiled model forgets active= before its layers are called. Say it around the call, with "
                "prefixmemory.activation(...), or call a PeftModel around the compiled model."
            )
        steps = self._waiting(rows)
        if given is None and not steps:
            return
        batch = dict(zip(self._parameters[depth], args, strict=False)) | kwargs
        this.cache = batch.get("past_key_values")
        if batch.get("cache") is not None and batch.get("cu_seq_lens_q") is not None:
            raise PrefixMemoryError(PACKED)
        if given is not None:
            _, shape, device = _tokens(module, batch)
            mask = given.mask(*shape, _past(batch), device)
            this.given, this.of_all = True, ActiveTokens.of(mask)
            this.places = {invocation: from_mask(mask, _past(batch)) for invocation in steps}
        for invocation, those in steps.items() if given is None else ():
            this.of[invocation] = self._find(this, module, invocation, batch)
            missing = this.missing.get(invocation)
            if missing is None and this.places[invocation].latest == NEVER and not torch.compiler.is_compiling():
                missing = this.places[invocation].first == NEVER
            if missing is not None:
                self._missing(module.training and torch.is_grad_enabled(), missing, those, rows)
        if module.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _carry_into_checkpoints(module)

    def close(self, depth: int, output: Any) -> None:
        """It ends, perhaps broken off."""
        this = current_pass()
        if this is None or this.listener is not self or this.depth != depth:
            return
        thread.model_pass, this.frame = this.outer, None
        cache = getattr(output, "past_key_values", this.cache)
        if cache is None and isinstance(output, tuple):  # return_dict=False
            cache = next((part for part in output if isinstance(part, Cache)), None)
        if cache is not None and this.places:
            setattr(cache, OF_CACHE, this.places)

    def _waiting(self, rows: RowAdapters | None) -> dict[Invocation, list[Any]]:
        """The invocations that this pass needs, each with the steps that wait for it."""
        found: dict[Invocation, list[Any]] = {}
        for layer in self.layers:
            plan = layer.plan(rows)
            for step in () if plan is None else plan.waiting:
                found.setdefault(step.invocation, []).append(step)
        return found

    def _find(
        self, this: ModelPass, module: nn.Module, invocation: Invocation, batch: Mapping[str, Any]
    ) -> ActiveTokens | None:
        """The tokens from ``invocation`` on; writes down where rows begin."""
        cache = batch.get("past_key_values")
        past, before = _past(batch), (getattr(cache, OF_CACHE, None) or {}).get(invocation)
        if isinstance(past, int) and past == 0:
            before = None  # a cache that was emptied
        if before is not None and not torch.compiler.is_compiling() and before.latest <= past:
            this.places[invocation] = before  # all rows speak already
            return None
        ids, shape, device = _tokens(module, batch)
        if ids is None and before is None:
            raise PrefixMemoryError(
                f"The memory speaks from the tokens {list(invocation)} on, which cannot be looked for in embeddings. "
                "Say from where with active=, a mask [rows, tokens] or the number of each row's first active token."
            )
        prompt = thread.prompt if thread.prompt is not None and thread.prompt.listener is self else None
        if prompt is not None and prompt.is_read(ids, shape, past, cache):
            mask, this.places[invocation] = of_prompt(prompt.ids, ids, shape, past, invocation, before)
        elif ids is not None and isinstance(past, int) and past == 0:
            texts = text_numbers(ids, batch)
            mask, first = speaking(ids, invocation, texts)
            if texts is not None and not torch.compiler.is_compiling():
                this.missing[invocation] = silent_rows(mask, texts, attended(ids, batch))
            this.places[invocation] = places(first, last_tokens(ids, invocation), ids.shape[1])
        else:
            writes = prompt is not None and isinstance(past, int) and past >= prompt.ids.shape[1]
            mask, this.places[invocation] = going_on(ids, shape, device, past, invocation, before, writes)
        return ActiveTokens.of(mask)

    def _missing(self, trains: bool, found: Tensor, steps: list[Any], rows: RowAdapters | None) -> None:
        """Say in which rows the tokens are missing: an error in training, where nothing could be learned from them."""
        names, missing = {step.name for step in steps}, found.tolist()
        if rows is not None:
            of_row = rows.groups(len(missing), found.device).row
            missing = [gone and name in names for gone, name in zip(missing, of_row, strict=True)]
        numbers = [str(number) for number, gone in enumerate(missing) if gone]
        if not numbers or (thread.unfinished and not trains):
            return
        text = (
            f"The invocation tokens {list(steps[0].invocation)} of adapter {', '.join(sorted(names))} are missing in "
            f"row {', '.join(numbers[:10])}{' …' if len(numbers) > 10 else ''} of the batch"
        )
        if trains:
            raise PrefixMemoryError(f"{text}, from which the memory could not learn. Every training row needs them.")
        if any(step.strict for step in steps):
            raise PrefixMemoryError(f"{text}, and strict_invocation is set.")
        if not self.missed:
            self.missed = True
            warnings.warn(f"{text}: the base model answers there. This is said once.", stacklevel=2)


class _Open:
    """The hook before a holder of memories; no closure, since models are pickled whole."""

    def __init__(self, listener: Listener, depth: int) -> None:
        self.listener, self.depth = listener, depth

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.listener.open(self.depth, module, args, kwargs)
        return args, kwargs


class _Close:
    """The hook behind it."""

    def __init__(self, listener: Listener, depth: int) -> None:
        self.listener, self.depth = listener, depth

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.listener.close(self.depth, output)


class _Carrying:
    """A checkpointing function that computes again in the pass in which it computed first."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        this = current_pass()

        def in_this_pass(*again: Any, **keywords: Any) -> Any:
            before, thread.model_pass = thread.model_pass, this
            try:
                return function(*again, **keywords)
            finally:
                thread.model_pass = before

        return self.checkpoint(in_this_pass, *args, **kwargs)


def _carry_into_checkpoints(model: nn.Module) -> None:
    """The backward pass computes checkpointed layers again, when the forward pass is over."""
    for module in model.modules():
        for name in CHECKPOINTING:
            checkpoint = module.__dict__.get(name)
            if checkpoint is not None and not isinstance(checkpoint, _Carrying):
                setattr(module, name, _Carrying(checkpoint))


def _past(batch: Mapping[str, Any]) -> Any:
    """Number of tokens that the cache of a call holds; while compiling, a tensor where a static cache counts in one."""
    cache = batch.get("past_key_values")
    length = 0 if cache is None else cache.get_seq_length()
    return length if torch.compiler.is_compiling() else int(length)


def _tokens(module: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, tuple[int, int], torch.device]:
    """The ids that a pass reads, the decoder's where there are two, their rows and number, and their device.

    Raises:
        PrefixMemoryError: it reads neither ids nor embeddings.
    """
    ids, embeddings = batch.get("input_ids"), batch.get("inputs_embeds")
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        ids, embeddings = batch.get("decoder_input_ids"), batch.get("decoder_inputs_embeds")
        if ids is None and embeddings is None and batch.get("labels") is not None:
            shift = getattr(module, "prepare_decoder_input_ids_from_labels", None) or cast(Any, module)._shift_right
            ids = shift(batch["labels"])
    like = ids if ids is not None else embeddings
    if like is None:
        raise PrefixMemoryError(
            f"{type(module).__name__} was called without token ids, so that it cannot be said on which tokens its "
            "memory speaks. Use active_from='start'."
        )
    return ids, (like.shape[0], like.shape[1]), like.device
