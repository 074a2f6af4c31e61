"""A memory of one's own: configs and classes that are refused, and what the instruments know of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

import tiny
from close import close_logits, same_parameters
from own_memories import GATED, Gated, Offset, logits, registered, several  # noqa: F401
from prefixmemory import MemorySite, PrefixMemoryConfig, PrefixMemoryError, register_memory
from prefixmemory.analysis import ablate, readout, shift, spectrum, tradeoff
from prefixmemory.analysis.readout import text_loss
from prefixmemory.memories.registry import MEMORIES, memory_kind
from prefixmemory.tuner.conversion import memory_from_prefix
from prefixmemory.tuner.layers import memory_layers

# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_name_is_never_overwritten():
    with pytest.raises(PrefixMemoryError, match=re.escape("memory='gated' is registered already. Choose another name")):
        register_memory("gated")(Offset)
    assert MEMORIES["gated"].factory is Gated
    assert register_memory("mine")(Offset) is Offset


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(memory="gatd"), "memory='gatd' is not registered. Did you mean 'gated'? Import the module"),
        (dict(memory=["gated"]), "memory=['gated'] is not registered."),
        (
            dict(memory="gated", memory_options={"bais": 1.0}),
            "memory_options={'bais': 1.0} do not suit memory='gated': got an unexpected keyword argument 'bais'.",
        ),
        (dict(memory="gated", memory_options=[1.0]), "memory_options=[1.0] is no set of names and values: give a dict"),
        (dict(memory="gated", memory_options={1: 1.0}), "memory_options={1: 1.0} is no set of names and values"),
        (
            dict(memory="gated", memory_options={"bias": [1.0]}),
            "memory_options['bias']=[1.0] is no number, text or truth value: give one.",
        ),
        (dict(memory="gated", memory_options={"bias": float("nan")}), "memory_options['bias']=nan is no number"),
        (dict(memory_options={"bias": 1.0}), "memory_options={'bias': 1.0} needs memory: they are arguments of a"),
        *(
            (
                {**GATED, name: value},
                f"{name}={value!r} needs memory='matrix', not 'gated': a registered memory has a field only if its "
                f"class names {name}= as an argument",
            )
            for name, value in dict(
                feature_map="gelu",
                feature_dim=4,
                normalize="query_rms",
                rank=2,
                share_heads=True,
                dropout=0.1,
                placement="inside",
                prefix_length=4,
                similarity="softmax",
                normalizer=True,
                reparameterize=8,
            ).items()
        ),
    ],
    ids=str,
)
@pytest.mark.usefixtures("untyped")
def test_a_config_that_does_not_suit_is_refused_with_the_reason(fields, message):
    with pytest.raises(PrefixMemoryError, match=re.escape(message)) as refusal:
        PrefixMemoryConfig(**fields)
    assert "\n" not in str(refusal.value)


def test_an_option_without_a_default_must_be_given():
    @register_memory("wide")
    def wide(site: MemorySite, width: int) -> nn.Module:
        return Offset(site)

    memory_kind("wide").check_options({"width": 3})
    with pytest.raises(PrefixMemoryError, match="do not suit memory='wide': missing a required argument: 'width'"):
        PrefixMemoryConfig(memory="wide")


class Loud(Offset):
    def __init__(self, site: MemorySite) -> None:
        super().__init__(site)
        nn.init.normal_(self.b)


class Turned(Offset):
    def forward(self, query: Tensor) -> Tensor:
        return super().forward(query).transpose(1, 2)


class Summed(Offset):
    def forward(self, query: Tensor) -> Tensor:
        return super().forward(query).sum(dim=-2)


class Nothing(Offset):
    def forward(self, query: Tensor) -> Any:
        return None


class NotANumber(Offset):
    def forward(self, query: Tensor) -> Tensor:
        return super().forward(query) / 0


class WithMean(Offset):
    """Has what calibration needs; the classes below lack one thing each."""

    def __init__(self, site: MemorySite) -> None:
        super().__init__(site)
        self.mean: Any = nn.Parameter(torch.zeros(site.heads, 3), requires_grad=False)

    def features(self, query: Tensor) -> Tensor:
        return query[..., :3]


class MeanInBuffer(WithMean):
    def __init__(self, site: MemorySite) -> None:
        super().__init__(site)
        del self.mean
        self.register_buffer("mean", torch.zeros(site.heads, 3))


class MeanOfNoGroup(WithMean):
    def __init__(self, site: MemorySite) -> None:
        super().__init__(site)
        self.mean = nn.Parameter(torch.zeros(3), requires_grad=False)


class MeanOfNothing(WithMean):
    features: Any = None


class OtherFeatures(WithMean):
    def features(self, query: Tensor) -> Tensor:
        return query


class Registering(Offset):
    """Keeps the first layer's module as a child of its own."""

    def __init__(self, site: MemorySite) -> None:
        super().__init__(site)
        self.kept = nn.ModuleList(site.first)


