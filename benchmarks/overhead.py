"""What a memory costs beside the bare model: a training step, a prefill, a decoding step, adapters per row.

    python benchmarks/overhead.py                       # prints a table, writes results/benchmarks/overhead.json
    python benchmarks/overhead.py --against OTHER/src   # and the same of another checkout, in turn with this one

A model of SmolLM2-135M's shape with random weights, one thread, CPU seconds (``time.process_time``), 512 tokens. Every
method has a model of its own in one process, and a round measures each of them and the bare model once, in turn; single
tokens are decoded in ``BLOCKS`` short blocks a round, in turn too, since a machine's speed drifts within seconds. A
ratio is taken within a round, and the table shows the median of the rounds and the middle half of them. The floor of a
training step is the bare model with one trainable bias in its second layer, so that gradients pass through it.
``--compiled`` decodes with ``torch.compile`` and a static cache besides. Before anything is timed, the default memory
is compared with ``reference.py``; a wrong path is not timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "benchmarks" / "overhead.json"
TOKENS, BLOCKS, NEW = 512, 12, 2
COMPILED = ("bare", "default memory", "the paper's form", "LoRA q, v r=8")
PAPER = {"rank": None, "normalize": "none", "output_limit": None}
METHODS = {
    "hooks alone (scale 0)": {},
    "default memory": {},
    "memory in full": {"rank": None},
    "the paper's form": PAPER,
    "LoRA q, v r=8": ["q_proj", "v_proj"],
    "LoRA all linear r=16": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
PER_ROW = "two adapters, one per row"


class Bench:
    """The models of one checkout, and one measurement of each."""

    def __init__(self, dtype: str, compiled: bool) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM

        from prefixmemory import PrefixMemoryConfig, set_scale

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.torch = torch
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=2048,
        )  # fmt: skip
        base = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
        self.ids = torch.randint(3, 49152, (1, TOKENS))
        self.models: dict[str, Any] = {}
        for name, fields in METHODS.items():
            if isinstance(fields, dict):
                adapter = PrefixMemoryConfig(task_type="CAUSAL_LM", **fields)
            else:
                rank = 8 if len(fields) == 2 else 16
                adapter = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=fields)
            model = get_peft_model(copy.deepcopy(base), adapter)
            self._as_if_trained(model)
            if name.startswith("hooks"):
                set_scale(model, 0.0)
                self._with_trainable_bias(model.get_base_model())
            if name == "default memory":
                model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM"))
                self._as_if_trained(model)
                self.check(model)
            self.models[name] = model.eval()
        self.models["bare"] = self._with_trainable_bias(copy.deepcopy(base).requires_grad_(False))
        with torch.no_grad():
            self.compiled = {name: self.started_compiled(self.models[name]) for name in COMPILED if compiled}

    def _with_trainable_bias(self, model: Any) -> Any:
        norm = model.model.layers[1].input_layernorm
        norm.bias = self.torch.nn.Parameter(self.torch.zeros_like(norm.weight))
        norm.register_forward_hook(lambda module, args, output: output + module.bias)
        return model

    def _as_if_trained(self, model: Any) -> None:
        with self.torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(std=0.02)
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name.endswith(".mean"):
                    tensor.normal_(std=0.1)

    def check(self, model: Any) -> None:
        """Refuse to time a memory that does not answer what ``reference.py`` answers."""
        from torch.nn import functional as F

        from prefixmemory import reference

        attention = model.get_base_model().model.layers[0].self_attn
        memory = attention.prefix_memory.memory("default")
        seen: dict[str, Any] = {}
        handles = [
            attention.q_proj.register_forward_hook(lambda m, a, output: seen.update(query=output)),
            attention.o_proj.register_forward_pre_hook(lambda m, args: seen.update(after=args[0])),
        ]
        with self.torch.no_grad():
            model(input_ids=self.ids, use_cache=False)
            after = seen["after"]
            with model.disable_adapter():
                model(input_ids=self.ids, use_cache=False)
        for handle in handles:
            handle.remove()
        tensors = (seen["query"], seen["after"], after)
        query, own, after = (x.float().unflatten(-1, (9, 64)).transpose(1, 2) for x in tensors)
        phi = reference.feature_mean(F.elu, memory.mean.float())
        expected = own + reference.limited(reference.read_memory(query, memory.matrix().float(), phi), own, 0.5)
        error = (after - expected).abs().max() / expected.abs().max()
        if error > (1e-5 if seen["query"].dtype == self.torch.float32 else 2e-2):
            raise SystemExit(f"the default memory is wrong by {error:.2g}: nothing is timed")

    def seconds(self, function: Callable[[], Any]) -> float:
        """CPU seconds of one call."""
        start = time.process_time()
        function()
        return time.process_time() - start

    def train(self, model: Any) -> float:
        model.train()
        taken = self.seconds(lambda: model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward())
        model.zero_grad(set_to_none=True)
        model.eval()
        return taken

    def prefill(self, model: Any, **kwargs: Any) -> float:
        ids = self.ids.expand(2, -1) if kwargs.pop("two_rows", False) else self.ids
        with self.torch.no_grad():
            return self.seconds(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1, **kwargs))

    def started(self, model: Any, rows: int, **kwargs: Any) -> Callable[[], Any]:
        """A call that decodes one token behind 64 others, which are in the cache."""
        ids = self.ids.expand(rows, -1)
        cache = model(input_ids=ids[:, :64], use_cache=True, logits_to_keep=1, **kwargs).past_key_values
        return lambda: model(input_ids=ids[:, :1], past_key_values=cache, **kwargs)

    def started_compiled(self, model: Any) -> Callable[[], Any]:
        """The same of the compiled model with a static cache, which has decoded two tokens."""
        from transformers import StaticCache

        cache = StaticCache(config=model.config, max_cache_len=TOKENS)
        model(input_ids=self.ids[:, :64], past_key_values=cache, logits_to_keep=1)
        compiled = self.torch.compile(model)

        def step() -> Any:
            return compiled(input_ids=self.ids[:, :1], past_key_values=cache)

        for _ in range(2):
            step()
        return step

    def decode(self, steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
        """Of one token, for each way to decode one."""
        taken = dict.fromkeys(steps, 0.0)
        for _ in range(BLOCKS):
            for name, step in steps.items():
                taken[name] += self.seconds(lambda step=step: [step() for _ in range(NEW)])  # type: ignore[misc]
        return {name: seconds / (BLOCKS * NEW) for name, seconds in taken.items()}

    def round(self) -> dict[str, dict[str, float]]:
        """CPU seconds of every method and case, once."""
        found: dict[str, dict[str, float]] = {name: {} for name in [*self.models, PER_ROW]}
        for name, model in self.models.items():
            found[name] = {"training step": self.train(model), "prefill": self.prefill(model)}
        two = {"bare": ("bare", {}), "default memory": ("default memory", {}),
               PER_ROW: ("default memory", {"adapter_names": ["default", "other"]})}  # fmt: skip
        for case, (name, kwargs) in two.items():
            found.setdefault(case, {})["prefill, two rows"] = self.prefill(self.models[name], two_rows=True, **kwargs)
        with self.torch.no_grad():
            one_row = {name: self.started(model, 1) for name, model in self.models.items()}
            two_rows = {case: self.started(self.models[name], 2, **kwargs) for case, (name, kwargs) in two.items()}
            cases = {"decode": one_row, "decode, two rows": two_rows, "decode, compiled": self.compiled}
            for case, steps in cases.items():
                for name, seconds in self.decode(steps).items():
                    found[name][case] = seconds
        return found


def serve(dtype: str, compiled: bool) -> None:
    """Measure a round for every line on standard input."""
    bench = Bench(dtype, compiled)
    bench.round()  # warm-up
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(bench.round()), flush=True)


def start(source: Path, dtype: str, compiled: bool) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--serve", "--dtype", dtype, *(["--compiled"] if compiled else [])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Of every method to the bare model, in each round."""
    return {
        name: {case: [found[name][case] / found["bare"][case] for found in rounds] for case in cases}
        for name, cases in rounds[0].items()
        if name != "bare"
    }


