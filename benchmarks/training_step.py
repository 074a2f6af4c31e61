"""What a training step of a frozen model spends needlessly on a CPU, and what the recipe does about it.

    python benchmarks/training_step.py        # prints a table, writes results/benchmarks/training_step.json

SmolLM2-135M with a memory, CPU-seconds of one forward and backward pass, the median of five. Compare within one run.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import get_peft_model

from prefixmemory import PrefixMemoryConfig
from prefixmemory.files.records import provenance, write_json
from prefixmemory.models.loading import fast_dtype, load_model, smollm2
from prefixmemory.models.logits import contiguous_logits_input
from prefixmemory.training.run import quiet_libraries

RESULT = Path(__file__).parent.parent / "results" / "benchmarks" / "training_step.json"
REPEATS = 5
ROWS, TOKENS, KEPT = 8, 28, 4  # a batch of the quickstart


def seconds(model, context, rows: int, tokens: int) -> float:
    """Median CPU-seconds of a step."""
    ids = torch.randint(3, 40_000, (rows, tokens))
    mask = torch.ones_like(ids)
    mask[0, : tokens // 4] = 0  # one padded row
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    taken = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        with context(model):
            model(
                input_ids=ids, attention_mask=mask, position_ids=positions, labels=ids[:, -KEPT:], logits_to_keep=KEPT
            ).loss.backward()
        taken.append(time.process_time() - start)
    return statistics.median(taken[1:])


def main() -> None:
    quiet_libraries()
    torch.manual_seed(0)
    base = load_model(smollm2(), fast_dtype())
    model = get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM")).train()
    results = {}
    for attention in ("sdpa", "eager"):
        base.set_attn_implementation(attention)
        for name, context in (("slice", lambda m: nullcontext()), ("contiguous", contiguous_logits_input)):
            for rows, tokens in ((ROWS, TOKENS), (4, 100)):
                case = f"{attention}, logits input {name}, {rows}x{tokens}"
                results[case] = round(seconds(model, context, rows, tokens), 3)
                print(f"{case:45} {results[case]:.3f} CPU-s", flush=True)
    write_json(RESULT, {"cpu_seconds": results, "repeats": REPEATS, "dtype": fast_dtype(), **provenance()})


if __name__ == "__main__":
    main()
