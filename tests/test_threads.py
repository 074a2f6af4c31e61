"""Nothing of a call stays on a layer: threads, nested calls, checkpointing, calls that break off, copies."""

from __future__ import annotations

import copy
import gc
import random
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tiny
from prefixmemory import PrefixMemoryConfig
from prefixmemory.tuner import calls
from prefixmemory.tuner.layers import memory_layers

THREADS, FORWARDS = 8, 200


def two_adapters(**fields: object) -> PeftModel:
    model = tiny.with_memory(tiny.build(), **{**tiny.DEFAULT, **fields})
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM", query="rotary"))
    tiny.randomize(model, "other", seed=5)
    return model.eval()


def run(model: PeftModel, names: list[str], ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, adapter_names=names, use_cache=False).logits


def test_threads_on_one_model_answer_as_one_thread_does():
    """Base and two adapters, mixed lengths, all bit for bit."""
    model = two_adapters()
    cases = [
        ([name] * rows, tiny.tokens(rows, length, seed=length))
        for name in ("__base__", "default", "other")
        for rows, length in ((1, 3), (2, 9), (1, 17))
    ]
    cases.append((["default", "__base__", "other"], tiny.tokens(3, 7)))
    expected = [run(model, *case) for case in cases]
    assert not any(torch.equal(a, b) for a, b in zip(expected[:3], expected[3:6], strict=True))  # adapters differ

    def work(seed: int) -> list[int]:
        wrong, draw = [], random.Random(seed)
        for _ in range(FORWARDS):
            number = draw.randrange(len(cases))
            if not torch.equal(run(model, *cases[number]), expected[number]):
                wrong.append(number)
        return wrong

    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(work, range(THREADS))) == [[]] * THREADS


def test_threads_generate_with_different_adapters():
    model, ids = two_adapters(), tiny.tokens(1, 6)
    names = ["__base__", "default", "other"] * 3

    def generate(name: str) -> Tensor:
        return model.generate(input_ids=ids, adapter_names=[name], max_new_tokens=12, do_sample=False)

    expected = {name: generate(name) for name in set(names)}
    assert len({tuple(tokens[0].tolist()) for tokens in expected.values()}) == 3
    with ThreadPoolExecutor(THREADS) as pool:
        for name, found in zip(names, pool.map(generate, names), strict=True):
            assert torch.equal(found, expected[name])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_pass_inside_a_checkpoint_gives_the_same_gradients(use_reentrant):
    model = tiny.with_memory(tiny.build(), **tiny.DEFAULT).train()
    embeddings = model.get_input_embeddings()(tiny.tokens()).detach().requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).logits.pow(2).mean()

    def gradients(value: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        value.backward()
        return {name: p.grad.clone() for name, p in tiny.memory_parameters(model).items()}

    plain = gradients(loss(embeddings))
    within = gradients(checkpoint(loss, embeddings, use_reentrant=use_reentrant))
    for name, gradient in plain.items():
        torch.testing.assert_close(within[name], gradient, atol=1e-7, rtol=1e-5)
    assert calls.thread.call is None


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("where", ["q_proj", "o_proj"])
def test_a_call_that_breaks_off_leaves_nothing_behind(where):
    model = two_adapters()
    expected = run(model, ["default"], tiny.tokens(1, 5))

    def fail(*_: object) -> None:
        raise Broken

    attention = model.get_base_model().model.layers[1].self_attn
    handle = getattr(attention, where).register_forward_hook(fail)
    with pytest.raises(Broken):
        run(model, ["other"], tiny.tokens(1, 9))
    handle.remove()
    assert calls.thread.call is None
    assert torch.equal(run(model, ["default"], tiny.tokens(1, 5)), expected)


def test_ctrl_c_in_a_call_does_not_reach_the_next_one():
    """Past all hooks: PyTorch calls none for an exception that is no ``Exception``."""
    model = two_adapters()
    expected = run(model, ["default"], tiny.tokens(1, 5))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[1].self_attn.o_proj.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, ["other"], tiny.tokens(1, 9))
    handle.remove()
    assert torch.equal(run(model, ["default"], tiny.tokens(1, 5)), expected)


