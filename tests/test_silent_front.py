"""Training reads the text in front of all invocations without gradients, and learns the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

import tiny
from prefixmemory import PrefixMemoryConfig, activation, calibrate
from prefixmemory.rows.collator import collator
from prefixmemory.rows.encoding import Tokens
from prefixmemory.training.job import TrainingJob
from prefixmemory.training.loop import completion_trainer, fit, training_arguments
from prefixmemory.training.methods import attach
from prefixmemory.training.settings import TrainingSettings
from prefixmemory.training.silent_front import SilentFront
from test_activation import INVOKED as INVOCATION
from test_activation import KINDS, invoked, text

FAMILIES = list(tiny.CONFIGS)
INVOKED = [40, 47, 60]  # where each row is invoked
PROMPTS = [place + 5 for place in INVOKED]


def row(number: int) -> Tokens:
    ids = text(INVOKED[number], length=PROMPTS[number] + 4 + number, seed=number)[0].tolist()
    return Tokens(ids[: PROMPTS[number]], ids[PROMPTS[number] :])


ROWS = [row(number) for number in range(3)]


def learning(base: PreTrainedModel | None = None, kind: str = "default", **config: Any) -> PeftModel:
    """A memory in training, behind its first batch."""
    model = tiny.with_memory(base or tiny.build(), **{**INVOCATION, **KINDS[kind], **config}).train()
    calibrate(model, **batch_for(model))
    return model


def batch_for(model: PreTrainedModel) -> dict[str, Any]:
    return collator(model, tiny.tokenizer())([one.feature for one in ROWS])


def gradients(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_one_pass(family, kind):
    model = learning(tiny.build(family), kind)
    batch = batch_for(model)
    rest = SilentFront(model).read(batch)
    assert rest["input_ids"].shape == (3, 11) and rest["past_key_values"].get_seq_length() == 60
    _same(gradients(model, batch), gradients(model, rest))


CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": "what is the weather like there"},
            {"role": "assistant", "content": "sunny and quite warm today"},
            {"role": "user", "content": f"and tomorrow {number}?"},
            {"role": "assistant", "content": "rain"},
        ]
    }
    for number in range(3)
]


@pytest.mark.parametrize("active_from", ["question", "answer"])
def test_earlier_questions_and_answers_are_silent_too(active_from):
    config = PrefixMemoryConfig(task_type="CAUSAL_LM", active_from=active_from)
    job = TrainingJob("base", tiny.tokenizer(), CONVERSATIONS, config)
    model = attach(tiny.build(), job.config)
    tiny.randomize(model, std=1.0)
    model.train()
    batch = collator(model, job.tokenizer)([one.feature for one in job.tokens])
    calibrate(model, **batch)
    rest = SilentFront(model).read(batch)
    columns = rest["past_key_values"].get_seq_length()
    assert columns > 50
    front = {name: batch[name][:, :columns] for name in ("input_ids", "attention_mask", "position_ids")}
    ids, (first, *_) = front["input_ids"][0].tolist(), job.invocation
    assert first in ids  # the invocation of the turn before
    with torch.no_grad(), model.disable_adapter():
        base = model(**front, use_cache=True).past_key_values
    for own, right in zip(rest["past_key_values"].layers, base.layers, strict=True):
        assert torch.equal(own.keys, right.keys) and torch.equal(own.values, right.values)
    _same(gradients(model, batch), gradients(model, rest))


@pytest.mark.parametrize("again", [20, 66], ids=["in the prompt", "in the completion"])
def test_the_last_of_several_invocations_counts(again):
    model, ids = learning(), text(60, length=70)[0].tolist()
    ids[again : again + 3] = INVOCATION["invocation_tokens"]
    batch = collator(model, tiny.tokenizer())([Tokens(ids[:65], ids[65:]).feature])
    rest = SilentFront(model).read(batch)
    assert rest["past_key_values"].get_seq_length() >= 60
    _same(gradients(model, batch), gradients(model, rest))


def _same(whole, parts) -> None:
    assert parts[0] == pytest.approx(whole[0], rel=1e-5) and whole[1].keys() == parts[1].keys()
    for name, gradient in whole[1].items():
        assert gradient.abs().max() > 0
        assert (parts[1][name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_an_answer_that_brings_the_invocation_does_not_move_the_place():
    """As in use, where the memory speaks from the prompt's on."""
    model, ids = learning(), text(60, length=70)[0].tolist()
    ids[66:69] = INVOCATION["invocation_tokens"]
    batch = collator(model, tiny.tokenizer())([Tokens(ids[:65], ids[65:]).feature])
    found = gradients(model, batch)
    _same(gradients(model, {**batch, "active": torch.tensor([60])}), found)
    assert gradients(model, {**batch, "active": torch.tensor([66])})[0] != found[0]
    del batch["active"]
    assert gradients(model, batch)[0] != found[0]  # what is read from the row alone


