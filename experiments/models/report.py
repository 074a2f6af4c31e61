"""docs/models.md from the records, and nothing else: the same records give the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import records
from .checks import BLOCKS, METHODS
from .kinds import CAUSAL_LM, INPUTS_NEED_GRADIENTS, KINDS

FILE = Path(__file__).parent.parent.parent / "docs" / "models.md"
LONGEST = 200  # characters of a reason in a table
NOT_THE_BASE = ("does not generate", "rows of one size")

TITLES = {
    "causal-lm": "Causal language models",
    "encoders": "Encoders (sequence classification)",
    "encoder-decoders": "Encoder-decoders",
    "speech-to-text": "Speech to text",
    "vision": "Vision (image classification)",
    "vision-language": "Vision-language (fed text: the text tower)",
    "speech": "Speech (CTC)",
}

Record = Mapping[str, Any]

INTRODUCTION = """# Which models

Every type of transformers' causal-LM mapping, and samples of other kinds, built tiny and random from the config class,
offline, with four methods on each: a memory (`PrefixMemoryConfig()`), one with memories in the feed-forward blocks too
(`feed_forward=8`, as recipes have it), PEFT's `LoraConfig` and PEFT's `PrefixTuningConfig`. This file is written by

    python -m experiments.models             # measures everything (15 minutes on one core), writes this file
    python -m experiments.models --report    # writes this file from the records in results/models

{provenance}

"Works" means that every check passes that the base model passes itself:

| check | what is asked |
|---|---|
| attach | `get_peft_model` accepts the model |
| zero start | untrained, the base model's logits, bit for bit (not asked of a prefix, which starts at random) |
| every layer | memory only: one in every module that is seen to compute softmax self-attention, and in no other; \
with blocks, one in a feed-forward block beside each |
| acts | an adapter with random contents changes the logits |
| silent front | memory in causal models: one that speaks from a token on leaves the logits before it, bit for bit; to \
four roundings where experts multiply all their tokens at once |
| gradients | training: every parameter of the adapter gets a finite gradient, not zero where its module gets one |
| generate | greedy `generate` with cache: the tokens that whole forward passes give, and their logits to 1e-3 |
| padding | a row padded on the left (encoders: on the right) has the logits that it has alone, to 1e-4, or to \
twice what the base model's own differ by |
| reload | `save_pretrained`, then `from_pretrained` onto a fresh base: the same parameters bit for bit, close logits |
| disable | inside `disable_adapter()`, the base model's logits, bit for bit |
| cross attention | memory in encoder-decoders: cross attention gets some when it is named; they act and get gradients |
| step | one optimizer step moves every parameter of the adapter and nothing else, and changes the loss |

What the base model fails itself is asked of no method; the table names it. LoRA gets PEFT's default target modules
where PEFT has some for the type, else `all-linear`, and where PEFT refuses that in Mamba layers, all linears but those;
a narrower choice by hand would mend some of its failures. Prefix tuning gets four virtual tokens, and the model's sizes
where PEFT cannot find them; most of what it fails is padding: PEFT ignores `position_ids` with a prefix, so that on a
model with rotary positions the padding pushes the text away from it.

