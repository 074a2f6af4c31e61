"""One long text in front, eight adapters: one prefill for all of them, beside a prefill for each.

    python -m benchmarks.context_reuse      # prints a table, writes results/benchmarks/context_reuse.json

SmolLM2-135M-Instruct on one thread, greedy answers of eight tokens. Memories that speak from the prompt's end on leave
the keys and values of the text in front as the base model's, so that each adapter goes on from a copy of one cache.
Memories that speak from the start have a cache each. Both ways must write the same answers, or nothing is reported.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.measuring import RESULTS, cache_bytes
from peft import get_peft_model

from prefixmemory import PrefixMemoryConfig, invocation_tokens
from prefixmemory.files.records import provenance, write_json
from prefixmemory.models.loading import load_model, load_tokenizer, smollm2
from prefixmemory.rows.chat_template import chat_prompt
from prefixmemory.rows.unrelated_text import unrelated_text

RESULT = RESULTS / "context_reuse.json"
NEW = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(smollm2())
    model: Any = load_model(smollm2())
    names = [f"adapter{number}" for number in range(options.adapters)]
    config = PrefixMemoryConfig(
        task_type="CAUSAL_LM", active_from="answer", invocation_tokens=invocation_tokens("answer", tokenizer)
    )
    model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, copy.copy(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".prefix_memory_bank." in name:
                parameter.normal_(std=0.05)
    model.eval()
    text = unrelated_text(tokenizer, options.tokens)
    prompt = chat_prompt([{"role": "user", "content": f"{text}\n\nWhat is this about?"}], tokenizer)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    shared = ids[:, : options.tokens]

    def answer(name: str, cache: Any) -> list[int]:
        model.set_adapter(name)
        written = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=NEW,
            min_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return written[0, ids.shape[1] :].tolist()

    def prefill() -> Any:
        with torch.no_grad():
            return model(input_ids=shared, use_cache=True, logits_to_keep=1).past_key_values

    start = time.process_time()
    each = [answer(name, None) for name in names]
    of_each = time.process_time() - start
    start = time.process_time()
    with model.disable_adapter():
        cache = prefill()
    of_prefill = time.process_time() - start
    together = [answer(name, copy.deepcopy(cache)) for name in names]
    of_one = time.process_time() - start
    if together != each:
        raise SystemExit("the answers differ: nothing is reported")
    if len({tuple(words) for words in each}) < 2:
        raise SystemExit("all adapters answer alike: the comparison says nothing")
    size = cache_bytes(cache)
    record = {
        "tokens": int(ids.shape[1]), "shared_tokens": options.tokens, "adapters": options.adapters, "new_tokens": NEW,
        "cpu_seconds": {"a prefill each": of_each, "one prefill": of_one, "of it the prefill": of_prefill},
        "cache_bytes": {"a cache each": size * options.adapters, "one cache": size},
        "peak_memory_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, **provenance(),
    }  # fmt: skip
    print(f"| {options.adapters} adapters behind {options.tokens:,} tokens | CPU seconds | keys and values, MiB |")
    print("|---|---|---|")
    print(f"| a prefill each | {of_each:.1f} | {size * options.adapters / 2**20:.0f} |")
    print(f"| one prefill by the base model | {of_one:.1f} | {size / 2**20:.0f} |")
    write_json(options.output, record)


if __name__ == "__main__":
    main()
