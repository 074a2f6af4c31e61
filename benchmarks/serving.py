"""What memories cost in a vLLM batch, beside the base model and LoRA in the same process.

    make test-vllm ARGS=--collect-only    # makes the environment, once
    .venvs/vllm/bin/python -m benchmarks.serving --output results/benchmarks/serving.json

Engines are asked in turn: one without adapters, one in which the base model, one memory and eight memories take turns,
and one with room for LoRA. What counts is CPU seconds (one thread), as a ratio to the base model in the first engine;
the median of the rounds and their middle half. An answer that is not the same in every round stops the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR", OMP_NUM_THREADS="1",
)  # fmt: skip

import torch
from peft import LoraConfig, get_peft_model

from prefixmemory import PrefixMemoryConfig
from prefixmemory.files.records import provenance, write_json
from prefixmemory.models.loading import load_model, smollm2

REQUESTS, PROMPT, ANSWER = 32, 32, 32
MEMORIES = 8


def save_models(folder: Path) -> None:
    """SmolLM2, eight memories with random contents, and a LoRA of rank 16 on all linear layers of attention."""
    base = load_model(smollm2(), "float32")
    base.save_pretrained(folder / "base")
    for number in range(MEMORIES):
        model = get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "prefix_memory_bank" in name:
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder / f"memory-{number}")
        base = model.unload()
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    get_peft_model(base, lora).save_pretrained(folder / "lora")


def engines(folder: Path) -> tuple[Any, Any, Any]:
    """Without adapters; with memories alone, as ``prefixmemory serve`` makes it; with room for LoRA too."""
    from vllm import LLM

    common: dict[str, Any] = dict(
        dtype="float32", max_model_len=PROMPT + ANSWER, max_num_seqs=REQUESTS, skip_tokenizer_init=True,
        enable_prefix_caching=False, max_num_batched_tokens=2048, enforce_eager=True,
    )  # fmt: skip
    plain = LLM(str(folder / "base"), **common)
    adapted = dict(enable_lora=True, max_loras=MEMORIES, max_cpu_loras=2 * MEMORIES)
    memories = LLM(str(folder / "base"), **common, **adapted, max_lora_rank=8, lora_target_modules=["attn"])
    return plain, memories, LLM(str(folder / "base"), **common, **adapted, max_lora_rank=16)


def asked(llm: Any, folder: Path, adapters: list[str], tokens: int) -> Callable[[], list[list[int]]]:
    """A call that has ``llm`` answer all prompts, each with the next of ``adapters``; empty: the base model."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    generator = torch.Generator().manual_seed(0)
    prompts = [TokensPrompt(prompt_token_ids=torch.randint(1000, 40000, (PROMPT,), generator=generator).tolist())
               for _ in range(REQUESTS)]  # fmt: skip
    chosen = [adapters[number % len(adapters)] if adapters else "" for number in range(REQUESTS)]
    numbers = {name: number for number, name in enumerate(["lora", *(f"memory-{n}" for n in range(MEMORIES))], start=1)}
    requests = [LoRARequest(name, numbers[name], str(folder / name)) if name else None for name in chosen]
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def ask() -> list[list[int]]:
        outputs = llm.generate(prompts, parameters, lora_request=requests, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return ask


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save_models(folder)
        plain, memories, mixed = engines(folder)
        eight = [f"memory-{number}" for number in range(MEMORIES)]
        cases = {
            "base, no plugin": (plain, []),
            "base, plugin": (memories, []),
            "one memory": (memories, eight[:1]),
            "eight memories": (memories, eight),
            "LoRA r=16": (mixed, ["lora"]),
        }
        seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in cases}
        said: dict[str, list[list[int]]] = {}
        for number in range(options.rounds + 1):
            for name, (llm, adapters) in cases.items():
                first, whole = (_timed(asked(llm, folder, adapters, tokens)) for tokens in (1, ANSWER))
                if said.setdefault(name, whole[1]) != whole[1]:
                    raise SystemExit(f"{name}: another answer in round {number}")
                if number:  # the first warms up
                    seconds[name]["prefill"].append(first[0])
                    seconds[name]["decode"].append(whole[0] - first[0])
            print(f"round {number} of {options.rounds}", flush=True)
        if said["base, plugin"] != said["base, no plugin"] or said["one memory"] == said["base, plugin"]:
            raise SystemExit("the base model answers otherwise with the plugin, or a memory says nothing")
    floor = seconds["base, no plugin"]
    ratios = {
        name: {kind: _summary([base / own for own, base in zip(times, floor[kind], strict=True)])
               for kind, times in found.items()}
        for name, found in seconds.items()
    }  # fmt: skip
    record = {
        **provenance(), "what": "throughput as a ratio to the base model without the plugin; CPU seconds, one thread",
        "model": "SmolLM2-135M, float32", "requests": REQUESTS, "prompt": PROMPT, "answer": ANSWER,
        "rounds": options.rounds, "ratios": ratios, "seconds": seconds,
    }  # fmt: skip
    print(json.dumps(ratios, indent=1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, record)


def _timed(call: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def _summary(ratios: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


if __name__ == "__main__":
    main()
