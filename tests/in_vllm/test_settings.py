"""The same under other settings of the engine, each with an engine of its own."""

from __future__ import annotations

from asked import COUNT, EVERYBODY, questions
from engines import TOLERANCE, check, difference, engine, in_another_process
from served_models import BASE, MEMORIES, expected


def test_one_slot_that_memories_take_in_turn(made):
    """Without LoRA: beside it, vLLM 0.32 gives the base model's requests the last slot's weights on a CPU."""
    with engine(made, max_loras=1, max_cpu_loras=2) as llm:
        check(llm, made, questions([BASE, *MEMORIES]), COUNT)


def test_prompts_that_are_read_in_parts(made):
    with engine(made, max_num_batched_tokens=16, enable_chunked_prefill=True) as llm:
        check(llm, made, questions(), COUNT)


def test_requests_that_are_preempted(made):
    """Too few blocks for all: some are thrown out, and read again from the beginning."""
    with engine(made, num_gpu_blocks_override=7, max_model_len=128, enable_prefix_caching=False,
                disable_log_stats=False) as llm:  # fmt: skip
        check(llm, made, questions(), 40)
        counted = {metric.name: metric for metric in llm.get_metrics()}
        assert counted["vllm:num_preemptions"].value > 0


def test_a_compiled_model(made):
    with engine(made, enforce_eager=False) as llm:
        check(llm, made, questions(), COUNT)


def test_the_base_model_is_that_of_an_engine_without_us_bit_for_bit(made):
    without_us = {"VLLM_PLUGINS": ""}
    assert in_another_process(made, [BASE], {}) == in_another_process(made, [BASE], without_us)


def test_two_tensor_parallel_processes(made):
    """Each holds half of the heads, and of their memories; the engine and both workers are processes of their own."""
    several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = in_another_process(made, EVERYBODY, several, tensor_parallel_size=2)
    for (adapter, text), said in zip(questions(), found, strict=True):
        assert difference(said, expected(made, adapter, text, COUNT)) < TOLERANCE, adapter
