"""A memory speaks from its invocation on: the base model's bits before it, the oracle's figures after it.

The oracle of ``test_fidelity.py`` is told by a mask of its own, made in plain Python, where the memory speaks.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import tiny
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, activation
from prefixmemory.tuner.activation import unfinished_text
from prefixmemory.tuner.active_tokens import ActiveTokens, speaking
from test_fidelity import TOLERANCE, difference, family_model, padded_batch, run_adapter, run_oracle
from tiny import CONFIGS, DEFAULT, memory_parameters

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

FAMILIES = list(CONFIGS)
WORD = [5, 7, 5]  # overlaps itself
INVOKED = {"active_from": "invocation", "invocation_tokens": WORD}
KINDS = {
    "default": DEFAULT,
    "full, rotary": {"query": "rotary"},
    "inside": {"placement": "inside", "prefix_length": 3},
}


def naive(ids: Tensor, word: list[int] = WORD) -> Tensor:
    """From the beginning of the last occurrence on, row by row."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        begins = [i for i in range(len(tokens)) if tokens[i : i + len(word)] == word]
        if begins:
            mask[row, begins[-1] :] = True
    return mask


def text(*places: int, length: int = 14, seed: int = 1) -> Tensor:
    """One row of tokens, ``[1, length]``, in which the word begins at ``places`` and nowhere else."""
    ids = tiny.tokens(1, length, seed)
    ids[ids == WORD[0]] = 9
    for place in places:
        ids[0, place : place + len(WORD)] = torch.tensor(WORD)
    assert [i for i in range(length) if ids[0, i : i + 3].tolist() == WORD] == list(places)
    return ids


def invoked(model: PreTrainedModel | None = None, **config: object) -> PeftModel:
    return tiny.with_memory(tiny.build() if model is None else model, **{**DEFAULT, **INVOKED, **config})


def strong(model: PeftModel) -> PeftModel:
    """A memory that changes what a random model writes."""
    tiny.randomize(model, std=2.0)
    return model


@torch.no_grad()
def logits(model, ids: Tensor, **given: object) -> Tensor:
    return model(input_ids=ids, **{"use_cache": False, **given}).logits


# --- which tokens -----------------------------------------------------------------------------------------------


def test_the_tokens_from_the_last_occurrence_on():
    ids = torch.cat([text(1, 6), text(11), text(), text(3, 5) * 0 + 5, text(0)])
    mask, first = speaking(ids, tuple(WORD))
    assert torch.equal(mask, naive(ids))
    assert first[[0, 1, 4]].tolist() == [6, 11, 0] and (first[[2, 3]] > 10**9).all()


def test_an_occurrence_does_not_reach_over_the_end_into_the_beginning():
    ids = text()
    ids[0, -1], ids[0, :2] = WORD[0], torch.tensor(WORD[1:])
    assert not speaking(ids, tuple(WORD))[0].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_before_it_the_bits_are_the_base_models(family, kind):
    """Row by row, mixed places; behind it every token is another than the base model's."""
    base, ids = tiny.build(family), torch.cat([text(2, 5), text(9)])
    before, mask = logits(base, ids), naive(ids)
    fields = {**({} if kind == "inside" else DEFAULT), **KINDS[kind], **INVOKED}
    after = logits(tiny.with_memory(base, **fields), ids)
    assert torch.equal(after[~mask], before[~mask])
    assert (after - before)[mask].abs().amax(dim=-1).min() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_behind_it_logits_and_gradients_are_the_oracles(family):
    """With padding in front of the second row; a mask that is one token off is another model."""
    model = invoked(family_model(family, "eager"))
    ids, padding = padded_batch()
    ids[0, 2:5] = ids[0, 6:9] = ids[1, 5:8] = torch.tensor(WORD)
    ours = run_adapter(model, ids, padding)
    config, parameters, means = model.peft_config["default"], memory_parameters(model), tiny.means(model)
    mask = naive(ids)
    assert mask.sum() not in (0, mask.numel())
    theirs = run_oracle(family, config, parameters, ids, padding, means=means, active=mask)
    assert difference(ours, theirs) < TOLERANCE
    shifted = run_oracle(family, config, parameters, ids, padding, means=means, active=mask.roll(1, dims=1))
    assert difference(ours, shifted) > 100 * TOLERANCE


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prefix_inside_the_softmax_is_not_seen_before_it(attention):
    """Attention weights too: none on the prefix before, some after."""
    base, ids = tiny.build(attention=attention), text(6)
    with torch.no_grad():
        before = base(input_ids=ids, use_cache=False, output_attentions=attention == "eager")
        model = tiny.with_memory(base, placement="inside", prefix_length=3, **INVOKED)
        after = model(input_ids=ids, use_cache=False, output_attentions=attention == "eager")
        everywhere = logits(model, ids, active=torch.ones_like(ids, dtype=torch.bool))
    assert torch.equal(after.logits[:, :6], before.logits[:, :6])
    assert not torch.allclose(everywhere[:, :6], before.logits[:, :6])
    if attention == "eager":
        on_prefix = after.attentions[0][..., :3]
        assert not on_prefix[:, :, :6].any() and (on_prefix[:, :, 6:] > 0).all()


