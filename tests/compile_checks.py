"""torch.compile and the memory: a plain script, run by ``test_compile.py`` in a process without shape checks.

Run by hand: ``PREFIXMEMORY_SHAPES=0 python tests/compile_checks.py content inductor``. Exits non-zero at the first
claim that fails.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch._dynamo
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, activation, calibrate
from tiny import DEFAULT, build, memory_parameters, randomize, tokens, with_memory

TOLERANCE = 1e-4
SWAPS = 20


def run(model: Callable[..., object], parameters: dict[str, Tensor], ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of a loss of every logit for each memory tensor."""
    logits = model(input_ids=ids, use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad((weights * logits).sum(), list(parameters.values()))
    return logits.detach(), dict(zip(parameters, gradients, strict=True))


def check(model: PeftModel, backend: str, label: str) -> None:
    """Forward and backward equal eager; then new contents by copy are followed, and nothing is compiled again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    parameters, ids = memory_parameters(model), tokens(2, 11)
    generator = torch.Generator().manual_seed(7)
    before = None
    for swap in range(1 + SWAPS):
        if swap > 0:
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        logits, gradients = run(model, parameters, ids)
        with torch._dynamo.config.patch(error_on_recompile=swap > 0):
            compiled_logits, compiled_gradients = run(compiled, parameters, ids)
        torch.testing.assert_close(compiled_logits, logits, atol=TOLERANCE, rtol=0)
        for name, gradient in gradients.items():
            size = gradient.abs().max()
            assert size > 0, f"{label}: {name} has no gradient to compare"
            torch.testing.assert_close(compiled_gradients[name] / size, gradient / size, atol=TOLERANCE, rtol=0)
        assert before is None or (logits - before).abs().max() > 100 * TOLERANCE, f"{label}: the swap changed nothing"
        before = logits
        if swap == 0:
            print(f"ok: {label}: compiled forward and backward equal eager")
    assert counter.frame_count == 1, f"{label}: {counter.frame_count} graphs after {SWAPS} swaps"
    print(f"ok: {label}: {SWAPS} swaps by copy, no recompilation")


def check_counter(model: PeftModel) -> None:
    """A control on the count: what is known to need another graph is seen to make one."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")  # the graphs are counted whatever is made of them
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        compiled(input_ids=tokens(2, 11), use_cache=False)
        model.base_model.set_scale(0.5)
        compiled(input_ids=tokens(2, 11), use_cache=False)
    assert counter.frame_count == 2, "the counter does not count"
    print("ok: another scale is another graph, and is counted")


def check_training(second: bool) -> None:
    """After ``calibrate`` a training step of the default memory is one graph, also beside an adapter never trained."""
    torch._dynamo.reset()
    model = get_peft_model(build("llama_gqa"), PrefixMemoryConfig(task_type="CAUSAL_LM")).train()
    if second:
        model.add_adapter("second", PrefixMemoryConfig(task_type="CAUSAL_LM"))
    calibrate(model, input_ids=tokens(2, 11))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = [m(input_ids=tokens(2, 11), use_cache=False).logits for m in (compiled, model)]
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)
    print(f"ok: a training step after calibrate is one graph, {second=}")


def check_activation() -> None:
    """A memory that speaks from its invocation on is one graph for all lengths and places."""
    torch._dynamo.reset()
    word = [5, 7]
    config = {"rank": 8, "normalize": "feature_mean", "output_limit": 0.5}
    model = with_memory(build("llama_gqa"), active_from="invocation", invocation_tokens=word, **config)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for number, (place, length) in enumerate([(3, 14), (9, 14), (2, 20), (7, 31), (1, 9)]):
            ids = tokens(2, length)
            ids[:, place : place + 2] = torch.tensor(word)
            if number == 2:
                graphs = counter.frame_count  # the second call may find out what differs
            found, expected = (m(input_ids=ids, use_cache=False).logits for m in (compiled, model))
            torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
            with model.disable_adapter():
                base = model(input_ids=ids, use_cache=False).logits
            assert torch.equal(expected[:, :place], base[:, :place]) and not torch.equal(expected, base)
    assert counter.frame_count == graphs, f"{counter.frame_count - graphs} graphs more for other lengths"
    print("ok: activation is no graph more for other lengths and places")


