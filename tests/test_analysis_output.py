"""Instruments that look at what attention answers: the spectrum, the readout, ablations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import tiny
from prefixmemory import PrefixMemoryError, set_scale
from prefixmemory.analysis import ablate, effective_rank, readout, spectrum
from prefixmemory.analysis.inputs import text_sites
from prefixmemory.analysis.readout import final_norm, memories, text_loss
from prefixmemory.analysis.spectrum import biases
from prefixmemory.kernels.read import read

FAMILIES = ("llama_gqa", "qwen3", "gemma2", "gpt2", "gpt_neox", "phi3")


def layer_of(model: PeftModel, index: int) -> torch.nn.Module:
    return next(m for n, m in model.named_modules() if n.endswith(f"{index}.self_attn"))


def keep_only(model: PeftModel, layer: int, head: int, rank: int) -> torch.Tensor:
    """Make one head's memory of this rank, and all others zero; returns it."""
    with torch.no_grad():
        for parameter in tiny.memory_parameters(model).values():
            parameter.zero_()
        bank = torch.randn(8, rank) @ torch.randn(rank, 8)
        layer_of(model, layer).prefix_memory.memory("default").M[head] = bank
    return bank


# The spectrum


def test_effective_rank() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    assert effective_rank(torch.tensor([0.9, 0.1])) == pytest.approx(1.3841, abs=1e-4)
    assert effective_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize(("family", "limit"), [*((family, None) for family in FAMILIES), ("llama_gqa", 0.3)])
