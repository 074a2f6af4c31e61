"""Memories in feed-forward blocks: where the server has slots for them, they answer as in transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from asked import COUNT, questions
from engines import TOLERANCE, answer, ask, check, difference, engine, in_another_process, request
from peft import PeftModel
from safetensors.torch import load_file
from served_models import BASE, BLOCKS, Answer, base, config, expected, prompt, save_base, save_memory
from transformers import AutoModelForCausalLM, Phi3Config
from vllm import LLM
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear

from prefixmemory import PrefixMemoryError
from prefixmemory.serving import vllm_blocks
from prefixmemory.serving.served import FEED_FORWARD
from prefixmemory.tuner.in_feed_forward import InFeedForward
from prefixmemory.tuner.layers import memory_layers

#: Fields of a config.
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
NAMES = [BASE, *BLOCKS, "default", "activated", "lora in blocks"]


@pytest.fixture(scope="module")
def llm(made: Path) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FEED_FORWARD, "1")
        with engine(made, max_loras=7) as llm:
            yield llm


def test_one_batch_of_base_memories_and_lora_on_the_same_projections(llm, made):
    check(llm, made, questions(NAMES), COUNT)


@pytest.mark.parametrize("names", [["blocks", "default"], ["blocks", "default", BASE, "lora in blocks"]])
def test_one_of_them_beside_memories_without(names, llm, made):
    """Its slot is the only one that a projection holds."""
    check(llm, made, questions(names), COUNT)


def test_slots_are_buffers_of_the_model(llm):
    """Or vLLM's sleep loses them."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    names = [name for name, _ in model.named_buffers() if "mlp.down_proj" in name and name.endswith(".A")]
    assert len(names) == 3


@torch.no_grad()
def test_the_blocks_say_something(made):
    """Or the check would hold for the heads alone."""
    ids = torch.tensor([prompt(27, seed=1, invoked=9)])
    for name in BLOCKS:
        model = PeftModel.from_pretrained(base(made), str(made / name)).eval()
        before = model(ids).logits[:, -1]
        for layer in memory_layers(model):
            if isinstance(layer, InFeedForward):
                layer.set_scale("default", 0.0)
        assert (model(ids).logits[:, -1] - before).abs().max() > 1e-2, name


def test_a_scale_for_each_request_is_that_of_heads_and_blocks(llm, made):
    text = prompt(73, seed=4, invoked=9)
    for name in ("blocks", "blocks, activated"):
        scales = [0.25, None, 0, 2.0]
        extra = [{} if scale is None else {"memory_scale": scale} for scale in scales]
        outputs = ask(llm, made, [(name, text)] * len(scales), COUNT, each=[{"extra_args": more} for more in extra])
        for scale, output in zip(scales, outputs, strict=True):
            assert difference(answer(output), expected(made, name, text, COUNT, scale=scale)) < TOLERANCE, scale


def test_slots_are_taken_in_turn_and_texts_read_in_parts(made, monkeypatch):
    """Without LoRA's own layers around the projections."""
    monkeypatch.setenv(FEED_FORWARD, "1")
    with engine(
        made, max_loras=1, max_cpu_loras=2, lora_target_modules=["attn"], max_num_batched_tokens=16,
        enable_chunked_prefill=True,
    ) as llm:  # fmt: skip
        check(llm, made, questions([BASE, *BLOCKS, "default"]), COUNT)


def test_a_compiled_model(made, monkeypatch):
    monkeypatch.setenv(FEED_FORWARD, "1")
    with engine(made, enforce_eager=False, max_loras=7) as llm:
        check(llm, made, questions(NAMES), COUNT)


def test_the_base_model_is_that_of_an_engine_without_slots_bit_for_bit(made, monkeypatch):
    said: list[list[Answer]] = []
    for value, others in {"0": "default", "1": "blocks"}.items():
        monkeypatch.setenv(FEED_FORWARD, value)
        with engine(made, lora_target_modules=["attn"]) as llm:
            asked = questions([BASE, others])
            outputs = ask(llm, made, asked, COUNT)
            said.append([answer(one) for one, (name, _) in zip(outputs, asked, strict=True) if name == BASE])
    assert said[0] == said[1]


def test_without_slots_they_are_refused_and_the_engine_goes_on(made, monkeypatch):
    monkeypatch.delenv(FEED_FORWARD, raising=False)
    with engine(made) as llm:
        with pytest.raises(ValueError, match=f"Start it with {FEED_FORWARD}=1"):
            ask(llm, made, [("blocks", prompt(20, seed=5))], COUNT)
        check(llm, made, [("default", prompt(20, seed=5)), (BASE, prompt(21, seed=5))], COUNT)


