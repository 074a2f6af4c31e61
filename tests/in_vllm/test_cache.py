"""Cached keys and values: shared where they are the same, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import answer, ask, check, difference, engine
from served_models import BASE, INVOCATION, expected, prompt, save_memory
from vllm.v1.core import kv_cache_utils

COUNT = 6
BLOCK = 32
DOCUMENT = prompt(2000, seed=20)


def cached(output) -> int:
    """How many of a prompt's tokens were not computed."""
    return output.num_cached_tokens


def question(number: int) -> list[int]:
    """Another one about the same document, asked behind the invocation."""
    return [*DOCUMENT, *INVOCATION, *prompt(8, seed=30 + number)]


@pytest.fixture(scope="module")
def eight(made: Path) -> list[str]:
    """Names of eight activated memories."""
    names = [f"activated-{number}" for number in range(8)]
    for number, name in enumerate(names):
        fields = {"active_from": "invocation", "invocation_tokens": list(INVOCATION)}
        save_memory(made, name, seed=100 + number, **fields)
    return names


def test_a_document_is_read_once_for_the_base_model_and_eight_memories(made, eight):
    """And each answers as if it had read the document alone."""
    with engine(made, max_loras=8, max_cpu_loras=8) as llm:
        asked = [(name, question(number)) for number, name in enumerate(eight)]
        outputs = ask(llm, made, [(BASE, DOCUMENT)], 1)
        assert cached(outputs[0]) == 0
        outputs = ask(llm, made, asked, COUNT)
        whole = len(DOCUMENT) // BLOCK * BLOCK
        assert [cached(output) for output in outputs] == [whole] * len(eight)
        for (name, text), output in zip(asked, outputs, strict=True):
            assert difference(answer(output), expected(made, name, text, COUNT)) < 1e-4
        assert len({tuple(answer(output).tokens) for output in outputs}) > 4  # they do not all say the same


def test_nothing_behind_the_invocation_is_shared_but_with_oneself(made):
    first = [*prompt(64, seed=21), *INVOCATION, *prompt(70, seed=22)]
    with engine(made) as llm:
        shared = {}
        for name in ("activated", BASE, "default", "activated", "default", BASE):
            (output,) = ask(llm, made, [(name, first)], COUNT)
            assert difference(answer(output), expected(made, name, first, COUNT)) < 1e-4
            shared.setdefault(name, []).append(cached(output))
        # the base model finds the 64 tokens before the invocation; what speaks from the first token on finds nothing
        assert shared == {"activated": [0, 128], BASE: [64, 128], "default": [0, 128]}


def test_an_earlier_question_becomes_the_base_models(made):
    """In a second turn only the last invocation counts, as in training."""
    turn = [*prompt(40, seed=23), *INVOCATION, *prompt(60, seed=24)]
    with engine(made) as llm:
        ask(llm, made, [("activated", turn)], COUNT)
        second = [*turn, *prompt(30, seed=25), *INVOCATION, *prompt(9, seed=26)]
        (output,) = ask(llm, made, [("activated", second)], COUNT)
        assert cached(output) == BLOCK  # of the first turn, what lies before its invocation
        assert difference(answer(output), expected(made, "activated", second, COUNT)) < 1e-4


def test_new_weights_under_the_same_name_and_path_are_new(made):
    text = prompt(100, seed=27)
    save_memory(made, "replaced", seed=1)
    with engine(made) as llm:
        check(llm, made, [("replaced", text)], COUNT)
        before = expected(made, "replaced", text, COUNT)
        save_memory(made, "replaced", seed=2)
        (output,) = ask(llm, made, [("replaced", text)], COUNT)
        assert cached(output) == 0
        assert difference(answer(output), expected(made, "replaced", text, COUNT)) < 1e-4
        assert difference(answer(output), before) > 1e-2
        save_memory(made, "replaced", seed=1)  # the old contents again: their blocks are found
        (output,) = ask(llm, made, [("replaced", text)], COUNT)
        assert cached(output) == 96 and difference(answer(output), before) < 1e-4


def test_the_tests_can_fail(made, monkeypatch):
    """With the base model's keys for all blocks, an adapter goes on from keys and values that are not its own."""
    text = prompt(100, seed=28)
    original = kv_cache_utils.generate_block_hash_extra_keys

    def as_base(request, *place):
        _, following = original(request, *place)
        return None, following

    monkeypatch.setattr(kv_cache_utils, "generate_block_hash_extra_keys", as_base)
    with engine(made) as llm:
        ask(llm, made, [(BASE, text)], COUNT)
        (output,) = ask(llm, made, [("default", text)], COUNT)
        assert cached(output) == 96
        assert difference(answer(output), expected(made, "default", text, COUNT)) > 1e-3
