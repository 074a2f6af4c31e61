"""Memories, a LoRA and the base model in one batch answer as they do in transformers; one engine for all tests."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from asked import COUNT, EVERYBODY, questions
from engines import TOLERANCE, answer, ask, check, difference, engine
from served_models import BASE, INVOCATION, expected, prompt
from vllm import LLM
from vllm.lora.resolver import LoRAResolverRegistry

from prefixmemory.serving.store import FOLDERS
from prefixmemory.serving.vllm_resolver import register_resolver


@pytest.fixture(scope="module")
def llm(made: Path) -> Iterator[LLM]:
    with engine(made) as llm:
        yield llm


def test_one_batch_of_base_memories_and_lora(llm, made):
    check(llm, made, questions(), COUNT)


def test_the_adapters_differ(made):
    """Or the check would hold whoever answered."""
    said = [tuple(expected(made, name, prompt(27, seed=1, invoked=9), COUNT).tokens) for name in EVERYBODY]
    assert len(set(said)) == len(said)


def test_the_same_again_in_another_order(llm, made):
    check(llm, made, questions()[::-1], COUNT)


@pytest.mark.parametrize("name", ["default", "rotary", "activated"])
def test_a_scale_for_each_request(name, llm, made):
    """Of one memory in one batch; 0 is the base model, bit for bit."""
    text = prompt(73, seed=4, invoked=9)
    scales = [0.25, None, 0, 2.0]
    extra = [{} if scale is None else {"memory_scale": scale} for scale in scales]
    outputs = ask(llm, made, [(name, text)] * len(scales), COUNT, each=[{"extra_args": more} for more in extra])
    (alone,) = ask(llm, made, [(BASE, text)], COUNT)
    found = [answer(output) for output in outputs]
    assert found[2] == answer(alone)
    for scale, here in zip(scales, found, strict=True):
        assert difference(here, expected(made, name, text, COUNT, scale=scale)) < TOLERANCE, scale
    assert min(difference(one, found[1]) for one in (found[0], found[2], found[3])) > 100 * TOLERANCE


def test_scales_share_no_cached_blocks_and_take_no_slot_and_no_copy(llm, made):
    text = prompt(100, seed=14)
    store = llm.llm_engine.input_processor._memories._store
    copies = len(store.by_number)
    for scale in (0.3, 0.4, 0.3):
        (output,) = ask(llm, made, [("default", text)], COUNT, extra_args={"memory_scale": scale})
        assert difference(answer(output), expected(made, "default", text, COUNT, scale=scale)) < TOLERANCE
        cached = output.num_cached_tokens
    assert cached == 96  # of the same scale
    assert len(store.by_number) == copies


@pytest.mark.parametrize(("scale", "problem"), [("much", "out of range"), (float("nan"), "out of range"), (1e9, "100")])
def test_a_scale_that_is_no_number_is_refused_and_the_engine_goes_on(scale, problem, llm, made):
    text = prompt(20, seed=5)
    with pytest.raises(ValueError, match=problem):
        ask(llm, made, [("default", text)], COUNT, extra_args={"memory_scale": scale})
    with pytest.raises(ValueError, match="is for memories"):
        ask(llm, made, [("lora", text)], COUNT, extra_args={"memory_scale": 0.5})
    check(llm, made, [("default", text)], COUNT)


def test_adapters_are_listed_pinned_and_removed_by_the_callers_numbers(llm, made):
    from engines import request

    core = llm.llm_engine
    wanted = request(made, "shared")
    core.add_lora(wanted)
    assert wanted.lora_int_id in core.list_loras()
    assert core.pin_lora(wanted.lora_int_id)
    assert core.remove_lora(wanted.lora_int_id)
    assert wanted.lora_int_id not in core.list_loras()
    check(llm, made, [("shared", prompt(20, seed=6))], COUNT)


def test_a_lora_and_a_memory_are_found_by_their_names(llm, made, monkeypatch):
    monkeypatch.setenv(FOLDERS, str(made))
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    register_resolver()
    resolver = LoRAResolverRegistry.get_resolver("prefixmemory")
    text = prompt(30, seed=7)
    for number, name in enumerate(("lora", "default"), start=1001):  # vLLM's server numbers what it finds
        found = asyncio.run(resolver.resolve_lora(BASE, name))
        monkeypatch.setattr("engines.request", lambda *asked, found=found: found)
        found.lora_int_id = number
        (output,) = ask(llm, made, [(name, text)], COUNT)
        assert difference(answer(output), expected(made, name, text, COUNT)) < TOLERANCE
    assert asyncio.run(resolver.resolve_lora(BASE, "nobody")) is None


def test_what_the_invocation_is_and_where_it_stands():
    asked = prompt(20, seed=0, invoked=9)
    assert tuple(asked[11:14]) == INVOCATION and tuple(prompt(40, seed=9)[31:34]) != INVOCATION
