"""Trainers that let the model write: they sample from the memory, and with vLLM they refuse to go on without it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import ContinuousBatchingConfig, GenerationConfig

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from tiny_trainers import load, lower_case, make_trainer

pytest.importorskip("trl")
vllm_generation = importlib.import_module("trl.generation.vllm_generation")

# TRL 1.16 switches gradient checkpointing on and off under the names that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning")

REFUSAL = r"cannot be merged.*vLLM.*set use_vllm=False"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny(tmp_path_factory.mktemp("base") / "model")


# Sampling through transformers


def test_grpo_learns_what_is_rewarded(base, tmp_path):
    model = load(base)
    model.lm_head.weight.data.mul_(30)  # so that what the memory adds can make the model sure of its next token
    # no limit: what a random model says by itself is nothing to hold on to
    unlimited = PrefixMemoryConfig(task_type="CAUSAL_LM", output_limit=None)
    trainer = make_trainer("grpo", base, tmp_path, model=model, max_steps=30, learning_rate=0.1,
                           peft_config=unlimited, per_device_train_batch_size=16, num_generations=8)  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 30
    assert sum(rewards[:3]) / 3 < 0.35 and sum(rewards[-3:]) / 3 > 0.7  # a quarter of the characters is lower case
    trained = tiny.memory_parameters(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        if not name.endswith(".mean"):  # taken from the first batch
            assert torch.equal(parameter, before[name]) != (name in trained), name

    prompt = trainer.processing_class("line 7 is dead", return_tensors="pt")
    with trainer.model.disable_adapter():
        base_text = trainer.processing_class.decode(trainer.model.generate(**prompt, max_new_tokens=8)[0, -8:])
    text = trainer.processing_class.decode(trainer.model.eval().generate(**prompt, max_new_tokens=8)[0, -8:])
    assert lower_case([text])[0] > lower_case([base_text])[0]


@pytest.mark.parametrize("query", ["content", "rotary"])
def test_continuous_batching_samples_from_the_memory(query):
    """``use_transformers_continuous_batching`` packs prompts of different lengths into one row."""
    model = tiny.with_memory(tiny.build(), query=query)
    tiny.randomize(model, std=3.0)
    prompts = [tiny.tokens(1, length, seed=length)[0].tolist() for length in (5, 9)]
    greedy = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=127, pad_token_id=0)

    def one_by_one() -> list[list[int]]:
        return [model.generate(input_ids=torch.tensor([p]), generation_config=greedy)[0, len(p) :].tolist()
                for p in prompts]  # fmt: skip

    with torch.no_grad():
        expected = one_by_one()
        with model.disable_adapter():
            plain = one_by_one()
        found = model.generate_batch(
            prompts, generation_config=greedy, progress_bar=False,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32),
        )  # fmt: skip
    assert [output.generated_tokens for output in found.values()] == expected
    assert all(a != b for a, b in zip(expected, plain, strict=True))


# Sampling through vLLM. A stand-in for vLLM lets TRL's own code run up to the sync of weights; LoRA, which can be
# merged, shows that the stand-in is good enough for that.


class FakeEngine:
    """vLLM in the trainer's process: keeps what it was given, and writes the same tokens for every prompt."""

    def __init__(self, **arguments: Any) -> None:
        self.weights: list[str] = []
        self.sampled = 0
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        executor = SimpleNamespace(driver_worker=worker)
        self.llm_engine = SimpleNamespace(model_executor=executor, model_config=SimpleNamespace(max_model_len=512))
        FakeEngine.last = self

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.weights += [name for name, _ in weights]

    def generate(self, prompts: list[Any], sampling_params: Any, **kwargs: Any) -> list[Any]:
        self.sampled += 1
        tokens = [40, 41, 2]
        logprobs = [{t: SimpleNamespace(rank=1, logprob=-1.0)} for t in tokens]
        outputs = [SimpleNamespace(token_ids=tokens, logprobs=logprobs)] * sampling_params.n
        ids = [tiny.tokenizer()(p)["input_ids"] if isinstance(p, str) else p for p in prompts]
        return [SimpleNamespace(prompt_token_ids=prompt, outputs=outputs) for prompt in ids]

    def reset_prefix_cache(self) -> None: ...


class FakeServer(FakeEngine):
    """vLLM behind HTTP, as TRL's client shows it."""

    def init_communicator(self, device: Any) -> None: ...

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: list[Any], named_params: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.load_weights(list(named_params))

    def generate(self, prompts: list[Any], sampling_params: Any = None, n: int = 1, **kwargs: Any) -> Any:
        super().generate(prompts, SimpleNamespace(n=n))
        rows = len(prompts) * n
        return {
            "prompt_ids": prompts,
            "completion_ids": [[40, 41, 2]] * rows,
            "logprobs": [[[-1.0]] * 3] * rows,
            "logprob_token_ids": [[[40], [41], [2]]] * rows,
        }


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (
        "generation.vllm_generation",
        "trainer.distillation_trainer",
        "experimental.online_dpo.online_dpo_trainer",
    ):
        module = importlib.import_module(f"trl.{name}")
        monkeypatch.setattr(module, "is_vllm_available", lambda *versions: True)
        monkeypatch.setattr(module, "LLM", FakeEngine, raising=False)
        monkeypatch.setattr(module, "VLLMClient", FakeServer, raising=False)
        monkeypatch.setattr(module, "SamplingParams", lambda **sampling: SimpleNamespace(**sampling), raising=False)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them for the engine
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    if torch.distributed.is_initialized():  # accelerate believed those variables
        torch.distributed.destroy_process_group()


