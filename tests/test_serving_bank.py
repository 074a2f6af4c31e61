"""The slots that a server reads in one product answer as the memories that they were made of."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from prefixmemory import PrefixMemoryError, register_feature_map
from prefixmemory.serving.bank import Cut, LayerBank, Step
from prefixmemory.serving.served import (
    FEED_FORWARD,
    HeadSizes,
    ServedLayer,
    check_blocks,
    has_room_for_blocks,
    rank_of,
    read_blocks,
    read_memory,
)
from prefixmemory.serving.server import launch
from tiny import CONFIGS, build, with_memory

SIZES = HeadSizes(heads=4, kv_heads=2, head_dim=8, value_dim=8)
LAYERS = CONFIGS["llama_gqa"].num_hidden_layers
RANK = 8
TOLERANCE = 1e-5  # of values of about 1, in float32

#: Memories of every kind that is served.
KINDS = {
    "default": {"rank": 8, "output_limit": 0.5, "normalize": "feature_mean"},
    "rotary, two heads a memory": {"query": "rotary", "share_heads": True, "rank": 3},
    "gelu, without a limit": {"feature_map": "gelu", "normalize": "feature_mean", "rank": 2, "scale": 0.7},
    "full": {"feature_map": "silu", "normalize": "query_rms"},
    "features of unit length": {"normalize": "feature_l2", "feature_map": "relu", "output_limit": 0.2},
    "softmax as a map": {"feature_map": "softmax", "output_limit": 2.0},
    "prefix": {"prefix_length": 5, "feature_map": "identity"},
    "long prefix behind an MLP": {"prefix_length": 40, "reparameterize": 6, "query": "rotary"},
    "softer heads": {"output_limit": 0.5, "head_scale": 0.25, "scale": 0.7, "rank": 4},
    "patterns": {"output_limit_pattern": {"layers.1.self_attn": 0.01}, "rank_pattern": {"layers.0.self_attn": 2}},
}


def memory(folder: Path, kind: str, seed: int = 2) -> tuple[PeftModel, dict[int, ServedLayer]]:
    """A memory, and what a server makes of its files."""
    config = dict(KINDS[kind])
    if "prefix_length" in config:
        config |= {name: value for name, value in (("rank", None), ("normalize", "none")) if name not in config}
    model = with_memory(build(), **config)
    model.save_pretrained(folder)
    return model, read_memory(folder, SIZES, LAYERS, RANK)


def of_layer(model: PeftModel, number: int, outputs: Tensor, rotated: Tensor, content: Tensor) -> Tensor:
    """What the layer in transformers' model makes of the heads' outputs ``[tokens, heads, value_dim]``."""
    layer = model.base_model.model.model.layers[number].self_attn.prefix_memory
    (step,) = layer.plan(None).outside
    return step.add_to(outputs[None], outputs[None], {"content": content[None], "rotary": rotated[None]}, None)[0]


def batch(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads' outputs, rotated queries and queries before rotation, ``[tokens, heads, size]``."""
    return torch.randn(3, tokens, SIZES.heads, SIZES.head_dim).unbind(0)


def bank(*held: ServedLayer | None) -> LayerBank:
    made = LayerBank(len(held), RANK, SIZES.heads, SIZES.head_dim, SIZES.value_dim, torch.float32, torch.device("cpu"))
    for slot, layer in enumerate(held):
        if layer is not None:
            made.put(slot, layer)
    return made


def step(slots: list[int], scales: list[float] | None = None) -> Step:
    made = Step(64, SIZES.heads * SIZES.head_dim, torch.float32, torch.device("cpu"))
    made.point(torch.tensor(slots), None if scales is None else torch.tensor(scales))
    return made


