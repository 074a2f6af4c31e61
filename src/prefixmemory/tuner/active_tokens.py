"""On which tokens of a batch a memory speaks, worked out from token ids.

A sequence is silent up to the last place where the invocation tokens begin in it, and speaks from there to its end. A
sequence that is read in several passes goes on speaking once it speaks; its :class:`Places` travel with its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixmemory.errors import PrefixMemoryError

#: The tokens from whose last occurrence on a memory speaks.
Invocation = tuple[int, ...]
#: Place of a sequence that does not speak yet.
NEVER = torch.iinfo(torch.int64).max


class ActiveTokens:
    """Tokens of one forward pass on which a memory speaks.

    Attributes:
        mask: bool ``[rows, tokens]``.
        index: their places in the flattened mask; ``None`` while compiling, where shapes must not depend on values.
    """

    def __init__(self, mask: Tensor, index: Tensor | None) -> None:
        self.mask, self.index = mask, index

    @classmethod
    def of(cls, mask: Tensor) -> ActiveTokens | None:
        """The tokens of ``mask``; ``None`` if it is all of them."""
        if torch.compiler.is_compiling():
            return cls(mask, None)
        index = mask.flatten().nonzero()[:, 0]
        return None if len(index) == mask.numel() else cls(mask, index)

    def on(self, device: torch.device) -> Tensor:
        """The mask on a device: layers may lie on others than the token ids."""
        return self.mask if self.mask.device == device else self.mask.to(device)

    @property
    def none(self) -> bool:
        """Whether there are none, for certain."""
        return self.index is not None and not len(self.index)

    def check(self, rows: torch.Size, module: nn.Module) -> None:
        """Refuse heads' outputs of other tokens, ``rows`` being their leading axes.

        Raises:
            PrefixMemoryError: names both shapes.
        """
        if rows not in (self.mask.shape, torch.Size([self.mask.numel()])):
            raise PrefixMemoryError(
                f"{type(module).__name__} computes {list(rows)} tokens where the model was given "
                f"{list(self.mask.shape)}, so that it cannot be said on which of them its memory speaks. Leave it out "
                "with exclude_modules, or use active_from='start'."
            )


@dataclass(frozen=True)
class Places:
    """Where the sequences of a batch begin to speak, counted from the first token of each, padding included.

    Attributes:
        first: ``[rows]``; ``NEVER``: not yet.
        latest: the last of them, as a number; ``NEVER`` also where it was not worked out.
        tail: ``[rows, n]``, the last tokens read, in which an invocation may have begun; ``None``: not known.
        read: number of tokens read.
    """

    first: Tensor
    latest: int
    tail: Tensor | None
    read: Any

    def for_rows(self, rows: int) -> Tensor:
        """``first`` for a batch each of whose rows may have become several.

        Raises:
            PrefixMemoryError: there are fewer rows than sequences.
        """
        if rows % len(self.first):
            raise PrefixMemoryError(
                f"The cache holds {len(self.first)} sequences for {rows} rows: rows were taken out of it by hand. Say "
                "from where the memory speaks with active=."
            )
        return self.first.repeat_interleave(rows // len(self.first), dim=0) if rows > len(self.first) else self.first

    def moved(self, move: Callable[[Tensor], Tensor]) -> Places:
        """Those of rows that were reordered, chosen or repeated, as ``move`` does with a tensor that has them."""
        return places(move(self.first), None if self.tail is None else move(self.tail), self.read)

    def kept(self, past: Any, rows: int, invocation: Invocation) -> Tensor:
        """``first`` behind the ``past``-th token: of what a cache that was cropped has lost, nothing has begun."""
        first = self.for_rows(rows)
        if isinstance(past, int) and self.read == past:
            return first
        needs = 1 if self.tail is None else len(invocation)
        return torch.where(first <= past - needs, first, NEVER)

    def in_front(self, past: Any, rows: int, invocation: Invocation) -> Tensor | None:
        """The last tokens before the ``past``-th in which an occurrence may have begun, as far as they are known; a
        cache may have been cropped."""
        if self.tail is None or not isinstance(self.read, int) or not isinstance(past, int):
            return None
        lost = self.read - past
        if not 0 <= lost < self.tail.shape[1]:
            return None
        tail = last_tokens(self.tail[:, : self.tail.shape[1] - lost], invocation)
        return tail.repeat_interleave(rows // len(tail), dim=0)


def places(first: Tensor, tail: Tensor | None, read: Any) -> Places:
    """As given, and the latest."""
    return Places(first, NEVER if torch.compiler.is_compiling() else int(first.max()), tail, read)


@dataclass(frozen=True)
class Given:
    """Where memories speak by the caller's word: ``active`` of :func:`prefixmemory.activation`."""

    active: Tensor | Sequence[int]

    def mask(self, rows: int, tokens: int, past: Any, device: torch.device) -> Tensor:
        """Of the ``tokens`` that come behind ``past`` others, bool ``[rows, tokens]``.

        Raises:
            PrefixMemoryError: it has another shape or type, or another number of rows.
        """
        active = torch.as_tensor(self.active).to(device)
        fits = active.ndim == 2 if active.dtype == torch.bool else active.ndim == 1 and not active.is_floating_point()
        if not fits or not len(active) or rows % len(active):
            raise PrefixMemoryError(
                f"active has shape {list(active.shape)} and dtype {active.dtype} for {rows} rows: give one bool per "
                "token, [rows, tokens], or the number of each row's first active token."
            )
        active = active.repeat_interleave(rows // len(active), dim=0)
        numbers: Tensor = past + torch.arange(tokens, device=device)
        if active.ndim == 1:
            return numbers.ge(active[:, None])
        length = active.shape[1]
        return active.index_select(1, numbers.clamp(max=length - 1)) | numbers.ge(length)


def from_mask(mask: Tensor, past: Any) -> Places:
    """The places of rows with this mask: each begins with its first active token."""
    numbers = past + torch.arange(mask.shape[1], device=mask.device)
    return places(torch.where(mask, numbers, NEVER).amin(dim=1), None, past + mask.shape[1])


def speaking(ids: Tensor, invocation: Invocation, texts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tokens from the beginning of the last occurrence of ``invocation`` on, in every text.

    Args:
        ids: ``[rows, tokens]``.
        invocation: the tokens looked for.
        texts: the number of the text that each token belongs to, ``[rows, tokens]``, growing within a row from 0 on;
            ``None``: one a row.

    Returns:
        bool ``[rows, tokens]``, and where the last text of each row begins to speak, ``[rows]``, ``NEVER`` if nowhere.
    """
    begins, numbers = _occurrences(ids, invocation, texts)
    found = torch.where(begins, numbers, -1)
    if texts is None:
        last = found.amax(dim=1, keepdim=True).expand(-1, ids.shape[1])
    else:
        last = torch.full_like(found, -1).scatter_reduce(1, texts, found, "amax").gather(1, texts)
    first = last[:, -1]
    return (numbers >= last) & (last >= 0), torch.where(first >= 0, first, NEVER)


def first_occurrence(ids: Tensor, invocation: Invocation) -> Tensor:
    """Where the first occurrence of ``invocation`` begins in each row, ``[rows]``, ``NEVER`` if nowhere: from there on
    the memory speaks of a model that writes these tokens one by one."""
    begins, numbers = _occurrences(ids, invocation)
    return torch.where(begins, numbers, NEVER).amin(dim=1)


def _occurrences(ids: Tensor, invocation: Invocation, texts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which tokens begin an occurrence, within one text, bool ``[rows, tokens]``; and the number of each token."""
    rows, tokens = ids.shape
    numbers = torch.arange(tokens, device=ids.device).expand(rows, -1)
    begins = torch.ones_like(ids, dtype=torch.bool)
    for offset, token in enumerate(invocation):
        begins &= (ids.roll(-offset, dims=1) == token) & (numbers < tokens - offset)
        if texts is not None:
            begins &= texts.roll(-offset, dims=1) == texts
    return begins, numbers


def going_on(
    ids: Tensor | None, shape: tuple[int, int], device: torch.device, past: Any, invocation: Invocation,
    before: Places | None, writes: bool = False,
) -> tuple[Tensor, Places]:  # fmt: skip
    """The same of a pass of ``shape`` behind ``past`` tokens that lie in a cache.

    Args:
        ids: its tokens; ``None``: not known, so that no occurrence is looked for.
        shape: its rows and tokens.
        device: where they are.
        past: number of tokens in front of it.
        invocation: the tokens looked for.
        before: the places up to it; ``None``: a cache that no memory has spoken to.
        writes: whether its tokens are the model's own, or guesses at them, so that the first occurrence counts.

    Returns:
        bool ``[rows, tokens]``, and the places to go on from.
    """
    rows, tokens = shape
    end = past + tokens
    first, tail = torch.full((rows,), NEVER, device=device), None
    if before is not None:
        first = before.kept(past, rows, invocation)
    if ids is not None:
        front = None if before is None else before.in_front(past, rows, invocation)
        seen = ids if front is None else torch.cat([front, ids], dim=1)
        new = first_occurrence(seen, invocation) if writes else speaking(seen, invocation)[1]
        new = torch.where(new == NEVER, NEVER, (new + (end - seen.shape[1])).clamp(min=0))
        first = torch.where(first != NEVER, first, new)
        tail = last_tokens(seen, invocation, guessed=tokens if writes else 0)
    return past + torch.arange(tokens, device=device) >= first[:, None], places(first, tail, end)


def of_prompt(
    prompt: Tensor, ids: Tensor | None, shape: tuple[int, int], past: Any, invocation: Invocation,
    before: Places | None = None,
) -> tuple[Tensor, Places]:  # fmt: skip
    """The same of a pass that reads a part of a ``prompt`` that is known as a whole, ``[rows, tokens]``; each of its
    rows may have become several. Where it has no invocation, what ``ids`` has behind it may bring it; what spoke
    ``before`` goes on."""
    rows, tokens = shape
    end = past + tokens
    prompt = prompt if ids is None else prompt.to(ids.device)
    _, first = speaking(prompt, invocation)
    first = Places(first, NEVER, None, end).for_rows(rows)
    text, guessed = prompt.repeat_interleave(rows // len(prompt), dim=0), 0
    if ids is not None and end > prompt.shape[1]:
        text, guessed = torch.cat([text[:, :past], ids], dim=1), end - prompt.shape[1]
        first = torch.where(first != NEVER, first, first_occurrence(text, invocation))
    if before is not None:
        kept = before.kept(past, rows, invocation).to(first.device)
        first = torch.where(kept != NEVER, kept, first)
    tail = last_tokens(text[:, :end], invocation, guessed)
    return past + torch.arange(tokens, device=prompt.device) >= first[:, None], places(first, tail, end)


def last_tokens(ids: Tensor, invocation: Invocation, guessed: int = 0) -> Tensor:
    """Those in which an occurrence may have begun that the next pass completes, ``[rows, n]``, also where the last
    ``guessed`` of them are taken back."""
    return ids[:, max(0, ids.shape[1] - guessed - len(invocation) + 1) :]


def text_numbers(ids: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """Which of the texts packed into a row each token belongs to; ``None`` where nothing says that there are several.

    Position ids that fall from one token to the next begin another text, but not on padding behind one.
    """
    positions, lengths = batch.get("position_ids"), batch.get("cu_seq_lens_q")
    if isinstance(lengths, Tensor) and len(ids) == 1:
        numbers = torch.arange(ids.shape[1], device=ids.device)
        return torch.bucketize(numbers, lengths.to(numbers)[1:], right=True)[None]
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == ids.shape[1] > 1:
        falls = (positions.diff(dim=1) < 0).expand(len(ids), -1).to(ids.device)
        if (mask := attended(ids, batch)) is not None:
            falls = falls & mask[:, 1:]
        begins = falls.cumsum(dim=1)
        return torch.cat([torch.zeros_like(begins[:, :1]), begins], dim=1)
    return None


def attended(ids: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """Which tokens are no padding, bool ``[rows, tokens]``; ``None`` where nothing says so."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask.to(ids.device) != 0
    return None


def silent_rows(active: Tensor, texts: Tensor, counts: Tensor | None) -> Tensor:
    """The rows that hold a text on no token of which a memory speaks, bool ``[rows]``.

    Args:
        active: the tokens on which it does, ``[rows, tokens]``.
        texts: the number of the text that each token belongs to.
        counts: the tokens that are no padding; ``None``: all.
    """
    spoken = torch.zeros_like(texts).scatter_reduce(1, texts, active.long(), "amax").gather(1, texts)
    silent = spoken == 0
    return (silent if counts is None else silent & counts).any(dim=1)
