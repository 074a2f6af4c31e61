"""How much of φ(q) is the same for every token: ‖mean φ‖² / mean ‖φ‖², by layer, over prompts of a task.

    python experiments/feature_mean.py goemotions --data ../shared/data

Content queries and ELU, as the default memory reads them, of SmolLM2-135M-Instruct. The record is a
line of results/analysis/feature_mean.jsonl. It is why ``normalize="feature_mean"`` is the default (docs/LOG.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn

from prefixmemory import PrefixMemoryConfig
from prefixmemory.files.jsonl import append_line
from prefixmemory.files.records import provenance
from prefixmemory.models.loading import load_model, load_tokenizer, smollm2
from prefixmemory.rows.rendering import render
from prefixmemory.tasks import load_task
from prefixmemory.tuner.layers import memory_layers

RESULTS = Path(__file__).parent.parent / "results" / "analysis" / "feature_mean.jsonl"


class Moments:
    """Forward hook of a feature map: the sum of φ and of ‖φ‖² over tokens, by head."""

    def __init__(self) -> None:
        self.sum, self.energy, self.tokens = torch.zeros(()), torch.zeros(()), 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], features: Tensor) -> None:
        features = features.double().flatten(end_dim=-4)[:, :, 0]  # [batch, tokens, heads, 1, features]
        self.sum = self.sum + features.sum(dim=0)
        self.energy = self.energy + features.square().sum(dim=(0, -1))
        self.tokens += features.shape[0]

    def share(self) -> Tensor:
        """The share of the energy that the mean has, by head."""
        return (self.sum / self.tokens).square().sum(dim=-1) / (self.energy / self.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", default="goemotions")
    parser.add_argument("--data", type=Path, default=None, help="folder of the tasks' data")
    parser.add_argument("--rows", type=int, default=64)
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(smollm2()), load_model(smollm2(), "float32")
    rows = load_task(args.task).split(args.data, 0, args.rows, seed=0).test
    adapted = get_peft_model(model, PrefixMemoryConfig(task_type="CAUSAL_LM", normalize="none")).eval()
    layers = memory_layers(adapted)
    found = [Moments() for _ in layers]
    for layer, moments in zip(layers, found, strict=True):
        layer.memory("default").feature_map.register_forward_hook(moments)
    with torch.inference_mode():
        for example in render(rows, tokenizer):
            adapted(**tokenizer(example.prompt, return_tensors="pt"))
    by_layer = [float(moments.share().mean()) for moments in found]
    append_line(
        RESULTS,
        {"task": args.task, "rows": len(rows), "tokens": found[0].tokens, "mean_over_heads_by_layer": by_layer}
        | provenance(),
    )
    print(f"{found[0].tokens} tokens: {100 * min(by_layer):.0f} to {100 * max(by_layer):.0f} % by layer, "
          f"mean {100 * sum(by_layer) / len(by_layer):.0f} %")  # fmt: skip


if __name__ == "__main__":
    main()
