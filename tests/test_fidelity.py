"""The hooks add exactly what the equations say: outputs and gradients equal ``reference.py``, family by family.

The oracle is the base model without any adapter, run with an attention function of our own: it calls
``reference.prefix_memory`` with an explicit M. It shares with the package only the equations: φ is written here, and
the query before rotation is caught where the family's modeling file rotates it, not by a hook on a projection.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from prefixmemory import PrefixMemoryConfig, reference
from tiny import CONFIGS, DEFAULT, memory_parameters, tokens, with_memory

TOLERANCE = 1e-5
ORACLE = "prefixmemory_oracle"
FAMILIES = list(CONFIGS)
#: Longer than the sliding window of the tiny models, which is 6.
LENGTH = 11


# --- the models -------------------------------------------------------------------------------------------------


def family_model(family: str, attention: str) -> PreTrainedModel:
    """A random base model whose attention is far from uniform, so that masks, windows, rotation and caps matter."""
    config = copy.deepcopy(CONFIGS[family])
    if family == "gemma2":
        config.attn_logit_softcapping = 2.0  # the default of 50 would hardly bend scores of order one
    if family == "gemma3":
        config.layer_types = ["sliding_attention", "full_attention"]  # both kinds: they rotate differently
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape))  # biases and norms start at 0 and 1
    return model


def padded_batch(length: int = LENGTH, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Two rows of tokens, the second left-padded where there is room, and their attention mask."""
    ids, mask = tokens(2, length), torch.ones(2, length, dtype=torch.long)
    pad = min(3, length - 1)
    ids[1, :pad], mask[1, :pad] = 0, 0
    return ids.to(device), mask.to(device)


# --- the oracle -------------------------------------------------------------------------------------------------

PLAIN_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu,
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda q: q,
    "softmax": lambda q: F.softmax(q, dim=-1),
}


@dataclass
class Oracle:
    """What the attention function of the oracle reads: the choices, and leaf copies of every memory tensor."""

    config: PrefixMemoryConfig
    leaves: dict[str, Tensor]
    means: dict[str, Tensor] = field(default_factory=dict)  # constants
    active: Tensor | None = None  # bool [batch, tokens]: where the memory speaks
    content_query: Tensor | None = None
    layers_called: list[int] = field(default_factory=list)

    def leaf(self, layer: int, name: str) -> Tensor | None:
        tensors = {**self.leaves, **self.means}
        found = [t for n, t in tensors.items() if re.search(rf"\.{layer}\.", n) and n.endswith(f".{name}")]
        assert len(found) <= 1
        return found[0] if found else None

    def per_head(self, x: Tensor, heads: int) -> Tensor:
        """Query head ``n`` reads memory ``n // (heads / memories)``."""
        return x[torch.arange(heads) // (heads // x.shape[0])]

    def memory(self, layer: int, heads: int) -> Tensor:
        m = self.leaf(layer, "M")
        if m is None:
            a, b = self.leaf(layer, "A"), self.leaf(layer, "B")
            m = torch.matmul(a, b)
        return self.per_head(m, heads)

    def phi(self, layer: int, heads: int) -> Callable[[Tensor], Tensor]:
        if self.config.feature_map == "mlp":
            w, b = (self.per_head(self.leaf(layer, name), heads) for name in ("W", "b"))

            def phi(q: Tensor) -> Tensor:
                return F.relu(torch.matmul(q, w) + b[:, None, :])
        else:
            phi = PLAIN_MAPS[self.config.feature_map]
        if self.config.normalize == "feature_mean":
            return reference.feature_mean(phi, self.per_head(self.leaf(layer, "mean"), heads))
        wrap = {"none": lambda f: f, "query_rms": reference.query_rms, "feature_l2": reference.feature_l2}
        return wrap[self.config.normalize](phi)


_current: Oracle | None = None


def oracle_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    oracle = _current
    oracle.layers_called.append(module.layer_idx)
    heads, scale, limit = query.shape[1], oracle.config.scale, oracle.config.output_limit
    memory, phi = oracle.memory(module.layer_idx, heads), oracle.phi(module.layer_idx, heads)
    asked = oracle.content_query if oracle.config.query == "content" and oracle.content_query is not None else query
    attended = {"allowed": attention_mask == 0, "scaling": scaling, "softcap": softcap}
    o = reference.attention(query, key, value, **attended)
    if limit is None:
        out = reference.prefix_memory(query, key, value, scale * memory, phi, memory_query=asked, **attended)
    else:
        out = o + scale * reference.limited(reference.read_memory(asked, memory, phi), o, limit)
    if oracle.active is not None:
        out = torch.where(oracle.active[:, None, :, None], out, o)
    oracle.content_query = None
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ORACLE, oracle_attention)
AttentionMaskInterface.register(ORACLE, eager_mask)


