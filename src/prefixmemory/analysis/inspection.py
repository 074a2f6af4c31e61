"""``prefixmemory inspect``: the instruments on saved adapters, written as JSON, figures and a page."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from prefixmemory.adapters.loading import Adapter
from prefixmemory.analysis import figures
from prefixmemory.analysis.inputs import longest_input, token_ids
from prefixmemory.analysis.long_input import LongInput, long_input
from prefixmemory.analysis.page import page
from prefixmemory.analysis.readout import Heads, ablate, readout, text_loss
from prefixmemory.analysis.shift import Shift, shift
from prefixmemory.analysis.spectrum import Spectrum, spectrum
from prefixmemory.analysis.tradeoff import Tradeoff, tradeoff
from prefixmemory.errors import PrefixMemoryError, check_choice
from prefixmemory.files.records import provenance, write_json, write_text
from prefixmemory.rows.data import northline, sample
from prefixmemory.rows.rows import Rows
from prefixmemory.rows.unrelated_text import read_context

INSTRUMENTS = ("tradeoff", "spectrum", "shift", "readout", "long-input")
#: By which of them an option is read.
READ_BY = {
    "text": ("tradeoff", "spectrum", "shift", "readout"),
    "length": ("tradeoff",),
    "tokens": ("spectrum", "shift", "readout"),
    "heads": ("readout",),
    "data": ("readout", "long-input"),
    "limit": ("readout", "long-input"),
    "context": ("long-input",),
    "context_lengths": ("long-input",),
}
#: Longest input of the trade-off, and tokens for the other instruments, where nothing else is asked for.
LENGTH, TOKENS = 4096, 1024
SHORTEST, LONGEST = 16, 1_000_000

FIGURES: dict[str, Callable[..., Any]] = {
    "tradeoff": figures.tradeoff_figure,
    "spectrum": figures.spectrum_figure,
    "shift": figures.shift_figure,
    "readout": figures.readout_figure,
    "long-input": figures.long_input_figure,
}


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        what: an instrument, or ``all``: those that the adapter has something for.
        text: the input; ``None``: messages of the Northline data set.
        length: longest input of the trade-off, in tokens; ``None``: 4,096, or what model and text allow.
        tokens: length of the input of the others; ``None``: 1,024, or what model and text allow.
        heads: number of heads to ablate, those with the largest memories.
        loss: for ablations, makes the function that computes an adapter's loss; ``None``: that on the text.
        rows: for long inputs, gives an adapter's rows; ``None``: ``limit`` test rows of the Northline data set.
        limit: number of these.
        context: file with the unrelated text of long inputs; ``None``: the essay that ships with the package.
        in_front: tokens of it; ``None``: 0, 256, 1,024 and 4,000, or what model and text allow.
    """

    what: str = "all"
    text: str | None = None
    length: int | None = None
    tokens: int | None = None
    heads: int = 16
    loss: Callable[[Adapter], Callable[[], float]] | None = None
    rows: Callable[[Adapter], Rows] | None = None
    limit: int = 64
    context: Path | None = None
    in_front: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_choice("what", self.what, (*INSTRUMENTS, "all"))
        for name in ("length", "tokens"):
            value = getattr(self, name)
            if value is not None and not SHORTEST <= value <= LONGEST:
                raise PrefixMemoryError(f"{name}={value} is out of range: give {SHORTEST} to {LONGEST:,} tokens.")
        if self.heads < 1:
            raise PrefixMemoryError(f"heads={self.heads} is out of range: give a number above 0.")
        if self.text is not None and not self.text.strip():
            raise PrefixMemoryError("The text is empty, so there is nothing to look at. Give some sentences.")
        for tokens in self.in_front or ():
            if tokens < 0:
                raise PrefixMemoryError(f"context-lengths has {tokens}: give lengths of 0 tokens or more.")
        if self.context is not None:
            read_context(self.context)


def check_read(what: str, options: Collection[str]) -> None:
    """Refuse options that ``what`` does not read.

    Raises:
        PrefixMemoryError: names the option, and the instruments that read it.
    """
    check_choice("what", what, (*INSTRUMENTS, "all"))
    for option in options if what != "all" else ():
        if what not in (readers := READ_BY[option]):
            raise PrefixMemoryError(
                f"{what} does not read {option.replace('_', '-')}, which is for {', '.join(readers)}. Leave it out."
            )
    if what == "readout":  # ablations are measured on rows, or else on the text
        have = "data" in options
        for option in ("text", "tokens") if have else ("limit",):
            if option in options:
                raise PrefixMemoryError(
                    f"readout reads {option} {'without' if have else 'with'} data only. Leave it out."
                )


Say = Callable[[str], None]
#: What an instrument found out about one adapter.
Measured = Tradeoff | Spectrum | Shift | Heads | LongInput