def check_first_calls() -> None:
    """Nothing has run in this thread: the graph of its first call serves the second."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(with_memory(build("llama_gqa")), backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            compiled(input_ids=tokens(2, 11), use_cache=False)
    assert counter.frame_count == 1, f"{counter.frame_count} graphs after two calls alike"
    print("ok: the first calls of a thread")


def check_whole(**config: object) -> None:
    """One graph holds a padded batch of the memory alone, and one of its base, it and another like it by rows."""
    model = with_memory(build("llama_gqa"), **config)
    model.add_adapter("other", PrefixMemoryConfig(task_type="CAUSAL_LM", **config))
    randomize(model, "other", seed=7)
    batch = {"input_ids": tokens(3, 11), "attention_mask": torch.ones(3, 11, dtype=torch.long), "use_cache": False}
    batch["attention_mask"][0, :4] = 0
    for more in ({}, {"adapter_names": ["other", "__base__", "default"]}):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            found, expected = (m(**batch, **more).logits for m in (compiled, model))
            torch.testing.assert_close(found[1:], expected[1:], atol=TOLERANCE, rtol=0)  # the first is padded
            torch.testing.assert_close(found[0, 4:], expected[0, 4:], atol=TOLERANCE, rtol=0)
            with model.disable_adapter():
                assert (model(**batch).logits - expected)[2].abs().max() > 100 * TOLERANCE
    print(f"ok: one graph, {config}")


def check_hotswap() -> None:
    """``hotswap_adapter`` on a compiled model: the new adapter answers, from the graph that is there."""
    torch._dynamo.reset()
    other, model = (with_memory(build("llama_gqa"), **DEFAULT) for _ in range(2))
    randomize(other, seed=7)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        other.save_pretrained(folder)
        before = compiled(input_ids=tokens(2, 11), use_cache=False).logits
        hotswap_adapter(compiled, folder, adapter_name="default")
        after = compiled(input_ids=tokens(2, 11), use_cache=False).logits
        torch.testing.assert_close(after, other(input_ids=tokens(2, 11), use_cache=False).logits)
    assert (after - before).abs().max() > 100 * TOLERANCE
    assert counter.frame_count == 1, f"{counter.frame_count} graphs after a hotswap"
    print("ok: hotswap_adapter, no recompilation")


def check_switch(**fields: int) -> None:
    """Adapters alike share a graph of the model below PEFT's, whose forward names the adapter; all scales but 1 one."""
    torch._dynamo.reset()
    config = {**DEFAULT, **fields}
    model, ids = with_memory(build("llama_gqa"), **config), tokens(2, 11)
    names = ["default", *(f"other{n}" for n in range(10))]  # more than dynamo's limit of graphs
    for seed, name in enumerate(names[1:], start=3):
        model.add_adapter(name, PrefixMemoryConfig(task_type="CAUSAL_LM", **config))
        randomize(model, name, seed)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model.get_base_model(), backend=counter, fullgraph=True)
    seen: list[Tensor] = []

    def answers(name: str, scale: float) -> None:
        model.set_adapter(name)
        model.set_scale(scale)
        found, expected = (m(input_ids=ids, use_cache=False).logits for m in (compiled, model))
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        assert all((found - other).abs().max() > 10 * TOLERANCE for other in seen), (name, scale)
        seen.append(found)

    with torch.no_grad():
        for name in names:
            answers(name, 1.0)
        assert counter.frame_count == 1, f"{counter.frame_count} graphs after switching"
        for scale in (0.5, 0.3, 0.2):
            answers("default", scale)
        assert counter.frame_count == 2, f"{counter.frame_count} graphs after three scales"
    print("ok: switching is no graph more, a scale that is no longer 1 is one, whichever it is")


def check_said(checkpointing: bool) -> None:
    """A compiled base model hears where its memory speaks, or says that it does not: what a compiled frame is told is
    gone when it ends."""
    torch._dynamo.reset()
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[:, 4:] = True
    model, batch = with_memory(build()), {"input_ids": tokens(2, 9), "use_cache": False}
    everywhere, right = model(**batch).logits, model(**batch, active=mask).logits
    if checkpointing:
        model.train().get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.base_model.model = torch.compile(model.get_base_model(), backend="eager")
    if checkpointing:
        try:
            model(**batch, active=mask)
        except PrefixMemoryError as error:
            assert "leave out one of them" in str(error), error
        else:
            raise AssertionError("layers that know of no pass were not refused")
    else:
        torch.testing.assert_close(model(**batch, active=mask).logits, right, atol=TOLERANCE, rtol=0)
        assert (right - everywhere).abs().max() > 1e-3
        with activation(mask):
            found = model.base_model.model(**batch).logits
        torch.testing.assert_close(found, right, atol=TOLERANCE, rtol=0)
    print(f"ok: active= is heard by a compiled base model, or refused with checkpointing={checkpointing}")


def main(query: str, backend: str) -> None:
    torch.set_num_threads(1)
    check_first_calls()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(check_first_calls).result()
    check(with_memory(build("llama_gqa"), query=query), backend, f"llama_gqa, {query}")
    check_counter(with_memory(build("llama_gqa"), query=query))
    if query == "content":
        for second in (False, True):
            check_training(second)
        check_activation()
        check_said(checkpointing=False)
        check_said(checkpointing=True)
        check_hotswap()
        check_switch()
        check_switch(feed_forward=4)
        for fields in ({}, {"scale": 0.5}):
            check_whole(placement="inside", prefix_length=3, **fields)
        check_whole(prefix_length=3, similarity="softmax", mixing="head")
        check_whole(prefix_length=3)
        config = dict(feature_map="mlp", rank=3, share_heads=True, normalize="query_rms", output_limit=0.3)
        # Without code generation, for speed: what could break graphs or recompile shows all the same.
        check(with_memory(build("qwen3"), query=query, **config), "aot_eager", f"qwen3, {query}, {config}")
    print("all ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
