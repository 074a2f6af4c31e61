"""Shapes of known models with random weights, the methods that are compared on them, and what each adds at the least.

Before a memory is timed, :func:`check` compares what it says, and its gradients, with ``reference.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from prefixmemory import PrefixMemoryConfig, reference, set_scale
from prefixmemory.tuner.in_feed_forward import InFeedForward
from prefixmemory.tuner.layers import memory_layers

#: Vocabulary, width, width between, layers, heads, key/value heads, size of a head, whether the embeddings are tied.
SHAPES = {
    "tiny": (128, 32, 64, 2, 4, 2, 8, True),
    "135m": (49152, 576, 1536, 30, 9, 3, 64, True),  # SmolLM2-135M
    "1b": (128256, 2048, 8192, 16, 32, 8, 64, True),  # Llama-3.2-1B
    "3b": (128256, 3072, 8192, 28, 24, 8, 128, True),  # Llama-3.2-3B
    "8b": (128256, 4096, 14336, 32, 32, 8, 128, False),  # Llama-3.1-8B
}
INVOCATION = [1, 2]  # random text has neither token
PREFIX = 32
QV = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BARE, BIAS, HOOKS, MEMORY = "bare", "one trainable bias", "hooks alone (scale 0)", "default memory"

_memory = partial(PrefixMemoryConfig, task_type="CAUSAL_LM")
_lora = partial(LoraConfig, task_type="CAUSAL_LM")
#: Makers of configs; PEFT writes into the configs that it is given.
METHODS: dict[str, Callable[[], PeftConfig] | None] = {
    BARE: None,
    BIAS: None,
    HOOKS: _memory,
    MEMORY: _memory,
    "memory in full": partial(_memory, rank=None),
    "the paper's form": partial(_memory, rank=None, normalize="none", output_limit=None),
    "memory, activated": partial(_memory, active_from="invocation", invocation_tokens=INVOCATION),
    "memory, feed forward": partial(_memory, feed_forward=8),
    "LoRA q, v r=8": partial(_lora, r=8, target_modules=QV),
    "LoRA all linear r=8": partial(_lora, r=8, target_modules=LINEAR),
    "LoRA all linear r=16": partial(_lora, r=16, target_modules=LINEAR),
    "DoRA q, v r=8": partial(_lora, r=8, target_modules=QV, use_dora=True),
    "prefix tuning, 32 tokens": partial(PrefixTuningConfig, task_type="CAUSAL_LM", num_virtual_tokens=PREFIX),
}

#: Of the largest value, between what a memory adds and what ``reference.py`` adds, and between their gradients.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}


def config(shape: str, layers: int | None = None, positions: int = 2**15) -> LlamaConfig:
    """A config of this shape, with fewer layers if that is asked for."""
    vocabulary, width, between, depth, heads, kv_heads, size, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=between, num_hidden_layers=layers or depth,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=size, tie_word_embeddings=tied,
        max_position_embeddings=positions, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def base_model(of: LlamaConfig, dtype: torch.dtype, device: torch.device | str) -> Any:
    """A frozen model of this config with random weights, made where it will run."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(of, dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def with_method(base: nn.Module, method: str) -> Any:
    """A model with ``method``, as if it were trained; all share the weights of ``base``."""
    model: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    make = METHODS[method]
    if make is not None:
        model = get_peft_model(model, make())
        as_if_trained(model)
    if method == HOOKS:
        set_scale(model, 0.0)
    if method in (BIAS, HOOKS):  # so that gradients pass through all layers but the first
        norm = (model if make is None else model.get_base_model()).model.layers[1].input_layernorm
        norm.bias = nn.Parameter(torch.zeros_like(norm.weight))
        norm.register_forward_hook(lambda module, args, output: output + module.bias)
    return model.eval()


