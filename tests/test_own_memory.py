"""A memory of one's own: the layer, files, switching, training and the instruments work for it; what is refused."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import tiny
from close import close_logits, same_parameters
from own_memories import FIELDS, GATED, OWN, Gated, different, logits, registered, run_as, several  # noqa: F401
from prefixmemory import MemorySite, PrefixMemoryConfig, PrefixMemoryError, reference, register_memory, set_scale
from prefixmemory.adapters.loading import load_adapter
from prefixmemory.memories.checkpoint import check_config_file
from prefixmemory.memories.matrix import MatrixMemory
from prefixmemory.memories.registry import MEMORIES
from prefixmemory.training.methods import method_config
from prefixmemory.tuner.layers import memory_layers
from processes import run_python

# The name that Trainer, TRL and most scripts call; the new one does not exist in every supported transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def heads_output(model: PeftModel) -> Tensor:
    """What the output projection of layer 0 reads, ``[batch, tokens, heads, value_dim]``."""
    seen = []
    projection = model.get_base_model().model.layers[0].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(model)
    handle.remove()
    return seen[0].unflatten(-1, (4, -1))


# --- the layer reads it -----------------------------------------------------------------------------------------


def content_query(model: PeftModel) -> Tensor:
    attention = model.get_base_model().model.layers[0].self_attn
    queries = []
    handle = attention.q_proj.register_forward_hook(lambda module, args, output: queries.append(output))
    logits(model)
    handle.remove()
    return queries[0].unflatten(-1, (4, -1))


def by_hand(q: Tensor, memory: Gated, gated: bool = True) -> Tensor:
    answer = torch.zeros(*q.shape[:-1], memory.M.shape[-1])
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])):
        gate = torch.sigmoid(q[b, t, h] @ memory.w[h] + memory.b[h]) if gated else 1.0
        answer[b, t, h] = gate * (F.elu(q[b, t, h]) @ memory.M[h])
    return answer


@pytest.mark.parametrize("mixing", [dict(), dict(mixing="fixed", mix=0.3), dict(mixing="head")], ids=str)
def test_its_answer_is_added_to_the_heads_outputs(mixing):
    model = tiny.with_memory(tiny.build(), scale=0.5, **GATED, **mixing)
    memory = memory_layers(model)[0].memory("default")
    with model.disable_adapter():
        base = heads_output(model)
    with torch.no_grad():
        q = content_query(model)
        answer, ungated = by_hand(q, memory), by_hand(q, memory, gated=False)
        if mixing:
            share = (
                0.3
                if mixing["mixing"] == "fixed"
                else torch.sigmoid(memory_layers(model)[0].prefix_memory_mixing["default"].logit)[:, None]
            )
            answer, ungated = ((1 - share) * (x - base) for x in (answer, ungated))
    added = heads_output(model) - base
    torch.testing.assert_close(added, 0.5 * answer, atol=1e-5, rtol=0)
    assert (added - 0.5 * ungated).abs().max() > 1e-2  # control: without the gate it is another answer


@pytest.mark.parametrize("query", ["content", "rotary"])
def test_the_query_is_chosen_as_for_every_memory(query):
    model = tiny.with_memory(tiny.build(), query=query, **GATED)
    ids = tiny.tokens()
    at = torch.arange(9)[None]
    moved = different(logits(model, ids, position_ids=at), logits(model, ids, position_ids=at + 37))
    assert moved == (query == "rotary")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox"])
def test_it_stands_in_every_family(family):
    base = tiny.build(family)
    plain = logits(base)
    model = tiny.with_memory(base, **GATED)
    assert different(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


# --- the base model is sacred -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_new_disabled_at_scale_0_and_unloaded_it_leaves_the_base_model_bit_identical(name):
    base = tiny.build()
    plain, keys = logits(base), list(base.state_dict())
    model = tiny.with_memory(base, fill=False, **FIELDS[name])
    assert torch.equal(logits(model), plain)
    tiny.randomize(model)
    assert different(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    set_scale(model, 0.0)
    assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model.unload()), plain)
    assert list(base.state_dict()) == keys


@pytest.mark.parametrize("name", OWN)
def test_training_moves_each_of_its_parameters_and_no_other(name):
    model = tiny.with_memory(tiny.build(), fill=False, **FIELDS[name]).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    own = tiny.memory_parameters(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(own)
    optimizer = torch.optim.AdamW(own.values(), lr=0.05)
    ids, losses = tiny.tokens(), []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for n, parameter in model.named_parameters():
        if n in own:  # of every head
            assert (parameter - before[n]).flatten(1 if parameter.ndim > 1 else 0).abs().amax(-1).min() > 0, n
        else:
            assert torch.equal(parameter, before[n]), n


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["gated", "shared"])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    model = tiny.with_memory(tiny.build(), **FIELDS[name]).train()
    runs = []

    def gradients() -> dict[str, Tensor]:
        attention = model.get_base_model().model.layers[0].self_attn
        handle = attention.register_forward_pre_hook(lambda module, args: runs.append(1))
        model.zero_grad()
        (100 * model(input_ids=tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss).backward()
        handle.remove()
        return {n: p.grad.clone() for n, p in tiny.memory_parameters(model).items()}

    expected = gradients()
    assert len(runs) == 1 and all(g.abs().max() > 1e-3 for g in expected.values())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    actual = gradients()
    assert len(runs) == 3, "the layer was not recomputed, so nothing was tested"
    for n, gradient in expected.items():
        torch.testing.assert_close(actual[n], gradient, atol=1e-5, rtol=0)


def test_on_a_bfloat16_base_it_stays_in_float32():
    model = tiny.with_memory(tiny.build().bfloat16(), **GATED)
    assert {p.dtype for p in tiny.memory_parameters(model).values()} == {torch.float32}
    with model.disable_adapter():
        plain = logits(model)
    assert plain.dtype == torch.bfloat16 and different(logits(model), plain)


def test_it_generates_with_a_cache_and_left_padding_what_it_generates_alone():
    model = tiny.with_memory(tiny.build(), **GATED)
    ids = tiny.tokens(2, 7)
    ids[0, :3] = 0
    mask = (ids != 0).long()
    options: dict[str, Any] = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
    together = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 7:]
    alone = model.generate(input_ids=ids[:1, 3:], attention_mask=mask[:1, 3:], use_cache=False, **options)[:, 4:]
    assert torch.equal(together[:1], alone)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options)[:, 7:], together)


# --- several adapters -------------------------------------------------------------------------------------------


def test_adapters_of_all_kinds_are_switched_and_add():
    model = several()
    alone = {name: run_as(model, name) for name in model.peft_config}
    names = list(alone)
    assert all(different(alone[a], alone[b]) for a in names for b in names if a < b)
    model.base_model.set_adapter("default")
    with model.disable_adapter():
        base = heads_output(model)
    added = []
    for active in (["default"], ["free"], ["default", "free"]):
        model.base_model.set_adapter(active)
        added.append(heads_output(model) - base)
    torch.testing.assert_close(added[2], added[0] + added[1], atol=1e-6, rtol=0)
    model.base_model.set_adapter("default")
    model.delete_adapter("again")
    for name in ("default", "free", "shared"):
        assert torch.equal(run_as(model, name), alone[name])


def test_each_row_of_a_batch_has_its_adapter():
    model = several()
    rows = ["shared", "__base__", "default", "free", "again"]
    ids = tiny.tokens(len(rows))
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=rows, use_cache=False).logits
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, ids[row : row + 1])
        else:
            model.base_model.set_adapter(name)
            expected = logits(model, ids[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], expected, atol=1e-5, rtol=0)


# --- files ------------------------------------------------------------------------------------------------------


# torch leaves a buffer that is not saved on the meta device
@pytest.mark.parametrize(
    ("name", "low_cpu_mem_usage"),
    [(name, low) for name in OWN for low in (False, True) if (name, low) != ("buffered", 1)],
)
def test_saved_and_loaded_its_parameters_are_the_same_bit_for_bit(name, low_cpu_mem_usage, tmp_path):
    model = tiny.with_memory(tiny.build(), **FIELDS[name])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert different(logits(model), logits(tiny.build()))
    same_parameters(loaded, model)
    close_logits(logits(loaded), logits(model))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for field, value in FIELDS[name].items():
        assert getattr(loaded.peft_config["default"], field) == value
    model.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    same_parameters(get_peft_model_state_dict(model, adapter_name="second"), get_peft_model_state_dict(loaded))
    close_logits(run_as(model, "second"), logits(loaded))


def test_a_config_survives_dict_copy_and_file(tmp_path):
    config = PrefixMemoryConfig(task_type="CAUSAL_LM", query="rotary", mixing="layer", **GATED)
    assert config.similarity is None and config.rank is None
    assert PrefixMemoryConfig(**config.to_dict()) == copy.deepcopy(config) == config
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config
    assert method_config(dict(GATED)).memory_options == {"bias": 0.5}  # a recipe's section


def test_a_damaged_or_foreign_file_is_refused_and_leaves_no_trace(tmp_path):
    tiny.with_memory(tiny.build(), memory="offset").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "memory": "gated"}))
    base = tiny.build()
    keys = list(base.state_dict())
    with pytest.raises(PrefixMemoryError, match="The checkpoint lacks"):
        PeftModel.from_pretrained(base, tmp_path)
    assert list(base.state_dict()) == keys and not hasattr(base, "peft_config")


NOT_REGISTERED = "memory='gated' is not registered. Import the module that registers it before loading. Registered: {}."


def test_an_adapter_whose_memory_is_not_registered_is_refused_in_one_line(tmp_path):
    base = tiny.save_tiny(tmp_path / "base")
    model = tiny.with_memory(tiny.build(), **GATED)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    for name in OWN:
        del MEMORIES[name]
    loads = (
        lambda: PeftModel.from_pretrained(tiny.build(), tmp_path / "adapter"),
        lambda: PrefixMemoryConfig.from_pretrained(tmp_path / "adapter"),
        lambda: load_adapter(str(tmp_path / "adapter")),
        lambda: PrefixMemoryConfig(memory="gated"),
    )
    for load in loads:
        with pytest.raises(PrefixMemoryError) as refusal:
            load()
        place, _, said = str(refusal.value).rpartition("adapter_config.json: ")
        assert said == NOT_REGISTERED.format("matrix, prefix")
        assert place in ("", f"{tmp_path / 'adapter'}/")
    register_memory("gate")(Gated)
    with pytest.raises(PrefixMemoryError, match=re.escape("is not registered. Did you mean 'gate'? Import the module")):
        PrefixMemoryConfig(memory="gated")
    assert check_config_file(tmp_path / "adapter")["memory"] == "gated"  # what the file says is only read


def test_a_new_process_loads_it_once_the_module_that_registers_it_is_imported(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom prefixmemory import register_memory\n\n\n"
        '@register_memory("offset")\nclass Offset(torch.nn.Module):\n'
        "    def __init__(self, site):\n        super().__init__()\n"
        "        self.b = torch.nn.Parameter(torch.zeros(site.heads, site.value_dim))\n\n"
        "    def forward(self, query):\n        return self.b.expand(*query.shape[:-1], -1)\n"
    )
    model = tiny.with_memory(tiny.build(), memory="offset")
    model.get_base_model().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    script = """