def test_the_bias_of_a_memory_is_its_answer_behind_the_output_projection(
    family: str, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny.with_memory(tiny.build(family), output_limit=limit), tiny.tokens(2, 9)
    found = biases(model, ids)
    added: list[torch.Tensor] = []

    def look(query: torch.Tensor, outputs: torch.Tensor, *rest: Any) -> torch.Tensor:
        after = read(query, outputs, *rest)
        added.append((after - outputs).reshape(2, 9, -1))
        return after

    monkeypatch.setattr("prefixmemory.tuner.plan.read", look)
    with torch.no_grad():
        model(ids)
    answers = dict(zip(text_sites(model), added, strict=True))  # the layers are called in order
    with model.disable_adapter(), torch.no_grad():
        for name, site in text_sites(model).items():
            project_ = site.output_projection
            expected = project_(answers[name]) - project_(torch.zeros_like(answers[name]))
            torch.testing.assert_close(found[name][0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_rank_of_the_memory_is_rank_of_the_bias(rank: int) -> None:
    model = tiny.with_memory(tiny.build(), normalize="query_rms")
    keep_only(model, layer=1, head=2, rank=rank)
    found = spectrum(model, tiny.tokens(1, 60))
    assert found.effective_rank[0] == 0
    assert sum(value > 1e-6 * max(found.eigenvalues[1]) for value in found.eigenvalues[1]) == rank
    assert found.effective_rank[1] <= rank + 1e-3
    assert rank > 1 or found.effective_rank[1] == pytest.approx(1, abs=1e-3)
    assert (found.tokens, found.width) == (60, 32)
    assert found.relative_norm[0] == 0
    assert found.relative_norm[1] > 0


def test_eigenvalues_are_those_of_the_covariance() -> None:
    model, ids = tiny.with_memory(tiny.build()), tiny.tokens(3, 20)
    found = spectrum(model, ids)
    for values, constant, (bias, _) in zip(found.eigenvalues, found.constant, biases(model, ids).values(), strict=True):
        x = bias.flatten(0, 1).double()
        expected = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
        torch.testing.assert_close(torch.tensor(values).double(), expected, atol=1e-9, rtol=1e-5)
        assert constant == pytest.approx(float((x.mean(0) ** 2).sum() / (x**2).sum(1).mean()))


def test_a_constant_bias_has_no_covariance() -> None:
    """A memory that answers each query alike: φ(q) = softmax(q) sums to one, and all rows of M are the same."""
    model = tiny.with_memory(tiny.build(), feature_map="softmax")
    with torch.no_grad():
        for parameter in tiny.memory_parameters(model).values():
            parameter.copy_(torch.randn(4, 1, 8).expand(4, 8, 8))
    found = spectrum(model, tiny.tokens(1, 30))
    assert found.constant == pytest.approx([1, 1], abs=1e-5)


def other_adapter(kind: str) -> PeftModel:
    config = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
        "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[kind]
    model = get_peft_model(tiny.build(attention="sdpa"), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ia3" in name:
                parameter.mul_(torch.rand_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix"])
def test_the_bias_of_the_first_layer_is_the_difference_of_whole_passes(kind: str) -> None:
    """There, and only there, the input to attention is the base model's."""
    model, ids = other_adapter(kind), tiny.tokens(1, 10)
    kept: list[torch.Tensor] = []
    layer_of(model, 0).register_forward_hook(lambda m, a, output: kept.append(output[0]))
    with torch.no_grad():
        model(input_ids=ids)
        with model.disable_adapter():
            model(input_ids=ids)
    first = next(iter(biases(model, ids).values()))[0]
    torch.testing.assert_close(first, kept[0] - kept[1], atol=1e-6, rtol=1e-4)
    assert first.abs().max() > 1e-4
    found = spectrum(model, ids)
    assert len(found.layers) == 2
    assert all(1 <= rank <= 9 for rank in found.effective_rank)


def test_prefix_inside_and_peft_prefix_have_the_same_spectrum() -> None:
    theirs = get_peft_model(
        tiny.build(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=32)
    ).eval()
    ours = tiny.with_memory(tiny.build(), placement="inside", prefix_length=4)
    cache = theirs.get_prompt(1)
    # PEFT's input begins at position 4 and its prefix is not rotated; ours begins at 0, so its keys are turned back.
    cos, sin = ours.get_base_model().model.rotary_emb(torch.zeros(1), torch.tensor([[4]]))
    with torch.no_grad():
        for index in range(2):
            memory = layer_of(ours, index).prefix_memory.memory("default")
            keys = cache.layers[index].keys
            memory.keys.copy_(apply_rotary_pos_emb(keys, keys, cos, -sin)[0][0])
            memory.values.copy_(cache.layers[index].values[0])
    ids = tiny.tokens(1, 12)
    a, b = spectrum(ours, ids), spectrum(theirs, ids)
    torch.testing.assert_close(torch.tensor(a.eigenvalues), torch.tensor(b.eigenvalues), atol=1e-9, rtol=1e-3)
    assert a.effective_rank == pytest.approx(b.effective_rank, rel=1e-3)


@pytest.mark.parametrize("kind", ["untrained", "scale", "tokens", "mlp"])
def test_an_adapter_that_changes_no_attention_is_refused(kind: str) -> None:
    configs = {
        "tokens": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "mlp": LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"], init_lora_weights=False),
    }
    if kind in configs:
        model = get_peft_model(tiny.build(), configs[kind])
    else:
        model = tiny.with_memory(tiny.build(), fill=kind == "scale")
        set_scale(model, 0.0 if kind == "scale" else 1.0)
    with pytest.raises(PrefixMemoryError, match="changes the output of no attention module"):
        spectrum(model, tiny.tokens())


def test_spectra_need_an_adapter_and_two_tokens() -> None:
    with pytest.raises(PrefixMemoryError, match="has no adapter"):
        spectrum(tiny.build(), tiny.tokens())
    with pytest.raises(PrefixMemoryError, match="needs two tokens"):
        spectrum(tiny.with_memory(tiny.build()), tiny.tokens(1, 1))


# The readout


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_that_writes_one_token_is_read_out_as_it(family: str) -> None:
    """M = u vᵀ, and the token's unembedding row is what the output projection and the final norm make of v."""
    model = tiny.with_memory(tiny.build(family), fill=False)
    base = model.get_base_model()
    name, (site, bank) = next(iter(memories(model).items()))  # an untrained memory is one all the same
    head, token, direction = 1, 77, torch.randn(site.value_dim)
    norm_name, norm = final_norm(base)
    assert norm is not None
    flat = torch.zeros(1, site.heads, site.value_dim)
    flat[0, head] = direction
    with torch.no_grad():
        site.module.prefix_memory.memory("default").M[head] = torch.outer(torch.rand(bank.shape[1]), direction)
        forward = site.output_projection.forward
        hidden = forward(flat.flatten(1)) - forward(torch.zeros_like(flat.flatten(1)))
        base.get_output_embeddings().weight[token] = (norm(hidden) - norm(torch.zeros_like(hidden)))[0]
    found = readout(model, tiny.tokenizer(), directions=1, tokens=3)
    entry = found.directions[0]
    assert (entry.layer, entry.head) == (name, head)
    decoded = tiny.tokenizer().decode([token])
    assert decoded in (entry.tokens[0], entry.opposite_tokens[0])
    assert entry.energy == pytest.approx(1)
    assert found.norms[0][head] == pytest.approx(entry.singular_value)
    assert f"final norm ({norm_name})" in found.definition
    assert found.norms[0][0] == 0
    assert len(found.directions) == 1  # there is nothing in the others


def test_the_final_norm_is_that_of_the_text() -> None:
    """A vision tower that stands in front has norms of the same names."""

    class Both(torch.nn.Module):
        def __init__(self, text: torch.nn.Module) -> None:
            super().__init__()
            self.visual = torch.nn.Module()
            self.visual.norm = torch.nn.LayerNorm(4)
            self.language_model = text

    both = Both(tiny.build())
    name, norm = final_norm(both)
    assert name == "language_model.model.norm" and norm is both.language_model.model.norm


def test_directions_of_all_heads_leading_first() -> None:
    model = tiny.with_memory(tiny.build(), rank=2, share_heads=True, head_scale=0.5)
    set_scale(model, 6.0)
    found = readout(model, tiny.tokenizer(), directions=2, tokens=4)
    assert len(found.directions) == 2 * 4 * 2
    first, second = found.directions[:2]
    assert first.singular_value > second.singular_value
    assert first.energy + second.energy == pytest.approx(1)
    assert first.logits == sorted(first.logits, reverse=True)
    assert first.opposite_logits == sorted(first.opposite_logits)
    matrix = layer_of(model, 0).prefix_memory.memory("default").matrix().detach()
    assert found.norms[0][:2] == pytest.approx([3 * float(matrix[0].norm())] * 2)  # of one group
    assert found.norms[0][0] != pytest.approx(found.norms[0][2])


def test_the_readout_changes_nothing() -> None:
    model, ids = tiny.with_memory(tiny.build()), tiny.tokens()
    expected = model(ids).logits
    readout(model, tiny.tokenizer())
    assert torch.equal(model(ids).logits, expected)


def test_prefix_vectors_with_a_feature_map_are_read_out_as_b() -> None:
    model = tiny.with_memory(tiny.build(), prefix_length=3, similarity="feature_map")
    memory = layer_of(model, 0).prefix_memory.memory("default")
    norms = readout(model, tiny.tokenizer()).norms[0]
    assert norms == pytest.approx([float(memory.kernel()[0][head // 2].detach().norm()) for head in range(4)])


@pytest.mark.parametrize("kind", ["lora", "inside", "softmax", "scale"])
def test_without_a_memory_there_is_no_readout(kind: str) -> None:
    configs = {
        "inside": dict(placement="inside", prefix_length=3),
        "softmax": dict(prefix_length=3, similarity="softmax"),
    }
    if kind == "lora":
        model = other_adapter("lora")
    else:
        model = tiny.with_memory(tiny.build(), **configs.get(kind, {}))
        set_scale(model, 0.0 if kind == "scale" else 1.0)
    with pytest.raises(PrefixMemoryError, match="There is no memory in this adapter"):
        readout(model, tiny.tokenizer())
    with pytest.raises(PrefixMemoryError, match="There is no memory in this adapter"):
        ablate(model, lambda: 0.0)


# Ablations


@pytest.mark.parametrize("limit", [None, 0.3])
def test_ablation_is_the_loss_without_the_heads_memory(limit: float | None) -> None:
    model, ids = tiny.with_memory(tiny.build(), output_limit=limit), tiny.tokens(2, 12)
    found = ablate(model, lambda: text_loss(model, ids))
    assert found.loss == pytest.approx(float(model(ids, labels=ids).loss.detach()), abs=1e-6)
    bank = layer_of(model, 1).prefix_memory.memory("default").M
    for head in range(4):
        kept = bank[head].detach().clone()
        with torch.no_grad():
            bank[head] = 0
        expected = text_loss(model, ids) - found.loss
        with torch.no_grad():
            bank[head] = kept
        assert found.change[1][head] == pytest.approx(expected, abs=1e-6)
        assert abs(expected) > 1e-5
    assert text_loss(model, ids) == found.loss


def test_ablation_of_chosen_heads() -> None:
    model, ids = tiny.with_memory(tiny.build()), tiny.tokens()
    name = list(memories(model))[1]
    steps: list[int] = []
    found = ablate(model, lambda: text_loss(model, ids), [(name, 2)], steps.append)
    assert steps == [1]
    assert found.change[0] == [None] * 4
    assert [value is None for value in found.change[1]] == [True, True, False, True]
    with pytest.raises(PrefixMemoryError, match="no memory of head 4"):
        ablate(model, lambda: 0.0, [(name, 4)])