# --- how a sequence is read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama_gqa", "gemma3", "gpt2"])
def test_a_cache_of_the_base_model_goes_on_as_one_pass(family, kind):
    base, ids = tiny.build(family), torch.cat([text(9), text(10, seed=4)])
    with torch.no_grad():
        cache = base(input_ids=ids[:, :8], use_cache=True).past_key_values
    fields = {**({} if kind == "inside" else DEFAULT), **KINDS[kind], **INVOKED}
    model = tiny.with_memory(base, **fields)
    whole = logits(model, ids)
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False)
    found = model.generate(input_ids=ids, past_key_values=copy.deepcopy(cache), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)
    rest = logits(model, ids[:, 8:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(rest, whole[:, 8:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("sizes", [[7, 7], [8, 1, 5], [9, 1, 1, 3], [1] * 14])
def test_a_sequence_read_in_parts_is_read_as_one(sizes):
    """The second part may begin within the invocation, which is found all the same; only its beginning was read
    without the memory."""
    model, ids = invoked(), text(8)
    cache, parts, read = None, [], 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The invocation tokens", UserWarning)
        for size in sizes:
            with torch.no_grad():
                out = model(input_ids=ids[:, read : read + size], past_key_values=cache, use_cache=True)
            cache, read = out.past_key_values, read + size
            parts.append(out.logits)
    # an invocation is known when it is complete: what of it lies in an earlier part was read without the memory
    known = next(end for end in torch.tensor(sizes).cumsum(0).tolist() if end >= 8 + len(WORD))
    begins = max(
        8, known - next(s for s, e in zip(sizes, torch.tensor(sizes).cumsum(0).tolist(), strict=True) if e == known)
    )
    expected = logits(model, ids, active=[begins])
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(expected, logits(model, ids, active=[begins + 1]), atol=100 * TOLERANCE)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=str,
)
def test_generate_reads_on_from_the_prompts_invocation(how):
    """As it does without a cache, where every step reads the whole sequence."""
    model = strong(invoked(output_limit=4.0))
    ids = torch.cat([text(2, 6), text(9, seed=4)])[: 1 if "prompt_lookup_num_tokens" in how else 2]
    search = {name: value for name, value in how.items() if name.startswith("num_")}
    expected = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, use_cache=False, **search)
    found = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, **how)
    assert torch.equal(found, expected)
    everywhere = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, active=[0], **how)
    assert not torch.equal(found, everywhere), "the place changes nothing: the test could not fail"


def test_a_prompt_may_be_given_without_what_its_cache_holds():
    model, ids = strong(invoked(output_limit=4.0)), text(9)
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ids[:, :6], use_cache=True).past_key_values
    made = [
        model.generate(
            input_ids=given, attention_mask=torch.ones_like(ids), past_key_values=copy.deepcopy(cache),
            max_new_tokens=6, do_sample=False,
        )[0, -6:]
        for given in (ids, ids[:, 6:])
    ]  # fmt: skip
    assert torch.equal(*made)
    with model.disable_adapter():
        base = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, -6:]
    assert not torch.equal(made[0], base)