def waiting() -> tuple[nn.Module, list[Tensor]]:
    """A model without PeftModel whose memory waits for 7, 8, and two texts in which that stands in other places."""
    config = PrefixMemoryConfig(rank=None, normalize="none", output_limit=None, active_from="invocation",
                                invocation_tokens=[7, 8])  # fmt: skip
    model = inject_adapter_in_model(config, tiny.build()).eval()
    tiny.randomize(model)
    texts = [tiny.tokens(1, 12, seed) for seed in (1, 5)]
    texts[0][0, 4:6] = texts[1][0, 9:11] = torch.tensor([7, 8])
    return model, texts


def test_ctrl_c_without_a_peft_model_does_not_reach_the_next_call():
    """Only the next pass can end what was broken off: a part of the model, called alone, would count as part of it."""
    model, (first, other) = waiting()
    expected = model.model(input_ids=other).last_hidden_state
    held = []

    def interrupt(module: object, args: tuple[torch.Tensor, ...]) -> None:
        held.append(weakref.ref(args[0]))
        raise KeyboardInterrupt

    handle = model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=first)
    handle.remove()
    assert calls.thread.model_pass is not None  # it was left open
    assert torch.equal(model.model(input_ids=other).last_hidden_state, expected)
    assert calls.thread.model_pass is None and calls.thread.call is None
    gc.collect()
    assert all(tensor() is None for tensor in held)


def test_a_model_called_within_itself_goes_on_behind_it():
    """What is still running was not broken off."""
    model, (ids, other) = waiting()
    expected, alone, inner = model(input_ids=ids).logits, model(input_ids=other).logits, []

    def ask(*_: object) -> None:
        if not inner:
            inner.append(alone)
            inner[0] = model(input_ids=other).logits

    model.model.layers[0].self_attn.o_proj.register_forward_hook(ask)
    assert torch.equal(model(input_ids=ids).logits, expected) and torch.equal(inner[0], alone)
    assert inner[0] is not alone and calls.thread.model_pass is None


def test_a_call_within_a_call_of_the_same_layer_is_one_of_its_own():
    model, ids, inner = two_adapters(), tiny.tokens(1, 7), tiny.tokens(1, 4)
    expected, expected_inner = run(model, ["default"], ids), run(model, ["other"], inner)
    seen: list[Tensor] = []

    def nested(*_: object) -> None:
        handle.remove()
        seen.append(run(model, ["other"], inner))

    handle = model.get_base_model().model.layers[0].self_attn.v_proj.register_forward_hook(nested)
    assert torch.equal(run(model, ["default"], ids), expected)
    assert torch.equal(seen[0], expected_inner)


def test_a_nested_call_without_adapter_leaves_the_outer_ones_query_alone():
    model, ids = tiny.with_memory(tiny.build()), tiny.tokens(1, 7)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits

        def nested(*_: object) -> None:
            handle.remove()
            with model.disable_adapter():
                model(input_ids=tiny.tokens(1, 4), use_cache=False)

        handle = model.get_base_model().model.layers[0].self_attn.v_proj.register_forward_hook(nested)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def test_a_copy_made_during_a_call_answers_alike_and_stands_alone():
    model, ids = two_adapters(), tiny.tokens(1, 7)
    expected = run(model, ["default"], ids)
    twins: list[PeftModel] = []

    def copy_it(*_: object) -> None:
        handle.remove()
        twins.append(copy.deepcopy(model))

    handle = model.get_base_model().model.layers[1].self_attn.k_proj.register_forward_hook(copy_it)
    assert torch.equal(run(model, ["default"], ids), expected)
    twin = twins[0]
    for module in twin.modules():  # the copy has copied the hook that made it
        for key in [k for k, hook in module._forward_hooks.items() if getattr(hook, "__name__", "") == "copy_it"]:
            del module._forward_hooks[key]
    torch.testing.assert_close(run(twin, ["default"], ids), expected, atol=1e-6, rtol=1e-5)
    tiny.randomize(twin, "default", seed=11)
    assert torch.equal(run(model, ["default"], ids), expected)


def test_a_layer_holds_no_tensor_beside_its_parameters_after_a_call():
    model = two_adapters()
    run(model, ["default", "other"], tiny.tokens())

    def tensors(value: object) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, dict | list | tuple) and not isinstance(value, nn.Module):
            return [t for item in (value.values() if isinstance(value, dict) else value) for t in tensors(item)]
        return []

    for layer in memory_layers(model):
        state = {k: v for k, v in vars(layer).items() if k not in ("_parameters", "_buffers", "_modules")}
        assert not tensors(state)
