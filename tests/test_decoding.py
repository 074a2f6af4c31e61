"""Every way of decoding gives what plain decoding gives: the memory answers in each of them, and for its own rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache, pipeline
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import tiny
from close import close_logits
from prefixmemory import PrefixMemoryConfig
from prefixmemory.kernels.read import read
from prefixmemory.tuner import plan
from prefixmemory.tuner.activation import unfinished_text

#: ``mistral`` and ``gemma3`` have sliding windows of 6 tokens, the prompts are longer.
FAMILIES = ("llama_gqa", "mistral", "gemma3", "qwen3")
VARIANTS: dict[str, dict[str, Any]] = {
    "default": tiny.DEFAULT,
    "rotary": {"query": "rotary"},
    "inside": {"placement": "inside", "prefix_length": 3},
}
#: A memory that is silent up to these tokens.
WAITS: dict[str, Any] = {"rank": 8, "active_from": "invocation", "invocation_tokens": [100, 101]}
PROMPT = tiny.tokens(2, 9)
NEW = 8
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}

each = pytest.mark.parametrize("variant", VARIANTS)
families = pytest.mark.parametrize("family", FAMILIES)


def model_of(family: str = "llama_gqa", variant: str = "default") -> PeftModel:
    base = tiny.build(family)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)  # so that what it says depends on what it reads
    return tiny.with_memory(base, **VARIANTS[variant])


def decode(model: PeftModel, ids: Tensor = PROMPT, **options: Any) -> Tensor:
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})


def base_decodes_otherwise(model: PeftModel, made: Tensor, ids: Tensor = PROMPT, **options: Any) -> bool:
    """The control of a comparison that a memory which is passed by would pass too."""
    with model.disable_adapter():
        return not torch.equal(decode(model, ids, **options), made)


# Several sequences for a row


@each
@families
def test_beams_with_a_cache_are_the_beams_without(family, variant):
    model = model_of(family, variant)
    made = decode(model, num_beams=4)
    assert torch.equal(made, decode(model, num_beams=4, use_cache=False))
    assert base_decodes_otherwise(model, made, num_beams=4)


@each
def test_return_sequences_are_the_best_beams_of_their_row(variant):
    model = model_of(variant=variant)
    three = decode(model, num_beams=4, num_return_sequences=3).unflatten(0, (2, 3))
    assert torch.equal(three[:, 0], decode(model, num_beams=4))
    assert not torch.equal(three[:, 0], three[:, 1])
    for row in range(2):
        alone = decode(model, PROMPT[row : row + 1], num_beams=4, num_return_sequences=3)
        assert torch.equal(three[row], alone)


@each
def test_samples_of_a_mixed_batch_have_the_adapter_of_their_row(variant):
    """The best token alone is drawn, so that each sample is the greedy continuation."""
    model = model_of(variant=variant)
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM", **VARIANTS[variant]))
    tiny.randomize(model, "other", seed=5)
    drawn = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    names = ["other", "__base__"]
    samples = decode(model, adapter_names=names, **drawn).unflatten(0, (2, 3))
    greedy = decode(model, adapter_names=names)
    assert torch.equal(samples, greedy[:, None].expand_as(samples))
    assert not torch.equal(greedy, decode(model, adapter_names=names[::-1]))


# Several tokens at once


@each
def test_an_assistant_changes_no_token(variant):
    """The assistant's guesses are read in one pass, and the wrong ones taken back out of the cache."""
    model, assistant = model_of(variant=variant), tiny.build(seed=4)
    passes = []
    handle = assistant.register_forward_hook(lambda *_: passes.append(1))
    ids = PROMPT[:1]
    made = decode(model, ids, assistant_model=assistant)
    handle.remove()
    assert passes
    assert torch.equal(made, decode(model, ids))
    assert base_decodes_otherwise(model, made, ids)


@pytest.mark.parametrize("decoding", ["lookup", "assistant", "no cache"])
def test_guesses_that_bring_the_invocation_do_not_move_where_a_memory_speaks(decoding, monkeypatch):
    """Prompt lookup guesses what the prompt says: behind an answer, the next question and its invocation."""
    shots = [10, 11, 100, 101, 20, 12, 13, 100, 101, 21, 14, 15, 100, 101]
    monkeypatch.setitem(VARIANTS, "waits", WAITS)
    model, ids = model_of(variant="waits"), torch.tensor([shots])
    plain = decode(model, ids)
    assistant = tiny.build(seed=4)
    with torch.no_grad():
        for parameter in assistant.parameters():  # it guesses the invocation again and again
            parameter.zero_()
    options: dict[str, dict[str, Any]] = {
        "lookup": {"prompt_lookup_num_tokens": 10},
        "assistant": {"assistant_model": assistant},
        "no cache": {"use_cache": False},
    }
    assert torch.equal(decode(model, ids, **options[decoding]), plain)
    assert torch.equal(decode(model, ids, active=[12]), plain)
    assert base_decodes_otherwise(model, plain, ids)


def test_behind_a_cache_that_a_memory_has_read_the_prompts_last_invocation_counts(monkeypatch):
    monkeypatch.setitem(VARIANTS, "waits", WAITS)
    model, ids = model_of(variant="waits"), torch.tensor([[10, 11, 12, 13, 100, 101, 20, 21, 22, 100, 101, 30, 31]])
    cache = DynamicCache()
    with torch.no_grad(), unfinished_text():
        model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)

    def said(**options: Any) -> Tensor:
        return torch.stack(decode(model, ids, output_logits=True, return_dict_in_generate=True, **options).logits)

    close_logits(said(past_key_values=cache), said())
    assert (said(active=[4]) - said()).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:The invocation tokens")
