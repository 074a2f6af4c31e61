"""Whether vLLM answers as transformers does: SmolLM2, four memories of different kinds and a LoRA, in one batch.

    make test-vllm ARGS=--collect-only    # makes the environment, once
    .venvs/vllm/bin/python -m experiments.serving_parity

In float32, greedy, 16 tokens of answer to each of four questions by the base model and each adapter, interleaved. Each
engine has a process of its own: with one slot that the memories take in turn, with prompts that are read in parts, in
several processes, and without the plugin, asked by the base model as often as the others by everybody. The record is
results/serving/parity.json; it ends with an error if an answer differs, or a bit of the base model's beside memories.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from prefixmemory import PrefixMemoryConfig
from prefixmemory.files.records import provenance, write_json
from prefixmemory.models.loading import load_model, load_tokenizer, smollm2
from prefixmemory.rows.invocation import invocation_tokens

RESULTS = Path(__file__).parent.parent / "results" / "serving" / "parity.json"
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about rivers.",
    "List three colours.",
    "Why is the sky blue?",
)
ANSWER = 16
#: Of log-probabilities in float32: vLLM's attention sums in another order.
TOLERANCE = 1e-4
#: Of the random contents: such that an answer is another one, and still no noise.
MEMORIES: dict[str, tuple[float, dict[str, Any]]] = {
    "default": (0.3, {}),
    "rotary": (0.05, {"query": "rotary", "feature_map": "gelu", "rank": 4, "output_limit": None, "scale": 0.5}),
    "shared": (0.3, {"share_heads": True, "feature_map": "silu", "normalize": "feature_l2", "rank": 6}),
    "activated": (0.3, {"active_from": "answer", "output_limit": 0.3}),
}
#: Settings of each engine, and environment variables.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "one batch": ({}, {}),
    "one slot": ({"max_loras": 1, "max_cpu_loras": 4}, {}),
    "prompts in parts": ({"max_num_batched_tokens": 32, "enable_chunked_prefill": True}, {}),
    "several processes": ({}, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}),
}
#: Engines whose steps hold the same tokens as those of an engine of the base model alone: bits depend on their number.
SAME_STEPS = ("one batch", "several processes")
#: One answer: its tokens, and the logarithm of each one's probability.
Answer = tuple[list[int], list[float]]


def prompts(folder: Path) -> list[list[int]]:
    """The questions, as the base model's chat template puts them."""
    tokenizer = load_tokenizer(str(folder / "base"))
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]