def test_where_the_caller_says_where_memories_speak_it_is_left_alone():
    model = learning()
    batch = batch_for(model)
    front = SilentFront(model)
    given = {**batch, "active": torch.ones_like(batch["input_ids"], dtype=torch.bool)}
    assert front.read(given) is given
    with activation(given["active"]):
        assert front.read(batch) is batch
    assert front.read(batch) is not batch


def test_it_would_be_seen_if_the_memory_spoke_in_front():
    model = learning()
    batch = batch_for(model)
    rest = SilentFront(model).read(batch)
    with torch.no_grad():
        speaks = model(
            **{name: batch[name][:, :60] for name in ("input_ids", "attention_mask", "position_ids")},
            active=torch.ones(3, 60, dtype=torch.bool),
            use_cache=True,
        )
    wrong = {**rest, "past_key_values": speaks.past_key_values, "active": torch.ones(3, 71, dtype=torch.bool)}
    assert abs(gradients(model, wrong)[0] - gradients(model, batch)[0]) > 1e-3


def test_nothing_in_front_is_kept_for_the_backward_pass():
    model = learning()
    batch = batch_for(model)

    def kept(given: dict[str, Any]) -> int:
        """Numbers that the layers' feed-forward blocks keep."""
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(**given)
        return sum(sizes)

    whole, front = kept(batch), kept({**batch, "use_cache": True})
    rest = SilentFront(model).read(batch)
    assert not any(layer.keys.requires_grad for layer in rest["past_key_values"].layers)
    assert kept(dict(rest)) < 0.6 * min(whole, front)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: learning(active_from="start", invocation_tokens=None), "speaks everywhere"),
        (lambda model: get_peft_model(tiny.build(), LoraConfig(task_type="CAUSAL_LM")), "no memory"),
        (lambda model: learning(modules_to_save=["lm_head"]), "other parts learn"),
        (lambda model: invoked(fill=False), "waits for its first batch"),
        (lambda model: _disabled(model), "is switched off"),
        (lambda model: _sharded(model), "parts are gathered and given back"),
    ],
)
def test_it_is_left_alone(change, why):
    model = change(learning()).train()
    batch = batch_for(model)
    assert SilentFront(model).read(batch) is batch, why


def _disabled(model):
    model.base_model.disable_adapter_layers()
    return model


def _sharded(model):
    model.get_base_model().model.layers[0].reshard = lambda: None
    return model


def test_a_short_front_is_not_worth_a_pass():
    model = learning()
    ids = text(3, length=14)
    batch = collator(model, tiny.tokenizer())([Tokens(ids[0, :10].tolist(), ids[0, 10:].tolist()).feature])
    assert SilentFront(model).read(batch) is batch


def test_an_invocation_behind_the_prompt_leaves_all_labels_their_logits():
    model = learning()
    ids = text(60, length=70)[0].tolist()
    batch = collator(model, tiny.tokenizer())([Tokens(ids[:50], ids[50:]).feature])
    rest = SilentFront(model).read(batch)
    assert rest["past_key_values"].get_seq_length() == 49  # the last of the prompt predicts the first answer
    assert gradients(model, rest)[0] == pytest.approx(gradients(model, batch)[0], rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_learns_the_same(tmp_path, monkeypatch, checkpointing):
    found, read = [], []
    for columns in (32, 10_000):
        monkeypatch.setattr("prefixmemory.training.silent_front.COLUMNS", columns)
        model = invoked(fill=False)
        model.get_base_model().model.layers[0].mlp.register_forward_hook(
            lambda module, args, output: read.append((torch.is_grad_enabled(), output.shape[1]))
        )
        settings = TrainingSettings(epochs=4, batch_size=3, warmup=0.0, gradient_checkpointing=checkpointing)
        arguments = training_arguments(settings, tmp_path, evaluates=False) | {"save_strategy": "no"}
        fit(completion_trainer(model, tiny.tokenizer(), lambda epoch: ROWS, [], arguments), settings)
        found.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, one in found[0].items():
        assert one.abs().max() > 0 and (one - found[1][name]).abs().max() <= 1e-4 * one.abs().max(), name
    assert ((False, 60) in read and (True, 11) in read) is not checkpointing