ONE = nn.Parameter(torch.zeros(4, 8))


class OneForAll(Offset):
    def __init__(self, site: MemorySite) -> None:
        super().__init__(site)
        self.b = ONE


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (Loud, "memory='mine' does not start at zero, so a new adapter would change the base model."),
        (NotANumber, "memory='mine' does not start at zero"),
        (Turned, "memory='mine' answered queries [2, 5, 4, 8] with [2, 4, 5, 8]: return a tensor [2, 5, 4, 8]."),
        (Summed, "memory='mine' answered queries [2, 5, 4, 8] with [2, 5, 8]: return a tensor [2, 5, 4, 8]."),
        (Nothing, "memory='mine' answered queries [2, 5, 4, 8] with NoneType: return a tensor [2, 5, 4, 8]."),
        *((factory, "memory='mine' has a mean that") for factory in (MeanInBuffer, MeanOfNoGroup, MeanOfNothing)),
        (
            OtherFeatures,
            "features() of memory='mine' turned queries [2, 5, 4, 1, 8] into [2, 5, 4, 1, 8]: return [2, 5",
        ),
        (lambda site: torch.zeros(3), "memory='mine' made a Tensor: return an nn.Module."),
        (Registering, "memory='mine' made a module whose 'kept.0.b' belongs to another memory, so that it would be"),
        (OneForAll, "memory='mine' made a module whose 'b' belongs to another memory, so that it would be saved twice"),
    ],
)
def test_a_class_that_breaks_the_contract_is_refused_and_leaves_no_trace(factory, message):
    register_memory("mine")(factory)
    base = tiny.build()
    plain, keys, names = logits(base), list(base.state_dict()), [name for name, _ in base.named_modules()]
    with pytest.raises(PrefixMemoryError, match=re.escape(message)):
        get_peft_model(base, PrefixMemoryConfig(task_type="CAUSAL_LM", memory="mine"))
    assert list(base.state_dict()) == keys and [name for name, _ in base.named_modules()] == names
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()) == 0
    assert torch.equal(logits(base), plain) and not hasattr(base, "peft_config")

    model = tiny.with_memory(base, **GATED)
    before = logits(model)
    with pytest.raises(PrefixMemoryError, match=re.escape(message)):
        model.add_adapter("second", PrefixMemoryConfig(task_type="CAUSAL_LM", memory="mine"))
    assert torch.equal(logits(model), before) and list(model.peft_config) == ["default"]


def test_a_mean_that_can_be_taken_passes_the_check():
    register_memory("mine")(WithMean)
    model = tiny.with_memory(tiny.build(), memory="mine")
    assert memory_layers(model)[0].memory("default").mean.shape == (4, 3)


def test_the_check_of_the_start_draws_nothing_from_the_random_state():
    torch.manual_seed(3)
    expected = torch.rand(1)
    base = tiny.build()
    torch.manual_seed(3)
    get_peft_model(base, PrefixMemoryConfig(memory="gated"))
    assert torch.equal(torch.rand(1), expected)


def test_what_is_no_sum_of_answers_and_no_prefix_is_not_combined_or_converted():
    model = several()
    with pytest.raises(PrefixMemoryError, match="'default' cannot be summed: what memory='gated' answers need not be"):
        model.add_weighted_adapter(["default", "again"], [1.0, 1.0], "sum")
    with pytest.raises(PrefixMemoryError, match="Adapter 'default' has no prefix vectors to convert"):
        memory_from_prefix(model, "default", "memory")
    assert list(model.peft_config) == ["default", "free", "shared", "again"]


