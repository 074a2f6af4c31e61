"""Conversions: along the paper's path inside one model, and from PEFT's PREFIX_TUNING."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import tiny
from close import close_logits, same_parameters
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError
from prefixmemory.tuner.conversion import kernel_from_prefix, memory_from_prefix, prefix_from_peft
from prefixmemory.tuner.layers import memory_layers
from test_context_methods import BACKENDS
from test_fidelity import family_model
from tiny import build, memory_parameters, randomize, tokens, with_memory

TOLERANCE = 1e-5
PREFIX = 5


def logits(model: Any, ids: Tensor | None = None, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **kwargs).logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


# --- along the path -----------------------------------------------------------------------------------------------

KERNELS = [
    dict(),
    dict(query="rotary", scale=0.5),
    dict(feature_map="mlp", feature_dim=5),
    dict(reparameterize=6),
    dict(mixing="fixed", mix=0.3),
    dict(mixing="head"),
]


@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("fields", KERNELS, ids=str)
@pytest.mark.parametrize("family", ["llama_gqa", "gemma3"])
def test_a_memory_started_at_B_answers_as_the_unnormalised_kernel_form(family, fields, share_heads, tmp_path):
    model = with_memory(family_model(family, "eager"), prefix_length=PREFIX, **fields)
    expected, base = logits(model), logits(family_model(family, "eager"))
    memory_from_prefix(model, "default", "step4", share_heads=share_heads)
    close(logits(model), expected)  # the new adapter is not active yet
    model.set_adapter("step4")
    close(logits(model), expected)
    assert (base - expected).abs().max() > 100 * TOLERANCE
    assert model.peft_config["step4"].output_limit is None
    for layer in memory_layers(model):
        assert layer.memory("step4").M.shape[0] == (2 if share_heads else 4)
    model.save_pretrained(tmp_path, selected_adapters=["step4"])
    loaded = PeftModel.from_pretrained(family_model(family, "eager"), str(tmp_path / "step4")).eval()
    same_parameters(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model, adapter_name="step4"))
    close_logits(logits(loaded), logits(model))


@pytest.mark.parametrize("attention", BACKENDS)
def test_a_memory_started_at_B_answers_as_the_kernel_form_in_every_backend(attention):
    model = with_memory(family_model("llama_gqa", attention), prefix_length=PREFIX)
    expected = logits(model)
    memory_from_prefix(model, "default", "step4")
    model.set_adapter("step4")
    close(logits(model), expected)


def test_a_memory_started_at_a_normalised_kernel_form_leaves_its_normaliser_out():
    fields = dict(prefix_length=PREFIX, feature_map="softmax")
    model = with_memory(family_model("llama_gqa", "eager"), normalizer=True, **fields)
    without = with_memory(family_model("llama_gqa", "eager"), normalizer=False, **fields)
    assert (logits(model) - logits(without)).abs().max() > 100 * TOLERANCE
    memory_from_prefix(model, "default", "step4")
    model.set_adapter("step4")
    close(logits(model), logits(without))


@pytest.mark.parametrize(
    "fields",
    [
        dict(placement="inside"),
        dict(placement="inside", reparameterize=6, scale=0.5),
        dict(similarity="softmax", mixing="layer"),
        dict(feature_map="mlp", feature_dim=5, normalizer=True),
    ],
    ids=str,
)
def test_prefix_vectors_keep_their_values_on_the_way_to_the_kernel_form_and_the_memory(fields):
    model = with_memory(build(), prefix_length=PREFIX, **fields)
    kernel_from_prefix(model, "default", "kernel", feature_map="gelu")
    memory_from_prefix(model, "kernel", "step4")
    config = model.peft_config["kernel"]
    assert (config.placement, config.similarity, config.feature_map) == ("outside", "feature_map", "gelu")
    assert config.query == ("rotary" if fields.get("placement") == "inside" else "content")
    for layer in memory_layers(model):
        for ours, theirs in zip(layer.memory("kernel").vectors(), layer.memory("default").vectors(), strict=True):
            assert torch.equal(ours, theirs)
        assert layer.scale["kernel"] == layer.scale["step4"] == layer.scale["default"]
        mixing = layer.prefix_memory_mixing
        assert ("step4" in mixing) == ("default" in mixing) == ("mixing" in fields)
    if not config.normalizer:
        model.set_adapter("kernel")
        expected = logits(model)
        model.set_adapter("step4")
        close(logits(model), expected)
    model.set_adapter("step4")
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in memory_parameters(model, "step4").values())


def test_what_cannot_be_converted_is_refused_and_adds_nothing():
    model = with_memory(build(), prefix_length=PREFIX, placement="inside")
    model.add_adapter("free", PrefixMemoryConfig())
    for convert, message in (
        (lambda: memory_from_prefix(model, "default", "new"), "has similarity='softmax', so it has no B"),
        (lambda: memory_from_prefix(model, "free", "new"), "Adapter 'free' has no prefix vectors to convert"),
        (lambda: kernel_from_prefix(model, "free", "new"), "Adapter 'free' has no prefix vectors to convert"),
        (lambda: kernel_from_prefix(model, "defualt", "new"), "no adapter 'defualt'. Did you mean 'default'?"),
        (lambda: kernel_from_prefix(model, "default", "free"), "The adapter name 'free' is taken"),
        (lambda: kernel_from_prefix(model, "default", "new", "eluu"), "feature_map='eluu' is not known"),
    ):
        with pytest.raises(PrefixMemoryError, match=re.escape(message)):
            convert()
    assert list(model.peft_config) == ["default", "free"]


def test_tokens_that_were_trained_beside_the_prefix_are_refused():
    """The new adapter would have the base model's."""
    model = with_memory(build(), prefix_length=PREFIX, similarity="feature_map", trainable_token_indices=[5])
    for convert in (memory_from_prefix, kernel_from_prefix):
        with pytest.raises(PrefixMemoryError, match=r"has trainable_token_indices=\[5\], which would not be converted"):
            convert(model, "default", "new")
    assert list(model.peft_config) == ["default"]