@contextmanager
def answering_from(oracle: Oracle, model: PreTrainedModel) -> Iterator[None]:
    """Let the oracle's attention function find its memory, and the query before rotation."""
    global _current
    modeling = sys.modules[type(model).__module__]
    rotate = getattr(modeling, "apply_rotary_pos_emb", None)

    def recording_rotate(q, *args, **kwargs):
        oracle.content_query = q
        return rotate(q, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if rotate is not None:  # GPT-2 does not rotate: its query is its content query
            patch.setattr(modeling, "apply_rotary_pos_emb", recording_rotate)
        _current = oracle
        yield
        _current = None


@dataclass
class Result:
    logits: Tensor  # of the real tokens
    gradients: dict[str, Tensor]


def loss_of(logits: Tensor) -> Tensor:
    """A scalar that depends on every logit with another weight."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    return (weights.to(logits.device) * logits).sum()


def result(logits: Tensor, parameters: dict[str, Tensor], backward: bool = True) -> Result:
    if not backward:
        return Result(logits.detach(), {})
    gradients = torch.autograd.grad(loss_of(logits), list(parameters.values()))
    return Result(logits.detach(), dict(zip(parameters, gradients, strict=True)))


def run_adapter(model: PeftModel, ids: Tensor, mask: Tensor, backward: bool = True) -> Result:
    with torch.set_grad_enabled(backward):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    return result(logits, memory_parameters(model), backward)


def run_oracle(
    family: str,
    config: PrefixMemoryConfig,
    parameters: dict[str, Tensor],
    ids: Tensor,
    mask: Tensor,
    query: str | None = None,
    means: dict[str, Tensor] | None = None,
    active: Tensor | None = None,
) -> Result:
    model = family_model(family, ORACLE).to(ids.device)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    oracle = Oracle(copy.copy(config), leaves, means or {}, active)
    oracle.config.query = query or config.query
    with answering_from(oracle, model):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        assert oracle.layers_called == list(range(model.config.num_hidden_layers))
    return result(logits, leaves)


def difference(a: Result, b: Result) -> float:
    """Largest difference of logits, and of gradients after every gradient is brought to a largest entry of one."""
    assert 0.5 < b.logits.abs().max() < 50
    worst = (a.logits - b.logits).abs().max().item()
    for name in a.gradients:
        size = b.gradients[name].abs().max().item()
        assert size > 1e-3, f"{name} has no gradient to speak of"
        worst = max(worst, ((a.gradients[name] - b.gradients[name]).abs().max() / size).item())
    return worst


def compare(
    family: str, attention: str, length: int = LENGTH, backward: bool = True, device: str = "cpu", **config: object
) -> None:
    """Assert that the adapter and the oracle agree in logits and in the gradient of every memory tensor."""
    model = with_memory(family_model(family, attention).to(device), **config)
    parameters = memory_parameters(model)
    tensors = {"mlp": 2}.get(config.get("feature_map"), 0) + (1 if config.get("rank") is None else 2)
    assert len(parameters) == tensors * model.config.num_hidden_layers
    ids, mask = padded_batch(length, device)
    ours = run_adapter(model, ids, mask, backward)
    means = {name: mean for name, mean in model.named_parameters() if name.endswith(".mean")}
    assert all(mean.any() for mean in means.values()), "a mean of zero would test nothing"
    assert len(means) == (model.config.num_hidden_layers if config.get("normalize") == "feature_mean" else 0)
    theirs = run_oracle(family, model.peft_config["default"], parameters, ids, mask, means=means)
    assert set(ours.gradients) == (set(theirs.gradients) if backward else set())
    assert difference(ours, theirs) < TOLERANCE


# --- whole models against the oracle ----------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["content", "rotary"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_the_oracle_in_logits_and_gradients(family, attention, query):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma 2: it cannot cap the scores")
    compare(family, attention, query=query)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_limited_answers_equal_the_oracle_in_logits_and_gradients(family, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no sdpa for Gemma 2: it cannot cap the scores")
    compare(family, attention, **DEFAULT)


@pytest.mark.parametrize("normalize", ["none", "query_rms", "feature_l2", "feature_mean"])
@pytest.mark.parametrize("feature_map", [*PLAIN_MAPS, "mlp"])
def test_feature_map_and_normalisation_equal_the_oracle(feature_map, normalize):
    compare("llama_gqa", "eager", feature_map=feature_map, normalize=normalize)


@pytest.mark.parametrize(
    "config",
    [
        DEFAULT,
        dict(rank=3),
        dict(share_heads=True),
        dict(rank=3, share_heads=True),
        dict(feature_map="mlp", feature_dim=5),
        dict(feature_map="mlp", feature_dim=5, rank=2, share_heads=True),
        dict(scale=-0.6),
        dict(output_limit=0.3),
        dict(output_limit=2.0, rank=3, share_heads=True, scale=-0.6),
        dict(output_limit=0.3, feature_map="mlp", feature_dim=5, normalize="query_rms"),
        dict(rank=3, feature_map="mlp", feature_dim=5, share_heads=True, normalize="feature_mean"),
    ],
    ids=str,
)
@pytest.mark.parametrize("query", ["content", "rotary"])
def test_parametrisation_of_the_memory_equals_the_oracle(config, query):
    compare("llama_gqa", "eager", query=query, **config)


@pytest.mark.parametrize("length", [1, 2, 4, 5])
@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_query_norm_is_read_right_whatever_the_number_of_tokens(family, length):
    # Gemma 3 normalises [B, H, T, D] and Qwen 3 [B, T, H, D]; with T = H = 4 the shapes cannot tell them apart.
    compare(family, "eager", length=length)


# transformers compiles flex attention, and torch's compiler trips over deprecations of its own at three places so far.
flex_warning = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@flex_warning
@pytest.mark.parametrize("config", [dict(query="content"), dict(query="rotary"), DEFAULT], ids=str)
def test_flex_attention_equals_the_oracle_in_logits(config):
    compare("llama_gqa", "flex_attention", backward=False, **config)


@flex_warning
@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="gradients need a GPU: torch says 'FlexAttention does not support backward on CPU'",
)
@pytest.mark.parametrize("config", [dict(query="content"), dict(query="rotary"), DEFAULT], ids=str)
def test_flex_attention_equals_the_oracle_in_gradients(config, monkeypatch):
    wider = copy.deepcopy(CONFIGS["llama_gqa"])
    wider.head_dim = 16  # flex attention on a GPU takes no smaller heads
    monkeypatch.setitem(CONFIGS, "llama_gqa", wider)
    compare("llama_gqa", "flex_attention", device="cuda", **config)


def test_negative_control_another_mean_is_far_away():
    model = with_memory(family_model("llama_gqa", "eager"), normalize="feature_mean")
    parameters, config = memory_parameters(model), model.peft_config["default"]
    means = {name: mean.roll(1, 0) for name, mean in model.named_parameters() if name.endswith(".mean")}
    ids, mask = padded_batch()
    theirs = run_oracle("llama_gqa", config, parameters, ids, mask, means=means)  # the next head's μ
    assert (run_adapter(model, ids, mask).logits - theirs.logits).abs().max() > 1e3 * TOLERANCE


@pytest.mark.parametrize("family", ["llama_gqa", "gemma3", "gpt_neox"])
def test_negative_control_another_memory_or_another_query_is_far_away(family):
    """The comparison would notice: the size of what it looks for is thousands of times the tolerance."""
    model = with_memory(family_model(family, "eager"), query="content")
    parameters, config = memory_parameters(model), model.peft_config["default"]
    ids, mask = padded_batch()
    ours = run_adapter(model, ids, mask)
    one_entry = {name: p.detach().clone() for name, p in parameters.items()}
    next(iter(one_entry.values()))[0, 0, 0] += 1.0
    for theirs in (
        run_oracle(family, config, one_entry, ids, mask),
        run_oracle(family, config, parameters, ids, mask, query="rotary"),
        run_oracle(family, config, {n: p.roll(1, 0) for n, p in parameters.items()}, ids, mask),  # the next head's M
        run_oracle(family, dataclasses.replace(config, output_limit=2.0), parameters, ids, mask),  # a wide limit
    ):
        assert (ours.logits - theirs.logits).abs().max() > 1e3 * TOLERANCE


# --- each step of the reference ---------------------------------------------------------------------------------


@dataclass
class Heads:
    """Random queries, keys, values and prefix of an attention with 4 query heads and 2 key/value heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    allowed: Tensor


@pytest.fixture
def heads() -> Heads:
    return Heads(
        q=torch.randn(2, 4, 5, 8),
        k=torch.randn(2, 2, 5, 8),
        v=torch.randn(2, 2, 5, 6),  # values of another size than keys
        prefix_k=torch.randn(2, 2, 3, 8),
        prefix_v=torch.randn(2, 2, 3, 6),
        allowed=torch.ones(5, 5, dtype=torch.bool).tril()[None, None],
    )


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


def head_by_head(x: Tensor, head: int) -> Tensor:
    """Key/value head of query head ``head``: with 4 on 2, heads 0 and 1 use the first, 2 and 3 the second."""
    return x[:, head // 2]


def concatenated_weights(h: Heads, head: int) -> Tensor:
    """Softmax weights of one head over [prefix, input], prefix first and always visible."""
    keys = torch.cat([head_by_head(h.prefix_k, head), head_by_head(h.k, head)], dim=1)
    scores = h.q[:, head] @ keys.transpose(1, 2) / 8**0.5
    visible = torch.cat([torch.ones(5, 3, dtype=torch.bool), h.allowed[0, 0]], dim=1)
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)


@pytest.mark.parametrize("scaling", [None, 0.7])
def test_attention_equals_torch_sdpa(heads, scaling):
    expected = F.scaled_dot_product_attention(
        heads.q, heads.k, heads.v, attn_mask=heads.allowed, scale=scaling, enable_gqa=True
    )
    close(reference.attention(heads.q, heads.k, heads.v, heads.allowed, scaling=scaling), expected)
    unmasked = F.scaled_dot_product_attention(heads.q, heads.k, heads.v, scale=scaling, enable_gqa=True)
    close(reference.attention(heads.q, heads.k, heads.v, scaling=scaling), unmasked)


def test_softcap_bends_the_scores_and_never_exceeds_the_cap(heads):
    plain = reference.scores(heads.q, heads.k)
    capped = reference.scores(heads.q, heads.k, softcap=0.5)
    close(capped, 0.5 * torch.tanh(plain / 0.5))
    assert capped.abs().max() <= 0.5 < plain.abs().max()
    weights = capped.masked_fill(~heads.allowed, -torch.inf).softmax(dim=-1)
    expected = weights @ heads.v.repeat_interleave(2, dim=1)
    close(reference.attention(heads.q, heads.k, heads.v, heads.allowed, softcap=0.5), expected)


def test_prefix_tuning_is_one_softmax_over_prefix_and_input(heads):
    actual = reference.prefix_tuning(heads.q, heads.k, heads.v, heads.prefix_k, heads.prefix_v, heads.allowed)
    for head in range(4):
        values = torch.cat([head_by_head(heads.prefix_v, head), head_by_head(heads.v, head)], dim=1)
        close(actual[:, head], concatenated_weights(heads, head) @ values)


def test_prefix_share_is_the_weight_of_the_prefix_and_mixes_the_two_attentions(heads):
    alpha = reference.prefix_share(heads.q, heads.k, heads.prefix_k, heads.allowed)
    expected = [concatenated_weights(heads, head)[..., :3].sum(dim=-1, keepdim=True) for head in range(4)]
    close(alpha, torch.stack(expected, dim=1))
    of_input = F.scaled_dot_product_attention(heads.q, heads.k, heads.v, attn_mask=heads.allowed, enable_gqa=True)
    of_prefix = F.scaled_dot_product_attention(heads.q, heads.prefix_k, heads.prefix_v, enable_gqa=True)
    mixed = reference.prefix_tuning(heads.q, heads.k, heads.v, heads.prefix_k, heads.prefix_v, heads.allowed)
    close(mixed, (1 - alpha) * of_input + alpha * of_prefix)


def test_prefix_share_shrinks_with_the_input_and_grows_with_the_prefix(heads):
    share = reference.prefix_share(heads.q, heads.k, heads.prefix_k)
    longer_input = reference.prefix_share(heads.q, torch.cat([heads.k, heads.k], dim=2), heads.prefix_k)
    longer_prefix = reference.prefix_share(heads.q, heads.k, torch.cat([heads.prefix_k, heads.prefix_k], dim=2))
    assert (longer_input < share).all() and (share < longer_prefix).all()


def test_outside_prefix_mixes_with_a_fixed_share(heads):
    def outside(lam: float) -> Tensor:
        return reference.outside_prefix(
            heads.q, heads.k, heads.v, heads.prefix_k, heads.prefix_v, lam, heads.allowed
        )  # fmt: skip

    of_input = F.scaled_dot_product_attention(heads.q, heads.k, heads.v, attn_mask=heads.allowed, enable_gqa=True)
    of_prefix = F.scaled_dot_product_attention(heads.q, heads.prefix_k, heads.prefix_v, enable_gqa=True)
    close(outside(1.0), of_input)
    close(outside(0.0), of_prefix)
    close(outside(0.3), 0.3 * of_input + 0.7 * of_prefix)


def test_kernel_prefix_equals_explicit_sums_over_the_prefix(heads):
    def phi(x: Tensor) -> Tensor:
        return F.elu(x) + 1  # positive, so that the normaliser is far from zero

    actual = reference.kernel_prefix(heads.q, heads.prefix_k, heads.prefix_v, phi)
    for b in range(2):
        for head in range(4):
            for i in range(5):
                similarity = [phi(heads.q[b, head, i]) @ phi(heads.prefix_k[b, head // 2, p]) for p in range(3)]
                weighted = sum(s * heads.prefix_v[b, head // 2, p] for p, s in enumerate(similarity))
                close(actual[b, head, i], weighted / sum(similarity))


def test_kernel_prefix_is_a_memory_read_with_its_normaliser_taken_out(heads):
    """Step 3 to step 4: with M = B of a prefix, φ(q)ᵀM is the kernel prefix times φ(q)ᵀn."""
    q, prefix_k, prefix_v = heads.q[:1], heads.prefix_k[:1], heads.prefix_v[:1]
    keys, values = (x.repeat_interleave(2, dim=1) for x in (prefix_k, prefix_v))
    bank = torch.einsum("bhpf,bhpv->hfv", F.elu(keys), values)
    normaliser = torch.einsum("bhif,bhpf->bhi", F.elu(q), F.elu(keys))[..., None]
    read = reference.read_memory(q, bank, F.elu)
    kernel = reference.kernel_prefix(q, prefix_k, prefix_v, F.elu)
    torch.testing.assert_close(kernel * normaliser, read, atol=TOLERANCE, rtol=1e-4)


def test_prefix_memory_adds_each_heads_own_read_to_attention(heads):
    memory, other_query = torch.randn(4, 8, 6), torch.randn(2, 4, 5, 8)
    frozen = reference.attention(heads.q, heads.k, heads.v, heads.allowed)
    for query in (None, other_query):
        actual = reference.prefix_memory(
            heads.q, heads.k, heads.v, memory, F.elu, heads.allowed, memory_query=query
        )  # fmt: skip
        for head in range(4):
            read = F.elu((heads.q if query is None else query)[:, head]) @ memory[head]
            close(actual[:, head], frozen[:, head] + read)
    zero = reference.prefix_memory(heads.q, heads.k, heads.v, torch.zeros_like(memory), F.elu, heads.allowed)
    assert torch.equal(zero, frozen)


def test_query_rms_and_feature_l2_take_the_scale_out(heads):
    def unit(q: Tensor) -> Tensor:
        return F.normalize(q, dim=-1) * q.shape[-1] ** 0.5  # unit root-mean-square

    close(reference.query_rms(F.elu)(heads.q), F.elu(unit(heads.q)))
    close(reference.feature_l2(F.elu)(heads.q), F.normalize(F.elu(heads.q), dim=-1))


def test_feature_mean_takes_out_what_is_the_same_for_all_queries_of_a_head(heads):
    mean = F.elu(heads.q).mean(dim=(0, 2))
    left = reference.feature_mean(F.elu, mean)(heads.q)
    close(left.mean(dim=(0, 2)), torch.zeros_like(mean))
    close(left[:, 1], F.elu(heads.q[:, 1]) - mean[1])
