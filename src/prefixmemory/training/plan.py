"""``--dry-run``: what a recipe would train, and the memory that it needs, without loading a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from prefixmemory.attention.sites import CHILD
from prefixmemory.models.loading import explain, full_name, load_tokenizer, location
from prefixmemory.training.job import TrainingJob, job_of, rows_of
from prefixmemory.training.methods import attach
from prefixmemory.training.recipe import Recipe
from prefixmemory.training.settings import TrainingSettings

GIB = 2**30
#: Letters that are shown in front of where a memory speaks.
SHOWN = 200
#: Bytes of one packed weight, with its scales.
PACKED_BYTES = {"bnb-4bit": 0.516, "bnb-8bit": 1.01, "torchao-int8": 1.01}


@dataclass(frozen=True)
class Plan:
    """What would be trained. Sizes in bytes, ``longest`` in tokens.

    ``activations`` is an estimate: what a transformer keeps for the backward pass, without the temporary memory of
    kernels; the others are counted.
    """

    base_model: str
    method: str
    modules: dict[str, int]
    trainable: int
    total: int
    adapter_file: int
    rows: int
    validation_rows: int
    longest: int
    cut: int
    steps: int
    weights: float
    optimizer: int
    activations: float
    active_from: str = "start"
    row: str = ""
    invoked_again: tuple[int, int] = (0, 0)

    def shown(self) -> str:
        """The plan as a table for a terminal."""
        per_module = sorted(set(self.modules.values()))
        each = f"{per_module[0]:,}" if len(per_module) == 1 else f"{per_module[0]:,} to {per_module[-1]:,}"
        names = list(self.modules)
        where = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        cut = f", {self.cut:,} rows lose the beginning of their prompt" if self.cut else ""
        total = self.weights + self.optimizer + self.activations
        lines = {
            "base model": f"{self.base_model}, {self.total - self.trainable:,} parameters, frozen",
            "method": f"{self.method}, {self.trainable:,} trainable parameters "
            f"({100 * self.trainable / self.total:.2f} %), file of {self.adapter_file / 2**20:.1f} MiB",
            "modules": f"{len(names)} ({each} parameters each): {where}",
            "rows": f"{self.rows:,} to train on, {self.validation_rows:,} for validation; "
            f"longest {self.longest:,} tokens{cut}",
            "steps": f"{self.steps:,} on one device",
            "memory": f"{total / GIB:.2f} GiB: weights {self.weights / GIB:.2f}, adapter with gradients and optimizer "
            f"{self.optimizer / GIB:.2f}, activations about {self.activations / GIB:.2f}",
        }
        if self.row:
            asked, answered = self.invoked_again
            told = f", the last one in {asked:,} rows whose question brings its tokens, too" if asked else ""
            told += f", in {answered:,} rows only from within the answer on" if answered else ""
            lines["active from"] = (
                f"{self.active_from}{told}; the first row, what the memory speaks on in ⟦⟧: {self.row}"
            )
        return "\n".join(f"{name:12}{line}" for name, line in lines.items())


def plan_of(recipe: Recipe) -> Plan:
    """Count what ``recipe`` would train; the model is built without weights.

    Raises:
        PrefixMemoryError: whatever the run itself would be refused for, except for the output folder, weights that
            cannot be read, and packages that are not installed.
    """
    rows = rows_of(recipe)
    settings = recipe.training
    base_model = full_name(recipe.model)
    job = job_of(recipe, base_model, load_tokenizer(base_model), rows)
    _ = job.tokens_of(0)  # what does not fit is refused here, as in the run
    longest = job.longest
    name, file = location(base_model)
    try:
        config: Any = AutoConfig.from_pretrained(name, **file)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=recipe.attention)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise explain(base_model, error) from error
    job.check_context(config)
    dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        adapted = attach(model, job.config)
    trained = {n: p.numel() for n, p in adapted.named_parameters() if p.requires_grad}
    fixed = {n: p for n, p in adapted.named_parameters() if not p.requires_grad}
    frozen = {n: p for n, p in fixed.items() if f".{CHILD}." not in n}  # the rest is a memory's mean
    saved = sum(trained.values()) + sum(p.numel() for n, p in fixed.items() if n not in frozen)
    examples_a_step = settings.batch_size * settings.gradient_accumulation
    examples = len(job.tokens) if settings.objective == "kto" else len(job.rows)  # of a pair, kto makes two
    steps_an_epoch = math.ceil(examples / examples_a_step)
    return Plan(
        base_model=base_model,
        method=recipe.method.get("name", "prefix_memory"),
        modules=_modules(trained, adapted.peft_type),
        trainable=sum(trained.values()),
        total=sum(trained.values()) + sum(p.numel() for p in frozen.values()),
        adapter_file=4 * saved,
        rows=len(job.rows),
        validation_rows=len(job.validation),
        longest=longest,
        cut=job.rows_cut,
        steps=math.ceil(settings.epochs * steps_an_epoch),
        weights=_weights(model, dtype, recipe.quantization),
        optimizer=(4 + 4 + 8) * sum(trained.values()),  # fp32 value, gradient, two moments of AdamW
        activations=_activations(config, settings, longest, dtype.itemsize),
        active_from=getattr(job.config, "active_from", "invocation" if job.invocation else "start"),
        row=_marked(job),
        invoked_again=job.invoked_again,
    )


def _marked(job: TrainingJob) -> str:
    """The first row in one line, with brackets around the tokens on which the memory speaks; empty: all of them."""
    if job.invocation is None:
        return ""
    ids = job.tokens[0].prompt + job.tokens[0].completion
    first = job.speaks_from(job.tokens[0])
    silent, active = (str(job.tokenizer.decode(part)).replace("\n", "⏎") for part in (ids[:first], ids[first:]))
    return f"{'…' if len(silent) > SHOWN else ''}{silent[-SHOWN:]}⟦{active}⟧"


def _modules(trained: dict[str, int], method: Any) -> dict[str, int]:
    """Trained parameters by the module of the base model that they belong to; PEFT knows how a method names its own."""
    mark = f".{PEFT_TYPE_TO_PREFIX_MAPPING.get(method, 'default')}"
    found: dict[str, int] = {}
    for name, size in trained.items():
        name = name.partition(mark)[0].removeprefix("base_model.model.").removesuffix(f".{CHILD}")
        found[name] = found.get(name, 0) + size
    return found


def _weights(model: nn.Module, dtype: torch.dtype, quantization: str | None) -> float:
    """Bytes of the frozen weights; linear layers may be packed, embeddings and the output layer are not."""
    packed = 0
    if quantization is not None:
        packed = sum(
            module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and "lm_head" not in name
        )
    whole = sum(p.numel() for p in model.parameters() if not p.requires_grad) - packed
    return whole * dtype.itemsize + packed * PACKED_BYTES.get(quantization or "", 0.0)


def _activations(config: Any, settings: TrainingSettings, longest: int, itemsize: int) -> float:
    """Bytes kept for the backward pass: about 8 hidden and 3 MLP vectors a layer and token, and fp32 logits."""
    text = config.get_text_config()
    hidden, layers = text.hidden_size, text.num_hidden_layers
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    inner = max(inner) if isinstance(inner, list) else inner
    layer = (8 * hidden + 3 * inner) * itemsize
    kept = layers * hidden * itemsize + layer if settings.gradient_checkpointing else layers * layer
    return float(settings.batch_size * longest * (kept + 2 * 4 * text.vocab_size))