def table(title: str, found: dict[str, dict[str, list[float]]]) -> str:
    cases = list(dict.fromkeys(case for row in found.values() for case in row))
    lines = [f"| {title} | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    for name, row in found.items():
        cells = []
        for case in cases:
            low, middle, high = statistics.quantiles(row[case], n=4) if case in row else (0, 0, 0)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})" if case in row else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="src folder of another checkout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compiled", action="store_true", help="decode with compiled models too (of this checkout)")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.dtype, options.compiled)
    from prefixmemory.files.records import provenance, write_json

    made_with = provenance()  # now: the checkout may be another one in the end
    sources = {"this checkout": ROOT / "src"} | ({"the other one": options.against} if options.against else {})
    # only this checkout is compiled
    children = {
        name: start(source, options.dtype, options.compiled and source.parent == ROOT)
        for name, source in sources.items()
    }
    rounds: dict[str, list[Any]] = {name: [] for name in children}
    for child in children.values():
        assert child.stdout is not None
        if not child.stdout.readline():
            raise SystemExit("a measuring process ended: see above")
    for number in range(options.rounds):
        for name, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write("\n")
            child.stdin.flush()
            rounds[name].append(json.loads(child.stdout.readline()))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    for child in children.values():
        child.stdin.close()
        child.wait()
    for name, found in rounds.items():
        print(table(f"{name}, ratio to the bare model", ratios(found)), end="\n\n")
    record = {"cpu_seconds": rounds, "dtype": options.dtype, "tokens": TOKENS, **made_with}
    if options.against:
        commit = subprocess.run(["git", "-C", options.against, "rev-parse", "HEAD"], capture_output=True, text=True)
        record["against_commit"] = commit.stdout.strip()
    write_json(options.output, record)


if __name__ == "__main__":
    main()