@pytest.mark.parametrize("number", range(LAYERS))
@pytest.mark.parametrize("kind", KINDS)
def test_one_memory_answers_as_the_layer_does(kind, number, tmp_path):
    model, served = memory(tmp_path, kind)
    outputs, rotated, content = batch(7)
    found = outputs.flatten(1).clone()
    bank(served[number]).add_(found, rotated.flatten(1), content.flatten(1), step([0] * 7))
    expected = of_layer(model, number, outputs, rotated, content)
    torch.testing.assert_close(found.view_as(expected), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(found.view_as(expected), outputs, atol=1e-3)


@pytest.mark.parametrize("captured", [False, True])
def test_a_batch_of_all_kinds_answers_each_token_with_its_own(captured, tmp_path):
    made = [memory(tmp_path / str(slot), kind) for slot, kind in enumerate(KINDS)]
    slots = [slot for _ in range(2) for slot in (-1, *range(len(made)))]
    outputs, rotated, content = batch(len(slots))
    expected = outputs.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            here = slice(token, token + 1)
            expected[here] = of_layer(made[slot][0], 1, outputs[here], rotated[here], content[here])
    found = outputs.flatten(1).clone()
    bank(*[served[1] for _, served in made]).add_(
        found, rotated.flatten(1), content.flatten(1), step(slots), captured=captured
    )
    torch.testing.assert_close(found.view_as(expected), expected, atol=TOLERANCE, rtol=TOLERANCE)
    silent = torch.tensor(slots) < 0
    assert torch.equal(found.view_as(outputs)[silent], outputs[silent])


@pytest.mark.parametrize("captured", [False, True])
def test_a_token_whose_memory_is_not_held_here_reads_none(captured, tmp_path):
    """A memory has none in some layers, or none beside feed-forward blocks; those of other tokens are not its own."""
    _, served = memory(tmp_path, "default")
    outputs, rotated, content = batch(3)
    found = outputs.flatten(1).clone()
    bank(served[0], None).add_(found, rotated.flatten(1), content.flatten(1), step([0, 1, -1]), captured=captured)
    assert torch.equal(found.view_as(outputs)[1:], outputs[1:])
    assert (found.view_as(outputs)[0] - outputs[0]).abs().max() > 1e-3


@pytest.mark.parametrize("captured", [False, True])
def test_one_slot_is_read_at_a_scale_of_each_tokens_own(captured, tmp_path):
    """NaN is the memory's."""
    model, served = memory(tmp_path, "gelu, without a limit")  # its scale is 0.7
    outputs, rotated, content = batch(5)
    now = step([0, 0, 0, -1, 0], [float("nan"), 0.0, 1.4, 0.5, -0.7])
    found = outputs.flatten(1).clone()
    bank(served[0]).add_(found, rotated.flatten(1), content.flatten(1), now, captured=captured)
    added = of_layer(model, 0, outputs, rotated, content) - outputs
    expected = outputs + added * torch.tensor([1.0, 0.0, 2.0, 0.0, -1.0])[:, None, None]
    torch.testing.assert_close(found.view_as(expected), expected, atol=TOLERANCE, rtol=TOLERANCE)
    now.point(torch.tensor([0] * 5))  # the next step's requests ask for none
    found = outputs.flatten(1).clone()
    bank(served[0]).add_(found, rotated.flatten(1), content.flatten(1), now, captured=captured)
    torch.testing.assert_close(found.view_as(expected), outputs + added, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_recorded_call_follows_what_the_slots_come_to_hold(tmp_path):
    """As a CUDA graph is replayed: the host decides nothing, so that an empty step may be recorded."""
    model, served = memory(tmp_path, "default")
    slots, now = bank(None, None), step([-1] * 5)
    outputs, rotated, content = batch(5)
    found = outputs.flatten(1).clone()
    slots.add_(found, rotated.flatten(1), content.flatten(1), now, captured=True)
    assert torch.equal(found.view_as(outputs), outputs)
    slots.put(1, served[0])
    now.slots[:5] = 1
    slots.add_(found, rotated.flatten(1), content.flatten(1), now, captured=True)
    expected = of_layer(model, 0, outputs, rotated, content)
    torch.testing.assert_close(found.view_as(expected), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_slot_that_is_filled_again_holds_nothing_of_what_it_held(tmp_path):
    _, first = memory(tmp_path / "first", "softmax as a map")
    model, second = memory(tmp_path / "second", "gelu, without a limit")
    slots = bank(first[0], first[1])
    slots.put(0, second[0])
    outputs, rotated, content = batch(6)
    found = outputs.flatten(1).clone()
    slots.add_(found, rotated.flatten(1), content.flatten(1), step([0, 1] * 3))
    expected = of_layer(model, 0, outputs, rotated, content)
    torch.testing.assert_close(found.view_as(expected)[::2], expected[::2], atol=TOLERANCE, rtol=TOLERANCE)


def test_an_emptied_slot_is_silent(tmp_path):
    _, served = memory(tmp_path, "default")
    slots = bank(served[0])
    slots.clear(0)
    for captured in (False, True):
        outputs, rotated, content = batch(3)
        found = outputs.flatten(1).clone()
        slots.add_(found, rotated.flatten(1), content.flatten(1), step([0] * 3), captured=captured)
        assert torch.equal(found.view_as(outputs), outputs)


def test_each_process_has_its_heads(tmp_path):
    model, served = memory(tmp_path, "rotary, two heads a memory")
    outputs, rotated, content = batch(4)
    expected = of_layer(model, 0, outputs, rotated, content)
    for here in (slice(0, 2), slice(2, 4)):
        half = LayerBank(1, RANK, 2, SIZES.head_dim, SIZES.value_dim, torch.float32, torch.device("cpu"))
        half.put(0, served[0].of_heads(here))
        found = outputs[:, here].flatten(1).clone()
        half.add_(found, rotated[:, here].flatten(1), content[:, here].flatten(1), step([0] * 4))
        torch.testing.assert_close(found.view(4, 2, -1), expected[:, here], atol=TOLERANCE, rtol=TOLERANCE)


def test_a_head_that_says_nothing_is_no_division_by_zero(tmp_path):
    for kind in ("gelu, without a limit", "default"):
        _, served = memory(tmp_path / kind[:4], kind)
        _, rotated, content = batch(2)
        found = torch.zeros(2, SIZES.heads * SIZES.value_dim)
        bank(served[0], served[1]).add_(found, rotated.flatten(1), content.flatten(1), step([0, 1]))
        assert torch.isfinite(found).all()


def test_a_map_that_is_registered_later_is_served(tmp_path, feature_map_names):
    _, before = memory(tmp_path / "before", "default")
    slots = bank(before[0], None)
    register_feature_map("cosine")(torch.cos)
    model = with_memory(build(), feature_map="cosine", rank=4)
    model.save_pretrained(tmp_path / "after")
    slots.put(1, read_memory(tmp_path / "after", SIZES, LAYERS, RANK)[0])
    outputs, rotated, content = batch(4)
    found = outputs.flatten(1).clone()
    slots.add_(found, rotated.flatten(1), content.flatten(1), step([1, 0, 1, 0]))
    expected = of_layer(model, 0, outputs, rotated, content)
    torch.testing.assert_close(found.view_as(expected)[::2], expected[::2], atol=TOLERANCE, rtol=TOLERANCE)


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"placement": "inside", "prefix_length": 4}, "placement='inside'"),
        ({"prefix_length": 4, "similarity": "softmax"}, "divided by a sum"),
        ({"prefix_length": 4, "normalizer": True}, "divided by a sum"),
        ({"mixing": "fixed", "mix": 0.3}, "mixing='fixed'"),
        ({"feature_map": "mlp"}, "feature_map='mlp'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_is_no_product_with_the_features_is_refused(config, reason, tmp_path):
    with_memory(build(), **config).save_pretrained(tmp_path)
    with pytest.raises(PrefixMemoryError, match=f"cannot be served: .*{reason}"):
        read_memory(tmp_path, SIZES, LAYERS, RANK)


def test_a_rank_that_does_not_fit_names_the_option(tmp_path):
    with_memory(build(), rank=7).save_pretrained(tmp_path)
    with pytest.raises(PrefixMemoryError, match=r"has rank 7, and the server has room for 4.*--max-rank 8"):
        read_memory(tmp_path, SIZES, LAYERS, 4)


def test_a_full_memory_of_low_rank_is_factored_exactly(tmp_path):
    model = with_memory(build())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".M"):
                parameter.copy_(parameter[..., :3] @ torch.randn(SIZES.heads, 3, SIZES.value_dim))
    model.save_pretrained(tmp_path)
    served = read_memory(tmp_path, SIZES, LAYERS, 4)
    assert served[0].manner.rank == 4
    matrix = model.base_model.model.model.layers[0].self_attn.prefix_memory.memory("default").M
    torch.testing.assert_close(served[0].A @ served[0].B, matrix, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("sizes", "layers", "problem"),
    [
        (HeadSizes(8, 2, 8, 8), LAYERS, "does not fit the served model's 8 heads"),
        (HeadSizes(4, 2, 16, 16), LAYERS, "4 heads of 8 and 8 numbers does not fit"),
        (SIZES, 1, "has 1 layers"),
    ],
)
def test_a_memory_of_another_model_is_refused(sizes, layers, problem, tmp_path):
    with_memory(build()).save_pretrained(tmp_path)
    with pytest.raises(PrefixMemoryError, match=problem):
        read_memory(tmp_path, sizes, layers, RANK)


def spoil(folder: Path, change) -> None:
    """Change the tensors of a saved memory, and take the checksum from its config."""
    file, config_file = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"weights_sha256": None}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)}), "no part of a memory"),
        (lambda t: t.update({min(t): t[min(t)] * float("nan")}), "NaN"),
        (lambda t: t.update({min(t).replace(".A", ".C"): t.pop(min(t))}), "are not those of its config"),
    ],
)
def test_a_spoilt_file_is_refused(change, problem, tmp_path):
    with_memory(build(), rank=2).save_pretrained(tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(PrefixMemoryError, match=problem):
        read_memory(tmp_path, SIZES, LAYERS, RANK)


@pytest.mark.parametrize("normalize", ["feature_mean", "none"])
def test_a_mean_is_there_where_the_config_has_one(normalize, tmp_path):
    with_memory(build(), rank=2, normalize=normalize).save_pretrained(tmp_path)
    means = {"lacks": lambda t: [t.pop(name) for name in list(t) if name.endswith("mean")],
             "adds": lambda t: t.update({min(t).replace(".A", ".mean"): torch.zeros(4, 8)})}  # fmt: skip
    spoil(tmp_path, means["lacks" if normalize == "feature_mean" else "adds"])
    with pytest.raises(PrefixMemoryError, match=f"normalize='{normalize}' (needs a|has no) mean"):
        read_memory(tmp_path, SIZES, LAYERS, RANK)


def test_a_changed_file_is_refused_by_its_checksum(tmp_path):
    with_memory(build(), rank=2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(PrefixMemoryError, match="SHA-256"):
        read_memory(tmp_path, SIZES, LAYERS, RANK)


# --- feed-forward blocks ----------------------------------------------------------------------------------------


def with_blocks(folder: Path, **fields: object) -> PeftModel:
    model = with_memory(build(), **{"rank": 2, "feed_forward": 3, **fields})
    model.save_pretrained(folder)
    return model


def block_bank(reads: int, returns: int, cut: Cut | None = None) -> LayerBank:
    as_it_is, cpu = ("identity", "none"), torch.device("cpu")
    return LayerBank(2, RANK, 1, reads, returns, torch.float32, cpu, only=as_it_is, cut=cut)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("limit", [0.5, None])
def test_what_a_projection_adds_is_what_it_adds_in_transformers(limit, captured, tmp_path):
    """Into a part of what a server computes as one, for the tokens of a slot, at a scale of their own."""
    model = with_blocks(
        tmp_path, feed_forward_limit=limit, scale_pattern={"up_proj": 0.5}, rank_pattern={"0.mlp.up_proj": 1}
    )
    served = read_blocks(tmp_path, RANK)
    mlp = model.base_model.model.model.layers[0].mlp
    assert len(served) == 3 * LAYERS and read_memory(tmp_path, SIZES, LAYERS, RANK).keys() == set(range(LAYERS))
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer, module = served[f"model.layers.0.mlp.{name}"], getattr(mlp, name)
        assert layer.manner.rank == (1 if name == "up_proj" else 3)
        slots = block_bank(module.in_features, module.out_features)
        slots.put(1, layer)
        read, whole = torch.randn(4, module.in_features), torch.randn(4, 2 * module.out_features)
        here, before = whole[:, module.out_features :], whole.clone()
        (step_there,) = module.prefix_memory.plan(None).outside
        own = before[:, None, module.out_features :]
        new = step_there.add_to(own[None], own[None], {"content": read[None, :, None]}, None)[0, :, 0]
        slots.add_(here, read, read, step([1, -1, 1, 1], [float("nan")] * 3 + [0.0]), captured=captured)
        torch.testing.assert_close(here[[0, 2]], new[[0, 2]], atol=TOLERANCE, rtol=TOLERANCE)
        assert (here - before[:, module.out_features :])[0].abs().max() > 1e-3
        assert torch.equal(here[[1, 3]], before[[1, 3], module.out_features :])
        assert torch.equal(whole[:, : module.out_features], before[:, : module.out_features])


class Processes:
    """Threads in the place of processes that add up their tensors."""

    def __init__(self, number: int) -> None:
        self.barrier, self.given = Barrier(number), [torch.empty(0)] * number

    def total(self, rank: int, tensor: Tensor) -> Tensor:
        self.given[rank] = tensor
        self.barrier.wait(30)
        total = torch.stack(self.given).sum(0)
        self.barrier.wait(30)
        return total


@pytest.mark.parametrize("cut", ["inputs", "outputs"])
def test_processes_that_share_a_projection_add_what_one_process_does(cut, tmp_path):
    with_blocks(tmp_path)
    layer = read_blocks(tmp_path, RANK)["model.layers.0.mlp.up_proj"]
    reads, returns, processes = layer.A.shape[1], layer.B.shape[2], Processes(2)
    read, before, slots = torch.randn(5, reads), torch.randn(5, returns), [1, -1, 1, 0, 1]
    whole = before.clone()

    def add(part: ServedLayer, read: Tensor, outputs: Tensor, cut: Cut | None) -> Tensor:
        bank = block_bank(read.shape[1], outputs.shape[1], cut)
        bank.put(1, part)
        scales = [float("nan")] * 4 + [0.3]
        bank.add_(outputs, read, read, step(slots, scales))
        bank.add_(outputs, read, read, step([1] * 5))  # all of them the same
        return outputs

    add(layer, read, whole, None)
    places = {"inputs": torch.arange(reads), "outputs": torch.arange(returns)}

    def of_process(rank: int) -> Tensor:
        mine = {name: all_.chunk(2)[rank] if name == cut else all_ for name, all_ in places.items()}
        shared = Cut(cut == "inputs", cut == "outputs", partial(processes.total, rank))
        part = layer.of_part(mine["inputs"], mine["outputs"])
        return add(part, read[:, mine["inputs"]], before[:, mine["outputs"]].clone(), shared)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(of_process, range(2)))
    assert (whole - before).abs().max() > 1e-2
    if cut == "inputs":
        assert torch.equal(*found)
        torch.testing.assert_close(found[0], whole, atol=TOLERANCE, rtol=TOLERANCE)
    else:
        torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_server_is_asked_for_slots_where_an_adapter_needs_them(tmp_path, monkeypatch):
    monkeypatch.setattr("prefixmemory.serving.server.find_spec", lambda name: name)
    with_blocks(tmp_path / "blocks", feed_forward=9)
    with_memory(build()).save_pretrained(tmp_path / "heads")
    with_blocks_too = launch("base", {"blocks": str(tmp_path / "blocks")})
    assert with_blocks_too.environment == {FEED_FORWARD: "1"}
    assert with_blocks_too.arguments[with_blocks_too.arguments.index("--max-lora-rank") + 1] == "16"
    heads = {"heads": str(tmp_path / "heads")}
    assert launch("base", heads).environment == {}
    assert launch("base", heads, feed_forward=True).environment == {FEED_FORWARD: "1"}


@pytest.mark.parametrize(
    ("config", "needed"),
    [
        ({"rank": 3}, 3), ({"rank": 24}, 8), ({"rank": None}, 8), ({"prefix_length": 600, "rank": "auto"}, 8),
        ({"prefix_length": 5, "rank": "auto"}, 5), ({"prefix_length": 600, "rank": "auto", "reparameterize": 4}, 512),
        ({"rank": 3, "rank_pattern": {"layers.1.self_attn": 6}}, 6), ({"rank": 3, "feature_map": "gelu"}, 3),
    ],
    ids=str,
)  # fmt: skip
def test_the_rank_that_is_asked_for_is_that_of_the_factors(config, needed, tmp_path):
    with_memory(build(), **config).save_pretrained(tmp_path)
    assert rank_of(tmp_path) == needed
    served = read_memory(tmp_path, SIZES, LAYERS, needed)
    assert max(layer.manner.rank for layer in served.values()) == min(needed, SIZES.head_dim)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_server_names_weights_that_cannot_be_read(damage, tmp_path, monkeypatch):
    monkeypatch.setattr("prefixmemory.serving.server.find_spec", lambda name: name)
    with_memory(build(), rank=2).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(PrefixMemoryError, match=rf"adapter_model\.safetensors is {damage}"):
        launch("base", {"a": str(tmp_path)})


def test_blocks_need_slots_that_fit(tmp_path, monkeypatch):
    with_blocks(tmp_path)
    blocks = read_blocks(tmp_path, RANK)
    width = SIZES.heads * SIZES.head_dim
    monkeypatch.setenv(FEED_FORWARD, "1")
    check_blocks(blocks, width, tmp_path)
    check_blocks({}, 7, tmp_path)
    with pytest.raises(PrefixMemoryError, match="have 7 numbers"):
        check_blocks(blocks, 7, tmp_path)
    with pytest.raises(PrefixMemoryError, match="--max-rank 8"):
        read_blocks(tmp_path, 2)
    monkeypatch.setenv(FEED_FORWARD, "yes")
    with pytest.raises(PrefixMemoryError, match=f"{FEED_FORWARD}='yes' is not known"):
        has_room_for_blocks()
    monkeypatch.delenv(FEED_FORWARD)
    with pytest.raises(PrefixMemoryError, match=f"Start it with {FEED_FORWARD}=1"):
        check_blocks(blocks, width, tmp_path)
    spoil(tmp_path, lambda t: t.update({min(t).replace(".A", ".C"): t.pop(next(n for n in t if "down_proj" in n))}))
    with pytest.raises(PrefixMemoryError, match="are not those of its config"):
        read_blocks(tmp_path, RANK)


def test_a_name_without_a_layers_number_is_refused(tmp_path):
    with_blocks(tmp_path)
    spoil(tmp_path, lambda t: t.update({n.replace("mlp", "mlp.0"): t.pop(n) for n in list(t) if "down_proj" in n}))
    with pytest.raises(PrefixMemoryError, match=r"mlp\.0\.down_proj: its name has no single number"):
        read_blocks(tmp_path, RANK)
