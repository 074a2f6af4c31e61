"""The mean is a parameter that does not learn, taken in a pass of its own before the first step."""

from __future__ import annotations

import copy
import json
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

import test_vision_language as vision_language
import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, calibrate
from prefixmemory.tuner.layers import memory_layers
from processes import start


def fresh(**fields: object) -> PeftModel:
    return tiny.with_memory(tiny.build(), fill=False, **{**tiny.DEFAULT, **fields}).train()


def step(model: torch.nn.Module, ids: Tensor, **kwargs: object) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=ids, labels=ids, **kwargs).loss.backward()
    optimizer.step()


def expected(model: PeftModel, ids: Tensor) -> list[Tensor]:
    """The mean of ELU(q) per head, of the base model's queries before rotation."""
    queries: list[Tensor] = []
    layers = model.get_base_model().model.layers
    handles = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, output: queries.append(output)) for layer in layers
    ]
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [F.elu(query.unflatten(-1, (4, 8))).mean(dim=(0, 1)) for query in queries]


def test_parameters_alone_are_the_adapter(tmp_path: Path):
    """What trackers, averages of weights and sharded savers keep."""
    model = fresh()
    step(model, tiny.tokens())
    model.save_pretrained(tmp_path, state_dict=dict(model.named_parameters()))
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert tiny.means(loaded) and all(mean.any() for mean in tiny.means(loaded).values())
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_an_adapter_without_its_means_is_refused(tmp_path: Path):
    model = fresh()
    step(model, tiny.tokens())
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(PrefixMemoryError, match=r"prefix_memory_bank\.mean is not among the tensors that are to be"):
        model.save_pretrained(tmp_path, state_dict=trained)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if not name.endswith(".mean")}, file)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"weights_sha256": None}))
    with pytest.raises(PrefixMemoryError, match=r"lacks 2 of its 6 memory tensors, .*prefix_memory_bank\.mean"):
        PeftModel.from_pretrained(tiny.build(), tmp_path)


@pytest.mark.parametrize("change", ["set_adapter", "enable", "requires_grad", "another"])
def test_nothing_lets_the_mean_learn(change):
    model = fresh()
    if change == "set_adapter":
        model.set_adapter("default")
    elif change == "enable":
        with model.disable_adapter():
            pass
    elif change == "requires_grad":
        model.set_requires_grad("default")
    else:
        model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM"))
        model.set_adapter("other")
        assert not any(mean.requires_grad for mean in tiny.means(model, "other").values())
        model.set_adapter("default")
    assert not any(mean.requires_grad for mean in tiny.means(model).values())
    assert all(p.requires_grad for p in tiny.memory_parameters(model).values())


