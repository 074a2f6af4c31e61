"""The quickstart over seeds and learning rates: does it hold, and does it collapse away from the default rate?

    python experiments/quickstart.py                     # run what is missing
    python experiments/quickstart.py --memory default    # of one memory
    python experiments/quickstart.py --table

The default memory and those that were it before, of rank 8 and full, in the paper's form; each at a third, once and
three times its rate. One line a run in results/quickstart/records.jsonl. Each run trains as ``prefixmemory quickstart``
does, saves, loads from disk and answers all test sentences. Two processes may share the work with ``--part 0/2`` and
``--part 1/2``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path

from peft import PeftModel
from rich.console import Console

from prefixmemory import PrefixMemoryConfig
from prefixmemory.files.jsonl import append_line, read_lines
from prefixmemory.files.records import provenance
from prefixmemory.models.loading import fast_attention, fast_dtype, load_model, load_tokenizer, smollm2
from prefixmemory.quickstart import measure, one_example_per_label
from prefixmemory.rows.data import northline
from prefixmemory.rows.rows import labels_of
from prefixmemory.scoring.generation import accuracy
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.output import Output
from prefixmemory.training.run import quiet_libraries, run_training
from prefixmemory.training.settings import TrainingSettings

RESULTS = Path(__file__).parent.parent / "results" / "quickstart" / "records.jsonl"
PLAIN = {"normalize": "none", "output_limit": None}
MEMORIES = {  # fields of the memory, settings of the training
    "full": ({"rank": None, **PLAIN}, {"learning_rate": 3e-4, "warmup": 0.1}),
    "rank-8": (PLAIN, {"learning_rate": 2e-3, "warmup": 0.1}),
    "default": ({}, {"learning_rate": 6e-3}),
    "blocks": ({"feed_forward": 8, "active_from": "question"}, {"learning_rate": 3e-3}),
}
FACTORS = {"1/3": 1 / 3, "1": 1.0, "3": 3.0}
SEEDS = range(5)


def runs(memories=MEMORIES):
    return [(memory, seed, factor) for memory in memories for factor in ("1", "3", "1/3") for seed in SEEDS]


def made() -> dict[tuple[str, int, str], dict]:
    """(memory, seed, factor) -> record of the runs that have been made."""
    return {(one["memory"], one["seed"], one["factor"]): one for _, one in read_lines(RESULTS)}


def table() -> str:
    """Markdown: accuracy of every seed at every rate."""
    found = defaultdict(dict)
    base = set()
    records = made()
    for memory, seed, factor in (run for run in runs() if run in records):
        record = records[memory, seed, factor]
        found[memory, factor][seed] = record["accuracy_adapted"]
        base.add((round(record["accuracy_base"], 1), round(record["accuracy_base_one_example_a_label"], 1)))
    lines = [f"Base model (labels listed, one example a label): {sorted(base)}", ""]
    lines += ["| memory | learning rate | " + " | ".join(f"seed {s}" for s in SEEDS) + " |"]
    lines += ["|---" * (len(SEEDS) + 2) + "|"]
    for (memory, factor), accuracies in found.items():
        cells = " | ".join(f"{accuracies[s]:.1f}" if s in accuracies else "" for s in SEEDS)
        lines.append(f"| {memory} | {factor} × {MEMORIES[memory][1]['learning_rate']:g} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="0/1", help="k/n: run every n-th run, beginning with the k-th")
    parser.add_argument("--memory", choices=MEMORIES, action="append", help="only this one; may be repeated")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    quiet_libraries()
    console = Console()
    made_with = provenance()  # of the code that is running now, whatever is edited meanwhile
    name = smollm2()
    tokenizer, model = load_tokenizer(name), load_model(name, fast_dtype(), fast_attention())
    train_rows, test_rows = northline("train"), northline("test")
    expected = [row["label"] for row in test_rows]
    base = measure(model, tokenizer, test_rows, console, "base", labels_of(test_rows))
    few_shot = measure(model, tokenizer, test_rows, console, "few-shot", context=one_example_per_label(train_rows))
    k, n = map(int, args.part.split("/"))
    for memory, seed, factor in runs(args.memory or MEMORIES)[k::n]:
        if (memory, seed, factor) in made():
            continue
        fields, training = MEMORIES[memory]
        rate = float(f"{training['learning_rate'] * FACTORS[factor]:.3g}")
        settings = TrainingSettings(seed=seed, **{**training, "learning_rate": rate})
        with tempfile.TemporaryDirectory() as folder:
            output = Output(Path(folder) / "memory")
            config = PrefixMemoryConfig(task_type="CAUSAL_LM", **fields)
            record = run_training(model, TrainingJob(name, tokenizer, train_rows, config, settings), output)
            adapted = PeftModel.from_pretrained(model, str(output.folder))
        answers = measure(adapted, tokenizer, test_rows, console, "adapted")
        adapted.unload()
        del record["base_model"]  # a path on this machine
        scores = {
            "accuracy_base": accuracy(base, expected),
            "accuracy_base_one_example_a_label": accuracy(few_shot, expected),
            "accuracy_adapted": accuracy(answers, expected),
        }
        append_line(RESULTS, {"memory": memory, "factor": factor, "seed": seed, **scores, **record, **made_with})
        print(
            f"{memory} at {factor} x, seed {seed}: {scores['accuracy_adapted']:.1f} % in {record['train_seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