import torch, prefixmemory
from peft import AutoPeftModelForCausalLM
try:
    AutoPeftModelForCausalLM.from_pretrained("adapter")
except prefixmemory.PrefixMemoryError as error:
    print(error)
import mine
model = AutoPeftModelForCausalLM.from_pretrained("adapter")
with torch.no_grad():
    print(model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits.double().sum().item())
"""
    refusal, total = run_python("-c", script, folder=tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    assert refusal == NOT_REGISTERED.format("matrix, prefix").replace("gated", "offset")
    assert float(total) == pytest.approx(logits(model, torch.tensor([[5, 6, 7]])).double().sum().item(), abs=1e-4)


# --- shared across layers ---------------------------------------------------------------------------------------


def test_what_layers_share_is_saved_once_and_learns_from_all_of_them(tmp_path):
    model = tiny.with_memory(tiny.build(), memory="shared")
    model.save_pretrained(tmp_path)
    names = sorted(load_file(tmp_path / "adapter_model.safetensors"))
    assert [name.rpartition(".")[2] for name in names] == ["M", "size", "size"]
    model.train()
    (100 * model(input_ids=tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss).backward()
    whole = memory_layers(model)[0].memory("default").M.grad

    apart = tiny.with_memory(tiny.build(), memory="offset", fill=False)  # the same as a memory for each layer
    apart.add_adapter("free", PrefixMemoryConfig(task_type="CAUSAL_LM", rank=None, normalize="none", output_limit=None))
    apart.base_model.set_adapter("free")
    parts = []
    for ours, theirs in zip(memory_layers(model), memory_layers(apart), strict=True):
        first, module = memory_layers(model)[0].memory("default"), ours.memory("default")
        with torch.no_grad():
            theirs.memory("free").M.copy_(first.M * module.size[:, None, None])
        parts.append((theirs.memory("free").M, module.size))
    (100 * apart(input_ids=tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss).backward()
    expected = [(M.grad * size[:, None, None]).detach() for M, size in parts]
    torch.testing.assert_close(whole, sum(expected), atol=1e-5, rtol=0)
    assert all(different(whole, part) for part in expected)  # control: not one layer's alone


def test_a_copy_and_another_adapter_share_nothing_with_it():
    model = tiny.with_memory(tiny.build(), memory="shared")
    model.add_adapter("second", PrefixMemoryConfig(task_type="CAUSAL_LM", memory="shared"))
    tiny.randomize(model, "second", seed=5)
    second = run_as(model, "second")
    before = run_as(model, "default")
    twin = copy.deepcopy(model)
    tiny.randomize(twin, "default", seed=9)
    assert torch.equal(logits(model), before) and different(logits(twin), before)
    assert all(len(layer.sites["default"].first) == (n > 0) for n, layer in enumerate(memory_layers(twin)))
    held = memory_layers(twin)[1].sites["default"].first[0]
    assert held is memory_layers(twin)[0].memory("default")
    tiny.randomize(model, "default", seed=9)
    same_parameters(model, twin)
    close_logits(logits(model), logits(twin))
    assert torch.equal(run_as(model, "second"), second)


# --- what a class may say of itself -----------------------------------------------------------------------------


class Centred(nn.Module):
    """(cos(q) − μ)ᵀM, with a field of the config, and a mean."""

    def __init__(self, site: MemorySite, rank: int = 3) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(site.heads, site.head_dim, rank))
        self.B = nn.Parameter(torch.zeros(site.heads, rank, site.value_dim))
        self.mean = nn.Parameter(torch.zeros(site.heads, site.head_dim), requires_grad=False)

    def features(self, query: Tensor) -> Tensor:
        return torch.cos(query)

    def forward(self, query: Tensor) -> Tensor:
        centred = self.features(query.unsqueeze(-2)).squeeze(-2) - self.mean
        return torch.einsum("bthf,hfr,hrv->bthv", centred, self.A, self.B)


class Both(nn.Module):
    """Reads both queries."""

    queries = ("content", "rotary")

    def __init__(self, site: MemorySite) -> None:
        super().__init__()
        self.M = nn.Parameter(torch.zeros(site.heads, site.head_dim, site.value_dim))

    def forward(self, content: Tensor, rotary: Tensor) -> Tensor:
        return torch.einsum("bthf,hfv->bthv", content * rotary, self.M)


def test_it_may_have_a_field_of_the_config_a_mean_and_a_limit(tmp_path):
    register_memory("centred")(Centred)
    model = tiny.with_memory(tiny.build(), fill=False, memory="centred", rank="auto", output_limit=0.5)
    assert model.peft_config["default"].rank == 3 and memory_layers(model)[1].memory("default").A.shape == (4, 8, 3)
    model.train()
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    layer = memory_layers(model)[0]
    memory = layer.memory("default")
    q = content_query(model)
    torch.testing.assert_close(memory.mean.detach(), torch.cos(q).mean(dim=(0, 1)), atol=1e-6, rtol=1e-5)
    assert not memory.mean.requires_grad and memory.mean.grad is None

    with torch.no_grad():
        memory.B.normal_(std=100.0)  # far beyond the limit
        model.eval()
        with model.disable_adapter():
            base = heads_output(model)
        answer = torch.einsum("bthf,hfv->bthv", torch.cos(q) - memory.mean, memory.A @ memory.B)
        limited = reference.limited(answer.transpose(1, 2), base.transpose(1, 2), 0.5).transpose(1, 2)
        torch.testing.assert_close(heads_output(model) - base, limited, atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.build(), tmp_path)
    assert torch.equal(memory_layers(loaded)[0].memory("default").mean, memory.mean)
    given = PrefixMemoryConfig(memory="centred", rank=5)
    assert given.rank == 5 and given.output_limit is None  # no limit but where it is asked for


def test_it_may_read_both_queries():
    register_memory("both")(Both)
    model = tiny.with_memory(tiny.build(), memory="both")
    at, ids = torch.arange(9)[None], tiny.tokens()
    first = memory_layers(model)[0].memory("default")
    seen = []
    handle = first.register_forward_hook(lambda m, args, output: seen.append(args))
    logits(model, ids, position_ids=at)
    logits(model, ids, position_ids=at + 37)
    handle.remove()
    torch.testing.assert_close(seen[0][0], seen[1][0], atol=1e-6, rtol=0)  # content: where it stands changes nothing
    assert different(seen[0][1], seen[1][1])


def test_options_that_are_fields_of_the_config_are_given_as_such():
    register_memory("centred")(Centred)
    with pytest.raises(PrefixMemoryError, match="memory_options has 'rank', a field of the config: give rank=5"):
        PrefixMemoryConfig(memory="centred", memory_options={"rank": 5})


def test_a_subclass_of_a_built_in_memory_is_called():
    """It inherits what a fused kernel reads, and may answer otherwise."""

    @register_memory("doubled")
    class Doubled(MatrixMemory):
        def forward(self, query):
            return 2 * super().forward(query)

    models = [
        tiny.with_memory(tiny.build(), memory="doubled", rank=3),
        tiny.with_memory(tiny.build(), rank=3, scale=2.0),
    ]
    found, expected = (model(input_ids=tiny.tokens()).logits for model in models)
    close_logits(found, expected)
    assert (found - tiny.with_memory(tiny.build(), rank=3)(input_ids=tiny.tokens()).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_memory_with_hooks_is_called(kind):
    model, called = tiny.with_memory(tiny.build(), rank=3), []
    memory = memory_layers(model)[1].memory("default")
    getattr(memory, f"register_{kind}_hook")(lambda *given: called.append(given[0]))
    model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert called == [memory]