def inspect(adapter: Adapter, settings: Settings, say: Say) -> dict[str, Measured]:
    """What the instruments measure on one adapter, by instrument.

    Args:
        adapter: a loaded adapter.
        settings: what to measure.
        say: is told what is being done, and with ``all`` which instrument knows nothing of this adapter, and why.

    Raises:
        PrefixMemoryError: the instrument knows nothing of this adapter (with ``all``: none does), or the text is
            empty or shorter than asked for.
    """
    short = _ids(adapter, settings.text, settings.tokens, TOKENS)
    long = _ids(adapter, settings.text, settings.length, LENGTH)
    found: dict[str, Measured] = {}
    refused: PrefixMemoryError | None = None
    for name in INSTRUMENTS if settings.what == "all" else (settings.what,):
        say(f"{adapter.name}: {name}")
        try:
            found[name] = _measure(adapter, name, short, long, settings)
        except PrefixMemoryError as error:
            if settings.what != "all":
                raise
            refused = error
            say(f"{adapter.name}: no {name}. {error}")
    if not found and refused is not None:
        raise refused
    return found


def _ids(adapter: Adapter, text: str | None, asked: int | None, default: int) -> Tensor:
    """``asked`` tokens of the text, or without a wish, as many as there are up to ``default``."""
    limit = longest_input(adapter.model)
    if asked is not None or text is None:
        return token_ids(adapter.tokenizer, text, asked or min(default, limit))
    ids = token_ids(adapter.tokenizer, text, None)[:, : min(default, limit)]
    if ids.shape[1] < SHORTEST:
        raise PrefixMemoryError(
            f"The text has {ids.shape[1]} tokens where {SHORTEST} are needed at least. Give a longer text."
        )
    return ids


def _measure(adapter: Adapter, name: str, short: Tensor, long: Tensor, settings: Settings) -> Measured:
    model = adapter.model
    if name == "tradeoff":
        longest = long.shape[1]
        powers = [SHORTEST << n for n in range(32) if SHORTEST << n < longest]
        return tradeoff(model, long, [*powers, longest])
    if name == "spectrum":
        return spectrum(model, short)
    if name == "shift":
        return shift(model, short)
    if name == "long-input":
        return _long_input(adapter, settings)
    read = readout(model, adapter.tokenizer)
    by_layer = zip(read.layers, read.norms, strict=True)
    ranked = sorted(((norm, layer, head) for layer, row in by_layer for head, norm in enumerate(row)), reverse=True)
    loss = partial(text_loss, model, short) if settings.loss is None else settings.loss(adapter)
    ablation = ablate(model, loss, [(layer, head) for _, layer, head in ranked[: settings.heads]])
    return Heads(read.definition, read.layers, read.norms, read.directions, ablation=ablation)


def _long_input(adapter: Adapter, settings: Settings) -> LongInput:
    model, tokenizer = adapter.model, adapter.tokenizer
    if settings.rows is not None:
        return long_input(model, tokenizer, settings.rows(adapter), settings.in_front, settings.context)
    rows = sample(northline("test"), None, settings.limit, seed=0)
    if not any(long_input(model, tokenizer, rows, [0]).accuracy):
        raise PrefixMemoryError(
            f"{adapter.name} is right on none of {len(rows)} Northline messages, with nothing in front: it was trained "
            "for something else. Give rows of its own task with --data."
        )
    return long_input(model, tokenizer, rows, settings.in_front, settings.context)


def write(found: Mapping[str, Mapping[str, Measured]], conditions: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``<instrument>.json`` and ``.png`` for every instrument, and ``index.html`` with all of them.

    Args:
        found: by adapter, what :func:`inspect` returned.
        conditions: what the figures were measured on, for the JSON files and the page.
        folder: new or empty.

    Returns:
        the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records, images = {}, {}
    measured = {
        name: ours
        for name in INSTRUMENTS
        if (ours := {label: results[name] for label, results in found.items() if name in results})
    }
    for name, ours in measured.items():  # all numbers, before anything is drawn
        records[name] = {label: asdict(data) for label, data in ours.items()}
        content = {"conditions": dict(conditions), "adapters": records[name], **provenance()}
        write_json(folder / f"{name}.json", content)
    for name, ours in measured.items():
        figures.save(FIGURES[name](ours), picture := folder / f"{name}.png")
        images[name] = picture.read_bytes()
    html = folder / "index.html"
    write_text(html, page(records, images, conditions))
    return [*(folder / f"{name}.{kind}" for name in measured for kind in ("json", "png")), html]


def labels(adapters: list[str]) -> list[str]:
    """A short name for each adapter: that of its folder, where this is unique."""
    short = [Path(name.rstrip("/")).name or name for name in adapters]
    return [name if short.count(name) == 1 else whole for name, whole in zip(short, adapters, strict=True)]


def renamed(adapter: Adapter, label: str) -> Adapter:
    """The adapter under a short name."""
    return replace(adapter, name=label)
