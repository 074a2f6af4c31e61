"""Every row of the tables of families is right: the queries, the heads and their order, against two oracles.

The first knows how attention depends on its query: what is changed in the query of one head at one token changes that
head's output at that token, and nothing else in the layer. A key or a value changes other tokens too, a wrong head or
order changes another slice. The second takes down every tensor that enters a product while the attention runs, and
looks for the query among them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import tiny
from family_models import CASES, build, inputs, run
from prefixmemory import PrefixMemoryConfig, PrefixMemoryError, reference
from prefixmemory.attention import families
from prefixmemory.attention.discovery import _projection, find_site, find_sites, is_cross_attention
from prefixmemory.attention.sites import AttentionSite

# Old configs speak of their generation settings, and of options that no tiny model needs.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers", "ignore::FutureWarning:transformers")


def sites_of(model: nn.Module) -> dict[str, AttentionSite]:
    """The first site of each class."""
    return {type(site.core).__name__: site for site in reversed(find_sites(model).values())}


# --- the first oracle: a changed query changes one head at one token ------------------------------------------------


def positions(site: AttentionSite, output: Tensor, source_input: Tensor) -> Tensor:
    """Where in ``output`` the site reads each query: flat indices ``[tokens, heads, head_dim]``."""
    index = torch.arange(output.numel(), dtype=torch.float64).reshape(output.shape)
    plain = dataclasses.replace(site, bias="", clip=None)
    return plain.query_from(index, source_input).reshape(-1, site.heads, site.head_dim).long()


def changed(site: AttentionSite, forward: Callable[[], object], token: int, head: int) -> Tensor:
    """Which ``[token, head]`` outputs change with the query of one head at one token."""
    heads: list[Tensor] = []
    changing = seen = False

    def change(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> object:
        nonlocal seen
        if seen or not changing:  # only what is projected first is a query
            return None
        seen = True
        first = (output[0] if isinstance(output, tuple) else output).clone(memory_format=torch.contiguous_format)
        where = positions(site, first, args[0])[token, head]
        first.view(-1)[where] += 3 * torch.randn(site.head_dim)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        heads.append(args[0].reshape(-1, site.heads, site.value_dim).clone())

    handles = [
        site.query_source.register_forward_hook(change),
        site.output_projection.register_forward_pre_hook(record),
    ]
    with torch.no_grad():
        forward()
        before = heads[0]
        heads.clear()
        changing = True
        forward()
    for handle in handles:
        handle.remove()
    return (heads[0] - before).abs().amax(dim=-1) > 1e-5 * before.abs().max()


def reads_the_query(site: AttentionSite, forward: Callable[[], object], mixes: bool = False) -> bool:
    """Whether every head of the site answers to its own query alone."""
    for head in range(site.heads):
        found = False
        for token in (5, 4, 3):  # a head that looks at one token only does not change with its query
            changes = changed(site, forward, token, head)
            elsewhere = changes.clone()
            elsewhere[token] = False if mixes else elsewhere[token] & (torch.arange(site.heads) != head)
            if elsewhere.any():
                return False
            found = found or bool(changes[token].any())
        if not found:
            return False
    return True


@pytest.mark.parametrize("name", [name for name in CASES if name != "reformer_lsh"])  # where queries are keys too
def test_the_query_of_each_head_is_read_where_it_is(name):
    case = CASES[name]
    model = build(case)
    sites = sites_of(model)
    assert {c: (s.query_path, s.output_path, s.blocks) for c, s in sites.items()} == case.found
    for site in sites.values():
        assert reads_the_query(site, lambda: run(case, model), case.mixes)


@pytest.mark.parametrize("name", ["t5", "bart", "prophetnet", "pix2struct", "lxmert", "gpt2"])
def test_the_query_of_cross_attention_is_read_where_it_is(name):
    case = CASES[name]
    if name == "gpt2":
        case = dataclasses.replace(case, config=case.config | dict(add_cross_attention=True))
    model = build(case)
    states = {"gpt2": "encoder_hidden_states", "pix2struct": "encoder_hidden_states"}.get(name)
    more = {states: torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))} if states else {}
    modules = [m for n, m in model.named_modules() if is_cross_attention(n, m)]
    sites = [site for module in modules if (site := find_site(module)) is not None]
    assert sites
    for site in sites:
        assert reads_the_query(site, lambda: model(**inputs(case), **more))


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("gpt_neox", 1), ("bloom", 2), ("gpt2", 4), ("phi3", 2), ("codegen", 1), ("codegen", 8), ("falcon_grouped", 1),
        ("falcon_grouped", 4), ("falcon_heads", 1), ("gpt_bigcode_heads", 1), ("modernbert", 4), ("mpt", 4),
        ("deberta", 1), ("axk2", 1), ("blip_vision", 4),
    ],
)  # fmt: skip
def test_the_oracle_finds_a_query_that_is_read_wrongly(name, blocks):
    model = build(CASES[name])
    (site,) = sites_of(model).values()
    assert not reads_the_query(dataclasses.replace(site, blocks=blocks), lambda: run(CASES[name], model))


# --- the second oracle: the query is what attention multiplies with the keys -----------------------------------------

#: Families whose products hold another tensor, and why; the first oracle has them all.
NOT_MULTIPLIED = {
    "nanochat": "a norm follows the rotation",
    "hunyuan": "a norm follows the rotation",
    "llama4": "a norm follows the rotation",
    "funnel": "a bias of the relative positions is added",
    "jetmoe": "rows are sorted by expert",
    "prophetnet": "the streams are cut apart",
    "timesformer": "time and space are rearranged",
    "big_bird": "short rows are handed to another module",
}


class Products(TorchFunctionMode):
    """Takes down the tensors that enter products."""

    NAMES = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.NAMES:
            flat = [
                x
                for arg in (*args, *(kwargs or {}).values())
                for x in (arg if isinstance(arg, tuple | list) else (arg,))
            ]
            self.factors += [x.clone() for x in flat if isinstance(x, Tensor)]
        return function(*args, **(kwargs or {}))


def content_query(site: AttentionSite, forward: Callable[[], object]) -> tuple[Tensor, list[Tensor]]:
    """The query ``[tokens, heads, head_dim]`` of one pass, gathered by position, and the tensors that were factors."""
    taken: list[Tensor] = []
    mode = Products()

    def take(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if not taken:
            taken.append(first.reshape(-1)[positions(site, first, args[0])])

    handles = [
        site.query_source.register_forward_hook(take),
        site.core.register_forward_pre_hook(lambda *_: mode.__enter__() and None),
        site.core.register_forward_hook(lambda *_: mode.__exit__(None, None, None)),
    ]
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    query = taken[0]
    if site.bias:
        query = query + getattr(site.core, site.bias).view(site.heads, site.head_dim)
    if site.clip is not None:
        assert query.abs().max() > site.clip  # else this would show nothing
        query = query.clamp(-site.clip, site.clip)
    return query, mode.factors


def is_rotated(factor: Tensor, query: Tensor, rows: int) -> bool:
    """Whether ``factor`` is ``query`` up to rotation and one scale: every token of every head keeps its norm, and the
    first token is not rotated (though its channels may be reordered)."""
    tokens, heads, head_dim = query.shape
    if factor.shape[-1] != head_dim or factor.numel() != query.numel():
        return False
    factor = factor.reshape(rows, heads, tokens // rows, head_dim).transpose(1, 2)
    query = query.reshape(rows, tokens // rows, heads, head_dim)
    ratio = factor.norm(dim=-1) / query.norm(dim=-1)
    first, scaled = (x[:, 0].sort(dim=-1).values for x in (factor, query * ratio.mean()))
    return torch.allclose(ratio, ratio.mean(), rtol=1e-3) and torch.allclose(first, scaled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_MULTIPLIED])
def test_the_query_is_what_attention_multiplies_with_the_keys(name):
    model = build(CASES[name])
    for site in sites_of(model).values():
        query, factors = content_query(site, lambda: run(CASES[name], model))
        rows = 1 if name == "qwen2_vl_vision" else 2
        assert any(is_rotated(factor, query, rows) for factor in factors)
        assert not any(is_rotated(factor, query.flip(0), rows) for factor in factors)
        if site.blocks > 1 and not site.normed:
            wrong, factors = content_query(dataclasses.replace(site, blocks=1), lambda: run(CASES[name], model))
            assert not any(is_rotated(factor, wrong, rows) for factor in factors)


@pytest.mark.parametrize("name", ["llama", "qwen3", "nanochat", "hunyuan", "llama4", "deepseek_v3", "codegen", "zaya"])
def test_the_content_query_does_not_know_where_it_stands(name):
    model = build(CASES[name])
    site = next(iter(find_sites(model).values()))
    near, far = (
        content_query(site, lambda start=start: model(**inputs(CASES[name]), position_ids=positions_from(start)))[0]
        for start in (0, 7)
    )
    assert torch.allclose(near, far, atol=1e-5)


#: Families whose queries pass a norm, where heads and tokens could be taken for each other.
NORMED = [name for name in CASES if name in ("zaya", "qwen3", "gemma3", "stablelm", "phi", "cohere_qk", "olmoe")]


@pytest.mark.parametrize("name", NORMED)
def test_as_many_tokens_as_heads_are_no_heads(name):
    """A causal model says the same of a text's beginning, whatever follows; the longer text cannot be misread."""
    torch.manual_seed(0)
    model = get_peft_model(build(CASES[name]), PrefixMemoryConfig(output_limit=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    heads = {site.heads for site in find_sites(model.get_base_model()).values()}
    ids = torch.randint(3, 90, (2, max(heads) + 3), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for count in heads:
            assert torch.allclose(model(input_ids=ids[:, :count]).logits, whole[:, :count], atol=1e-4)


@pytest.mark.parametrize("name", ["gpt_neo", "llama"])
def test_the_factor_of_the_scores_is_that_of_the_models_own_attention(name):
    model = build(CASES[name])
    model.set_attn_implementation("eager")
    site = next(iter(find_sites(model).values()))
    keys: list[Tensor] = []
    site.core.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    ids = torch.arange(3, 13).expand(2, -1)
    same = {"position_ids": torch.zeros_like(ids)}  # nothing is rotated
    with torch.no_grad():
        query, _ = content_query(site, lambda: model(input_ids=ids, **same))
        weights = model(input_ids=ids, output_attentions=True, **same).attentions[0]
    queries = query.reshape(2, 10, site.heads, site.head_dim).transpose(1, 2)
    key = keys[0].reshape(2, 10, site.kv_heads, site.head_dim).transpose(1, 2)
    scores = queries @ key.repeat_interleave(site.heads // site.kv_heads, dim=1).transpose(2, 3)
    hidden = torch.ones(10, 10, dtype=torch.bool).triu(1)

    def attention(scaling: float) -> Tensor:
        return (scores * scaling).masked_fill(hidden, -torch.inf).softmax(-1)

    assert torch.allclose(attention(site.scaling), weights, atol=1e-5)
    assert not torch.allclose(attention(2 * site.scaling), weights, atol=1e-2)


def test_a_factor_that_a_config_gives_is_read():
    model = build(CASES["mpt"])
    model.transformer.blocks[0].attn.softmax_scale = 0.3
    assert next(iter(find_sites(model).values())).scaling == 0.3


def positions_from(start: int) -> Tensor:
    return torch.arange(start, start + 10).expand(2, -1)


# --- memories --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_memory_adds_its_answer_to_its_head_alone_and_learns(name):
    case = CASES[name]
    model = build(case).requires_grad_(False)  # as PEFT does: torch multiplies by a weight that learns in another way
    with torch.no_grad():
        before = run(case, model)
    adapted = get_peft_model(model, PrefixMemoryConfig(rank=None, output_limit=None, normalize="none")).eval()
    with torch.no_grad():
        assert torch.equal(run(case, adapted), before)
    memories = {n: p for n, p in adapted.named_parameters() if ".prefix_memory_bank.default." in n}
    assert len(memories) == len(find_sites(model))

    for site in sites_of(model).values():
        memory = site.module.prefix_memory.memory("default").M
        head = site.heads - 1
        seen: list[Tensor] = []
        handle = site.output_projection.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            query, _ = content_query(site, lambda: run(case, adapted))
            memory[head].normal_()
            run(case, adapted)
            plain, added = seen[0], seen[len(seen) // 2]
            expected = reference.read_memory(query.transpose(0, 1)[None], memory, F.elu)[0].transpose(0, 1)
            expected = expected[: plain.numel() // (site.heads * site.value_dim)].reshape(plain.shape)
            if name != "prophetnet":  # the first call has the first stream of each row
                assert torch.allclose(added - plain, expected, atol=1e-4)
            assert expected.reshape(-1, site.heads, site.value_dim)[:, :head].abs().max() == 0
            assert expected.abs().max() > 0.1
            memory.zero_()
        handle.remove()

    if case.model_type == "reformer":  # its reversible layers want both for a gradient
        model.enable_input_require_grads()
        adapted.train()
    with torch.no_grad():
        for memory in memories.values():
            memory.normal_(std=0.1)
    answer = run(case, adapted)
    (answer * torch.randn(answer.shape)).sum().backward()
    for parameter, memory in memories.items():
        assert memory.grad is not None and memory.grad.abs().max() > 0, parameter
    assert (answer - before).abs().max() > 1e-4


# --- the tables against transformers' source --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attention_classes() -> dict[str, str]:
    """The source of every attention class of transformers."""
    found = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for source in re.split(r"\n(?=class )", file.read_text()):
            name = re.match(r"class (\w+)", source)
            if name and families.ATTENTION.search(name[1]) and "def forward(" in source:
                found[f"{file.parent.name}.{name[1]}"] = source
    return found


def test_no_q_norm_that_is_read_comes_after_the_rotation_or_before_the_projection(attention_classes):
    (norm,) = (norm for norm in families.QUERY_NORMS if norm.child == "q_norm")
    wrong, right = [], 0
    for name, source in attention_classes.items():
        forward = source[source.index("def forward(") :]
        called = re.search(r"self\.q_norm\(", forward)
        if called and not re.match(norm.but, name.partition(".")[2]):
            rotated = re.search(r"apply_\w*(rot|rope)\w*\(", forward)
            before_projection = re.search(r"self\.q_norm\(hidden_states", forward)
            wrong += [name] if before_projection or (rotated and rotated.start() < called.start()) else []
            right += 1
    assert right > 60
    assert wrong == []


def test_only_attention_with_a_softmax_passes_by_its_name(attention_classes):
    passing, others = 0, []
    for name, source in attention_classes.items():
        projects = re.search(r"self\.(q_proj|query|q|q_lin|query_key_value|c_attn|qkv|Wqkv) = ", source)
        if projects and not families.NOT_SOFTMAX.search(name.partition(".")[2]):
            softmax = re.search(r"[sS]oftmax|attention_interface|scaled_dot_product|logsumexp|_attention\(", source)
            passing += bool(softmax)
            others += [] if softmax else [name]
    assert passing > 300
    # neither has an output projection that is called
    assert others == ["aria.AriaCrossAttention", "visual_bert.VisualBertRegionToPhraseAttention"]


def test_every_row_of_the_tables_is_tried():
    found = [find_site(module) for case in CASES.values() for module in build(case).modules()]
    sites = [site for site in found if site is not None]
    names = {path for site in sites for path in (site.query_path, site.output_path)}
    cores = {site.query_path.partition(".")[0] for site in sites if site.core is not site.module}
    assert {norm.child for norm in families.QUERY_NORMS} - names == set()
    assert set(families.OUTPUT_PROJECTIONS) - names == set()
    assert cores == set(families.CORES)
    rows = {_projection(site.core) for site in sites}
    assert {row.path for row in set(families.QUERY_PROJECTIONS) - rows} == {"q_attn"}  # tried above


def test_a_memory_stays_where_a_model_makes_the_module_around_its_projections_anew():
    """BigBird does when a text is short: the query projection is where it was, in another module."""
    case = CASES["big_bird"]
    model = build(case)
    adapted = get_peft_model(model, PrefixMemoryConfig()).eval()
    core = model.get_submodule(next(iter(find_sites(model)))).self
    with torch.no_grad():
        before = run(case, model)
    assert model.get_submodule(next(iter(find_sites(model)))).self is not core
    tiny.randomize(adapted, std=0.5)
    with torch.no_grad():
        assert (run(case, adapted) - before).abs().max() > 1e-3
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(LoraConfig(target_modules=["query"]), model)
    with pytest.raises(PrefixMemoryError, match="wrapped or replaced"), torch.no_grad():
        run(case, model)