{reformer}
"""


def works(outcome: Record | None) -> bool:
    return outcome is not None and not outcome["failed"] and bool(outcome["passed"])


def counted(record: Record) -> bool:
    """Whether the type counts: it could be run, and it has softmax attention."""
    return not why_not_run(record) and bool(record["base"]["attends"])


def why_not_run(record: Record) -> str | None:
    """Why nothing is known of a type: it cannot be run, or every process died over it."""
    if record.get("not_run"):
        return str(record["not_run"])
    if record.get("base") is None:
        return next(why for outcome in record["methods"].values() for why in outcome["failed"].values())
    return None


def cell(outcome: Record | None) -> str:
    """What a table says of one method on one type."""
    if outcome is None:
        return "not measured"
    if works(outcome):
        return "works"
    if not outcome["failed"]:
        return "**no**: nothing was checked"
    check, why = next(iter(outcome["failed"].items()))
    more = len(outcome["failed"]) - 1
    return f"**no**: {check}: {_short(why)}" + (f" (and {more} more)" if more else "")


def row(record: Record) -> str:
    """The table row of one type."""
    base = record["base"]
    own = [f"{check}: {_short(_own(why))}" for check, why in base["cannot"].items() if why not in NOT_THE_BASE]
    # A step needs a gradient: no second reason.
    own = [text for text in own if not text.startswith("step:")]
    cells = [cell(record["methods"].get(method)) for method in METHODS]
    return f"| {record['type']} | {len(base['attends'])} | {' | '.join(cells)} | {'; '.join(own)} |"


def summary_row(title: str, kept: list[Record]) -> str:
    right = {method: sum(works(r["methods"].get(method)) for r in kept) for method in METHODS}
    shares = [f"{n} ({100 * n / len(kept):.0f} %)" if kept else "" for n in right.values()]
    return f"| {title} | {len(kept)} | {' | '.join(shares)} |"


def section(title: str, by_type: Mapping[str, Record]) -> str:
    """One kind: its table, what stands in the way where something fails, and what does not count."""
    kept = [r for r in by_type.values() if counted(r)]
    lines = [f"## {title}", ""]
    for method in METHODS:
        outcomes = [r["methods"].get(method) for r in kept]
        first = Counter(next(iter(o["failed"])) for o in outcomes if o and o["failed"])
        alone = sum(1 for o in outcomes if o and list(o["failed"]) == ["padding"])
        if first:
            listed = ", ".join(f"{check} {n}" for check, n in first.most_common())
            lines.append(f"- {method} fails on {sum(first.values())}; by the first check that fails: {listed}.")
            if alone:
                lines.append(f"  {alone} of these fail at padding and nothing else.")
    refused = [r["type"] for r in kept if _refused(r)]
    if refused:
        lines += ["- A memory that speaks from a token on is refused, in one sentence, by " + ", ".join(refused) + "."]
    lines += [""] if lines[-1] else []
    lines += [f"| type | attentions | {' | '.join(METHODS)} | what the base model fails itself |"]
    lines += [f"|---|---|{'---|' * len(METHODS)}---|"]
    lines += [row(r) for r in kept]
    without = [r for r in by_type.values() if not counted(r) and not why_not_run(r)]
    if without:
        lines += ["", "Without softmax attention, so that they count for no method; what a memory says to them:", ""]
        for r in without:
            failed = (r["methods"].get("memory") or {"failed": {}})["failed"]
            lines.append(f"- {r['type']}: {_short(failed['attach']) if 'attach' in failed else 'not refused'}")
    not_run = {r["type"]: why for r in by_type.values() if (why := why_not_run(r))}
    if not_run:
        lines += ["", "Not built tiny, or not run:", ""]
        lines += [f"- {name}: {_short(why)}" for name, why in not_run.items()]
    return "\n".join([*lines, ""])


def _refused(record: Record) -> bool:
    """Whether a memory that speaks from a token on is refused."""
    outcome = record["methods"].get("memory") or {"not_applicable": {}}
    return str(outcome["not_applicable"].get("silent front", "")).startswith("refused")


def provenance(all_records: list[Record]) -> str:
    dates = sorted({r["date"] for r in all_records})
    versions = sorted({", ".join(f"{name} {v}" for name, v in r["versions"].items()) for r in all_records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"Measured {when} with {'; and with '.join(versions)}."


def text(kinds: Mapping[str, Mapping[str, Record]]) -> str:
    """The whole file.

    Args:
        kinds: records by kind and type.
    """
    kinds = {name: by_type for name, by_type in kinds.items() if by_type}
    everything = [r for by_type in kinds.values() for r in by_type.values()]
    reformer = (
        f"{', '.join(INPUTS_NEED_GRADIENTS).capitalize()} gets `enable_input_require_grads()`, for all methods: its "
        "reversible layers\nget no gradient without it when the embeddings are frozen."
    )
    parts = [INTRODUCTION.format(provenance=provenance(everything), reformer=reformer)]
    causal = kinds.get(CAUSAL_LM.name, {})
    kept = [r for r in causal.values() if counted(r)]
    not_run = sum(bool(why_not_run(r)) for r in causal.values())
    right = {method: sum(works(r["methods"].get(method)) for r in kept) for method in METHODS}
    parts.append(
        f"Of the {len(causal)} causal-LM types, {len(kept)} have softmax attention and can be run tiny "
        f"({len(causal) - len(kept) - not_run} have none,\n{not_run} cannot be run). A memory works on "
        f"{right['memory']} of them, with blocks on {right[BLOCKS]}, LoRA on {right['LoRA']}, prefix tuning on "
        f"{right['PREFIX_TUNING']}.\n"
    )
    table = [f"| kind | types that count | {' | '.join(METHODS)} |", f"|---|---|{'---|' * len(METHODS)}"]
    table += [summary_row(TITLES[n], [r for r in by_type.values() if counted(r)]) for n, by_type in kinds.items()]
    parts.append("\n".join(table) + "\n")
    parts += [section(TITLES[name], by_type) for name, by_type in kinds.items()]
    return "\n".join(parts)


def current() -> str:
    """The file as the records in results/models have it."""
    return text({kind.name: records.read(kind.name) for kind in KINDS})


def write_report() -> None:
    FILE.write_text(current(), encoding="utf-8")


def _own(why: str) -> str:
    return why.removeprefix("the base model: ")


def _short(why: str) -> str:
    why = why.replace("|", "\\|").replace("<", "&lt;")
    return why if len(why) <= LONGEST else why[: LONGEST - 3].rstrip() + "..."