def test_it_is_taken_once_in_evaluation_mode_and_draws_no_random_number():
    model, ids = fresh(), tiny.tokens(3, 11)
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    wanted = expected(model, ids)
    calibrate(model, input_ids=ids)
    for mean, right in zip(tiny.means(model).values(), wanted, strict=True):
        torch.testing.assert_close(mean.detach(), right, atol=1e-6, rtol=1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    before = {name: mean.clone() for name, mean in tiny.means(model).items()}
    calibrate(model, input_ids=tiny.tokens(3, 11, seed=8))
    step(model, tiny.tokens(2, 7, seed=9))
    assert all(torch.equal(mean, before[name]) for name, mean in tiny.means(model).items())


def test_the_first_step_takes_what_calibrating_takes():
    called, stepped, ids = fresh(), fresh(), tiny.tokens(2, 9)
    calibrate(called, input_ids=ids)
    step(stepped, ids)
    for one, other in zip(tiny.means(called).values(), tiny.means(stepped).values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        assert one.any()


def test_a_cache_that_the_caller_gives_is_filled_once():
    model, cache = fresh(), DynamicCache()
    step(model, tiny.tokens(1, 5), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 5 and all(mean.any() for mean in tiny.means(model).values())


def test_without_a_peft_model_too():
    model = inject_adapter_in_model(PrefixMemoryConfig(), tiny.build().requires_grad_(False)).train()
    ids = tiny.tokens()
    step(model, ids)
    assert all(layer.memory("default").mean.any() for layer in memory_layers(model))


def test_where_a_trainer_calls_the_part_that_holds_the_layers_alone():
    model, ids = fresh(), tiny.tokens()
    wanted = expected(model, ids)
    model.get_base_model().model(input_ids=ids).last_hidden_state.sum().backward()
    for mean, right in zip(tiny.means(model).values(), wanted, strict=True):
        torch.testing.assert_close(mean.detach(), right, atol=1e-6, rtol=1e-5)


def test_encoder_and_decoder_have_theirs():
    config = T5Config(vocab_size=tiny.VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    model = get_peft_model(T5ForConditionalGeneration(config), PrefixMemoryConfig(task_type="SEQ_2_SEQ_LM")).train()
    model(input_ids=tiny.tokens(), labels=tiny.tokens(2, 5)).loss.backward()
    assert all(layer.memory("default").mean.any() for layer in memory_layers(model))


def test_what_no_batch_reaches_costs_one_pass_not_one_a_step():
    """A model that sees, trained on text; the memories of its eyes take their means with the first image."""
    base = vision_language.build()
    model = get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM", target_modules=["self_attn"])).train()
    calls: list[int] = []
    base.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(1))
    text = tiny.tokens(2, 7)
    passes = []
    for _ in range(3):
        calls.clear()
        model(input_ids=text, labels=text).loss.backward()
        passes.append(len(calls))
    assert passes[0] > 1 and passes[1:] == [1, 1]
    assert sorted({bool(mean.any()) for mean in tiny.means(model).values()}) == [False, True]
    batch = vision_language.batch()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(mean.any() for mean in tiny.means(model).values())
    assert all(layer.first_batch is None for layer in memory_layers(model))


def test_every_one_of_several_adapters_takes_its_own_however_the_model_is_called():
    model, ids = fresh(), tiny.tokens(2, 9)
    for name in "bcd":
        model.add_adapter(name, model.peft_config["default"])
    for name in ("default", *"bcd"):
        model.set_adapter(name)
        model.get_base_model().model(ids).last_hidden_state.sum().backward()
        assert all(layer.memory(name).mean.any() for layer in memory_layers(model)), name


def test_a_second_adapter_takes_its_own_when_it_is_trained():
    model = fresh()
    step(model, tiny.tokens(2, 9))
    first = {name: mean.clone() for name, mean in tiny.means(model).items()}
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM"))
    assert not any(mean.any() for mean in tiny.means(model, "other").values())
    model.set_adapter("other")
    step(model, tiny.tokens(2, 9, seed=7))
    assert all(mean.any() for mean in tiny.means(model, "other").values())
    assert all(torch.equal(mean, first[name]) for name, mean in tiny.means(model).items())


def test_a_memory_that_has_learned_without_one_goes_on_without_one():
    model = fresh()
    with torch.no_grad():
        for parameter in tiny.memory_parameters(model).values():
            parameter.normal_()
    step(model, tiny.tokens())
    assert not any(mean.any() for mean in tiny.means(model).values())


def test_a_copy_made_before_the_first_step_takes_its_own():
    model = fresh()
    twin = copy.deepcopy(model)
    step(twin, tiny.tokens())
    assert all(mean.any() for mean in tiny.means(twin).values())
    assert not any(mean.any() for mean in tiny.means(model).values())


def test_an_unloaded_model_has_no_hook_left():
    base = tiny.build()
    hooks = [len(module._forward_pre_hooks) for module in base.modules()]
    fresh_model = get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM"))
    assert [len(m._forward_pre_hooks) for m in base.modules() if "Llama" in type(m).__name__] != hooks
    assert [len(module._forward_pre_hooks) for module in fresh_model.unload().modules()] == hooks


def passes_the_second_layer_by(rank: int, folder: Path) -> None:
    """One of two processes, each with a batch of its own; only the first reaches both layers."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    model = fresh()
    if rank == 1:  # as where experts, or layers that are dropped, are chosen by each process for itself
        model.get_base_model().model.layers[1].forward = lambda hidden, *args, **kwargs: hidden
    model(input_ids=tiny.tokens(seed=1 + rank))
    torch.save({name: mean.detach() for name, mean in tiny.means(model).items()}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_process_that_passes_a_layer_by_hangs_no_other_one(tmp_path: Path):
    processes = [start(passes_the_second_layer_by, rank, tmp_path) for rank in range(2)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (list(torch.load(tmp_path / f"{rank}.pt").values()) for rank in range(2))
    model = fresh()
    both, alone = expected(model, torch.cat([tiny.tokens(seed=1), tiny.tokens(seed=2)])), expected(model, tiny.tokens())
    for found in (first, second):
        torch.testing.assert_close(found[0], both[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1], alone[1], rtol=0, atol=1e-6)
    assert (both[0] - alone[0]).abs().max() > 1e-4


def test_a_model_without_memories_is_refused():
    model = get_peft_model(tiny.build(), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(PrefixMemoryError, match=r"holds no memory\. Make one with get_peft_model first"):
        calibrate(model, input_ids=tiny.tokens())


def test_weight_decay_leaves_the_mean_alone():
    model = fresh()
    calibrate(model, input_ids=tiny.tokens())
    before = {name: mean.clone() for name, mean in tiny.means(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    optimizer.step()
    assert all(torch.equal(mean, before[name]) for name, mean in tiny.means(model).items())