def save_models(folder: Path) -> None:
    """SmolLM2, the memories and a LoRA, each in a folder of its name."""
    base, tokenizer = load_model(smollm2(), "float32"), load_tokenizer(smollm2())
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    configs: dict[str, tuple[float, Any]] = {"lora": (0.02, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))}
    for name, (size, fields) in MEMORIES.items():
        if "active_from" in fields:
            fields = fields | {"invocation_tokens": invocation_tokens(fields["active_from"], tokenizer)}
        configs[name] = size, PrefixMemoryConfig(**fields)
    for number, (name, (size, config)) in enumerate(configs.items()):
        config.task_type = "CAUSAL_LM"
        model = get_peft_model(base, config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "prefix_memory_bank" in parameter_name or "lora_" in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
        model.save_pretrained(folder / name)
        base = model.unload()


def of_transformers(folder: Path, adapter: str) -> list[Answer]:
    """What greedy search says, to each question alone."""
    model = load_model(str(folder / "base"), "float32")
    if adapter != "base":
        model = PeftModel.from_pretrained(model, str(folder / adapter))
    model.eval()
    answers = []
    for prompt in prompts(folder):
        with torch.no_grad():
            made = model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=ANSWER, do_sample=False, output_logits=True,
                return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        tokens = made.sequences[0, len(prompt) :].tolist()
        logprobs = [float(step[0].log_softmax(-1)[token]) for step, token in zip(made.logits, tokens, strict=True)]
        answers.append((tokens, logprobs))
    return answers


def ask(folder: Path, adapters: list[str], settings: dict[str, Any]) -> list[list[Answer]]:
    """What one engine says for each adapter to each question, all in one batch, questions outermost."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    common: dict[str, Any] = dict(
        dtype="float32", max_model_len=512, max_num_seqs=32, enable_lora=True, max_lora_rank=8, max_loras=6,
        enforce_eager=True,
    )  # fmt: skip
    llm = LLM(str(folder / "base"), **common | settings)
    asked = [(adapter, prompt) for prompt, adapter in product(prompts(folder), adapters)]
    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=prompt) for _, prompt in asked],
        SamplingParams(temperature=0, max_tokens=ANSWER, logprobs=0, ignore_eos=True, detokenize=False),
        lora_request=[
            None if name == "base" else LoRARequest(name, adapters.index(name) + 1, str(folder / name))
            for name, _ in asked
        ],
        use_tqdm=False,
    )
    answers: list[list[Answer]] = [[] for _ in adapters]
    for number, output in enumerate(outputs):
        made = output.outputs[0]
        logprobs = [next(iter(step.values())).logprob for step in made.logprobs]
        answers[number % len(adapters)].append((list(made.token_ids), logprobs))
    return answers


def elsewhere(folder: Path, adapters: list[str], settings: dict[str, Any], variables: dict[str, str]) -> Any:
    """:func:`ask` in a process of its own."""
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables,
    }  # fmt: skip
    answers = folder / "answers.json"
    job = json.dumps({"folder": str(folder), "adapters": adapters, "settings": settings})
    command = [sys.executable, "-m", "experiments.serving_parity", "--job", job, "--output", str(answers)]
    subprocess.run(command, env={**os.environ, **environment}, cwd=Path(__file__).parent.parent, check=True)
    return json.loads(answers.read_text())


def compared(found: list[list[Answer]], wanted: list[list[Answer]]) -> dict[str, Any]:
    """How many answers have the same tokens, and the largest difference of their log-probabilities."""
    pairs = [pair for these, those in zip(found, wanted, strict=True) for pair in zip(these, those, strict=True)]
    same = [(one, other) for one, other in pairs if list(one[0]) == list(other[0])]
    apart = [abs(x - y) for one, other in same for x, y in zip(one[1], other[1], strict=True)]
    return {"answers": len(pairs), "equal": len(same), "largest_difference": max(apart, default=None)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--job", type=json.loads, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job is not None:
        write_json(args.output, ask(Path(args.job["folder"]), args.job["adapters"], args.job["settings"]))
        return
    everybody = ["base", *MEMORIES, "lora"]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save_models(folder)
        wanted = {name: of_transformers(folder, name) for name in everybody}
        runs = {}
        for engine, (settings, variables) in ENGINES.items():
            # vLLM 0.32 gives the base model's requests beside a LoRA the last slot's weights on a CPU: it must be free
            adapters = everybody[:-1] if settings.get("max_loras") == 1 else everybody
            found = elsewhere(folder, adapters, settings, variables)
            runs[engine] = compared(found, [wanted[name] for name in adapters]) | {"adapters": adapters}
            if engine in SAME_STEPS:
                plain = elsewhere(folder, ["base"] * len(adapters), {"enable_lora": False}, {"VLLM_PLUGINS": ""})
                runs[engine]["base_model_bit_for_bit"] = found[0] == plain[0]
            print(engine, runs[engine], flush=True)
    record = {
        "engines": runs,
        "distinct_answers": len({tuple(tokens) for answers in wanted.values() for tokens, _ in answers}),
        "provenance": provenance(),
    }
    write_json(args.output, record)
    print(json.dumps(record, indent=2))
    good = all(run["equal"] == run["answers"] and run["largest_difference"] < TOLERANCE for run in runs.values())
    if not (good and all(runs[engine]["base_model_bit_for_bit"] for engine in SAME_STEPS)):
        raise SystemExit("An answer differs from transformers', or the base model's from an engine without the plugin.")


if __name__ == "__main__":
    main()
