"""A prefix inside the softmax through PEFT's lifecycle, and every combination of the choices of the family."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, StaticCache

import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.tuner.layers import memory_layers
from test_fidelity import family_model
from tiny import build, memory_parameters, randomize, tokens, with_memory

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import inside_table

pytestmark = [
    # The name that Trainer, TRL and PEFT call; the new one does not exist in every supported transformers.
    pytest.mark.filterwarnings(r"ignore:`gradient_checkpointing(_\w+)?` is deprecated:FutureWarning"),
]
TOLERANCE = 1e-5
PREFIX = 3


def logits(model: Any, ids: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **kwargs).logits


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 100 * TOLERANCE)


def inside(family: str = "llama_gqa", attention: str = "eager", **fields: Any) -> PeftModel:
    return with_memory(
        family_model(family, attention), **{"placement": "inside", "prefix_length": PREFIX, **fields}
    )  # fmt: skip


def add(model: PeftModel, name: str, seed: int, **fields: Any) -> None:
    model.add_adapter(name, PrefixMemoryConfig(task_type="CAUSAL_LM", **fields))
    randomize(model, name, seed=seed)
    model.eval()


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", inside_table.ROWS)
def test_every_row_of_the_table_works_here(row):
    if "4-bit" in row or "int8" in row:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("torchao")
    inside_table.ROWS[row](inside_table.Ours)


def test_the_table_in_the_docs_is_the_record():
    record = json.loads(inside_table.RECORD.read_text())
    assert list(record["rows"]) == list(inside_table.ROWS)
    assert {cells[inside_table.Ours.name] for cells in record["rows"].values()} == {"works"}
    assert inside_table.PAGE.read_text() == inside_table.page(record)


@pytest.mark.parametrize(
    "row",
    [
        "gradient checkpointing, not reentrant: the same gradients",
        "generation with a static cache: tokens of full passes",
        "a different adapter for each row (`adapter_names`), prefixes of different length",
    ],
)
@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own, about what is about to fail
def test_negative_control_rows_of_the_table_can_fail(row):
    """With PEFT's method: if one of them passes after an upgrade, the table is to be made again."""
    if "static cache" in row and transformers.__version__.startswith(("5.16.", "5.19.")):
        pytest.skip("with transformers 5.16 and 5.19 PEFT's prefix tuning works in a static cache")
    assert inside_table.outcome(inside_table.ROWS[row], inside_table.Theirs) != "works"


# --- caches and padding in every family ---------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_pieces_through_a_cache_give_the_logits_of_one_pass(family, attention, cache):
    """Beyond the sliding windows of the tiny models, which are of 6."""
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma 2: it cannot cap the scores")
    model, ids = inside(family, attention), tokens(2, 14)
    expected = logits(model, ids, use_cache=False)
    config = model.config
    past = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config=config, max_cache_len=20)
    pieces = [logits(model, piece, past_key_values=past, use_cache=True) for piece in ids.split([5, 1, 1, 3, 4], dim=1)]
    close(torch.cat(pieces, dim=1), expected, 1e-4)
    keys = past.layers[0].keys
    assert keys.shape[2] <= 20  # the prefix is in no cache
    assert past.get_seq_length(1 if family == "gemma3" else 0) <= 14


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_a_left_padded_row_answers_as_alone(family, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma 2: it cannot cap the scores")
    model = inside(family, attention)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    together = logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    close(together[1, 4:], logits(model, ids[1:, 4:])[0], 1e-4)
    close(together[0], logits(model, ids[:1])[0], 1e-4)


# --- several adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_each_row_has_its_own_adapter_inside_outside_or_none(attention):
    model = inside(attention=attention)
    add(model, "long", 3, placement="inside", prefix_length=7)
    add(model, "doubled", 4, placement="inside", prefix_length=2, scale=2.0)
    add(model, "free", 5)
    add(model, "kernel", 6, prefix_length=4)
    add(model, "mixed", 7, prefix_length=4, similarity="softmax", mixing="head")
    names = ["kernel", "default", "__base__", "long", "mixed", "default", "free", "doubled"]
    ids, mask = tokens(len(names), 9), torch.ones(len(names), 9, dtype=torch.long)
    mask[3, :4] = 0
    together = logits(model, ids, attention_mask=mask, adapter_names=names)
    seen = []
    for n, name in enumerate(names):
        own = dict(attention_mask=mask[n : n + 1])
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model, ids[n : n + 1], **own)
        else:
            model.set_adapter(name)
            alone = logits(model, ids[n : n + 1], **own)
        close(together[n, mask[n].bool()], alone[0, mask[n].bool()])
        seen.append(alone)
    model.set_adapter("default")
    wrong = logits(model, ids, attention_mask=mask)
    assert all(differ(wrong[n, 4:], seen[n][0, 4:]) for n, name in enumerate(names) if name != "default")


