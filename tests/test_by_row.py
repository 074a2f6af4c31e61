"""Each row of a batch its own adapter: memories that differ in numbers alone are read together."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor
from transformers import GenerationConfig

from close import close_logits
from prefixmemory import PrefixMemoryConfig, set_impl, set_scale
from prefixmemory.tuner import by_row
from prefixmemory.tuner.by_row import SHARED, Stack
from prefixmemory.tuner.layers import memory_layers
from tiny import DEFAULT, build, memory_parameters, randomize, tokens, with_memory

ROWS = ["b", "default", "b", "c", "__base__"]


def three(first: dict | None = None, **config):
    """A model with three memories; ``first``: what its first adapter has otherwise."""
    model = with_memory(build(), **config | (first or {}))
    for name in ("b", "c"):
        model.add_adapter(
            name, PrefixMemoryConfig(**{"rank": None, "normalize": "none", "output_limit": None} | config)
        )
        randomize(model, name, seed=ord(name))
    return model.eval()


def logits(model, rows: list[str], ids: Tensor | None = None) -> Tensor:
    return model(input_ids=tokens(len(rows)) if ids is None else ids, adapter_names=rows, use_cache=False).logits


@pytest.fixture
def stacks(monkeypatch) -> list[int]:
    """How many adapters were read together, one number a layer and call."""
    counts: list[int] = []
    read = Stack.add_to

    def counted(self, *args):
        new = read(self, *args)
        if new is not None:
            counts.append(len(self.names))
        return new

    monkeypatch.setattr(Stack, "add_to", counted)
    return counts


ALIKE = [
    {},
    DEFAULT,
    {"rank": 3, "share_heads": True, "normalize": "feature_l2"},
    {"rank": None, "normalize": "feature_mean", "query": "rotary", "scale": 0.5},
    {"feature_map": "softmax", "output_limit": 0.1, "layers_to_transform": [1]},
    {"prefix_length": 3},
    {**DEFAULT, "feed_forward": 4},
]


@pytest.mark.parametrize("config", ALIKE)
@pytest.mark.parametrize("length", [1, 9])
def test_memories_that_are_alike_are_read_together_and_each_row_gets_its_own(config, length, stacks):
    model, ids = three(**config), tokens(len(ROWS), length)
    found = logits(model, ROWS, ids)
    layers = 1 if "layers_to_transform" in config else 2
    assert stacks == [3] * (layers * (4 if "feed_forward" in config else 1))
    for row, name in enumerate(ROWS):
        alone = logits(model, [name], ids[[row]])
        close_logits(found[[row]], alone)
        others = [logits(model, [other], ids[[row]]) for other in {*ROWS} - {name}]
        assert all((other - alone).abs().max() > 1e-3 for other in others)  # or the check above says nothing
    with model.disable_adapter():
        close_logits(found[[-1]], model(input_ids=ids[[-1]], use_cache=False).logits)


@pytest.mark.parametrize("config", ALIKE)
def test_gradients_are_those_of_reading_one_by_one(config, monkeypatch):
    model = three(**config)
    parameters = [memory_parameters(model, name) for name in ("default", "b", "c")]
    leaves = [p.requires_grad_() for each in parameters for name, p in each.items() if not name.endswith("mean")]
    found = []
    for together in (True, False):
        if not together:
            monkeypatch.setattr(Stack, "of", lambda steps: None)
        values = logits(model, ROWS)
        weights = torch.linspace(-1, 1, values.numel()).view_as(values)
        found.append(torch.autograd.grad((values * weights).sum(), leaves))
    for ours, theirs in zip(*found, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "first",
    [
        {"rank": 5},
        {"rank": None},
        {"output_limit": 0.3},
        {"scale": 0.5},
        {"feature_map": "gelu"},
        {"query": "rotary"},
        {"share_heads": True},
        {"normalize": "none"},
        {"mixing": "head", "output_limit": None},
        {"active_from": "invocation", "invocation_tokens": [7]},
    ],
)
@pytest.mark.filterwarnings("ignore:The invocation tokens")
def test_memories_that_differ_otherwise_are_read_one_by_one(first, stacks):
    model = three(first, rank=3, normalize="feature_mean", output_limit=0.5)
    ids = tokens(len(ROWS))
    found = logits(model, ROWS)
    assert not stacks
    for row, name in enumerate(ROWS):
        close_logits(found[[row]], logits(model, [name], ids[[row]]))


@pytest.mark.parametrize("config", [{"feature_map": "mlp"}, {"prefix_length": 2, "normalizer": True}])
def test_memories_whose_features_have_numbers_are_read_one_by_one(config, stacks):
    logits(three(**config), ROWS)
    assert not stacks


def test_many_rows_of_few_adapters_are_read_adapter_by_adapter(stacks):
    model = three()
    logits(model, ["default", "b"] * SHARED)
    assert stacks == [2, 2]
    logits(model, ["default", "b"] * SHARED + ["b"])
    assert stacks == [2, 2]


def test_a_memory_that_speaks_from_an_invocation_on_is_read_together_once_it_speaks(stacks):
    model = three(rank=3, active_from="invocation", invocation_tokens=[7])
    ids, rows = tokens(3), ["default", "b", "c"]
    ids[:, 4] = 7
    cache = model(input_ids=ids[:, :6], adapter_names=rows).past_key_values
    assert not stacks
    found = model(input_ids=ids[:, 6:], adapter_names=rows, past_key_values=cache).logits
    assert stacks == [3, 3]
    close_logits(found, logits(model, rows, ids)[:, 6:])


def test_a_memory_that_hooks_have_come_to_wait_for_is_read_by_itself():
    """Between two tokens of one generation, say."""
    model, rows = three(), ["default", "b", "c"]
    seen, expected = [], logits(model, rows)

    def ids_and_hook(module, args):
        if not seen:
            memory_layers(model)[1].memory("b").register_forward_hook(lambda *given: seen.append(given[0]))

    model.get_base_model().model.layers[1].register_forward_pre_hook(ids_and_hook)
    close_logits(logits(model, rows), expected)
    assert seen == [memory_layers(model)[1].memory("b")]


def test_a_scale_that_changes_counts_from_the_next_call_on(stacks):
    model, rows = three(DEFAULT | {"rank": 3}, **DEFAULT | {"rank": 3}), ["default", "b", "c"]
    before = logits(model, rows)
    for name in rows:
        set_scale(model, 0.2, name)
    after = logits(model, rows)
    assert stacks == [3, 3, 3, 3] and (before - after).abs().max() > 1e-3
    for row, name in enumerate(rows):
        close_logits(after[[row]], logits(model, [name], tokens(3)[[row]]))


def test_beams_of_each_row_have_its_adapter(stacks):
    model, rows = three(rank=3), ["c", "default", "b"]
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(input_ids=tokens(3), adapter_names=rows, **options)
    assert set(stacks) == {3}
    for row, name in enumerate(rows):
        model.set_adapter(name)
        assert torch.equal(found[[row]], model.generate(input_ids=tokens(3)[[row]], **options))


def test_beams_are_counted_wherever_the_generation_config_stands():
    model, rows = three(rank=3), ["c", "b"]
    config = GenerationConfig(num_beams=3, max_new_tokens=3, do_sample=False, pad_token_id=0)
    found = model.generate(tokens(2), config, adapter_names=rows)
    assert torch.equal(found, model.generate(tokens(2), generation_config=config, adapter_names=rows))


def test_another_model_that_runs_meanwhile_has_adapters_of_its_own():
    """As a judge in a stopping criterion does, or an assistant; its adapter may have the name of one here."""
    config = PrefixMemoryConfig(rank=None, normalize="none", output_limit=None)
    judge = inject_adapter_in_model(config, build()).eval()
    randomize(judge)
    ids, model, seen = tokens(2), three(rank=3), []
    own, base = judge(input_ids=ids).logits, build()(input_ids=ids).logits
    model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: seen.append(judge(input_ids=ids).logits))
    alone = logits(three(rank=3), ["default", "__base__"], ids)
    assert torch.equal(logits(model, ["default", "__base__"], ids), alone)
    logits(model, ["b", "c"], ids)  # names that it does not know
    assert len(seen) == 2 and all(torch.equal(found, own) for found in seen)
    assert not torch.equal(own, base)


def test_a_model_that_lost_its_first_layer_still_has_its_rows():
    waits = {"active_from": "invocation", "invocation_tokens": [9, 10], "rank": 3}
    model, ids = three({"invocation_tokens": [7, 8]}, **waits), tokens(2)
    ids[0, 2:4], ids[1, 4:6] = torch.tensor([7, 8]), torch.tensor([9, 10])
    inner = model.get_base_model().model
    inner.layers = inner.layers[1:]
    for layer in inner.layers:
        layer.self_attn.layer_idx -= 1
    found = logits(model, ["default", "b"], ids)
    close_logits(found[[0]], logits(model, ["default"], ids[[0]]))
    close_logits(found[[1]], logits(model, ["b"], ids[[1]]))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("config", [DEFAULT, {"rank": None, "share_heads": True}, {"prefix_length": 3}])
def test_triton_reads_them_in_one_launch(config, monkeypatch):
    from prefixmemory.kernels import impl, triton_read

    if not impl.INTERPRETED and not torch.cuda.is_available():
        pytest.skip("there is neither a card nor Triton's interpreter")
    model = three(**config)
    ids = tokens(len(ROWS), 3)
    if not impl.INTERPRETED:
        model, ids = model.cuda(), ids.cuda()
    expected, launches = logits(model, ROWS, ids), []
    launch = triton_read.read_bank
    monkeypatch.setattr(triton_read, "read_bank", lambda *args: launches.append(1) or launch(*args))
    set_impl("triton")
    try:
        close_logits(logits(model, ROWS, ids), expected)
    finally:
        set_impl("auto")
    assert len(launches) == 2


def test_the_batch_may_have_one_row_an_adapter_and_still_be_wrong_if_rows_are_mixed_up(monkeypatch):
    """The control: a stack that hands its memories to other rows is noticed."""
    model, rows = three(), ["default", "b", "c"]
    expected = logits(model, rows)
    stacked = by_row._stacked
    monkeypatch.setattr(by_row, "_stacked", lambda products: stacked([*products[1:], products[0]]))
    with pytest.raises(AssertionError):
        close_logits(logits(model, rows), expected)
