"""What a memory answers does not depend on how its question is laid out in a batch.

With ``query="content"`` padding, packing, offsets, batch size, cache and beams change nothing. With
``query="rotary"`` the answer depends on the absolute position of a token, so exactly the layouts that move tokens
without saying so in ``position_ids``, and those that say so and do move them, change it. ``docs/paper.md`` quotes
this table.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from tiny import DEFAULT, build, tokens, with_memory

TOLERANCE = 1e-4
CHANGED = 1e-3
FAMILIES = ["llama_gqa", "qwen3", "gemma3", "gpt_neox"]  # all rotary; gemma3 with a sliding window of 6

Model = PeftModel | PreTrainedModel
Questions = list[Tensor]


def sharp(family: str, attention: str | None = None) -> PreTrainedModel:
    """A random model with attention far from uniform; as initialised, it would hardly depend on positions."""
    model = build(family, attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    return model


def questions(count: int = 4) -> Questions:
    """Token sequences of different lengths, 4 to 12."""
    return [tokens(1, 4 + (5 * n) % 9, seed=10 + n)[0] for n in range(count)]


def pad(rows: Questions, side: str, extra: int = 3) -> tuple[Tensor, Tensor]:
    """One batch and its mask; ``extra`` pads the longest row too."""
    width = max(len(row) for row in rows) + extra
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for n, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[n, place], mask[n, place] = row, 1
    return ids, mask


# --- one forward pass: how the questions are laid out ------------------------------------------------------------


def alone(model: Model, rows: Questions) -> list[Tensor]:
    """What the other layouts are compared with: one row at a time, no padding, no cache, positions from 0."""
    return [model(row[None], use_cache=False).logits[0] for row in rows]


def padded(model: Model, rows: Questions, side: str, position_ids: bool) -> list[Tensor]:
    ids, mask = pad(rows, side)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if position_ids else {}
    logits = model(ids, attention_mask=mask, use_cache=False, **positions).logits
    return [logits[n, mask[n].bool()] for n in range(len(rows))]


def packed(model: Model, rows: Questions) -> list[Tensor]:
    """Two questions to a row, told apart by positions that start again; transformers masks by them."""
    out: list[Tensor] = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])[None]
        logits = model(torch.cat([first, second])[None], position_ids=positions, use_cache=False).logits[0]
        out += [logits[: len(first)], logits[len(first) :]]
    return out


def shifted(model: Model, rows: Questions, by: int = 37) -> list[Tensor]:
    return [model(row[None], position_ids=torch.arange(len(row))[None] + by, use_cache=False).logits[0] for row in rows]


def batch_of_32(model: Model, rows: Questions) -> list[Tensor]:
    """The questions as the first rows of 32, padded on the right."""
    return padded(model, (rows * 32)[:32], "right", position_ids=False)[: len(rows)]


def cached(model: Model, rows: Questions, chunk: int) -> list[Tensor]:
    """The question in pieces, the keys and values of earlier pieces from the cache."""
    out = []
    for row in rows:
        pieces, cache = [], None
        for piece in row.split(chunk):
            answer = model(piece[None], past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            pieces.append(answer.logits[0])
        out.append(torch.cat(pieces))
    return out


LAYOUTS: dict[str, Callable[[Model, Questions], list[Tensor]]] = {
    "left padding, position ids": lambda m, q: padded(m, q, "left", True),
    "left padding, no position ids": lambda m, q: padded(m, q, "left", False),
    "right padding": lambda m, q: padded(m, q, "right", False),
    "two packed in a row": packed,
    "positions shifted by 37": shifted,
    "batch of 32": batch_of_32,
    "cache, token by token": lambda m, q: cached(m, q, 1),
    "cache, three at a time": lambda m, q: cached(m, q, 3),
}
#: Layouts in which a token has another absolute position than in its question alone. A forward pass counts padding
#: when it is given no position ids; it does so with an attention mask too.
MOVED = ("left padding, no position ids", "positions shifted by 37")


@torch.no_grad()
def change(model: Model, layout: str) -> float:
    """Largest change of any logit between the question alone and the question in ``layout``."""
    rows = questions()
    pairs = zip(alone(model, rows), LAYOUTS[layout](model, rows), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_memory_moves_the_logits_far(family):
    """A control on what follows: there is an effect that the layouts could have disturbed."""
    ids = tokens()
    base = sharp(family)(ids).logits
    for config in ({"query": "content"}, {"query": "rotary"}, DEFAULT):
        assert (with_memory(sharp(family), **config)(ids).logits - base).abs().max() > 100 * CHANGED


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_content_query_gives_the_same_logits_in_every_layout(family, layout):
    assert change(sharp(family), layout) < TOLERANCE, "the base model itself is not invariant"
    assert change(with_memory(sharp(family), query="content"), layout) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_query_changes_exactly_where_tokens_move(family, layout):
    changed = change(with_memory(sharp(family), query="rotary"), layout)
    assert changed > CHANGED if layout in MOVED else changed < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama_gqa", "gemma3"])
def test_a_limited_answer_is_the_same_in_every_layout(family, layout):
    assert change(with_memory(sharp(family), **DEFAULT), layout) < TOLERANCE


@pytest.mark.parametrize("config", [dict(normalize="none"), dict(feature_map="mlp"), dict(rank=2, share_heads=True)])
@pytest.mark.parametrize("layout", MOVED)
def test_content_query_is_invariant_in_other_parametrisations(layout, config):
    assert change(with_memory(sharp("llama_gqa"), query="content", **config), layout) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_content_query_is_invariant_with_eager_attention(layout):
    assert change(with_memory(sharp("llama_gqa", "eager"), query="content"), layout) < TOLERANCE


# --- generate ----------------------------------------------------------------------------------------------------


def generate(model: Model, ids: Tensor, mask: Tensor, **kwargs: object) -> Tensor:
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kwargs
    )
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(
    ("family", "config"),
    [*((f, {"query": q}) for f in FAMILIES for q in ("content", "rotary")), ("llama_gqa", DEFAULT)],
    ids=str,
)
def test_generate_gives_the_same_tokens_in_every_layout(family, config, beams):
    """Holds for ``rotary`` too: generate() makes position ids that leave padding out."""
    model = with_memory(sharp(family), **config)
    rows = questions()
    single = torch.cat([generate(model, r[None], torch.ones_like(r)[None], num_beams=beams) for r in rows])
    left_padded = pad(rows, "left")
    expected = dict(num_beams=beams)
    assert torch.equal(generate(model, *left_padded, **expected), single)
    assert torch.equal(generate(model, *left_padded, use_cache=False, **expected), single)
    assert torch.equal(generate(model, *pad((rows * 32)[:32], "left"), **expected)[: len(rows)], single)
    # Controls: the memory decides these tokens, and the questions get different answers.
    with model.disable_adapter():
        assert not torch.equal(generate(model, *left_padded, **expected), single)
    assert len(single.unique(dim=0)) == len(rows)