# --- from PEFT ------------------------------------------------------------------------------------------------------


def peft_prefix(base: PreTrainedModel, projection: bool = False, length: int = PREFIX) -> PeftModel:
    """A filled PREFIX_TUNING adapter."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length, prefix_projection=projection)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


def wide(family: str, attention: str = "eager") -> PreTrainedModel:
    """A model of attention far from uniform, whose sliding windows hold prefix and input: PEFT's prefix leaves them."""
    with pytest.MonkeyPatch.context() as patch:
        config = copy.deepcopy(tiny.CONFIGS[family])
        if getattr(config, "sliding_window", None):
            config.sliding_window = 64
        if family == "gemma3":
            rotary = config.rope_parameters
            assert rotary["full_attention"]["rope_theta"] != rotary["sliding_attention"]["rope_theta"]
        patch.setitem(tiny.CONFIGS, family, config)
        return family_model(family, attention)


ROTARY = [family for family in tiny.CONFIGS if family != "gpt2"]


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("from_folder", [False, True])
@pytest.mark.parametrize("family", ROTARY)
def test_a_prefix_from_peft_gives_the_logits_of_peft(family, from_folder, projection, tmp_path):
    theirs = peft_prefix(wide(family), projection)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    expected = logits(theirs, ids, attention_mask=mask)
    source: Any = theirs
    if from_folder:
        theirs.save_pretrained(tmp_path / "theirs")
        source = tmp_path / "theirs"
    ours = prefix_from_peft(source, wide(family)).eval()
    close(logits(ours, ids, attention_mask=mask), expected)
    assert (logits(wide(family), ids) - expected).abs().max() > 1000 * TOLERANCE

    ours.save_pretrained(tmp_path / "ours")  # an adapter as any other
    loaded = PeftModel.from_pretrained(wide(family), str(tmp_path / "ours")).eval()
    same_parameters(loaded, ours)
    close_logits(logits(loaded, ids, attention_mask=mask), logits(ours, ids, attention_mask=mask))