def test_an_invocation_of_which_a_guess_had_the_beginning_is_found(monkeypatch):
    """A wrong guess is taken out of the cache, and the model's own token completes the invocation."""
    monkeypatch.setitem(VARIANTS, "waits", WAITS)
    model, ids = model_of(variant="waits"), PROMPT[:1, :4]

    class Writes(LogitsProcessor):
        """The model writes the invocation first."""

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            if ids.shape[1] in (4, 5):
                scores = torch.full_like(scores, -1e9)
                scores[:, 96 + ids.shape[1]] = 0
            return scores

    def guesses(self: Any, ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        guess = [100, 99, 98] if ids.shape[1] == 4 else [97]
        return torch.cat([ids, torch.tensor([guess])], dim=1), None

    monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", guesses)
    writes = {"logits_processor": LogitsProcessorList([Writes()])}
    plain = decode(model, ids, **writes)
    assert plain[0, 4:6].tolist() == [100, 101] and base_decodes_otherwise(model, plain, ids, **writes)
    assert torch.equal(decode(model, ids, prompt_lookup_num_tokens=3, **writes), plain)


@pytest.mark.filterwarnings("ignore:The invocation tokens")  # the prompt has none
def test_an_invocation_that_the_model_writes_itself_counts_where_the_prompt_has_none(monkeypatch):
    monkeypatch.setitem(VARIANTS, "waits", WAITS)
    model = model_of(variant="waits")
    written = []
    with model.disable_adapter():
        written = decode(model, PROMPT[:1])[0, PROMPT.shape[1] :].tolist()
    monkeypatch.setitem(VARIANTS, "waits", {**WAITS, "invocation_tokens": written[1:2]})
    model = model_of(variant="waits")
    plain = decode(model, PROMPT[:1])
    assert plain[0, PROMPT.shape[1] :].tolist()[:2] == written[:2] and base_decodes_otherwise(model, plain, PROMPT[:1])
    assert torch.equal(decode(model, PROMPT[:1], use_cache=False), plain)
    assert torch.equal(decode(model, PROMPT[:1], prompt_lookup_num_tokens=4), plain)


def passes_of(model: PeftModel) -> list[int]:
    """Filled with the tokens of each pass of the model."""
    seen: list[int] = []
    norm = model.get_base_model().model.norm
    norm.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    return seen


@each
def test_an_assistant_may_have_the_memory_too(variant):
    model, assistant = model_of(variant=variant), model_of(variant=variant)
    seen = passes_of(model)
    made = decode(model, PROMPT[:1], assistant_model=assistant)
    assert len(seen) < NEW  # what it guesses is right
    assert torch.equal(made, decode(model_of(variant=variant), PROMPT[:1]))


@each
def test_looking_the_next_tokens_up_in_the_prompt_changes_none(variant):
    model = model_of(variant=variant)
    ids = PROMPT[:1]
    ids = torch.cat([decode(model, ids), ids], dim=1)  # there is something to find
    expected = decode(model, ids)
    seen = passes_of(model)
    made = decode(model, ids, prompt_lookup_num_tokens=3)
    assert any(1 < tokens < ids.shape[1] for tokens in seen)
    assert torch.equal(made, expected)
    assert base_decodes_otherwise(model, made, ids)


# Caches


@each
@families
def test_a_static_cache_gives_the_logits_of_a_growing_one(family, variant):
    """In pieces, past the sliding windows."""
    model = model_of(family, variant)
    config = model.get_base_model().config
    ids = tiny.tokens(2, 20)
    found = {}
    for name, kv in {
        "static": StaticCache(config=config, max_cache_len=24),
        "growing": DynamicCache(config=config),
    }.items():
        with torch.no_grad():
            pieces = [model(input_ids=part, past_key_values=kv).logits for part in ids.split([7, 1, 8, 1, 3], dim=1)]
        found[name] = torch.cat(pieces, dim=1)
    close_logits(found["static"], found["growing"], amplified=10)
    with torch.no_grad():
        close_logits(found["growing"], model(input_ids=ids, use_cache=False).logits, amplified=10)
        with model.disable_adapter():
            assert (model(input_ids=ids, use_cache=False).logits - found["growing"]).abs().max() > 1e-3


@each
@families
@pytest.mark.filterwarnings("ignore:.*torch.compile")
def test_generating_into_a_static_cache_gives_the_same_tokens(family, variant):
    model = model_of(family, variant)
    made = decode(model, cache_implementation="static", disable_compile=True)
    assert torch.equal(made, decode(model))
    assert base_decodes_otherwise(model, made)


# Pipelines


@each
def test_the_text_generation_pipeline_says_what_generate_says(variant):
    model, tokenizer = model_of(variant=variant), tiny.tokenizer()
    said = pipeline("text-generation", model=model, tokenizer=tokenizer)("the line is dead", **GREEDY)
    ids = tokenizer("the line is dead", return_tensors="pt").input_ids
    made = decode(model, ids)
    assert said[0]["generated_text"] == tokenizer.decode(made[0], skip_special_tokens=True)
    assert base_decodes_otherwise(model, made, ids)


def test_a_layer_hears_of_every_pass():
    """The control of this file: a memory that only answers in some passes is seen."""
    model = model_of()
    made = decode(model, num_beams=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "read", lambda query, own, *rest: read(query, own, *rest) if query.shape[1] > 1 else own)
        assert not torch.equal(decode(model, num_beams=4), made)
