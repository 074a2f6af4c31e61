"""Gradient checkpointing changes no gradient: recomputed layers show their query to the memory again."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from tiny import DEFAULT, build, memory_parameters, tokens, with_memory

TOLERANCE = 1e-5

# The name that Trainer, TRL and most scripts call; the new one does not exist in every supported transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def memory_gradients(model: PeftModel) -> tuple[dict[str, torch.Tensor], int]:
    """Gradient of the language-modelling loss for each memory tensor, and how often the first layer ran."""
    calls = 0

    def count(module, args):
        nonlocal calls
        calls += 1

    ids = tokens(2, 11)
    first_attention = next(m for n, m in model.named_modules() if n.endswith(("self_attn", "attn", "attention")))
    handle = first_attention.register_forward_pre_hook(count)
    model.zero_grad()
    # The loss of random models is flat; the factor brings its gradients to order one.
    (100 * model(input_ids=ids, labels=ids, use_cache=False).loss).backward()
    handle.remove()
    return {name: p.grad.clone() for name, p in memory_parameters(model).items()}, calls


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("query", ["content", "rotary"])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama_gqa", DEFAULT),
        ("llama_gqa", {}),
        ("llama_gqa", dict(feature_map="mlp", rank=3, share_heads=True)),
        ("qwen3", {}),
        ("phi3", {}),
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("gpt2", {"output_limit": 0.3}),
    ],
    ids=str,
)
def test_gradient_checkpointing_gives_the_same_memory_gradients(family, config, query, use_reentrant):
    model = with_memory(build(family), query=query, **config).train()
    expected, calls = memory_gradients(model)
    assert calls == 1
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, f"{name} has no gradient to compare"

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # reentrant checkpointing sees no gradient to compute without it
    model.train()
    actual, calls = memory_gradients(model)
    assert calls == 2, "the layer was not recomputed, so nothing was tested"
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_the_same_dropout(use_reentrant):
    model = with_memory(build(), dropout=0.5).train()
    torch.manual_seed(3)
    expected, _ = memory_gradients(model)
    other, _ = memory_gradients(model)  # control: without the seed, dropout does change the gradients
    assert any((other[name] - expected[name]).abs().max() > 100 * TOLERANCE for name in expected)

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    actual, calls = memory_gradients(model)
    assert calls == 2
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=TOLERANCE, rtol=0)