@pytest.mark.parametrize("attention", BACKENDS)
def test_a_prefix_from_peft_gives_the_logits_of_peft_in_every_backend(attention):
    theirs = peft_prefix(wide("llama_gqa", attention))
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    expected = logits(theirs, ids, attention_mask=mask)
    torch.compiler.reset()  # flex attention is compiled, and on a CPU cannot go from one kind of mask to another
    close(logits(prefix_from_peft(theirs, wide("llama_gqa", attention)).eval(), ids, attention_mask=mask), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prefix_from_peft_in_a_left_padded_batch_with_position_ids(attention):
    theirs = peft_prefix(wide("llama_gqa", attention))
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    given = dict(attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    ours = prefix_from_peft(theirs, wide("llama_gqa", attention)).eval()
    close(logits(ours, ids, **given)[mask.bool()], logits(theirs, ids, **given)[mask.bool()])


def test_negative_control_keys_that_are_not_turned_back_or_too_far_give_other_logits(monkeypatch):
    theirs = peft_prefix(wide("llama_gqa"))
    expected = logits(theirs)
    close(logits(prefix_from_peft(theirs, wide("llama_gqa")).eval()), expected)
    not_turned = prefix_from_peft(theirs, wide("llama_gqa"), shifted_positions=True).eval()
    assert (logits(not_turned) - expected).abs().max() > 1000 * TOLERANCE
    from prefixmemory.tuner import conversion

    monkeypatch.setattr(conversion, "turns", lambda model, by, turns=conversion.turns: turns(model, by + 1))
    one_too_far = prefix_from_peft(theirs, wide("llama_gqa")).eval()
    assert (logits(one_too_far) - expected).abs().max() > 1000 * TOLERANCE


@pytest.mark.parametrize("rope", ["yarn", "linear", "dynamic", "llama3"])
def test_scaled_rotary_embeddings_are_turned_back(rope, monkeypatch):
    """YaRN puts a factor on cosines and sines, which PEFT's prefix does not have."""
    config = copy.deepcopy(tiny.CONFIGS["llama_gqa"])
    config.rope_parameters = {"rope_type": rope, "rope_theta": 10000.0, "factor": 4.0}
    if rope == "llama3":
        config.rope_parameters |= dict(
            low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128
        )  # fmt: skip
    if rope == "yarn":
        config.rope_parameters |= dict(original_max_position_embeddings=128)
    monkeypatch.setitem(tiny.CONFIGS, "llama_gqa", config)
    theirs = peft_prefix(family_model("llama_gqa", "eager"))
    close(logits(prefix_from_peft(theirs, family_model("llama_gqa", "eager")).eval()), logits(theirs))


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma3"])
def test_with_shifted_positions_the_keys_stay_as_they_are(family):
    """The way for learned positions, as GPT-2's; exact in the others too."""
    theirs = peft_prefix(wide(family))
    ours = prefix_from_peft(theirs, wide(family), shifted_positions=True).eval()
    positions = PREFIX + torch.arange(9)[None]
    close(logits(ours, tokens(2, 9), position_ids=positions), logits(theirs, tokens(2, 9)))


def test_learned_positions_are_refused_with_the_reason_and_nothing_is_left_behind():
    base = build("gpt2")
    keys, names = list(base.state_dict()), [name for name, _ in base.named_modules()]
    theirs = peft_prefix(build("gpt2"))
    with pytest.raises(PrefixMemoryError, match="GPT2Attention does not rotate its keys by position") as refusal:
        prefix_from_peft(theirs, base)
    assert "shifted_positions=True" in str(refusal.value)
    assert list(base.state_dict()) == keys
    assert [name for name, _ in base.named_modules()] == names
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()) == 0
    prefix_from_peft(theirs, base, shifted_positions=True)  # the same model takes it after the refusal


def test_other_methods_and_other_models_are_refused(tmp_path):
    lora = get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    for source in (lora, tmp_path / "lora"):
        with pytest.raises(PrefixMemoryError, match="has peft_type='LORA', not 'PREFIX_TUNING'"):
            prefix_from_peft(source, build())
    theirs = peft_prefix(build("llama"))
    with pytest.raises(PrefixMemoryError, match="no adapter of this name"):
        prefix_from_peft(theirs, build("llama"), adapter="other")
    with pytest.raises(PrefixMemoryError, match="4 key/value heads of size 8; LlamaForCausalLM has 2 layers"):
        prefix_from_peft(theirs, build("llama_gqa"))
    with pytest.raises(PrefixMemoryError, match="is missing"):
        prefix_from_peft(tmp_path / "nothing", build())


def classes(labels: int = 3) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(tiny.CONFIGS["llama_gqa"])
    config.num_labels = labels
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("from_folder", [False, True])
def test_a_head_that_was_trained_beside_the_prefix_comes_along(from_folder, tmp_path):
    theirs = get_peft_model(classes(), PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=PREFIX)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    theirs.save_pretrained(tmp_path / "theirs")
    asked = list(theirs.peft_config["default"].modules_to_save)
    ours = prefix_from_peft(tmp_path / "theirs" if from_folder else theirs, classes()).eval()
    ids = tokens()
    expected = logits(theirs, ids, attention_mask=torch.ones_like(ids))
    close(logits(ours, ids), expected)
    ours.save_pretrained(tmp_path / "ours")
    close(logits(PeftModel.from_pretrained(classes(), str(tmp_path / "ours")).eval(), ids), expected)
    with pytest.raises(PrefixMemoryError, match=r"holds 'base_model\.score\.weight', which has no place in Llama"):
        prefix_from_peft(tmp_path / "theirs", build())
    other = classes(labels=2)
    with pytest.raises(PrefixMemoryError, match=r"holds another 'score' than Llama.*size mismatch"):
        prefix_from_peft(tmp_path / "theirs", other)
    assert not any("prefix_memory" in name or "modules_to_save" in name for name, _ in other.named_modules())
    assert theirs.peft_config["default"].modules_to_save == asked  # which PEFT extends


@pytest.mark.parametrize("from_folder", [False, True])
def test_a_vocabulary_that_was_resized_is_the_base_models(from_folder, tmp_path):
    """PEFT saves its embeddings beside the prefix."""

    def resized() -> PreTrainedModel:
        model = build("llama_gqa", "eager")
        model.resize_token_embeddings(140, mean_resizing=False)
        return model

    base = resized()
    theirs = peft_prefix(copy.deepcopy(base))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    ours = prefix_from_peft(tmp_path if from_folder else theirs, base)
    ids = tokens()
    close(logits(ours.eval(), ids), logits(theirs, ids, attention_mask=torch.ones_like(ids)))


def test_a_prefix_from_peft_trains_on_and_goes_on_along_the_path():
    model = prefix_from_peft(peft_prefix(build()), build())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in memory_parameters(model).values())
    kernel_from_prefix(model, "default", "kernel")
    memory_from_prefix(model, "kernel", "step4")
    randomize(model, "step4")
    model.set_adapter("step4")
    assert torch.isfinite(logits(model)).all()