@pytest.mark.parametrize("use_cache", [True, False])
def test_what_else_the_model_reads_while_it_generates_has_places_of_its_own(use_cache):
    """The negative prompt of classifier-free guidance is shorter than the prompt, and has no invocation."""
    model, ids, other = strong(invoked()), text(6), torch.tensor([[20, 21, 22]])
    with pytest.warns(UserWarning, match="missing in row 0"):
        made = model.generate(
            input_ids=ids, negative_prompt_ids=other, guidance_scale=3.0, max_new_tokens=8, do_sample=False,
            eos_token_id=None, use_cache=use_cache, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    effect = 0.0
    with model.disable_adapter():
        base = [logits(model, torch.cat([other, made.sequences[:, 14 : 14 + n]], dim=1)) for n in range(8)]
    for n, (scores, silent) in enumerate(zip(made.scores, base, strict=True)):
        asked, negative = logits(model, made.sequences[:, : 14 + n]), silent[:, -1].log_softmax(-1)
        expected = negative + 3 * (asked[:, -1].log_softmax(-1) - negative)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
        spoken = logits(model, torch.cat([other, made.sequences[:, 14 : 14 + n]], dim=1), active=[2])[:, -1]
        effect = max(effect, float((spoken.log_softmax(-1) - negative).abs().max()))
    assert effect > 0.1  # what it would be if it spoke there, too


@pytest.mark.parametrize("given", [True, False])
def test_a_cache_keeps_the_places_without_a_dict_around_the_output(given):
    model, ids = invoked(), text(5)
    cache = DynamicCache(config=model.get_base_model().config) if given else None
    with torch.no_grad():
        first = model(input_ids=ids[:, :10], past_key_values=cache, use_cache=True, return_dict=False)
        cache = cache if given else first[1]
        second = model(input_ids=ids[:, 10:], past_key_values=cache, use_cache=True, return_dict=False)
    torch.testing.assert_close(second[0], logits(model, ids)[:, 10:], atol=TOLERANCE, rtol=0)
    with model.disable_adapter():
        assert (logits(model, ids)[:, 10:] - second[0]).abs().max() > 100 * TOLERANCE


def test_the_mask_lies_where_a_layer_does():
    mask = ActiveTokens.of(naive(text(5)))
    assert mask is not None and mask.on(torch.device("cpu")) is mask.mask
    assert mask.on(torch.device("meta")).device.type == "meta" and mask.mask.device.type == "cpu"


def test_sequences_that_several_are_made_of_keep_their_place():
    """Rows of the cache are repeated, as sampling several answers to one prompt does."""
    model, ids = invoked(), torch.cat([text(9), text(3, seed=4)])
    with torch.no_grad():
        cache = model(input_ids=ids[:, :13], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        found = logits(model, ids[:, 13:].repeat_interleave(2, dim=0), past_key_values=cache, use_cache=True)
    expected = logits(model, ids)[:, 13:].repeat_interleave(2, dim=0)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_a_cache_that_was_emptied_begins_anew():
    model, cache = invoked(), StaticCache(config=tiny.CONFIGS["llama_gqa"], max_cache_len=32)
    for ids in (text(0), text(9, seed=4)):
        found = logits(model, ids, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(found, logits(model, ids), atol=TOLERANCE, rtol=0)
        cache.reset()


def test_padding_on_either_side_changes_nothing():
    model, ids = invoked(), text(6)
    expected = logits(model, ids)
    pad = torch.zeros(1, 3, dtype=torch.long)
    real, none = torch.ones_like(ids), torch.zeros_like(pad)
    left = logits(
        model, torch.cat([pad, ids], 1), attention_mask=torch.cat([none, real], 1),
        position_ids=torch.cat([none, torch.arange(14)[None]], 1),
    )  # fmt: skip
    right = logits(model, torch.cat([ids, pad], 1), attention_mask=torch.cat([real, none], 1))
    torch.testing.assert_close(left[:, 3:], expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(right[:, :14], expected, atol=TOLERANCE, rtol=0)


def test_texts_packed_into_a_row_have_a_place_each():
    model = invoked()
    first, second, third = text(2, 6), text(9, length=12, seed=4), text(1, length=8, seed=5)
    packed = torch.cat([first, second, third], dim=1)
    positions = torch.cat([torch.arange(n) for n in (14, 12, 8)])[None]
    found = logits(model, packed, position_ids=positions)
    expected = torch.cat([logits(model, ids) for ids in (first, second, third)], dim=1)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    lengths = torch.tensor([0, 14, 26, 34], dtype=torch.int32)
    mask, _ = speaking(packed, tuple(WORD), torch.bucketize(torch.arange(34), lengths[1:], right=True)[None])
    assert torch.equal(mask, torch.cat([naive(ids) for ids in (first, second, third)], dim=1))


def test_the_rows_of_a_cache_are_moved_with_the_places_where_they_begin():
    """One row speaks, the other does not; they change places, one of them stands for both, and each is repeated."""
    model = strong(invoked())
    both = torch.cat([text(3), text(seed=4)])
    more = tiny.tokens(1, 2, seed=8)

    def going_on(cache: DynamicCache, rows: int) -> Tensor:
        return logits(model, more.expand(rows, -1), past_key_values=cache, use_cache=True)

    def read() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        with unfinished_text():
            logits(model, both, past_key_values=cache, use_cache=True)
        return cache

    with unfinished_text():
        speaks, silent = (logits(model, torch.cat([row[None], more], 1))[:, -2:] for row in both)
    assert (speaks - silent).abs().max() > 0.05
    for name, by, expected in (
        ("reorder_cache", torch.tensor([1, 0]), [silent, speaks]),
        ("reorder_cache", torch.tensor([1, 1]), [silent, silent]),
        ("batch_select_indices", torch.tensor([1]), [silent]),
        ("batch_repeat_interleave", 2, [speaks, speaks, silent, silent]),
    ):
        cache = read()
        getattr(cache, name)(by)
        with unfinished_text():
            found = going_on(cache, len(expected))
        torch.testing.assert_close(found, torch.cat(expected), atol=TOLERANCE, rtol=0)
    with unfinished_text():
        copied = going_on(copy.deepcopy(read()), 2)
    torch.testing.assert_close(copied, torch.cat([speaks, silent]), atol=TOLERANCE, rtol=0)


PADDED = {
    "as generate counts": lambda mask: (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
    "as TRL counts": lambda mask: mask.cumsum(1) - mask,
    "clamped": lambda mask: (mask.cumsum(1) - 1).clamp(min=0),
}


@pytest.mark.parametrize("count", PADDED.values(), ids=list(PADDED))
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("trains", [False, True])
def test_padding_that_has_positions_is_no_text_of_its_own(count, side, trains):
    model, ids = invoked(), text(6)
    pad, none = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    row, mask = (
        torch.cat([a, b][:: 1 if side == "left" else -1], 1) for a, b in ((pad, ids), (none, torch.ones_like(ids)))
    )
    model.train(trains)  # an invocation that were not found would be an error there, a warning here
    cache = DynamicCache(config=model.config)
    found = model(
        input_ids=row, attention_mask=mask, position_ids=count(mask), past_key_values=cache, use_cache=True
    ).logits
    real = slice(3, None) if side == "left" else slice(14)
    torch.testing.assert_close(found[:, real], logits(model.eval(), ids), atol=TOLERANCE, rtol=0)
    if side == "right":  # it goes on speaking
        more = tiny.tokens(1, 2, seed=8)
        whole = torch.cat([mask, torch.ones_like(more)], 1)
        here = {"attention_mask": whole, "position_ids": torch.tensor([[14, 15]])}
        going_on = logits(model, more, past_key_values=cache, use_cache=True, **here)
        expected = logits(model, torch.cat([ids, more], 1))[:, -2:]
        torch.testing.assert_close(going_on, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("silent", [0, 1])
def test_every_text_of_a_packed_row_needs_the_invocation(silent):
    texts = [text(), text(3, seed=4)] if silent == 0 else [text(3, seed=4), text()]
    packed, positions = torch.cat(texts, 1), torch.arange(14).repeat(2)[None]
    with pytest.raises(PrefixMemoryError, match="missing in row 0"):
        invoked().train()(input_ids=packed, position_ids=positions)
    with pytest.raises(PrefixMemoryError, match="strict_invocation"):
        logits(invoked(strict_invocation=True), packed, position_ids=positions)
    both = torch.cat([text(3, seed=4), text(2)], 1)  # the control
    invoked().train()(input_ids=both, position_ids=positions)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_are_computed_again_in_their_own_pass(use_reentrant):
    """Two passes stand before the backward pass, as a preference loss makes them."""
    model = invoked().train()
    batches = text(3), text(9, seed=4)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        sum(model(input_ids=ids, labels=ids).loss for ids in batches).backward()
        return {name: p.grad.clone() for name, p in memory_parameters(model).items()}

    plain = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    handle = model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    again = gradients()
    handle.remove()
    assert len(calls) == 4, "nothing was computed again"
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


def test_each_row_has_its_adapters_invocation():
    model = invoked()
    model.add_adapter(
        "other", PrefixMemoryConfig(task_type="CAUSAL_LM", active_from="invocation", invocation_tokens=[9])
    )
    model.add_adapter("always", PrefixMemoryConfig(task_type="CAUSAL_LM"))
    for seed, name in enumerate(("other", "always")):
        tiny.randomize(model, name, seed=seed + 5)
    ids = torch.cat([text(9), text(4, seed=4), text(6, seed=5), text(8, seed=6)])
    ids[ids == 9] = 10
    ids[:, 2] = 9
    names = ["default", "other", "__base__", "always"]
    found = logits(model, ids, adapter_names=names)
    with model.disable_adapter():
        base = logits(model, ids)
    for row, name in enumerate(names[:2]):
        model.set_adapter(name)
        torch.testing.assert_close(found[row], logits(model, ids)[row], atol=TOLERANCE, rtol=0)
    assert torch.equal(found[0, :9], base[0, :9]) and torch.equal(found[1, :2], base[1, :2])
    assert torch.equal(found[2], base[2]) and not torch.allclose(found[3, 0], base[3, 0])


def test_two_adapters_active_together_each_speak_from_their_own_place():
    model = invoked()
    model.add_adapter(
        "other", PrefixMemoryConfig(task_type="CAUSAL_LM", active_from="invocation", invocation_tokens=[9])
    )
    tiny.randomize(model, "other", seed=5)
    ids = text(9)
    ids[ids == 9] = 10
    ids[:, 2] = 9
    model.set_adapter("other")
    alone = logits(model, ids)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, ids)
    torch.testing.assert_close(both[:, :9], alone[:, :9], atol=TOLERANCE, rtol=0)
    assert not torch.allclose(both[:, 9:], alone[:, 9:], atol=100 * TOLERANCE)


def test_in_an_encoder_decoder_the_decoders_tokens_count():
    from transformers import T5Config

    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    base = AutoModelForSeq2SeqLM.from_config(config).eval()
    source, ids = text(3), text(6, seed=4)
    with torch.no_grad():
        before = base(input_ids=source, decoder_input_ids=ids).logits
        fields = {**DEFAULT, **INVOKED}
        model = get_peft_model(base, PrefixMemoryConfig(task_type="SEQ_2_SEQ_LM", **fields))
        tiny.randomize(model)
        after = model.eval()(input_ids=source, decoder_input_ids=ids).logits
    assert not any("encoder.block" in name and "decoder" not in name for name in memory_parameters(model))
    assert torch.equal(after[:, :6], before[:, :6])
    assert (after - before)[:, 6:].abs().amax(dim=-1).min() > 1e-4
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), 9)], dim=1)  # shifted, they begin with the start token
    assert model(input_ids=source, labels=labels).loss.isfinite()
    with pytest.raises(PrefixMemoryError, match="belongs to the encoder"):
        get_peft_model(AutoModelForSeq2SeqLM.from_config(config), PrefixMemoryConfig(
            target_modules=r"encoder.*SelfAttention", **fields))  # fmt: skip


# --- by the caller's word ---------------------------------------------------------------------------------------


def test_embeddings_want_a_mask_and_take_one():
    model, ids = invoked(), text(6)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(PrefixMemoryError, match=r"cannot be looked for in embeddings.*active="):
        model(inputs_embeds=embeddings)
    with torch.no_grad():
        found = model(inputs_embeds=embeddings, active=naive(ids), use_cache=False).logits
    assert torch.equal(found, logits(model, ids))


def test_active_is_a_mask_or_the_first_token_and_overrides_every_adapter():
    always, ids = tiny.with_memory(tiny.build(), **DEFAULT), torch.cat([text(6), text(6, seed=4)])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 4:], mask[1, 9:] = True, True
    by_mask = logits(always, ids, active=mask)
    assert torch.equal(by_mask, logits(always, ids, active=[4, 9]))
    with activation(mask):
        assert torch.equal(logits(always, ids), by_mask)
    with always.disable_adapter():
        base = logits(always, ids)
    assert torch.equal(by_mask[~mask], base[~mask]) and not torch.allclose(by_mask[mask], base[mask])
    assert torch.equal(logits(invoked(), ids, active=[4, 9]), logits(invoked(), ids, active=mask))


