"""Which defaults: feature map, normalisation, query and learning rate, over tasks, seeds and learning rates.

    python experiments/defaults.py --data ../shared/data            # run what is missing
    python experiments/defaults.py --table                          # the table of docs/LOG.md

One record a run in results/defaults/; a run whose record exists is not run again. Two processes may share the work:
give each ``--part 0/2`` and ``--part 1/2``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

from prefixmemory import PrefixMemoryConfig
from prefixmemory.files.records import provenance, write_json
from prefixmemory.models.loading import fast_attention, fast_dtype, load_model, load_tokenizer, smollm2
from prefixmemory.rows.rendering import classification_prompt, render
from prefixmemory.scoring.generation import accuracy, answers
from prefixmemory.training.loop import train
from prefixmemory.training.settings import TrainingSettings

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "defaults"
SETUP = json.loads((HERE / "defaults.json").read_text())


def runs():
    """Every run of the experiment, the most telling first: all variants of one seed before the next seed."""
    for seed in SETUP["seeds"]:
        for task in SETUP["tasks"]:
            for factor in SETUP["factors"]:
                for variant, spec in SETUP["variants"].items():
                    rate = float(f"{spec['learning_rate'] * factor:.3g}")
                    yield {"task": task, "variant": variant, "seed": seed, "learning_rate": rate, "factor": factor}


def record_file(run) -> Path:
    return RESULTS / f"{run['task']}-{run['variant']}-{run['learning_rate']:g}-{run['seed']}.json"


def read(data: Path, task: str, split: str):
    """Rows of the task's first labels in alphabetical order, without the long texts."""
    rows = [json.loads(line) for line in (data / task / f"{split}.jsonl").read_text().splitlines()]
    kept = sorted({row["label"] for row in rows})[: SETUP["tasks"][task]["labels"]]
    longest = SETUP["tasks"][task]["longest_text"]  # characters
    return [row for row in rows if row["label"] in kept and len(row["text"]) <= longest]


def few(rows, per_class: int, seed: int):
    """``per_class`` rows of each class, drawn by ``seed``."""
    by_label = defaultdict(list)
    for row in rows:
        by_label[row["label"]].append(row)
    rng = random.Random(seed)
    return [row for label in sorted(by_label) for row in rng.sample(by_label[label], per_class)]


def unrelated_text(data: Path, tokenizer, tokens: int) -> str:
    """The beginning of a document on another subject, ``tokens`` long."""
    if tokens == 0:
        return ""
    texts = [json.loads(line) for line in (data / "xquad_en" / "documents.jsonl").read_text().splitlines()]
    ids = tokenizer("\n".join(text["context"] for text in texts))
    return tokenizer.decode(ids["input_ids"][:tokens]) + "\n\n"


def run_one(run, data: Path, base, tokenizer):
    spec = SETUP["tasks"][run["task"]]
    config = dict(SETUP["variants"][run["variant"]]["config"])
    method = {"lora": LoraConfig}.get(config.pop("method", ""), PrefixMemoryConfig)
    torch.manual_seed(run["seed"])
    model = get_peft_model(base, method(task_type="CAUSAL_LM", **config))
    settings = TrainingSettings(
        learning_rate=run["learning_rate"], seed=run["seed"], epochs=spec["epochs"], **SETUP["settings"]
    )
    rows = few(read(data, run["task"], "train"), spec["per_class"], run["seed"])
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(model, tokenizer, render(rows, tokenizer), settings, Path(folder))
    seconds = time.time() - start
    test = random.Random(0).sample(read(data, run["task"], "test"), SETUP["test_rows"])
    prompts, labels = [classification_prompt(r["text"]) for r in test], [r["label"] for r in test]
    longest = max(len(tokenizer(f" {label}")["input_ids"]) for label in labels)
    scores = {}
    trained_with = base.config._attn_implementation
    base.set_attn_implementation("sdpa")  # the faster one behind long contexts
    for tokens in SETUP["context_tokens"]:
        context = unrelated_text(data, tokenizer, tokens)
        found = answers(model, tokenizer, prompts, max_new_tokens=longest + 1, batch_size=40, context=context)
        scores[str(tokens)] = accuracy(found, labels)
    base.set_attn_implementation(trained_with)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.unload()
    return {
        **run,
        "config": SETUP["variants"][run["variant"]]["config"],
        "settings": asdict(settings),
        "train_rows": len(rows),
        "test_rows": len(test),
        "trainable_parameters": trainable,
        "train_loss": metrics["train_loss"],
        "train_seconds": round(seconds, 1),
        "accuracy": scores,
        "base_model": SETUP["base_model"],
    }


def table() -> str:
    """Markdown: accuracy by variant and task; mean over seeds at each learning rate, worst run, long inputs."""
    groups = defaultdict(list)
    for file in sorted(RESULTS.glob("*.json")):
        record = json.loads(file.read_text())
        groups[record["task"], record["variant"]].append(record)
    lines = [
        "| task | variant | rates | mean at each rate | worst run of all | behind 300 | behind 1,200 | runs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, variant), records in sorted(groups.items()):
        rates = sorted({r["learning_rate"] for r in records})
        at = {rate: [r for r in records if r["learning_rate"] == rate] for rate in rates}
        means = [mean(r["accuracy"]["0"] for r in at[rate]) for rate in rates]
        best = at[rates[max(range(len(rates)), key=lambda i: means[i])]]
        long = {n: " / ".join(f"{r['accuracy'][n]:.0f}" for r in best) for n in ("300", "1200")}
        lines.append(
            f"| {task} | {variant} | {', '.join(f'{r:g}' for r in rates)} | {' / '.join(f'{m:.0f}' for m in means)} | "
            f"{min(r['accuracy']['0'] for r in records):.0f} | "
            f"{long['300']} | {long['1200']} | {len(records)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--part", default="0/1", help="k/n: run every n-th run, beginning with the k-th")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    warnings.filterwarnings("ignore", message="Could not find a config file in")  # a GGUF base has none
    logging.disable_progress_bar()
    k, n = map(int, args.part.split("/"))
    made_with = provenance()  # of the code that is running now, whatever is edited meanwhile
    tokenizer = load_tokenizer(smollm2())
    base = load_model(smollm2(), fast_dtype(), fast_attention())
    for number, run in enumerate(runs()):
        file = record_file(run)
        if number % n != k or file.exists():
            continue
        record = run_one(run, args.data, base, tokenizer)
        write_json(file, {**record, **made_with})
        print(f"{number + 1}: {file.stem} {record['accuracy']} {record['train_seconds']} s", flush=True)


if __name__ == "__main__":
    main()