def lora() -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])


def memory() -> PrefixMemoryConfig:
    return PrefixMemoryConfig(task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in ("grpo", "rloo", "distillation") for mode in ("colocate", "server")]
    + [("online_dpo", "colocate")],  # with a server it asks for a GPU; the sync is the same
)
def test_vllm_is_refused_before_it_samples(fake_vllm, base, tmp_path, kind, mode):
    def trainer(config: Any, folder: str) -> Any:
        return make_trainer(kind, base, tmp_path / folder, peft_config=config, use_vllm=True, vllm_mode=mode,
                            max_steps=1)  # fmt: skip

    trainer(lora(), "lora").train()
    engine = FakeEngine.last
    assert engine.sampled >= 1 and "model.layers.0.self_attn.q_proj.weight" in engine.weights

    refused = trainer(memory(), "memory")
    assert FakeEngine.last is not engine
    with pytest.raises(PrefixMemoryError, match=REFUSAL):
        refused.train()
    assert FakeEngine.last.sampled == 0 and not FakeEngine.last.weights


@pytest.mark.parametrize("setting", ["one process or ZeRO-3", "FSDP", "FSDP2"])
def test_every_way_to_hand_over_weights_is_refused(monkeypatch, setting):
    """TRL reads the weights in one of three ways; the stand-in yields them instead of gathering shards."""

    class Distribution:
        is_fsdp = setting.startswith("FSDP")
        fsdp_version = {"FSDP": 1, "FSDP2": 2}.get(setting)

        def gather_params(self, parameters: list[torch.Tensor]) -> Any:
            return nullcontext()

    def names(config: Any) -> list[str]:
        generation = object.__new__(vllm_generation.VLLMGeneration)  # its constructor starts vLLM
        generation.model = get_peft_model(tiny.build(), config)
        generation._dist = Distribution()
        generation.accelerator = SimpleNamespace(device="cpu")
        return [name for name, _ in generation._iter_named_params()]

    monkeypatch.setattr(torch.nn.Parameter, "full_tensor", lambda self: self, raising=False)
    monkeypatch.setattr(torch.Tensor, "full_tensor", lambda self: self, raising=False)
    if setting != "FSDP":  # FSDP 1 yields only what it wrapped, here nothing
        assert "model.layers.0.self_attn.q_proj.weight" in names(lora())
    with pytest.raises(PrefixMemoryError, match=REFUSAL):
        names(memory())


def test_async_grpo_is_refused(caplog):
    """With ``--enable-lora`` TRL would hand the adapter itself to vLLM; for other adapters it merges, and fails."""
    module = importlib.import_module("trl.experimental.async_grpo.async_grpo_trainer")
    model = get_peft_model(tiny.build(), memory())
    server = {"lora_config": {"max_lora_rank": 8, "max_loras": 8}, "parallel_config": {"data_parallel_size": 1}}
    with caplog.at_level(logging.WARNING), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "logger", logging.getLogger("prefixmemory.test"))  # accelerate's wants a live state
        assert not module.select_adapter_sync(server, model, SimpleNamespace(max_staleness=1))
    assert "PrefixMemoryConfig" in caplog.text
    sent: list[Any] = []
    transfer = SimpleNamespace(pause=lambda: None, send_weights=lambda weights: sent.extend(weights))
    accelerator = SimpleNamespace(unwrap_model=lambda m: m, is_main_process=True, wait_for_everyone=lambda: None)
    trainer = SimpleNamespace(model=model, accelerator=accelerator, weight_transfer=transfer)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PrefixMemoryError, match=REFUSAL):
        patch.setattr(module, "logger", logging.getLogger("prefixmemory.test"))
        module.AsyncGRPOTrainer._sync_weight_merged(trainer, 0.0)
    assert not sent


def test_a_memory_that_trl_does_not_see_is_not_left_out():
    """Injected without a PeftModel, a memory is handed over under its own names, which vLLM's models do not have."""
    model = inject_adapter_in_model(PrefixMemoryConfig(), tiny.build())
    assert not isinstance(model, PeftModel)
    generation = object.__new__(vllm_generation.VLLMGeneration)
    generation.model = model
    generation._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda parameters: nullcontext())
    names = [name for name, _ in generation._iter_named_params()]
    assert [n for n in names if "memory" in n] == [n for n, _ in model.named_parameters() if "memory" in n] != []


def test_refusing_leaves_the_memory_as_it_was(base):
    model = tiny.with_memory(load(base))
    ids = tiny.tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with pytest.raises(PrefixMemoryError, match=REFUSAL):
            model.merge_adapter()
        assert torch.equal(model(input_ids=ids).logits, expected)
