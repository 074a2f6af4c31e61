"""What memories cost in a vLLM batch, beside the base model and LoRA in the same process.

    make test-vllm ARGS=--collect-only    # makes the environment, once
    .venvs/vllm/bin/python -m benchmarks.serving --output results/benchmarks/serving.json

Each case has an engine of its own: without adapters; with the plugin, asked for the base model, for one memory and for
eight; the same with slots beside the feed-forward blocks, and memories there too; with room for LoRA. All get the same
prompts, and their steps are taken in turn, since a machine's speed drifts within seconds. What counts is CPU seconds
(one thread) as a ratio to the first engine within a round: of the first step, which reads all prompts, and of the
others, which decode; the median of the rounds and their middle half. An answer that is not the same in every round
stops the benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import product
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
from prefixmemory.serving.served import FEED_FORWARD

REQUESTS, PROMPT, ANSWER = 32, 32, 32
MEMORIES = 8
#: Ranks in feed-forward blocks, by the names of the memories.
BLOCKS = {"memory": None, "blocks": 8}
FLOOR, ROOM = "base, no plugin", "base, slots in blocks"
#: What each LoRA stands beside.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LORAS = {"LoRA r=16": ATTENTION, "LoRA r=16, all linear": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]}


def save_models(folder: Path) -> None:
    """SmolLM2, eight memories in the heads and eight in blocks too, with random contents, and LoRAs of rank 16."""
    base = load_model(smollm2(), "float32")
    base.save_pretrained(folder / "base")
    for name, number in product(BLOCKS, range(MEMORIES)):
        model = get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM", feed_forward=BLOCKS[name]))
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "prefix_memory_bank" in path:
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder / f"{name}-{number}")
        base = model.unload()
    for name, modules in LORAS.items():
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=modules))
        model.save_pretrained(folder / name)
        base = model.unload()


def engine(folder: Path, case: str) -> Any:
    """An engine for one case; with memories, as ``prefixmemory serve`` makes it."""
    from vllm import LLM

    settings: dict[str, Any] = dict(
        dtype="float32", max_model_len=PROMPT + ANSWER, max_num_seqs=REQUESTS, skip_tokenizer_init=True,
        enable_prefix_caching=False, max_num_batched_tokens=2048, enforce_eager=True, block_size=32,
        num_gpu_blocks_override=2 * REQUESTS * (PROMPT + ANSWER) // 32,  # all engines at once in 10 GiB
    )  # fmt: skip
    if case != FLOOR:
        settings |= dict(enable_lora=True, max_loras=MEMORIES, max_cpu_loras=2 * MEMORIES)
        settings |= dict(max_lora_rank=16) if case in LORAS else dict(max_lora_rank=8, lora_target_modules=["attn"])
    os.environ[FEED_FORWARD] = str(int("blocks" in case))
    return LLM(str(folder / "base"), **settings).llm_engine


class Batch:
    """The requests of one case, which its engine answers step by step."""

    def __init__(self, engine: Any, folder: Path, adapters: list[str], number: int) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest

        self.engine, self.answers = engine, {}
        generator = torch.Generator().manual_seed(0)
        parameters = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True, detokenize=False)
        numbers = {name: place for place, name in enumerate(sorted({*adapters}), start=1)}
        for row in range(REQUESTS):
            prompt = torch.randint(1000, 40000, (PROMPT,), generator=generator).tolist()
            name = adapters[row % len(adapters)] if adapters else ""
            request = LoRARequest(name, numbers[name], str(folder / name)) if name else None
            engine.add_request(
                f"{number}-{row:02}", TokensPrompt(prompt_token_ids=prompt), parameters, lora_request=request
            )
        self.seconds: list[float] = []

    def step(self) -> bool:
        """One step; whether there was any left."""
        if not self.engine.has_unfinished_requests():
            return False
        start = time.process_time()
        outputs = self.engine.step()
        self.seconds.append(time.process_time() - start)
        for output in outputs:
            if output.finished:
                self.answers[output.request_id.partition("-")[2]] = list(output.outputs[0].token_ids)
        return True


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    made_with = provenance()  # now: the checkout may be another one in the end
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save_models(folder)
        eight, blocks = ([f"{name}-{number}" for number in range(MEMORIES)] for name in BLOCKS)
        cases = {
            FLOOR: [], "base, plugin": [], "one memory": eight[:1], "eight memories": eight, ROOM: [],
            "one memory, in blocks too": blocks[:1], "eight memories, in blocks too": blocks,
            **{name: [name] for name in LORAS},
        }  # fmt: skip
        engines = {name: engine(folder, name) for name in cases}
        os.environ[FEED_FORWARD] = "1"  # requests are checked against it
        seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in cases}
        said: dict[str, Any] = {}
        for number in range(options.rounds + 1):
            batches = {name: Batch(engines[name], folder, adapters, number) for name, adapters in cases.items()}
            while any([batch.step() for batch in batches.values()]):
                pass
            for name, batch in batches.items():
                if len(batch.answers) != REQUESTS or said.setdefault(name, batch.answers) != batch.answers:
                    raise SystemExit(f"{name}: another answer in round {number}")
                if number:  # the first warms up
                    seconds[name]["prefill"].append(batch.seconds[0])
                    seconds[name]["decode"].append(sum(batch.seconds[1:]))
            print(f"round {number} of {options.rounds}", flush=True)
        silent = [name for name in cases if "memor" in name and said[name] == said[FLOOR]]
        if silent or not said["base, plugin"] == said[ROOM] == said[FLOOR]:
            raise SystemExit(f"the base model answers otherwise with the plugin, or a memory says nothing: {silent}")
    floor = seconds[FLOOR]
    ratios = {
        name: {kind: _summary([base / own for own, base in zip(times, floor[kind], strict=True)])
               for kind, times in found.items()}
        for name, found in seconds.items()
    }  # fmt: skip
    record = {
        **made_with, "what": "throughput as a ratio to the base model without the plugin; CPU seconds, one thread",
        "model": "SmolLM2-135M, float32", "requests": REQUESTS, "prompt": PROMPT, "answer": ANSWER,
        "rounds": options.rounds, "ratios": ratios, "seconds": seconds,
    }  # fmt: skip
    print(json.dumps(ratios, indent=1))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, record)


def _summary(ratios: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {"median": round(middle, 3), "low": round(low, 3), "high": round(high, 3)}


if __name__ == "__main__":
    main()