def test_a_mask_holds_for_a_prompt_and_all_that_is_generated():
    fields = {**DEFAULT, "output_limit": 4.0}
    model, ids = strong(tiny.with_memory(tiny.build(), **fields)), text(6)
    mask = naive(ids)
    found = model.generate(input_ids=ids, active=mask, max_new_tokens=8, do_sample=False)
    expected = strong(invoked(output_limit=4.0)).generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(input_ids=ids, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize(
    "active", [torch.ones(2, 3), torch.ones(3, dtype=torch.bool), torch.ones(3, 14, dtype=torch.bool)]
)
def test_a_mask_of_another_kind_or_size_is_refused(active):
    with pytest.raises(PrefixMemoryError, match="active has shape"):
        logits(invoked(), torch.cat([text(3), text(4)]), active=active)


# --- where it is missing ----------------------------------------------------------------------------------------


def test_without_the_invocation_the_base_model_answers_with_one_warning():
    base, ids = tiny.build(), text()
    before = logits(base, ids)
    model = invoked(base)
    with pytest.warns(UserWarning, match=r"\[5, 7, 5\] of adapter default are missing in row 0 of the batch"):
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), before)  # said once: warnings are errors here


def test_strict_makes_it_an_error():
    model = invoked(strict_invocation=True)
    with pytest.raises(PrefixMemoryError, match="missing in row 1 of the batch, and strict_invocation is set"):
        logits(model, torch.cat([text(3), text()]))
    logits(model, text(3))