@torch.no_grad()
def as_if_trained(model: nn.Module) -> None:
    """Give every adapter of a model random contents, so that none of it is zero."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "prefix_memory_" in name or "lora_" in name:
            mean = name.endswith(".mean") or ".mean." in name
            loud = 0.5 if name.endswith(".B") else 0.1 if mean or name.endswith(".M") else 0.02
            parameter.add_(loud * torch.randn_like(parameter))


def text(of: LlamaConfig, rows: int, tokens: int, device: torch.device | str) -> Tensor:
    """Random text, in which the invocation stands before the last eighth."""
    ids = torch.randint(3, of.vocab_size, (rows, tokens), device=device)
    ids[:, spoken_from(tokens)] = INVOCATION[0]
    ids[:, spoken_from(tokens) + 1] = INVOCATION[1]
    return ids


def spoken_from(tokens: int) -> int:
    """The place of the invocation in :func:`text`."""
    return tokens - tokens // 8


# What a method adds at the least


def floors(model: Any, method: str, of: LlamaConfig, tokens: int, front: int, rows: int) -> dict[str, float]:
    """What a method must cost as a ratio to the bare model, by case, if its own work ran as fast as the model's.

    Training steps and prefills go by operations. A matrix of n numbers takes 2n a token; a training step takes those of
    the frozen matrices twice (∂input), all others three times (∂both); attention takes 4·heads·head_dim for each pair
    of tokens. What a memory or LoRA adds are matrices. Prefix keys and values are met by all queries of their group.
    Decoding goes by bytes: each parameter is read once a step, the cache of ``front`` tokens once for each row.
    """
    own = [p for p in model.parameters() if p.requires_grad] if METHODS[method] is not None and method != HOOKS else []
    added = 2.0 * sum(p.numel() for p in own)
    if method.startswith("prefix"):
        added *= of.num_attention_heads / of.num_key_value_heads
    if method == "memory, activated":
        added *= 1 - spoken_from(tokens) / tokens
    layer = of.hidden_size * of.head_dim * 2 * (of.num_attention_heads + of.num_key_value_heads)
    linear = 2.0 * of.num_hidden_layers * (layer + 3 * of.hidden_size * of.intermediate_size)
    head = 2.0 * of.hidden_size * of.vocab_size
    pairs = 4.0 * of.num_hidden_layers * of.num_attention_heads * of.head_dim * tokens / 2
    size = next(p for p in model.parameters() if not p.requires_grad).element_size() if own else 0
    weights = size * (linear + head) / 2
    cache = 2.0 * size * of.num_hidden_layers * of.num_key_value_heads * of.head_dim * front
    read = sum(p.nbytes for p in own)

    def decode(rows: int) -> float:
        return 1 + read / (weights + rows * cache) if own else 1.0

    return {
        "training step": 1 + 3 * added / (2 * (linear + head) + 3 * pairs),
        "prefill": 1 + added / (linear + pairs),
        "decode 1": decode(1),
        f"decode {rows}": decode(rows),
    }


# Whether it is right


def check(
    model: Any, call: Callable[[], Any], names: Sequence[str] = ("default",), spoken: int = 0, learns: bool = False
) -> None:
    """Refuse to time memories that do not say, or learn, in every layer what ``reference.py`` does.

    Args:
        model: a model with memories.
        call: a forward pass of it.
        names: the adapter of each row, or one for all.
        spoken: the first token on which they speak.
        learns: compare the gradients of queries, heads' outputs and parameters too.

    Raises:
        SystemExit: with the largest error.
    """
    layers = memory_layers(model)
    seen: list[dict[str, Tensor]] = [{} for _ in layers]
    handles = []

    def leaf(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(learns)

    for layer, at in zip(layers, seen, strict=True):
        attention: Any = layer.get_base_layer()

        def show_query(module: nn.Module, args: Any, output: Tensor, at: Any = at) -> Tensor:
            at["query"] = leaf(output)
            return at["query"]

        def show_own(module: nn.Module, args: Any, at: Any = at) -> Any:
            at["own"] = leaf(args[0])
            return (at["own"].clone(), *args[1:])  # it may be written in place

        def show_new(module: nn.Module, args: Any, at: Any = at) -> None:
            at["new"] = args[0] if learns else args[0].clone()

        def show_read(module: nn.Module, args: Any, at: Any = at) -> Any:
            at["query"] = leaf(args[0])
            return (at["query"], *args[1:])

        def show_returned(module: nn.Module, args: Any, output: Tensor, at: Any = at) -> Tensor:
            at["own"] = leaf(output)
            return at["own"].clone()

        def show_sum(module: nn.Module, args: Any, output: Tensor, at: Any = at) -> None:
            at["new"] = output if learns else output.clone()

        if isinstance(layer, InFeedForward):
            handles += [
                layer.site.module.register_forward_pre_hook(show_read, prepend=True),
                layer.site.module.register_forward_hook(show_returned, prepend=True),
                layer.site.module.register_forward_hook(show_sum),
            ]
            continue
        handles += [
            attention.q_proj.register_forward_hook(show_query, prepend=True),
            attention.o_proj.register_forward_pre_hook(show_own, prepend=True),
            attention.o_proj.register_forward_pre_hook(show_new),
        ]
    try:
        with torch.set_grad_enabled(learns):
            call()
    finally:
        for handle in handles:
            handle.remove()
    for number, (layer, at) in enumerate(zip(layers, seen, strict=True)):
        memories = [layer.memory(name) for name in names]
        ours = [p for p in memories[0].parameters() if p.requires_grad] if learns else []
        leaves = [at["query"], at["own"], *ours]
        right = [x.detach().double().requires_grad_(learns) for x in leaves]
        config = layer.configs[names[0]]
        expected = _by_reference(memories, right, config.output_limit, config.scale * config.head_scale, spoken)
        own = right[1].detach()
        pairs = [("what it adds", at["new"].detach().double() - own, expected.detach() - own)]
        if learns:
            given = torch.randn_like(at["new"])
            of = ("∂query", "∂output", *[f"∂parameter {n}" for n in range(len(ours))])
            found = torch.autograd.grad(at["new"], leaves, given)
            pairs += zip(of, found, torch.autograd.grad(expected, right, given.double()), strict=True)
        for what, mine, its in pairs:
            error = ((mine.double() - its).abs().max() / its.abs().max()).item()
            if not error < TOLERANCE[at["new"].dtype]:
                raise SystemExit(f"{what} in layer {number} is wrong by {error:.2g}: nothing is timed")


def _by_reference(
    memories: Sequence[Any], right: Sequence[Tensor], limit: float | None, scale: float, spoken: int
) -> Tensor:
    """The heads' outputs with their memories, ``[batch, tokens, heads * size]``; parameters are those in ``right``."""
    query, own, *parameters = right
    said = []
    for row, memory in zip(range(len(query)), memories if len(memories) > 1 else memories * len(query), strict=True):
        factors = parameters or [factor.detach().double() for factor in memory.factors]
        matrix = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        plain = {"elu": F.elu, "identity": lambda x: x}[memory.map_name]
        phi = plain if memory.mean is None else reference.feature_mean(plain, memory.mean.double())
        q, o = (x[row : row + 1].unflatten(-1, (len(matrix), -1)).transpose(1, 2) for x in (query, own))
        answer = reference.read_memory(q, matrix, phi)
        answer = answer if limit is None else reference.limited(answer, o, limit)
        said.append(answer.transpose(1, 2).flatten(start_dim=2))
    speaks = torch.arange(own.shape[1], device=own.device) >= spoken
    return own + torch.cat(said) * scale * speaks[:, None]