# --- instruments ------------------------------------------------------------------------------------------------


def test_the_tradeoff_is_that_of_its_answer():
    model, ids = tiny.with_memory(tiny.build(), memory="offset"), tiny.tokens(1, 12)
    found = tradeoff(model, ids, [4, 12], queries=3)
    assert found.quantity == "ratio" and found.prefix_length is None
    with model.disable_adapter():
        seen = []
        projection = model.get_base_model().model.layers[0].self_attn.o_proj
        handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].unflatten(-1, (4, -1))))
        logits(model, ids)
        handle.remove()
    b = memory_layers(model)[0].memory("default").b.detach()
    expected = (b.norm(dim=-1) / seen[0][0, -3:].norm(dim=-1)).mean(dim=0)
    torch.testing.assert_close(torch.tensor(found.values[1][0]), expected, atol=1e-5, rtol=1e-4)


def test_spectrum_and_shift_look_at_it_as_at_every_method():
    ids = tiny.tokens(1, 40)
    constant = spectrum(tiny.with_memory(tiny.build(), memory="offset"), ids)
    assert constant.constant == pytest.approx([1.0, 1.0]) and constant.effective_rank == [0.0, 0.0]
    gated = spectrum(tiny.with_memory(tiny.build(), **GATED), ids)
    assert all(1 < rank < 40 for rank in gated.effective_rank)
    moved = shift(tiny.with_memory(tiny.build(), **GATED), ids)
    assert max(moved.distance[0]) < 1e-6 < min(moved.distance[1])  # the first layer's maps do not know of it


def test_the_readout_is_that_of_its_matrix():
    own, free = tiny.with_memory(tiny.build(), scale=0.5, **GATED), tiny.with_memory(tiny.build(), scale=0.5)
    with torch.no_grad():
        for ours, theirs in zip(memory_layers(own), memory_layers(free), strict=True):
            theirs.memory("default").M.copy_(ours.memory("default").M)
    assert readout(own, tiny.tokenizer()) == readout(free, tiny.tokenizer())


def test_a_memory_that_does_not_say_what_it_holds_is_ablated_but_not_read_out():
    model, ids = tiny.with_memory(tiny.build(), memory="offset"), tiny.tokens()
    with pytest.raises(PrefixMemoryError) as refusal:
        readout(model, tiny.tokenizer())
    assert str(refusal.value) == (
        "memory='offset' has no matrix(), so it cannot be read out as tokens. Give its class a method that returns "
        "[heads, features, value_dim], or look at its trade-off and spectrum."
    )
    found = ablate(model, lambda: text_loss(model, ids))
    memory = memory_layers(model)[1].memory("default")
    with torch.no_grad():
        memory.b[2] = 0
    assert found.change[1][2] == pytest.approx(text_loss(model, ids) - found.loss, abs=1e-6)
    assert abs(found.change[1][2]) > 1e-5


def test_a_matrix_of_another_shape_is_refused():
    class Odd(Gated):
        def matrix(self) -> Tensor:
            return self.M[:3]

    register_memory("odd")(Odd)
    with pytest.raises(PrefixMemoryError, match=re.escape("has shape [3, 8, 8]: return [4, features, 8].")):
        readout(tiny.with_memory(tiny.build(), memory="odd"), tiny.tokenizer())


def test_the_example_in_the_module_works():
    """The class in the docstring of own_memory.py."""
    import prefixmemory.memories.registry as module

    lines = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ") or not line]
    code = "\n".join(lines).replace('"offset"', '"from_docstring"')
    exec(code, {"torch": torch, "nn": nn, "register_memory": register_memory})
    ours, theirs = (tiny.with_memory(tiny.build(), memory=name) for name in ("from_docstring", "offset"))
    same_parameters(ours, theirs)
    close_logits(logits(ours), logits(theirs))


def test_the_folder_holds_no_code(tmp_path: Path):
    tiny.with_memory(tiny.build(), **GATED).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["memory"], saved["memory_options"]) == ("gated", {"bias": 0.5})
    assert "test_own_memory" not in json.dumps(saved)