def test_what_does_not_fit_is_refused(made, monkeypatch):
    """Where requests are taken in, as far as that knows the model; else by the worker, with the numbers."""
    monkeypatch.setenv(FEED_FORWARD, "1")
    save_memory(made, "of rank 9", seed=3, feed_forward=9)
    for name, size in {"hidden_size": 96, "intermediate_size": 80}.items():
        other = config()
        setattr(other, name, size)
        save_memory(made, name, seed=3, model=AutoModelForCausalLM.from_config(other), feed_forward=4)
        written = made / name / "adapter_config.json"
        written.write_text(json.dumps(json.loads(written.read_text()) | {"base_model_fingerprint": None}))
    with engine(made) as llm:
        for name, problem in {"of rank 9": "has rank 9.*--max-rank 16", "hidden_size": "have 128 numbers"}.items():
            with pytest.raises(ValueError, match=problem):
                ask(llm, made, [(name, prompt(20, seed=5))], COUNT)
        check(llm, made, [("blocks", prompt(20, seed=5)), (BASE, prompt(21, seed=5))], COUNT)
        with pytest.raises(PrefixMemoryError, match=r"does not fit the served model's (96 and 128|128 and 96)"):
            llm.llm_engine.add_lora(request(made, "intermediate_size"))
        check(llm, made, [("blocks", prompt(20, seed=5)), (BASE, prompt(21, seed=5))], COUNT)


def test_two_tensor_parallel_processes(made):
    """Each has half of what the down projection reads, and half of what gate and up return."""
    several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", FEED_FORWARD: "1"}
    found = in_another_process(made, NAMES, several, tensor_parallel_size=2, max_loras=7)
    for (adapter, text), said in zip(questions(NAMES), found, strict=True):
        assert difference(said, expected(made, adapter, text, COUNT)) < TOLERANCE, adapter


def linear(kind: type, **fields: object) -> object:
    """As far as it says how it is cut."""
    made = kind.__new__(kind)
    made.__dict__.update({"tp_size": 2, **fields})
    return made


def test_modules_are_known_by_how_they_are_cut(monkeypatch):
    monkeypatch.setattr(vllm_blocks, "get_tensor_model_parallel_world_size", lambda: 2)
    known = {
        linear(ColumnParallelLinear, gather_output=False): True,
        linear(ColumnParallelLinear, gather_output=True): False,
        linear(RowParallelLinear, reduce_results=True): True,
        linear(RowParallelLinear, reduce_results=False): False,
        linear(ReplicatedLinear): True,
        linear(ColumnParallelLinear, gather_output=False, tp_size=1): False,  # disable_tp
        linear(ColumnParallelLinear, gather_output=False, tp_size=4): False,  # another group
    }
    for module, answer_ in known.items():
        assert vllm_blocks._is_cut_as_known(module) is answer_, (type(module).__name__, module.__dict__)
    monkeypatch.setattr(vllm_blocks, "get_tensor_model_parallel_world_size", lambda: 1)
    assert vllm_blocks._is_cut_as_known(linear(RowParallelLinear, reduce_results=False, tp_size=1))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_has_its_share_of_each_of_several(rank):
    share = vllm_blocks.MemoryProjection._share
    places = [[0, 1, 4, 5, 6], [2, 3, 7, 8, 9]][rank]
    assert share(SimpleNamespace(rank=rank), [4, 6], 2).tolist() == places
    assert share(SimpleNamespace(rank=rank), [4, 6], 1).tolist() == list(range(10))


def test_two_processes_cut_a_projection_that_is_two_in_one_as_vllm_does(tmp_path):
    """Each has half of the gate and half of what goes up, not one of them."""
    save_base(tmp_path, Phi3Config(**{name: getattr(config(), name) for name in SIZES}))
    save_memory(tmp_path, "fused", seed=1, feed_forward=8)
    assert "gate_up_proj" in str(load_file(tmp_path / "fused" / "adapter_model.safetensors").keys())
    several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", FEED_FORWARD: "1"}
    found = in_another_process(tmp_path, [BASE, "fused"], several, tensor_parallel_size=2)
    for (adapter, text), said in zip(questions([BASE, "fused"]), found, strict=True):
        assert difference(said, expected(tmp_path, adapter, text, COUNT)) < TOLERANCE, adapter