def test_training_rows_without_it_are_an_error_that_names_them():
    model = invoked().train()
    with pytest.raises(PrefixMemoryError, match=r"missing in row 0, 2 of the batch.*Every training row needs them"):
        model(input_ids=torch.cat([text(), text(3), text(seed=4)]))


def test_rows_of_other_adapters_do_not_need_it():
    model = invoked()
    model.add_adapter("always", PrefixMemoryConfig(task_type="CAUSAL_LM"))
    logits(model, torch.cat([text(3), text()]), adapter_names=["default", "always"])


def test_a_layer_called_past_its_model_is_refused():
    model = invoked()
    layer = model.get_base_model().model.layers[0].self_attn
    with pytest.raises(PrefixMemoryError, match="outside of a forward pass"):
        layer(hidden_states=torch.zeros(1, 3, 32), position_embeddings=(torch.ones(1, 3, 8), torch.ones(1, 3, 8)))


# --- learning, saving, configs ----------------------------------------------------------------------------------


def test_the_mean_is_that_of_the_tokens_on_which_it_speaks():
    model = get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM", **INVOKED)).train()
    ids, seen = torch.cat([text(6), text(10, seed=4)]), []
    attention = model.get_base_model().model.layers[0].self_attn
    handle = attention.q_proj.register_forward_hook(lambda m, args, output: seen.append(output.detach()))
    model(input_ids=ids, labels=ids).loss.backward()
    handle.remove()
    features = torch.nn.functional.elu(seen[0].unflatten(-1, (4, 8)))
    expected = features[naive(ids)].mean(dim=0)
    mean = attention.prefix_memory.memory("default").mean
    torch.testing.assert_close(mean.detach(), expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(mean, features.flatten(0, 1).mean(dim=0), atol=1e-3)


def test_a_saved_adapter_knows(tmp_path):
    model, ids = invoked(strict_invocation=True), text(6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    config = loaded.peft_config["default"]
    assert (config.active_from, config.invocation_tokens, config.strict_invocation) == ("invocation", WORD, True)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), atol=TOLERANCE, rtol=0)
    other = invoked(invocation_tokens=[9])
    with pytest.raises(PrefixMemoryError, match="invocation_tokens is"):
        other.load_adapter(tmp_path, "default")


def test_a_plain_transformers_model_keeps_its_place_too():
    """No PEFT model stands around it: the hooks are the model's own."""
    from peft import inject_adapter_in_model

    expected, ids = invoked(), text(6)
    plain = inject_adapter_in_model(expected.peft_config["default"], tiny.build())
    plain.load_state_dict({name.removeprefix("base_model.model."): t for name, t in expected.state_dict().items()})
    assert torch.equal(logits(plain.eval(), ids), logits(expected, ids))
    made = [m.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for m in (plain, expected)]
    assert torch.equal(*made)


def test_a_model_without_memories_is_left_as_it_was():
    base = tiny.build()
    before = len(base._forward_pre_hooks), len(base._forward_hooks)
    model = invoked(base)
    assert len(base._forward_hooks) > before[1]
    model.unload()
    assert (len(base._forward_pre_hooks), len(base._forward_hooks)) == before


def test_a_name_without_its_tokens_is_refused_when_the_memory_is_made():
    with pytest.raises(PrefixMemoryError, match=r"invocation_tokens\('answer', tokenizer\) finds them"):
        get_peft_model(tiny.build(), PrefixMemoryConfig(task_type="CAUSAL_LM", active_from="answer"))