def test_each_row_has_its_own_adapter_in_generation():
    model = inside()
    add(model, "long", 3, placement="inside", prefix_length=7)
    add(model, "free", 5)
    ids, names = tokens(4, 9), ["long", "__base__", "default", "free"]

    def generate(ids: Tensor, **kwargs: Any) -> Tensor:
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, min_new_tokens=5, do_sample=False,
            **kwargs,
        )  # fmt: skip

    for beams in (1, 2):
        together = generate(ids, adapter_names=names, num_beams=beams)
        for n, name in enumerate(names):
            alone = generate(ids[n : n + 1], adapter_names=[name], num_beams=beams)
            assert torch.equal(together[n], alone[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_two_prefixes_inside_are_one_of_both(attention):
    model = inside(attention=attention)
    add(model, "second", 3, placement="inside", prefix_length=4)
    one = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    joined = inside(attention=attention, prefix_length=PREFIX + 4)
    with torch.no_grad():
        for ours, parts in zip(memory_layers(joined), memory_layers(model), strict=True):
            memories = [parts.memory(name) for name in ("default", "second")]
            ours.memory("default").keys.copy_(torch.cat([m.keys for m in memories], dim=1))
            ours.memory("default").values.copy_(torch.cat([m.values for m in memories], dim=1))
    close(both, logits(joined))
    assert differ(both, one)


def test_a_prefix_inside_and_a_memory_outside_work_together():
    """In a model of one layer the memory's answer adds to what attention gives with the prefix."""
    model = inside()
    add(model, "free", 3, output_limit=None)  # a limit would go by the outputs, which the prefix changes
    model.base_model.set_adapter(["default", "free"])
    seen: dict[str, Tensor] = {}
    projection = memory_layers(model)[0].site.output_projection
    handle = projection.register_forward_pre_hook(lambda module, args: seen.update(now=args[0].clone()))
    heads = {}
    for names in (["default", "free"], ["default"], ["free"], []):
        if names:
            model.base_model.set_adapter(names)
            logits(model)
        else:
            with model.disable_adapter():
                logits(model)
        heads[" ".join(names)] = seen["now"]
    handle.remove()
    close(heads["default free"] - heads["default"], heads["free"] - heads[""])
    assert differ(heads["default"], heads[""]) and differ(heads["free"], heads[""])


# --- the base model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama_gqa", "gemma3", "gpt2"])
def test_disabled_at_scale_zero_or_unloaded_it_is_the_base_model_bit_for_bit(family, attention):
    base = family_model(family, attention)
    expected = logits(base)
    model = with_memory(base, placement="inside", prefix_length=PREFIX)
    filled = logits(model)
    assert differ(filled, expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    model.set_scale(0.0)
    assert torch.equal(logits(model), expected)
    model.set_scale(1.0)
    assert torch.equal(logits(model), filled)
    assert model.unload() is base
    assert torch.equal(logits(base), expected)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()) == 0


def test_a_negative_scale_inside_the_softmax_is_refused_at_run_time():
    model = inside()
    with pytest.raises(PrefixMemoryError, match=re.escape("scale=-1.0 is out of range: inside the softmax")):
        model.set_scale(-1.0)


def test_a_prefix_has_no_sum():
    model = inside()
    add(model, "free", 3)
    add(model, "kernel", 3, prefix_length=2)
    add(model, "mixed", 3, mixing="layer")
    for names, message in (
        (["default"], "Adapter 'default' cannot be summed: what memory='prefix' answers need not be linear"),
        (["free", "kernel"], "Adapter 'kernel' cannot be summed: what memory='prefix' answers"),
        (["free", "mixed"], "Adapter 'mixed' cannot be summed: with mixing='layer'"),
    ):
        with pytest.raises(PrefixMemoryError, match=re.escape(message)):
            model.add_weighted_adapter(names, [1.0] * len(names), "sum")
        assert "sum" not in model.peft_config


# --- the choices ----------------------------------------------------------------------------------------------------

REFUSED = [
    (dict(placement="inside"), "placement='inside' needs prefix_length: a free memory has no keys"),
    (dict(similarity="softmax"), "similarity='softmax' needs prefix_length: a free memory has no keys"),
    (dict(reparameterize=4), "reparameterize=4 needs prefix_length: it is a way to train prefix vectors"),
    (dict(normalizer=True), "normalizer=True needs prefix_length: a free memory absorbs the normaliser"),
    (
        dict(prefix_length=2, similarity="softmax", normalizer=True),
        "normalizer=True needs similarity='feature_map' outside the softmax: a softmax is normalised already",
    ),
    (dict(prefix_length=2, placement="inside", normalizer=True), "normalizer=True needs similarity='feature_map'"),
    (
        dict(prefix_length=2, placement="inside", similarity="feature_map"),
        "similarity='feature_map' needs placement='outside': inside, prefix and input share one softmax",
    ),
    *(
        (
            dict(prefix_length=2, placement="inside", mixing=kind),
            f"mixing='{kind}' needs placement='outside': inside, the softmax itself sets the prefix's share",
        )
        for kind in ("fixed", "layer", "head")
    ),
    (dict(prefix_length=2, placement="inside", scale=-1.0), "scale=-1.0 needs placement='outside'"),
    (dict(prefix_length=2, rank=3), "rank=3 needs prefix_length=None"),
    (dict(prefix_length=2, share_heads=True), "share_heads=True needs prefix_length=None"),
    (dict(prefix_length=2, normalize="query_rms"), "normalize='query_rms' needs prefix_length=None"),
    (dict(prefix_length=2, dropout=0.5), "dropout=0.5 needs prefix_length=None"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_a_combination_that_cannot_be_is_refused_with_the_reason(fields, message):
    with pytest.raises(PrefixMemoryError, match=re.escape(message)):
        PrefixMemoryConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(placement="insde"), "placement='insde' is not known. Did you mean 'inside'?"),
        (dict(similarity="softmx"), "similarity='softmx' is not known. Did you mean 'softmax'?"),
        (dict(mixing="heads"), "mixing='heads' is not known. Did you mean 'head'?"),
        (dict(mix=0.0), "mix=0.0 is out of range: give a share in (0, 1)."),
        (dict(mix=1.0), "mix=1.0 is out of range: give a share in (0, 1)."),
        (dict(prefix_length=0), "prefix_length=0 is out of range: give a positive integer, or None."),
        (dict(reparameterize=-2), "reparameterize=-2 is out of range: give a positive integer, or None."),
    ],
    ids=str,
)
@pytest.mark.usefixtures("untyped")
def test_a_wrong_choice_is_refused_by_name_value_and_fix(fields, message):
    with pytest.raises(PrefixMemoryError, match=re.escape(message)):
        PrefixMemoryConfig(**fields)


CHOICES = dict(
    placement=["inside", "outside"],
    prefix_length=[None, PREFIX],
    similarity=[None, "softmax", "feature_map"],
    feature_map=["auto", "softmax", "mlp"],
    normalizer=[False, True],
    mixing=["none", "fixed", "layer", "head"],
    reparameterize=[None, 4],
    query=["content", "rotary"],
    rank=["auto", None],
)


def possible() -> list[dict[str, Any]]:
    """Every possible combination of the choices once: those that lead to the same config count as one."""
    found: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*CHOICES.values()):
        fields = dict(zip(CHOICES, values, strict=True))
        reads_features = fields["similarity"] != "softmax" and fields["placement"] != "inside"
        if fields["feature_map"] != "auto" and not reads_features:
            continue
        try:
            config = PrefixMemoryConfig(**fields)
        except PrefixMemoryError as refusal:
            assert " needs " in str(refusal)
            continue
        found[repr(config)] = {**fields, "similarity": config.similarity}
    return list(found.values())


POSSIBLE = possible()


def test_the_walk_meets_every_choice_and_every_step_of_the_path():
    for name, values in CHOICES.items():
        assert {fields[name] for fields in POSSIBLE} == set(values)
    count = {
        "inside": 2,  # reparameterised or not
        "exact softmax": 4 * 2 * 2,  # mixings, reparameterised or not, queries
        "kernel": 3 * 2 * 4 * 2 * 2,  # feature maps, normalised or not
        "free memory": 3 * 4 * 2 * 2,  # feature maps, mixings, queries, of low rank or full
    }
    assert len(POSSIBLE) == sum(count.values())


def name(fields: dict[str, Any]) -> str:
    return "-".join(str(value) for value in fields.values())


@pytest.mark.parametrize("fields", POSSIBLE, ids=name)
def test_every_possible_combination_trains_saves_loads_and_generates(fields, tmp_path):
    base = build()
    before, untouched = {key: value.clone() for key, value in base.state_dict().items()}, logits(base)
    model = get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM", **fields))
    ids = tokens()
    if fields["placement"] == "outside" and fields["mixing"] == "none":
        assert torch.equal(logits(model), untouched)  # an untrained one adds nothing
    randomize(model)
    start = {key: p.detach().clone() for key, p in memory_parameters(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    for key, parameter in memory_parameters(model).items():
        assert torch.isfinite(parameter).all() and (parameter != start[key]).any(), key
    after = {key: value for key, value in base.state_dict().items() if "prefix_memory" not in key}
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)

    model.eval().save_pretrained(tmp_path)
    same_parameters(load_file(tmp_path / "adapter_model.safetensors"), get_peft_model_state_dict(model))
    for low in (False, True):
        loaded = PeftModel.from_pretrained(build(), str(tmp_path), low_cpu_mem_usage=low).eval()
        same_parameters(loaded, model)
        # ELU changes its sign, so φ(q)ᵀn, by which the normaliser divides, comes near zero (docs/LOG.md)
        near_zero = fields["normalizer"] and fields["feature_map"] == "auto"
        close_logits(logits(loaded), logits(model), amplified=30 if near_zero else 1)
    mask = torch.ones_like(ids)
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    full = logits(model, out[:, :-1], use_cache=False)[:, -1]
    full[:, 2] = -torch.inf
    assert torch.equal(full.argmax(dim=-1), out[:, -1])


def test_inside_is_refused_where_the_attention_function_cannot_be_reached():
    from transformers import AutoModelForCausalLM, BloomConfig

    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=128, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(PrefixMemoryError, match=r"placement='inside' cannot be had in .*attention interface"):
        get_peft_model(bloom, PrefixMemoryConfig(placement="inside", prefix_length=2))
